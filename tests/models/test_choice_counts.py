"""Multiple choice where questions differ in their number of choices: `choice_counts`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from support.models import SIZES, V3
from torch import Tensor

import transformers_patched as ours
from transformers_patched.heads import choice_logits
from transformers_patched.layout import SequenceLayout

NAMES = ("Bert", "Roberta", "DebertaV2")
LENGTHS = (5, 9, 7, 3, 8, 4, 6, 9, 2, 5)  # of ten sequences
COUNTS = (3, 2, 5)


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """Our model and Transformers' with the same weights."""
    name = request.param
    sizes = {**SIZES, "max_position_embeddings": 24, **(V3 if name == "DebertaV2" else {})}
    torch.manual_seed(0)
    theirs = getattr(hf, f"{name}ForMultipleChoice")(getattr(hf, f"{name}Config")(**sizes)).eval()
    model = getattr(ours, f"{name}ForMultipleChoice")(getattr(ours, f"{name}Config")(**sizes))
    model.load_state_dict(theirs.state_dict())
    return model.eval(), theirs


def sequences(lengths: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(lengths))
    return [torch.randint(4, 31, (n,), generator=generator) for n in lengths]


def packed(rows: list[Tensor]) -> dict[str, Any]:
    ends = torch.tensor([0, *(len(row) for row in rows)]).cumsum(0).int()
    longest = max(map(len, rows))
    return {"input_ids": torch.cat(rows), "cu_seqlens": ends, "max_seqlen": longest}


def padded(rows: list[Tensor], pad: int) -> dict[str, Tensor]:
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    return {"input_ids": ids, "attention_mask": (ids != pad).long()}


def test_of_one_number_of_choices_they_are_transformers(pair: tuple[Any, Any]) -> None:
    model, theirs = pair
    rows, labels = sequences(LENGTHS[:6]), torch.tensor([2, 0])
    flat = padded(rows, model.config.pad_token_id)
    cubes = {name: x.view(2, 3, -1) for name, x in flat.items()}
    wanted = theirs(**cubes, labels=labels)
    counts = torch.tensor([3, 3])
    for call in (packed(rows), flat):
        got = model(**call, labels=labels, choice_counts=counts)
        torch.testing.assert_close(got.logits, wanted.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got.loss, wanted.loss, atol=1e-5, rtol=1e-5)
    plain = model(**packed(rows), labels=labels)
    assert torch.equal(plain.logits, model(**packed(rows), choice_counts=counts).logits)


def test_questions_that_differ_are_each_as_alone(pair: tuple[Any, Any]) -> None:
    """Logits, loss and the embedding's gradient, against Transformers question by question."""
    model, theirs = pair
    rows, labels = sequences(LENGTHS), torch.tensor([1, 1, 4])
    table = theirs.base_model.get_input_embeddings().weight
    losses, alone = [], []
    for part, label in zip(torch.arange(10).split(COUNTS), labels, strict=True):
        own = padded([rows[i] for i in part], model.config.pad_token_id)
        output = theirs(**{n: x[None] for n, x in own.items()}, labels=label[None])
        losses.append(output.loss)
        alone.append(output.logits[0])
    [wanted] = torch.autograd.grad(torch.stack(losses).mean(), table)
    more = {"labels": labels, "choice_counts": torch.tensor(COUNTS)}
    for call in (packed(rows), padded(rows, model.config.pad_token_id)):
        for width in ({}, {"num_choices": 6}):
            output = model(**call, **more, **width)
            assert output.logits.shape == (3, width.get("num_choices", 5))
            for logits, question in zip(output.logits, alone, strict=True):
                torch.testing.assert_close(logits[: len(question)], question, atol=1e-5, rtol=1e-5)
                assert (logits[len(question) :] == torch.finfo(torch.float32).min).all()
            torch.testing.assert_close(output.loss, sum(losses) / 3, atol=1e-5, rtol=1e-5)
            [grad] = torch.autograd.grad(
                output.loss, model.base_model.get_input_embeddings().weight
            )
            torch.testing.assert_close(grad, wanted, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("counts", "width"), [((3, 3), None), ((3, 2, 5), 4), ((3, 0, 7), None), ((3, 2, 6), None)]
)
def test_counts_that_are_not_those_of_the_sequences(
    counts: tuple[int, ...], width: int | None
) -> None:
    layout = SequenceLayout.padded(None, 10, 4, "cpu")
    with pytest.raises(ValueError, match="choice_counts must be .* add up to the 10 sequences; th"):
        choice_logits(torch.randn(10, 1), layout, None, width, torch.tensor(counts))
