"""`add_weighted_adapter`: each combination against its formula."""

import pytest
import torch
from torch import nn

import peft_custom
from peft_custom import LoraConfig, PeftModel, get_peft_model, iter_adapters
from peft_custom.tuners.lora.combine import combine, prune_by_magnitude, vote


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.map = nn.Linear(9, 7)
        self.table = nn.Embedding(12, 8)
        self.conv = nn.Conv2d(2, 6, 3)


def model(ranks: tuple[int, ...] = (3, 3), **options) -> nn.Module:
    torch.manual_seed(0)
    options = {"target_modules": ["map", "table", "conv"], "init_lora_weights": False, **options}
    names = ["default", "b", "c"]
    adapted = get_peft_model(Net(), LoraConfig(r=ranks[0], lora_alpha=6, **options))
    for name, r in zip(names[1:], ranks[1:], strict=False):
        adapted.add_adapter(name, LoraConfig(r=r, lora_alpha=5, use_rslora=True, **options))
    return adapted


WEIGHTS = [0.7, -1.3]


def deltas(adapted: nn.Module, new: str):
    for _, layer in iter_adapters(adapted):
        parts = [layer.get_delta_weight(name) for name in ("default", "b")]
        yield layer, parts, layer.get_delta_weight(new)


@pytest.mark.parametrize("ranks", [(3, 3), (2, 4)])
def test_cat_is_exact(ranks) -> None:
    adapted = model(ranks)
    adapted.add_weighted_adapter(["default", "b"], WEIGHTS, "sum", combination_type="cat")
    for layer, (a, b), got in deltas(adapted, "sum"):
        torch.testing.assert_close(got, 0.7 * a - 1.3 * b, rtol=1e-5, atol=1e-5)
        assert layer.r["sum"] == sum(ranks) and layer.scaling["sum"] == 1.0
    assert adapted.active_adapter == "default"


def test_svd_is_the_best_approximation_and_exact_at_full_rank() -> None:
    adapted = model((2, 4))
    adapted.add_weighted_adapter(["default", "b"], WEIGHTS, "full", svd_rank=6)
    adapted.add_weighted_adapter(["default", "b"], WEIGHTS, "cut")
    for _, (a, b), got in deltas(adapted, "full"):
        torch.testing.assert_close(got, 0.7 * a - 1.3 * b, rtol=1e-4, atol=1e-4)
    for layer, (a, b), got in deltas(adapted, "cut"):
        total = (0.7 * a - 1.3 * b).flatten(1)
        assert layer.r["cut"] == 4
        rest = torch.linalg.svdvals(total)[4:].square().sum().sqrt()
        error = torch.linalg.matrix_norm(total - got.flatten(1))
        torch.testing.assert_close(error, rest, rtol=1e-3, atol=1e-4)


def test_linear_keeps_signs_and_has_its_cross_terms() -> None:
    adapted = model()
    adapted.add_weighted_adapter(["default", "b"], WEIGHTS, "sum", combination_type="linear")
    for layer, _, _ in deltas(adapted, "sum"):
        factors = [layer.factors(name) for name in ("default", "b")]
        s = [w * layer.scaling[n] for w, n in zip(WEIGHTS, ("default", "b"), strict=True)]
        A = (s[0] ** 0.5) * factors[0][0] - (-s[1]) ** 0.5 * factors[1][0]
        B = sum(abs(x) ** 0.5 * f[1] for x, f in zip(s, factors, strict=True))
        torch.testing.assert_close(layer.factors("sum")[0], A)
        torch.testing.assert_close(layer.factors("sum")[1], B)
    for weight in (2.0, -0.5):  # of one adapter alone it is exact, negative weights included
        adapted.add_weighted_adapter(["b"], [weight], f"one{weight > 0}", combination_type="linear")
        for _, (_, b), got in deltas(adapted, f"one{weight > 0}"):
            torch.testing.assert_close(got, weight * b, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="needs equal ranks"):
        model((2, 4)).add_weighted_adapter(
            ["default", "b"], WEIGHTS, "x", combination_type="linear"
        )


def test_rules_on_worked_values() -> None:
    x = torch.tensor([[3.0, -1.0, 0.5, -4.0], [2.0, 2.0, -1.5, -1.0], [-9.0, 1.0, 1.2, 2.0]])
    assert prune_by_magnitude(x[0], 0.5).tolist() == [3.0, 0.0, 0.0, -4.0]
    w = torch.tensor([1.0, 1.0, 2.0])
    # sums of the columns: -4, 2, 0.2, -3; the entries that agree, weighted, over their number
    assert vote(x, w, "total").tolist() == pytest.approx([-18.0, 2.0, 1.45, -2.5])
    assert vote(x, w, "frequency").tolist() == pytest.approx([2.5, 2.0, 1.45, -2.5])
    tied = torch.tensor([[1.0], [-1.0]])  # a tie goes to the positive ones, as in PEFT
    assert vote(tied, torch.tensor([2.0, 3.0]), "total").tolist() == [2.0]
    merged = combine(list(x), [1.0, 1.0, 2.0], "magnitude_prune", 0.5, "total")
    assert merged.tolist() == pytest.approx([3 + 2 - 18, 2.0, 0.0, -4 + 4])
    torch.manual_seed(0)
    ones = torch.ones(100_000)
    dropped = combine([ones], [1.0], "dare_linear", 0.25, "total")
    assert set(dropped.unique().tolist()) == {0.0, 4.0} and abs(dropped.mean() - 1) < 0.02


@pytest.mark.parametrize("rule", ["ties", "dare_linear", "dare_ties", "magnitude_prune"])
def test_every_rule_at_density_one_is_its_plain_form(rule: str) -> None:
    adapted = model()
    arguments = (["default", "b"], [0.7, 1.3])
    adapted.add_weighted_adapter(
        *arguments, "svd", combination_type=f"{rule}_svd", density=1.0, svd_rank=7
    )
    for _, (a, b), got in deltas(adapted, "svd"):
        want = combine([a, b], [0.7, 1.3], "linear", 1.0, "total")
        if "ties" in rule:
            want = vote(torch.stack([a, b]), torch.tensor([0.7, 1.3]), "total")
        if min(want.flatten(1).shape) <= 7:
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    adapted.add_weighted_adapter(*arguments, "factors", combination_type=rule, density=0.5)
    assert adapted.get_base_model().map.r["factors"] == 3
    for bad in (None, 0.0, 1.5):
        with pytest.raises(ValueError, match="density"):
            adapted.add_weighted_adapter(*arguments, "x", combination_type=rule, density=bad)


def test_adapters_on_different_layers_and_ranks_survive_the_file(tmp_path) -> None:
    torch.manual_seed(0)
    options = {"init_lora_weights": False}
    adapted = get_peft_model(Net(), LoraConfig(r=2, target_modules=["map"], **options))
    adapted.add_adapter("b", LoraConfig(r=4, target_modules=["map", "conv"], **options))
    adapted.add_weighted_adapter(["default", "b"], WEIGHTS, "sum", combination_type="cat")
    adapted.save_pretrained(tmp_path, selected_adapters=["sum"])
    torch.manual_seed(0)
    again = PeftModel.from_pretrained(Net(), tmp_path / "sum")
    for (_, new), (_, old) in zip(iter_adapters(again), iter_adapters(adapted), strict=True):
        assert new.r["default"] == old.r["sum"] and new.scaling["default"] == 1.0
        assert torch.equal(new.get_delta_weight("default"), old.get_delta_weight("sum"))
    assert again.get_base_model().conv.r == {"default": 4}


def test_refusals() -> None:
    adapted = model()
    with pytest.raises(ValueError, match="combination_type='sum': use one of svd, linear, cat"):
        adapted.add_weighted_adapter(["default"], [1.0], "x", combination_type="sum")
    with pytest.raises(ValueError, match="one weight each"):
        adapted.add_weighted_adapter(["default", "b"], [1.0], "x")
    with pytest.raises(ValueError, match="no adapter 'z'"):
        adapted.add_weighted_adapter(["z"], [1.0], "x")
    with pytest.raises(ValueError, match="majority_sign_method"):
        adapted.add_weighted_adapter(["b"], [1.0], "x", majority_sign_method="vote")
    heads = model(target_modules=["map"], modules_to_save=["table"])
    with pytest.raises(ValueError, match="saved the same module in full"):
        heads.add_weighted_adapter(["default", "b"], [1.0, 1.0], "x")
    heads.add_weighted_adapter(["b"], [1.0], "x")
    saved = heads.get_base_model().table.modules_to_save
    assert torch.equal(saved["x"].weight, saved["b"].weight)
    pissa = model((2,), target_modules=["map"], init_lora_weights="pissa")
    with pytest.raises(ValueError, match="convert_pissa_to_lora"):
        pissa.add_weighted_adapter(["default"], [1.0], "x")


@pytest.mark.parametrize("weights", [[0.7, 1.3], [0.7, -1.3]])
@pytest.mark.parametrize(
    "kind", ["linear", "cat", "svd", "ties", "magnitude_prune", "ties_svd", "magnitude_prune_svd"]
)
def test_equals_the_newest_peft(kind: str, weights: list[float]) -> None:
    peft = pytest.importorskip("peft")
    found = []
    for library in (peft, peft_custom):
        torch.manual_seed(0)
        net = nn.ModuleDict({"map": nn.Linear(9, 7)})
        adapted = library.get_peft_model(
            net, library.LoraConfig(r=3, lora_alpha=6, target_modules=["map"])
        )
        adapted.add_adapter("b", library.LoraConfig(r=3, lora_alpha=3, target_modules=["map"]))
        draw = torch.Generator().manual_seed(3)
        for name, p in sorted(adapted.named_parameters()):
            if "lora_" in name:
                p.data.copy_(torch.randn(p.shape, generator=draw))
        density = 0.5 if "ties" in kind or "prune" in kind else None
        adapted.add_weighted_adapter(
            ["default", "b"], weights, "new", combination_type=kind, density=density
        )
        found.append(adapted.base_model.model["map"].get_delta_weight("new").detach())
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-4)
