"""BIM-LoRA's schedule in training loops: preparing, cooling, resuming, several processes."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from support.bim_tiny import adamw, base, batches, frozen_bytes, loss_of, tiny, trained
from support.paths import ROOT

from peft_custom import BimLoraConfig, PeftModel, attach, get_peft_model
from peft_custom.hook_files import load_hooks_state, save_hooks_state
from peft_custom.tuners.bim_lora.layer import BIMLoRALinear

transformers = pytest.importorskip("transformers")
STEPS = 12


def run(model: PeftModel, steps: int = STEPS, seed: int = 7, folder: Path | None = None):
    """Five lines of PyTorch; returns the hooks. Saves after step 5 into `folder`."""
    optimizer = adamw(model)
    hooks = attach(model, optimizer, total_steps=STEPS, seed=seed)
    if folder is not None and folder.is_dir():
        state = torch.load(folder / "state", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        hooks.load_state_dict(load_hooks_state(folder))
    hooks.prepare(batches(4), loss_of(model.train()))
    for t in range(hooks.t, steps):
        model(**batches(STEPS)[t]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if folder is not None and t == 4:
            folder.mkdir()
            torch.save(
                {"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "state"
            )
            save_hooks_state(folder, hooks.state_dict())
    return hooks


def test_a_step_without_prepare_raises() -> None:
    model = tiny()
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=4)
    model(**batches(1)[0]).loss.backward()
    with pytest.raises(RuntimeError, match="looks at data before its first step"):
        optimizer.step()


def test_preparing_leaves_everything_but_the_mask_alone() -> None:
    """Base, factors, head, gradients, requires_grad, modes and the global random state."""
    model = tiny()
    model.get_base_model().bert.encoder.layer[0].output.dense.base_layer.bias.requires_grad_(True)
    model.train()
    model.get_base_model().bert.embeddings.eval()
    hooks = attach(model, adamw(model), total_steps=STEPS, seed=7)
    before, weights = trained(model), frozen_bytes(model)
    flags = {n: p.requires_grad for n, p in model.named_parameters()}
    modes = {n: m.training for n, m in model.named_modules()}
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    hooks.prepare(batches(4), loss_of(model))
    assert torch.equal(torch.rand(3), wanted)
    after = trained(model)
    changed = {n.rpartition(".")[2] for n in before if not torch.equal(before[n], after[n])}
    assert changed == {"block_scores"}
    assert frozen_bytes(model) == weights
    assert flags == {n: p.requires_grad for n, p in model.named_parameters()}
    assert modes == {n: m.training for n, m in model.named_modules()}
    assert all(p.grad is None for p in model.parameters())
    part = hooks.parts[0]
    assert part.features.values.shape == (part.features.table[-1].rows.stop, 6)
    assert hooks.finished and all(
        m.watch is None for m in model.modules() if type(m) is BIMLoRALinear
    )


def test_fact_16_same_seed_same_everything() -> None:
    first, second, other = tiny(), tiny(), tiny()
    for model, seed in ((first, 7), (second, 7), (other, 8)):
        model.hooks = run(model, seed=seed)
    one, two = trained(first), trained(second)
    assert all(torch.equal(one[n], two[n]) for n in one)
    parts = [m.hooks.parts[0] for m in (first, second, other)]
    assert torch.equal(parts[0].features.values, parts[1].features.values)
    assert torch.equal(parts[0].scores, parts[1].scores)
    assert not torch.equal(parts[0].scores, parts[2].scores)


def test_first_masks_are_the_probabilities_and_then_move() -> None:
    """σ(Z/τ₀) = P within the kinds' ranges; training moves A, B, Z; τ follows the table."""
    from peft_custom.tuners.bim_lora.masks import mask_range

    model = tiny()
    hooks = attach(model, adamw(model), total_steps=STEPS, seed=7)
    hooks.prepare(batches(4), loss_of(model.train()))
    layer = model.get_base_model().bert.encoder.layer[0].attention.self.value
    m = layer.factors().mask()
    (low, _), (_, high) = mask_range("value", 0.0), mask_range("value", 1.0)
    assert low <= float(m.min()) < float(m.max()) <= high
    hooks.remove()
    model = tiny()
    start = trained(model)
    hooks = run(model)
    assert all(not torch.equal(t, start[n]) for n, t in trained(model).items())
    assert layer.mask_temperature == pytest.approx(1.4)
    layer = model.get_base_model().bert.encoder.layer[0].attention.self.value
    assert layer.mask_temperature == pytest.approx(0.45) == hooks.log()["temperature"]
    assert set(hooks.log()) == {"temperature", "mask_mean", "mask_std", "mask_open"}
    history = hooks.parts[0].history
    assert history["steps"] == list(range(STEPS + 1)) and len(history["counts"][0]) == 20


@pytest.mark.parametrize(
    "options",
    [{}, {"mask_init": "random", "train_mask": False}, {"temperature_schedule": "exponential",
     "temperature_decay_steps": 3}, {"mask_init": "features", "lora_dropout": 0.2}],
    ids=["mlp", "frozen", "exponential", "features"],
)  # fmt: skip
def test_killed_and_resumed_is_never_having_stopped(tmp_path: Path, options: dict) -> None:
    def seeded(model, **keywords):
        torch.manual_seed(0)
        return run(model, **keywords)

    def reseed(module, arguments) -> None:
        torch.manual_seed(1)

    whole = tiny(**options)
    if options.get("lora_dropout"):  # masks come from the global generator: draw them per step
        whole.register_forward_pre_hook(reseed, prepend=True)
    hooks = seeded(whole)
    killed = tiny(**options)
    if options.get("lora_dropout"):
        killed.register_forward_pre_hook(reseed, prepend=True)
    seeded(killed, steps=8, folder=tmp_path / "saved")
    resumed = tiny(seed=0, **options)
    if options.get("lora_dropout"):
        resumed.register_forward_pre_hook(reseed, prepend=True)
    again = seeded(resumed, seed=7, folder=tmp_path / "saved")
    wanted, found = trained(whole), trained(resumed)
    assert all(torch.equal(wanted[n], found[n]) for n in wanted)
    ours, theirs = again.parts[0].history, hooks.parts[0].history
    assert ours["steps"] == theirs["steps"]
    assert all(torch.equal(a, b) for a, b in zip(ours["counts"], theirs["counts"], strict=True))


def test_features_are_reused_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "features.safetensors"
    first, second = (tiny(features_file=str(file)) for _ in range(2))
    wanted = run(first, steps=0).parts[0]
    assert file.is_file()
    hooks = attach(second, adamw(second), total_steps=STEPS, seed=7)
    hooks.prepare([None], lambda batch: pytest.fail("data were looked at"))
    assert torch.equal(hooks.parts[0].features.values, wanted.features.values)
    ours, theirs = trained(second), trained(first)
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)
    other = tiny(features_file=str(file), block_size=4)
    hooks = attach(other, adamw(other), total_steps=STEPS)
    with pytest.raises(ValueError, match="features_file"):
        hooks.prepare(batches(1), loss_of(other))


def test_a_loaded_adapter_keeps_its_mask(tmp_path: Path) -> None:
    model = tiny()
    run(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    hooks = attach(again, adamw(again), total_steps=4)
    assert hooks.prepared
    hooks.prepare([None], lambda batch: pytest.fail("data were looked at"))
    layer = again.get_base_model().bert.encoder.layer[1].output.dense
    mine = model.get_base_model().bert.encoder.layer[1].output.dense
    assert torch.equal(layer.block_scores, mine.block_scores)


@pytest.mark.parametrize("init", ["constant", "random"])
def test_inits_without_data(init: str) -> None:
    model = tiny(mask_init=init)
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=3, seed=1)
    layer = model.get_base_model().bert.encoder.layer[0].output.dense
    if init == "constant":
        m = layer.factors().mask()
        torch.testing.assert_close(m, torch.full_like(m, float(torch.sigmoid(torch.tensor(0.5)))))
    else:
        assert float(layer.block_scores.std()) > 0.1
    model(**batches(1)[0]).loss.backward()
    optimizer.step()


def test_data_that_cannot_be_collected_from() -> None:
    model = tiny()
    hooks = attach(model, adamw(model), total_steps=4)
    with pytest.raises(ValueError, match="no batch"):
        hooks.prepare([], loss_of(model))
    with pytest.raises(ValueError, match="not finite"):
        hooks.prepare(batches(1), lambda batch: model(**batch).loss * torch.nan)
    hooks.prepare(batches(1), loss_of(model))


def test_how_many_steps_are_collected() -> None:
    for total, asked, wanted in (
        (10, None, 1), (1000, None, 50), (100_000, None, 300), (1000, 7, 7), (1000, 0.25, 250)
    ):  # fmt: skip
        model = tiny(collection_steps=asked)
        hooks = attach(model, adamw(model), total_steps=total)
        assert hooks.parts[0].collection_steps() == wanted


def test_to_the_letter() -> None:
    """`reference_compat`: 50 more batches, logits without τ₀, the head moves meanwhile, W never."""
    from peft_custom.tuners.bim_lora.masks import mask_range

    model = tiny(reference_compat=True, num_train_epochs=12, collect_update="adapter+head")
    weights, start = frozen_bytes(model), trained(model)
    seen = []
    hooks = attach(model, adamw(model), total_steps=STEPS, seed=7)
    loss = loss_of(model)
    hooks.prepare(batches(4), lambda batch: seen.append(1) or loss(batch))
    assert len(seen) == 3 + 50
    now = trained(model)
    assert frozen_bytes(model) == weights
    assert not any(torch.equal(now[n], start[n]) for n in now if "classifier" in n or "lora_B" in n)
    layer = model.get_base_model().bert.encoder.layer[0].attention.self.value
    P = torch.sigmoid(layer.block_scores)
    (low, _), (_, high) = mask_range("value", 0.0), mask_range("value", 1.0)
    assert low - 1e-6 <= float(P.min()) and float(P.max()) <= high + 1e-6
    assert layer.mask_temperature == pytest.approx(1.4)
    assert hooks.parts[0].mlp.norm is not None
    model(**batches(1)[0]).loss.backward()


def test_hugging_face_trainer_prepares_and_cools(tmp_path: Path) -> None:
    from peft_custom.integrations import TunerCallback

    rows = [{k: v[i] for k, v in b.items()} for b in batches(6) for i in range(4)]
    model = tiny()
    weights = frozen_bytes(model)
    optimizer = adamw(model)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), num_train_epochs=2, per_device_train_batch_size=4, use_cpu=True,
        report_to=[], disable_tqdm=True, save_strategy="steps", save_steps=5, seed=7,
    )  # fmt: skip

    def trainer(model, optimizer):
        return transformers.Trainer(
            model=model, args=arguments, train_dataset=rows, callbacks=[TunerCallback()],
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)),
        )  # fmt: skip

    trainer(model, optimizer).train()
    layer = model.get_base_model().bert.encoder.layer[0].output.dense
    assert (
        layer.mask_temperature == pytest.approx(0.45)
        and float(layer.lora_B.detach().abs().max()) > 0
    )
    assert frozen_bytes(model) == weights
    again = tiny()
    trainer(again, adamw(again)).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    wanted, found = trained(model), trained(again)
    assert all(torch.equal(wanted[n], found[n]) for n in wanted)


WORKER = """
import sys, torch
sys.path.insert(0, {root!r})
import torch.distributed as dist
from peft_custom import BimLoraConfig, attach, get_peft_model
rank, world, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
if world > 1:
    meet = f"file://{{folder}}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=world)
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Tanh(), torch.nn.Linear(7, 4))
model = get_peft_model(net, BimLoraConfig(r=2, block_size=3, collection_steps=4))
inner = torch.nn.parallel.DistributedDataParallel(model) if world > 1 else model
data = [torch.randn(4, 6)[rank::world] for _ in range(3)]
optimizer = torch.optim.AdamW(model.parameter_groups(1e-2, 0.0))
hooks = attach(model, optimizer, total_steps=12, seed=1)
loss = lambda x: inner(x).square().mean()
hooks.prepare(data, loss)
part = hooks.parts[0]
found = {{"F": part.features.values, "Z": model.base_model.model[0].block_scores.detach().clone()}}
for x in data:
    loss(x).backward()
    optimizer.step()
    optimizer.zero_grad()
found["end"] = model.base_model.model[2].block_scores.detach()
torch.save(found, f"{{folder}}/{{world}}.{{rank}}")
"""


def test_two_processes_collect_what_one_does(tmp_path: Path) -> None:
    """Features, first masks, and the masks after three more steps under DDP."""
    script = tmp_path / "worker.py"
    script.write_text(WORKER.format(root=str(ROOT)))
    jobs = [
        subprocess.Popen([sys.executable, str(script), str(rank), str(world), str(tmp_path)])
        for rank, world in ((0, 1), (0, 2), (1, 2))
    ]
    assert [job.wait(120) for job in jobs] == [0, 0, 0]
    one, first, second = (
        torch.load(tmp_path / name, weights_only=True) for name in ("1.0", "2.0", "2.1")
    )
    for name in one:
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], one[name], rtol=1e-3, atol=1e-5)


def test_plain_linear_models_and_wrong_data_loaders() -> None:
    """Any module with a loss will do."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(6, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2))
    model = get_peft_model(net, BimLoraConfig(r=2, block_size=3, target_modules=["0", "2"]))
    hooks = attach(model, adamw(model), total_steps=5)
    data = [torch.randn(4, 6) for _ in range(3)]
    hooks.prepare(data, lambda x: model(x).square().mean())
    assert hooks.finished


@pytest.mark.parametrize("accumulation", [2, 4])
def test_hugging_face_accumulation_makes_the_same_features(
    tmp_path: Path, accumulation: int
) -> None:
    """A step of several small batches is the step of one large batch, the last short one too."""
    from peft_custom.integrations import TunerCallback

    rows = [{k: v[i] for k, v in b.items()} for b in batches(3, rows=6) for i in range(6)]
    found = []
    for pieces in (1, accumulation):
        model = tiny(collection_steps=3)
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / str(pieces)), max_steps=1, use_cpu=True, report_to=[],
            per_device_train_batch_size=8 // pieces, gradient_accumulation_steps=pieces,
            disable_tqdm=True, save_strategy="no", seed=7,
        )  # fmt: skip
        transformers.Trainer(
            model=model, args=arguments, train_dataset=rows, callbacks=[TunerCallback()],
        ).train()  # fmt: skip
        found.append(model.base_model.features["default"].values)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-9)


def test_first_masks_are_exactly_what_the_scores_stand_for() -> None:
    """σ(Z/τ₀) = P at the table's first τ₀ = 1.4 and at one of one's own; not σ(Z) = P."""
    from peft_custom.tuners.bim_lora import masks

    for options in ({}, {"temperature_schedule": "constant", "mask_temperature": 0.3}):
        model = tiny(mask_init="features", **options)
        hooks = attach(model, adamw(model), total_steps=STEPS, seed=7)
        hooks.prepare(batches(4), loss_of(model.train()))
        part = hooks.parts[0]
        importance = masks.relative_importance(
            {p.name: float(part.features.values[p.rows, 0].mean()) for p in part.features.table}
        )
        for where in part.features.table:
            scores = where.view(part.scores)
            P = masks.initial_probabilities(where.name, scores, importance[where.name])
            factors = part.factors[where.name]
            torch.testing.assert_close(factors.mask(), P, rtol=1e-5, atol=1e-6)
            tau = options.get("mask_temperature", 1.4)
            assert float(factors.temperature) == pytest.approx(tau)


def test_a_mask_that_is_not_trained_comes_back_with_the_hooks_state() -> None:
    """A checkpoint of trainable parameters and buffers does not hold it."""
    options = {"mask_init": "random", "train_mask": False}
    first, second = tiny(**options), tiny(**options)
    state = attach(first, adamw(first), total_steps=STEPS, seed=1).state_dict()
    hooks = attach(second, adamw(second), total_steps=STEPS, seed=2)
    wanted, other = trained(first), trained(second)
    names = [n for n in wanted if n.endswith("block_scores")]
    assert names and not any(torch.equal(wanted[n], other[n]) for n in names)
    hooks.load_state_dict(state)
    found = trained(second)
    assert all(torch.equal(wanted[n], found[n]) for n in names)


def test_the_last_temperature_stays_past_the_schedules_end() -> None:
    model = tiny(
        mask_init="constant", temperature_schedule="exponential", temperature_decay_steps=1
    )
    optimizer = adamw(model)
    attach(model, optimizer, total_steps=3)
    layer = model.get_base_model().bert.encoder.layer[0].output.dense
    found = []
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="training goes on past")
        for batch in batches(6):
            found.append(layer.mask_temperature)
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert found == pytest.approx([1.0, 0.95, 0.95**2, *[0.95**2] * 3])
