"""The LoRA layers against the formula, on every kind of base, at the start and after training."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import peft_custom
from peft_custom import LoraConfig, get_peft_model, iter_adapters


class Conv1D(nn.Module):
    """A linear map with its weight stored (in, out), as Hugging Face's GPT-2 has it."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.3)
        self.bias = nn.Parameter(torch.randn(nf))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight + self.bias


class Own(nn.Linear):
    """A linear layer that does something of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def hooked() -> nn.Module:
    layer = nn.Linear(6, 4)
    layer.register_forward_hook(lambda module, args, out: out + 1)
    return layer


BASES = {
    "square": lambda: nn.Linear(5, 5),
    "wide": lambda: nn.Linear(3, 7),
    "tall": lambda: nn.Linear(7, 3),
    "no bias": lambda: nn.Linear(6, 4, bias=False),
    "transposed": lambda: Conv1D(7, 4),
    "transposed square": lambda: Conv1D(5, 5),
    "own forward": lambda: Own(6, 4),
    "hooked": hooked,
    "embedding": lambda: nn.Embedding(11, 6, padding_idx=0),
    "conv": lambda: nn.Conv2d(3, 5, (2, 3), stride=(1, 2), padding=1),
    "conv, circular": lambda: nn.Conv2d(3, 5, 3, padding=1, padding_mode="circular"),
}


def example(base: nn.Module) -> torch.Tensor:
    torch.manual_seed(1)
    if isinstance(base, nn.Embedding):
        return torch.randint(0, base.num_embeddings, (3, 8))
    if isinstance(base, nn.Conv2d):
        return torch.randn(2, 3, 6, 7)
    width = base.weight.shape[0] if isinstance(base, Conv1D) else base.in_features
    return torch.randn(2, 4, width)


def reference(base: nn.Module, layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Base output plus s·B(A x), in plain PyTorch and without ΔW."""
    A, B = layer.factors("default")
    s = layer.scaling["default"]
    if isinstance(base, nn.Embedding):
        return base(x) + s * A.T[x] @ B.T
    if isinstance(base, nn.Conv2d):
        inner = copy.deepcopy(base)
        inner.weight, inner.bias = A, None
        return base(x) + s * torch.einsum("or,nrhw->nohw", B[:, :, 0, 0], inner(x))
    return base(x) + s * torch.einsum("...i,ri,or->...o", x, A, B)


def trained(kind: str, steps: int = 3, **options) -> tuple[nn.Module, nn.Module, torch.Tensor]:
    """(base, adapted model, input) after a few steps that move A and B."""
    torch.manual_seed(0)
    base = BASES[kind]()
    options = {"r": 2, "lora_alpha": 6, "target_modules": ["layer"], **options}
    model = get_peft_model(nn.ModuleDict({"layer": copy.deepcopy(base)}), LoraConfig(**options))
    layer = model.get_base_model()["layer"]
    x = example(base)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        (layer(x) - 1).square().mean().backward()
        optimizer.step()
    return base, model, x


@pytest.mark.parametrize("kind", BASES)
def test_starts_as_the_base_and_follows_the_formula(kind: str) -> None:
    base, model, x = trained(kind, steps=0)
    torch.testing.assert_close(model.get_base_model()["layer"](x), base(x))
    base, model, x = trained(kind)
    layer = model.get_base_model()["layer"]
    assert not torch.allclose(layer(x), base(x), atol=1e-3)
    torch.testing.assert_close(layer(x), reference(base, layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", BASES)
def test_gradients_are_those_of_the_formula(kind: str) -> None:
    base, model, x = trained(kind)
    base.requires_grad_(False)
    layer = model.get_base_model()["layer"]
    want = torch.autograd.grad(reference(base, layer, x).square().sum(), layer.factors("default"))
    got = torch.autograd.grad(layer(x).square().sum(), layer.factors("default"))
    for a, b in zip(got, want, strict=True):
        if kind == "embedding":  # the padding row gets no gradient, as in the base's own lookup
            b = b.clone()
            if b.shape[1] == base.num_embeddings:
                b[:, 0] = 0
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [k for k in BASES if k not in ("own forward", "hooked")])
def test_merge_after_training_and_exact_unmerge(kind: str) -> None:
    base, model, x = trained(kind)
    layer = model.get_base_model()["layer"]
    want = layer(x)
    model.merge_adapter()
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        layer.base_layer.weight, base.weight + layer.get_delta_weight("default")
    )
    model.merge_adapter()  # again: nothing more to merge
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)
    for _ in range(20):
        model.unmerge_adapter()
        model.merge_adapter()
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, base.weight)
    plain = model.merge_and_unload()["layer"]
    assert type(plain) is type(base)
    torch.testing.assert_close(plain(x), want, rtol=1e-5, atol=1e-5)


def test_modes_change_no_weight_and_a_merged_state_dict_holds_the_original() -> None:
    base, model, x = trained("wide")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.eval()
    model.train()
    model.merge_adapter()
    merged = model.state_dict()
    assert all(torch.equal(before[k], merged[k]) for k in before)
    model.load_state_dict(before)
    layer = model.get_base_model()["layer"]
    assert not layer.merged and torch.equal(layer.base_layer.weight, base.weight)


def test_scalings_and_starting_points() -> None:
    _, model, _ = trained("wide", steps=0, r=3, lora_alpha=12)
    layer = model.get_base_model()["layer"]
    assert layer.scaling["default"] == 4.0
    _, model, _ = trained("wide", steps=0, r=4, lora_alpha=16, use_rslora=True)
    assert model.get_base_model()["layer"].scaling["default"] == 8.0
    torch.manual_seed(0)
    big = nn.ModuleDict({"layer": nn.Linear(400, 300)})
    model = get_peft_model(big, LoraConfig(r=16, target_modules=["layer"]))
    A, B = model.get_base_model()["layer"].factors("default")
    assert B.abs().max() == 0 and A.abs().max() <= 1 / math.sqrt(400)
    assert abs(A.std().item() - 1 / math.sqrt(3 * 400)) < 1e-3
    big = nn.ModuleDict({"layer": nn.Linear(400, 300)})
    config = LoraConfig(r=16, target_modules=["layer"], init_lora_weights="gaussian")
    A, B = get_peft_model(big, config).get_base_model()["layer"].factors("default")
    assert B.abs().max() == 0 and abs(A.std().item() - 1 / 16) < 2e-3
    _, model, x = trained("wide", steps=0, init_lora_weights=False)
    assert all(f.abs().min() > 0 for f in model.get_base_model()["layer"].factors("default"))


def test_scaling_is_changed_by_set_scale_only() -> None:
    base, model, x = trained("wide")
    layer = model.get_base_model()["layer"]
    increment = layer(x) - base(x)
    with pytest.raises(TypeError):
        layer.scaling["default"] = 1.0
    layer.set_scale("default", 0.5)
    torch.testing.assert_close(layer(x) - base(x), 0.5 * increment, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["wide", "tall", "transposed"])
@pytest.mark.parametrize("init", ["pissa", "pissa_niter_8"])
def test_pissa(kind: str, init: str) -> None:
    base, model, x = trained(kind, steps=0, init_lora_weights=init)
    layer = model.get_base_model()["layer"]
    torch.testing.assert_close(layer(x), base(x), rtol=1e-5, atol=1e-5)
    A, B = layer.factors("default")
    weight = base.weight.T if kind == "transposed" else base.weight
    if init == "pissa":
        values = torch.linalg.svdvals(weight.detach())
        s = layer.scaling["default"]
        torch.testing.assert_close(B.T @ B, torch.diag(values[:2] / s), rtol=1e-4, atol=1e-5)
        rest = torch.linalg.svdvals(layer.base_layer.weight.detach())
        assert (rest > 1e-5).sum() == (values > 1e-5).sum() - 2
    with model.disable_adapter():  # without the adapter the original layer computes
        torch.testing.assert_close(layer(x), base(x), rtol=1e-5, atol=1e-5)
    base, model, x = trained(kind, init_lora_weights=init)
    want = model.get_base_model()["layer"](x)
    assert not torch.allclose(want, base(x), atol=1e-3)
    merged = copy.deepcopy(model).merge_and_unload()["layer"]
    torch.testing.assert_close(merged(x), want, rtol=1e-5, atol=1e-5)
    restored = model.unload()["layer"]
    torch.testing.assert_close(restored.weight, base.weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_3"])
@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_is_written_as_plain_lora_of_twice_the_rank(init, rslora, tmp_path) -> None:
    base, model, x = trained("wide", init_lora_weights=init, use_rslora=rslora)
    want = model.get_base_model()["layer"](x)
    options = {"convert_pissa_to_lora": True} if init == "pissa" else {}
    model.save_pretrained(tmp_path, **options)
    fresh = nn.ModuleDict({"layer": copy.deepcopy(base)})
    again = peft_custom.PeftModel.from_pretrained(fresh, tmp_path)
    assert again.peft_config["default"].r == 4
    assert again.peft_config["default"].init_lora_weights is True
    torch.testing.assert_close(again.get_base_model()["layer"](x), want, rtol=1e-5, atol=1e-5)


def test_pissa_refusals(tmp_path) -> None:
    _, model, _ = trained("wide", init_lora_weights="pissa")
    with pytest.raises(ValueError, match="no second PiSSA"):
        model.add_adapter("b", LoraConfig(r=2, target_modules=["layer"], init_lora_weights="pissa"))
    assert list(model.peft_config) == ["default"]
    for kind, match in (("embedding", "linear layers"), ("conv", "linear layers")):
        with pytest.raises(ValueError, match=match):
            trained(kind, init_lora_weights="pissa")
    with pytest.raises(ValueError, match="exceeds the 3 singular values"):
        trained("wide", r=4, init_lora_weights="pissa")
    half = nn.ModuleDict({"layer": nn.Linear(4, 4).bfloat16()})
    with pytest.raises(ValueError, match="float32"):
        get_peft_model(half, LoraConfig(r=2, target_modules=["layer"], init_lora_weights="pissa"))
    _, model, _ = trained("wide")
    with pytest.raises(ValueError, match="did not start from PiSSA"):
        model.save_pretrained(tmp_path, convert_pissa_to_lora=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["wide", "transposed", "embedding", "conv"])
def test_low_precision_base_keeps_fp32_adapters(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = BASES[kind]().to(dtype)
    model = get_peft_model(
        nn.ModuleDict({"layer": copy.deepcopy(base)}),
        LoraConfig(r=2, lora_alpha=8, target_modules=["layer"], init_lora_weights=False),
    )
    layer = model.get_base_model()["layer"]
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    x = example(base)
    x = x.to(dtype) if x.is_floating_point() else x
    out = layer(x)
    assert out.dtype == dtype
    wide = copy.deepcopy(base).float()
    want = reference(wide, layer, x.float() if x.is_floating_point() else x)
    torch.testing.assert_close(out.float(), want, rtol=3e-2, atol=6e-2)
    out.float().square().mean().backward()
    assert all(p.grad.dtype == torch.float32 for p in layer.factors("default"))
    before = layer.base_layer.weight.clone()
    model.merge_adapter()
    exact = (before.float() + layer.get_delta_weight("default")).to(dtype)
    assert torch.equal(layer.base_layer.weight, exact)  # formed in fp32, rounded once
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, before)


def test_merging_a_small_increment_into_bf16_tells_what_was_lost() -> None:
    model = get_peft_model(
        nn.ModuleDict({"layer": nn.Linear(32, 32).bfloat16()}),
        LoraConfig(r=2, target_modules=["layer"], init_lora_weights=False),
    )
    model.get_base_model()["layer"].set_scale("default", 1e-3)
    with pytest.warns(UserWarning, match="rounded away .* % of the increment of layer"):
        model.merge_adapter()


def test_dropout_acts_in_training_only_and_on_the_low_rank_branch() -> None:
    base, model, x = trained("wide", lora_dropout=0.5)
    layer = model.get_base_model()["layer"]
    model.eval()
    torch.testing.assert_close(layer(x), reference(base, layer, x), rtol=1e-5, atol=1e-5)
    model.train()
    draws = torch.stack([layer(x) for _ in range(4000)])
    assert draws.std(0).max() > 0
    torch.testing.assert_close(draws.mean(0), reference(base, layer, x), rtol=0.1, atol=0.1)


def test_one_adapter_compiles_without_a_break_and_looks_nothing_up() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    model = get_peft_model(
        net, LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False, lora_dropout=0.0)
    )
    x = torch.randn(4, 6)
    want = model(x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = compiled(x)
    torch.testing.assert_close(got, want)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for a, b in zip(
        torch.autograd.grad(got.sum(), parameters),
        torch.autograd.grad(want.sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    for _, layer in iter_adapters(model):  # the containers keyed by name are not touched
        layer.lora_A.forward = layer.lora_B.forward = None
        layer._scaling = layer.lora_dropout = layer.r = None
    torch.testing.assert_close(model(x), want)


def test_several_active_adapters_add_up() -> None:
    base, model, x = trained("wide")
    torch.manual_seed(3)
    model.add_adapter("other", LoraConfig(r=3, target_modules=["layer"], init_lora_weights=False))
    layer = model.get_base_model()["layer"]
    first = layer(x) - base(x)
    model.set_adapter("other")
    second = layer(x) - base(x)
    model.set_adapter(["default", "other"])
    torch.testing.assert_close(layer(x), base(x) + first + second, rtol=1e-5, atol=1e-5)
    model.merge_adapter(["other"])  # `default` is active still, beside the merged weight
    torch.testing.assert_close(layer(x), base(x) + first + second, rtol=1e-5, atol=1e-5)
    model.merge_adapter(["default"])
    torch.testing.assert_close(layer(x), base(x) + first + second, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(layer.base_layer.weight, base.weight)


def test_an_embedding_forward_uses_the_base_lookup() -> None:
    base, model, x = trained("embedding")
    layer = model.get_base_model()["layer"]
    assert layer.num_embeddings == 11 and layer.padding_idx == 0
    rows = F.embedding(x, base.weight + layer.get_delta_weight("default"))
    torch.testing.assert_close(layer(x), rows, rtol=1e-5, atol=1e-5)
