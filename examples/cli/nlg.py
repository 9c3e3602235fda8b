"""The options of text generation: data, decoding. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from examples.cli.fields import option
from examples.cli.groups import DataOptions
from examples.errors import OptionError

METRICS = ("e2e", "webnlg", "xsum", "boolq")  # examples.evaluation.nlg has them
OBJECTIVES = ("clm", "jlm")
RULES = ("lora", "transformers")


@dataclass(frozen=True)
class NlgOptions(DataOptions):
    """`DataOptions`, and what only pairs of a context and its completion have.

    `--data_dir` has a folder of the task, or is it: with what `examples.data.prepare_nlg` has
    written, or with the raw files. A file of one's own is one that it has written, with token ids
    or with texts.
    """

    max_length: int = option(
        512, "tokens of context and completion; the beginning of a longer context is cut", low=3
    )
    obj: str = option(
        "clm",
        "what is learned: clm, the completion; jlm, context and completion; evaluations score the "
        "completion",
        choices=OBJECTIVES,
    )
    dropout: float = option(
        0.0,
        "of the pretrained model's own layers, whatever its config.json says; the original recipe "
        "has dropout before the increments alone (--lora_dropout)",
        low=0,
        high=0.999,
    )
    metrics: str | None = option(
        None, "whose metrics generated texts get; none: the task's own, e2e's", choices=METRICS
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("text_column", "label_column"):
            if getattr(self, name):
                raise OptionError(f"--{name}: rows are pairs of a context and its completion")
        if self.dataset_name is not None:
            raise OptionError(
                "--dataset_name: boolq and xsum are read from the hub with --task_name and without "
                "--data_dir; other pairs are read from files"
            )


@dataclass(frozen=True)
class DecodingOptions:
    """How texts are generated, by --do_predict and --eval_generate."""

    num_beams: int = option(1, "hypotheses kept; 1: the likeliest token, one by one", low=1)
    max_new_tokens: int = option(
        64, "longest generated text; a context keeps its last max_length - max_new_tokens", low=1
    )
    min_new_tokens: int = option(0, "shortest generated text", low=0)
    length_penalty: float = option(1.0, "a hypothesis of n tokens scores Σ log p / n^this")
    no_repeat_ngram_size: int = option(4, "no so many tokens come twice; 0: they may", low=0)
    repetition_penalty: float = option(1.0, "above 1: tokens that occurred become unlikely", low=0)
    eos_token_id: tuple[str, ...] = option(
        (), "ids that end a text beside the tokenizer's own, such as 628 (an empty line)"
    )
    decoding_rules: str = option(
        "lora", "of beam search: the original recipe's, or Transformers'", choices=RULES
    )
    decode_batch_size: int | None = option(
        None, "contexts decoded at once; none chooses; texts do not depend on it", low=1
    )
    eval_generate: int = option(
        0, "every evaluation also decodes and scores the first so many contexts", low=0
    )

    def __post_init__(self) -> None:
        for word in self.eos_token_id:
            if not word.isdecimal():
                raise OptionError(f"--eos_token_id {word}: ids are whole numbers, such as 628")
        if self.repetition_penalty == 0:
            raise OptionError("--repetition_penalty 0: must be more than 0; 1.0 changes nothing")
        if self.min_new_tokens > self.max_new_tokens:
            raise OptionError(
                f"--min_new_tokens {self.min_new_tokens} is more than --max_new_tokens "
                f"{self.max_new_tokens}"
            )
