"""`generate`: what a user calls."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..models.gpt2.modeling_gpt2 import GPT2LMHeadModel
from .decoding import Decoding
from .options import SearchOptions, checked_contexts, eos_ids

# Products over about 250 rows are a CPU's fastest: contexts alive times beams.
ROWS_AT_ONCE = 256
MOST_LANES = 64


@torch.no_grad()
def generate(
    model: nn.Module,
    contexts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    num_beams: int = 1,
    length_penalty: float = 1.0,
    no_repeat_ngram_size: int = 0,
    repetition_penalty: float = 1.0,
    min_new_tokens: int = 0,
    eos_token_id: int | Sequence[int] | None = (50256,),
    early_stopping: bool | str = False,
    rules: str = "lora",
    batch_size: int | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """The continuation of every context, by greedy decoding, sampling or beam search.

    Contexts may differ in length. Each is read once for all its beams, and the same context twice
    is decoded once (sampled ones are not). The result does not depend on `batch_size`.

    Args:
        model: A GPT-2 with its language-model head. Adapters of `peft_custom` are merged meanwhile.
        contexts: Lists of ids, none empty.
        max_new_tokens: Longest continuation, EOS included.
        num_beams: 1 decodes greedily, or samples.
        length_penalty: Exponent a of a hypothesis's score Σ log p / n^a with n new tokens.
        no_repeat_ngram_size: n-grams of this size occur once; 0 allows all.
        repetition_penalty: ρ, for tokens that occurred: s to ρ·s below 0 and s/ρ above.
        min_new_tokens: EOS cannot come before so many tokens.
        eos_token_id: One or several ids that end a text; None lets all run to the end.
        early_stopping: True, "never" or False, as in Transformers, of whose rules it is.
        rules: "lora", of Hu et al.'s `gpt2_beam.py`, or "transformers", of Transformers' `generate`
            given one context at a time. See `rules`.
        batch_size: Contexts alive at once; None chooses.
        do_sample: From the `top_k` likeliest tokens and the fewest that hold the mass `top_p`.
        generator: Of sampling; None takes the default one.

    Returns:
        New tokens of every context in order, EOS included, without padding.

    Raises:
        ValueError: An option or a context is wrong; it is named.
        TypeError: There is no GPT2LMHeadModel in the model.
    """
    options = SearchOptions(
        max_new_tokens=max_new_tokens, num_beams=num_beams, length_penalty=float(length_penalty),
        no_repeat_ngram_size=no_repeat_ngram_size, min_new_tokens=min_new_tokens,
        repetition_penalty=float(repetition_penalty), eos=eos_ids(eos_token_id), rules=rules,
        early_stopping=early_stopping, do_sample=do_sample, temperature=float(temperature),
        top_k=top_k, top_p=float(top_p),
    )  # fmt: skip
    return _decode(model, contexts, options, batch_size, generator)


def _decode(
    model: nn.Module,
    contexts: Sequence[Sequence[int]],
    options: SearchOptions,
    batch_size: int | None,
    generator: torch.Generator | None,
) -> list[list[int]]:
    language_model = _language_model(model)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r}: must be at least 1, or None")
    config, new = language_model.config, options.max_new_tokens
    checked = checked_contexts(contexts, config.vocab_size, config.n_positions, new)
    if not checked:
        return []
    samples = options.do_sample
    distinct = checked if samples else list(dict.fromkeys(checked))
    draws = torch.rand(len(distinct), new, generator=generator) if samples else None
    lanes = batch_size or min(MOST_LANES, max(1, ROWS_AT_ONCE // options.num_beams))
    with _ready_to_decode(model):
        found = Decoding(language_model, options, lanes, distinct, draws).run()
    if samples:
        return found
    by_context = dict(zip(distinct, found, strict=True))
    return [list(by_context[context]) for context in checked]


def _language_model(model: nn.Module) -> GPT2LMHeadModel:
    """The language model itself, which an adapted model wraps."""
    found = next((m for m in model.modules() if isinstance(m, GPT2LMHeadModel)), None)
    if found is None:
        raise TypeError(
            f"generate needs a GPT2LMHeadModel of transformers_patched, plain or adapted, not a "
            f"{type(model).__name__}: load it with AutoModelForCausalLM.from_pretrained"
        )
    return found


@contextlib.contextmanager
def _ready_to_decode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode with adapters merged; afterwards every module is as it was, to the bit."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    merged = []
    try:
        for module in model.modules():
            if _can_merge(module):
                merged.append(module)
                module.merge()
        yield
    finally:
        for module in merged:
            module.unmerge()
        for module in training:
            module.training = True


def _can_merge(module: nn.Module) -> bool:
    """Whether this is a layer wrapped by `peft_custom` whose merged weight loses nothing."""
    # by its attributes: this package does not import peft_custom
    if not all(hasattr(module, name) for name in ("base_layer", "merged_adapters", "unmerge")):
        return False
    idle = module.merged_adapters or not module.adapters_enabled
    return not idle and module.base_layer.weight.dtype == torch.float32
