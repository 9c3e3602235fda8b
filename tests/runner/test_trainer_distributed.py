"""Two processes of b rows compute what one of 2·b rows does, and go on from their checkpoints."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.processes import launch_two
from support.runner_cases import lines, pair_task, results, tiny_bert

from examples import program
from examples.run_glue import main

OPTIONS = (
    "--task_name mrpc --base_dtype float32 --learning_rate 5e-3 --num_train_epochs 2 "
    "--max_length 40 --no_cache"
).split()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """61 rows: the last global batch of an epoch is short, and so is the last evaluation batch."""
    folder = tmp_path_factory.mktemp("home")
    tiny_bert(folder / "bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    pair_task(folder / "mrpc", {"train": 61, "validation": 21})
    return folder


def words(home: Path, out: Path, *more: str) -> list[str]:
    where = ["--model_name_or_path", str(home / "bert"), "--data_dir", str(home)]
    return [*where, *OPTIONS, "--output_dir", str(out), *more]


def two_processes(home: Path, out: Path, *more: str) -> None:
    launch_two(["-m", "examples.run_glue"], *words(home, out, *more))


@pytest.mark.parametrize("packing", [[], ["--packing", "--max_tokens", "70"]])
def test_two_processes_equal_one(home, tmp_path, packing):
    small = ["--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "5", *packing]
    two_processes(home, tmp_path / "two", *small)
    large = ["--per_device_train_batch_size", "8", *packing]
    assert program.run_main(main, words(home, tmp_path / "one", *large)) == 0
    first, second = (
        load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        for name in ("one", "two")
    )
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-6, rtol=1e-5)
    rows = [lines(tmp_path / name / "metrics.jsonl") for name in ("one", "two")]
    for a, b in zip(*rows, strict=True):
        assert a == pytest.approx(b, abs=1e-5)
    one, two = results(tmp_path / "one"), results(tmp_path / "two")
    assert one["train_tokens"] == two["train_tokens"] and one["steps"] == two["steps"] == 16
    if not packing:
        _goes_on(home, tmp_path, small)


def _goes_on(home: Path, tmp_path: Path, small: list[str]) -> None:
    """From the first epoch's checkpoint, again with two processes: the same bytes."""
    shutil.copytree(tmp_path / "two", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoint-16")
    (tmp_path / "again" / "all_results.json").unlink()
    two_processes(home, tmp_path / "again", *small, "--resume_from_checkpoint", "auto")
    name = Path("adapter") / "adapter_model.safetensors"
    assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert lines(tmp_path / "two" / "metrics.jsonl") == lines(tmp_path / "again" / "metrics.jsonl")


def test_bim_features_do_not_depend_on_how_steps_are_cut(home, tmp_path):
    """57 rows: of an epoch's last global batch, of one row, the second process has a filler."""
    common = "--method bim_lora --lora_r 2 --block_size 5 --max_train_samples 57 --max_steps 2"
    common = [*common.split(), "--collection_steps", "8", "--group_by_length", "false"]
    small, eight = (["--per_device_train_batch_size", size] for size in ("4", "8"))
    cuts = {
        "1x8": eight,
        "2x4": [*small, "--gradient_accumulation_steps", "2"],
        "tokens": [*eight, "--packing", "--max_tokens", "70"],
        "two": small,
    }
    found, masks = {}, {}
    for name, more in cuts.items():
        path = tmp_path / f"{name}.safetensors"
        more = [*common, *more, "--features_path", str(path)]
        if name == "two":
            two_processes(home, tmp_path / name, *more)
        else:
            assert program.run_main(main, words(home, tmp_path / name, *more)) == 0
        found[name] = load_file(path)
        adapter = load_file(tmp_path / name / "adapter" / "adapter_model.safetensors")
        masks[name] = {key: t for key, t in adapter.items() if key.endswith("block_scores")}
    for name in ("2x4", "tokens", "two"):
        for key, values in found["1x8"].items():
            # (p, q, 6): each feature to within a part of its largest value
            scale = values.amax((0, 1)).clamp(min=1e-30)
            torch.testing.assert_close(found[name][key] / scale, values / scale, atol=4e-6, rtol=0)
        for key, Z in masks["1x8"].items():
            torch.testing.assert_close(masks[name][key], Z, atol=1e-5, rtol=1e-5)
