"""AdaLoRA equals PEFT 0.11.1 over 50 steps, and their adapter files are each other's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from golden import adalora_cases as cases
from golden import peft_cases
from support.paths import GOLDEN, ROOT
from torch import nn

import peft_custom
from peft_custom import attach

peft = pytest.importorskip("peft")
ADALORA = GOLDEN / "adalora"
PEFTS = {"sensitivity_timing": "after", "rescore_at_end": False, "train_pooler": False}
WRITTEN = [case for case in cases.FILES if case != "equal ranks"]
TOLERANCE = 2e-6


def attached(model: nn.Module, optimizer: Any) -> Any:
    attach(model, optimizer, cases.SHORT["total_step"])
    return lambda t: None


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(ADALORA / "training.npz"))


@pytest.mark.parametrize("manual", [False, True], ids=["attached", "by hand"])
def test_fifty_steps_equal_peft_0_11_1(golden: dict[str, np.ndarray], manual: bool) -> None:
    """fp64: weights, E's zeros and rank pattern, moving averages at t = 30, losses."""
    averages: dict[str, np.ndarray] = {}
    extra: list[float] = []

    def drive(model: nn.Module, optimizer: Any) -> Any:
        tuner = model.base_model
        if manual:
            tuner._penalised = True  # the loss below has it
            plain = model.forward
            model.forward = lambda **batch: with_penalty(plain(**batch))

            def with_penalty(out: Any) -> Any:
                out.loss = out.loss + tuner.orthogonality_loss()
                return out

        hooks = None if manual else attach(model, optimizer, cases.STEPS).parts[0]

        def after(t: int) -> None:
            if hooks is None:
                tuner.update_and_allocate(t)
                extra.append(0.0)
            else:
                extra.append(hooks.losses()["orthogonality"])
            if t == 30:
                allocator = (hooks or tuner._manual).allocator
                triplets = allocator.triplets
                named = {p: n for n, p in tuner.model.named_parameters()}
                for kind in ("smoothed", "variation"):
                    flat = getattr(allocator, kind)
                    sizes = [p.numel() for p in triplets.parameters()]
                    for p, part in zip(triplets.parameters(), flat.split(sizes), strict=True):
                        averages[f"{kind} {named[p]}"] = part.view(p.shape).numpy().copy()

        return after

    model, ours = cases.train(peft_custom, drive, **PEFTS)
    assert np.array_equal(ours.pop("counts"), golden["counts"])
    np.testing.assert_allclose(ours.pop("losses") + extra, golden["losses"], rtol=1e-9)
    ends = {key for key in golden if key.startswith("end")}
    assert ours.keys() == ends
    for key in ends:
        np.testing.assert_allclose(ours[key], golden[key], rtol=1e-7, atol=1e-10, err_msg=key)
    assert averages.keys() == {k for k in golden if k.startswith(("smoothed", "variation"))}
    for key, value in averages.items():
        np.testing.assert_allclose(value, golden[key], rtol=1e-6, atol=1e-16, err_msg=key)
    kept = {f"kept {key}.default": v for key, v in model.base_model.rank_pattern().items()}
    assert kept.keys() == {key for key in golden if key.startswith("kept")}
    assert all(np.array_equal(v, golden[key]) for key, v in kept.items())


@pytest.mark.parametrize("options", [{}, PEFTS], ids=["ours", "as peft"])
def test_phases(golden: dict[str, np.ndarray], options: dict[str, Any]) -> None:
    """Cuts at every other step, regrowth between them, none after the last."""

    def drive(model: nn.Module, optimizer: Any) -> Any:
        attach(model, optimizer, cases.PHASES["total_step"])
        return lambda t: None

    counts = cases.phases(peft_custom, drive, **options)
    assert counts == golden["phases"].tolist()
    assert [counts[t] for t in (3, 4, 5, 6, 8, 10, 12, 13)] == [44, 38, 44, 30, 25, 23, 22, 44]
    assert counts[14:] == [22] * 6


# --- files ----------------------------------------------------------------------------------------
@pytest.mark.parametrize("case", WRITTEN)
def test_reads_what_peft_0_11_1_wrote(case: str) -> None:
    folder = ADALORA / case
    assert cases.difference(peft_custom, case, folder) < TOLERANCE
    kind, _ = cases.FILES[case]
    stored = np.load(folder / "logits.npy")
    assert np.abs(peft_cases.logits(peft_cases.build(kind), kind) - stored).max() > 1e-2
    model = peft_custom.PeftModel.from_pretrained(peft_cases.build(kind), folder)
    pattern = json.loads((folder / "adapter_config.json").read_text())["rank_pattern"]
    ranks = {name: layer.r["default"] for name, layer in model.base_model.svd_layers()}
    assert ranks == {name.removesuffix(".lora_E"): sum(kept) for name, kept in pattern.items()}
    assert 0 in ranks.values() or case != "pooler"  # a module of which nothing is left
    alpha = model.peft_config["default"].lora_alpha
    for _, layer in model.base_model.svd_layers():
        assert layer.scaling["default"] == pytest.approx(alpha / (3 + 1e-5), rel=1e-12)
        assert layer.ranknum["default"].tolist() == [3.0]
    before = peft_cases.logits(model.eval(), kind)
    assert np.abs(peft_cases.logits(model.merge_and_unload().eval(), kind) - before).max() < 1e-5


@pytest.mark.parametrize("case", list(cases.FILES))
def test_newest_peft_reads_what_we_wrote_and_the_reverse(case: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases.save(peft_custom, case, tmp_path / "ours", attached)
        assert cases.difference(peft, case, tmp_path / "ours") < TOLERANCE
        assert cases.difference(peft_custom, case, tmp_path / "ours") < TOLERANCE
        if case != "equal ranks":  # PEFT cannot cut to the ranks it starts with
            cases.save(peft, case, tmp_path / "theirs", cases.pefts_way)
            assert cases.difference(peft_custom, case, tmp_path / "theirs") < TOLERANCE


@pytest.mark.parametrize("case", WRITTEN)
def test_our_files_have_the_keys_of_0_11_1(case: str, tmp_path: Path) -> None:
    cases.save(peft_custom, case, tmp_path, attached, train_pooler=False)
    theirs = json.loads((ADALORA / case / "adapter_config.json").read_text())
    ours = json.loads((tmp_path / "adapter_config.json").read_text())
    assert ours.keys() == theirs.keys()
    trained = {"rank_pattern", "base_model_name_or_path", "auto_mapping"}
    differ = {key for key in ours if ours[key] != theirs[key]} - trained
    assert not differ - {"target_modules", "modules_to_save"}
    assert ours["rank_pattern"].keys() == theirs["rank_pattern"].keys()
    ours_keys, theirs_keys = (
        set(peft_custom.load_peft_weights(folder)) for folder in (tmp_path, ADALORA / case)
    )
    assert ours_keys == theirs_keys


def test_plain_lora_of_one_rank_equals_the_adapter(tmp_path: Path) -> None:
    kind, values = cases.FILES["pooler"]
    model = peft_custom.get_peft_model(
        peft_cases.build(kind), peft_custom.AdaLoraConfig(**values)
    ).train()
    cases.start(model)
    optimizer = torch.optim.AdamW(list(cases.trained(model).values()), lr=2e-2)
    attach(model, optimizer, 8)
    with pytest.raises(ValueError, match="not its final ranks.*force=True"):
        model.save_pretrained(tmp_path, format="lora")
    for batch in cases.batches(8):
        cases.loss_of(model, kind, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    want = peft_cases.logits(model.eval(), kind)
    with pytest.raises(ValueError, match="rank=1: one module has [23] components"):
        model.save_pretrained(tmp_path, format="lora", rank=1)
    for rank in (None, 8):
        model.save_pretrained(tmp_path / str(rank), format="lora", rank=rank)
        config = json.loads((tmp_path / str(rank) / "adapter_config.json").read_text())
        assert config["peft_type"] == "LORA" and config["rank_pattern"] == {}
        assert config["r"] == config["lora_alpha"] == (rank or config["r"]) <= 8
        for library in (peft, peft_custom):
            loaded = library.PeftModel.from_pretrained(
                peft_cases.build(kind), str(tmp_path / str(rank))
            )
            assert np.abs(peft_cases.logits(loaded.eval(), kind) - want).max() < TOLERANCE


@pytest.mark.slow
def test_peft_0_11_1_reads_what_we_wrote(tmp_path: Path) -> None:
    """Needs PEFT 0.11.1 in `.peers/peft011`; `tests/golden/make_peft011.py` says how."""
    old = ROOT / ".peers" / "peft011"
    if not old.is_dir():
        pytest.skip("no PEFT 0.11.1 in .peers/peft011")
    for case in cases.FILES:
        cases.save(peft_custom, case, tmp_path / case.replace(" ", "_"), attached)
    done = subprocess.run(
        [sys.executable, str(GOLDEN / "make_adalora.py"), "load", str(tmp_path)],
        env={**os.environ, "PYTHONPATH": str(old), "PYTHONWARNINGS": "ignore"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    results = json.loads(done.stdout.strip().splitlines()[-1])
    assert results.keys() == cases.FILES.keys()
    assert max(results.values()) < TOLERANCE, results
