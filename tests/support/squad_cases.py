"""Tiny files in SQuAD's layout, and its rules once more, question by question and pair by pair."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

from support.runner_cases import WORDS


def layout(*paragraphs: tuple[str, list[dict[str, Any]]], title: str = "t") -> dict[str, Any]:
    """A file of one article: (context, its questions) each."""
    parts = [{"context": context, "qas": qas} for context, qas in paragraphs]
    return {"version": "1.1", "data": [{"title": title, "paragraphs": parts}]}


def question(id: str, text: str, context: str, *answers: str, **more: Any) -> dict[str, Any]:
    """A question whose answers stand where they are found first."""
    found = [{"text": answer, "answer_start": context.index(answer)} for answer in answers]
    return {"id": id, "question": text, "answers": found, **more}


def squad_task(folder: Path, splits: dict[str, int], empty: bool = False, seed: int = 0) -> Path:
    """Files `train.json`, …: the answer is the word after the one that the question repeats.

    Args:
        folder: for the files.
        splits: name -> questions, two to a paragraph.
        empty: every third question has no answer.
        seed: of the words.
    """
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in splits.items():
        paragraphs: list[tuple[str, list[dict[str, Any]]]] = []
        for i in range(count):
            if i % 2 == 0:
                words = rng.sample(WORDS, rng.randint(8, 30))
                paragraphs.append((" ".join(words), []))
            context, asked = paragraphs[-1]
            words = context.split()
            at = rng.randrange(len(words) - 1)
            answers = [] if empty and i % 3 == 2 else [words[at + 1]]
            more = {"is_impossible": not answers} if empty else {}
            asked.append(question(f"{split}{i}", f"after {words[at]}", context, *answers, **more))
        (folder / f"{split}.json").write_text(json.dumps(layout(*paragraphs)), "utf-8")
    return folder


# --- the rules, written plainly ------------------------------------------------------------------


def windows(tokenizer, context: str, asked: str, length: int, stride: int, query: int) -> list:
    """(ids, column of the window's first token, its characters) of each window of one question."""
    pair = tokenizer(asked.strip(), context, return_offsets_mapping=True)
    owners = pair.sequence_ids()
    first, second = owners.index(0), owners.index(1)
    own = [i for i, owner in enumerate(owners) if owner == 0]
    told = [i for i, owner in enumerate(owners) if owner == 1]
    ids, offsets = pair["input_ids"], pair["offset_mapping"]
    head = ids[: own[0]] + [ids[i] for i in own[:query]] + ids[own[-1] + 1 : second]
    tail = ids[told[-1] + 1 :]
    assert first == own[0]
    room = length - len(head) - len(tail)
    found, start = [], 0
    while True:
        part = told[start : start + room]
        found.append((head + [ids[i] for i in part] + tail, len(head), [offsets[i] for i in part]))
        if start + room >= len(told):
            return found
        start += stride


def n_best(
    context: str,
    features: list[tuple[int, list[tuple[int, int]]]],
    logits: list[list[list[float]]],
    most: int,
    longest: int,
    stride: int,
    null: bool,
) -> tuple[list[dict[str, Any]], float | None]:
    """The ranked answers to one question, and the odds of "no answer".

    Args:
        context: the paragraph.
        features: (column of the window's first token, characters of its tokens) of each window.
        logits: [starts, ends] of each window.
        most: n_best_size.
        longest: answer, in tokens.
        stride: between windows.
        null: "no answer" is allowed.
    """
    pairs = []
    for number, ((first, chars), (starts, ends)) in enumerate(zip(features, logits, strict=True)):
        for s in sorted(range(len(starts)), key=lambda i: -starts[i])[:most]:
            for e in sorted(range(len(ends)), key=lambda i: -ends[i])[:most]:
                inside = all(0 <= i - first < len(chars) for i in (s, e))
                if not inside or e < s or e - s + 1 > longest:
                    continue
                if shows_most(features, stride, number * stride + s - first) == number:
                    span = chars[s - first][0], chars[e - first][1]
                    pairs.append((starts[s], ends[e], context[span[0] : span[1]].strip()))
    score = lambda pair: -(pair[0] + pair[1])  # noqa: E731
    if null:
        starts, ends = min(logits, key=lambda pair: pair[0][0] + pair[1][0])
        pairs.append((starts[0], ends[0], ""))
    ranked: dict[str, tuple[float, float]] = {}
    for start, end, text in sorted(pairs, key=score):
        if len(ranked) < most or (text == "" and null):
            ranked.setdefault(text, (start, end))
    if not any(ranked):
        ranked = {"empty": (0.0, 0.0), **ranked}
    total = sum(math.exp(s + e) for s, e in ranked.values())
    entries = [
        {"text": t, "start_logit": s, "end_logit": e, "probability": math.exp(s + e) / total}
        for t, (s, e) in ranked.items()
    ]
    if not null:
        return entries, None
    best = next(entry for entry in entries if entry["text"])
    odds = sum(ranked[""]) - best["start_logit"] - best["end_logit"]
    return entries, odds


def shows_most(features: list[tuple[int, list]], stride: int, token: int) -> int:
    """The window that shows the most around a token of the paragraph."""
    best, number = -1.0, -1
    for i, (_, chars) in enumerate(features):
        place = token - i * stride
        if 0 <= place < len(chars):
            shown = min(place, len(chars) - 1 - place) + 0.01 * len(chars)
            if shown > best:
                best, number = shown, i
    return number
