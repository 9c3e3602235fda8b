"""Weight decay: biases and normalisation layers are spared, whoever wrote the layer."""

import pytest
import torch
from torch import nn

import peft_custom
import transformers_patched as ours
from loralib.decay import decay_groups, is_norm

SIZES = {
    "vocab_size": 23, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "intermediate_size": 24,
}  # fmt: skip


def names(model: nn.Module, groups: list[dict]) -> dict[str, list[str]]:
    called = {p: name for name, p in model.named_parameters()}
    return {group["name"]: [called[p] for p in group["params"]] for group in groups}


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DebertaV2"])
def test_our_models_decay_what_is_no_bias_and_no_layer_norm(kind: str) -> None:
    config = getattr(ours, f"{kind}Config")(**SIZES, apply_lora=True, lora_r=2)
    model = getattr(ours, f"{kind}ForSequenceClassification")(config)
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    spared = [n for n in trained if n.endswith("bias") or "LayerNorm" in n]
    others = [n for n in trained if n not in spared]
    found = names(model, model.parameter_groups(1e-3, 0.1))
    assert found == {"decay": others, "no_decay": spared}


def test_hugging_face_s_own_norms_are_spared() -> None:
    transformers = pytest.importorskip("transformers")
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES))
    spared = [n for n, _ in model.named_parameters() if "norm" in n]
    assert len(spared) == 5
    assert names(model, decay_groups(model, 1e-3, 0.1))["no_decay"] == spared
    config = peft_custom.LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"])
    adapted = peft_custom.get_peft_model(model, config)
    found = names(adapted, adapted.parameter_groups(1e-3, 0.1))
    assert found["no_decay"] == ["base_model.model.model.norm.modules_to_save.default.weight"]
    assert all("lora_" in name for name in found["decay"])


def test_what_is_a_norm() -> None:
    class RMSNormGated(nn.Module):  # as some models name theirs
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

    class NormalisedLinear(nn.Linear):
        pass

    for norm in (nn.LayerNorm((2, 3)), nn.RMSNorm(3), nn.GroupNorm(1, 3), nn.BatchNorm1d(3)):
        assert is_norm(norm)
    assert is_norm(nn.InstanceNorm2d(3, affine=True)) and is_norm(RMSNormGated())
    assert not is_norm(NormalisedLinear(3, 3)) and not is_norm(nn.Linear(3, 3))


def test_groups_of_their_own_and_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
    model[0].bias.requires_grad_(False)
    groups = decay_groups(model, 1e-3, 0.1, without=[model[0].weight])
    assert names(model, groups) == {"no_decay": ["1.weight", "1.bias"]}
    assert (groups[0]["lr"], groups[0]["weight_decay"]) == (1e-3, 0.0)
