"""The options of pretraining: text, tokenizer, and the sizes of a new model. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from examples.cli.fields import option
from examples.errors import OptionError


@dataclass(frozen=True)
class PretrainingOptions:
    train_file: str | None = option(
        None, "text files, or folders of *.txt, with commas between them; one file, one document"
    )
    validation_share: float = option(
        0.02, "share of every document, its end, that is held out", low=0.0001, high=0.5
    )
    join_lines: int = option(
        0, "a line of at least so many characters goes on in the next one; 0: never", low=0
    )
    model_name_or_path: str | None = option(
        None, "a GPT-2 to go on from, with its tokenizer; none: a new one of the sizes below"
    )
    vocab_size: int = option(4096, "tokens of the new tokenizer", low=258)
    block_size: int = option(512, "tokens per row; a new model has as many positions", low=2)
    n_embd: int = option(192, "width of the new model", low=2)
    n_layer: int = option(4, "its blocks", low=1)
    n_head: int = option(3, "its attention heads", low=1)
    saved_dtype: str = option("float32", "of the saved weights", choices=("float32", "bfloat16"))

    def __post_init__(self) -> None:
        if self.n_embd % self.n_head:
            raise OptionError(
                f"--n_embd {self.n_embd} is no multiple of --n_head {self.n_head}: every head has "
                "an equal share of the width"
            )

    @property
    def paths(self) -> list[str]:
        """The files and folders of `train_file`.

        Raises:
            OptionError: there is none.
        """
        found = [part.strip() for part in (self.train_file or "").split(",") if part.strip()]
        if not found:
            raise OptionError("--train_file is needed: text files, or folders of *.txt")
        return found
