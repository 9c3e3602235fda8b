"""loralib's DyLoRA layers: the spec's figures, parity with plain LoRA, merging, a model's rank."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import loralib as lora
from loralib.functional import ActiveRank

R = 5
MAKERS = {
    "Linear": lambda kind, r=R: kind["Linear"](7, 11, r=r, lora_alpha=6),
    "Linear (in, out)": lambda kind, r=R: kind["Linear"](
        7, 11, r=r, lora_alpha=6, fan_in_fan_out=True
    ),
    "MergedLinear": lambda kind, r=R: kind["MergedLinear"](
        7, 12, r=r, lora_alpha=6, enable_lora=[True, False, True]
    ),
    "MergedLinear (in, out)": lambda kind, r=R: kind["MergedLinear"](
        7, 12, r=r, lora_alpha=6, enable_lora=[True, True, False, True], fan_in_fan_out=True
    ),
    "Embedding": lambda kind, r=R: kind["Embedding"](13, 6, r=r, lora_alpha=6, padding_idx=1),
}
NESTED = {
    "Linear": lora.DyLoRALinear,
    "MergedLinear": lora.DyLoRAMergedLinear,
    "Embedding": lora.DyLoRAEmbedding,
}
PLAIN = {"Linear": lora.Linear, "MergedLinear": lora.MergedLinear, "Embedding": lora.Embedding}


def example(layer: nn.Module, rows: int = 6) -> Tensor:
    if isinstance(layer, nn.Embedding):
        return torch.randint(0, layer.num_embeddings, (rows, 3))
    return torch.randn(rows, 3, layer.in_features, dtype=layer.weight.dtype)


@pytest.fixture(params=MAKERS)
def maker(request: pytest.FixtureRequest):
    torch.manual_seed(0)
    return MAKERS[request.param]


@pytest.fixture
def layer(maker) -> nn.Module:
    """A layer whose factors are all non-zero."""
    made = maker(NESTED)
    with torch.no_grad():
        made.lora_A.normal_()
        made.lora_B.normal_()
    return made


def truncated(maker, layer: nn.Module, b: int) -> nn.Module:
    """The plain layer of rank b with the same α, loaded from the exported state."""
    plain = maker(PLAIN, b)
    base = {k: v for k, v in layer.state_dict().items() if "lora_" not in k}
    plain.load_state_dict({**base, **lora.lora_state_dict(layer, rank=b)})
    return plain


# --- the formula ----------------------------------------------------------------------------------
def test_worked_example() -> None:
    layer = lora.DyLoRALinear(2, 2, r=2, lora_alpha=2, bias=False)
    layer.load_state_dict(
        {
            "weight": torch.zeros(2, 2),
            "lora_A": torch.eye(2),
            "lora_B": torch.tensor([[1.0, 1.0], [0.0, 2.0]]),
        }
    )
    x = torch.ones(2)
    cases = {
        (1, False): ([2, 0], [[2, 2], [0, 0]], [[2, 0], [2, 0]]),
        (1, True): ([2, 0], [[2, 2], [0, 0]], [[2, 0], [2, 0]]),
        (2, True): ([2, 2], [[0, 0], [3, 3]], [[0, 1], [0, 1]]),
        (2, False): ([2, 2], [[1, 1], [3, 3]], [[1, 1], [1, 1]]),
    }
    for (rank, frozen), (y, dA, dB) in cases.items():
        layer.zero_grad()
        lora.set_rank(layer, rank, frozen)
        out = layer(x)
        out.sum().backward()
        assert out.tolist() == y
        assert layer.lora_A.grad.tolist() == dA and layer.lora_B.grad.tolist() == dB


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("frozen", [False, True], ids=["normal", "frozen"])
def test_every_rank_is_plain_lora(maker, layer: nn.Module, frozen: bool, training: bool) -> None:
    layer.train(training)
    x = example(layer)
    for b in range(1, R + 1):
        plain = truncated(maker, layer, b).train(training)
        lora.set_rank(layer, b, frozen)
        torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=2e-5)
        torch.testing.assert_close(layer.delta_weight(), plain.delta_weight(), rtol=0, atol=1e-6)
        with torch.no_grad():  # through the merged copy
            torch.testing.assert_close(layer(x), plain(x), rtol=0, atol=2e-5)


def test_at_the_largest_rank_all_is_lora(maker, layer: nn.Module) -> None:
    plain = truncated(maker, layer, R)
    x = example(layer)
    weight = torch.randn_like(plain(x))
    for module in (plain, layer):
        (module(x) * weight).sum().backward()
    assert torch.equal(layer(x), plain(x))
    assert torch.equal(layer.lora_A.grad, plain.lora_A.grad)
    assert torch.equal(layer.lora_B.grad, plain.lora_B.grad)


def reference(layer: nn.Module, x: Tensor, c: int, frozen: bool) -> Tensor:
    """The published code's statement: columns 0 … c of Aᵀ and B, each times √(R/(c + 1)), α/R."""

    def first(columns: Tensor) -> Tensor:
        head, last = columns[:, :c], columns[:, c : c + 1]
        kept = torch.cat([head.detach() if frozen else head, last], dim=1)
        return kept * (R / (c + 1)) ** 0.5

    base = F.linear(x, layer.weight, layer.bias)
    return base + (layer.lora_alpha / R) * (x @ first(layer.lora_A.T) @ first(layer.lora_B).T)


@pytest.mark.parametrize("frozen", [False, True])
def test_equals_the_published_formulation(frozen: bool) -> None:
    torch.manual_seed(0)
    layer = lora.DyLoRALinear(7, 11, r=R, lora_alpha=6, dtype=torch.float64)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(9, 7, dtype=torch.float64, requires_grad=True)
    inputs = (x, layer.lora_A, layer.lora_B)
    for c in range(R):
        lora.set_rank(layer, c + 1, frozen)
        ours, theirs = layer(x), reference(layer, x, c, frozen)
        torch.testing.assert_close(ours, theirs)
        seed = torch.randn_like(ours)
        found = torch.autograd.grad(ours, inputs, seed)
        expected = torch.autograd.grad(theirs, inputs, seed)
        for mine, other in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, other)


# --- gradients ------------------------------------------------------------------------------------
@pytest.mark.parametrize("frozen", [False, True], ids=["normal", "frozen"])
def test_gradients_are_nonzero_exactly_where_they_should_be(
    maker, layer: nn.Module, frozen: bool
) -> None:
    x, outputs = example(layer), {}
    for b in range(1, R + 1):
        layer.zero_grad()
        lora.set_rank(layer, b, frozen)
        outputs[b] = layer(x)
        outputs[b].square().sum().backward()
        segments = layer.lora_A.shape[0] // R
        live_A = layer.lora_A.grad.view(segments, R, -1).abs().sum((0, 2)) != 0
        live_B = layer.lora_B.grad.abs().sum(0) != 0
        expected = [(b == j if frozen else j <= b) for j in range(1, R + 1)]
        assert live_A.tolist() == expected and live_B.tolist() == expected
        lora.set_rank(layer, b, not frozen)
        torch.testing.assert_close(layer(x), outputs[b], rtol=0, atol=1e-5)
    assert layer.weight.grad is None


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradcheck(frozen: bool, p: float) -> None:
    torch.manual_seed(0)
    for layer in (
        lora.DyLoRALinear(3, 4, r=3, lora_dropout=p, dtype=torch.float64),
        lora.DyLoRAMergedLinear(
            3, 6, r=3, enable_lora=[True, False, True], lora_dropout=p, dtype=torch.float64
        ),
    ):
        x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
        B = torch.randn_like(layer.lora_B).requires_grad_()
        A = layer.lora_A.detach().clone().requires_grad_()

        def run(x: Tensor, A: Tensor, B: Tensor, layer: nn.Module = layer) -> Tensor:
            torch.manual_seed(7)  # the same dropout mask every time
            return torch.func.functional_call(layer, {"lora_A": A, "lora_B": B}, (x,))

        for b in (1, 2, 3):
            lora.set_rank(layer, b)
            assert torch.autograd.gradcheck(run, (x, A, B))
            if frozen:  # constants below row b: compared with the gradients of the normal mode
                dx, dA, dB = torch.autograd.grad(run(x, A, B).square().sum(), (x, A, B))
                lora.set_rank(layer, b, frozen=True)
                found = torch.autograd.grad(run(x, A, B).square().sum(), (x, A, B))
                torch.testing.assert_close(found[0], dx)
                rows = slice(b - 1, b)
                blocks, wanted = found[1].view(-1, 3, 3), dA.view(-1, 3, 3)
                torch.testing.assert_close(blocks[:, rows], wanted[:, rows])
                torch.testing.assert_close(found[2][:, rows], dB[:, rows])


def test_bf16_base_has_fp32_factors_and_gradients() -> None:
    torch.manual_seed(0)
    layer = lora.DyLoRALinear(24, 17, r=4, lora_alpha=8, dtype=torch.bfloat16)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 24)
    lora.set_rank(layer, 3, frozen=True)
    out = layer(x)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and layer.lora_A.grad.dtype == torch.float32
    exact = F.linear(x, layer.weight.float() + layer.delta_weight(), layer.bias.float())
    torch.testing.assert_close(out.float(), exact, rtol=0.03, atol=0.1)
    assert layer.lora_A.grad[2].any() and not layer.lora_A.grad[[0, 1, 3]].any()


# --- merging --------------------------------------------------------------------------------------
def test_merge_change_rank_unmerge_restores_the_weight(layer: nn.Module) -> None:
    before, x = layer.weight.clone(), example(layer)
    layer.eval()
    outputs = {}
    for b in (4, 2, 5):
        lora.set_rank(layer, b)
        outputs[b] = layer(x).detach()
    layer.merge()
    for b in (2, 5, 4):
        lora.set_rank(layer, b)  # merges anew
        assert layer.merged and not torch.equal(layer.weight, before)
        torch.testing.assert_close(layer(x), outputs[b], rtol=0, atol=2e-5)
    layer.unmerge()
    assert torch.equal(layer.weight, before)
    torch.testing.assert_close(layer(x), outputs[4], rtol=0, atol=2e-5)


def test_merged_copies_of_evaluation_follow_the_rank(layer: nn.Module) -> None:
    x = example(layer)
    layer.eval()
    with torch.no_grad():
        for b in (1, 5, 1, 3):
            lora.set_rank(layer, b)
            cached = layer(x)
            with torch.enable_grad():
                torch.testing.assert_close(cached, layer(x).detach(), rtol=0, atol=2e-5)


# --- the ranks of a model -------------------------------------------------------------------------
def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(
        lora.DyLoRAEmbedding(13, 8, r=R, lora_alpha=3),
        lora.DyLoRAMergedLinear(8, 12, r=R, lora_alpha=3, enable_lora=[True, False, True]),
        nn.GELU(),
        lora.DyLoRALinear(12, 5, r=R, lora_alpha=3),
    )
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.3)
    return made


def test_rank_is_largest_at_first_and_1_based() -> None:
    made = model()
    assert lora.get_rank(made) == R
    for bad in (0, R + 1, -1, 2.0, True, None, "3"):
        with pytest.raises(ValueError, match=f"from 1 to R={R}"):
            lora.set_rank(made, bad)
        assert lora.get_rank(made) == R
    lora.set_rank(made[3], 2)
    with pytest.raises(ValueError, match="different ranks"):
        lora.get_rank(made)
    with pytest.raises(ValueError, match="no layers with nested factors"):
        lora.set_rank(nn.Sequential(lora.Linear(3, 3, r=2), lora.DyLoRALinear(3, 3)), 1)


def test_at_rank_restores_even_after_an_error() -> None:
    made = model().eval()
    ids = torch.arange(6)
    full = made(ids)
    lora.set_rank(made, 4, frozen=True)
    with pytest.raises(KeyError), lora.at_rank(made, 2):
        assert lora.get_rank(made) == 2
        raise KeyError
    assert lora.get_rank(made) == 4 and made[3].nested.chosen == (3, 4)
    with lora.at_rank(made, R):
        assert torch.equal(made(ids), full)


def test_a_drawn_rank_is_for_training_only() -> None:
    made = model()
    for layer in (made[0], made[1], made[3]):
        layer.nested.sampled = ActiveRank(1, 2)
    assert lora.get_rank(made) == 2 and lora.get_rank(made.eval()) == R
    with lora.at_rank(made, 3):
        assert lora.get_rank(made) == 3
        made.train()
        assert lora.get_rank(made) == 2
    made.eval()
    made[3].merge()  # an evaluation's weight, so at the evaluation's rank
    torch.testing.assert_close(made[3].weight - made[3]._original, made[3].delta_weight())


@pytest.mark.parametrize("shape", [(4,), (2, 3)], ids=["packed", "padded"])
@pytest.mark.parametrize("grad", [True, False])
def test_batched_ranks_is_every_rank_at_once(shape: tuple[int, ...], grad: bool) -> None:
    made, ranks = model().eval(), [3, 1, R, 1]
    ids = torch.randint(0, 13, shape)
    with torch.set_grad_enabled(grad):
        expected = []
        for b in ranks:
            with lora.at_rank(made, b):
                expected.append(made(ids))
        stacked = ids.repeat(len(ranks), *(1,) * (ids.dim() - 1))
        with lora.batched_ranks(made, ranks):
            found = made(stacked).chunk(len(ranks))
        if shape == (4,):  # three rows of nobody's at the end
            filled = torch.cat([stacked, torch.zeros(3, dtype=torch.long)])
            with lora.batched_ranks(made, ranks, tokens=4):
                torch.testing.assert_close(made(filled)[:16].chunk(4), found)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
    assert lora.get_rank(made) == R and made[3].nested.batched is None


def test_batched_ranks_refuses() -> None:
    made = model()
    with pytest.raises(ValueError, match="training mode"), lora.batched_ranks(made, [1, 2]):
        pass
    made.eval()
    for bad in ([0, 1], [1, R + 1]):
        with pytest.raises(ValueError, match="from 1 to"), lora.batched_ranks(made, bad):
            pass
    with pytest.raises(ValueError, match="no ranks"), lora.batched_ranks(made, []):
        pass
    with pytest.raises(ValueError, match="2 equal parts"), lora.batched_ranks(made, [1, 2]):
        made(torch.arange(5))
    assert all(layer.nested.batched is None for layer in (made[0], made[1], made[3]))
    made[1].merge()
    with pytest.raises(ValueError, match="merged"), lora.batched_ranks(made, [1, 2]):
        pass


# --- files, copies, bad arguments -----------------------------------------------------------------
def test_state_dict_is_that_of_lora(maker, layer: nn.Module) -> None:
    plain = maker(PLAIN)
    assert {k: v.shape for k, v in layer.state_dict().items()} == {
        k: v.shape for k, v in plain.state_dict().items()
    }
    lora.set_rank(layer, 2)
    fresh = maker(NESTED)
    fresh.load_state_dict(layer.state_dict())
    assert lora.get_rank(fresh) == R  # the rank is not saved
    lora.set_rank(fresh, 2)
    x = example(layer)
    for other in (fresh, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert lora.get_rank(other) == 2 and torch.equal(other(x), layer(x))


def test_export_of_a_model_at_a_rank() -> None:
    made = model().eval()
    state = lora.lora_state_dict(made, rank=2)
    assert state["1.lora_A"].shape == (4, 8) and state["1.lora_B"].shape == (8, 2)
    assert lora.lora_state_dict(made)["1.lora_A"].shape == (2 * R, 8)
    with pytest.raises(ValueError, match="from 1 to"):
        lora.lora_state_dict(made, rank=6)


def test_plain_layer_and_max_norm() -> None:
    layer = lora.DyLoRALinear(3, 4)
    assert torch.equal(layer(torch.ones(3)), F.linear(torch.ones(3), layer.weight, layer.bias))
    assert "rank" not in repr(layer) and "rank=2" in repr(lora.DyLoRALinear(3, 4, r=2))
    with pytest.raises(ValueError, match="max_norm"):
        lora.DyLoRAEmbedding(5, 3, r=2, max_norm=1.0)
