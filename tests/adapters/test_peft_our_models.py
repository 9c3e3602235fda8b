"""Adapters on this project's own models: packed batches, compilation, low precision, heads."""

import pytest
import torch

import transformers_patched as patched
from peft_custom import LoraConfig, PeftModel, get_peft_model

IDS = torch.arange(4, 32).view(4, 7)
PACKED = {
    "input_ids": IDS.flatten(),
    "cu_seqlens": torch.arange(0, 29, 7, dtype=torch.int32),
    "max_seqlen": 7,
}
LABELS = torch.tensor([0, 1, 2, 0])


def roberta(head: str = "SequenceClassification"):
    torch.manual_seed(0)
    config = patched.RobertaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=24, max_position_embeddings=20,
        num_labels=2 if head == "QuestionAnswering" else 3, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0, initializer_range=0.2,
    )  # fmt: skip
    return getattr(patched, f"RobertaFor{head}")(config).eval()


def adapted(**options) -> PeftModel:
    config = LoraConfig(
        task_type="SEQ_CLS", r=4, target_modules="all-linear", init_lora_weights=False, **options
    )
    return get_peft_model(roberta(), config)


def test_packed_equals_padded_and_mixed_batches_of_both() -> None:
    model = adapted()
    model.add_adapter(
        "b", LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["value"], init_lora_weights=False)
    )
    head = model.get_base_model().classifier.modules_to_save["b"]
    with torch.no_grad():
        head.out_proj.bias += 1.0
        padded = model(input_ids=IDS).logits
        torch.testing.assert_close(model(**PACKED).logits, padded, rtol=1e-5, atol=1e-6)
        order = ["b", "__base__", "default", "b"]
        mixed = model(input_ids=IDS, adapter_names=order).logits
        torch.testing.assert_close(
            model(**PACKED, adapter_names=order).logits, mixed, rtol=1e-5, atol=1e-6
        )
        torch.testing.assert_close(mixed[2], padded[2], rtol=1e-5, atol=1e-6)
        model.set_adapter("b")
        torch.testing.assert_close(
            mixed[[0, 3]], model(input_ids=IDS).logits[[0, 3]], rtol=1e-5, atol=1e-6
        )
        with model.disable_adapter():
            torch.testing.assert_close(mixed[1], model(input_ids=IDS).logits[1])


def test_compiles_whole() -> None:
    model = adapted()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_bf16_base_trains_fp32_adapters_and_heads() -> None:
    model = get_peft_model(
        roberta().to(torch.bfloat16), LoraConfig(task_type="SEQ_CLS", target_modules="all-linear")
    ).train()
    model(input_ids=IDS, labels=LABELS).loss.backward()
    for name, p in model.named_parameters():
        assert not p.requires_grad or (p.dtype == torch.float32 and p.grad is not None), name


def test_checkpointed_gradients_are_the_same() -> None:
    grads = []
    for checkpoint in (False, True):
        model = adapted().train()
        if checkpoint:
            model.gradient_checkpointing_enable()
        model(input_ids=IDS, labels=LABELS).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize(
    ("head", "task", "extra"),
    [
        ("SequenceClassification", "SEQ_CLS", {}),
        ("QuestionAnswering", "QUESTION_ANS", {}),
        ("MultipleChoice", None, {"modules_to_save": ["classifier"]}),
    ],
)
def test_the_head_travels(head: str, task: str | None, extra: dict, tmp_path) -> None:
    model = get_peft_model(
        roberta(head),
        LoraConfig(task_type=task, target_modules=["query"], init_lora_weights=False, **extra),
    )
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p) * p.requires_grad
    ids = IDS.view(2, 2, 7) if head == "MultipleChoice" else IDS
    name = "start_logits" if head == "QuestionAnswering" else "logits"
    want = getattr(model(input_ids=ids), name)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(roberta(head), tmp_path)
    assert torch.equal(getattr(again(input_ids=ids), name), want)
    plain = again.merge_and_unload(verify={"input_ids": ids}, tolerance=1e-5)
    plain.save_pretrained(tmp_path / "merged")
    merged = type(plain).from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(getattr(merged(input_ids=ids), name), want, rtol=1e-4, atol=1e-5)
