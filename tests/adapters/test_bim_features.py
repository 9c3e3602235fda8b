"""Features, labels, network, first masks and temperatures: the spec's examples and facts."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.bim_tiny import SIZES, adamw, base, batches, loss_of, tiny
from torch import Tensor, nn

import transformers_patched
from peft_custom import BimLoraConfig, attach, inject_adapter_in_model
from peft_custom.hooks import MicroBatch, TrainingHooks
from peft_custom.tuners.bim_lora import (
    BIMLoRALinear,
    FeatureCollector,
    ImplicitMLP,
    masks,
    reference,
)
from peft_custom.tuners.bim_lora.features import (
    Features,
    Moments,
    block_means,
    block_sums,
    kinds_of,
    layer_position,
    moments_of,
    normalised,
)
from peft_custom.tuners.bim_lora.importance import network_inputs, soft_labels, train_mlp

VALUE = "encoder.layer.0.attention.self.value"


class Named(nn.Module):
    """A model with one linear layer called `name`."""

    def __init__(self, name: str, layer: nn.Module, layers: int) -> None:
        super().__init__()
        module: nn.Module = self
        *path, leaf = name.split(".")
        for part in path:
            module.add_module(part, nn.Module())
            module = module.get_submodule(part)
        module.add_module(leaf, layer)
        self.name = name
        self.config = type("Config", (), {"num_hidden_layers": layers})()

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self.name)(x)


def example_A(**options) -> tuple[Named, FeatureCollector]:
    W = [[1, 2, 0, 1], [-1, 0, 3, 0], [0.5, 0.5, 1, -1], [0.5, 0.5, 1, 1]]
    layer = nn.Linear(4, 4)
    layer.weight.data = torch.tensor(W)
    model = Named(VALUE, layer, layers=2)
    config = BimLoraConfig(r=1, block_size=2, target_modules=[VALUE], **options)
    inject_adapter_in_model(config, model)
    return model, FeatureCollector(model, config)


X = [[[1, 0, 2, -1], [0, 1, 0, 1.0]], [[1, 1, -2, 0], [2, 0, 0, 0.0]]]
G = [
    [[0.1, 0.3, 0, 0.1], [-0.2, 0, 0.4, 0.1]],
    [[-0.1, 0.1, 0, 0.2], [0.1, -0.2, 0.3, 0]],
]


def run_A(model: Named, collector: FeatureCollector, scale: float = 1.0) -> None:
    collector.register_hooks()
    for x, g in zip(X, G, strict=True):
        (scale * torch.tensor(g) * model(torch.tensor(x))).sum().backward()
        collector.update()


@pytest.mark.parametrize("compat", [False, True])
def test_worked_example_A(compat: bool) -> None:
    model, collector = example_A(reference_compat=compat)
    run_A(model, collector)
    values = collector.collected().values
    wanted = torch.tensor(
        [
            [0.15, 0.00125, 0.375, 2.449490, 0.5, 0.333],
            [0.225, 0.02125, 1.25, 3.162278, 0.5, 0.333],
            [0.2, 0.03375, 0.375, 1, 0.5, 0.333],
            [0.125, 0.0125, 1.25, 2, 0.5, 0.333],
        ]
    )
    torch.testing.assert_close(values, wanted, rtol=0, atol=4e-7)
    hats, rows = collector.finalize()
    wanted = torch.tensor(
        [
            [0.688683, 0.037635, 0.392702, 0.868283],
            [1, 0.633489, 1, 1],
            [0.898398, 1, 0.392702, 0.486057],
            [0.580381, 0.374252, 1, 0.770382],
        ]
    )
    torch.testing.assert_close(hats[:, :4], wanted, rtol=0, atol=1e-5)
    assert rows[2] == {"module_name": VALUE, "block_idx": (1, 0)}
    assert not any(p.grad is not None for n, p in model.named_parameters() if "base_layer" in n)


def test_fact_5_scaling_and_invariance() -> None:
    (one, first), (two, second) = example_A(), example_A()
    run_A(one, first)
    run_A(two, second, scale=3.0)
    F, scaled = first.collected().values, second.collected().values
    torch.testing.assert_close(scaled[:, 0], 3.0 * F[:, 0])
    torch.testing.assert_close(scaled[:, 1], 9.0 * F[:, 1])
    assert torch.equal(scaled[:, 2:], F[:, 2:])
    hats = normalised(F)
    assert bool((hats >= 0).all() and (hats <= 1).all())
    torch.testing.assert_close(hats[:, :4].amax(0), torch.ones(4))


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 2**20))
def test_moments_are_those_of_all_rows(sizes: list[int], seed: int) -> None:
    """Merged chunk by chunk, whatever the chunks; a common offset does not spoil the variance."""
    rows = 1000.0 + torch.randn(sum(sizes), 3, generator=torch.Generator().manual_seed(seed))
    found = Moments()
    for part in rows.split(sizes):
        found.merge(*moments_of(part))
    if len(rows):
        wanted = rows.double().var(0, correction=0) * len(rows)
        torch.testing.assert_close(found.squares, wanted, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(found.mean, rows.double().mean(0))


def test_fact_15_ragged_blocks() -> None:
    W = torch.arange(1.0, 16.0).view(5, 3)
    counts = block_sums(torch.ones(5, 3), 2)
    assert counts.tolist() == [[4, 2], [4, 2], [2, 1]]
    wanted = torch.tensor([[3, 4.5], [9, 10.5], [13.5, 15]])
    torch.testing.assert_close(block_means(W, 2), wanted)
    norms = block_sums(W.square(), 2).sqrt()
    wanted = torch.tensor([[6.7823, 6.7082], [18.2757, 15], [19.1050, 15]])
    torch.testing.assert_close(norms, wanted, rtol=0, atol=6e-5)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 17), st.integers(1, 17), st.integers(1, 8), st.integers(0, 2**20))
def test_block_sums_cover_everything_once(rows, columns, b, seed) -> None:
    t = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    found = block_sums(t, b)
    for o in range(found.shape[0]):
        for j in range(found.shape[1]):
            part = t[o * b : (o + 1) * b, j * b : (j + 1) * b]
            assert math.isclose(float(found[o, j]), float(part.sum()), abs_tol=1e-4)


def test_padding_and_accumulation() -> None:
    """Pads do not count; two micro-batches with accumulation are one gradient, their mean."""
    values = []
    for accumulation in (1, 2):
        model = tiny(collection_accumulation=accumulation)
        [whole] = batches(1, rows=4)
        micro = [whole]
        if accumulation == 2:
            micro = [{k: v[:2] for k, v in whole.items()}, {k: v[2:] for k, v in whole.items()}]
        collector = FeatureCollector(model.get_base_model(), model.peft_config["default"])
        collector.pending = accumulation
        collector.register_hooks()
        for batch in micro:
            model(**batch).loss.backward()
            collector.update()
        assert collector.steps == 1
        values.append(collector.collected().values)
    torch.testing.assert_close(values[0], values[1], rtol=1e-4, atol=1e-9)

    model = tiny()
    collector = FeatureCollector(model.get_base_model(), model.peft_config["default"])
    collector.register_hooks()
    model(**whole).loss.backward()
    real = int(whole["attention_mask"].sum())
    counts = {n: s.inputs.count for n, s in collector.statistics.items()}
    assert counts.pop("bert.pooler.dense") == 4  # a row per sequence: no padding among them
    assert set(counts.values()) == {real}
    everything = {k: v for k, v in whole.items() if k != "attention_mask"}
    everything["input_ids"] = everything["input_ids"].clamp(min=1)
    model(**everything).loss.backward()
    assert next(iter(collector.statistics.values())).inputs.count == real + 32


def test_features_equal_those_of_autograds_own_weight_gradients() -> None:
    """An independent route: unfreeze W, take ∂L/∂W of every batch, average as the formulas say."""
    model, given = tiny(), batches(3)
    name = "bert.encoder.layer.1.intermediate.dense"
    collector = FeatureCollector(model.get_base_model(), model.peft_config["default"])
    collector.register_hooks()
    for batch in given:
        model(**batch).loss.backward()
        collector.update()
    features = collector.collected()
    [part] = [part for part in features.table if part.name == name]
    W = model.get_base_model().get_submodule(name).base_layer.weight
    W.requires_grad_(True)
    found = torch.stack([torch.autograd.grad(model(**b).loss, W)[0] for b in given]).double()
    a = found.abs().mean(0)
    v = found.square().mean(0) - a.square()
    F1, F2 = (part.view(features.values[:, k]) for k in (0, 1))
    torch.testing.assert_close(F1, block_means(a, 5).float(), rtol=1e-4, atol=1e-9)
    torch.testing.assert_close(F2, block_means(v, 5).float(), rtol=1e-3, atol=1e-12)
    assert layer_position(name, 2) == 1.0


def test_saved_features_are_read_back(tmp_path) -> None:
    model, collector = example_A()
    run_A(model, collector)
    features = collector.collected()
    features.save(tmp_path / "deep" / "features.safetensors")
    again = Features.load(tmp_path / "deep" / "features.safetensors")
    assert torch.equal(again.values, features.values) and again.table == features.table
    hats, _ = FeatureCollector(model, BimLoraConfig(block_size=2)).load_features(
        tmp_path / "deep" / "features.safetensors"
    )
    assert torch.equal(hats, normalised(features.values))
    (tmp_path / "bad").write_bytes(b"no features")
    with pytest.raises(ValueError, match="no features of blocks"):
        Features.load(tmp_path / "bad")


def test_kinds_and_positions() -> None:
    known = {
        "roberta.encoder.layer.0.attention.self.query": ("query", 0.0, 1 / 12),
        "roberta.encoder.layer.11.output.dense": ("output", 0.833, 1.0),
        "roberta.encoder.layer.3.attention.output.dense": ("attention_output", 0.5, 4 / 12),
        "roberta.encoder.layer.3.intermediate.dense": ("intermediate", 0.667, 4 / 12),
        "classifier.dense": ("classifier", 1.0, 1.0),
        "model.layers.5.self_attn.v_proj": ("value", 0.333, 0.5),
        "deberta.encoder.layer.0.attention.self.key_proj": ("key", 0.167, 1 / 12),
        "transformer.h.2.mlp.c_fc": ("intermediate", 0.667, 0.25),
        "transformer.h.2.mlp.c_proj": ("output", 0.833, 0.25),
        "transformer.h.2.attn.c_proj": ("attention_output", 0.5, 0.25),
        "something.else": ("other", 0.25, 0.5),
    }
    from peft_custom.tuners.bim_lora.features import KINDS

    for name, (kind, code, position) in known.items():
        assert kinds_of(name) == (kind,), name
        assert KINDS[kind].code == code
        assert layer_position(name, 12) == pytest.approx(position)
    assert kinds_of("transformer.h.0.attn.c_attn") == ("query", "key", "value")


def test_fused_projections_have_a_kind_per_segment() -> None:
    model = Named("h.0.attn.c_attn", nn.Linear(4, 12), layers=1)
    config = BimLoraConfig(r=1, block_size=2, target_modules=["c_attn"])
    inject_adapter_in_model(config, model)
    collector = FeatureCollector(model, config)
    collector.register_hooks()
    model(torch.randn(3, 4)).square().sum().backward()
    collector.update()
    features = collector.collected()
    codes = features.table[0].view(features.values[:, 5])[:, 0]
    torch.testing.assert_close(codes, torch.tensor([0, 0, 0.167, 0.167, 0.333, 0.333]))
    P = masks.initial_probabilities("h.0.attn.c_attn", torch.zeros(6, 2), 0.0)
    torch.testing.assert_close(P[:, 0], torch.tensor([0.02, 0.02, 0.05, 0.05, 0.12, 0.12]))


# --- labels and network ---------------------------------------------------------------------------
ROWS_B = [
    [0.10, 0.01, 0.30, 0.60, 1 / 12, 0], [0.40, 0.20, 0.30, 0.70, 0.5, 0.333],
    [0.05, 0.002, 0.10, 0.50, 0.5, 0.5], [0.90, 0.80, 0.60, 0.90, 0.75, 0.667],
    [0.20, 0.05, 0.20, 0.65, 1, 0.833], [1, 1, 1, 0.40, 1, 1],
]  # fmt: skip


def test_worked_example_B() -> None:
    found = soft_labels(torch.tensor(ROWS_B))
    wanted = torch.tensor([0.124855, 0.875145, 0.066188, 0.933812, 0.670977, 0.329023])
    torch.testing.assert_close(found, wanted, rtol=0, atol=6e-7)


def random_features(n: int, seed: int = 0) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    F = torch.randn(n, 6, generator=made).exp()
    F[:, 4] = torch.randint(1, 13, (n,), generator=made) / 12
    F[:, 5] = torch.tensor([0, 0.167, 0.333, 0.5, 0.667, 0.833])[
        torch.randint(0, 6, (n,), generator=made)
    ]
    return F


def test_fact_4_distribution_of_labels() -> None:
    hats = normalised(random_features(20_000))
    labels = soft_labels(hats).double()
    assert float(labels.min()) == pytest.approx(0.066188, abs=1e-6)
    assert float(labels.max()) == pytest.approx(0.933812, abs=1e-6)
    assert float(labels.mean()) == pytest.approx(0.5, abs=1e-4)
    assert float(labels.std()) == pytest.approx(0.3239, abs=1e-4)
    entropy = -(labels * labels.log() + (1 - labels) * (1 - labels).log()).mean()
    assert float(entropy) == pytest.approx(0.4549, abs=1e-4)
    torch.testing.assert_close(labels.sort().values, 1 - labels.sort(descending=True).values)
    noisy = soft_labels(hats, noise=0.02, seed=1)
    assert torch.equal(noisy, soft_labels(hats, noise=0.02, seed=1))
    assert 0.01 <= float(noisy.min()) and float(noisy.max()) <= 0.99
    assert 0.005 < float((noisy - labels.float()).std()) < 0.02


def test_ties_share_a_label_and_one_block_has_one() -> None:
    same = torch.tensor(ROWS_B[:1] * 5)
    torch.testing.assert_close(soft_labels(same), torch.full((5,), 0.5))
    torch.testing.assert_close(soft_labels(same[:1]), torch.tensor([0.5]))


@pytest.mark.parametrize("compat", [False, True])
def test_network_shapes_and_size(compat: bool) -> None:
    mlp = ImplicitMLP(BimLoraConfig(reference_compat=compat, num_train_epochs=1))
    assert sum(p.numel() for p in mlp.parameters()) == (2573 if compat else 2561)
    for n in (1, 7):
        scores = mlp(torch.rand(n, 6))
        assert scores.shape == (n,) and bool((scores > 0).all() and (scores < 1).all())
        assert torch.equal(
            mlp.predict_batch(torch.ones(n, 6), 3), mlp.predict_batch(torch.ones(n, 6))
        )


def spearman(a: Tensor, b: Tensor) -> float:
    return statistics.correlation(*(v.argsort().argsort().double().tolist() for v in (a, b)))


def test_standardised_inputs_learn_the_ranking_and_the_layer_norm_does_not() -> None:
    """Within one matrix kind and layer, where F5 and F6 cannot help."""
    values = random_features(20_000)
    values[:, :4] *= torch.tensor([1e-4, 1e-9, 1.0, 1.0])
    hats = normalised(values)
    labels = soft_labels(hats)
    same = (values[:, 5] == 0.5) & (values[:, 4] == 0.5)
    agreement = {}
    for compat in (False, True):
        config = BimLoraConfig(reference_compat=compat, mlp_batch_size=1024, mlp_epochs=12)
        mlp, inputs = ImplicitMLP(config), hats if compat else network_inputs(values)
        history = train_mlp(mlp, inputs, labels, config, seed=1)
        agreement[compat] = spearman(mlp.predict_batch(inputs)[same], labels[same])
        again = ImplicitMLP(config)
        train_mlp(again, inputs, labels, config, seed=1)
        assert torch.equal(mlp.predict_batch(inputs), again.predict_batch(inputs))
    assert agreement[False] > 0.95 > agreement[True]
    assert len(history["val_loss"]) == 12


def test_the_network_keeps_its_best_state() -> None:
    """The lowest validation loss is that of the returned network, though training went on."""
    values = random_features(300)
    config = BimLoraConfig(mlp_lr=0.3, mlp_epochs=30, mlp_batch_size=32, mlp_dropout=0.0,
                           mlp_early_stop_patience=30, mlp_val_split=0.5)  # fmt: skip
    mlp, inputs = ImplicitMLP(config), network_inputs(values)
    labels = torch.rand(300, generator=torch.Generator().manual_seed(0))
    history = train_mlp(mlp, inputs, labels, config)
    assert history["val_loss"][-1] > min(history["val_loss"])
    from peft_custom.rng import generator

    held = torch.randperm(300, generator=generator(0, 0x5917))[:150]
    loss = nn.functional.binary_cross_entropy(mlp(inputs[held]), labels[held]).detach()
    assert float(loss) == pytest.approx(min(history["val_loss"]), rel=1e-5)


# --- masks and temperatures -----------------------------------------------------------------------
def test_worked_example_D() -> None:
    value, out, query = "l.attention.self.value", "l.attention.output.dense", "l.self.query"
    P = masks.initial_probabilities(value, torch.tensor([[0.5]]), 0.25)
    assert masks.mask_range("value", 0.25) == pytest.approx((0.135, 0.48))
    assert float(P) == pytest.approx(0.3075)
    Z = masks.logits(P)
    assert float(Z) == pytest.approx(-0.811833, abs=1e-6)
    for tau, m in zip(
        (1.5, 1.4, 1.0, 0.8, 0.6, 0.45),
        (0.367903, 0.358960, 0.3075, 0.266043, 0.205371, 0.141356),
        strict=True,
    ):
        assert float(torch.sigmoid(Z / tau)) == pytest.approx(m, abs=1e-6)
    P = masks.initial_probabilities(out, torch.tensor([[0.9]]), 1.0)
    Z = masks.logits(P)
    assert float(P) == pytest.approx(0.674) and float(Z) == pytest.approx(0.726333, abs=1e-6)
    assert float(torch.sigmoid(Z / 0.45)) == pytest.approx(0.833976, abs=1e-6)
    P = masks.initial_probabilities(query, torch.tensor([[0.0]]), 0.0)
    Z = masks.logits(P)
    assert float(P) == pytest.approx(0.02) and float(Z) == pytest.approx(-3.891820, abs=1e-5)
    assert float(torch.sigmoid(Z / 1.4)) == pytest.approx(0.058422, abs=1e-6)
    assert float(torch.sigmoid(masks.logits(P, 1.4) / 1.4)) == pytest.approx(0.02, abs=1e-6)
    assert float(masks.initial_probabilities("x", torch.tensor([[0.5]]), None)) == pytest.approx(
        0.3
    )


def test_fact_7_temperatures_by_epoch_and_by_fraction() -> None:
    wanted = [1.4] * 6 + [1.0] * 6 + [0.8] * 8 + [0.6] * 6 + [0.45] * 4
    assert [reference.temperature_of_epoch(epoch) for epoch in range(30)] == wanted
    config = BimLoraConfig(reference_compat=True, num_train_epochs=30)
    table = masks.resolve_table(config, TrainingHooks(300))
    assert [masks.temperature_at(10 * e + 5, config, table) for e in range(30)] == wanted
    config = BimLoraConfig()
    table = masks.resolve_table(config, TrainingHooks(7))  # anneals however short the run is
    assert masks.temperature_at(0, config, table) == 1.4
    assert masks.temperature_at(6, config, table) == 0.45
    with pytest.raises(ValueError, match="num_train_epochs"):
        masks.resolve_table(BimLoraConfig(reference_compat=True), TrainingHooks(7))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["table", "exponential", "constant"]), st.integers(1, 400),
    st.floats(0.05, 3.0), st.floats(0.5, 1.0), st.integers(1, 50),
)  # fmt: skip
def test_temperatures_fall_and_never_reach_zero(kind, T, tau, rho, k) -> None:
    config = BimLoraConfig(temperature_schedule=kind, mask_temperature=tau,
                           temperature_decay_rate=rho, temperature_decay_steps=k)  # fmt: skip
    table = masks.resolve_table(config, TrainingHooks(T))
    found = [masks.temperature_at(t, config, table) for t in range(T)]
    assert all(a >= b for a, b in zip(found, found[1:], strict=False)) or tau < 0.1
    assert min(found) > 0
    Z = torch.linspace(-3, 3, 13)
    m = torch.stack([torch.sigmoid(Z / t) for t in (1.4, 0.45)])
    assert bool(((m[1] - 0.5).abs() >= (m[0] - 0.5).abs()).all()) and float(m[0, 6]) == 0.5


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["a.query", "a.value", "x.output.dense", "h.c_attn", "odd"]),
    st.floats(0, 1), st.floats(0, 1), st.floats(0, 1),
)  # fmt: skip
def test_first_masks_rise_with_score_and_importance(name, low, high, importance) -> None:
    low, high = sorted((low, high))
    P = [
        masks.initial_probabilities(name, torch.full((3, 2), s), i)
        for s, i in ((low, importance), (high, importance), (high, 1.0))
    ]
    assert bool((P[0] <= P[1]).all() and (P[1] <= P[2] + 1e-6).all())
    assert float(P[0].min()) >= 0.01 - 1e-7 and float(P[2].max()) <= 0.99


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"r": 0}, "r=0"), ({"block_size": 0}, "block_size=0"),
        ({"mask_init": "best"}, "mlp, features, random, constant"),
        ({"temperature_table": [[0.5, 1.0]]}, "temperature_table"),
        ({"temperature_table": [[0.0, -1.0]]}, "temperature_table"),
        ({"feature_weights": [1.0]}, "feature_weights"),
        ({"hard_mask_threshold": 1.5}, "hard_mask_threshold"),
        ({"lora_dropout": 1.0}, "lora_dropout"),
    ],
)  # fmt: skip
def test_bad_options_are_named(options: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        BimLoraConfig(**options)


def test_fact_6_sizes_at_roberta_base() -> None:
    """73 modules and 5,345,280 blocks at b = 4, counted on a model without storage."""
    import transformers

    with torch.device("meta"):
        config = transformers.RobertaConfig(vocab_size=50265, max_position_embeddings=514)
        model = transformers.RobertaForSequenceClassification(config)
        inject_adapter_in_model(
            BimLoraConfig(
                r=16, block_size=4, modules_to_save=["classifier.out_proj"],
                target_modules=["query", "key", "value", "dense"],
            ),
            model,
        )  # fmt: skip
    layers = [m for m in model.modules() if isinstance(m, BIMLoRALinear)]
    assert len(layers) == 73
    assert sum(m.n_blocks_total for m in layers) == 5_345_280
    assert sum(m.lora_A.numel() + m.lora_B.numel() for m in layers) == 2_678_784


def test_gradient_checkpointing_and_shared_layers_count_once() -> None:
    """Recomputed passes do not add inputs twice; a layer used twice has one gradient, the sum."""
    layer = nn.Linear(4, 4)
    model = Named("twice", layer, layers=1)
    inject_adapter_in_model(BimLoraConfig(r=1, block_size=2, target_modules=["twice"]), model)
    collector = FeatureCollector(model, BimLoraConfig(block_size=2))
    collector.register_hooks()
    x = torch.randn(5, 4, requires_grad=True)
    run = torch.utils.checkpoint.checkpoint
    y = run(model, run(model, x, use_reentrant=False), use_reentrant=False)
    y.square().sum().backward()
    collector.update()
    [found] = collector.statistics.values()
    assert found.steps == 1 and found.inputs.count == 10
    W = layer.weight.detach().requires_grad_()
    f = nn.functional.linear
    [wanted] = torch.autograd.grad(f(f(x, W, layer.bias), W, layer.bias).square().sum(), W)
    torch.testing.assert_close(found.absolute, wanted.abs())


def test_a_layer_without_gradient_is_named() -> None:
    model = base()
    inject_adapter_in_model(BimLoraConfig(block_size=4, modules_to_save=["classifier"]), model)
    collector = FeatureCollector(model, BimLoraConfig(block_size=4))
    with pytest.raises(ValueError, match="no gradient reached"):
        collector.collected()
    loss_of(model)


# --- how the rows of a step are cut ---------------------------------------------------------------
def our_model(kind: str) -> nn.Module:
    """A classifier of this project's, whose last layer may be computed for first tokens alone."""
    torch.manual_seed(0)
    options = {**SIZES, "vocab_size": 50}
    if kind == "DebertaV2":
        options |= {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]}
        options |= {"share_att_key": True, "position_buckets": 4, "type_vocab_size": 0}
    config = getattr(transformers_patched, f"{kind}Config")(**options)
    return getattr(transformers_patched, f"{kind}ForSequenceClassification")(config).train()


def packed(batch: dict[str, Tensor]) -> dict[str, Any]:
    real = batch["attention_mask"].bool()
    ends = real.sum(1).cumsum(0)
    bounds = torch.cat([torch.zeros(1), ends]).to(torch.int32)
    where = {"cu_seqlens": bounds, "max_seqlen": int(real.sum(1).max())}
    return {"input_ids": batch["input_ids"][real], "labels": batch["labels"], **where}


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DebertaV2"])
def test_all_tokens_count_in_every_layer_and_nothing_else(kind: str) -> None:
    """Not first tokens alone in the last layer, no padding, no filler, no relative positions."""
    model = our_model(kind)
    inject_adapter_in_model(BimLoraConfig(r=1, block_size=4, target_modules="all-linear"), model)
    [batch] = batches(1)
    real = int(batch["attention_mask"].sum())
    inputs = {}
    for name, words in (("padded", batch), ("packed", packed(batch))):
        collector = FeatureCollector(model, BimLoraConfig(block_size=4))
        collector.register_hooks()
        model(**words).loss.backward()
        collector.update()
        found = {n: s.inputs for n, s in collector.statistics.items()}
        assert {s.count for n, s in found.items() if "encoder" in n} == {real}
        collector.remove_hooks()
        inputs[name] = found
    for name, padded_inputs in inputs["padded"].items():
        other = inputs["packed"][name]
        assert padded_inputs.count == other.count
        torch.testing.assert_close(padded_inputs.squares, other.squares, rtol=1e-5, atol=1e-9)


class WithTable(nn.Module):
    """Its layer also gets a table of as many rows as there are packed tokens."""

    shared_row_layers = ("key",)

    def __init__(self) -> None:
        super().__init__()
        self.words, self.key = nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, input_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        table = torch.ones(len(input_ids), 4)
        return (self.key(self.words(input_ids)) * self.key(table)).square().sum()


def test_rows_of_the_model_do_not_count_though_their_shape_is_the_tokens() -> None:
    model = WithTable()
    inject_adapter_in_model(BimLoraConfig(r=1, block_size=2, target_modules=["key"]), model)
    collector = FeatureCollector(model, BimLoraConfig(block_size=2))
    collector.register_hooks()
    ids = torch.tensor([1, 2, 3, 4, 5])
    model(ids, cu_seqlens=torch.tensor([0, 3, 5])).backward()
    collector.update()
    [found] = collector.statistics.values()
    wanted = model.words(ids).double().var(0, correction=0)
    assert found.inputs.count == 5
    torch.testing.assert_close(found.inputs.squares, 5 * wanted, rtol=1e-5, atol=1e-6)


def test_a_pass_in_training_is_not_asked_for_all_tokens() -> None:
    """Only while features are collected: afterwards the last layer is short again."""
    model = our_model("Bert")
    inject_adapter_in_model(BimLoraConfig(r=1, block_size=4, target_modules="all-linear"), model)
    last, shapes = model.bert.encoder.layer[-1].output.dense, []
    last.register_forward_hook(lambda module, args, y: shapes.append(args[0].shape[:-1]))
    [batch] = batches(1)
    collector = FeatureCollector(model, BimLoraConfig(block_size=4))
    collector.register_hooks()
    model(**batch)
    collector.remove_hooks()
    model(**batch)
    assert shapes == [(4, 8), (4,)]


def rows_of(batch: dict[str, Tensor], *rows: int) -> dict[str, Tensor]:
    return {name: tensor[list(rows)] for name, tensor in batch.items()}


def prepared(data: list, spoilt: int | None = None, **options: Any) -> Tensor:
    """Features of a model; the loss of batch number `spoilt` is NaN."""
    model = tiny(**options)
    hooks = attach(model, adamw(model), total_steps=9, seed=7)
    calls = iter(range(99))

    def loss(batch: dict) -> Tensor:
        return model.train()(**batch).loss * (torch.nan if next(calls) == spoilt else 1.0)

    hooks.prepare(data, loss)
    return hooks.parts[0].features.values


def micro(batch: dict[str, Tensor], *pieces: tuple[int, ...], filler: bool = False) -> list:
    total = sum(map(len, pieces))
    found = [
        MicroBatch(rows_of(batch, *rows), weight=len(rows) / total, last=False) for rows in pieces
    ]
    if filler:
        found.append(MicroBatch(rows_of(batch, 0), weight=0.0, last=False))
    found[-1].last = True
    return found


@pytest.mark.parametrize("update", ["none", "adapter+head"])
def test_features_do_not_depend_on_how_a_step_is_cut(update: str) -> None:
    """One gradient a step, each micro-batch by its weight; a filler batch leaves no trace."""
    given = {"collect_update": update, "collection_steps": 4}
    whole = prepared(batches(2), **given)
    first, second = batches(2)
    cuts = [
        [*micro(first, (0, 1), (2, 3)), *micro(second, (3, 2, 1, 0))],
        [*micro(first, (0, 1, 2), (3,)), *micro(second, (1,), (0, 2), (3,))],
        [*micro(first, (0, 1, 2, 3), filler=True), *micro(second, (0,), (1, 2, 3), filler=True)],
    ]
    for cut in cuts:
        torch.testing.assert_close(prepared(cut, **given), whole, rtol=5e-6, atol=1e-9)
    twice = prepared(cuts[0], **{**given, "collection_accumulation": 2, "collection_steps": 2})
    plain = prepared(batches(2), **{**given, "collection_accumulation": 2, "collection_steps": 2})
    torch.testing.assert_close(twice, plain, rtol=5e-6, atol=1e-9)


@pytest.mark.parametrize("spoilt", [0, 1])
def test_a_step_whose_loss_is_not_finite_leaves_no_trace(spoilt: int) -> None:
    """Neither its other micro-batches' gradients nor the inputs of any of them."""
    first, second = batches(2)
    cut = [*micro(first, (0, 1), (2, 3)), *micro(second, (0, 1), (2, 3))]
    found = prepared(cut, spoilt=spoilt, collection_steps=2)
    other = [*micro(second, (0, 1), (2, 3)), *micro(first, (0, 1), (2, 3))]
    torch.testing.assert_close(found, prepared(other, collection_steps=2), rtol=5e-6, atol=1e-9)


def test_a_layer_that_the_last_micro_batch_does_not_reach_is_folded_in_its_step() -> None:
    layer = nn.Linear(4, 4)
    model = Named("x", layer, layers=1)
    inject_adapter_in_model(BimLoraConfig(r=1, block_size=2, target_modules=["x"]), model)
    collector = FeatureCollector(model, BimLoraConfig(block_size=2))
    collector.register_hooks()
    collector.pending = 2
    model(torch.ones(1, 4)).sum().backward()
    collector.update()
    torch.zeros((), requires_grad=True).backward()
    collector.update()
    [found] = collector.statistics.values()
    assert found.steps == collector.steps == 1 and found.slot.grad is None
    torch.testing.assert_close(found.absolute, torch.full((4, 4), 0.5))


def test_labels_equal_an_independent_statement() -> None:
    """Percentiles of all four features, F1's own ones included, by numpy."""
    hats = normalised(random_features(400, seed=3))
    F = hats.double().numpy()
    g = [np.sqrt(F[:, 0] + 1e-8), np.cbrt(F[:, 1] + 1e-8)]
    g += [np.log(F[:, 2] + 1e-8), np.log(F[:, 3] + 1e-8)]
    n = []
    for values, low, high in zip(g, (2, 5, 5, 5), (98, 95, 95, 95), strict=True):
        start, end = np.percentile(values, [low, high])
        n.append(np.clip((values - start) / (end - start), 0, 1))
    weights = {0.0: 1.1, 0.167: 1.2, 0.333: 1.4, 0.5: 1.8, 0.667: 1.6, 0.833: 1.5}
    by_type = np.array([weights[round(float(code), 3)] for code in F[:, 5]])
    by_layer = 1 + np.exp(-((F[:, 4] - 0.5) ** 2) / 0.03)
    f = (0.6 * n[0] + 0.2 * n[1] + 0.15 * n[2] + 0.05 * n[3]) * by_layer * by_type
    place = f.argsort().argsort() / (len(f) - 1)
    wanted = 0.05 + 0.9 / (1 + np.exp(-8 * (place - 0.5)))
    torch.testing.assert_close(soft_labels(hats).double(), torch.tensor(wanted), rtol=0, atol=1e-6)
