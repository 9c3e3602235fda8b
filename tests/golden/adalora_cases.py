"""AdaLoRA cases shared by this project and PEFT: one training run, one phase trace, adapter files.

Imports neither library: it is handed in, so the same code runs under PEFT 0.11.1 (see
`make_adalora.py`), under the newest PEFT and under ours. Weights come from NumPy by name.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import nn

from golden.peft_cases import build, logits, noise

STEPS = 50
TRAINING = {
    "task_type": "SEQ_CLS", "target_modules": ["query", "key", "value", "dense"], "init_r": 4,
    "target_r": 2, "lora_alpha": 16, "tinit": 5, "tfinal": 15, "deltaT": 3, "beta1": 0.8,
    "beta2": 0.9, "orth_reg_weight": 0.1, "total_step": STEPS,
}  # fmt: skip
PHASES = {"init_r": 4, "target_r": 2, "tinit": 3, "tfinal": 6, "deltaT": 2, "total_step": 20}

SHORT = {"init_r": 3, "target_r": 1, "tinit": 1, "tfinal": 2, "deltaT": 1, "total_step": 8}
FILES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("bert", {"task_type": "SEQ_CLS", "target_modules": ["query", "value"], **SHORT}),
    "pooler": ("bert", {**TRAINING, **SHORT}),
    "conv1d": ("gpt2", {"task_type": "CAUSAL_LM", "target_modules": ["c_attn", "c_proj"],
                        "fan_in_fan_out": True, "lora_alpha": 5, **SHORT}),
    "equal ranks": ("bert", {"target_modules": ["key"], "modules_to_save": ["classifier"],
                             **SHORT, "target_r": 3, "deltaT": 100}),
}  # fmt: skip


def batches(steps: int = STEPS) -> list[dict[str, torch.Tensor]]:
    """Batches of 6 for the tiny BERT, and GPT-2."""
    draw = np.random.RandomState(0)
    ids = torch.from_numpy(draw.randint(0, 40, (steps, 6, 7)))
    return [{"input_ids": x, "labels": (x[:, 0] + x[:, 3]) % 3} for x in ids]


def start(model: nn.Module) -> None:
    """Moves every trained parameter to a start that depends on its name alone."""
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad and "lora_" in name:
                p.copy_(noise(name, tuple(p.shape), 0.2))


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def nonzero(model: nn.Module) -> int:
    """How many components have E ≠ 0."""
    return sum(int((p != 0).sum()) for n, p in model.named_parameters() if "lora_E" in n)


def train(
    library: ModuleType, drive: Callable[[nn.Module, Any], Callable[[int], None]], **options: Any
) -> tuple[nn.Module, dict[str, np.ndarray]]:
    """50 steps in fp64; `drive` says what follows step t.

    Returns:
        The model, its losses as it reports them, counts of E ≠ 0, and final parameters.
    """
    config = library.AdaLoraConfig(**TRAINING, **options)
    model = library.get_peft_model(build("bert"), config).double().train()
    start(model)
    optimizer = torch.optim.AdamW(list(trained(model).values()), lr=5e-3, weight_decay=0.01)
    after = drive(model, optimizer)
    losses, counts = [], []
    for t, batch in enumerate(batches()):
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        after(t)
        optimizer.zero_grad()
        losses.append(loss.item())
        counts.append(nonzero(model))
    ends = {f"end {name}": p.detach().numpy().copy() for name, p in trained(model).items()}
    return model, {"losses": np.array(losses), "counts": np.array(counts), **ends}


class Chain(nn.Module):
    """Eleven linear maps."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(7, 7) for _ in range(11))
        with torch.no_grad():
            for name, p in self.named_parameters():
                p.copy_(noise(name, tuple(p.shape), 0.4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for linear in self.maps:
            x = x + torch.tanh(linear(x))
        return x


def phases(
    library: ModuleType, drive: Callable[[nn.Module, Any], Callable[[int], None]], **options: Any
) -> list[int]:
    """Counts of E ≠ 0 after each of 20 steps."""
    targets = [f"maps.{i}" for i in range(11)]
    config = library.AdaLoraConfig(target_modules=targets, **PHASES, **options)
    model = library.get_peft_model(Chain(), config)
    start(model)
    optimizer = torch.optim.AdamW(list(trained(model).values()), lr=1e-2)
    after = drive(model, optimizer)
    counts = []
    for t in range(PHASES["total_step"]):
        x = noise(f"x {t}", (5, 7), 1.0)
        (model(x) - x.flip(1)).square().mean().backward()
        optimizer.step()
        after(t)
        optimizer.zero_grad()
        counts.append(nonzero(model))
    return counts


def loss_of(model: nn.Module, kind: str, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    labels = batch["input_ids"] if kind == "gpt2" else batch["labels"]
    return model(input_ids=batch["input_ids"], labels=labels).loss


def save(
    library: ModuleType,
    case: str,
    folder: Path,
    drive: Callable[[nn.Module, Any], Callable[[int], None]],
    **options: Any,
) -> None:
    """Trains the case to the end of its schedule and writes the adapter and its logits."""
    kind, values = FILES[case]
    model = library.get_peft_model(build(kind), library.AdaLoraConfig(**values, **options)).train()
    start(model)
    optimizer = torch.optim.AdamW(list(trained(model).values()), lr=2e-2)
    after = drive(model, optimizer)
    for t, batch in enumerate(batches(SHORT["total_step"])):
        loss_of(model, kind, batch).backward()
        optimizer.step()
        after(t)
        optimizer.zero_grad()
    model.eval().save_pretrained(str(folder))
    np.save(folder / "logits.npy", logits(model, kind))


def difference(library: ModuleType, case: str, folder: Path) -> float:
    """Loads the adapter onto a fresh base and compares with the logits stored beside it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = library.PeftModel.from_pretrained(build(FILES[case][0]), str(folder)).eval()
    return float(np.abs(logits(model, FILES[case][0]) - np.load(folder / "logits.npy")).max())


def pefts_way(model: nn.Module, optimizer: Any) -> Callable[[int], None]:
    """What PEFT's users write after a step."""
    return model.base_model.update_and_allocate


def load_all(library: ModuleType, root: Path) -> None:
    """Prints each case's logit difference, or its error, as JSON."""
    results: dict[str, Any] = {}
    for case in FILES:
        try:
            results[case] = difference(library, case, root / case.replace(" ", "_"))
        except Exception as error:
            results[case] = f"{type(error).__name__}: {str(error)[:300]}"
    print(json.dumps(results))
