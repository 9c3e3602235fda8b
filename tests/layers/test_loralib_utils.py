"""Which parameters train and which are saved; the parameter counts of the papers' models."""

import pytest
import torch
from torch import nn

import loralib as lora


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = lora.Linear(7, 6, r=2)
        self.k = nn.Linear(7, 6)
        self.ln = nn.LayerNorm(6)
        self.e = lora.Embedding(9, 7, r=2)
        self.plain = lora.Linear(6, 5, bias=False)  # r = 0
        # GPT-2's causal mask is a buffer with such a name.
        self.register_buffer("bias", torch.ones(3, 3))
        self.ln.register_buffer("lora_mask", torch.ones(3))


FACTORS = {"q.lora_A", "q.lora_B", "e.lora_A", "e.lora_B"}
EXPECTED = {
    "none": FACTORS,
    "all": FACTORS | {"q.bias", "k.bias", "ln.bias"},
    "lora_only": FACTORS | {"q.bias"},
}


@pytest.mark.parametrize("bias", EXPECTED)
def test_what_trains_is_what_is_saved(bias: str) -> None:
    model = Toy()
    lora.mark_only_lora_as_trainable(model, bias)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == EXPECTED[bias]
    saved = lora.lora_state_dict(model, bias)
    assert saved.keys() == EXPECTED[bias]
    own = model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in saved.items())
    assert not any(value.requires_grad for value in saved.values())


def test_marking_undoes_an_earlier_choice() -> None:
    model = Toy()
    lora.mark_only_lora_as_trainable(model, "all")
    lora.mark_only_lora_as_trainable(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == FACTORS


def test_a_layer_by_itself() -> None:
    layer = lora.Linear(7, 6, r=2)
    assert lora.lora_state_dict(layer, "lora_only").keys() == {"lora_A", "lora_B", "bias"}


def test_shared_layers_are_saved_under_all_their_names() -> None:
    model = nn.ModuleDict({"a": (shared := lora.Linear(7, 6, r=2)), "b": shared})
    saved = lora.lora_state_dict(model, "lora_only")
    assert saved.keys() == {f"{m}.{p}" for m in "ab" for p in ("lora_A", "lora_B", "bias")}


def test_factors_are_saved_while_merged() -> None:
    model = Toy()
    model.q.merge()
    assert lora.lora_state_dict(model).keys() == FACTORS


@pytest.mark.parametrize("function", [lora.mark_only_lora_as_trainable, lora.lora_state_dict])
def test_unknown_bias_changes_nothing(function) -> None:
    model = Toy()
    before = [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="bias='lora': must be one of 'none', 'all', 'lora_only'"):
        function(model, "lora")
    assert [p.requires_grad for p in model.parameters()] == before


def test_adapter_with_a_head_loads_over_a_base() -> None:
    """The shape of Microsoft's published files: factors and a head, nothing else."""

    def model() -> nn.ModuleDict:
        return nn.ModuleDict({"query": lora.Linear(7, 6, r=2), "classifier": nn.Linear(6, 3)})

    torch.manual_seed(0)
    source, target = model(), model()
    target.query.load_state_dict({**target.query.state_dict(), "weight": source.query.weight,
                                  "bias": source.query.bias})  # fmt: skip
    nn.init.normal_(source.query.lora_B)
    head = {f"classifier.{k}": v for k, v in source.classifier.state_dict().items()}
    result = target.load_state_dict({**lora.lora_state_dict(source), **head}, strict=False)
    assert set(result.missing_keys) == {"query.weight", "query.bias"}
    x = torch.randn(2, 7)
    assert torch.equal(
        target["classifier"](target["query"](x)), source["classifier"](source["query"](x))
    )


@pytest.mark.parametrize(
    ("layers", "width", "r", "kind", "count"),
    [
        (12, 768, 4, "gpt2", 147_456),
        (24, 1024, 4, "gpt2", 393_216),
        (36, 1280, 4, "gpt2", 737_280),
        (12, 768, 8, "qv", 294_912),
        (24, 1024, 8, "qv", 786_432),
        (48, 1536, 16, "qv", 4_718_592),
    ],
)
def test_parameter_counts_of_the_papers(
    layers: int, width: int, r: int, kind: str, count: int
) -> None:
    """GPT-2 small, medium and large; RoBERTa base and large; DeBERTa XXL."""
    with torch.device("meta"):
        if kind == "gpt2":
            made = [
                lora.MergedLinear(
                    width, 3 * width, r=r, enable_lora=[True, False, True], fan_in_fan_out=True
                )
                for _ in range(layers)
            ]
        else:
            made = [lora.Linear(width, width, r=r) for _ in range(2 * layers)]
    model = nn.ModuleList(made)
    lora.mark_only_lora_as_trainable(model)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
