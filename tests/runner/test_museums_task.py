"""The embedded table-to-text task is what its generator writes, and its texts state their facts."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.paths import ROOT

from examples.data.embedded.museums.make import REFERENCES, SIZES, STATED, write
from examples.data.nlg import Instance, instances, read_pairs, split_file
from examples.data.tasks.nlg import nlg_task

FOLDER = ROOT / "examples" / "data" / "embedded" / "museums"
TASK = nlg_task("e2e")


def split(name: str) -> list[Instance]:
    path = split_file(TASK, FOLDER, name)
    assert path is not None
    return instances(read_pairs(TASK, path))


def facts(context: str) -> dict[str, str]:
    return dict(fact.split(" : ") for fact in context.split(" | "))


def test_the_generator_writes_the_committed_bytes(tmp_path: Path) -> None:
    write(tmp_path)
    for name in SIZES:
        assert (tmp_path / f"{name}.txt").read_bytes() == (FOLDER / f"{name}.txt").read_bytes()


def test_every_context_has_its_references_and_no_name_leaks() -> None:
    names: dict[str, set[str]] = {}
    for name, size in SIZES.items():
        found = split(name)
        assert len(found) == size
        for instance in found:
            assert len(set(instance.references)) == REFERENCES
        names[name] = {facts(instance.context)["name"] for instance in found}
    assert not names["train"] & (names["valid"] | names["test"])
    assert not names["valid"] & names["test"]


@pytest.mark.parametrize("name", list(SIZES))
def test_a_reference_states_the_facts_of_its_context_and_no_others(name: str) -> None:
    for instance in split(name):
        given = facts(instance.context)
        for text in instance.references:
            assert text.startswith(f"{given['name']} is a ")
            for field in ("kind", "shows", "near"):
                assert given.get(field, "") in text
            for field, values in STATED.items():
                stated = {
                    value
                    for value, wordings in values.items()
                    if any(w[1:-1] in text for w in wordings)
                }
                if "a free " in text or "a cheap " in text:
                    stated |= {given["price"]} & values.keys()
                assert stated == ({given[field]} if field in given else set())
