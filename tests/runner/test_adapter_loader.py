"""`load_adapter`: adapters of every origin, into injected layers and into loralib's own."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import loralib
from peft_custom import LoraConfig, get_peft_model
from peft_custom.save_and_load import (
    LORALIB_CONFIG,
    LORALIB_WEIGHTS,
    adapter_tensors,
    load_adapter,
    read_adapter,
)
from transformers_patched.checkpoint import write_safetensors


def body(first: nn.Module) -> nn.Module:
    return nn.Sequential(OrderedDict(first=first, classifier=nn.Linear(6, 3)))


def injected(labels: int = 3) -> nn.Module:
    model = body(nn.Linear(5, 6))
    model.classifier = nn.Linear(6, labels)
    return get_peft_model(
        model, LoraConfig(r=2, target_modules=["first"], modules_to_save=["classifier"])
    )


def built_in() -> nn.Module:
    model = body(loralib.Linear(5, 6, r=2, lora_alpha=8))
    loralib.mark_only_lora_as_trainable(model)
    model.classifier.requires_grad_(True)
    return model


def head(model: nn.Module) -> Tensor:
    classifier = model.get_submodule("base_model.model.classifier.modules_to_save.default")
    return classifier.weight


@pytest.fixture
def factors() -> dict[str, Tensor]:
    torch.manual_seed(3)
    shapes = {"first.lora_A": (2, 5), "first.lora_B": (6, 2), "classifier.weight": (3, 6)}
    shapes["classifier.bias"] = (3,)
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def files(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Path]:
    """The same adapter as everybody writes it; the path to give."""
    peft = {
        f"base_model.model.{n}.weight" if "lora_" in n else f"base_model.model.{n}": t
        for n, t in tensors.items()
    }
    for name in ("run", "bin", "loralib"):
        (folder / name).mkdir()
    model = injected()
    model.save_pretrained(folder / "run" / "adapter")
    write_safetensors(folder / "run" / "adapter" / "adapter_model.safetensors", peft)
    model.save_pretrained(folder / "bin", safe_serialization=False)
    torch.save(peft, folder / "bin" / "adapter_model.bin")
    write_safetensors(folder / "loralib" / LORALIB_WEIGHTS, tensors)
    (folder / "loralib" / LORALIB_CONFIG).write_text('{"r": 2, "lora_alpha": 8}')
    torch.save(tensors, folder / "microsoft.bin")
    write_safetensors(folder / "bare.safetensors", tensors)
    return {
        "run": folder / "run",
        "adapter": folder / "run" / "adapter",
        "bin": folder / "bin",
        "loralib": folder / "loralib",
        "microsoft": folder / "microsoft.bin",
        "safetensors": folder / "bare.safetensors",
    }


KINDS = ("run", "adapter", "bin", "loralib", "microsoft", "safetensors")


@pytest.mark.parametrize("wiring", [injected, built_in])
@pytest.mark.parametrize("kind", KINDS)
def test_every_file_goes_into_every_wiring(kind, wiring, factors, tmp_path):
    file = read_adapter(files(tmp_path, factors)[kind])
    assert file.config.get("r") == (None if file.path.is_file() else 2)
    model = wiring()
    assert load_adapter(model, file) == ([], [], [])
    found = {n.removesuffix(".weight"): t for n, t in adapter_tensors(model).items()}
    assert all(torch.equal(found[name], factors[name]) for name in found) and len(found) == 2
    loaded = head(model) if wiring is injected else model.classifier.weight
    assert torch.equal(loaded, factors["classifier.weight"])


@pytest.mark.parametrize("wiring", [injected, built_in])
def test_everything_that_differs_is_named_at_once(wiring, factors, tmp_path):
    factors["first.lora_A"] = torch.zeros(4, 5)
    del factors["first.lora_B"]
    factors["first.typo"] = torch.zeros(1)
    torch.save(factors, tmp_path / "x.bin")
    model = wiring()
    before = {name: t.clone() for name, t in adapter_tensors(model).items()}
    with pytest.raises(ValueError, match=r"wrong shape \(1\)") as error:
        load_adapter(model, read_adapter(tmp_path / "x.bin"))
    message = str(error.value)
    assert "x.bin does not fit" in message and "file (4, 5), model (2, 5)" in message
    assert "missing (1)" in message and "unknown (1):\n    first.typo" in message
    assert all(torch.equal(t, before[n]) for n, t in adapter_tensors(model).items())


def test_a_head_of_other_labels_stays_and_is_reported(factors, tmp_path):
    torch.save(factors, tmp_path / "x.bin")
    model = injected(labels=2)
    before = head(model).clone()
    report = load_adapter(model, read_adapter(tmp_path / "x.bin"))
    assert report.left_out[0] == "classifier.weight: file (3, 6), model (2, 6)"
    assert torch.equal(head(model), before)


def test_what_nothing_here_trains_is_reported(factors, tmp_path):
    factors["qa_outputs.weight"] = torch.zeros(2, 6)
    torch.save(factors, tmp_path / "x.bin")
    report = load_adapter(injected(), read_adapter(tmp_path / "x.bin"))
    assert report.unexpected_keys == ["qa_outputs.weight"]


class Harm:
    def __reduce__(self):
        return (print, ("run",))


@pytest.mark.parametrize("content", [Harm(), {"a": Harm()}, {"a": 1}, [torch.zeros(1)]])
def test_a_file_of_more_than_tensors_is_refused(content, tmp_path, capsys):
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(ValueError, match=r"x\.bin: "):
        read_adapter(tmp_path / "x.bin")
    assert not capsys.readouterr().out


def test_a_damaged_file_and_no_file_are_said(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"x\.safetensors: damaged"):
        read_adapter(tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="no adapter; give a run's folder"):
        read_adapter(tmp_path)
