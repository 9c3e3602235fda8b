"""GPT-2 in whole runs of run_glue: every method, both wirings, padded and packed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.gpt2_tiny import tiny_gpt2
from support.runner_cases import lines, results

from examples import program
from examples.data.tables import write_table
from examples.methods import METHODS
from examples.methods.lora import LoraOptions, build
from examples.methods.source import ModelSource
from examples.run_glue import main
from loralib import MergedLinear
from transformers_patched import CheckpointError

WIDTH = 24  # of the tiny model: c_attn is (24, 72), query, key and value side by side
RUN = (
    "--task_name wording --base_dtype float32 --max_train_samples 48 --max_eval_samples 24 "
    "--max_train_steps 3 --per_device_train_batch_size 8 --max_length 96 "
    "--logging_steps 1 --no_cache --disable_tqdm"
).split()
RESULTS = ("adapter_model.safetensors", "lora.safetensors", "model.safetensors")
ADAM = "--learning_rate 3e-3 --adam_epsilon 1e-3"  # rounding alone moves no weight
SHORT = {
    "adalora": "--adalora_init_r 3 --adalora_target_r 2 --adalora_delta_t 1",
    "bim_lora": "--lora_r 4 --block_size 8",
}
SHORT["splopa"] = SHORT["block_prune"] = "--mask_block_rows 8 --mask_block_cols 12"
SHORT["vilora"] = f"{SHORT['adalora']} --learning_rate 50"


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    none = {"embd_pdrop": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0}
    return tiny_gpt2(tmp_path_factory.mktemp("gpt2"), **none)


def run(gpt2: Path, out: Path, *more: str) -> dict[str, torch.Tensor]:
    """The trained tensors of a run."""
    words = [*RUN, "--model_name_or_path", str(gpt2), "--output_dir", str(out), *more]
    assert program.run_main(main, words) == 0
    folder = out / ("adapter" if (out / "adapter").is_dir() else "model")
    files = [f for f in folder.glob("*.safetensors") if f.name in RESULTS]
    assert len(files) == 1
    return load_file(files[0])


def deltas(adapted: torch.nn.Module) -> list[torch.Tensor]:
    """ΔW of every c_attn as (3·24, 24): rows of query, key and value."""
    found = []
    for name, module in adapted.named_modules():
        if name.endswith("c_attn"):
            loralib = isinstance(module, MergedLinear)
            delta = module.delta_weight() if loralib else module.get_delta_weight("default")
            found.append(delta.T.detach())
    return found


def built(gpt2: Path, wiring: str, draw: bool = True, **more: object) -> torch.nn.Module:
    source = ModelSource(str(gpt2), "AutoModelForCausalLM", "CAUSAL_LM", "float32")
    model = build(source, LoraOptions(lora_r=2, lora_alpha=6, wiring=wiring, **more)).model
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if draw and "lora_" in name:
                weight.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model


def test_the_wirings_differ_in_what_they_add_to_c_attn(gpt2: Path) -> None:
    """As many numbers in both (12·r·width per layer), so that the increments must tell."""
    models = {wiring: built(gpt2, wiring) for wiring in ("peft_custom", "loralib")}
    sizes = {
        sum(p.numel() for p in model.parameters() if p.requires_grad) for model in models.values()
    }
    assert sizes == {2 * 2 * 4 * WIDTH}
    for delta in deltas(models["peft_custom"]):  # one A of rank 2 for all three
        assert torch.linalg.matrix_rank(delta) == 2
        assert all(part.abs().max() > 1e-2 for part in delta.split(WIDTH))
    found = deltas(models["loralib"])
    assert len(found) == 2
    for delta in found:  # factors of their own: rank 2 each, 4 together
        query, key, value = delta.split(WIDTH)
        assert not key.any()
        ranks = [torch.linalg.matrix_rank(part) for part in (query, value, delta)]
        assert ranks == [2, 2, 4]


def test_modules_can_be_named_in_both_wirings(gpt2: Path) -> None:
    model = built(gpt2, "loralib", lora_modules=("key",))
    assert all(d[WIDTH : 2 * WIDTH].any() and not d[:WIDTH].any() for d in deltas(model))
    model = built(gpt2, "peft_custom", lora_modules=("all-linear",))
    wrapped = {n.rpartition(".")[2] for n, m in model.named_modules() if hasattr(m, "base_layer")}
    assert wrapped == {"c_attn", "c_proj", "c_fc"}


def test_the_original_recipes_files_start_a_run(gpt2: Path, tmp_path: Path) -> None:
    """Of the loralib wiring: factors alone, or the whole model with its masks, under `module.`."""
    trained = built(gpt2, "loralib")
    factors = {n: p.detach() for n, p in trained.named_parameters() if p.requires_grad}
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 256, 256)}
    head = {"lm_head.decoder.weight": trained.transformer.wte.weight.detach()}
    whole = {n: p.detach() for n, p in trained.named_parameters()} | mask | head
    for name, tensors in {"interim.pt": factors, "epoch.pt": whole}.items():
        state = {f"module.{key}": tensor for key, tensor in tensors.items()}
        torch.save({"model_state_dict": state}, tmp_path / name)
        started = built(gpt2, "loralib", lora_path=str(tmp_path / name), draw=False)
        assert len(factors) == 4
        for key, weight in factors.items():
            assert torch.equal(started.get_parameter(key), weight)
    with pytest.raises(CheckpointError, match=r"(?s)wrong shape.*check .*--wiring"):
        built(gpt2, "peft_custom", lora_path=str(tmp_path / "interim.pt"))


def test_an_adapter_of_the_other_wiring_is_refused(gpt2: Path, tmp_path: Path) -> None:
    words = ["--max_train_steps", "1", "--method", "lora", "--lora_r", "2"]
    run(gpt2, tmp_path / "own", *words, "--wiring", "loralib")
    again = ["--wiring", "loralib", "--lora_path", str(tmp_path / "own")]
    run(gpt2, tmp_path / "again", *words, *again)
    again[1] = "peft_custom"
    whole = [*RUN, "--model_name_or_path", str(gpt2), "--output_dir", str(tmp_path / "no")]
    assert program.run_main(main, [*whole, *words, *again]) == 2


def test_an_empty_text_has_no_token_to_read(gpt2: Path, tmp_path: Path, capsys) -> None:
    rows = {"sentence": ["a text", "", "another"], "label": [0, 1, 0]}
    for split in ("train", "dev"):
        write_table(tmp_path / "cola" / f"{split}.jsonl", rows)
    words = ["--data_dir", str(tmp_path), "--output_dir", str(tmp_path / "out"), "--no_cache"]
    words += ["--task_name", "cola", "--model_name_or_path", str(gpt2), "--max_steps", "1"]
    assert program.run_main(main, words) == 2
    told = capsys.readouterr().err
    assert ".jsonl, line 2: the text is empty, and this tokenizer puts no tokens" in told


CASES = [(method, "peft_custom") for method in METHODS] + [
    ("lora", "loralib"),
    ("dylora", "loralib"),
]


@pytest.mark.parametrize(("method", "wiring"), CASES, ids=map("-".join, CASES))
def test_padded_is_packed(gpt2: Path, tmp_path: Path, method: str, wiring: str) -> None:
    """The same batches, with padding and without: the same losses and the same result."""
    words = ["--method", method, *SHORT.get(method, "").split(), "--no_group_by_length"]
    words += [] if method == "vilora" else ADAM.split()
    words += ["--wiring", wiring] if method in ("lora", "dylora") else []
    padded = run(gpt2, tmp_path / "padded", *words)
    packed = run(gpt2, tmp_path / "packed", *words, "--packing")
    assert padded.keys() == packed.keys() and len(padded) >= 3
    for name in padded:
        torch.testing.assert_close(padded[name], packed[name], rtol=1e-3, atol=1e-4)
    one, two = (lines(tmp_path / kind / "log.jsonl") for kind in ("padded", "packed"))
    assert [row["loss"] for row in one] == pytest.approx([row["loss"] for row in two], rel=1e-4)
    figures = results(tmp_path / "packed")
    assert 0 < figures["trainable_parameters"] <= figures["total_parameters"]
