"""Every tuner on GPT-2's fused Conv1D: the default target, ΔW as stored, merging, PEFT's files."""

from pathlib import Path

import pytest
import torch

from peft_custom import (
    AdaLoraConfig,
    BimLoraConfig,
    DyLoraConfig,
    LoraConfig,
    PeftModel,
    get_peft_model,
)
from transformers_patched import GPT2Config, GPT2LMHeadModel

TUNERS = {
    "lora": lambda **targets: LoraConfig(r=2, lora_alpha=6, **targets),
    "dylora": lambda **targets: DyLoraConfig(r=2, lora_alpha=6, **targets),
    "adalora": lambda **targets: AdaLoraConfig(
        init_r=2, target_r=1, lora_alpha=6, total_step=10, tinit=1, tfinal=1, **targets
    ),
    "bim_lora": lambda **targets: BimLoraConfig(r=2, lora_alpha=6, block_size=8, **targets),
}
IDS = torch.randint(0, 41, (2, 9), generator=torch.Generator().manual_seed(0))


def base() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = dict(vocab_size=41, n_embd=24, n_head=2, n_layer=2, n_positions=16)
    none = dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    return GPT2LMHeadModel(GPT2Config(**sizes, **none)).eval()


def adapted(tuner: str, **targets) -> PeftModel:
    model = get_peft_model(base(), TUNERS[tuner](**targets)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model


@pytest.mark.parametrize("tuner", ["lora", "dylora", "adalora"])
def test_c_attn_is_the_default(tuner: str) -> None:
    model = adapted(tuner)
    wrapped = {n for n, m in model.named_modules() if hasattr(m, "base_layer")}
    assert {name.rsplit("transformer.", 1)[1] for name in wrapped} == {
        "h.0.attn.c_attn", "h.1.attn.c_attn",
    }  # fmt: skip


@pytest.mark.parametrize("tuner", TUNERS)
def test_delta_weight_is_what_the_layer_adds(tuner: str, tmp_path: Path) -> None:
    targets = {"target_modules": ["c_attn", "c_fc", "c_proj"]}
    model = adapted(tuner, **targets)
    expected = base()
    with torch.no_grad():
        got = model(IDS).logits
        for name, module in model.named_modules():
            if hasattr(module, "base_layer"):
                delta = module.get_delta_weight("default")  # (in, out), as stored
                assert delta.shape == module.base_layer.weight.shape and delta.any()
                expected.get_submodule(name.removeprefix("base_model.model.")).weight += delta
        torch.testing.assert_close(got, expected(IDS).logits, rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    back = PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(back(IDS).logits, got)


def test_block_masks_are_over_outputs_and_inputs() -> None:
    """A block closed is a block of the (out, in) matrix, the transpose of the stored one."""
    model = adapted("bim_lora", target_modules=["c_attn"])
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    masks = [p for n, p in layer.named_parameters() if p.shape == (9, 3)]  # 72/8 by 24/8 blocks
    assert len(masks) == 1
    with torch.no_grad():
        masks[0].fill_(50.0)
        masks[0][7, 1] = -50.0
        delta = layer.get_delta_weight("default").T  # (72, 24)
    assert delta[56:64, 8:16].abs().max() < 1e-6
    delta[56:64, 8:16] = 1.0
    assert delta.unfold(0, 8, 8).unfold(1, 8, 8).abs().amax((-1, -2)).min() > 1e-2
