"""`compact()`: smaller models of equal outputs, that load, train on and are adapted again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import V3
from torch import Tensor, nn

import transformers_patched as ours
from loralib import block_sparse
from peft_custom import LoraConfig, PeftModel, SploraConfig, attach, get_peft_model
from peft_custom.tuners.spa import SplopaConfig
from peft_custom.tuners.spa.compact import cut
from transformers_patched.generation import generate

KINDS = ("Bert", "Roberta", "DebertaV2", "GPT2")
SIZES = {
    "vocab_size": 31, "num_labels": 3, "hidden_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 6, "intermediate_size": 32, "max_position_embeddings": 20,
}  # fmt: skip
GPT2 = {
    "vocab_size": 31, "num_labels": 3, "n_embd": 24, "n_layer": 2, "n_head": 6, "n_inner": 32,
    "n_positions": 20, "pad_token_id": 0,
}  # fmt: skip


def base(kind: str, **sizes: Any) -> nn.Module:
    """A classifier in fp64 whose biases, too, are random."""
    torch.manual_seed(0)
    options = GPT2 if kind == "GPT2" else {**(V3 if kind == "DebertaV2" else {}), **SIZES}
    config = getattr(ours, f"{kind}Config")(**{**options, **sizes})
    model = getattr(ours, f"{kind}ForSequenceClassification")(config).double().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model


def pruned(kind: str, structure: str, **sizes: Any) -> PeftModel:
    """It under random masks, with an increment that shows."""
    options = {"mask_init": "uniform", "mask_scale": 1.0, "final_threshold": 0.4}
    blocks = {"mask_block_rows": 4, "mask_block_cols": 4, "mask_structure": structure}
    config = SploraConfig(task_type="SEQ_CLS", r=2, init_range=0.3, **blocks, **options)
    return get_peft_model(base(kind, **sizes), config).double().eval()


def inputs(packed: bool = False) -> dict[str, Any]:
    """Rows of 9, 5 and 7 tokens, padded or packed."""
    ids = torch.randint(3, 31, (3, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:] = mask[2, 7:] = 0
    if not packed:
        return {"input_ids": ids * mask, "attention_mask": mask}
    bounds = torch.tensor([0, 9, 14, 21], dtype=torch.int32)
    return {"input_ids": ids[mask.bool()], "cu_seqlens": bounds, "max_seqlen": 9}


@torch.no_grad()
def logits(model: nn.Module, packed: bool = False) -> Tensor:
    return model(**inputs(packed)).logits


@pytest.mark.parametrize("structure", ["blocks", "linked", "hybrid"])
@pytest.mark.parametrize("kind", KINDS)
def test_fact_19_logits_stay_and_the_adapted_model_too(kind: str, structure: str) -> None:
    model = pruned(kind, structure)
    before = copy.deepcopy(model.state_dict())
    wanted = logits(model)
    small = model.compact()
    assert type(small) is type(model.get_base_model())
    for packed in (False, True):
        torch.testing.assert_close(logits(small, packed), wanted, atol=1e-10, rtol=0)
    torch.testing.assert_close(logits(small.float()), wanted.float(), atol=1e-4, rtol=1e-5)
    after = model.state_dict()
    assert all(torch.equal(t, after[name]) for name, t in before.items())
    assert torch.equal(logits(model), wanted)
    assert model.get_base_model().config.layer_shapes is None
    if structure == "linked":  # 2 of 6 heads, 12 of 32 units
        assert small.config.layer_shapes == [[2, 12], [2, 12]]
    if structure != "blocks":
        units = [shape[1] for shape in small.config.layer_shapes]
        assert units == [12, 12]


def zero(model: nn.Module, name: str, where: Any) -> None:
    with torch.no_grad():
        model.get_submodule(name).weight[where] = 0.0


def test_what_makes_a_unit_or_a_head_useless_and_what_does_not() -> None:
    """Rows of W_in or W_V, columns of W_out or W_O do; rows of W_Q or W_K do not."""
    model = base("Bert")
    layer = "bert.encoder.layer.0"
    zero(model, f"{layer}.intermediate.dense", slice(3, 8))
    zero(model, f"{layer}.output.dense", (slice(None), slice(10, 12)))
    zero(model, f"{layer}.attention.self.value", slice(4, 8))
    zero(model, f"{layer}.attention.output.dense", (slice(None), slice(20, 24)))
    zero(model, f"{layer}.attention.self.query", slice(8, 12))
    zero(model, f"{layer}.attention.self.key", slice(12, 16))
    wanted = logits(model)
    small, without_constants = copy.deepcopy(model), copy.deepcopy(model)
    cut(small)
    assert small.config.layer_shapes == [[4, 25], [6, 32]]
    torch.testing.assert_close(logits(small), wanted, atol=1e-10, rtol=0)
    cut(without_constants, fold=False)
    assert (logits(without_constants) - wanted).abs().max() > 1e-3


def test_a_layer_of_which_nothing_is_left_keeps_one_head_and_one_unit() -> None:
    model = base("Roberta")
    zero(model, "roberta.encoder.layer.1.output.dense", slice(None))
    zero(model, "roberta.encoder.layer.1.attention.output.dense", slice(None))
    wanted = logits(model)
    cut(model)
    assert model.config.layer_shapes == [[6, 32], [1, 1]]
    torch.testing.assert_close(logits(model), wanted, atol=1e-10, rtol=0)


def test_layers_keep_their_order() -> None:
    """`layer.10` comes after `layer.2`."""
    model = base("Bert", num_hidden_layers=12)
    for i in range(12):
        zero(model, f"bert.encoder.layer.{i}.output.dense", (slice(None), slice(0, i + 1)))
    cut(model)
    assert model.config.layer_shapes == [[6, 31 - i] for i in range(12)]


@pytest.mark.parametrize("kind", KINDS)
def test_saved_loaded_trained_on_and_adapted_again(kind: str, tmp_path: Path) -> None:
    small = pruned(kind, "linked").compact()
    small.save_pretrained(tmp_path)
    model = ours.AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.equal(logits(model), logits(small))
    dense = sum(p.numel() for p in base(kind).parameters()) * 8
    assert (tmp_path / "model.safetensors").stat().st_size < 0.6 * dense
    assert all(p.requires_grad for p in small.parameters())
    small.train()(**inputs(), labels=torch.tensor([0, 2, 1])).loss.backward()
    assert all(p.grad is not None for p in small.parameters())
    again = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", target_modules="all-linear"))
    optimizer = torch.optim.AdamW(again.parameter_groups(1e-2, 0.0))
    attach(again, optimizer)
    before = logits(again)
    again(**inputs(), labels=torch.tensor([0, 2, 1])).loss.backward()
    optimizer.step()
    assert not torch.equal(logits(again), before)
    more = SplopaConfig(
        task_type="SEQ_CLS", mask_structure="linked", mask_block_rows=4, mask_block_cols=4,
        final_threshold=0.5, num_prototypes=3,
    )  # fmt: skip
    twice = get_peft_model(again.merge_and_unload().double(), more).double().eval()
    smaller = twice.compact()
    assert smaller.config.layer_shapes == [[1, 6], [1, 6]]
    torch.testing.assert_close(logits(smaller), logits(twice), atol=1e-10, rtol=0)


def test_shapes_that_no_model_has_are_refused() -> None:
    too_wide = [[2, 12, 5], [2, 12]]  # of heads of 4
    for shapes in ([[2, 12]], [[0, 12], [2, 12]], [[7, 12], [2, 12]], [[2, 12], [2]], too_wide):
        with pytest.raises(ours.ConfigError, match="layer_shapes is"):
            ours.BertModel(ours.BertConfig(**SIZES, layer_shapes=shapes))


def test_the_dense_export_loads_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = pruned("Bert", "hybrid").float()
    wanted = logits(model)
    model.merge_and_unload().save_pretrained(tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(theirs), wanted, atol=1e-5, rtol=1e-5)


def test_models_of_transformers_become_smaller_but_cannot_say_so() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    theirs = transformers.BertForSequenceClassification(transformers.BertConfig(**SIZES)).eval()
    options = {"mask_init": "uniform", "mask_scale": 1.0, "final_threshold": 0.4}
    model = get_peft_model(theirs, SploraConfig(task_type="SEQ_CLS", r=2, **options)).eval()
    with pytest.warns(UserWarning, match="cannot be loaded by from_pretrained"):
        small = model.compact()
    torch.testing.assert_close(logits(small), logits(model), atol=1e-5, rtol=1e-5)


def test_generation_with_layers_of_different_heads(tmp_path: Path) -> None:
    """Greedy and beam search find what the masked model finds, the compacted one loaded or not."""
    torch.manual_seed(0)
    language_model = ours.GPT2LMHeadModel(ours.GPT2Config(**{**GPT2, "num_labels": 2})).eval()
    with torch.no_grad():
        for p in language_model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    options = {"mask_init": "uniform", "mask_scale": 1.0, "final_threshold": 0.4}
    config = SploraConfig(task_type="CAUSAL_LM", r=2, init_range=0.3, global_topk=True, **options)
    masked = get_peft_model(language_model, config).eval()
    small = masked.compact()
    heads = [shape[0] for shape in small.config.layer_shapes]
    assert heads[0] != heads[1]
    small.save_pretrained(tmp_path)
    loaded = ours.GPT2LMHeadModel.from_pretrained(tmp_path)
    contexts = [[1, 2, 3], [4, 5], [6, 7, 8, 9], [10]]
    for beams in (1, 3):
        search = {"max_new_tokens": 6, "num_beams": beams, "eos_token_id": None}
        wanted = generate(masked, contexts, **search)
        assert len({tuple(text) for text in wanted}) > 1
        for model in (small, loaded):
            assert generate(model, contexts, batch_size=2, **search) == wanted


WIDE = {"hidden_size": 72, "num_attention_heads": 3, "intermediate_size": 16}
WIDE_GPT2 = {"n_embd": 72, "n_head": 3, "n_inner": 16}
ATTENTION = {
    "Bert": ("bert.encoder.layer.1.attention", "self.query", "self.key", "self.value"),
    "Roberta": ("roberta.encoder.layer.1.attention", "self.query", "self.key", "self.value"),
}


def rows(kind: str, model: nn.Module, part: int, where: Tensor | slice) -> None:
    """Rows of W_Q (part 0), W_K or W_V become 0."""
    with torch.no_grad():
        if kind == "GPT2":
            columns = model.get_submodule("transformer.h.1.attn.c_attn").weight[:, 72 * part :]
            columns[:, :72][:, where] = 0.0
        else:
            prefix, *names = ATTENTION[kind]
            model.get_submodule(f"{prefix}.{names[part]}").weight[where] = 0.0


def columns(kind: str, model: nn.Module, where: Tensor) -> None:
    """Columns of W_O become 0."""
    with torch.no_grad():
        if kind == "GPT2":
            model.get_submodule("transformer.h.1.attn.c_proj").weight[where] = 0.0
        else:
            output = model.get_submodule(f"{ATTENTION[kind][0]}.output.dense")
            output.weight[:, where] = 0.0


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "GPT2"])
def test_heads_lose_what_none_of_them_needs(kind: str, tmp_path: Path) -> None:
    """Of 24 numbers the heads need 13 at most in keys and 9 in values: they keep 16."""
    model = base(kind, **(WIDE_GPT2 if kind == "GPT2" else WIDE))
    draw = torch.Generator().manual_seed(0)
    keys = [24 * h + torch.randperm(24, generator=draw)[: 11 + h] for h in range(3)]
    values = [24 * h + torch.randperm(24, generator=draw)[: 15 + h] for h in range(3)]
    rows(kind, model, 1, torch.cat(keys))
    rows(kind, model, 2, torch.cat([v[:9] for v in values]))
    columns(kind, model, torch.cat([v[9:] for v in values]))
    wanted = logits(model)
    small, without_constants = copy.deepcopy(model), copy.deepcopy(model)
    cut(small)
    units = 16
    assert small.config.layer_shapes == [[3, units], [3, units, 16]]
    for packed in (False, True):
        torch.testing.assert_close(logits(small, packed), wanted, atol=1e-10, rtol=0)
    cut(without_constants, fold=False)
    assert (logits(without_constants) - wanted).abs().max() > 1e-3
    small.save_pretrained(tmp_path)
    loaded = ours.AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float64)
    torch.testing.assert_close(logits(loaded), logits(small), atol=1e-12, rtol=0)
    cut(loaded)
    assert loaded.config.layer_shapes == [[3, units], [3, units, 16]]
    torch.testing.assert_close(logits(loaded), wanted, atol=1e-10, rtol=0)


def test_fact_20_rows_of_queries_alone_stay() -> None:
    model = base("Bert", **WIDE)
    rows("Bert", model, 0, slice(None))
    wanted = logits(model)
    cut(model)
    assert model.config.layer_shapes == [[3, 16], [3, 16]]
    torch.testing.assert_close(logits(model), wanted, atol=1e-10, rtol=0)
    with torch.no_grad():  # without a bias they go
        model.bert.encoder.layer[1].attention.self.query.bias.zero_()
        model.bert.encoder.layer[1].attention.self.value.weight[8:24] = 0.0
        model.bert.encoder.layer[1].attention.self.value.weight[32:48] = 0.0
        model.bert.encoder.layer[1].attention.self.value.weight[56:72] = 0.0
    wanted = logits(model)
    cut(model)
    assert model.config.layer_shapes == [[3, 16], [3, 16, 8]]
    torch.testing.assert_close(logits(model), wanted, atol=1e-10, rtol=0)


# --- blocks that stay scattered ------------------------------------------------------------------
SCATTERED = {
    "hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 96, "num_hidden_layers": 2,
    "max_position_embeddings": 40,
}  # fmt: skip


def scattered(kind: str, share: float) -> PeftModel:
    """Blocks of 8 × 8 at random places, in fp32."""
    config = SploraConfig(
        task_type="SEQ_CLS", r=2, init_range=0.3, mask_structure="blocks", mask_block_rows=8,
        mask_block_cols=8, mask_init="uniform", mask_scale=1.0, final_threshold=share,
    )  # fmt: skip
    return get_peft_model(base(kind, **SCATTERED).float(), config).eval()


def long_inputs() -> dict[str, Tensor]:
    """More tokens than `FEWEST_TOKENS`."""
    return {"input_ids": torch.randint(3, 31, (4, 32), generator=torch.Generator().manual_seed(2))}


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DebertaV2"])
def test_scattered_blocks_are_left_out_and_load_again(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = scattered(kind, 0.25)
    small = model.compact()
    assert small.config.sparse_blocks == [8, 8]
    small.save_pretrained(tmp_path)
    loaded = ours.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    seen: list[int] = []
    product = block_sparse.block_product
    monkeypatch.setattr(
        block_sparse, "block_product", lambda x, *rest: [seen.append(1), product(x, *rest)][1]
    )
    with torch.no_grad():
        wanted = model(**long_inputs()).logits
        assert not seen
        for compact in (small, loaded, copy.deepcopy(small)):
            seen.clear()
            found = compact(**long_inputs()).logits
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
            assert len(seen) == 9  # of 12 layers: after the last attention there are 4 rows
    small.train()(**long_inputs(), labels=torch.tensor([0, 2, 1, 0])).loss.backward()
    assert all(p.grad is not None for p in small.parameters())
    lora = get_peft_model(loaded, LoraConfig(task_type="SEQ_CLS", init_lora_weights=False)).eval()
    with torch.no_grad():  # merging fills the blocks: they count
        apart = lora(**long_inputs()).logits
        merged = lora.merge_and_unload()
        torch.testing.assert_close(merged(**long_inputs()).logits, apart, atol=1e-5, rtol=1e-5)
        assert (apart - wanted).abs().max() > 1e-3


def test_many_blocks_take_whole_products() -> None:
    small = scattered("Bert", 0.5).compact()
    assert small.config.sparse_blocks is None
    assert type(small.bert.encoder.layer[0].output.dense) is nn.Linear
    for size in ([8], [8, 0], [8, 4, 2]):
        with pytest.raises(ours.ConfigError, match="sparse_blocks is"):
            ours.BertModel(ours.BertConfig(**SIZES, sparse_blocks=size))
    with pytest.raises(ours.ConfigError, match="GPT-2"):
        ours.GPT2Model(ours.GPT2Config(**GPT2, sparse_blocks=[8, 4]))
