"""Learning from a teacher's predictions, besides the labels.

    L = α_ce · CE + α_distil · D,   D = T² · KL(softmax(z_teacher / T) ‖ softmax(z_student / T))

T is the temperature: a high one shows what a teacher thinks of the classes that it does not choose.
T² keeps the gradient's size whatever T is (Hinton et al. 2015). D is the mean over a batch's rows.

What has a distribution differs from task to task: a row's classes or choices, the places where its
answer starts and ends, every scored token of a text. A `Distilled` says where its logits are. A
teacher's logits travel with a batch under the name `TARGETS`, for the loss alone; they are kept as
(N, K) numbers, a row's entries after another's, so that rows may have different numbers of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from examples.errors import OptionError
from transformers_patched.heads import LOGITS_AT_ONCE

TARGETS = "teacher_logits"  # among a batch's arguments; no model gets it
ANSWERS = ("labels", "start_positions", "end_positions")  # what a teacher need not know

Loss = Callable[[Any, dict[str, Any]], Tensor]


class Distilled(Protocol):
    """Where the distributions of a task are in a model's output.

    Attributes:
        asked: arguments of the model, beside a batch's own, that make its output hold them.
        asked_of_teacher: further ones, for the teacher alone.
        unread: a batch's arguments that a teacher is not given.
        name: tells it from others, in the key of logits that are kept.
    """

    asked: Mapping[str, Any]
    asked_of_teacher: Mapping[str, Any]
    unread: tuple[str, ...]
    name: str

    def entries(self, split: Any) -> np.ndarray:
        """(n,) how many of the N entries each row of an encoded split has."""
        ...

    def logits(self, output: Any, arguments: dict[str, Any]) -> Tensor:
        """(N, K) of a batch, its rows' entries one after another: what a teacher says."""
        ...

    def divergence(
        self, output: Any, targets: Tensor, arguments: dict[str, Any], temperature: float
    ) -> Tensor:
        """Mean over a batch's rows of D; `targets` (N, K) are the teacher's logits."""
        ...


def divergence(student: Tensor, teacher: Tensor, temperature: float, real: Tensor | None) -> Tensor:
    """(rows,) D of every row, in fp32 at least.

    Args:
        student: (rows, C) logits.
        teacher: (rows, C) logits.
        temperature: T.
        real: (rows, C) bool, False at columns that a row has not; None where it has all.
    """
    wide = torch.promote_types(student.dtype, torch.float32)
    logs = []
    for logits in (student, teacher):
        z = logits.to(wide) / temperature
        if real is not None:
            z = z.masked_fill(~real, torch.finfo(wide).min)
        logs.append(z.log_softmax(1))
    own, target = logs
    terms = target.exp() * (target - own)  # (rows, C)
    if real is not None:
        terms = terms.masked_fill(~real, 0)
    return temperature**2 * terms.sum(1)


class Classes:
    """A row's classes, or a question's choices: logits (b, C), one entry a row."""

    asked: Mapping[str, Any] = {}
    asked_of_teacher: Mapping[str, Any] = {}
    unread = ANSWERS
    name = "classes"

    def entries(self, split: Any) -> np.ndarray:
        return np.ones(len(split), np.int64)

    def logits(self, output: Any, arguments: dict[str, Any]) -> Tensor:
        return output.logits

    def divergence(
        self, output: Any, targets: Tensor, arguments: dict[str, Any], temperature: float
    ) -> Tensor:
        real = None
        counts = arguments.get("choice_counts")  # (b,) where rows differ in their choices
        if counts is not None:
            real = torch.arange(targets.shape[1], device=targets.device) < counts[:, None]
        return divergence(output.logits, targets, temperature, real).mean()


class Spans:
    """Where an answer starts and where it ends: an entry of two for every real token of a row.

    The distributions are over a row's own tokens: padding takes no part in them.
    """

    asked: Mapping[str, Any] = {}
    asked_of_teacher: Mapping[str, Any] = {}
    unread = ANSWERS
    name = "spans"

    def entries(self, split: Any) -> np.ndarray:
        return split.lengths

    def logits(self, output: Any, arguments: dict[str, Any]) -> Tensor:
        both = torch.stack((output.start_logits, output.end_logits), -1)  # (*tokens, 2)
        mask = arguments.get("attention_mask")
        return both.flatten(0, -2) if mask is None else both[mask.bool()]

    def divergence(
        self, output: Any, targets: Tensor, arguments: dict[str, Any], temperature: float
    ) -> Tensor:
        lengths = self._lengths(output, arguments)  # (b,)
        columns = torch.arange(int(lengths.max()), device=lengths.device)
        real = columns < lengths[:, None]  # (b, L)
        place = real.flatten().nonzero()[:, 0]  # (N,)
        found = []
        for logits in (self.logits(output, arguments), targets):  # (N, 2)
            empty = logits.new_zeros(real.numel(), 2)
            found.append(empty.index_copy(0, place, logits).view(*real.shape, 2))
        sides = zip(*(logits.unbind(-1) for logits in found), strict=True)  # (student, teacher)
        start, end = (divergence(*pair, temperature, real).mean() for pair in sides)
        return (start + end) / 2

    @staticmethod
    def _lengths(output: Any, arguments: dict[str, Any]) -> Tensor:
        if arguments.get("cu_seqlens") is not None:
            return arguments["cu_seqlens"].diff()
        if arguments.get("attention_mask") is not None:
            return arguments["attention_mask"].sum(1)
        rows, length = output.start_logits.shape
        return torch.full((rows,), length, device=output.start_logits.device)


class Tokens:
    """The next token at every scored place of a text: one entry a place, D is the mean over them.

    A teacher says its last hidden states there, (N, H'), which are much less than logits of a
    vocabulary; its head stays at hand and forms them, a slice at a time.

    Args:
        objective: "clm" or "jlm", which says the scored places.
        vocabulary: how many tokens the run's model tells apart.
    """

    asked: Mapping[str, Any] = {"output_scored_states": True}
    asked_of_teacher: Mapping[str, Any] = {"return_loss": False}
    unread: tuple[str, ...] = ()  # labels say which places are scored

    def __init__(self, objective: str, vocabulary: int) -> None:
        self.objective, self.vocabulary = objective, vocabulary
        self.name = f"tokens of {objective}"
        self.head: Tensor | None = None  # (vocabulary, H') of the teacher

    def entries(self, split: Any) -> np.ndarray:
        return split.counts(self.objective)

    def logits(self, output: Any, arguments: dict[str, Any]) -> Tensor:
        states, self.head = output.scored_states
        if len(self.head) != self.vocabulary:
            raise OptionError(
                f"--teacher: it tells {len(self.head):,} tokens apart, this model "
                f"{self.vocabulary:,}: choose a teacher of the same family"
            )
        return states

    def divergence(
        self, output: Any, targets: Tensor, arguments: dict[str, Any], temperature: float
    ) -> Tensor:
        assert self.head is not None  # a teacher has spoken, or there were no targets
        return token_divergence(output.scored_states, (targets, self.head), temperature)


def token_divergence(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], temperature: float
) -> Tensor:
    """Mean of D over the scored places of a language model.

    Logits are formed a slice of places at a time, and again in the backward pass, so that the
    (N, vocabulary) ones never exist in one piece.

    Args:
        student: (N, H) last hidden states at the scored places, and the (vocabulary, H) head.
        teacher: the same of the teacher, (N, H') and (vocabulary, H').
        temperature: T.
    """
    (own, head), (other, their_head) = student, teacher
    rows = max(1, LOGITS_AT_ONCE // len(head))

    def of_slice(h: Tensor, t: Tensor, weight: Tensor) -> Tensor:
        logits = h.to(weight.dtype) @ weight.T  # (n, vocabulary)
        targets = t.to(their_head.dtype) @ their_head.T
        return divergence(logits, targets, temperature, None).sum()

    pieces = zip(own.split(rows), other.detach().split(rows), strict=True)
    sums = [checkpoint(of_slice, h, t, head, use_reentrant=False) for h, t in pieces]
    return torch.stack(sums).sum() / max(1, len(own))


def distilled_loss(
    own: Loss | None, kind: Distilled, alpha_ce: float, alpha_distil: float, temperature: float
) -> Loss:
    """The loss L of batches that have `TARGETS`.

    Args:
        own: CE, the task's own loss: (output, arguments) -> mean over the rows; None: the model's.
        kind: where the distributions are.
        alpha_ce: weight of the task's own loss.
        alpha_distil: weight of D.
        temperature: T.
    """

    def loss(output: Any, arguments: dict[str, Any]) -> Tensor:
        distance = kind.divergence(output, arguments[TARGETS], arguments, temperature)
        labelled = output.loss if own is None else own(output, arguments)
        return alpha_ce * labelled + alpha_distil * distance

    return loss


def for_the_model(arguments: dict[str, Any]) -> dict[str, Any]:
    """A batch's arguments without what only the loss reads."""
    return {name: value for name, value in arguments.items() if name != TARGETS}
