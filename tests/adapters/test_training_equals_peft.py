"""Training is Transformers' with PEFT, step for step, once both draw the same dropout masks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import peft_custom
import transformers_patched as ours
from transformers_patched import dropout, layout
from transformers_patched.attention import grouped

hf = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
hf.logging.set_verbosity_error()

SIZES = {
    "vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4,
    "intermediate_size": 40, "max_position_embeddings": 40, "hidden_dropout_prob": 0.2,
    "attention_probs_dropout_prob": 0.3, "classifier_dropout": 0.25,
}  # fmt: skip
ADAPTER = {"task_type": "SEQ_CLS", "r": 3, "lora_alpha": 12, "target_modules": ["query", "value"]}
STEPS, WARM_UP, PEAK = 25, 4, 3e-2
LENGTHS = (17, 3, 11, 8, 17, 5, 2)


class Masks:
    """The n-th mask of a step, as the peer shapes it; ours are cut out of it.

    The order of draws is embeddings, then of every layer attention, its output and the
    feed-forward block's, then the head's one (BERT) or two (RoBERTa).
    """

    head = 1 + 3 * SIZES["num_hidden_layers"]  # draws before it

    def start(self, step: int, real: Tensor) -> None:
        """Before a forward pass of rows whose real tokens are `real` (B, L)."""
        self.draws, self.step, self.real = 0, step, real

    def next(self, shape: tuple[int, ...], p: float) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * self.step + self.draws)
        self.draws += 1
        return torch.rand(shape, generator=generator) >= p

    def peer(self, x: Tensor, p: float, training: bool = True, inplace: bool = False) -> Tensor:
        return x * self.next(tuple(x.shape), p) / (1 - p) if training and p else x

    def hidden(self, x: Tensor, p: float) -> Tensor:
        """For (B, L, H), packed (T, H) with filler rows, or the first tokens' (B, H)."""
        (rows, length), is_head = self.real.shape, self.draws >= self.head
        if is_head or x.dim() == 3:
            return as_bytes(self.next(tuple(x.shape), p))
        full = self.next((rows, length, x.shape[-1]), p)
        if len(x) == rows:
            return as_bytes(full[:, 0])
        found = torch.ones(x.shape, dtype=torch.bool)
        found[: int(self.real.sum())] = full[self.real]
        return as_bytes(found)

    def scores(self, x: Tensor, p: float) -> Tensor:
        """For all groups of attention scores, one after the other."""
        rows, length = self.real.shape
        heads = SIZES["num_attention_heads"]
        full = self.next((rows, heads, length, length), p)
        found = []
        for members, size in self.groups or [(list(range(rows)), length)]:
            group = torch.zeros(len(members), heads, size, size, dtype=torch.bool)
            inside = min(size, length)
            group[..., :inside, :inside] = full[members][..., :inside, :inside]
            found.append(group.flatten())
        return as_bytes(torch.cat(found)).view(x.shape)


def as_bytes(keep: Tensor) -> Tensor:
    return -keep.to(torch.int8)


@pytest.fixture
def masks(monkeypatch: pytest.MonkeyPatch) -> Masks:
    """Both sides draw from it, with p itself in force."""
    made = Masks()
    made.groups = []
    cut = grouped._cut

    def noted(order: list[int], lengths: list[int], step: Any) -> list[list[int]]:
        groups = cut(order, lengths, step)
        made.groups = [(list(g), layout.round_up(lengths[g[0]], step)) for g in groups]
        return groups

    monkeypatch.setattr(grouped, "_cut", noted)
    monkeypatch.setattr(torch.nn.functional, "dropout", made.peer)
    monkeypatch.setattr(dropout, "draw_mask", made.hidden)
    monkeypatch.setattr(grouped, "draw_mask", made.scores)
    for module in (dropout, grouped):
        monkeypatch.setattr(module, "scale_in_force", lambda p, device: 1 / (1 - p))
    return made


def batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids (B, L), real tokens (B, L) and labels (B,) of a step."""
    generator = torch.Generator().manual_seed(step)
    ids = torch.randint(1, 61, (len(LENGTHS), max(LENGTHS)), generator=generator)
    order = torch.randperm(len(LENGTHS), generator=generator)
    real = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[order][:, None]
    return ids * real, real, ids[:, 0] / 12


def train(model: torch.nn.Module, masks: Masks, packed: bool) -> list[float]:
    """AdamW with warm-up, decay and clipping; the losses."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=PEAK, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: k / WARM_UP if k < WARM_UP else (STEPS - k) / (STEPS - WARM_UP)
    )
    losses = []
    model.train()
    for step in range(STEPS):
        ids, real, labels = batch(step)
        masks.start(step, real)
        inputs = {"input_ids": ids, "attention_mask": real.long()}
        if packed:
            offsets = torch.cat([torch.zeros(1), real.sum(1).cumsum(0)]).int()
            inputs = {"input_ids": ids[real], "cu_seqlens": offsets, "max_seqlen": max(LENGTHS)}
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        assert masks.draws - masks.head == (2 if model.config.model_type == "roberta" else 1)
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["Bert", "Roberta"])
def test_the_same_masks_give_the_same_run(masks: Masks, name: str, packed: bool) -> None:
    torch.manual_seed(0)
    pad = {"pad_token_id": 0, "num_labels": 1}
    config = getattr(hf, f"{name}Config")(**SIZES, **pad, attn_implementation="eager")
    theirs = getattr(hf, f"{name}ForSequenceClassification")(config)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0.0, 0.7 / SIZES["hidden_size"] ** 0.5)
    own = getattr(ours, f"{name}ForSequenceClassification")(
        getattr(ours, f"{name}Config")(**SIZES, **pad)
    )
    own.load_state_dict(theirs.state_dict(), strict=False)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(**ADAPTER))
    own = peft_custom.get_peft_model(own, peft_custom.LoraConfig(**ADAPTER))
    start = {k: v.clone() for k, v in peft.get_peft_model_state_dict(theirs).items()}
    peft_custom.set_peft_model_state_dict(own, start)

    expected, found = train(theirs, masks, False), train(own, masks, packed)

    assert found == pytest.approx(expected, rel=2e-4)
    want = peft.get_peft_model_state_dict(theirs)
    have = peft_custom.get_peft_model_state_dict(own)
    assert want.keys() == have.keys()
    for key, value in want.items():
        moved = (value - start[key]).norm()
        assert moved > 1e-2 and (have[key] - value).norm() < 1e-3 * moved, key
