"""The small GPT-2 in `models/`: its files, the same in Transformers; it knows some English."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open
from support.paths import ROOT

from transformers_patched import AutoModelForCausalLM, AutoTokenizer

FOLDER = ROOT / "models" / "gpt2-mini"
TEXT = (
    "The old man went down to the river in the morning, and there he saw a great ship.\n"
    'name : The Café — £20 | area : "riverside" | near : 3/4 mile'
)


def test_it_is_small_and_its_weights_are_bfloat16() -> None:
    sizes = [path.stat().st_size for path in FOLDER.iterdir()]
    assert sum(sizes) <= 16 << 20
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118
    for name in ("README.md", "recipe.yaml", "learning_curve.png"):
        assert (FOLDER / name).is_file()


def test_transformers_reads_it_alike() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    ids = tokenizer(TEXT)["input_ids"]
    assert tokenizer.decode(ids) == TEXT
    theirs = transformers.AutoTokenizer.from_pretrained(FOLDER)
    assert theirs(TEXT)["input_ids"] == ids and theirs.eos_token_id == tokenizer.eos_token_id
    ours = AutoModelForCausalLM.from_pretrained(FOLDER)
    model = transformers.AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()
    rows = torch.tensor([ids, ids[::-1]])
    with torch.no_grad():
        a, b = ours(input_ids=rows).logits, model(input_ids=rows).logits
    assert a.shape == (2, len(ids), tokenizer.vocab_size)
    assert (a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max())


def test_it_finds_english_likelier_than_the_same_words_shuffled() -> None:
    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    model = AutoModelForCausalLM.from_pretrained(FOLDER)
    ids = torch.tensor(tokenizer(TEXT.splitlines()[0])["input_ids"])
    shuffled = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    with torch.no_grad():
        loss, other = (model(input_ids=x[None], labels=x[None]).loss for x in (ids, shuffled))
    assert loss < other - 1.5
