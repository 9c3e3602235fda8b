"""What a search may be asked for, and the errors of asking for something else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

RULES = ("lora", "transformers")


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """One search; the fields are the arguments of `generate`, checked."""

    max_new_tokens: int
    num_beams: int
    length_penalty: float
    no_repeat_ngram_size: int
    repetition_penalty: float
    min_new_tokens: int
    eos: frozenset[int]
    early_stopping: bool | str
    rules: str
    do_sample: bool
    temperature: float
    top_k: int | None
    top_p: float

    def __post_init__(self) -> None:
        for name, least in (
            ("max_new_tokens", 1),
            ("num_beams", 1),
            ("min_new_tokens", 0),
            ("no_repeat_ngram_size", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r}: must be a whole number of at least {least}")
        if self.rules not in RULES:
            raise ValueError(f"rules={self.rules!r}: must be 'lora' or 'transformers'")
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"length_penalty={self.length_penalty!r}: must be a finite number")
        for name in ("repetition_penalty", "temperature"):
            value = getattr(self, name)
            if not 0.0 < value < math.inf:
                raise ValueError(f"{name}={value!r}: must be above 0; 1.0 changes nothing")
        if self.early_stopping not in (False, True, "never"):
            raise ValueError(
                f"early_stopping={self.early_stopping!r}: must be False, True or 'never'"
            )
        if self.early_stopping is not False and self.rules == "lora":
            raise ValueError(
                f"early_stopping={self.early_stopping!r} belongs to rules='transformers': the "
                "original's rules stop exactly when nothing better can come"
            )
        self._check_sampling()

    def _check_sampling(self) -> None:
        if self.do_sample and self.num_beams > 1:
            raise ValueError(f"do_sample=True samples one token at a time: num_beams must be 1, "
                             f"not {self.num_beams}")  # fmt: skip
        if self.top_k is not None and (not isinstance(self.top_k, int) or self.top_k < 1):
            raise ValueError(f"top_k={self.top_k!r}: must be at least 1, or None for all tokens")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p={self.top_p!r}: must be in (0, 1]; 1.0 keeps all tokens")
        chosen = (self.temperature, self.top_k, self.top_p) != (1.0, None, 1.0)
        if chosen and not self.do_sample:
            raise ValueError("temperature, top_k and top_p need do_sample=True")

    @property
    def is_beam(self) -> bool:
        return self.num_beams > 1

    @property
    def num_candidates(self) -> int:
        """Continuations of all of a context's beams that are looked at, the best ones."""
        if self.rules == "lora":
            return self.num_beams
        return max(2, 1 + len(self.eos)) * self.num_beams

    @property
    def edits_scores(self) -> bool:
        """Whether any score depends on what was generated before, or when."""
        return bool(
            self.no_repeat_ngram_size or self.min_new_tokens or self.repetition_penalty != 1.0
        )


def eos_ids(value: int | Sequence[int] | None) -> frozenset[int]:
    """The ids that end a text, from one, several or none."""
    if value is None:
        return frozenset()
    return frozenset([value] if isinstance(value, int) else (int(token) for token in value))


def checked_contexts(
    contexts: Sequence[Sequence[int]], vocabulary: int, positions: int, max_new_tokens: int
) -> list[tuple[int, ...]]:
    """The contexts as tuples of ids.

    Args:
        contexts: Lists or tensors of ids.
        vocabulary: Ids are below it.
        positions: Tokens that the model has positions for. The last new token needs none.
        max_new_tokens: At most so many are generated.

    Raises:
        ValueError: A context is empty, too long, or has another id; it is named by its place.
    """
    checked = []
    for i, context in enumerate(contexts):
        if isinstance(context, torch.Tensor):
            context = context.tolist()
        if not isinstance(context, Sequence) or isinstance(context, str):
            raise ValueError(f"contexts[{i}] is a {type(context).__name__}: a list of ids is asked")
        if not context:
            raise ValueError(f"contexts[{i}] is empty: give it one token at least, such as EOS")
        ids = tuple(int(token) for token in context)
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            wrong = next(token for token in ids if not 0 <= token < vocabulary)
            raise ValueError(
                f"contexts[{i}] has the id {wrong}, but this model's vocabulary ends at "
                f"{vocabulary - 1}: encode it with the model's own tokenizer"
            )
        if len(ids) + max_new_tokens - 1 > positions:
            raise ValueError(
                f"contexts[{i}] has {len(ids)} tokens; with max_new_tokens={max_new_tokens} that "
                f"is more than this model's {positions} positions: keep its last "
                f"{max(0, positions - max_new_tokens + 1)} tokens, or generate fewer"
            )
        checked.append(ids)
    return checked
