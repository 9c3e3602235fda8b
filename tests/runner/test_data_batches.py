"""Batches: every row once, the same at any entry point and on any number of processes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.data.batches import (
    Batch,
    GlobalBatch,
    TrainingBatches,
    collate,
    evaluation_batches,
    permutation,
    split_by_tokens,
)
from examples.data.encode import EncodedSplit, encode
from examples.data.readers import read_split
from examples.data.tasks import get_task
from transformers_patched.tokenization import AutoTokenizer

QUICK = settings(max_examples=150, deadline=None)


def fake(n: int, seed: int = 0, low: int = 3, high: int = 60) -> EncodedSplit:
    """n rows of random length; the tokens of row i all carry i, so that mixing rows shows."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(low, high, n)
    first = rng.integers(1, lengths + 1).astype(np.int32)
    offsets = np.concatenate(([0], np.cumsum(lengths))).astype(np.int64)
    tokens = (np.repeat(np.arange(n), lengths) * 100 + np.arange(offsets[-1]) % 100) + 1
    return EncodedSplit(tokens.astype(np.int32), offsets, first, np.arange(n) % 3, 0, True)


def same(a: GlobalBatch, b: GlobalBatch) -> bool:
    return (a.index, a.rows, len(a.micro_batches)) == (
        b.index,
        b.rows,
        len(b.micro_batches),
    ) and all(
        np.array_equal(x.rows, y.rows) and x.weight == y.weight
        for x, y in zip(a.micro_batches, b.micro_batches, strict=True)
    )


plans = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 9),
        "accumulation": st.integers(1, 3),
        "processes": st.integers(1, 4),
        "order": st.sampled_from(["bucket", "random"]),
        "max_tokens": st.sampled_from([None, 60, 150]),
        "seed": st.integers(0, 2**64 - 1),
    }
)


@given(n=st.integers(1, 300), plan=plans, epoch=st.integers(0, 50))
@QUICK
def test_an_epoch_over_all_processes(n: int, plan: dict, epoch: int) -> None:
    split = fake(n)
    every = [TrainingBatches(split, process=p, **plan) for p in range(plan["processes"])]
    size = plan["batch_size"] * plan["accumulation"] * plan["processes"]
    found = [list(batches.global_batches(epoch)) for batches in every]
    assert {len(w) for w in found} == {len(every[0])} == {-(-n // size)}
    seen = []
    for parts in zip(*found, strict=True):
        batches = [batch for part in parts for batch in part.micro_batches if batch.weight]
        rows = np.concatenate([batch.rows for batch in batches])
        assert {part.rows for part in parts} == {len(rows)}
        # Processes stay in step, and Σ weight · mean is the mean over the global batch.
        assert len({len(part.micro_batches) for part in parts}) == 1
        mean = sum(batch.weight * split.labels[batch.rows].mean() for batch in batches)
        assert mean == pytest.approx(split.labels[rows].mean())
        for batch in batches:
            assert batch.tokens == split.lengths[batch.rows].sum()
            if plan["max_tokens"] is None:
                assert len(batch.rows) <= plan["batch_size"]
            else:
                assert batch.tokens <= plan["max_tokens"]
        seen.append(rows)
    assert [len(rows) for rows in seen[:-1]] == [size] * (len(seen) - 1)
    assert sorted(np.concatenate(seen)) == list(range(n))


@pytest.mark.parametrize("order", ["bucket", "random"])
@pytest.mark.parametrize("n", [3, 10, 403])  # 403: three chunks of buckets
def test_the_short_global_batch_is_the_last(order: str, n: int) -> None:
    """And it holds the rows that are left, so that the others hold whole buckets."""
    split = fake(n)
    for epoch in range(3):
        batches = list(TrainingBatches(split, 4, order=order).global_batches(epoch))
        rows = [batch.micro_batches[0].rows for batch in batches]
        assert [len(own) for own in rows] == [batch.rows for batch in batches]
        assert [batch.rows for batch in batches] == [4] * (n // 4) + [n % 4]
        assert [batch.index for batch in batches] == list(range(len(batches)))
        full = n // 4 * 4
        shuffled = permutation(n, 0, epoch)
        assert set(rows[-1]) == set(shuffled[full:])
        if order == "bucket":
            chunks = [shuffled[i : min(i + 200, full)] for i in range(0, full, 200)]
            by_length = [chunk[np.argsort(split.lengths[chunk], kind="stable")] for chunk in chunks]
            buckets = {tuple(b) for chunk in by_length for b in chunk.reshape(-1, 4).tolist()}
            assert {tuple(own.tolist()) for own in rows[:-1]} == buckets


@given(n=st.integers(1, 300), plan=plans, epoch=st.integers(0, 9), start=st.integers(0, 40))
@QUICK
def test_entering_in_the_middle(n: int, plan: dict, epoch: int, start: int) -> None:
    batches = TrainingBatches(fake(n), **plan)
    rest = list(batches.global_batches(epoch))[start:]
    again = list(TrainingBatches(fake(n), **plan).global_batches(epoch, start))
    assert len(rest) == len(again)
    assert all(same(a, b) for a, b in zip(rest, again, strict=True))


@pytest.mark.parametrize("order", ["bucket", "random"])
@pytest.mark.parametrize("processes", [2, 4])
def test_two_processes_see_the_global_batches_of_one(order: str, processes: int) -> None:
    split = fake(333)
    one = TrainingBatches(split, 8, order=order, seed=5)
    parts = [
        TrainingBatches(split, 8 // processes, processes=processes, process=p, order=order, seed=5)
        for p in range(processes)
    ]
    for epoch in (0, 3):
        for found in zip(
            one.global_batches(epoch), *(p.global_batches(epoch) for p in parts), strict=True
        ):
            whole, *shares = (
                sorted(np.concatenate([b.rows for b in w.micro_batches if b.weight] or [[]]))
                for w in found
            )
            assert whole == sorted(sum(shares, []))


def test_accumulation_sees_the_windows_of_a_larger_batch() -> None:
    split = fake(100)
    large = TrainingBatches(split, 12, seed=1).global_batches(2)
    small = TrainingBatches(split, 4, accumulation=3, seed=1).global_batches(2)
    for a, b in zip(large, small, strict=True):
        assert sorted(a.micro_batches[0].rows) == sorted(
            np.concatenate([x.rows for x in b.micro_batches])
        )


def test_epochs_and_seeds_differ_and_repeat() -> None:
    def order(seed: int, epoch: int, kind: str) -> list[int]:
        found = TrainingBatches(fake(200), 4, seed=seed, order=kind).global_batches(epoch)
        return np.concatenate([w.micro_batches[0].rows for w in found]).tolist()

    for kind in ("bucket", "random"):
        assert order(0, 0, kind) == order(0, 0, kind)
        assert order(0, 0, kind) != order(0, 1, kind)
        assert order(0, 0, kind) != order(1, 0, kind)


def test_the_order_is_fixed_for_ever() -> None:
    """A run resumed with another version of numpy must find the same order."""
    assert permutation(12, seed=42, epoch=3).tolist() == [9, 7, 6, 8, 1, 0, 4, 11, 5, 10, 2, 3]
    for order, rows in (
        ("bucket", [[8, 4, 1], [7, 5, 6], [10, 9, 0], [3, 2]]),
        ("random", [[9, 7, 6], [8, 1, 0], [4, 5, 10], [2, 3]]),
    ):
        batches = TrainingBatches(fake(11), 3, seed=42, order=order).global_batches(3)
        assert [batch.micro_batches[0].rows.tolist() for batch in batches] == rows
    ones = TrainingBatches(fake(7), 1, seed=42).global_batches(3)
    assert [int(batch.micro_batches[0].rows[0]) for batch in ones] == [0, 6, 5, 3, 2, 4, 1]


def test_permutations_are_uniform() -> None:
    counts = np.zeros((5, 5))
    for epoch in range(4000):
        counts[np.arange(5), permutation(5, seed=1, epoch=epoch)] += 1
    assert np.abs(counts / 4000 - 0.2).max() < 0.03


def test_buckets_leave_little_padding_and_stay_random() -> None:
    split = fake(4000)

    def waste(order: str) -> float:
        found = list(TrainingBatches(split, 16, order=order).global_batches(0))
        width = sum(split.lengths[w.micro_batches[0].rows].max() * w.rows for w in found)
        return width / split.lengths.sum()

    assert waste("bucket") < 1.06 < 1.5 < waste("random")
    # Batches come in no order of length, and a row's companions change with the epoch.
    batches = TrainingBatches(split, 16)
    lengths = [split.lengths[w.micro_batches[0].rows].mean() for w in batches.global_batches(0)]
    assert abs(np.corrcoef(lengths, np.arange(len(lengths)))[0, 1]) < 0.2
    mates = [
        next(
            set(w.micro_batches[0].rows)
            for w in batches.global_batches(e)
            if 7 in w.micro_batches[0].rows
        )
        for e in range(2)
    ]
    assert len(mates[0] & mates[1]) < 8


@given(
    n=st.integers(1, 200),
    size=st.integers(1, 40),
    processes=st.integers(1, 5),
    budget=st.sampled_from([None, 60, 500]),
)
@QUICK
def test_evaluation_sees_every_row_once(
    n: int, size: int, processes: int, budget: int | None
) -> None:
    split = fake(n)
    out = np.full(n, -1)
    for process in range(processes):
        for batch in evaluation_batches(
            split, size, processes=processes, process=process, max_tokens=budget
        ):
            assert (out[batch.rows] == -1).all()
            out[batch.rows] = batch.rows
    assert out.tolist() == list(range(n))
    first = evaluation_batches(split, size, max_tokens=budget)[0]
    assert split.lengths[first.rows].max() == split.lengths.max()


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60), budget=st.integers(30, 90))
@QUICK
def test_token_budgets(lengths: list[int], budget: int) -> None:
    array = np.array(lengths)
    rows = np.arange(len(array))
    pieces = split_by_tokens(rows, array, budget)
    assert np.concatenate(pieces).tolist() == rows.tolist()
    for piece, following in zip(pieces, [*pieces[1:], None], strict=True):
        assert len(piece) and array[piece].sum() <= budget
        if following is not None:  # nothing that would have fitted was put off
            assert array[piece].sum() + array[following[0]] > budget


@given(
    rows=st.lists(st.integers(0, 49), min_size=1, max_size=12, unique=True),
    multiple=st.sampled_from([1, 8]),
)
@QUICK
def test_padded_and_packed_hold_the_same_tokens(rows: list[int], multiple: int) -> None:
    split = fake(50)
    batch = Batch(np.array(rows), int(split.lengths[rows].sum()))
    padded = collate(split, batch, multiple=multiple)
    packed = collate(split, batch, packed=True)
    width = -(-int(split.lengths[rows].max()) // multiple) * multiple
    assert padded["input_ids"].shape == (len(rows), width)
    for i, row in enumerate(rows):
        ids = split.tokens[split.offsets[row] : split.offsets[row + 1]].tolist()
        types = [0] * split.first[row] + [1] * (len(ids) - split.first[row])
        fill = [0] * (width - len(ids))
        assert padded["input_ids"][i].tolist() == ids + fill
        assert padded["attention_mask"][i].tolist() == [1] * len(ids) + fill
        assert padded["token_type_ids"][i].tolist() == types + fill
        start, end = packed["cu_seqlens"][i : i + 2].tolist()
        assert packed["input_ids"][start:end].tolist() == ids
        assert packed["token_type_ids"][start:end].tolist() == types
    assert packed["cu_seqlens"].dtype == torch.int32
    assert packed["max_seqlen"] == split.lengths[rows].max()
    assert packed["input_ids"].shape == (batch.tokens,)
    for data in (padded, packed):
        assert data["labels"].tolist() == split.labels[rows].tolist()
        assert data["input_ids"].dtype == data["labels"].dtype == torch.int64


def test_a_real_batch_is_what_the_tokenizer_pads(
    real_data: Callable[[str], Path], minilm_dir: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(minilm_dir)
    rows = read_split(get_task("mrpc"), real_data("glue"), "validation")
    split = encode(rows, tokenizer, 64, cache=False)
    for batch in list(TrainingBatches(split, 16).global_batches(0))[::5]:
        picked = rows.take(batch.micro_batches[0].rows)
        expected = tokenizer(
            *picked.text, truncation=True, max_length=64, padding=True, return_tensors="pt"
        )
        ours = collate(split, batch.micro_batches[0])
        assert ours.pop("labels").tolist() == picked.labels
        assert set(ours) == set(expected)
        for name in ours:
            assert torch.equal(ours[name], expected[name]), name
        fixed = collate(split, batch.micro_batches[0], width=64)
        assert fixed["input_ids"].shape == (len(picked), 64)


def test_models_without_token_types_and_splits_without_labels() -> None:
    split = fake(5)
    split = EncodedSplit(split.tokens, split.offsets, split.first, None, 1, False)
    batch = evaluation_batches(split, 5)[0]
    assert set(collate(split, batch)) == {"input_ids", "attention_mask"}
    assert set(collate(split, batch, packed=True)) == {"input_ids", "cu_seqlens", "max_seqlen"}
    assert (collate(split, batch)["input_ids"][-1, -1] == 1).item()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"batch_size": 4, "accumulation": 0}, "accumulation=0"),
        ({"batch_size": 4, "processes": 2, "process": 2}, r"process=2 must be in 0\.\.1"),
        ({"batch_size": 4, "order": "sorted"}, "order='sorted': choose one of bucket, random"),
        ({"batch_size": 4, "max_tokens": 10}, "max_tokens=10, but a row has"),
    ],
)
def test_wrong_plans_say_what_to_do(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        TrainingBatches(fake(50), **options)


def test_a_width_that_is_too_small_is_refused() -> None:
    split = fake(5)
    with pytest.raises(ValueError, match="width=2, but a row has"):
        collate(split, evaluation_batches(split, 5)[0], width=2)
