"""Transformers' Trainer sees the wrapped model's inputs, labels and loss through the wrapper."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from support.peft_tiny import QV, bert
from torch import Tensor, nn

from peft_custom import LoraConfig, PeftModel, get_peft_model

transformers = pytest.importorskip("transformers")


class Boxes(nn.Module):
    """A model of one's own: inputs that no task type names."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(3, 2)

    def forward(self, boxes: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.query(boxes)
        if labels is None:
            return {"logits": logits}
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def rows(head: str, n: int = 8) -> list[dict[str, Any]]:
    torch.manual_seed(3)
    ids = torch.randint(4, 40, (n, 7))
    if head == "boxes":
        return [{"boxes": torch.randn(3), "labels": i % 2} for i in range(n)]
    if head == "QuestionAnswering":
        return [{"input_ids": r, "start_positions": 1, "end_positions": 2} for r in ids]
    if head in ("llama", "gpt2", "MaskedLM", "TokenClassification"):
        # batches of different numbers of scored tokens
        scored = [torch.arange(7) < 2 + i % 5 for i in range(n)]
        labels = [r.remainder(3).where(s, -100) for r, s in zip(ids, scored, strict=True)]
        return [{"input_ids": r, "labels": y} for r, y in zip(ids, labels, strict=True)]
    return [{"input_ids": r, "labels": i % 3} for i, r in enumerate(ids)]


def llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16, max_position_embeddings=8,
        )
    )  # fmt: skip


def gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=8,
            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        )
    )  # fmt: skip


def wrapped(head: str, task: str | None = None) -> PeftModel:
    torch.manual_seed(1)
    base = {"boxes": Boxes, "llama": llama, "gpt2": gpt2}.get(head, lambda: bert(head=head))()
    targets = {"boxes": ["query"], "llama": ["q_proj"], "gpt2": ["c_attn"]}.get(
        head, QV["target_modules"]
    )
    config = LoraConfig(task_type=task, r=2, target_modules=targets, init_lora_weights=False)
    return get_peft_model(base, config)


def trainer(model: nn.Module, data: list[dict[str, Any]], folder: Path, **options: Any) -> Any:
    args = transformers.TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], save_strategy="no", max_steps=1,
        optim="sgd", learning_rate=1.0, max_grad_norm=0.0, lr_scheduler_type="constant",
        disable_tqdm=True, **options,
    )  # fmt: skip
    return transformers.Trainer(model=model, args=args, train_dataset=data, eval_dataset=data)


HEADS = [
    "llama",
    "gpt2",
    "SequenceClassification",
    "QuestionAnswering",
    "MaskedLM",
    "TokenClassification",
    "boxes",
]


@pytest.mark.parametrize("head", HEADS)
def test_without_a_task_type_inputs_and_labels_arrive(head: str, tmp_path: Path) -> None:
    data, model = rows(head), wrapped(head)
    found = trainer(model, data, tmp_path, per_device_eval_batch_size=8)
    loss = found.evaluate()["eval_loss"]
    expected = model(**transformers.default_data_collator(data))["loss"]
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    found.train()


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("task", [None, "FEATURE_EXTRACTION"])
def test_accumulation_gives_the_gradient_of_a_plain_loop(
    head: str, task: str | None, tmp_path: Path
) -> None:
    if head in ("boxes", "llama", "gpt2") and task:
        pytest.skip("an encoder's task")
    data, model = rows(head, 6), wrapped(head, task)
    plain = copy.deepcopy(model)
    trained = [p for p in plain.parameters() if p.requires_grad]
    chosen = trainer(
        model, data, tmp_path, gradient_accumulation_steps=3, per_device_train_batch_size=2
    )
    chosen._get_train_sampler = lambda *unused: torch.utils.data.SequentialSampler(data)
    chosen.train()
    batches = [transformers.default_data_collator(data[i : i + 2]) for i in (0, 2, 4)]
    # Llama's loss counts the scored tokens of the whole step; the others are means of batches
    scored = [(b["labels"][:, 1:] != -100).sum() if head == "llama" else 1 for b in batches]
    for batch, weight in zip(batches, scored, strict=True):
        (plain(**batch)["loss"] * weight / sum(scored)).backward()
    after = [p for p in model.parameters() if p.requires_grad]
    for was, now in zip(trained, after, strict=True):
        assert torch.allclose(was - was.grad, now, atol=2e-6)


def test_a_column_that_only_the_base_names_is_kept(tmp_path: Path) -> None:
    model = wrapped("boxes", "FEATURE_EXTRACTION")
    batch = next(iter(trainer(model, rows("boxes"), tmp_path).get_train_dataloader()))
    assert set(batch) == {"boxes", "labels"}


def test_only_a_loss_that_is_seen_to_count_is_believed() -> None:
    assert wrapped("llama").accepts_loss_kwargs
    assert not wrapped("SequenceClassification").accepts_loss_kwargs
    assert not wrapped("boxes").accepts_loss_kwargs


@pytest.mark.parametrize("task", [None, "SEQ_CLS"])
def test_the_wrapper_is_still_copied_and_pickled(task: str | None) -> None:
    model = wrapped("SequenceClassification", task)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model) and isinstance(other, PeftModel)
        batch = transformers.default_data_collator(rows("SequenceClassification"))
        assert torch.equal(other(**batch)["logits"], model(**batch)["logits"])
