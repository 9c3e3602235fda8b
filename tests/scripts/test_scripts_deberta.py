"""The 88 runs of the ViLoRA study: each is a script, a method and a rank, with its values."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.paths import ROOT
from support.script_cases import Dry, parsed, rows_per_step

from examples.cli.groups import DataOptions, ModelOptions, TrainingOptions

# task: rows, tokens, epochs, steps per epoch, eval_steps, α, γ, tinit, tfinal, ΔT
TASKS = {
    "cola": (8551, 64, 25, 268, 100, 32, 0.1, 800, 3500, 10),
    "mnli": (392702, 256, 7, 12272, 2000, 16, 0.1, 8000, 50000, 100),
    "mrpc": (3668, 320, 30, 115, 300, 32, 0.1, 600, 1800, 1),
    "qnli": (104743, 512, 5, 3274, 1000, 32, 0.1, 2000, 8000, 100),
    "qqp": (363846, 320, 5, 11371, 3000, 16, 0.1, 8000, 25000, 100),
    "rte": (2490, 320, 50, 78, 100, 32, 0.3, 600, 1800, 1),
    "sst2": (67349, 128, 24, 2105, 3000, 16, 0.1, 6000, 22000, 100),
    "stsb": (5749, 128, 25, 180, 100, 32, 0.3, 800, 2000, 10),
}
# task: learning rate and warm-up of full (STS-B: with IVON), lora_all, adalora; of IVON with
# AdaLoRA's and with ViLoRA's ranks. Three numbers before the warm-up are clr's: first rate, steps
# at it, second rate.
CLR = {"cola": (2.0, 500, 0.4), "mrpc": (2.0, 400, 0.5)}
RATES = {
    "cola": ((2e-5, 100), (2e-4, 100), (8e-4, 100), (CLR["cola"], 100), (CLR["cola"], 100)),
    "mnli": ((1.5e-5, 1000), (2e-4, 1000), (5e-4, 1000), (0.4, 500), (0.4, 500)),
    "mrpc": ((2e-5, 100), (2e-4, 100), (1e-3, 100), (CLR["mrpc"], 100), (CLR["mrpc"], 100)),
    "qnli": ((2e-5, 500), (2e-4, 500), (5e-4, 500), (0.4, 500), (0.4, 500)),
    "qqp": ((2e-5, 2000), (2e-4, 2000), (8e-4, 2000), (0.4, 500), (0.4, 500)),
    "rte": ((2e-5, 200), (2e-4, 200), (1.2e-3, 200), (CLR["mrpc"], 200), (CLR["mrpc"], 100)),
    "sst2": ((2e-5, 500), (2e-4, 1000), (8e-4, 1000), (0.4, 500), (0.4, 500)),
    "stsb": ((0.1, 100), (2e-4, 100), (2.2e-3, 100), (CLR["cola"], 100), (CLR["cola"], 100)),
}
FEWER_EPOCHS = {("full", "qnli"): 4, ("full", "sst2"): 6}


@pytest.fixture
def dry(tmp_path: Path) -> Dry:
    return Dry(tmp_path)


def grid() -> Iterator[tuple[str, str, int]]:
    """(task, the study's name of the method, rank directory)."""
    for task, rates in RATES.items():
        clr = "_clr" if isinstance(rates[3][0], tuple) else ""
        ranked = ["lora_all", "adalora", f"adalora_ivon{clr}", f"vilora{clr}"]
        ranked.append(f"vilora{clr}_criterion")
        for name in ("full_ivon" if task == "stsb" else "full", *ranked):
            yield task, name, 2
        for name in ranked:
            yield task, name, 4


GRID = list(grid())


def test_the_grid_has_88_runs() -> None:
    assert len(GRID) == len(set(GRID)) == 88


@pytest.mark.parametrize(("task", "name", "rank"), GRID)
def test_a_run_has_the_published_values(dry: Dry, task: str, name: str, rank: int) -> None:
    full = name.startswith("full")
    command, done = dry(f"deberta_v3_base_{task}.sh", name, *([] if full else [str(rank)]))
    assert done.returncode == 0, done.stderr
    options = parsed(command)
    training, data = options[TrainingOptions], options[DataOptions]
    method, optimizer = options.method_options, options.optimizer_options
    _, tokens, epochs, _, eval_steps, alpha, gamma, tinit, tfinal, interval = TASKS[task]

    assert options[ModelOptions].model_name_or_path == "microsoft/deberta-v3-base"
    assert (data.task_name, data.max_length) == (task, tokens)
    assert training.num_train_epochs == FEWER_EPOCHS.get((name, task), epochs)
    assert (training.eval_steps, training.eval_after_epochs) == (eval_steps, 1)
    assert rows_per_step(options, 1) == training.per_device_train_batch_size == 32
    assert (training.weight_decay, training.max_grad_norm) == (0, 0)
    assert (training.mixed_precision, training.seed) == ("no", 2021)
    assert training.gradient_checkpointing == (task == "qnli")
    assert not training.load_best_model_at_end
    ending = "" if full else f"_r{rank}"
    assert training.output_dir == str(ROOT / "runs" / f"deberta_v3_base_{task}_{name}{ending}")

    column = ["full", "lora_all", "adalora", "adalora_ivon", "vilora"]
    bare = name.replace("_clr", "").removesuffix("_criterion")
    rate, warmup = RATES[task][column.index(bare.removesuffix("_ivon") if full else bare)]
    assert training.num_warmup_steps == warmup
    if isinstance(rate, tuple):
        assert training.lr_scheduler_type == "clr" and "_clr" in name
        assert (training.lr_schedule_first_lr, training.lr_schedule_const_epochs) == rate[:2]
        assert (training.lr_schedule_second_lr, training.lr_schedule_end_lr) == (rate[2], 0)
    else:
        assert (training.lr_scheduler_type, training.learning_rate) == ("linear", rate)

    kinds = {"full": "full", "lora_all": "lora", "adalora": "adalora", "vilora": "vilora"}
    assert options.method.name == kinds[bare if bare in kinds else bare.removesuffix("_ivon")]
    by_ivon = name.startswith("vilora") or "ivon" in name
    assert options.optimizer.name == ("ivon" if by_ivon else "adamw")
    if by_ivon:
        assert (optimizer.ivon_ess, optimizer.ivon_hess_init) == (0, 1.0)
        assert (optimizer.ivon_beta1, optimizer.ivon_beta2) == (0.9, 0.99999)
        assert optimizer.ivon_weight_decay == (1e-5 if full else 1e-8)
        assert (optimizer.ivon_train_mc_samples, optimizer.ivon_infer_mc_samples) == (1, 0)
        assert optimizer.ivon_clip_radius == 1e-3
    if bare == "lora_all":
        assert (method.lora_r, method.lora_alpha, method.lora_dropout) == (rank, 32, 0)
        assert method.lora_modules == ("query_proj", "key_proj", "value_proj", "dense")
    elif not full:
        assert (method.adalora_init_r, method.adalora_target_r) == ({2: 3, 4: 6}[rank], rank)
        assert (method.lora_alpha, method.lora_dropout) == (alpha, 0)
        assert method.adalora_orth_reg_weight == gamma
        assert (method.adalora_tinit, method.adalora_tfinal) == (tinit, tfinal)
        assert method.adalora_delta_t == interval
        assert method.lora_modules == ()  # those of PEFT
    if options.method.name == "vilora":
        criterion = {2: "mean", 4: "sigma"}[rank] if "criterion" in name else "SNR_mean_abs"
        assert method.vilora_criterion == criterion


def test_the_schedule_ends_before_the_run_does() -> None:
    """The study's T, from its rows and epochs, leaves room between tinit and tfinal."""
    for rows, _, epochs, per_epoch, *_, tinit, tfinal, _ in TASKS.values():
        assert -(-rows // 32) == per_epoch
        assert tinit < per_epoch * epochs - tfinal


def test_the_method_is_vilora_at_rank_2_unless_given(dry: Dry) -> None:
    options = parsed(dry("deberta_v3_base_rte.sh", "--seed", "2025")[0])
    assert (options.method.name, options.method_options.adalora_target_r) == ("vilora", 2)
    assert options[TrainingOptions].seed == 2025
    options = parsed(dry("deberta_v3_base_rte.sh", "adalora", "--lora_alpha", "8")[0])
    assert (options.method.name, options.optimizer.name) == ("adalora", "adamw")
    assert options.method_options.lora_alpha == 8
    plain = parsed(dry("deberta_v3_base_rte.sh", "vilora", "4")[0])
    named = parsed(dry("deberta_v3_base_rte.sh", "vilora_clr", "4")[0])
    assert plain.method_options == named.method_options
    options = parsed(dry("deberta_v3_base_rte.sh", "vilora_criterion", "8", CRITERION="SNR")[0])
    assert options.method_options.vilora_criterion == "SNR"
    assert options.method_options.adalora_init_r == 12


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["mnli", "vilora_clr"], "vilora_clr: the schedule of mnli is not clr; its method is vil"),
        (["cola", "full", "2"], "full has no rank"),
        (["cola", "vilora", "two"], "rank two: a whole number"),
        (["cola", "dylora"], "no values for method 'dylora': there is no "
         "hparams/deberta_v3_base_dylora.yaml"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(dry: Dry, words: list[str], message: str) -> None:
    command, done = dry(f"deberta_v3_base_{words[0]}.sh", *words[1:])
    assert command == [] and done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1


def test_scripts_are_short_and_differ_only_in_the_task() -> None:
    texts = set()
    for task in TASKS:
        path = ROOT / "scripts" / f"deberta_v3_base_{task}.sh"
        assert subprocess.run(["bash", "-n", path]).returncode == 0
        lines = path.read_text().splitlines()
        assert len(lines) <= 15 and lines[-1].split()[:2] == ["deberta", task]
        texts.add("\n".join(line for line in lines if not line.startswith(("# ", "deberta "))))
    assert len(texts) == 1
