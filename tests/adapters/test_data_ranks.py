"""Ranks and starts from data: PEFT's EVA, gradients' formulas, files, resuming, processes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.tuners.lora.eva import initialize_lora_eva_weights
from support.peft_tiny import bert
from support.processes import in_two
from torch import Tensor, nn

from peft_custom import LoraConfig, PeftModel, attach, get_peft_model
from peft_custom.hooks import MicroBatch
from peft_custom.tuners.lora.data_ranks import largest_components, shared_in_proportion
from peft_custom.tuners.lora.input_moments import principal_directions

pytestmark = pytest.mark.filterwarnings("ignore")
# inputs of 16, 16, 24, none given to two of them; a Conv1D of 16 by 10 in the head
TARGETS = ["query", "attention.output.dense", "output.dense", "classifier.0"]
OPTIONS = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS}
SOURCES = ("activations", "gradients")


def base() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    model = bert()
    torch.manual_seed(4)
    model.classifier = nn.Sequential(Conv1D(10, 16), nn.Linear(10, 3))
    model.bert.encoder.layer[0].output.dropout.p = 0.3  # off while data is looked at
    return model


def batch(rows: int = 12, seed: int = 0) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(seed)
    mask = torch.ones(rows, 7, dtype=torch.long)
    mask[::2, 4:] = 0
    return {
        "input_ids": torch.randint(0, 40, (rows, 7), generator=made),
        "attention_mask": mask,
        "labels": torch.randint(0, 3, (rows,), generator=made),
    }


def prepared(source: str, batches: list[Any], **more: Any) -> tuple[PeftModel, Any, Any]:
    model = get_peft_model(base(), LoraConfig(**{**OPTIONS, "rank_from": source, **more})).train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.02, weight_decay=0.1
    )
    hooks = attach(model, optimizer, total_steps=4)
    hooks.prepare(batches, lambda b: model(**b).loss)
    return model, optimizer, hooks


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    model(**batch(4, seed)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    given = batch(5, 3)
    return model.eval()(given["input_ids"], attention_mask=given["attention_mask"]).logits


def test_activations_are_pefts_eva(tmp_path: Path) -> None:
    """Ranks, rows of A up to their sign, scales; from one batch, of which PEFT's pass is exact."""
    data = {name: value for name, value in batch(32).items() if name != "labels"}
    options = {**OPTIONS, "target_modules": TARGETS[:3]}  # the head's rows are no tokens
    theirs = peft.get_peft_model(base(), peft.LoraConfig(**options, init_lora_weights="eva"))
    initialize_lora_eva_weights(theirs, [data], show_progress_bar=False)
    mine, _, _ = prepared("activations", [batch(32)], target_modules=TARGETS[:3])
    config = theirs.peft_config["default"]
    mine.eval().save_pretrained(tmp_path / "ours")
    ours = PeftModel.from_pretrained(base(), tmp_path / "ours")
    layers = {
        n.removeprefix("base_model.model."): m
        for n, m in theirs.named_modules()
        if hasattr(m, "lora_A")
    }
    found = {n: r for n, r in mine.base_model.ranks().items() if r}
    assert found == {n: m.r["default"] for n, m in layers.items()}
    assert sum(found.values()) == 3 * len(mine.base_model.ranks()) and len(set(found.values())) > 1
    assert ours.peft_config["default"].rank_pattern == config.rank_pattern
    for name, layer in layers.items():
        other = ours.base_model.model.get_submodule(name)
        assert other.scaling["default"] == pytest.approx(layer.scaling["default"])
        one, two = (m.lora_A["default"].weight.detach() for m in (layer, other))
        cosines = (one * two).sum(1).abs()
        torch.testing.assert_close(cosines, torch.ones_like(cosines), atol=1e-3, rtol=0)
        torch.testing.assert_close(one, two, atol=5e-2, rtol=0)
    theirs.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(base(), tmp_path / "theirs")), logits(theirs)
    )


def test_gradients_give_ranks_and_directions() -> None:
    """Beside G by autograd on the plain model: importance, right singular vectors."""
    batches = [batch(6, 1), batch(6, 2)]
    model, _, _ = prepared("gradients", batches)
    plain = base().eval()
    names = model.base_model.ranks()
    for one in batches:
        plain(**one).loss.backward()
    importance, ranks = {}, {}
    for name in names:
        module = plain.get_submodule(name)
        importance[name] = float((module.weight * module.weight.grad).abs().mean())
    ranks = shared_in_proportion(importance, dict.fromkeys(names, 6), 3 * len(names))
    assert model.base_model.ranks() == ranks and len(set(ranks.values())) > 2
    for name, rank in ranks.items():
        G = plain.get_submodule(name).weight.grad
        G = G.T if name == "classifier.0" else G  # stored (in, out)
        layer = model.base_model.model.get_submodule(name)
        A, B = layer.factors("default")
        assert not A[rank:].any() and not B.any()
        sure = [j for j in range(rank) if torch.linalg.matrix_rank(G) > j]
        rows = torch.linalg.svd(G).Vh[sure]
        cosines = (A[sure] * rows).sum(1).abs()
        torch.testing.assert_close(cosines, torch.ones_like(cosines), atol=1e-3, rtol=0)
        assert layer.base_layer.weight.grad is None and not layer.base_layer.weight.requires_grad


@pytest.mark.parametrize("source", SOURCES)
def test_it_starts_from_the_base_and_ends_as_plain_lora(source: str, tmp_path: Path) -> None:
    """Components that are not there stay nothing; PEFT loads what is left."""
    model, optimizer, _ = prepared(source, [batch()])
    torch.testing.assert_close(logits(model), logits(base()))
    ranks = model.base_model.ranks()
    assert sum(ranks.values()) == 3 * 7 and max(ranks.values()) <= 6
    model.train()
    for seed in range(3):
        step(model, optimizer, seed)
    assert model.base_model.ranks() == ranks
    for name, rank in ranks.items():
        A, B = model.base_model.model.get_submodule(name).factors("default")
        assert (
            not A[rank:].any() and not B[:, rank:].any() and bool(B[:, :rank].any()) == (rank > 0)
        )
    model.save_pretrained(tmp_path)
    assert "rank_from" not in (tmp_path / "adapter_config.json").read_text()
    expected = logits(model)
    for library in (peft, None):
        load = (PeftModel if library is None else library.PeftModel).from_pretrained
        torch.testing.assert_close(logits(load(base(), tmp_path)), expected, atol=1e-5, rtol=1e-5)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(merged), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("source", SOURCES)
def test_resumed_it_is_the_whole_run(source: str) -> None:
    model, optimizer, hooks = prepared(source, [batch()])
    step(model.train(), optimizer, 0)
    factors = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    saved = copy.deepcopy((optimizer.state_dict(), hooks.state_dict()))
    step(model, optimizer, 1)
    again = get_peft_model(base(), LoraConfig(**OPTIONS, rank_from=source)).train()
    own = {n: p for n, p in again.named_parameters() if p.requires_grad}
    other = torch.optim.AdamW(list(own.values()), lr=0.02, weight_decay=0.1)
    more = attach(again, other, total_steps=4)
    with pytest.raises(RuntimeError, match="prepare"):
        step(again, other, 9)
    other.zero_grad()
    with torch.no_grad():
        for name, p in own.items():
            p.copy_(factors[name])
    other.load_state_dict(saved[0])
    more.load_state_dict(saved[1])
    step(again, other, 1)
    for name, p in model.named_parameters():
        assert torch.equal(p, dict(again.named_parameters())[name]), name


def member(rank: int, world: int = 2) -> dict[str, Any]:
    """Its half of two steps of two batches each, and a step."""
    found: dict[str, Any] = {}
    for source in SOURCES:
        halves = []
        for number in range(2):
            rows = {k: v[rank::world] for k, v in batch(8, number).items()}
            pieces = [{k: v[i::2] for k, v in rows.items()} for i in range(2)]
            halves += [MicroBatch(p, weight=0.5 / world, last=i == 1) for i, p in enumerate(pieces)]
        model, _, _ = prepared(source, halves, rank_batches=2)
        found[source] = torch.tensor(list(model.base_model.ranks().values()))
        factors = (layer.factors("default")[0] for _, layer in model.base_model.lora_layers())
        found[f"{source} A"] = torch.cat([A.detach().flatten() for A in factors])
    return found


def test_two_processes_find_what_one_does(tmp_path: Path) -> None:
    one, two = in_two(member, tmp_path)
    alone = member(0, 1)
    for name, value in one.items():
        assert torch.equal(value, two[name]), name
        torch.testing.assert_close(value, alone[name], atol=2e-3, rtol=0, msg=name)


# --- parts ---------------------------------------------------------------------------------------
def test_components_of_the_largest_worth() -> None:
    worths = {
        "a": torch.tensor([0.5, 0.1]),
        "b": torch.tensor([0.5, 0.2]),
        "c": torch.tensor([0.0]),
    }
    assert largest_components(worths, 1) == {"a": 1, "b": 0, "c": 0}
    assert largest_components(worths, 3) == {"a": 1, "b": 2, "c": 0}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 9), st.integers(1, 6)), min_size=1, max_size=5), st.data())
def test_shares_are_whole_and_within_bounds(modules: list[tuple[float, int]], data: Any) -> None:
    weights = {str(i): w for i, (w, _) in enumerate(modules)}
    most = {str(i): m for i, (_, m) in enumerate(modules)}
    total = data.draw(st.integers(len(modules), sum(most.values())))
    ranks = shared_in_proportion(weights, most, total)
    assert sum(ranks.values()) == total
    assert all(1 <= rank <= most[name] for name, rank in ranks.items())
    for one, other in ((a, b) for a in ranks for b in ranks if weights[a] > weights[b]):
        assert ranks[one] >= min(ranks[other], most[one])


def test_directions_of_wide_inputs_are_those_of_the_whole_spectrum(monkeypatch) -> None:
    torch.manual_seed(0)
    x = torch.randn(300, 40, dtype=torch.float64) * torch.logspace(0, -2, 40, dtype=torch.float64)
    whole = principal_directions(x.T @ x, 4)
    monkeypatch.setattr("peft_custom.tuners.lora.input_moments.SMALL", 8)
    for a, b in zip(whole, principal_directions(x.T @ x, 4), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("source", SOURCES)
def test_a_layer_without_data_is_named(source: str) -> None:
    with pytest.raises(ValueError, match="rank_from: bert.encoder.layer.0.attention.self.query"):
        prepared(source, [])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rank_from": "weights"}, "use 'activations' or 'gradients'"),
        ({"rank_from": "gradients", "use_rslora": True}, "no use_rslora"),
        ({"rank_from": "gradients", "rho": 0.5}, "both are 1 or above"),
    ],
)
def test_refusals(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        LoraConfig(**options)
    assert LoraConfig(init_lora_weights="eva").rank_from == "activations"
