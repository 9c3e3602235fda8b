"""What every registered method keeps, with every optimiser that it may have.

A run's result loads back equal, a killed run goes on to the same bytes, two processes compute what
one does, the result reaches PEFT or a plain model, and every option is shown and saved. The cases
are the registries' own: a new method is among them once it is registered.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.processes import WAYS, launch_runs
from support.runner_cases import lines, pair_task, results, tiny_bert

from examples import program
from examples.cli.fields import OptionError
from examples.evaluation.calibration import calibration
from examples.methods import METHODS, OPTIMIZERS
from examples.run_glue import OPTION_CLASSES, SUMMARY, main
from peft_custom import PeftModel
from peft_custom.tuners.base import iter_adapters
from transformers_patched import AutoModelForSequenceClassification, AutoTokenizer

# 8 steps, in which the schedules below do all they can
RUN = (
    "--task_name mrpc --base_dtype float32 --num_train_epochs 2 --max_length 40 --no_cache "
    "--per_device_train_batch_size 6 --calibration --metric_for_best_model loss "
    "--logging_steps 1 --disable_tqdm"
).split()
# What a method or optimiser needs to do all of its work in 8 steps; none: its defaults.
SHORT = {
    "adalora": "--adalora_init_r 3 --adalora_target_r 2 --adalora_tinit 1 --adalora_tfinal 3 "
    "--adalora_delta_t 1",
    "bim_lora": "--block_size 4",
    "adamw": "--learning_rate 0.1",
    "ivon": "--learning_rate 50",
}
SHORT["vilora"] = SHORT["adalora"]
PRUNING = "--final_threshold 0.5 --pruning_warmup 1 --mask_block_rows 4 --mask_block_cols 8"
SHORT |= dict.fromkeys(("splora", "block_prune"), PRUNING)
SHORT["splopa"] = f"{PRUNING} --num_splopa_prototypes 5"
# What options make of a method: a name for it -> the method and the options.
VARIANTS = {
    "matryoshka": ("dylora", "--dylora_mode matryoshka"),
    "dora": ("lora", "--use_dora"),
    "loraplus": ("lora", "--loraplus_lr_ratio 4"),
    "olora": ("lora", "--init_lora_weights olora"),
    "activations": ("lora", "--rank_from activations --rank_batches 2"),
    "gradients": ("lora", "--rank_from gradients --rank_batches 2"),
}
# How the library writes an adapter for PEFT where the saved one is not PEFT's already.
FOR_PEFT: dict[str, dict[str, object]] = {
    "dylora": {"rank": 8},
    "matryoshka": {"rank": 8},
    "adalora": {"format": "lora"},
    "vilora": {"format": "lora"},
    "bim_lora": {"as_lora": True},
    "splora": {"as_lora": True},
    "splopa": {"as_lora": True},
    "block_prune": {"as_lora": True},
}
# Two processes: small steps, whose rounding stays small. With Adam's own 1e-8 a gradient that is
# 0 but for rounding would move its weight.
STEADY = {
    "adamw": "--learning_rate 2e-2 --adam_epsilon 1e-3",
    "ivon": "--learning_rate 0.5",
    "matryoshka": "--learning_rate 2e-3",  # at rank 8 its first component has 22 times LoRA's scale
}
# Two processes: absolute difference of weights. Adam on the blocks' few features, before the run,
# makes more of their rounding, and so do directions of nearly equal variance.
CLOSE = {"bim_lora": 1e-5, "activations": 1e-4, "gradients": 1e-4}
DIFFERENT_EACH_TIME = re.compile("seconds|memory|tokens_per")


def parsed(*words: str) -> program.Options:
    needed = ["--task_name", "mrpc", "--model_name_or_path", "m", "--output_dir", "o"]
    options = program.parse([*needed, *words], "run_glue", SUMMARY, OPTION_CLASSES, "task_name")
    assert options is not None
    return options


def pairs() -> list[tuple[str, str]]:
    """(method, optimiser) for all that go together."""
    found = []
    for method in METHODS:
        for optimizer in OPTIMIZERS:
            try:
                parsed("--method", method, "--optimizer", optimizer)
            except OptionError:  # the method needs what this optimiser has not
                continue
            found.append((method, optimizer))
    return found


PAIRS = [*pairs(), *((name, "adamw") for name in VARIANTS)]
each_pair = pytest.mark.parametrize("pair", PAIRS, ids="-".join)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task, and a model with dropout and one without: 23 rows, so that no batch is the last."""
    folder = tmp_path_factory.mktemp("home")
    tiny_bert(folder / "bert", initializer_range=0.2)  # what a layer adds shows in the logits
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    tiny_bert(folder / "still", initializer_range=0.2, **still)
    pair_task(folder / "mrpc", {"train": 23, "validation": 13})
    return folder


def words(home: Path, out: Path, pair: tuple[str, str], still: bool = False) -> list[str]:
    """A run of `pair`; `still`: without dropout, and with steps that rounding hardly changes."""
    model = "still" if still else "bert"
    tables = (SHORT, STEADY) if still else (SHORT,)
    method, options = VARIANTS.get(pair[0], (pair[0], ""))
    names = dict.fromkeys((method, pair[1], pair[0]))
    own = [word for name in names for table in tables for word in table.get(name, "").split()]
    where = ["--model_name_or_path", str(home / model), "--data_dir", str(home)]
    chosen = ["--method", method, "--optimizer", pair[1], *options.split()]
    return [*RUN, *where, *chosen, *own, "--output_dir", str(out)]


@pytest.fixture(scope="module")
def trained(
    home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[tuple[str, str]], Path]:
    """`trained(pair)` -> the folder of its run, which saved every second step."""
    folder, done = tmp_path_factory.mktemp("trained"), set()

    def run(pair: tuple[str, str]) -> Path:
        out = folder / "-".join(pair)
        if pair not in done:
            save = ["--save_steps", "2", "--save_total_limit", "0"]
            assert program.run_main(main, [*words(home, out, pair), *save]) == 0
            done.add(pair)
        return out

    return run


def weights(run: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a run's result."""
    folder = run / ("model" if (run / "model").is_dir() else "adapter")
    return {
        f"{file.name}: {name}": tensor
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def loaded(home: Path, run: Path) -> torch.nn.Module:
    """A run's result by the library, as a user of it would load it."""
    if (run / "model").is_dir():
        return AutoModelForSequenceClassification.from_pretrained(run / "model").eval()
    base = AutoModelForSequenceClassification.from_pretrained(home / "bert")
    return PeftModel.from_pretrained(base, run / "adapter").eval()


@torch.no_grad()
def logits(model: torch.nn.Module, home: Path) -> torch.Tensor:
    """(rows, labels) of the validation rows."""
    rows = lines(home / "mrpc" / "validation.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(home / "bert")
    texts = [[row[name] for row in rows] for name in ("sentence1", "sentence2")]
    return model(**tokenizer(*texts, padding=True, return_tensors="pt")).logits


def same(one: torch.Tensor, two: torch.Tensor) -> None:
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


# --- the result ----------------------------------------------------------------------------------


@each_pair
def test_the_saved_result_gives_the_logits_that_the_run_reports(
    home: Path, trained: Callable[[tuple[str, str]], Path], pair: tuple[str, str]
) -> None:
    run = trained(pair)
    labels = [row["label"] for row in lines(home / "mrpc" / "validation.jsonl")]
    model = loaded(home, run)
    found = calibration(logits(model, home).numpy(), torch.tensor(labels).numpy())
    reported = results(run)
    for name in ("nll", "entropy"):
        assert found[name] == pytest.approx(reported[f"eval_{name}"], abs=1e-6), name
    increments = [layer.get_delta_weight("default") for _, layer in iter_adapters(model)]
    largest = max((delta.abs().max().item() for delta in increments if delta.numel()), default=1.0)
    assert largest > 1e-3  # there was something to lose


@each_pair
def test_the_result_leaves_the_house_or_says_why_not(
    home: Path, trained: Callable[[tuple[str, str]], Path], pair: tuple[str, str], tmp_path: Path
) -> None:
    """Merged it is a model that Transformers loads; where it can, PEFT has it as an adapter."""
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    theirs = transformers.AutoModelForSequenceClassification
    model = loaded(home, trained(pair))
    wanted = logits(model, home)
    if isinstance(model, PeftModel):
        try:
            model.save_pretrained(tmp_path / "adapter", **FOR_PEFT.get(pair[0], {}))
        except ValueError as error:
            assert "merge_and_unload()" in str(error)
        else:
            base = theirs.from_pretrained(home / "bert")
            same(logits(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"), home), wanted)
        model = model.merge_and_unload()
    model.save_pretrained(tmp_path / "model")
    same(logits(theirs.from_pretrained(tmp_path / "model").eval(), home), wanted)


# --- resuming, and several processes -------------------------------------------------------------


@each_pair
def test_a_killed_run_ends_with_the_same_bytes(
    home: Path, trained: Callable[[tuple[str, str]], Path], pair: tuple[str, str], tmp_path: Path
) -> None:
    """It died after step 5 of 8, whose checkpoint is that of step 4."""
    whole, again = trained(pair), tmp_path / "again"
    shutil.copytree(whole, again)
    for name in ("checkpoint-6", "checkpoint-8", "adapter", "model"):
        shutil.rmtree(again / name, ignore_errors=True)
    (again / "all_results.json").unlink()
    torch.manual_seed(99)  # a new process knows nothing of the old one's draws
    save = ["--save_steps", "2", "--save_total_limit", "0", "--resume_from_checkpoint", "auto"]
    assert program.run_main(main, [*words(home, again, pair), *save]) == 0
    one, two = weights(whole), weights(again)
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    first, second = (
        {k: v for k, v in results(run).items() if not DIFFERENT_EACH_TIME.search(k)}
        for run in (whole, again)
    )
    assert first == second
    for name in ("metrics.jsonl", "log.jsonl"):
        assert lines(whole / name) == lines(again / name), name


# Pairs that a way refuses, and in which words.
REFUSED = {("fsdp2", "full", "ivon"): "--optimizer ivon: not with FSDP2 where all weights train"}


@pytest.fixture(scope="module", params=WAYS)
def on_two(
    home: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> tuple[str, Path, str]:
    """How two processes ran all pairs, where, and what they said."""
    out = tmp_path_factory.mktemp(request.param)
    small = ["--per_device_train_batch_size", "3", "--per_device_eval_batch_size", "4"]
    runs = [words(home, out / "-".join(pair), pair, still=True) for pair in PAIRS]
    said = launch_runs([["run_glue", *run, *small] for run in runs], out, request.param)
    return request.param, out, said


@pytest.fixture(scope="module")
def on_one(
    home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[tuple[str, str]], Path]:
    """`on_one(pair)` -> the folder of its run on one process, of as many rows per step."""
    folder = tmp_path_factory.mktemp("one")

    def run(pair: tuple[str, str]) -> Path:
        out = folder / "-".join(pair)
        if not out.exists():
            assert program.run_main(main, words(home, out, pair, still=True)) == 0
        return out

    return run


@each_pair
def test_two_processes_equal_one(
    on_two: tuple[str, Path, str],
    on_one: Callable[[tuple[str, str]], Path],
    pair: tuple[str, str],
) -> None:
    """Of three rows each and of six; without dropout, whose draws would differ."""
    way, out, said = on_two
    two = out / "-".join(pair)
    refused = REFUSED.get((way, *pair))
    if refused is not None:
        assert refused in said and not two.exists()
        return
    assert (two / "all_results.json").is_file(), said[-5000:]
    one = weights(on_one(pair))
    assert one.keys() == weights(two).keys()
    for name, tensor in weights(two).items():
        close = CLOSE.get(pair[0], 1e-6)
        torch.testing.assert_close(tensor, one[name], atol=close, rtol=1e-5, msg=name)
    evaluations = (lines(run / "metrics.jsonl") for run in (on_one(pair), two))
    for a, b in zip(*evaluations, strict=True):
        assert a == pytest.approx(b, abs=1e-5)


# --- options -------------------------------------------------------------------------------------


@each_pair
def test_every_option_is_shown_and_saved(
    trained: Callable[[tuple[str, str]], Path],
    pair: tuple[str, str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--help"]) == 0
    shown = set(re.findall(r"--(\w+)", capsys.readouterr().out))
    saved = json.loads((trained(pair) / "config.json").read_text("utf-8"))
    method = VARIANTS.get(pair[0], pair)[0]
    for options in (METHODS[method].options, OPTIMIZERS[pair[1]].options):
        names = {item.name for item in dataclasses.fields(options)}
        assert names <= shown and names <= saved.keys()
    assert (saved["method"], saved["optimizer"]) == (method, pair[1])
