"""What `unload` and `merge_and_unload` return runs by itself, whatever the base's dtype."""

from __future__ import annotations

import pytest
import torch
from support.peft_tiny import IDS, QV, bert
from torch import nn

from peft_custom import LoraConfig, PeftModel, get_peft_model


def half(dtype: torch.dtype, head: str = "SequenceClassification", **options: object) -> PeftModel:
    model = get_peft_model(bert(head=head).to(dtype), LoraConfig(**{**QV, **options})).eval()
    for name, p in model.named_parameters():
        if "modules_to_save" in name:
            p.data += 0.3
    return model


TASKS = [
    ("SequenceClassification", {"task_type": "SEQ_CLS"}),
    ("QuestionAnswering", {"task_type": "QUESTION_ANS"}),
    ("SequenceClassification", {"modules_to_save": ["pooler", "classifier"]}),
]


@pytest.mark.filterwarnings("ignore:merging rounded")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("head", "options"), TASKS)
@pytest.mark.parametrize("verify", [False, True])
def test_the_plain_model_runs(dtype: torch.dtype, head: str, options: dict, verify: bool) -> None:
    model = half(dtype, head, **options)
    before = model(IDS).to_tuple()[0].float()
    batch = {"verify": {"input_ids": IDS}, "tolerance": 0.1} if verify else {}
    plain = model.merge_and_unload(**batch)
    after = plain(IDS).to_tuple()[0].float()
    assert {p.dtype for p in plain.parameters()} == {dtype}
    assert torch.allclose(after, before, atol=0.1 * float(before.abs().max().clamp(min=1)))
    dropped = half(dtype, head, **options).unload()
    assert torch.isfinite(dropped(IDS).to_tuple()[0]).all()


def test_a_saved_module_in_its_own_dtype_is_not_copied() -> None:
    model = half(torch.float32, task_type="SEQ_CLS")
    trained = model.base_model.model.classifier.current_module()
    assert model.unload().classifier is trained


class Brittle(nn.Module):
    """Runs only while its layer is wrapped, as a model may that looks at its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.query(x) if hasattr(self.query, "base_layer") else x[:, :1] @ self.query.weight


def test_verify_runs_what_is_returned_and_a_failure_leaves_the_adapter() -> None:
    x = torch.randn(2, 3)
    config = LoraConfig(r=2, target_modules=["query"], init_lora_weights=False)
    model = get_peft_model(Brittle(), config).eval()
    before = model(x)
    with pytest.raises(RuntimeError, match="shapes"):
        model.merge_and_unload(verify=x)
    assert torch.equal(model(x), before)
    assert not model.base_model.model.query.merged


@pytest.mark.filterwarnings("ignore:merging rounded")
def test_too_large_a_difference_leaves_the_head_in_fp32() -> None:
    model = half(torch.bfloat16, task_type="SEQ_CLS")
    before = model(IDS).logits
    with pytest.raises(ValueError, match="tolerance"):
        model.merge_and_unload(verify={"input_ids": IDS}, tolerance=1e-9)
    assert torch.equal(model(IDS).logits, before)
    assert model.base_model.model.classifier.current_module().weight.dtype == torch.float32
