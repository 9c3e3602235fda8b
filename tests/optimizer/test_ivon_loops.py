"""IVON in loops that know nothing of sampling: by itself, Trainer, accelerate, schedules, hooks."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, default_collate

from ivon import IVON
from peft_custom import TrainingHooks, attach

transformers = pytest.importorskip("transformers")

STEPS, ROWS = 6, 4
OPTIONS: dict[str, Any] = {"lr": 0.2, "ess": 40.0, "beta2": 0.9}


class Net(nn.Module):
    """A regression net that computes its own loss, as Hugging Face's models do."""

    def __init__(self, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.body = nn.Sequential(nn.Linear(5, 7), nn.Tanh())
        self.head = nn.Linear(7, 3)
        self.recompute = recompute

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        hidden = checkpoint(self.body, x, use_reentrant=False) if self.recompute else self.body(x)
        logits = self.head(hidden)
        if labels is None:
            return {"logits": logits}
        return {"loss": (logits - labels).square().mean(), "logits": logits}


def rows() -> list[dict[str, Tensor]]:
    made = torch.Generator().manual_seed(3)
    xs = torch.randn(ROWS * STEPS, 5, generator=made)
    return [{"x": x, "labels": x[:3]} for x in xs]


def batches(size: int = ROWS) -> list[dict[str, Tensor]]:
    data = rows()  # no DataLoader: its iterator draws from the global generator
    return [default_collate(data[i : i + size]) for i in range(0, len(data), size)]


def weights(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()]).clone()


def ends(model: nn.Module, optimizer: IVON) -> Tensor:
    hess = [optimizer.state[p]["hess"].flatten() for p in model.parameters()]
    return torch.cat([weights(model), *hess])


def explicit(
    accumulate: int = 1, clip: float = 0.0, rate: Any = None, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """The loop with contexts: its end, and the sampled weights of every step."""
    model = Net()
    optimizer = IVON(model.parameters(), **{**OPTIONS, **options})
    torch.manual_seed(0)
    drawn = []
    parts = batches(ROWS // accumulate)
    for step in range(STEPS):
        if rate is not None:
            optimizer.param_groups[0]["lr"] = rate(step)
        with optimizer.sampled_params(train=True):
            drawn.append(weights(model))
            for batch in parts[step * accumulate : (step + 1) * accumulate]:
                (model(**batch)["loss"] / accumulate).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    return ends(model, optimizer), drawn


# --- auto_sample ----------------------------------------------------------------------------------
@pytest.mark.parametrize("zero", ["after step", "before forward", "before backward", "by model"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("approx", ["price", "gradsq"])
@pytest.mark.parametrize("recompute", [False, True])
def test_plain_loop_equals_contexts(
    zero: str, accumulate: int, approx: str, recompute: bool
) -> None:
    expected, drawn = explicit(accumulate, clip=0.5, hess_approx=approx)
    model = Net(recompute)
    optimizer = IVON(model.parameters(), hess_approx=approx, **OPTIONS)
    handle = optimizer.auto_sample(model)
    torch.manual_seed(0)
    parts = batches(ROWS // accumulate)
    for step in range(STEPS):
        mean = weights(model)
        if zero == "before forward":
            optimizer.zero_grad()
        for i, batch in enumerate(parts[step * accumulate : (step + 1) * accumulate]):
            loss = model(**batch)["loss"] / accumulate
            assert torch.equal(weights(model), drawn[step])
            if zero == "before backward" and i == 0:
                optimizer.zero_grad()
            loss.backward()
            assert torch.equal(weights(model), mean)
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        if zero in ("after step", "by model"):
            (optimizer if zero == "after step" else model).zero_grad()
    torch.testing.assert_close(ends(model, optimizer), expected, rtol=0, atol=0)
    handle.remove()
    mean = weights(model)
    model(**batches()[0])["loss"].backward()
    assert torch.equal(weights(model), mean)


def test_evaluation_and_saving_within_a_step_are_at_the_mean() -> None:
    expected, drawn = explicit(2)
    model = Net()
    optimizer = IVON(model.parameters(), **OPTIONS)
    optimizer.auto_sample(model)
    torch.manual_seed(0)
    seen = []
    model.body.register_forward_hook(lambda *unused: seen.append(weights(model)))
    parts = batches(ROWS // 2)
    for step in range(STEPS):
        mean = weights(model)
        for batch in parts[2 * step : 2 * step + 2]:
            seen.clear()
            (model(**batch)["loss"] / 2).backward()
            assert torch.equal(seen[-1], drawn[step])
            model.eval()
            model(**batch)
            model.train()
            assert torch.equal(seen[-1], mean)
            with torch.no_grad():
                model(**batch)
            assert torch.equal(seen[-1], mean)
            state = torch.get_rng_state()
            with optimizer.sampled_params():
                model(**batch)
            torch.set_rng_state(state)
            assert not torch.equal(seen[-1], mean) and torch.equal(weights(model), mean)
        model(**batch)  # a forward pass that nobody backpropagates
        assert not torch.equal(weights(model), mean)
        flat = torch.cat([t.flatten() for t in model.state_dict().values()])
        assert torch.equal(flat, mean)
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(ends(model, optimizer), expected, rtol=0, atol=0)


def test_two_forwards_one_backward_and_one_each() -> None:
    model = Net()
    optimizer = IVON(model.parameters(), **OPTIONS)
    optimizer.auto_sample(model)
    mean = weights(model)
    one, two = (model(**batch)["logits"] for batch in batches()[:2])
    (one - two).square().mean().backward()
    assert torch.equal(weights(model), mean)
    losses = [model(**batch)["loss"] for batch in batches()[:2]]
    losses[0].backward()
    assert not torch.equal(weights(model), mean)  # the second pass still needs them
    losses[1].backward()
    assert torch.equal(weights(model), mean)
    optimizer.step()


def test_a_step_that_is_dropped_leaves_no_trace() -> None:
    expected, _ = explicit()
    for how in ("optimizer", "model"):
        model = Net()
        optimizer = IVON(model.parameters(), **OPTIONS)
        optimizer.auto_sample(model)
        model(**batches()[3])["loss"].backward()
        (optimizer if how == "optimizer" else model).zero_grad()
        for step, batch in enumerate(batches()):
            if step == 0:
                torch.manual_seed(0)
            model(**batch)["loss"].backward()
            with pytest.warns(UserWarning) if step == 0 else nullcontext():
                optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(ends(model, optimizer), expected, rtol=0, atol=0)


def test_auto_sample_refuses() -> None:
    model = Net()
    for options in ({"mc_samples": 2}, {"sync": True}):
        with pytest.raises(ValueError, match="one sample per step"):
            IVON(model.parameters(), **OPTIONS, **options).auto_sample(model)
    optimizer = IVON(model.parameters(), **OPTIONS)
    optimizer.auto_sample(model)
    with pytest.raises(ValueError, match="already samples"):
        optimizer.auto_sample(model)
    other = copy.deepcopy(model)
    other.eval()(**batches()[0])  # a copy may be evaluated
    with pytest.raises(RuntimeError, match="a copy of the model"):
        other.train()(**batches()[0])
    model.eval()(**batches()[0])["loss"].backward()
    with pytest.raises(RuntimeError, match="train in training mode"):
        optimizer.step()
    mean = weights(model)
    model.train()
    model.forward = lambda x: float(nn.functional.linear(x, model.head.weight.new_ones(1, 5)).sum())
    with pytest.raises(TypeError, match="a float; open optimizer.sampled_params"):
        model(batches()[0]["x"])
    assert torch.equal(weights(model), mean)


# --- Hugging Face's Trainer, accelerate -----------------------------------------------------------
class InOrder(transformers.Trainer):
    def get_train_dataloader(self) -> DataLoader:
        size = self.args.per_device_train_batch_size
        return self.accelerator.prepare(DataLoader(self.train_dataset, batch_size=size))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_trainer(accumulate: int, tmp_path: Path) -> None:
    def rate(step: int) -> float:
        return 0.2 / (1 + step)

    def noise() -> torch.Generator:  # the Trainer's loader draws from the global one
        return torch.Generator().manual_seed(4)

    expected, _ = explicit(accumulate, clip=0.3, rate=rate, generator=noise())

    def run(resume: bool) -> Tensor:
        model = Net()
        optimizer = IVON(model.parameters(), generator=noise(), **OPTIONS)
        optimizer.auto_sample(model)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate(step) / 0.2)
        made = InOrder(
            model=model,
            args=transformers.TrainingArguments(
                output_dir=str(tmp_path),
                num_train_epochs=1,
                per_device_train_batch_size=ROWS // accumulate,
                gradient_accumulation_steps=accumulate,
                max_grad_norm=0.3,
                report_to=[],
                use_cpu=True,
                disable_tqdm=True,
                save_steps=2,
                eval_strategy="steps",
                eval_steps=2,
                logging_steps=1,
            ),
            train_dataset=rows(),
            eval_dataset=rows()[:8],
            optimizers=(optimizer, schedule),
        )
        made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4") if resume else None)
        return ends(model, optimizer)

    for resume in (False, True):
        torch.testing.assert_close(run(resume), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("auto", [False, True])
def test_accelerate(auto: bool) -> None:
    expected, _ = explicit(2, clip=0.3)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = Net()
    inner = IVON(model.parameters(), **OPTIONS)
    model, optimizer = accelerator.prepare(model, inner)
    assert optimizer.optimizer is inner
    if auto:
        inner.auto_sample(accelerator.unwrap_model(model))
    torch.manual_seed(0)
    parts = batches(ROWS // 2)
    for step in range(STEPS):
        window = parts[2 * step : 2 * step + 2]
        if not auto:
            with optimizer.optimizer.sampled_params(train=True):
                for batch in window:
                    (model(**batch)["loss"] / 2).backward()
            accelerator.clip_grad_norm_(model.parameters(), 0.3)
            optimizer.step()
            optimizer.zero_grad()
            continue
        for batch in window:
            with accelerator.accumulate(model):
                accelerator.backward(model(**batch)["loss"])
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 0.3)
                optimizer.step()
                optimizer.zero_grad()
    torch.testing.assert_close(ends(model, inner), expected, rtol=1e-5, atol=1e-6)


# --- schedulers, hooks, scalers -------------------------------------------------------------------
def test_schedulers() -> None:
    model = Net()
    optimizer = IVON(model.parameters(), **OPTIONS)
    schedule = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, total_iters=2),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4),
        ],
        milestones=[2],
    )
    optimizer.auto_sample(model)
    rates = []
    for batch in batches():
        model(**batch)["loss"].backward()
        before = weights(model)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        rates.append((weights(model) - before).abs().max() / optimizer.param_groups[0]["lr"])
    assert optimizer.param_groups[0]["lr"] < 0.05 and all(r > 0 for r in rates)


@pytest.mark.parametrize("loop", ["contexts", "auto", "closure"])
def test_attached_hooks_see_final_gradients_once_per_step(loop: str) -> None:
    """A tuner's regulariser, added to p.grad in `before_step`, moves the weights as it should."""

    class Pull(TrainingHooks):
        seen: list[Tensor] = []

        def before_step(self) -> None:
            self.seen.append(weights(model))
            for p in model.parameters():
                p.grad.add_(0.1 * p.detach())

    class Pulled(Net):
        def training_hooks(self, model: Any, optimizer: Any, steps: Any, *, seed: int) -> Any:
            return Pull(steps, seed=seed)

    def pulled_by_hand(optimizer: IVON) -> None:
        for p in model.parameters():
            p.grad.add_(0.1 * p.detach())

    samples = 1 if loop == "auto" else 2
    results = []
    for hooked in (False, True):
        model = Pulled()
        optimizer = IVON(model.parameters(), mc_samples=samples, **OPTIONS)
        Pull.seen.clear()
        hooks = attach(model, optimizer, total_steps=STEPS) if hooked else None
        if loop == "auto":
            optimizer.auto_sample(model)
        torch.manual_seed(0)
        means = []
        for batch in batches():
            means.append(weights(model))
            if loop == "closure" and hooked:

                def closure(model: Any = model, batch: Any = batch, optimizer: Any = optimizer):
                    optimizer.zero_grad()
                    loss = model(**batch)["loss"]
                    loss.backward()
                    return loss

                optimizer.step(closure)
                continue
            for _ in range(samples):
                if loop == "auto":
                    model(**batch)["loss"].backward()
                    continue
                with optimizer.sampled_params(train=True):
                    model(**batch)["loss"].backward()
            if not hooked:
                pulled_by_hand(optimizer)
            optimizer.step()
            optimizer.zero_grad()
        results.append(ends(model, optimizer))
        if hooks is not None:
            assert hooks.t == STEPS and all(map(torch.equal, Pull.seen, means))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize("unscale_first", [False, True])
def test_grad_scalers_are_refused(unscale_first: bool) -> None:
    model = Net()
    optimizer = IVON(model.parameters(), **OPTIONS)
    scaler = GradScaler("cpu", init_scale=1024.0)
    mean = weights(model)
    with optimizer.sampled_params(train=True):
        scaler.scale(model(**batches()[0])["loss"]).backward()
    if unscale_first:
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="GradScaler .* bfloat16"):
        scaler.step(optimizer)
    assert torch.equal(weights(model), mean)
    off = GradScaler("cpu", enabled=False)
    optimizer.zero_grad()
    with optimizer.sampled_params(train=True):
        off.scale(model(**batches()[0])["loss"]).backward()
    with pytest.warns(UserWarning):
        off.step(optimizer)
    assert not torch.equal(weights(model), mean)


def test_bfloat16_autocast() -> None:
    model = Net()
    optimizer = IVON(model.parameters(), lr=0.1, ess=1000, beta2=0.999)
    optimizer.auto_sample(model)
    losses = []
    for _ in range(20):
        for batch in batches():
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(**batch)["loss"]
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
    assert sum(losses[-6:]) < 0.5 * sum(losses[:6])
    assert all(p.dtype == torch.float32 for p in model.parameters())
