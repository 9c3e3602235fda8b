"""The teacher's part of the loss: its formula, its gradient, what takes no part in it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from examples.training import distillation
from examples.training.distillation import (
    TARGETS,
    Classes,
    Spans,
    distilled_loss,
    for_the_model,
    token_divergence,
)

LENGTHS = (4, 7, 2)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)


def kl(teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
    """T²·Σ p·log(p / q) of one row, as it is written on paper."""
    p, q = ((z / temperature).exp() / (z / temperature).exp().sum() for z in (teacher, student))
    return temperature**2 * (p * (p / q).log()).sum()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 5.0])
def test_classes_have_the_gradient_of_the_plain_formula(temperature: float) -> None:
    """α_ce·(softmax(z) − y)/b + α_distil·T·(q_T − p_T)/b, in fp64."""
    student, teacher = random(5, 3).requires_grad_(), random(5, 3, seed=1)
    labels = torch.tensor([0, 2, 1, 1, 0])
    own = torch.nn.functional.cross_entropy
    loss = distilled_loss(
        lambda output, arguments: own(output.logits, arguments["labels"]),
        Classes(), alpha_ce=0.3, alpha_distil=0.9, temperature=temperature,
    )  # fmt: skip
    value = loss(SimpleNamespace(logits=student), {"labels": labels, TARGETS: teacher})
    plain = 0.3 * own(student, labels)
    rows = [kl(t, s, temperature) for t, s in zip(teacher, student, strict=True)]
    torch.testing.assert_close(value, plain + 0.9 * sum(rows) / 5, atol=0, rtol=1e-12)
    [grad] = torch.autograd.grad(value, student)
    z = student.detach()
    one_hot = torch.nn.functional.one_hot(labels, 3)
    q, p = ((x / temperature).softmax(1) for x in (z, teacher))
    wanted = (0.3 * (z.softmax(1) - one_hot) + 0.9 * temperature * (q - p)) / 5
    torch.testing.assert_close(grad, wanted, atol=1e-14, rtol=1e-10)


def test_a_student_like_its_teacher_has_nothing_to_learn_and_scaling_is_squared() -> None:
    teacher, student = random(4, 6), random(4, 6, seed=1)

    def found(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        return Classes().divergence(SimpleNamespace(logits=student), teacher, {}, temperature)

    assert found(teacher, teacher, 2.0) == 0
    whole, half = found(student, teacher, 2.0), found(student / 2, teacher / 2, 1.0)
    torch.testing.assert_close(half, whole / 4)


def test_without_a_loss_of_its_own_it_is_the_models() -> None:
    output = SimpleNamespace(logits=random(2, 3), loss=torch.tensor(5.0))
    loss = distilled_loss(None, Classes(), 0.5, 2.0, 1.0)
    assert loss(output, {TARGETS: output.logits}) == 2.5


@pytest.mark.parametrize("temperature", [0.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_choices_that_a_question_has_not_take_no_part(
    temperature: float, dtype: torch.dtype
) -> None:
    counts = (3, 5, 2)
    student, teacher = random(3, 5).to(dtype), random(3, 5, seed=1).to(dtype)
    rows = [kl(t[:n], s[:n], temperature) for t, s, n in zip(teacher, student, counts, strict=True)]
    for row, n in enumerate(counts):
        student[row, n:] = teacher[row, n:] = torch.finfo(dtype).min
    student.requires_grad_()
    arguments = {"choice_counts": torch.tensor(counts)}
    output = SimpleNamespace(logits=student)
    value = Classes().divergence(output, teacher, arguments, temperature)
    torch.testing.assert_close(value, sum(rows) / 3)
    [grad] = torch.autograd.grad(value, student)
    assert grad.isfinite().all()
    for row, n in enumerate(counts):
        assert (grad[row, n:] == 0).all() and (grad[row, :n] != 0).all()


def test_spans_padded_at_either_end_and_packed_are_the_rows_alone() -> None:
    teacher, student = random(sum(LENGTHS), 2), random(sum(LENGTHS), 2, seed=1).requires_grad_()
    pairs = list(zip(teacher.split(LENGTHS), student.split(LENGTHS), strict=True))
    sides = [kl(t[:, k], s[:, k], 2.0) for t, s in pairs for k in (0, 1)]
    wanted = sum(sides) / (2 * len(LENGTHS))
    [gradient] = torch.autograd.grad(wanted, student)
    ends = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    packed = SimpleNamespace(start_logits=student[:, 0], end_logits=student[:, 1])
    calls: list[tuple[Any, dict[str, Any]]] = [(packed, {"cu_seqlens": ends})]
    for left in (False, True):
        places = torch.arange(9)
        mask = torch.stack([(places >= 9 - n) if left else (places < n) for n in LENGTHS])
        filled = torch.full((3, 9, 2), 50.0, dtype=torch.float64)
        filled = filled.masked_scatter(mask[..., None].expand(3, 9, 2), student)
        output = SimpleNamespace(start_logits=filled[..., 0], end_logits=filled[..., 1])
        calls.append((output, {"attention_mask": mask.long()}))
    for output, arguments in calls:
        assert torch.equal(Spans().logits(output, arguments), student)
        value = Spans().divergence(output, teacher, arguments, 2.0)
        torch.testing.assert_close(value, wanted, atol=0, rtol=1e-12)
        [grad] = torch.autograd.grad(value, student, retain_graph=True)
        torch.testing.assert_close(grad, gradient, atol=1e-14, rtol=1e-10)


def test_tokens_in_slices_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models of different widths; gradients of hidden states and head."""
    monkeypatch.setattr(distillation, "LOGITS_AT_ONCE", 3 * 11)  # three places at a time
    own, head = random(7, 4).requires_grad_(), random(11, 4, seed=1).requires_grad_()
    other, their_head = random(7, 6, seed=2), random(11, 6, seed=3)
    value = token_divergence((own, head), (other, their_head), 2.0)
    rows = zip(other @ their_head.T, own @ head.T, strict=True)
    wanted = sum(kl(t, s, 2.0) for t, s in rows) / 7
    torch.testing.assert_close(value, wanted, atol=0, rtol=1e-10)
    found, plain = (torch.autograd.grad(x, (own, head)) for x in (value, wanted))
    torch.testing.assert_close(found, plain, atol=1e-12, rtol=1e-8)


def test_no_model_is_given_the_teachers_logits() -> None:
    assert for_the_model({"input_ids": 1, TARGETS: 2}) == {"input_ids": 1}
