"""Adapters cut by their singular values: against dense SVDs, and as PEFT loads them."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.peft_tiny import bert
from torch import Tensor, nn

from peft_custom import (
    AdaLoraConfig,
    BimLoraConfig,
    DyLoraConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
    iter_adapters,
)
from peft_custom.save_and_load import read_adapter, write_adapter
from peft_custom.tuners.lora import rank_cut

TARGETS = ["query", "intermediate.dense", "word_embeddings", "classifier.0"]
KINDS = {
    "lora": lambda: LoraConfig(
        r=5, lora_alpha=7, target_modules=TARGETS, use_rslora=True, rank_pattern={"query": 3}
    ),
    "dylora": lambda: DyLoraConfig(r=4, lora_alpha=7, target_modules=TARGETS),
    "matryoshka": lambda: DyLoraConfig(
        r=4, lora_alpha=7, target_modules=TARGETS, dylora_mode="matryoshka", r_min=2
    ),
    "matryoshka of some": lambda: DyLoraConfig(
        r=4, lora_alpha=7, target_modules=TARGETS, dylora_mode="matryoshka", train_ranks=[1, 4]
    ),
    "adalora": lambda: AdaLoraConfig(
        init_r=4,
        target_r=2,
        lora_alpha=7,
        target_modules=["query", "intermediate.dense"],
        rank_pattern={"bert.encoder.layer.1.attention.self.query": [True, False, True, True]},
    ),
}


def adapted(kind: str) -> PeftModel:
    """A tiny BERT with a Conv1D, adapters that are not zero."""
    from transformers.pytorch_utils import Conv1D

    base = bert()
    torch.manual_seed(4)
    base.classifier = nn.Sequential(Conv1D(10, 16), nn.Linear(10, 3))
    model = get_peft_model(base, KINDS[kind]())
    for name, p in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(p, std=0.4)
    return model.eval()


def increments(model: PeftModel) -> dict[str, Tensor]:
    layers = iter_adapters(model.get_base_model())
    return {name: layer.get_delta_weight("default").detach() for name, layer in layers}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_the_largest_values_of_all_matrices_are_kept(kind: str, tmp_path: Path) -> None:
    model = adapted(kind)
    model.save_pretrained(tmp_path / "whole")
    dense = {n: d.double() for n, d in increments(model).items()}
    svds = {name: torch.linalg.svd(d, full_matrices=False) for name, d in dense.items()}
    file = read_adapter(tmp_path / "whole")
    matrices = rank_cut.decomposed(file.config, file.tensors)
    assert matrices.keys() == dense.keys()
    for name, matrix in matrices.items():
        torch.testing.assert_close(matrix.S, svds[name].S[: len(matrix.S)], atol=1e-5, rtol=1e-5)
    ranks = rank_cut.by_budget(matrices, 9)
    everything = torch.cat([s.S for s in svds.values()])
    threshold = everything.sort(descending=True).values[8] - 1e-6
    assert ranks == {n: int((s.S > threshold).sum()) for n, s in svds.items()}
    write_adapter(tmp_path / "cut", *rank_cut.cut(file.config, file.tensors, matrices, ranks))

    base = copy.deepcopy(model).unload()
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "cut").eval()
    mine = PeftModel.from_pretrained(base, tmp_path / "cut")
    layers = dict(theirs.base_model.model.named_modules())
    for name, (U, S, Vt) in svds.items():
        k = ranks[name]
        expected = ((U[:, :k] * S[:k]) @ Vt[:k]).float()
        if not k:
            assert not hasattr(layers[name], "base_layer")
            continue
        found = layers[name].get_delta_weight("default")
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(increments(mine)[name], expected, atol=1e-5, rtol=1e-5)
    assert 0 < len(increments(mine)) <= len(matrices)


def fake(values: dict[str, list[float]]) -> dict[str, rank_cut.Decomposed]:
    none = torch.zeros(0)
    shapes = (torch.Size([1, 1]), torch.Size([1, 1]))
    return {
        name: rank_cut.Decomposed(
            none, torch.tensor(s, dtype=torch.float64), none, ("", ""), shapes
        )
        for name, s in values.items()
    }


def test_budget_energy_and_rank() -> None:
    matrices = fake({"a": [3.0, 1.0, 0.5], "b": [2.0, 2.0], "c": [0.1]})
    assert rank_cut.by_budget(matrices, 3) == {"a": 1, "b": 2, "c": 0}
    assert rank_cut.by_rank(matrices, 2) == {"a": 2, "b": 2, "c": 1}
    total = 9 + 1 + 0.25 + 8 + 0.01
    assert rank_cut.by_energy(matrices, 17 / total) == {"a": 1, "b": 2, "c": 0}
    assert rank_cut.by_energy(matrices, 17.01 / total) == {"a": 2, "b": 2, "c": 0}
    assert rank_cut.by_energy(matrices, 1.0) == {"a": 3, "b": 2, "c": 1}
    for wrong in (0, 7):
        with pytest.raises(ValueError, match="6 singular values"):
            rank_cut.by_budget(matrices, wrong)
    with pytest.raises(ValueError, match="above 0 to 1"):
        rank_cut.by_energy(matrices, 0.0)
    with pytest.raises(ValueError, match="ranks 1 to 3"):
        rank_cut.by_rank(matrices, 4)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.floats(0, 9), min_size=1, max_size=4), min_size=1, max_size=4))
def test_no_value_that_is_dropped_is_above_one_that_is_kept(values: list[list[float]]) -> None:
    matrices = fake({str(i): sorted(v, reverse=True) for i, v in enumerate(values)})
    total = sum(map(len, values))
    for budget in range(1, total + 1):
        ranks = rank_cut.by_budget(matrices, budget)
        assert sum(ranks.values()) == budget
        kept = [float(s) for n, m in matrices.items() for s in m.S[: ranks[n]]]
        left = [float(s) for n, m in matrices.items() for s in m.S[ranks[n] :]]
        assert min(kept) >= max(left, default=0.0)


def test_what_is_no_such_sum_is_refused(tmp_path: Path) -> None:
    for config, said in (
        ({"peft_type": "BIM_LORA"}, "BIM_LORA adapter is not W"),
        ({"peft_type": "LORA", "use_dora": True}, "use_dora"),
        ({"peft_type": "LORA", "init_lora_weights": "pissa"}, "convert_pissa_to_lora=True"),
    ):
        with pytest.raises(ValueError, match=said):
            rank_cut.decomposed(config, {})
    merged = {"q.lora_A": torch.zeros(4, 3), "q.lora_B": torch.zeros(6, 2)}
    with pytest.raises(ValueError, match="merged layer"):
        rank_cut.decomposed({"r": 2, "lora_alpha": 2}, merged)
    assert BimLoraConfig().peft_type == "BIM_LORA"
