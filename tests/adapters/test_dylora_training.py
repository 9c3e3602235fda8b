"""DyLoRA while it trains: sampled ranks, rows that truly stay, resuming, loops, processes."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import given, settings
from hypothesis import strategies as st
from support.peft_tiny import ROWS, bert, rows
from torch import Tensor, nn
from torch.utils.data import DataLoader

import loralib
import transformers_patched as patched
from ivon import IVON
from loralib.functional import ActiveRank
from peft_custom import (
    DyLoraConfig,
    PeftModel,
    attach,
    attached_hooks,
    configure_dylora,
    get_peft_model,
)
from peft_custom.hook_files import load_hooks_state, save_hooks_state
from peft_custom.hooks import schedule_finished
from peft_custom.integrations import TunerCallback
from peft_custom.tuners.dylora.sampling import RankSampling

R, STEPS, SEED = 5, 9, 7
OPTIMIZERS = {
    "AdamW": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1),
    "AdamW for-loop": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1, foreach=False),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, 0.05, weight_decay=0.1, foreach=True),
    "AdamW fused amsgrad": lambda p: torch.optim.AdamW(p, 0.05, fused=True, amsgrad=True),
    "SGD momentum": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, weight_decay=0.1),
    "Adagrad": lambda p: torch.optim.Adagrad(p, 0.05, weight_decay=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p, 0.05, weight_decay=0.1),
}


def net(**options: Any) -> nn.Module:
    """A model of someone's own with all three of loralib's layers, of R = 5."""
    torch.manual_seed(0)
    made = nn.Sequential(
        loralib.DyLoRAEmbedding(13, 8, r=R, lora_alpha=3),
        loralib.DyLoRAMergedLinear(8, 12, r=R, lora_alpha=3, enable_lora=[True, False, True]),
        nn.GELU(),
        loralib.DyLoRALinear(12, 4, r=R, lora_alpha=3),
    )
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.3)
    loralib.mark_only_lora_as_trainable(made)
    configure_dylora(made, **options)
    return made


def injected(**options: Any) -> PeftModel:
    """A tiny Hugging Face BERT with nested adapters."""
    config = {"r": R, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    model = get_peft_model(bert(), DyLoraConfig(**{**config, **options}))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    return model.train()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def loss_of(model: nn.Module, step: int) -> Tensor:
    made = torch.Generator().manual_seed(step)
    if isinstance(model, PeftModel):
        ids = torch.randint(0, 40, (4, 6), generator=made)
        return model(input_ids=ids, labels=torch.randint(0, 3, (4,), generator=made)).loss
    return model(torch.randint(0, 13, (6, 3), generator=made)).square().sum()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def by_component(t: Tensor, name: str) -> Tensor:
    """(R, everything else) of a factor, whichever of its dimensions is the rank."""
    if "lora_A" in name or "lora_embedding_A" in name:
        return t.detach().unflatten(0, (-1, R)).transpose(0, 1).reshape(R, -1).clone()
    return t.detach().T.reshape(R, -1).clone()


def snapshot(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Factors and their states of their own shape, component by component."""
    found = {}
    for name, p in model.named_parameters():
        if "lora_" in name:
            found[name] = by_component(p, name)
            for key, state in optimizer.state.get(p, {}).items():
                if isinstance(state, Tensor) and state.shape == p.shape:
                    found[f"{name} {key}"] = by_component(state, name)
    return found


# --- sampling -----------------------------------------------------------------------------------
@settings(max_examples=60, deadline=None)
@given(
    largest=st.integers(1, 64), data=st.data(), seed=st.integers(-5, 2**40),
    step=st.integers(0, 10**6), p=st.none() | st.floats(0.01, 0.99),
)  # fmt: skip
def test_draws_are_a_function_of_seed_and_step(largest, data, seed, step, p) -> None:
    r_min = data.draw(st.integers(1, largest))
    sampling = RankSampling(
        largest, r_min, dylora_dist="uniform" if p is None else f"geometric({p!r})"
    )
    b = sampling.rank(seed, step)
    assert r_min <= b <= largest
    assert b == RankSampling(largest, r_min, dylora_dist=sampling.dylora_dist).rank(seed, step)
    chances = sampling.probabilities
    assert list(chances) == list(range(r_min, largest + 1))
    assert sum(chances.values()) == pytest.approx(1.0)
    for low, high in zip(range(r_min, largest), range(r_min + 1, largest + 1), strict=True):
        if chances[low] > 1e-12:
            ratio = 1.0 if p is None else 1.0 - p
            assert chances[high] / chances[low] == pytest.approx(ratio, abs=1e-9)


@pytest.mark.parametrize("dist", ["uniform", "geometric(0.15)", "geometric(0.7)"])
@pytest.mark.parametrize("r_min", [1, 3])
def test_chi_square_of_ten_thousand_draws(dist: str, r_min: int) -> None:
    sampling = RankSampling(8, r_min, dylora_dist=dist)
    counts = Counter(sampling.rank(SEED, step) for step in range(10_000))
    chi = sum((counts[b] - 1e4 * q) ** 2 / (1e4 * q) for b, q in sampling.probabilities.items())
    assert chi < 29.9  # of 7 degrees of freedom: exceeded once in 10⁴ (fewer degrees: rarer)


def test_geometric_is_renormalised_over_the_support() -> None:
    chances = RankSampling(4, 2, dylora_dist="geometric(0.5)").probabilities
    assert chances == pytest.approx({2: 4 / 7, 3: 2 / 7, 4: 1 / 7})


# --- what a step trains ---------------------------------------------------------------------------
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("mode", ["normal", "frozen"])
@pytest.mark.parametrize("make", [net, injected], ids=["loralib", "peft_custom"])
def test_rows_that_a_step_leaves_out_stay(make: Any, mode: str, kind: str) -> None:
    model = make(dylora_mode=mode)
    optimizer = OPTIMIZERS[kind](trainable(model))
    attach(model, optimizer, STEPS, seed=SEED)
    seen = set()
    for step in range(STEPS):
        b = loralib.get_rank(model)
        seen.add(b)
        before = snapshot(model, optimizer)
        train(model, optimizer, range(step, step + 1))
        after = snapshot(model, optimizer)
        idle = [j for j in range(1, R + 1) if j > b or (mode == "frozen" and j < b)]
        for name, value in after.items():
            old = before.get(name, torch.zeros_like(value))  # states start from 0
            for j in range(1, R + 1):
                if j in idle:
                    assert torch.equal(value[j - 1], old[j - 1]), (name, j, b)
                elif " " not in name:
                    assert not torch.equal(value[j - 1], old[j - 1]), (name, j, b)
    assert len(seen) > 2


def test_sampled_weights_leave_them_too() -> None:
    model = injected(dylora_mode="frozen")
    optimizer = IVON(trainable(model), lr=0.05, ess=100.0)
    attach(model, optimizer, STEPS, seed=SEED)
    for step in range(STEPS):
        b, before = loralib.get_rank(model), snapshot(model, optimizer)
        with optimizer.sampled_params(train=True):
            loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, value in snapshot(model, optimizer).items():
            moved = (value != before[name]).any(dim=1).tolist()
            assert moved == [j == b for j in range(1, R + 1)], name


@pytest.mark.parametrize("mode", ["normal", "frozen"])
@pytest.mark.parametrize("make", [net, injected], ids=["loralib", "peft_custom"])
def test_an_optimizer_that_moves_between_evaluations_leaves_them_too(make: Any, mode: str) -> None:
    """L-BFGS moves everything along directions of earlier ranks, several times in a step."""
    model = make(dylora_mode=mode)
    optimizer = torch.optim.LBFGS(trainable(model), lr=0.1, max_iter=4)
    attach(model, optimizer, STEPS, seed=SEED)
    held = 0
    for step in range(STEPS):

        def closure(step: int = step) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            return loss

        b, before = loralib.get_rank(model), snapshot(model, optimizer)
        optimizer.step(closure)
        for name, value in snapshot(model, optimizer).items():
            moved = (value != before[name]).any(dim=1).tolist()
            trained = [j <= b if mode == "normal" else j == b for j in range(1, R + 1)]
            assert not any(m and not t for m, t in zip(moved, trained, strict=True)), (step, name)
            held += trained.count(False)
    assert held > 0


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("make", [net, injected], ids=["loralib", "peft_custom"])
def test_a_copy_of_an_attached_model_is_not_driven(make: Any, how: str) -> None:
    """It trains at the rank that is set, as an unattached model does; the original goes on."""
    model = make(r_min=2)
    hooks = attach(model, torch.optim.SGD(trainable(model), 0.1), STEPS, seed=SEED)
    while loralib.get_rank(model) == R:
        hooks.after_step()
    sampled = loralib.get_rank(model)
    twin = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    assert loralib.get_rank(twin) == R and loralib.get_rank(model) == sampled
    loss_of(twin, 0).backward()
    factors = [p for n, p in twin.named_parameters() if "lora_B" in n]
    assert factors and all(p.grad[:, R - 1].any() for p in factors)
    loralib.set_rank(twin, 1)
    assert loralib.get_rank(twin) == 1 and loralib.get_rank(model) == sampled


def test_a_row_that_no_step_trains_never_moves() -> None:
    model = injected(dylora_mode="frozen", r_min=3)
    optimizer = torch.optim.AdamW(trainable(model), 0.05, weight_decay=0.1, fused=True)
    start = snapshot(model, optimizer)
    attach(model, optimizer, 30, seed=SEED)
    train(model, optimizer, range(30))
    for name, old in start.items():
        new = snapshot(model, optimizer)[name]
        assert torch.equal(new[:2], old[:2]) and (new[2:] != old[2:]).any(dim=1).all()


@pytest.mark.parametrize("make", [net, injected], ids=["loralib", "peft_custom"])
def test_dense_reproduces_the_reference_drift(make: Any) -> None:
    model = make(dylora_mode="frozen", dylora_dense=True)
    optimizer = torch.optim.AdamW(trainable(model), 0.01, weight_decay=0.0)
    attach(model, optimizer, 99, seed=SEED)
    first = loralib.get_rank(model)
    train(model, optimizer, range(1))
    while loralib.get_rank(model) == first:
        train(model, optimizer, range(1))
    before = snapshot(model, optimizer)
    train(model, optimizer, range(1))
    for name, new in snapshot(model, optimizer).items():
        moved = (new - before[name])[first - 1].abs().max()
        assert " " in name or moved > 1e-4  # no gradient there, but momentum


def test_the_published_drift_figure() -> None:
    """Spec: after a step on row 4 a step on row 1 moved row 4 by .0067 (lr .01, no decay)."""
    for dense, expected in ((True, 0.0067), (False, 0.0)):
        torch.manual_seed(0)
        layer = loralib.DyLoRALinear(3, 4, r=4)
        nn.init.normal_(layer.lora_B)
        configure_dylora(layer, dylora_mode="frozen", dylora_dense=dense)
        optimizer = torch.optim.AdamW([layer.lora_A, layer.lora_B], 0.01, weight_decay=0.0)
        hooks = attach(layer, optimizer, 9)
        for row in (4, 1):
            layer.nested.sampled = ActiveRank(row - 1, row)
            before = layer.lora_A.detach().clone()
            layer(torch.ones(3)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        moved = float((layer.lora_A.detach() - before)[3].abs().max())
        assert moved == pytest.approx(expected, abs=1e-4)
        hooks.remove()


def test_at_the_largest_rank_training_is_loras() -> None:
    from peft_custom import LoraConfig

    options = {"r": R, "target_modules": ["query", "value"], "task_type": "SEQ_CLS"}
    ends = []
    for config in (LoraConfig(**options), DyLoraConfig(**options, r_min=R)):
        torch.manual_seed(3)
        model = get_peft_model(bert(), config).train()
        optimizer = torch.optim.AdamW(trainable(model), 0.01, weight_decay=0.1)
        attach(model, optimizer, STEPS)
        train(model, optimizer, range(STEPS))
        ends.append([p.detach() for p in trainable(model)])
    for a, b in zip(*ends, strict=True):
        assert torch.equal(a, b)


# --- one rank per step ----------------------------------------------------------------------------
def test_one_rank_per_step_under_accumulation_and_evaluation() -> None:
    model = injected()
    sampling = model.peft_config["default"].sampling
    optimizer = torch.optim.AdamW(trainable(model), 0.01)
    hooks = attach(model, optimizer, STEPS, seed=SEED)
    for step in range(STEPS):
        for _ in range(3):  # micro-batches
            assert model.get_rank() == sampling.rank(SEED, step)
            loss_of(model, step).backward()
        model.eval()
        assert model.get_rank() == R
        model.set_rank(2)  # even without setting it back
        loss_of(model, 0)
        model.train()
        assert model.get_rank() == sampling.rank(SEED, step)
        model.set_rank(R)
        optimizer.step()
        optimizer.zero_grad()
        assert hooks.log() == {"rank": sampling.rank(SEED, step)}
    hooks.remove()
    assert model.get_rank() == R and schedule_finished(model.base_model)


def test_evaluating_changes_nothing_of_training() -> None:
    ends = []
    for look in (False, True):
        model = net(dylora_mode="frozen")
        optimizer = torch.optim.AdamW(trainable(model), 0.05)
        attach(model, optimizer, STEPS, seed=SEED)
        for step in range(STEPS):
            loss_of(model, step).backward()
            if look:
                model.eval()
                ids = torch.arange(6)
                with loralib.batched_ranks(model, range(1, R + 1)), torch.inference_mode():
                    model(ids.repeat(R))
                with loralib.at_rank(model, 1), torch.no_grad():
                    model(ids)
                model.train()
            optimizer.step()
            optimizer.zero_grad()
        ends.append([p.detach() for p in trainable(model)])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


# --- resuming, loops ------------------------------------------------------------------------------
@pytest.mark.parametrize("make", [net, injected], ids=["loralib", "peft_custom"])
def test_killed_and_resumed_is_uninterrupted(make: Any, tmp_path: Path) -> None:
    def start() -> tuple[nn.Module, torch.optim.Optimizer, Any]:
        model = make(dylora_mode="frozen", dylora_dist="geometric(0.3)")
        optimizer = torch.optim.AdamW(trainable(model), 0.05, weight_decay=0.1)
        return model, optimizer, attach(model, optimizer, STEPS, seed=SEED)

    model, optimizer, hooks = start()
    train(model, optimizer, range(4))
    save_hooks_state(tmp_path, hooks.state_dict())
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, range(4, STEPS))
    again, optimizer, hooks = start()
    again.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    hooks.load_state_dict(load_hooks_state(tmp_path))
    train(again, optimizer, range(4, STEPS))
    for (name, a), b in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name


def plain_loop(folder: Path) -> PeftModel:
    model = injected(dylora_mode="frozen")
    optimizer = torch.optim.AdamW(trainable(model), 0.05, weight_decay=0.0)
    attach(model, optimizer, 6, seed=SEED)
    for batch in DataLoader(small_ids(), batch_size=ROWS):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def accelerated(folder: Path) -> PeftModel:
    accelerator = Accelerator(cpu=True)
    model = injected(dylora_mode="frozen")
    optimizer = torch.optim.AdamW(trainable(model), 0.05, weight_decay=0.0)
    model, optimizer, loader = accelerator.prepare(
        model, optimizer, DataLoader(small_ids(), batch_size=ROWS)
    )
    attach(model, optimizer, 6, seed=SEED)
    for batch in loader:
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    return accelerator.unwrap_model(model)


def hugging_face(folder: Path) -> PeftModel:
    import transformers

    model = injected(dylora_mode="frozen")
    args = transformers.TrainingArguments(
        output_dir=str(folder), num_train_epochs=1, per_device_train_batch_size=ROWS,
        learning_rate=0.05, lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=0.0,
        save_strategy="no", report_to=[], use_cpu=True, disable_tqdm=True, logging_steps=1,
    )  # fmt: skip

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *unused: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    made = InOrder(
        model=model, args=args, train_dataset=small_ids(), callbacks=[TunerCallback(seed=SEED)]
    )
    made.train()
    logged = [line["tuner/rank"] for line in made.state.log_history if "tuner/rank" in line]
    sampling = model.peft_config["default"].sampling
    assert logged == [sampling.rank(SEED, step) for step in range(6)]
    assert attached_hooks(model) is None
    return model


def small_ids() -> list[dict[str, Tensor]]:
    return [{**row, "input_ids": row["input_ids"] % 40} for row in rows()][: 6 * ROWS]


@pytest.mark.parametrize("loop", [accelerated, hugging_face])
def test_every_loop_gives_the_same(loop: Any, tmp_path: Path) -> None:
    ends, found = trainable(plain_loop(tmp_path)), trainable(loop(tmp_path))
    for a, b in zip(ends, found, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)


# --- loralib's layers and attach ------------------------------------------------------------------
def test_attach_drives_our_models_layers() -> None:
    torch.manual_seed(0)
    config = patched.RobertaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=16, num_labels=3,
        apply_lora=True, lora_type="dylora", lora_r=R,
    )  # fmt: skip
    model = patched.RobertaForSequenceClassification(config)
    model.freeze_base()
    factors = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert len(factors) == 8 and all("query" in n or "value" in n for n in factors)
    configure_dylora(model, dylora_mode="frozen", r_min=2)
    optimizer = torch.optim.AdamW(trainable(model), 0.01)
    hooks = attach(model, optimizer, STEPS, seed=SEED)
    assert attached_hooks(model) is hooks and hooks.adapts and hooks.finished
    ranks = []
    for _ in range(STEPS):
        ranks.append(loralib.get_rank(model))
        model(torch.randint(2, 40, (4, 6)), labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    sampling = RankSampling(R, 2, "frozen")
    assert ranks == [sampling.rank(SEED, step) for step in range(STEPS)]
    again = attach(model, optimizer, STEPS, seed=SEED)  # replaces
    assert attached_hooks(model) is again and hooks is not again


def test_attach_needs_the_factors_in_the_optimizer() -> None:
    model = net()
    with pytest.raises(ValueError, match="does not have these adapter parameters: 3.lora_A"):
        attach(model, torch.optim.SGD(trainable(model[:3]), 0.1), STEPS)
    with pytest.raises(ValueError, match="how many optimiser steps"):
        attach(model, torch.optim.SGD(trainable(model), 0.1))
    with pytest.raises(ValueError, match="no loralib DyLoRA layers"):
        configure_dylora(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="r_min=9"):
        configure_dylora(model, r_min=9)
    model[3].nested.sampling_options = {"dylora_mode": "frozen"}
    with pytest.raises(ValueError, match="different r or options"):
        attach(model, torch.optim.SGD(trainable(model), 0.1), STEPS)


def test_a_copied_optimizer_is_refused() -> None:
    model = net()
    optimizer = torch.optim.SGD(trainable(model), 0.1)
    attach(model, optimizer, STEPS)
    other = torch.optim.SGD(trainable(model), 0.1)
    loss_of(model, 0).backward()
    with pytest.raises(RuntimeError, match="attached to another optimiser"):
        other.step()
    assert copy.deepcopy(model)[3].nested.sampling_options == {}


def test_full_rank_steps_hold_nothing() -> None:
    model = injected(r_min=R)
    hooks = attach(model, torch.optim.SGD(trainable(model), 0.1), STEPS)
    hooks.parts[0].enter_step()
    assert not hooks.parts[0].frozen_rows._saved


def test_loss_stays_finite_and_every_rank_learns() -> None:
    """A few dozen steps on one batch: the loss falls at every rank, not only at the largest."""
    for mode in ("normal", "frozen"):
        model = injected(dylora_mode=mode)
        optimizer = torch.optim.AdamW(trainable(model), 0.02)
        start = {}
        for b in range(1, R + 1):
            with model.eval().at_rank(b), torch.no_grad():
                start[b] = float(loss_of(model, 0))
        model.train()
        attach(model, optimizer, 60, seed=SEED)
        for _ in range(60):
            train(model, optimizer, range(1))
        for b in range(1, R + 1):
            with model.eval().at_rank(b), torch.no_grad():
                end = float(loss_of(model, 0))
            assert math.isfinite(end) and end < 0.7 * start[b]


def test_no_warning_on_an_ordinary_run() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = net()
        optimizer = torch.optim.AdamW(trainable(model), 0.05)
        attach(model, optimizer, STEPS)
        train(model, optimizer, range(STEPS))
