"""loralib's layers: worked examples, acceptance facts, merging, state dicts, bad arguments."""

import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import loralib as lora

MAKERS = {
    "Linear": lambda: lora.Linear(7, 5, r=3, lora_alpha=6),
    "Linear (in, out)": lambda: lora.Linear(7, 5, r=3, lora_alpha=6, fan_in_fan_out=True),
    "MergedLinear": lambda: lora.MergedLinear(7, 12, r=2, enable_lora=[True, False, True]),
    "MergedLinear (in, out)": lambda: lora.MergedLinear(
        7, 12, r=2, enable_lora=[True, False, True], fan_in_fan_out=True
    ),
    "Embedding": lambda: lora.Embedding(11, 5, r=2, lora_alpha=3, padding_idx=1),
    "Conv1d": lambda: lora.Conv1d(4, 6, 3, r=2, groups=2, stride=2),
    "Conv2d": lambda: lora.Conv2d(4, 6, 3, r=2, lora_alpha=3, padding="same"),
    "Conv2d oblong": lambda: lora.Conv2d(4, 6, (1, 3), r=2, padding=1, padding_mode="circular"),
    "Conv3d": lambda: lora.Conv3d(4, 6, (3, 2, 1), r=2, groups=2, dilation=2),
}


def example(layer: nn.Module) -> Tensor:
    """An input of a shape that fits."""
    if isinstance(layer, nn.Embedding):
        return torch.tensor([[1, 2, 3], [4, 10, 0]])
    if isinstance(layer, nn.Linear):
        return torch.randn(2, 3, layer.in_features)
    return torch.randn(2, layer.in_channels, *(9, 8, 7)[: layer.weight.dim() - 2])


def plain(layer: nn.Module, x: Tensor, weight: Tensor) -> Tensor:
    """What torch's own layer computes with this weight, stored as `layer` stores it."""
    bias = getattr(layer, "bias", None)
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight.T if layer.fan_in_fan_out else weight, bias)
    if isinstance(layer, nn.Embedding):
        return F.embedding(x, weight)
    return layer._conv_forward(x, weight, bias)


def train_a_little(layer: nn.Module, steps: int = 3) -> None:
    torch.manual_seed(1)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.05)
    for _ in range(steps):
        layer(example(layer)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture(params=MAKERS)
def layer(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return MAKERS[request.param]()


@pytest.fixture
def trained(layer: nn.Module) -> nn.Module:
    train_a_little(layer)
    assert (layer.lora_A != 0).any() and (layer.lora_B != 0).any()
    return layer


def test_worked_example_linear() -> None:
    layer = lora.Linear(2, 2, r=1, lora_alpha=2)
    layer.load_state_dict(
        {
            "weight": torch.eye(2),
            "bias": torch.zeros(2),
            "lora_A": torch.tensor([[1.0, 2.0]]),
            "lora_B": torch.tensor([[3.0], [-1.0]]),
        }
    )
    x, y = torch.ones(2), torch.tensor([19.0, -5.0])
    assert torch.equal(layer.delta_weight(), torch.tensor([[6.0, 12.0], [-2.0, -4.0]]))
    assert torch.equal(layer(x), y)
    layer.eval().merge()
    assert torch.equal(layer.weight, torch.tensor([[7.0, 12.0], [-2.0, -3.0]]))
    assert torch.equal(layer(x), y)


def test_worked_example_merged_linear() -> None:
    layer = lora.MergedLinear(2, 6, r=1, enable_lora=[True, False, True], bias=False)
    layer.load_state_dict(
        {
            "weight": torch.zeros(6, 2),
            "lora_A": torch.eye(2),
            "lora_B": torch.tensor([[1.0], [2.0], [3.0], [4.0]]),
        }
    )
    delta = torch.tensor([[1.0, 0], [2, 0], [0, 0], [0, 0], [0, 3], [0, 4]])
    assert torch.equal(layer.delta_weight(), delta)
    for module in (layer, layer.eval()):
        with torch.no_grad():
            y = module(torch.tensor([1.0, 10.0]))
        assert torch.equal(y, torch.tensor([1.0, 2, 0, 0, 30, 40]))


def test_fresh_layer_is_the_plain_layer(layer: nn.Module) -> None:
    x = example(layer)
    expected = plain(layer, x, layer.weight)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-6)
    with torch.no_grad():
        torch.testing.assert_close(layer.eval()(x), expected, rtol=0, atol=1e-6)
    before = layer.weight.clone()
    layer.merge()
    assert torch.equal(layer.weight, before) and layer.merged


@pytest.mark.parametrize("fan", [False, True])
@pytest.mark.parametrize("kind", ["Linear", "MergedLinear"])
def test_fresh_linear_is_exactly_plain(kind: str, fan: bool) -> None:
    options = {"enable_lora": [True, False, True]} if kind == "MergedLinear" else {}
    layer = getattr(lora, kind)(70, 48, r=4, fan_in_fan_out=fan, **options)
    x = torch.randn(9, 70)
    W = layer.weight.T if fan else layer.weight
    assert torch.equal(layer(x), F.linear(x, W, layer.bias))


def test_initialisation() -> None:
    torch.manual_seed(0)
    for made, columns in (
        (lora.Linear(100, 30, r=8), 100),
        (lora.Linear(100, 30, r=8, fan_in_fan_out=True), 100),
        (lora.MergedLinear(100, 30, r=8, enable_lora=[True, True, False]), 100),
        (lora.Conv2d(30, 10, 3, r=8), 90),
    ):
        bound = columns**-0.5
        assert 0.9 * bound < made.lora_A.abs().max() <= bound
        assert not made.lora_B.any() and not made.weight.requires_grad and made.bias.requires_grad
    for made in (lora.Linear(100, 30, fan_in_fan_out=True), lora.Linear(100, 30)):
        assert 0.09 < made.weight.abs().max() <= 0.1 and 0.05 < made.bias.abs().max() <= 0.1
    table = lora.Embedding(50, 400, r=8)
    assert not table.lora_A.any()
    assert abs(table.lora_B.mean()) < 0.1 and abs(table.lora_B.std() - 1) < 0.05
    table.lora_A.data.fill_(1.0)
    table.reset_parameters()
    assert not table.lora_A.any()


def test_evaluation_and_merging_equal_training(trained: nn.Module) -> None:
    """Unmerged, cached and merged agree with the plain layer on W + ΔW; nothing is left behind."""
    x, saved = example(trained), copy.deepcopy(trained.state_dict())
    expected = plain(trained, x, trained.weight + trained.delta_weight()).detach()
    unmerged = trained(x)
    torch.testing.assert_close(unmerged, expected, rtol=1e-5, atol=1e-5)
    assert (unmerged - plain(trained, x, trained.weight)).abs().max() > 1e-3
    trained.eval()
    with torch.no_grad():
        torch.testing.assert_close(trained(x), expected, rtol=1e-5, atol=1e-5)
        trained.merge_weights = False
        torch.testing.assert_close(trained(x), expected, rtol=1e-5, atol=1e-5)
    trained.merge()
    trained.merge()  # once is enough
    assert not torch.equal(trained.weight, saved["weight"])
    torch.testing.assert_close(trained(x), expected, rtol=1e-5, atol=1e-5)
    trained.unmerge()
    trained.unmerge()
    assert all(torch.equal(trained.state_dict()[k], v) for k, v in saved.items())


def test_modes_never_change_a_weight(trained: nn.Module) -> None:
    saved, x = copy.deepcopy(trained.state_dict()), example(trained)
    for mode in (False, True, False, False, True):
        trained.train(mode)
        with torch.no_grad():
            trained(x)
        assert trained.state_dict().keys() == saved.keys()
        assert all(torch.equal(trained.state_dict()[k], v) for k, v in saved.items())


def test_cached_weight_follows_every_change(trained: nn.Module) -> None:
    """After an optimiser step, a load, a write to a weight or to s, evaluation is up to date."""
    x = example(trained)

    def change_by_load() -> None:
        trained.load_state_dict({k: v + 0.1 for k, v in trained.state_dict().items()})

    def change_by_step() -> None:
        torch.optim.SGD([trained.lora_A, trained.lora_B], lr=1.0).step()

    def change_through_data() -> None:
        trained.lora_B.data.mul_(0.5)
        trained.eval()

    def change_scaling() -> None:
        trained.scaling *= 2

    def change_weight() -> None:
        with torch.no_grad():
            trained.weight.mul_(1.5)

    trained.lora_A.grad, trained.lora_B.grad = (
        torch.randn_like(p) for p in (trained.lora_A, trained.lora_B)
    )
    for change in (change_by_load, change_by_step, change_through_data, change_scaling,
                   change_weight, trained.double, trained.float):  # fmt: skip
        trained.eval()
        with torch.no_grad():
            stale = trained(x if x.dtype == torch.long else x.to(trained.weight.dtype))
            assert trained._cached is not None
        change()
        given = x if x.dtype == torch.long else x.to(trained.weight.dtype)
        exact = trained(given)  # gradients on: never the cached weight
        with torch.no_grad():
            torch.testing.assert_close(trained(given), exact.detach(), rtol=1e-4, atol=1e-4)
        if change not in (trained.double, trained.float):
            assert (stale - exact).abs().max() > 1e-3


def test_cached_weight_is_formed_once_and_costs_one_product() -> None:
    layer = lora.Linear(7, 5, r=3).eval()
    x = torch.randn(2, 7)
    with torch.no_grad():
        layer(x)
        held = layer._cached[1]
        layer(x)
        assert layer._cached[1] is held
    layer.train()
    assert layer._cached is None
    with torch.inference_mode():
        first = layer.eval()(x)
    with torch.no_grad():
        assert torch.equal(layer(x), first)


def test_gradients_flow_in_evaluation_too(trained: nn.Module) -> None:
    trained.eval()
    with torch.no_grad():
        trained(example(trained))  # fills the cache
    trained(example(trained)).square().sum().backward()
    assert trained.lora_A.grad.any() and trained.lora_B.grad.any() and trained.weight.grad is None


def test_merged_layer_refuses_to_train(trained: nn.Module) -> None:
    trained.merge()
    with pytest.raises(RuntimeError, match="unmerge\\(\\) before training"):
        trained(example(trained))
    with torch.no_grad():
        trained(example(trained))
    trained.unmerge()
    trained(example(trained)).sum().backward()


def test_loading_while_merged_is_refused_and_changes_nothing(trained: nn.Module) -> None:
    saved = copy.deepcopy(trained.state_dict())
    trained.merge()
    weight = trained.weight.clone()
    model = nn.ModuleDict({"q": trained})
    with pytest.raises(RuntimeError, match=r"q\.: merged; call unmerge\(\) before loading"):
        model.load_state_dict({f"q.{k}": v + 1 for k, v in saved.items()})
    assert torch.equal(trained.weight, weight)
    trained.unmerge()
    assert all(torch.equal(trained.state_dict()[k], v) for k, v in saved.items())


def test_merged_state_dict_is_the_plain_layers(trained: nn.Module) -> None:
    trained.eval().merge()
    saved, x = trained.state_dict(), example(trained)
    assert not any("lora_" in key for key in saved)
    torch.testing.assert_close(plain(trained, x, saved["weight"]), trained(x))


def test_round_trip_and_strictness(trained: nn.Module, request: pytest.FixtureRequest) -> None:
    adapter, base = lora.lora_state_dict(trained), copy.deepcopy(trained)
    base.reset_lora_parameters()
    x = example(trained)
    assert not torch.equal(base(x), trained(x))
    result = base.load_state_dict(adapter, strict=False)
    assert not result.unexpected_keys and set(result.missing_keys) <= {"weight", "bias"}
    assert torch.equal(base(x), trained(x))
    with pytest.raises(RuntimeError, match="Missing key"):
        base.load_state_dict(adapter)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        base.load_state_dict({**base.state_dict(), "lora_C": torch.ones(1)})
    with pytest.raises(RuntimeError, match="size mismatch for lora_A"):
        base.load_state_dict({**base.state_dict(), "lora_A": torch.ones(1, 1)})


def test_copies_and_pickles(trained: nn.Module) -> None:
    x = example(trained)
    trained.eval()
    with torch.no_grad():
        expected = trained(x)
    for twin in (copy.deepcopy(trained), pickle.loads(pickle.dumps(trained))):
        assert twin._cached is None
        with torch.no_grad():
            assert torch.equal(twin(x), expected)
            twin.lora_A.add_(1.0)
            assert not torch.equal(twin(x), expected)
            assert torch.equal(trained(x), expected)


def test_merge_survives_a_change_of_type(trained: nn.Module) -> None:
    saved = trained.weight.detach().clone()
    trained.merge()
    trained.double().unmerge()
    assert torch.equal(trained.weight, saved.double())


@pytest.mark.parametrize("kind", ["Linear", "MergedLinear", "Conv2d"])
def test_dropout_in_training_only(kind: str) -> None:
    torch.manual_seed(0)
    layer = {
        "Linear": lambda: lora.Linear(40, 6, r=3, lora_dropout=0.5),
        "MergedLinear": lambda: lora.MergedLinear(
            40, 6, r=3, lora_dropout=0.5, enable_lora=[True, False]
        ),
        "Conv2d": lambda: lora.Conv2d(4, 6, 3, r=3, lora_dropout=0.5),
    }[kind]()
    with torch.no_grad():
        layer.lora_B.normal_()
    x = example(layer)
    assert not torch.equal(layer(x), layer(x))
    frozen = layer.eval()(x)
    assert torch.equal(frozen, layer(x))
    torch.testing.assert_close(frozen, plain(layer, x, layer.merged_weight()), rtol=1e-5, atol=1e-5)
    layer.train()
    many = torch.stack([layer(x).detach() for _ in range(1000)])
    error = many.std(0) / len(many) ** 0.5
    assert ((many.mean(0) - frozen).abs() <= 5 * error + 1e-5).all()  # dropout keeps the mean


def test_merged_linear_is_three_layers() -> None:
    """[T, F, T] equals LoRA on q, a plain k, LoRA on v; and the rank of each is at most r."""
    torch.manual_seed(0)
    r, m = 2, 5
    merged = lora.MergedLinear(7, 3 * m, r=r, lora_alpha=3, enable_lora=[True, False, True])
    train_a_little(merged)
    x = torch.randn(4, 7)
    parts = merged(x).split(m, dim=1)
    for j, block in ((0, 0), (2, 1)):
        single = lora.Linear(7, m, r=r, lora_alpha=3)
        rows = slice(j * m, (j + 1) * m)
        single.load_state_dict(
            {
                "weight": merged.weight[rows],
                "bias": merged.bias[rows],
                "lora_A": merged.lora_A[block * r : (block + 1) * r],
                "lora_B": merged.lora_B[block * m : (block + 1) * m],
            }
        )
        torch.testing.assert_close(parts[j], single(x), rtol=1e-5, atol=1e-6)
        assert torch.linalg.matrix_rank(merged.delta_weight()[rows]) == r
    k = F.linear(x, merged.weight, merged.bias)[:, m : 2 * m]
    assert torch.equal(parts[1], k)
    assert not merged.delta_weight()[m : 2 * m].any()


@pytest.mark.parametrize("kind", ["Linear", "MergedLinear"])
def test_stored_transposed_is_the_same_layer(kind: str) -> None:
    torch.manual_seed(0)
    options = {"enable_lora": [True, False, True]} if kind == "MergedLinear" else {}
    layer = getattr(lora, kind)(7, 12, r=2, **options)
    twin = getattr(lora, kind)(7, 12, r=2, fan_in_fan_out=True, **options)
    train_a_little(layer)
    state = layer.state_dict()
    assert twin.weight.shape == (7, 12) and twin.weight.is_contiguous()
    twin.load_state_dict({**state, "weight": state["weight"].T})
    x = torch.randn(4, 7)
    torch.testing.assert_close(layer(x), twin(x))
    torch.testing.assert_close(layer.delta_weight(), twin.delta_weight().T)


def test_nothing_enabled_is_the_plain_layer() -> None:
    for options in ({"enable_lora": [False, False, False]}, {}):
        layer = lora.MergedLinear(7, 12, r=4, **options)
        x = torch.randn(3, 7)
        layer(x).sum().backward()
        assert layer.weight.grad is not None and set(layer.state_dict()) == {"weight", "bias"}
        layer.eval().merge()
        assert not layer.merged
        assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("kind", ["Linear", "MergedLinear", "Embedding", "Conv1d", "Conv2d"])
def test_rank_zero_is_the_plain_layer(kind: str) -> None:
    torch.manual_seed(0)
    arguments = (4, 6, 3) if kind.startswith("Conv") else (7, 6)
    layer = getattr(lora, kind)(*arguments, r=0)
    assert all(p.requires_grad for p in layer.parameters())
    assert not any("lora_" in name for name in layer.state_dict())
    x = example(layer) if kind != "Embedding" else torch.tensor([0, 6])
    assert torch.equal(layer(x), plain(layer, x, layer.weight))
    assert repr(layer).count("lora_alpha") == 0


@pytest.mark.parametrize("kind", ["Linear", "MergedLinear", "Embedding", "Conv1d", "Conv2d"])
@pytest.mark.parametrize("r", [-1, 2.5, "8", None, True])
def test_bad_rank(kind: str, r: object) -> None:
    arguments = (4, 6, 3) if kind.startswith("Conv") else (7, 6)
    with pytest.raises(ValueError, match=rf"{kind}\(r=.*\): r must be an integer of at least 0"):
        getattr(lora, kind)(*arguments, r=r)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="out_features=10.*must be a multiple"):
        lora.MergedLinear(7, 10, r=2, enable_lora=[True, False, True])
    with pytest.raises(ValueError, match="number of segments"):
        lora.MergedLinear(7, 10, r=2, enable_lora=[])
    with pytest.raises(ValueError, match="dropout probability"):
        lora.Linear(7, 5, r=2, lora_dropout=1.5)


def test_options_of_the_embedding_lookup() -> None:
    """A padding row gains no gradient, `sparse` is no obstacle, max_norm is never cached."""
    torch.manual_seed(0)
    table = lora.Embedding(9, 5, r=2, padding_idx=3)
    ids = torch.tensor([3, 4, 4])
    table(ids).sum().backward()
    assert table.lora_A.grad[:, 4].any() and not table.lora_A.grad[:, 3].any()
    sparse = lora.Embedding(9, 5, r=2, sparse=True)
    with torch.no_grad():
        sparse.lora_A.normal_()
    sparse(ids).sum().backward()
    assert sparse.lora_A.grad[:, 4].any() and sparse.lora_B.grad.any()
    short = lora.Embedding(9, 5, r=2, max_norm=0.5).eval()
    with torch.no_grad():
        short.lora_A.normal_()
        looked_up = short(ids)
        assert short._cached is None
    assert torch.equal(short(ids), looked_up)


def test_bf16_base() -> None:
    """Factors stay fp32, evaluation stays unmerged, an explicit merge says what it loses."""
    torch.manual_seed(0)
    layer = lora.Linear(64, 48, r=4, dtype=torch.bfloat16)
    assert layer.lora_A.dtype == layer.lora_B.dtype == torch.float32
    with torch.no_grad():
        layer.lora_B.normal_(0, 0.01)
    original = layer.weight.clone()
    x = torch.randn(9, 64)
    with torch.no_grad():
        out = layer.eval()(x)
    assert layer._cached is None and out.dtype == torch.bfloat16
    with pytest.warns(UserWarning, match=r"loses \d+% of the update to rounding"):
        layer.merge()
    torch.testing.assert_close(layer(x), out, rtol=0.05, atol=0.05)
    layer.unmerge()
    assert torch.equal(layer.weight, original)
    exact = lora.Linear(64, 48, r=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact.merge()


def test_autocast_evaluation_is_not_merged() -> None:
    layer = lora.Linear(64, 48, r=4).eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 64)).dtype == torch.bfloat16
    assert layer._cached is None


def test_compiles_whole() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        lora.Embedding(11, 6, r=2), lora.Linear(6, 8, r=2), nn.Tanh(),
        lora.MergedLinear(8, 9, r=2, enable_lora=[True, False, True], fan_in_fan_out=True),
    )  # fmt: skip
    for module in model:
        if isinstance(module, lora.LoRALayer):
            with torch.no_grad():
                module.lora_A.normal_()
                module.lora_B.normal_()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids = torch.tensor([[1, 2, 3]])
    for module in (model, compiled):
        module.zero_grad()
        module(ids).square().sum().backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        if module is model:
            expected = gradients
    for got, want in zip(gradients, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(ids), model(ids))


FUSED = [(torch.optim.AdamW, True), (torch.optim.SGD, True), (torch.optim.AdamW, False)]


@pytest.mark.parametrize(("kind", "fused"), FUSED)
@pytest.mark.parametrize("between", [False, True], ids=["after", "also before the step"])
def test_evaluation_in_turn_with_steps_is_never_stale(
    trained: nn.Module, kind: type, fused: bool, between: bool
) -> None:
    """No call of `train` or `eval`; a fused step does not raise the factors' versions."""
    x = example(trained)
    trained.eval()
    optimizer = kind([trained.lora_A, trained.lora_B], lr=0.1, fused=fused)
    for _ in range(3):
        trained(x).square().mean().backward()
        with torch.no_grad():
            before = trained(x) if between else None
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            found = trained(x)
        torch.testing.assert_close(found, trained(x).detach(), rtol=1e-4, atol=1e-4)
        with torch.no_grad():
            assert torch.equal(trained(x), found)
        assert before is None or (found - before).abs().max() > 1e-3


def test_a_pass_that_records_gradients_drops_the_cached_weight(trained: nn.Module) -> None:
    """So writes through `.data`, which leave no trace, are seen by the next evaluation."""
    x = example(trained)
    trained.eval()
    with torch.no_grad():
        trained(x)
    trained(x).square().mean().backward()
    assert trained._cached is None
    for factor in (trained.lora_A, trained.lora_B):
        factor.data -= 0.1 * factor.grad
    with torch.no_grad():
        found = trained(x)
    torch.testing.assert_close(found, trained(x).detach(), rtol=1e-4, atol=1e-4)


def test_a_new_scale_is_seen_without_a_pass_that_records_gradients(trained: nn.Module) -> None:
    x = example(trained)
    trained.eval()
    with torch.no_grad():
        before = trained(x)
        base = plain(trained, x, trained.weight)
        trained.scaling *= 2
        torch.testing.assert_close(trained(x) - base, 2 * (before - base), rtol=1e-3, atol=1e-4)
        assert not torch.equal(trained(x), before)
