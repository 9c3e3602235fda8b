"""One adaptive run, four loops: plain PyTorch, accelerate, Hugging Face's Trainer, this project's.

Every loop must give the same masks, scores and weights, and a run killed and resumed in it those of
the uninterrupted one, bit for bit.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from support.paths import ROOT
from support.peft_tiny import ROWS, rows
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate
from toy_tuner import ToyConfig

from examples.cli.groups import TrainingOptions
from examples.data.batches import Batch, GlobalBatch
from examples.training.run_folder import RunFolder
from examples.training.trainer import Trainer
from peft_custom import PeftModel, attach, attached_hooks, get_peft_model
from peft_custom.hook_files import load_hooks_state, save_hooks_state
from peft_custom.hooks import schedule_finished
from peft_custom.integrations import _Callback

transformers = pytest.importorskip("transformers")

STEPS, EPOCHS, SEED = 12, 2, 7  # 24 rows, ROWS of them a step


def tiny(**options: Any) -> PeftModel:
    """A random two-layer BERT of Hugging Face's with toy adapters; no dropout."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    base = transformers.BertForSequenceClassification(config)
    return get_peft_model(
        base,
        ToyConfig(
            task_type="SEQ_CLS", target_modules=["query", "value"], penalty=0.01, every=2, **options
        ),
    )


def batches() -> list[dict[str, Tensor]]:
    return list(DataLoader(rows(), batch_size=ROWS))


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def outcome(model: nn.Module, hooks: Any) -> dict[str, Tensor]:
    """Everything that was trained or adapted."""
    assert hooks.t == STEPS and hooks.finished
    frozen = {n for n, p in model.named_parameters() if not p.requires_grad}
    ends = {n: t.detach().clone() for n, t in model.state_dict().items() if n not in frozen}
    return {**ends, "scores": hooks.parts[0].scores, "looked": hooks.parts[0].looked}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


# --- the loops ------------------------------------------------------------------------------------
def save(folder: Path, model: nn.Module, optimizer: Any, hooks: Any) -> None:
    folder.mkdir(exist_ok=True)
    save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, folder / "m")
    torch.save(optimizer.state_dict(), folder / "o")
    save_hooks_state(folder, hooks.state_dict())


def load(folder: Path, model: nn.Module, optimizer: Any, hooks: Any) -> None:
    model.load_state_dict(load_file(folder / "m"))
    optimizer.load_state_dict(torch.load(folder / "o", weights_only=True))
    hooks.load_state_dict(load_hooks_state(folder))


def plain(folder: Path, kill: int | None, **options: Any) -> dict[str, Tensor] | None:
    """Five lines of PyTorch, with a checkpoint after step 5."""
    model = tiny(**options).train()
    optimizer = adamw(model)
    hooks = attach(model, optimizer, total_steps=STEPS, seed=SEED)
    if (folder / "m").exists():
        load(folder, model, optimizer, hooks)
    hooks.prepare(batches(), lambda batch: model(**batch).loss)
    for step, batch in list(enumerate(batches() * EPOCHS))[hooks.t :]:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step + 1 == 5:
            save(folder, model, optimizer, hooks)
        if step + 1 == kill:
            return None
    return outcome(model, hooks)


def accelerated(folder: Path, kill: int | None, **options: Any) -> dict[str, Tensor] | None:
    """accelerate's wrapped optimiser and its own checkpoints."""
    accelerator = Accelerator(cpu=True)
    model = tiny(**options).train()
    model, optimizer, loader = accelerator.prepare(model, adamw(model), batches_loader())
    hooks = attach(model, optimizer, total_steps=STEPS, seed=SEED)
    if (folder / "state").exists():
        accelerator.load_state(str(folder / "state"))
        hooks.load_state_dict(load_hooks_state(folder / "state"))
    hooks.prepare(loader, lambda batch: model(**batch).loss)
    for epoch in range(EPOCHS):
        for index, batch in enumerate(loader):
            step = epoch * len(loader) + index
            if step < hooks.t:
                continue
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
            if step + 1 == 5:
                accelerator.save_state(str(folder / "state"))
                save_hooks_state(folder / "state", hooks.state_dict())
            if step + 1 == kill:
                return None
    return outcome(accelerator.unwrap_model(model), hooks)


def batches_loader() -> DataLoader:
    return DataLoader(rows(), batch_size=ROWS)


class Killed(Exception):
    """Stands for the signal."""


class Kill(transformers.TrainerCallback):
    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        if state.global_step == self.step:
            raise Killed


class InOrder(transformers.Trainer):
    def get_train_dataloader(self) -> DataLoader:
        return self.accelerator.prepare(DataLoader(self.train_dataset, batch_size=ROWS))


def trainer(
    folder: Path,
    kill: int | None = None,
    tune: Any = None,
    accumulate: int = 1,
    options: Any = None,
    eval_dataset: Any = None,
    **arguments: Any,
) -> Any:
    from peft_custom.integrations import TunerCallback

    model = tiny(**(options or {}))
    optimizer = adamw(model)
    given = {
        "output_dir": str(folder),
        "num_train_epochs": EPOCHS,
        "save_strategy": "steps",
        "save_steps": 5,
        "logging_steps": 1,
        "max_grad_norm": 0.0,
        "report_to": [],
        "seed": SEED,
        "per_device_train_batch_size": ROWS,
        "use_cpu": True,
        "disable_tqdm": True,
        "gradient_accumulation_steps": accumulate,
        **arguments,
    }
    return InOrder(
        model=model,
        args=transformers.TrainingArguments(**given),
        train_dataset=rows(),
        eval_dataset=eval_dataset,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
        callbacks=[TunerCallback(**(tune or {})), Kill(kill)],
    )


def callback_of(made: Any) -> Any:
    return next(c for c in made.callback_handler.callbacks if isinstance(c, _Callback))


def hugging_face(folder: Path, kill: int | None, **options: Any) -> dict[str, Tensor] | None:
    """The newest Trainer with `TunerCallback`, resuming from its own checkpoint."""
    made = trainer(folder, kill, options=options)
    resume = (folder / "checkpoint-5").exists()
    try:
        made.train(resume_from_checkpoint=True if resume else None)
    except Killed:
        return None
    return outcome(made.model, callback_of(made).hooks)


class KilledBatches:
    """The rows in their order, one batch per step; stops at the step that the signal hits."""

    def __init__(self, kill: int | None) -> None:
        self.kill = kill

    def __len__(self) -> int:
        return STEPS // EPOCHS

    def global_batches(self, epoch: int, start: int = 0) -> Any:
        for index in range(start, len(self)):
            if self.kill is not None and epoch * len(self) + index == self.kill:
                raise Killed
            numbers = np.arange(index * ROWS, (index + 1) * ROWS)
            yield GlobalBatch(index, (Batch(numbers, 8 * ROWS),), ROWS)


def ours(folder: Path, kill: int | None, **options: Any) -> dict[str, Tensor] | None:
    """This project's trainer, resuming from its own checkpoint."""
    arguments = TrainingOptions(
        output_dir=str(folder),
        num_train_epochs=EPOCHS,
        seed=SEED,
        max_grad_norm=0.0,
        eval_strategy="no",
        save_steps=5,
        logging_steps=1,
        disable_tqdm=True,
    )
    model, data = tiny(**options), rows()
    run = RunFolder(folder, {})
    resumed = run.check(False, "auto")
    run.open(SEED, "cpu", resumed_at=None if resumed is None else 5)
    made = Trainer(
        model,
        adamw(model),
        arguments,
        Accelerator(cpu=True),
        run,
        train=KilledBatches(kill),
        collate=lambda batch: default_collate([data[i] for i in batch.rows]),
        schedule=lambda step: 1.0,
        total_steps=STEPS,
    )
    if resumed is not None:
        made.resume(resumed)
        assert made.progress.step == 5
    try:
        made.train()
    except Killed:
        return None
    logged = run.read_lines("log.jsonl")
    assert len(logged) == STEPS and all(row["density"] == 0.5 for row in logged)
    return outcome(model, made.hooks)


LOOPS = {"plain": plain, "accelerate": accelerated, "trainer": hugging_face, "ours": ours}


@pytest.fixture(scope="module", params=[False, True], ids=["", "prepared"])
def reference(request: Any, tmp_path_factory: Any) -> tuple[dict[str, Any], dict[str, Tensor]]:
    options = {"look_first": request.param}
    ends = plain(tmp_path_factory.mktemp("reference"), None, **options)
    assert ends is not None
    return options, ends


def test_the_reference_run_adapts(tmp_path: Path) -> None:
    model = tiny()
    optimizer = adamw(model)
    hooks = attach(model, optimizer, total_steps=STEPS, seed=SEED)
    drawn = []
    for batch in batches() * EPOCHS:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        drawn.append(torch.cat([f.mask.clone() for f in hooks.parts[0].factors]))
    changes = [t for t in range(1, STEPS) if not torch.equal(drawn[t], drawn[t - 1])]
    assert changes and set(changes) <= {1, 3, 5, 7}  # after steps 2, 4, 6, 8; none from step 9 on
    assert all(mask.mean() == 0.5 for mask in drawn)


@pytest.mark.parametrize("loop", LOOPS)
def test_every_loop_gives_the_same(loop: str, reference: Any, tmp_path: Path) -> None:
    options, ends = reference
    found = LOOPS[loop](tmp_path, None, **options)
    assert found is not None
    assert_equal(found, ends)


@pytest.mark.parametrize("loop", LOOPS)
def test_killed_and_resumed_is_uninterrupted(loop: str, reference: Any, tmp_path: Path) -> None:
    options, ends = reference
    assert LOOPS[loop](tmp_path, 8, **options) is None
    found = LOOPS[loop](tmp_path, None, **options)
    assert found is not None
    assert_equal(found, ends)


# --- the callback ---------------------------------------------------------------------------------
def test_trainer_counts_steps_not_micro_batches_and_logs(tmp_path: Path) -> None:
    made = trainer(tmp_path, accumulate=3)
    made.train()
    hooks = callback_of(made).hooks
    assert hooks.t == made.state.max_steps == STEPS // 3
    logged = [line for line in made.state.log_history if "loss" in line]
    assert len(logged) == STEPS // 3
    assert all(line["tuner/density"] == 0.5 and line["tuner/penalty"] > 0 for line in logged)
    assert attached_hooks(made.model) is None  # detached at the end
    made.train()  # and attached anew
    assert callback_of(made).hooks.t == STEPS // 3 and callback_of(made).hooks is not hooks


def test_resuming_into_another_folder(tmp_path: Path) -> None:
    ends = hugging_face(tmp_path / "whole", None)
    assert hugging_face(tmp_path / "a", 8) is None
    other = trainer(tmp_path / "b", tune={"seed": 99})  # a checkpoint-5 of another run lies there
    other.train()
    made = trainer(tmp_path / "b")
    made.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-5"))
    assert ends is not None
    assert_equal(outcome(made.model, callback_of(made).hooks), ends)

    (tmp_path / "a").rename(tmp_path / "moved")
    folder = str(tmp_path / "moved" / "checkpoint-5")
    with pytest.raises(FileNotFoundError, match="TunerCallback\\(checkpoint="):
        trainer(tmp_path / "b").train(resume_from_checkpoint=folder)
    made = trainer(tmp_path / "b", tune={"checkpoint": folder})
    made.train(resume_from_checkpoint=folder)
    assert_equal(outcome(made.model, callback_of(made).hooks), ends)


def test_checkpoint_without_hooks_is_refused(tmp_path: Path) -> None:
    made = trainer(tmp_path, 8)
    made.pop_callback(type(callback_of(made)))
    with pytest.raises(Killed):
        made.train()
    with pytest.raises(FileNotFoundError, match="written without TunerCallback"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_callbacks_restored_by_the_trainer(tmp_path: Path) -> None:
    ends = hugging_face(tmp_path / "whole", None)
    assert hugging_face(tmp_path / "a", 8) is None
    made = trainer(tmp_path / "a", restore_callback_states_from_checkpoint=True)
    made.train(resume_from_checkpoint=True)
    assert ends is not None
    assert_equal(outcome(made.model, callback_of(made).hooks), ends)


def test_best_model_at_end_goes_back_with_its_schedule(tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        eval_strategy="steps",
        eval_steps=5,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        eval_dataset=rows()[:8],
    )
    made.train()
    best = int(made.state.best_model_checkpoint.rsplit("-", 1)[1])
    hooks = callback_of(made).hooks
    assert hooks.t == best == 5 and not schedule_finished(made.model.base_model)
    saved = load_hooks_state(made.state.best_model_checkpoint)["parts"][0]["state"]["masks"]
    assert all(torch.equal(f.mask, m) for f, m in zip(hooks.parts[0].factors, saved, strict=True))


def test_plain_lora_needs_nothing_of_the_callback(tmp_path: Path) -> None:
    from peft_custom import LoraConfig
    from peft_custom.integrations import TunerCallback

    base = tiny().unload()
    model = get_peft_model(base, LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        save_steps=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    made = transformers.Trainer(
        model=model, args=args, train_dataset=rows(), callbacks=[TunerCallback()]
    )
    made.train()
    assert not callback_of(made).hooks.adapts
    assert not list(tmp_path.rglob("hooks.*"))
    made.train(resume_from_checkpoint=True)


def test_transformers_is_not_imported_with_the_package() -> None:
    code = "import sys, peft_custom.integrations; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
