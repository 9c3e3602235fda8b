"""Rows of context and completion: what is scored, how they are cut, what they weigh in a step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.gpt2_tiny import tiny_gpt2

from examples.data.batches import Batch, TrainingBatches
from examples.data.nlg import EncodedPairs, encoded_pairs
from examples.data.nlg_splits import (
    collate_texts,
    cut,
    given_answers,
    rows_kept,
    with_answers,
)
from examples.errors import DataError
from examples.optimizers.ivon_posterior import average
from examples.program.nlg_data import likelihoods
from transformers_patched import GPT2LMHeadModel
from transformers_patched.heads import CausalLMOutput

END = 50256
ROWS = st.lists(
    st.tuples(
        st.lists(st.integers(1, 99), min_size=1, max_size=9),
        st.lists(st.integers(1, 99), min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=7,
)


def pairs(rows: list[tuple[list[int], list[int]]]) -> EncodedPairs:
    return encoded_pairs(rows, "rows")


def everything(count: int) -> Batch:
    return Batch(np.arange(count), 0)


def test_the_published_item() -> None:
    """Input, and what clm and jlm score; labels stand at the token itself."""
    split = cut(pairs([([11, 12, END], [21, 22, END])]), 10, END)
    data = collate_texts(split, everything(1), width=10)
    assert data["input_ids"][0].tolist() == [11, 12, END, 21, 22, END, *[END] * 4]
    assert data["attention_mask"][0].tolist() == [1] * 6 + [0] * 4
    assert data["labels"][0].tolist() == [-100, -100, -100, 21, 22, END, *[-100] * 4]
    every = collate_texts(split, everything(1), width=10, objective="jlm")["labels"]
    assert every[0].tolist() == [11, 12, END, 21, 22, END, *[-100] * 4]
    assert split.counts("clm").tolist() == [3] and split.counts("jlm").tolist() == [5]


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, most=st.integers(2, 20))
def test_a_cut_row_keeps_its_completion(rows, most) -> None:
    split = cut(pairs(rows), most, END)
    shortened = 0
    for i, (context, completion) in enumerate(rows):
        tokens = split.tokens[split.offsets[i] : split.offsets[i + 1]].tolist()
        first = int(split.first[i])
        kept = completion[: most - 1]
        assert tokens[first:] == kept
        room = most - len(kept)
        assert tokens[:first] == context[-room:] and first >= 1
        assert len(tokens) == min(most, len(context) + len(kept))
        shortened += len(tokens) < len(context) + len(completion)
    assert split.shortened == shortened


@settings(max_examples=40, deadline=None)
@given(rows=ROWS, objective=st.sampled_from(["clm", "jlm"]))
def test_packed_and_padded_labels_agree(rows, objective) -> None:
    split = cut(pairs(rows), 18, END)
    batch = Batch(np.arange(len(rows))[::-1].copy(), 0)
    padded = collate_texts(split, batch, objective=objective, multiple=8)
    packed = collate_texts(split, batch, objective=objective, packed=True)
    real = padded["attention_mask"].bool()
    assert padded["labels"][real].tolist() == packed["labels"].tolist()
    assert (padded["labels"][~real] == -100).all()


@settings(max_examples=40, deadline=None)
@given(
    rows=ROWS, size=st.integers(1, 4), accumulation=st.integers(1, 3), processes=st.integers(1, 3)
)
def test_weights_are_shares_of_the_scored_tokens(rows, size, accumulation, processes) -> None:
    split = cut(pairs(rows), 18, END)
    counts = split.counts("clm")
    made = [
        TrainingBatches(split, size, accumulation=accumulation, processes=processes, process=p,
                        counts=counts)
        for p in range(processes)
    ]  # fmt: skip
    assert made[0].counted == counts.sum()
    for parts in zip(*(batches.global_batches(0) for batches in made), strict=True):
        micro = [b for part in parts for b in part.micro_batches if b.weight]
        total = sum(int(counts[b.rows].sum()) for b in micro)
        for batch in micro:
            assert batch.weight == pytest.approx(counts[batch.rows].sum() / (total + 1e-4))


def test_a_step_in_which_nothing_counts_weighs_nothing() -> None:
    split = cut(pairs([([1], [2])]), 9, END)
    [batch] = TrainingBatches(split, 1, counts=np.zeros(1, np.int64)).global_batches(0)
    assert batch.micro_batches[0].weight == 0.0


def test_the_first_contexts_have_all_their_rows() -> None:
    whole = pairs([([1], [7]), ([2], [8]), ([1], [9]), ([3], [7]), ([2], [6])])
    assert list(rows_kept(whole, 2, by_context=True)) == [0, 1, 2, 4]
    assert list(rows_kept(whole, 2, by_context=False)) == [0, 1]
    assert len(rows_kept(whole, None, by_context=True)) == 5


def test_answers_are_compared_within_a_row() -> None:
    split = cut(pairs([([1, 2], [5, END]), ([3], [6, 7, END])]), 9, END)
    answers = [[5, END], [6, 7, END]]
    right = given_answers(split, answers)
    assert right.tolist() == [0, 1]
    both = with_answers(split, answers)
    assert [both.context(i) for i in range(4)] == [[1, 2], [1, 2], [3], [3]]
    logits = np.array([[-1.0], [-2.0], [-4.0], [-5.0]])  # the second row's wrong answer is likelier
    found = likelihoods(logits, tokens=np.array([2, 3, 2, 3]), right=right)
    assert found["likelihood_accuracy"] == 0.5
    assert found["loss"] == pytest.approx((1.0 + 5.0) / 5)
    assert found["perplexity"] == pytest.approx(np.exp(6 / 5))
    other = replace(split, whole=pairs([([1], [5, END]), ([3], [9, END])]))
    with pytest.raises(DataError, match="row 2: its completion is no known answer"):
        given_answers(other, answers)
    with pytest.raises(ValueError, match="not finite"):
        likelihoods(np.array([[np.nan]]), tokens=np.array([1]), right=None)


def test_sequences_are_scored_by_their_labels_alone(tmp_path) -> None:
    model = GPT2LMHeadModel.from_pretrained(tiny_gpt2(tmp_path, initializer_range=0.3)).eval()
    rows = [([3, 9, 250], [7, 7, 1, 4]), ([5], [8]), ([2, 4, 6, 8, 10], [11, 200])]
    split = cut(pairs(rows), 18, 0)
    expected = []
    for context, completion in rows:
        with torch.no_grad():
            scores = model(torch.tensor([context + completion])).logits[0].log_softmax(-1)
        start = len(context) - 1
        expected.append(sum(float(scores[start + i, t]) for i, t in enumerate(completion)))
    for packed in (False, True):
        data = collate_texts(split, everything(3), packed=packed, score_sequences=True, multiple=8)
        output = model(**data)
        assert output.loss is None and output.logits.shape == (3, 1)
        assert output.logits[:, 0].tolist() == pytest.approx(expected, abs=1e-4)


def test_averaged_sequence_scores_are_mean_probabilities() -> None:
    drawn = [CausalLMOutput(logits=torch.tensor([[p]]).log()) for p in (0.5, 0.1)]
    found = average(drawn, {"score_sequences": True})
    assert found.logits.exp().item() == pytest.approx(0.3) and found.loss is None
