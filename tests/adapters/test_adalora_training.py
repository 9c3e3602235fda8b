"""AdaLoRA while it trains: loops, resuming, processes, masks that hold, criteria of a posterior."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.peft_tiny import IDS, bert
from support.processes import in_two
from torch import Tensor, nn
from torch.utils.data import DataLoader

from peft_custom import (
    AdaLoraConfig,
    LoraConfig,
    PeftModel,
    VILoraConfig,
    attach,
    get_peft_model,
)
from peft_custom.hook_files import load_hooks_state, save_hooks_state
from peft_custom.tuners.adalora.orthogonality import penalty

transformers = pytest.importorskip("transformers")
T = 12
SHORT = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 4, "deltaT": 2}
TARGETS = ["query", "value", "intermediate.dense"]


def adapted(kind: type = AdaLoraConfig, **options: Any) -> PeftModel:
    torch.manual_seed(1)
    values = {"task_type": "SEQ_CLS", "target_modules": TARGETS, **SHORT, **options}
    return get_peft_model(bert(), kind(**values)).train()


def adamw(model: nn.Module, lr: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr)


def batches() -> list[dict[str, Tensor]]:
    made = torch.Generator().manual_seed(3)
    return [
        {
            "input_ids": torch.randint(0, 40, (4, 7), generator=made),
            "labels": torch.randint(0, 3, (4,), generator=made),
        }
        for _ in range(T)
    ]


def train(model: nn.Module, optimizer: Any, data: list[dict[str, Tensor]]) -> None:
    for batch in data:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def masks(model: PeftModel) -> list[Tensor]:
    return [layer.mask("default") for _, layer in model.base_model.svd_layers()]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def trained(**options: Any) -> tuple[PeftModel, Any]:
    """A model at the end of its schedule, and its hooks."""
    model = adapted(**options)
    optimizer = adamw(model)
    hooks = attach(model, optimizer, T)
    train(model, optimizer, batches())
    return model, hooks


# --- the same in every loop, killed or not --------------------------------------------------------
def test_accelerate_and_the_hugging_face_trainer_equal_the_plain_loop(tmp_path: Path) -> None:
    from accelerate import Accelerator

    from peft_custom.integrations import TunerCallback

    plain, hooks = trained()
    assert hooks.finished and [int(m.sum()) for m in masks(plain)] != [2] * 6
    assert sum(int(m.sum()) for m in masks(plain)) == 12

    model = adapted()
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(model, adamw(model))
    attach(model, optimizer, T)
    for batch in batches():
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    accelerated = state(accelerator.unwrap_model(model))

    class InOrder(transformers.Trainer):
        def get_train_dataloader(self) -> DataLoader:
            return DataLoader(self.train_dataset, batch_size=4)

    model = adapted()
    optimizer = adamw(model)
    rows = [{k: v[i] for k, v in batch.items()} for batch in batches() for i in range(4)]
    made = InOrder(
        model=model,
        args=transformers.TrainingArguments(
            str(tmp_path),
            num_train_epochs=1,
            max_grad_norm=0.0,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            logging_steps=1,
            save_strategy="no",
            per_device_train_batch_size=4,
        ),  # fmt: skip
        train_dataset=rows,
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1.0)),
        callbacks=[TunerCallback()],
    )
    made.train()
    logged = [line for line in made.state.log_history if "tuner/budget" in line]
    assert [line["tuner/budget"] for line in logged][-1] == 12 and len(logged) == T
    assert all(line["tuner/orthogonality"] > 0 for line in logged)
    for name, want in state(plain).items():
        assert torch.equal(accelerated[name], want), name
        assert torch.equal(model.state_dict()[name], want), name


@pytest.mark.parametrize("timing", ["before", "after"])
@pytest.mark.parametrize("killed", [1, 5, 8, 10])
def test_killed_and_resumed_is_the_same_to_the_last_bit(
    killed: int, timing: str, tmp_path: Path
) -> None:
    """Before, within and after the cuts; the state goes through a file."""
    whole, hooks = trained(sensitivity_timing=timing)
    model = adapted(sensitivity_timing=timing)
    optimizer = adamw(model)
    first = attach(model, optimizer, T)
    train(model, optimizer, batches()[:killed])
    save_hooks_state(tmp_path, first.state_dict())
    saved = state(model), copy.deepcopy(optimizer.state_dict())

    model = adapted(sensitivity_timing=timing)
    optimizer = adamw(model)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    second = attach(model, optimizer, T)
    second.load_state_dict(load_hooks_state(tmp_path))
    assert second.finished == (killed > 8) == first.finished
    train(model, optimizer, batches()[killed:])
    for name, want in state(whole).items():
        assert torch.equal(model.state_dict()[name], want), name
    assert second.parts[0].history() == hooks.parts[0].history() == model.base_model.history()
    for name in ("smoothed", "variation", "scores"):
        one, two = (getattr(h.parts[0].allocator, name) for h in (second, hooks))
        assert torch.equal(one, two)


def test_states_of_other_runs_are_refused() -> None:
    _, hooks = trained()
    saved = hooks.state_dict()
    for options, words in (
        ({"target_modules": ["query"]}, "one of 6 matrices and 24 components, this adapter has 2"),
        ({"criterion": "mean"}, "not those of criterion='mean'"),
        ({"tinit": 2}, "saved schedule has .*tinit"),
    ):
        model = adapted(**options)
        fresh = attach(model, adamw(model), T)
        with pytest.raises(ValueError, match=words):
            fresh.load_state_dict(saved)


def run(rank: int, world: int) -> dict[str, Any]:
    model: nn.Module = adapted(orth_reg_weight=0.3)
    inner = model
    if world > 1:
        model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD([p for p in inner.parameters() if p.requires_grad], 0.5)
    hooks = attach(model, optimizer, T)
    for batch in batches():
        model(**{name: value[rank::world] for name, value in batch.items()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    allocator = hooks.parts[0].allocator
    return {**state(inner), "smoothed": allocator.smoothed, "scores": allocator.scores}


def member(rank: int) -> dict[str, Any]:
    results = run(rank, 2)
    # scores from gradients that were not reduced are reduced before they decide
    model = adapted()
    hooks = attach(model, adamw(model), T).parts[0]
    hooks.allocator.smoothed.fill_(1.0 + rank)
    hooks.allocator.variation.fill_(1.0)
    return {**results, "reduced": hooks.allocator.rescored()}


def test_two_processes_agree_and_equal_one(tmp_path: Path) -> None:
    first, second = in_two(member, tmp_path)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    assert torch.allclose(first["reduced"], torch.tensor(4.5))  # three parts of (1 + 2) / 2
    alone = run(0, 1)
    for name, want in alone.items():
        torch.testing.assert_close(first[name], want, rtol=0, atol=1e-6, msg=name)
        if "mask" in name:
            assert torch.equal(first[name], want)


# --- ranks that are final -------------------------------------------------------------------------
class Noisy(torch.optim.AdamW):
    """Moves every parameter at random, as a variational optimiser's samples do."""

    def noise(self) -> None:
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(torch.randn_like(p), alpha=0.1)


def test_final_ranks_hold_against_momentum_and_noise() -> None:
    model = adapted()
    optimizer = Noisy([p for p in model.parameters() if p.requires_grad], 1e-2)
    hooks = attach(model, optimizer, T)
    train(model, optimizer, batches()[:8])
    assert not hooks.finished and all(bool(m.all()) for m in masks(model))
    train(model, optimizer, batches()[8:9])  # t = T − tfinal
    assert hooks.finished and sum(int(m.sum()) for m in masks(model)) == 12
    layers = [layer for _, layer in model.base_model.svd_layers()]
    dead = [m == 0 for m in masks(model)]
    for batch in batches()[9:]:
        model(**batch).loss.backward()
        assert all(not la.lora_E["default"].grad[d].any() for la, d in zip(layers, dead))  # noqa: B905
        optimizer.step()
        optimizer.zero_grad()
        assert all(not la.lora_E["default"][d].any() for la, d in zip(layers, dead))  # noqa: B905
    optimizer.noise()
    assert any(la.lora_E["default"][d].any() for la, d in zip(layers, dead))  # noqa: B905
    noisy = logits(model)
    with torch.no_grad():
        for layer, d in zip(layers, dead, strict=True):
            layer.lora_E["default"][d] = 0.0
    assert torch.equal(logits(model), noisy)  # the mask, not E, keeps them out


def test_saved_compacted_and_merged_are_the_same_model(tmp_path: Path) -> None:
    model, hooks = trained()
    want = logits(model)
    assert [row["step"] for row in model.base_model.history()] == [2, 4, 6, 8]
    last = model.base_model.history()[-1]
    assert last["budget"] == 12 == sum(last["ranks"].values())
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="compact was called, but the optimiser"):
        model.base_model.compact()
    hooks.remove()
    before = sum(p.numel() for p in model.parameters())
    model.base_model.compact()
    assert sum(p.numel() for p in model.parameters()) < before
    torch.testing.assert_close(logits(model), want, rtol=0, atol=1e-6)
    ranks = {name: layer.r["default"] for name, layer in model.base_model.svd_layers()}
    assert ranks == last["ranks"]
    assert model.parameter_groups(1e-3, 0.0)[0]["params"][0].requires_grad
    model.save_pretrained(tmp_path / "compacted")
    for folder in (tmp_path, tmp_path / "compacted"):
        loaded = PeftModel.from_pretrained(bert(), folder)
        torch.testing.assert_close(logits(loaded), want, rtol=0, atol=1e-6)
        torch.testing.assert_close(logits(loaded.merge_and_unload()), want, rtol=0, atol=1e-5)
    torch.testing.assert_close(logits(model.merge_and_unload()), want, rtol=0, atol=1e-5)


def test_a_loaded_adapter_goes_on_from_the_components_it_has(tmp_path: Path) -> None:
    model, hooks = trained()
    hooks.remove()
    model.save_pretrained(tmp_path / "first")
    model = PeftModel.from_pretrained(bert(), tmp_path / "first", is_trainable=True).train()
    config = model.peft_config["default"]
    assert (config.total_step, config.tinit, config.tfinal) == (T, 1, 4)
    config.target_r = 1
    optimizer = adamw(model)
    hooks = attach(model, optimizer, T)
    assert hooks.log() == {"budget": 12.0, "mean_rank": 2.0}
    train(model, optimizer, batches())
    assert hooks.log() == {"budget": 6.0, "mean_rank": 1.0}
    want = logits(model)
    model.save_pretrained(tmp_path / "second")
    pattern = model.base_model.rank_pattern()
    assert sum(map(sum, pattern.values())) == 6 and {len(k) for k in pattern.values()} == {4}
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "second")
    torch.testing.assert_close(logits(loaded), want, rtol=0, atol=1e-6)


def test_unfinished_adapters_are_saved_whole_and_say_so(tmp_path: Path) -> None:
    model = adapted()
    optimizer = adamw(model)
    attach(model, optimizer, T)
    train(model, optimizer, batches()[:5])
    want = logits(model)
    with pytest.warns(UserWarning, match="its schedule is at step 5 of 12"):
        model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(bert(), tmp_path, is_trainable=True)
    assert not loaded.peft_config["default"].finished
    assert all(layer.r["default"] == 4 for _, layer in loaded.base_model.svd_layers())
    torch.testing.assert_close(logits(loaded), want, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="not its final ranks: nothing to remove"):
        loaded.base_model.compact()


def test_equal_scores_and_equal_ranks_keep_exactly_the_budget() -> None:
    model = adapted(criterion="mean", orth_reg_weight=0.0)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.0)
    hooks = attach(model, optimizer, T)
    with torch.no_grad():
        for p in hooks.parts[0].triplets.parameters():
            p.fill_(0.5)
    train(model, optimizer, batches())
    assert torch.cat(masks(model)).tolist() == [1.0] * 12 + [0.0] * 12
    model, _ = trained(target_r=4, tfinal=0)
    assert all(bool(m.all()) for m in masks(model))


def test_a_schedule_to_the_last_step_is_finished_by_it() -> None:
    model, hooks = trained(tfinal=0, deltaT=5)
    assert hooks.finished and [r["step"] for r in model.base_model.history()] == [5, 10, 11]
    model, hooks = trained(tinit=0.25, tfinal=0.25, deltaT=0.1, total_step=99)
    assert hooks.state_dict()["parts"][0]["schedule"] == {"tinit": 3, "tfinal": 3, "deltaT": 1}


# --- the loss is the task's -----------------------------------------------------------------------
@pytest.mark.parametrize("task", ["SEQ_CLS", None])
def test_the_regulariser_is_there_whatever_the_wrapper(task: str | None) -> None:
    """Its gradient is added by the step, and the model's loss has none of it."""
    options = {"task_type": task, "modules_to_save": ["classifier"]}
    model = adapted(orth_reg_weight=0.4, **options)
    batch = batches()[0]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 1.0)
    hooks = attach(model, optimizer, T)
    triplets = hooks.parts[0].triplets
    reference = adapted(orth_reg_weight=0.4, **options)
    with pytest.warns(UserWarning, match="does not add the orthogonality regulariser"):
        with pytest.raises(ValueError, match="total_steps=None: this adapter adapts"):
            reference.base_model.update_and_allocate(0)
        reference.peft_config["default"].total_step = T
        loss = reference(**batch).loss
        loss.backward()
        reference.base_model.update_and_allocate(0)
    reference.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (reference(**batch).loss + reference.base_model.orthogonality_loss()).backward()
    ours = model(**batch).loss
    assert torch.equal(ours, loss)
    assert torch.equal(model.eval()(**batch).loss, model.train()(**batch).loss)
    ours.backward()
    start = [p.detach().clone() for p in triplets.parameters()]
    value = penalty(triplets, 0.4).item()
    optimizer.step()
    assert hooks.losses()["orthogonality"] == pytest.approx(value, rel=1e-6)
    gradients = {n: p.grad for n, p in reference.named_parameters()}
    named = {p: n for n, p in model.named_parameters()}
    for p, before in zip(triplets.parameters(), start, strict=True):
        torch.testing.assert_close(before - p, gradients[named[p]], rtol=1e-4, atol=1e-6)


def test_no_regulariser_at_weight_zero_and_none_in_inference() -> None:
    model = adapted(orth_reg_weight=0.0)
    optimizer = adamw(model)
    hooks = attach(model, optimizer, T)
    train(model, optimizer, batches())
    assert hooks.losses() == {}
    frozen = adapted(inference_mode=True)
    assert float(frozen.eval()(**batches()[0]).loss) > 0
    assert not attach(frozen, torch.optim.SGD(bert().parameters(), 0.1), T).adapts


# --- by hand --------------------------------------------------------------------------------------
def test_manual_calls_where_and_when_they_belong() -> None:
    model = adapted(total_step=T, orth_reg_weight=0.0)
    optimizer = adamw(model)
    model(**batches()[0]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="before optimizer.zero_grad"):
        model.base_model.update_and_allocate(0)
    for t, batch in enumerate(batches()):
        model(**batch).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(t)
        optimizer.zero_grad()
    assert sum(int(m.sum()) for m in masks(model)) == 12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert model.base_model.export("default")[0].rank_pattern is not None
    attach(model, optimizer, T)
    for call in (lambda: model.base_model.update_and_allocate(0), model.base_model.compact):
        with pytest.raises(RuntimeError, match="take the call out of the loop"):
            call()


# --- criteria of a posterior ----------------------------------------------------------------------
class Posterior(torch.optim.SGD):
    """σ = 1/(1 + index of the parameter); asked for by parameter, never by position."""

    def posterior_std(self, parameter: Tensor) -> Tensor:
        order = [p for group in self.param_groups for p in group["params"]]
        index = next(i for i, p in enumerate(order) if p is parameter)
        return torch.full_like(parameter, 1.0 / (1.0 + index))


@pytest.mark.parametrize("name", ["SNR_mean_abs", "SNR", "mean", "sigma", "E_mean_abs"])
@pytest.mark.parametrize("manual", [False, True])
def test_vilora_ranks_by_the_optimisers_posterior(name: str, manual: bool) -> None:
    from peft_custom import CRITERIA
    from peft_custom.tuners.adalora.criteria import inputs

    model = adapted(VILoraConfig, criterion=name, total_step=T, init_lora_weights="gaussian",
                    orth_reg_weight=0.0)  # fmt: skip
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = Posterior(list(reversed(parameters)), 0.05)
    if manual:
        model.base_model.set_optimizer(optimizer)
    else:
        attach(model, optimizer, T)
    for t, batch in enumerate(batches()[:9]):
        model(**batch).loss.backward()
        optimizer.step()
        if t == 8:  # what the last cut goes by, if it were asked now
            break
        if manual:
            model.base_model.update_and_allocate(t)
        optimizer.zero_grad()
    layers = [layer for _, layer in model.base_model.svd_layers()]
    pooled = []
    if manual:
        for layer in layers:
            scores = []
            for p in layer.triplets("default"):
                seen = {"mu": p.detach(), "sigma": optimizer.posterior_std(p)}
                score = CRITERIA[name]
                scores.append(score(**{n: v for n, v in seen.items() if n in inputs(score)}))
            A, E, B = scores
            pooled.append(E[:, 0] + A.mean(1) + B.mean(0))
        model.base_model.update_and_allocate(8)
        best = torch.cat(pooled).argsort(descending=True, stable=True)[:12]
        assert torch.equal(torch.cat(masks(model)).nonzero()[:, 0], best.sort().values)
    assert sum(int(m.sum()) for m in masks(model)) == 12


def test_a_posterior_is_needed_before_the_first_step() -> None:
    model = adapted(VILoraConfig)
    with pytest.raises(TypeError, match="AdamW has no posterior_std.*sensitivity, mean"):
        attach(model, adamw(model), T)
    model = adapted(VILoraConfig, total_step=T, orth_reg_weight=0.0)
    with pytest.raises(TypeError, match="call set_optimizer"):
        model.base_model.update_and_allocate(0)


def test_vilora_files(tmp_path: Path) -> None:
    import json

    model = adapted(VILoraConfig, criterion="SNR")
    optimizer = Posterior([p for p in model.parameters() if p.requires_grad], 0.05)
    attach(model, optimizer, T)
    train(model, optimizer, batches())
    want = logits(model)
    model.save_pretrained(tmp_path / "own")
    values = json.loads((tmp_path / "own" / "adapter_config.json").read_text())
    assert values["peft_type"] == "VILORA" and values["criterion"] == "SNR"
    loaded = PeftModel.from_pretrained(bert(), tmp_path / "own")
    assert isinstance(loaded.peft_config["default"], VILoraConfig)
    torch.testing.assert_close(logits(loaded), want, rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path / "stock", format="adalora")
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(bert(), str(tmp_path / "stock"))
    torch.testing.assert_close(logits(theirs), want, rtol=0, atol=1e-6)
    with pytest.raises(TypeError, match="a ADALORA model takes AdaLoraConfig"):
        adapted().add_adapter("b", VILoraConfig(target_modules=TARGETS, task_type="SEQ_CLS"))


# --- starting -------------------------------------------------------------------------------------
def test_where_training_starts() -> None:
    base = logits(bert())
    assert torch.equal(logits(adapted()), base)
    for init, E_std in (("gaussian", 0.02), (False, 1.0), (True, 0.0)):
        model = adapted(init_lora_weights=init, init_r=200)
        triplets = [la.triplets("default") for _, la in model.base_model.svd_layers()]
        A, E, B = (torch.cat([t[i].flatten() for t in triplets]) for i in range(3))
        std = 0.02 if init else 1.0
        assert A.std().item() == pytest.approx(std, rel=0.05)
        assert B.std().item() == pytest.approx(std, rel=0.05)
        assert E.std().item() == pytest.approx(E_std, rel=0.1)


def test_a_pooler_that_is_reached_is_trained_and_saved() -> None:
    dense = {"target_modules": ["dense"]}
    model = adapted(**dense)
    assert model.peft_config["default"].modules_to_save == ["classifier", "bert.pooler"]
    assert model.get_base_model().bert.pooler.modules_to_save["default"].dense.weight.requires_grad
    assert not any("pooler" in name for name, _ in model.base_model.svd_layers())
    for options in (
        {"train_pooler": False, **dense},
        {"target_modules": ["dense", "pooler.dense"]},
    ):
        names = [name for name, _ in adapted(**options).base_model.svd_layers()]
        assert "bert.pooler.dense" in names


def test_default_targets_are_adaloras() -> None:
    config = transformers.RobertaConfig(
        vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=12, num_labels=3,
    )  # fmt: skip
    base = transformers.RobertaForSequenceClassification(config)
    model = get_peft_model(base, AdaLoraConfig(task_type="SEQ_CLS"))
    names = [n.removeprefix("roberta.encoder.layer.0.") for n, _ in model.base_model.svd_layers()]
    assert names == [
        "attention.self.query", "attention.self.key", "attention.self.value",
        "attention.output.dense", "intermediate.dense", "output.dense",
    ]  # fmt: skip


def test_counts_include_what_peft_counts() -> None:
    plain = sum(p.numel() for p in bert().parameters())
    model = adapted()
    trainable, total = model.get_nb_trainable_parameters()
    head = 16 * 3 + 3
    per_layer = 2 * 4 * (16 + 1 + 16) + 4 * (16 + 1 + 24)
    assert trainable == 2 * per_layer + head
    assert total == plain + trainable + 6  # a frozen `ranknum` per adapted matrix


def test_bf16_base_trains_fp32_factors() -> None:
    base = bert().bfloat16()
    model = get_peft_model(
        base, AdaLoraConfig(task_type="SEQ_CLS", target_modules=TARGETS, **SHORT)
    )
    optimizer = adamw(model.train())
    hooks = attach(model, optimizer, T)
    train(model, optimizer, batches())
    assert hooks.finished and sum(int(m.sum()) for m in masks(model)) == 12
    assert {p.dtype for p in hooks.parts[0].triplets.parameters()} == {torch.float32}


# --- refusals -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"target_r": 8, "init_r": 4}, "target_r=8 is above init_r=4"),
        ({"init_r": 0}, "init_r=0: a rank is a positive whole number"),
        ({"beta1": 1.0}, "beta1=1.0: between 0 and 1"),
        ({"orth_reg_weight": -0.1}, "orth_reg_weight=-0.1: 0"),
        ({"deltaT": 0}, "deltaT=0: steps"),
        ({"total_step": 10, "tinit": 6, "tfinal": 0.4}, "tinit=6 and tfinal=0.4 leave none"),
        ({"total_step": 0}, "total_step=0: the number of optimiser steps"),
        ({"sensitivity_timing": "later"}, "sensitivity_timing='later': 'before'"),
        ({"init_r": 2, "target_r": 1, "rank_pattern": {"q.lora_E": [True]}}, "init_r=2 booleans"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        AdaLoraConfig(**options)


def test_what_is_not_implemented_says_so() -> None:
    for options in ({"use_rslora": True}, {"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(NotImplementedError):
            AdaLoraConfig(**options)
    with pytest.raises(TypeError, match="export them as plain LoRA"):
        adapted().base_model.add_weighted_adapter(["default"], [1.0], "sum")
    with pytest.raises(TypeError, match="a LORA model takes LoraConfig, not AdaLoraConfig"):
        lora = get_peft_model(bert(), LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
        lora.add_adapter("b", AdaLoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    with pytest.raises(ValueError, match="'missing.lora_E' is none of the adapted modules"):
        adapted(rank_pattern={"missing.lora_E": [True] * 4})
    model = adapted(total_step=None)
    with pytest.raises(ValueError, match="total_steps=None: this adapter adapts while it trains"):
        attach(model, adamw(model))
    model = adapted()
    model.add_adapter("b", AdaLoraConfig(target_modules=TARGETS, task_type="SEQ_CLS",
                                         modules_to_save=["pooler"]))  # fmt: skip


def test_two_trainable_adapters_have_no_common_budget() -> None:
    base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model = get_peft_model(base, AdaLoraConfig(target_modules=["0"], **SHORT))
    model.add_adapter("b", AdaLoraConfig(target_modules=["1"], **SHORT))
    model.set_adapter(["default", "b"])
    with pytest.raises(ValueError, match="are all trainable: a rank budget is one adapter's"):
        attach(model, adamw(model), T)
    model.set_adapter("b")
    hooks = attach(model, adamw(model), T)
    assert hooks.parts[0].triplets.names == ["1"]


def test_mixed_batches_equal_the_adapters_one_at_a_time() -> None:
    model = adapted(init_lora_weights=False)
    torch.manual_seed(9)
    model.add_adapter("b", AdaLoraConfig(target_modules=["key", "value"], task_type="SEQ_CLS",
                                         init_lora_weights=False, **SHORT))  # fmt: skip
    model.eval()
    names = ["default", "b", "__base__", "b"]
    with torch.no_grad():
        mixed = model(input_ids=IDS, adapter_names=names).logits
        for i, name in enumerate(names):
            if name == "__base__":
                with model.disable_adapter():
                    want = model(input_ids=IDS).logits
            else:
                model.set_adapter(name)
                want = model(input_ids=IDS).logits
            torch.testing.assert_close(mixed[i], want[i], rtol=1e-5, atol=1e-5)
