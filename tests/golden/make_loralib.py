"""Writes loralib.npz: what Microsoft's loralib 0.1.2 computes, for `test_loralib_golden.py`.

    pip install --no-deps --target .peers/loralib loralib==0.1.2
    python -P tests/golden/make_loralib.py .peers/loralib

A process of its own, because the package has the name of ours. For each case: the constructor's
arguments (JSON), the state dict, input, output in training and in evaluation, and all gradients of
(output · cotangent).
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch

PATTERNS = {"tft": [True, False, True], "ftf": [False, True, False], "tt": [True, True]}
CASES: dict[str, tuple[str, list[int], dict, list[int]]] = {
    "linear": ("Linear", [11, 6], {"r": 3, "lora_alpha": 5}, [2, 4, 11]),
    "linear_nobias_fan": (
        "Linear",
        [11, 6],
        {"r": 2, "lora_alpha": 1, "fan_in_fan_out": True, "bias": False},
        [5, 11],
    ),
    **{
        f"merged_{name}{'_fan' * fan}": (
            "MergedLinear",
            [7, 12],
            {"r": 2, "lora_alpha": 3, "enable_lora": pattern, "fan_in_fan_out": fan},
            [2, 3, 7],
        )
        for name, pattern in PATTERNS.items()
        for fan in (False, True)
    },
    "embedding": ("Embedding", [13, 5], {"r": 3, "lora_alpha": 2, "padding_idx": 1}, [3, 4]),
    "conv": ("Conv2d", [4, 6, 3], {"r": 2, "lora_alpha": 3, "padding": 1}, [2, 4, 6, 5]),
    "conv_groups": (
        "Conv2d",
        [4, 6, 3],
        {"r": 2, "lora_alpha": 3, "groups": 2, "stride": 2},
        [2, 4, 7, 5],
    ),
    "conv1d_pointwise": ("Conv1d", [4, 6, 1], {"r": 2, "lora_alpha": 3}, [2, 4, 5]),
}


def run(kind: str, arguments: list[int], options: dict, shape: list[int]) -> dict[str, np.ndarray]:
    import loralib

    layer = getattr(loralib, kind)(*arguments, **options)
    with torch.no_grad():
        layer.lora_A.normal_(0.0, 0.5)
        layer.lora_B.normal_(0.0, 0.5)
    found = {f"state/{k}": v.clone() for k, v in layer.state_dict().items()}
    if kind == "Embedding":
        x = torch.randint(0, arguments[0], shape)
        x[0, 0] = options["padding_idx"]
    else:
        x = torch.randn(shape, requires_grad=True)
    layer.train()
    out = layer(x)
    cotangent = torch.randn_like(out)
    out.backward(cotangent)
    found |= {"x": x, "out": out, "cotangent": cotangent}
    if x.grad is not None:
        found["grad/x"] = x.grad
    trained = {k: p for k, p in layer.named_parameters() if p.grad is not None}
    # The convolution's parameters come under two names; ours has the shorter.
    found |= {f"grad/{k.removeprefix('conv.')}": p.grad for k, p in trained.items()}
    layer.eval()
    found["evaluated"] = layer(x)
    return {k: v.detach().numpy() for k, v in found.items()}


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    torch.manual_seed(0)
    arrays = {"cases": np.array(json.dumps(CASES))}
    for name, case in CASES.items():
        arrays |= {f"{name}/{key}": value for key, value in run(*case).items()}
    np.savez_compressed(Path(__file__).with_name("loralib.npz"), **arrays)


if __name__ == "__main__":
    main()
