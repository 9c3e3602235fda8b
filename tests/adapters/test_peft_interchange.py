"""Adapter files between this project, PEFT 0.11.1 (golden files) and the newest PEFT (live)."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from golden import peft_cases
from support.paths import GOLDEN, ROOT

import peft_custom

peft = pytest.importorskip("peft")
CASES = list(peft_cases.VARIANTS)
TOLERANCE = 2e-6
LOST = "bias lora_only"  # PEFT 0.11.1 trains these biases and does not save them


@pytest.mark.parametrize("variant", CASES)
def test_reads_what_peft_0_11_1_wrote(variant: str) -> None:
    folder = GOLDEN / "peft011" / peft_cases.folder_name(variant)
    if variant == LOST:
        kind, _ = peft_cases.VARIANTS[variant]
        with pytest.warns(UserWarning, match="the 4 biases that this adapter trained are not"):
            peft_custom.PeftModel.from_pretrained(peft_cases.build(kind), folder)
        return
    assert peft_cases.difference(peft_custom, variant, folder) < TOLERANCE


@pytest.mark.parametrize("variant", CASES)
def test_newest_peft_reads_what_we_wrote_and_the_reverse(variant: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft_cases.save(peft_custom, variant, tmp_path / "ours")
        assert peft_cases.difference(peft, variant, tmp_path / "ours") < TOLERANCE
        assert peft_cases.difference(peft_custom, variant, tmp_path / "ours") < TOLERANCE
        peft_cases.save(peft, variant, tmp_path / "theirs")
        assert peft_cases.difference(peft_custom, variant, tmp_path / "theirs") < TOLERANCE


def test_the_variants_are_not_the_base_model() -> None:
    for variant, (kind, _) in peft_cases.VARIANTS.items():
        stored = np.load(GOLDEN / "peft011" / peft_cases.folder_name(variant) / "logits.npy")
        assert np.abs(peft_cases.logits(peft_cases.build(kind), kind) - stored).max() > 1e-2


def test_our_configuration_has_the_keys_of_0_11_1_and_no_other() -> None:
    path = GOLDEN / "peft011" / "rslora" / "adapter_config.json"
    assert set(peft_custom.LoraConfig().to_dict()) == set(json.loads(path.read_text()))
    newer = peft_custom.LoraConfig(exclude_modules=["key"]).to_dict()
    assert newer["exclude_modules"] == ["key"]


def test_a_default_configuration_of_the_newest_peft_is_read() -> None:
    for values in (peft.LoraConfig(), peft.LoraConfig(task_type="SEQ_CLS", r=4)):
        plain = peft_custom.config.jsonable(values.to_dict())
        assert peft_custom.PeftConfig.from_dict(plain).r == values.r


def test_combined_adapters_are_read_by_the_newest_peft(tmp_path: Path) -> None:
    options = {"target_modules": ["first", "head"], "init_lora_weights": False}
    model = peft_custom.get_peft_model(
        peft_cases.build("conv"), peft_custom.LoraConfig(r=2, **options)
    )
    model.add_adapter("b", peft_custom.LoraConfig(r=3, use_rslora=True, **options))
    model.add_weighted_adapter(["default", "b"], [0.5, -2.0], "sum", combination_type="cat")
    model.set_adapter("sum")
    want = peft_cases.logits(model.eval(), "conv")
    model.save_pretrained(tmp_path, selected_adapters=["sum"])
    theirs = peft.PeftModel.from_pretrained(peft_cases.build("conv"), str(tmp_path / "sum"))
    assert np.abs(peft_cases.logits(theirs.eval(), "conv") - want).max() < TOLERANCE


def test_training_equals_peft() -> None:
    """fp32, no dropout, the same start and order: 50 losses within 1e-4."""
    losses = {}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 40, (50, 8, 9), generator=generator)
    labels = (ids[:, :, 0] + ids[:, :, 3]) % 3
    start: dict[str, torch.Tensor] = {}
    for library in (peft, peft_custom):
        config = library.LoraConfig(
            task_type="SEQ_CLS", r=4, lora_alpha=16,
            target_modules=["query", "value", "dense", "word_embeddings"],
        )  # fmt: skip
        model = library.get_peft_model(peft_cases.build("bert"), config).train()
        names = dict(model.named_parameters())
        if not start:
            start = {name: p.detach().clone() for name, p in names.items()}
        assert names.keys() == start.keys()
        trained = [name for name, p in names.items() if p.requires_grad]
        with torch.no_grad():
            for name in trained:
                names[name].copy_(start[name])
        optimizer = torch.optim.AdamW([names[name] for name in trained], lr=5e-3)
        losses[library.__name__] = []
        for batch, label in zip(ids, labels, strict=True):
            loss = model(input_ids=batch, labels=label).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[library.__name__].append(loss.item())
    ours, theirs = losses["peft_custom"], losses["peft"]
    assert abs(ours[0] - ours[-1]) > 0.05
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-4


@pytest.mark.slow
def test_peft_0_11_1_reads_what_we_wrote(tmp_path: Path) -> None:
    """Needs PEFT 0.11.1 in `.peers/peft011`; `tests/golden/make_peft011.py` says how."""
    old = ROOT / ".peers" / "peft011"
    if not old.is_dir():
        pytest.skip("no PEFT 0.11.1 in .peers/peft011")
    assert peft_cases.run(peft_custom, "save", tmp_path) == {}
    done = subprocess.run(
        [sys.executable, str(GOLDEN / "make_peft011.py"), "load", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(old), "PYTHONWARNINGS": "ignore"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    results = json.loads(done.stdout.strip().splitlines()[-1])
    assert set(results) == set(CASES)
    assert max(results.values()) < TOLERANCE, results
