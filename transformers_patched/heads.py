"""What the heads of all models share: outputs, losses, activations, and where first tokens are.

Every function takes the tokens of a batch padded, (B, L, ...), or packed, (T, ...), with the
`SequenceLayout` that says which, and gives equal results for both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .configuration import ConfigError, PretrainedConfig
from .layout import SequenceLayout

# ---------------------------------------------------------------------- outputs


class ModelOutput(dict):
    """A dictionary whose entries are attributes too, in the order of the class's annotations.

    `output["logits"]`, `output.logits` and `output[0]` all work; what was not computed is left
    out of the dictionary and of `to_tuple()`, and is None as an attribute.
    """

    def __init__(self, values: Mapping[str, Any] | Iterable = (), **fields: Any) -> None:
        given = {**dict(values), **fields}
        names = type(self).__annotations__
        if unknown := [name for name in given if name not in names]:
            raise TypeError(f"{type(self).__name__} has no field {', '.join(map(repr, unknown))}")
        super().__init__({name: given[name] for name in names if given.get(name) is not None})

    def __getattr__(self, name: str) -> Any:
        if name in type(self).__annotations__:
            return self.get(name)
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        self[name] = value

    def __getitem__(self, key: str | int | slice) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(self.values())


class BaseModelOutputWithPooling(ModelOutput):
    last_hidden_state: Tensor  # (B, L, H) or (T, H)
    pooler_output: Tensor | None  # (B, H)
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None

    def traced(self) -> dict[str, tuple[Tensor, ...] | None]:
        """What a head passes on from the base model: hidden states and attention weights."""
        return {"hidden_states": self.hidden_states, "attentions": self.attentions}


class MaskedLMOutput(ModelOutput):
    loss: Tensor | None
    logits: Tensor  # (B, L, vocabulary) or (T, vocabulary)
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


class CausalLMOutput(ModelOutput):
    loss: Tensor | None
    # (B, L, vocabulary) or (T, vocabulary); none beside a loss, (B, 1) where sequences are scored
    logits: Tensor | None
    scored_states: tuple[Tensor, Tensor] | None  # (N, H) and the (vocabulary, H) head, if asked for
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


class SequenceClassifierOutput(ModelOutput):
    loss: Tensor | None
    logits: Tensor  # (B, labels)
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


class QuestionAnsweringModelOutput(ModelOutput):
    loss: Tensor | None
    start_logits: Tensor  # (B, L) or (T,)
    end_logits: Tensor  # (B, L) or (T,)
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


class MultipleChoiceModelOutput(ModelOutput):
    loss: Tensor | None
    logits: Tensor  # (Q, choices), the lowest number of the dtype where a question has fewer
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None


# ---------------------------------------------------------------------- tokens


def layout_of(
    input_ids: Tensor | None,
    inputs_embeds: Tensor | None,
    attention_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
) -> SequenceLayout:
    """Makes the layout of a call: packed where it has `cu_seqlens`, padded otherwise."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds")
    tokens = input_ids if input_ids is not None else inputs_embeds[..., 0]
    if cu_seqlens is None:
        if tokens.dim() != 2:
            raise ValueError(
                f"input of shape {tuple(tokens.shape)}: padded tokens are (batch, length); "
                "packed ones, (tokens,), need cu_seqlens and max_seqlen"
            )
        return SequenceLayout.padded(attention_mask, *tokens.shape, tokens.device)
    if tokens.dim() != 1 or max_seqlen is None or attention_mask is not None:
        raise ValueError(
            "a packed call has tokens (T,), cu_seqlens and max_seqlen, and no attention_mask; here "
            f"tokens are {tuple(tokens.shape)}, max_seqlen is {max_seqlen} and attention_mask is "
            f"{'None' if attention_mask is None else 'given'}"
        )
    return SequenceLayout.packed(cu_seqlens, max_seqlen, tokens.shape[0])


def first_tokens(hidden: Tensor, layout: SequenceLayout) -> Tensor:
    """(B, H): the hidden state of the first token of every sequence; (B, H) stays as it is."""
    if hidden.dim() == 2 and hidden.shape[0] == layout.num_sequences:
        return hidden
    return hidden.index_select(0, layout.cls_index()) if layout.is_packed else hidden[:, 0]


def last_tokens(hidden: Tensor, layout: SequenceLayout, real: Tensor | None) -> Tensor:
    """(B, H): the hidden state of the last token of every sequence.

    Of padded tokens the last one marked `real` (B, L), if that is given; the first where none is.
    """
    if layout.is_packed:
        return hidden.index_select(0, layout.cu_seqlens[1:].long() - 1)
    if real is None:
        return hidden[:, -1]
    places = torch.arange(layout.max_seqlen, device=hidden.device)  # (L,)
    last = (places * real).argmax(1)  # (B,)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def next_tokens(labels: Tensor, layout: SequenceLayout) -> Tensor:
    """(*tokens): the label of the token after each; -100 after the last one, and at padding."""
    targets = torch.full_like(labels, -100)
    targets[..., :-1] = labels[..., 1:]
    if layout.is_packed:
        targets[layout.cu_seqlens[1:].long() - 1] = -100
    elif layout.key_mask is not None:
        targets.masked_fill_(~layout.key_mask, -100)
    return targets


def in_dtype_of(hidden: Tensor, layer: nn.Module) -> Tensor:
    """Casts to the dtype of `layer`'s weights: an fp32 head reads the states of a bf16 base."""
    return hidden.to(next(layer.parameters()).dtype)


def flatten_choices(*tokens: Tensor | None) -> tuple[int, tuple[Tensor | None, ...]]:
    """(B, choices, L, ...) each to (B·choices, L, ...); returns the number of choices as well."""
    given = [x for x in tokens if x is not None]
    if not given or any(x.dim() < 3 or x.shape[:2] != given[0].shape[:2] for x in given):
        shapes = ", ".join(str(tuple(x.shape)) for x in given) or "none"
        raise ValueError(f"padded multiple choice takes (batch, choices, length); given: {shapes}")
    return given[0].shape[1], tuple(None if x is None else x.flatten(0, 1) for x in tokens)


def choice_logits(
    scores: Tensor,
    layout: SequenceLayout,
    labels: Tensor | None,
    num_choices: int | None,
    counts: Tensor | None,
) -> Tensor:
    """(S, 1) scores of all sequences, one question's after another's, to (Q, choices).

    Args:
        scores: one for every sequence.
        layout: of the sequences.
        labels: (Q,); without counts and `num_choices` they say how many choices a question has.
        num_choices: of every question; with counts the most of them, or a GPU is asked for it.
        counts: (Q,) choices of each question, where they differ. After a question's last one comes
            the lowest number of the dtype, of which a softmax makes 0, and no gradient.

    Raises:
        ValueError: the sequences are not so many choices (a GPU stops at wrong counts).
    """
    if counts is None:
        return scores.view(-1, num_choices or _choices_per_label(labels, layout))
    counts = counts.to(device=scores.device, dtype=torch.int64)
    columns = int(counts.max()) if num_choices is None else num_choices
    good = (counts.sum() == len(scores)) & (counts > 0).all() & (counts <= columns).all()
    message = (
        f"choice_counts must be at least 1, at most num_choices={columns}, and add up to the "
        f"{len(scores)} sequences"
    )
    if scores.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(good, message)
    elif not good:
        raise ValueError(f"{message}; they are {counts.tolist()}")
    questions = torch.arange(len(counts), device=scores.device)
    question = questions.repeat_interleave(counts, output_size=len(scores))  # (S,)
    first = (counts.cumsum(0) - counts)[question]  # (S,) where each one's question starts
    place = torch.arange(len(scores), device=scores.device) - first  # (S,)
    empty = scores.new_full((len(counts), columns), torch.finfo(scores.dtype).min)
    return empty.index_put((question, place), scores[:, 0])


def _choices_per_label(labels: Tensor | None, layout: SequenceLayout) -> int:
    """The choices per question of a packed call, which has one label per question."""
    if labels is None:
        raise ValueError("packed multiple choice without labels needs num_choices or choice_counts")
    choices, rest = divmod(layout.num_sequences, labels.numel())
    if rest:
        raise ValueError(
            f"{layout.num_sequences} sequences are no choices of {labels.numel()} questions"
        )
    return choices


class Decoder(nn.Linear):
    """Logits over the vocabulary, computed in the dtype of the weight, returned in the input's.

    The weight is usually the word embedding, which may be frozen in bf16 while the bias is trained
    in fp32.
    """

    def forward(self, hidden: Tensor) -> Tensor:
        dtype = self.weight.dtype
        bias = None if self.bias is None else self.bias.to(dtype)
        logits = F.linear(hidden.to(dtype), self.weight, bias)
        return logits.to(hidden.dtype)


# ---------------------------------------------------------------------- losses


def classification_loss(logits: Tensor, labels: Tensor, config: PretrainedConfig) -> Tensor:
    """Mean squared error, cross-entropy or binary cross-entropy, as `config.problem_type` says.

    Without a problem type, one label means regression, integer labels one class per row, and other
    labels (B, labels) several.

    Args:
        logits: (B, num_labels).
        labels: (B,), or (B, num_labels) for several labels per row.
        config: Has `num_labels` and `problem_type`.
    """
    kind = config.problem_type
    if kind is None and config.num_labels == 1:
        kind = "regression"
    if kind is None:
        whole = labels.dtype in (torch.int64, torch.int32)
        kind = "single_label_classification" if whole else "multi_label_classification"
    logits = logits.float()
    if kind == "regression":
        return F.mse_loss(logits.reshape(labels.shape), labels.float())
    if kind == "single_label_classification":
        return F.cross_entropy(logits, labels.view(-1).long())
    return F.binary_cross_entropy_with_logits(logits, labels.float())


def masked_lm_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the tokens that have a label; -100 marks those without.

    Args:
        logits: (B, L, vocabulary) or (T, vocabulary).
        labels: (B, L) or (T,).
    """
    return F.cross_entropy(logits.flatten(0, -2).float(), labels.flatten())


# A language model's logits are formed for so many numbers at a time, in fp32 32 MB.
LOGITS_AT_ONCE = 1 << 23


def language_model_loss(
    hidden: Tensor, weight: Tensor, targets: Tensor, label_smoothing: float = 0.0
) -> Tensor:
    """Sum over rows of (1 - ε)·(-log p(target)) + ε·mean over the vocabulary of -log p.

    Logits are formed a slice of rows at a time, and each slice's gradient with it, so that the
    (N, vocabulary) logits never exist in one piece.

    Args:
        hidden: (N, H), only the rows that carry loss: the vocabulary costs more than a layer.
        weight: (vocabulary, H).
        targets: (N,) ids.
        label_smoothing: ε.

    Returns:
        fp32 scalar. Divide it by the number of scored tokens of the whole optimiser step.
    """
    return _LanguageModelLoss.apply(hidden, weight, targets, label_smoothing)


class _LanguageModelLoss(torch.autograd.Function):
    """With z = W h, p = softmax(z), and y the one-hot target:

    L = log Σ exp(z) - (1 - ε) z·y - ε mean(z)
    dL/dz = p - (1 - ε) y - ε / V,   dh = Wᵀ dL/dz,   dW = Σ dL/dz hᵀ
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, epsilon: float) -> Tensor:
        vocabulary = weight.shape[0]
        total = torch.zeros((), device=hidden.device)
        wants_h, wants_w = ctx.needs_input_grad[:2]
        dh = torch.empty_like(hidden) if wants_h else None
        dw = torch.zeros_like(weight, dtype=torch.float32) if wants_w else None
        rows = max(1, LOGITS_AT_ONCE // vocabulary)
        for start in range(0, len(targets), rows):
            h = hidden[start : start + rows].to(weight.dtype)  # (n, H)
            y = targets[start : start + rows]  # (n,)
            z = (h @ weight.T).float()  # (n, V)
            log_sum = z.logsumexp(1, keepdim=True)  # (n, 1)
            total += (log_sum[:, 0] - (1 - epsilon) * z.gather(1, y[:, None])[:, 0]).sum()
            if epsilon > 0.0:
                total -= epsilon * z.mean(1).sum()
            if not (wants_h or wants_w):
                continue
            z.sub_(log_sum).exp_()
            z.sub_(epsilon / vocabulary)
            z.scatter_add_(1, y[:, None], z.new_full((len(y), 1), epsilon - 1))
            dz = z.to(weight.dtype)
            if wants_h:
                dh[start : start + len(y)] = dz @ weight
            if wants_w:
                dw += dz.T @ h
        ctx.save_for_backward(dh, dw)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        dh, dw = ctx.saved_tensors
        dh = None if dh is None else dh * grad.to(dh.dtype)
        dw = None if dw is None else (dw * grad).to(ctx.dtype)
        return dh, dw, None, None


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """(N,) -log p(target) of every row, without gradients; arguments of `language_model_loss`."""
    rows = max(1, LOGITS_AT_ONCE // weight.shape[0])
    with torch.no_grad():
        return torch.cat([
            F.cross_entropy((h.to(weight.dtype) @ weight.T).float(), y, reduction="none")
            for h, y in zip(hidden.split(rows), targets.split(rows), strict=True)
        ])  # fmt: skip


def sum_by_sequence(values: Tensor, places: Tensor, layout: SequenceLayout) -> Tensor:
    """(B,) the sums of values (N,) over the sequences of a layout.

    Args:
        values: of some tokens.
        places: (N,) where they are among the flattened tokens, ascending.
        layout: of all tokens.
    """
    if layout.is_packed:
        sequence = torch.searchsorted(layout.cu_seqlens[1:], places, right=True)  # (N,)
    else:
        sequence = places // layout.max_seqlen
    return values.new_zeros(layout.num_sequences).index_add_(0, sequence, values)


def span_loss(
    start_logits: Tensor,
    end_logits: Tensor,
    start_positions: Tensor,
    end_positions: Tensor,
    layout: SequenceLayout,
) -> Tensor:
    """Mean of the cross-entropies of a span's start and end over the tokens of its sequence.

    Padding takes no part in the softmax, so that the loss does not depend on how a batch is padded.
    Spans that lie outside the sequence are left out of the mean.

    Args:
        start_logits: (B, L) or (T,); `end_logits` likewise.
        start_positions: (B,) relative to each sequence; `end_positions` likewise.
        layout: Of the tokens.
    """

    def one(logits: Tensor, positions: Tensor) -> Tensor:
        logits = layout.pad(logits).float()  # (B, L)
        positions = positions.view(-1).clamp(min=0)  # (B,)
        inside = positions < layout.max_seqlen
        if layout.key_mask is not None:
            logits = logits.masked_fill(~layout.key_mask, torch.finfo(logits.dtype).min)
            column = positions.clamp(max=layout.max_seqlen - 1)[:, None]
            inside = inside & layout.key_mask.gather(1, column)[:, 0]
        return F.cross_entropy(logits, positions.where(inside, -100))

    return (one(start_logits, start_positions) + one(end_logits, end_positions)) / 2


# ---------------------------------------------------------------------- activations


NUMBERS_AT_ONCE = 1 << 17  # of an activation: its steps meet them in a CPU's caches


def _gelu_tanh(x: Tensor) -> Tensor:
    """0.5·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))"""
    if x.device.type == "cpu" and x.dtype == torch.float32 and not torch.compiler.is_compiling():
        return _GeluBySigmoid.apply(x)
    return F.gelu(x, approximate="tanh")


class _GeluBySigmoid(torch.autograd.Function):
    """The same as x·σ(2·√(2/π)·(x + 0.044715·x³)): a CPU's σ takes a third of its tanh's time."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        factor, y = 2.0 * math.sqrt(2.0 / math.pi), torch.empty_like(x)
        parts = (z.view(-1).split(NUMBERS_AT_ONCE) for z in (x, y))
        for part, out in zip(*parts, strict=True):
            gate = (part * part).mul_(0.044715 * factor).add_(factor).mul_(part).sigmoid_()
            torch.mul(part, gate, out=out)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.gelu_backward(grad, x, approximate="tanh")


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


def activation(name: str) -> Callable[[Tensor], Tensor]:
    """Returns the function that `hidden_act` names."""
    if name not in ACTIVATIONS:
        raise ConfigError(f"hidden_act {name!r} is unknown; known are {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
