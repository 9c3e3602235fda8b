"""DyLoRA in existing models: ranks, stacked ranks, options, files, export to PEFT."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
from support.peft_tiny import IDS, bert
from torch import Tensor, nn

import transformers_patched as patched
from peft_custom import (
    DyLoraConfig,
    LoraConfig,
    PeftModel,
    attach,
    get_peft_model,
    set_peft_model_state_dict,
)
from peft_custom.hooks import schedule_finished

transformers = pytest.importorskip("transformers")
R = 5
TARGETS = ["query", "value", "word_embeddings"]


def nested(base: nn.Module | None = None, **options) -> PeftModel:
    """Nested adapters whose factors are all non-zero, on a tiny Hugging Face BERT by default."""
    config = {"r": R, "lora_alpha": 6, "target_modules": TARGETS, "task_type": "SEQ_CLS"}
    model = get_peft_model(bert() if base is None else base, DyLoraConfig(**{**config, **options}))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(std=0.3)
    return model.eval()


def logits(model: nn.Module, ids: Tensor = IDS) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


# --- ranks ----------------------------------------------------------------------------------------
def test_every_rank_is_a_truncated_lora_adapter(tmp_path: Path) -> None:
    model = nested()
    at = {}
    for b in range(1, R + 1):
        model.base_model.set_rank(b)
        assert model.get_rank() == b
        at[b] = logits(model)
        config, tensors = model.base_model.export("default", rank=b)
        assert type(config) is LoraConfig and (config.r, config.lora_alpha) == (b, 6)
        plain = get_peft_model(bert(), config).eval()
        state = {f"base_model.model.{key}": value for key, value in tensors.items()}
        set_peft_model_state_dict(plain, state, strict=False)
        torch.testing.assert_close(logits(plain), at[b], rtol=0, atol=1e-5)
    assert len({round(float(value.sum()), 4) for value in at.values()}) == R


def test_at_rank_and_errors() -> None:
    model = nested()
    with model.at_rank(2):
        assert model.get_rank() == 2
    assert model.get_rank() == R
    for bad in (0, R + 1):
        with pytest.raises(ValueError, match=f"from 1 to R={R}"):
            model.set_rank(bad)
        with pytest.raises(ValueError, match=f"from 1 to R={R}"):
            model.base_model.export("default", rank=bad)
    model.add_adapter("other", DyLoraConfig(r=3, target_modules=TARGETS, task_type="SEQ_CLS"))
    model.set_rank(4)
    model.set_adapter("other")
    assert model.get_rank() == 3  # every adapter has a rank of its own
    model.set_adapter("default")
    assert model.get_rank() == 4
    model.delete_adapter("other")
    with pytest.raises(NotImplementedError, match="export each at a rank"):
        model.base_model.add_weighted_adapter(["default"], [1.0], "sum")


def test_merging_follows_the_rank_and_is_undone_exactly() -> None:
    model = nested()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    expected = {}
    for b in (4, 2, R):
        model.set_rank(b)
        expected[b] = logits(model)
    model.merge_adapter()
    for b in (2, R, 4):
        model.set_rank(b)
        torch.testing.assert_close(logits(model), expected[b], rtol=0, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model.set_rank(2)
    merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged), expected[2], rtol=0, atol=1e-5)
    assert not [name for name, _ in merged.named_parameters() if "lora" in name]


def test_ranks_stacked_in_one_padded_batch() -> None:
    model, ranks = nested(), [1, R, 3]
    mask = torch.ones_like(IDS)
    mask[1, 4:] = 0
    expected = []
    for b in ranks:
        with model.at_rank(b), torch.no_grad():
            expected.append(model(IDS, attention_mask=mask).logits)
    with model.batched_ranks(ranks), torch.no_grad():
        found = model(IDS.repeat(3, 1), attention_mask=mask.repeat(3, 1)).logits.chunk(3)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
    model.train()
    with pytest.raises(ValueError, match="training mode"), model.batched_ranks(ranks):
        pass


def ours(kind: str = "Roberta", **options) -> nn.Module:
    """A tiny model of this project's own."""
    torch.manual_seed(2)
    config = getattr(patched, f"{kind}Config")(
        vocab_size=60, hidden_size=24, num_hidden_layers=2, num_attention_heads=3,
        intermediate_size=40, max_position_embeddings=20, num_labels=3, initializer_range=0.3,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **options,
    )  # fmt: skip
    return getattr(patched, f"{kind}ForSequenceClassification")(config).eval()


@pytest.mark.parametrize("wiring", ["peft_custom", "loralib"])
def test_ranks_stacked_in_one_packed_batch(wiring: str) -> None:
    import loralib

    if wiring == "loralib":
        model = ours(apply_lora=True, lora_type="dylora", lora_r=R)
        torch.manual_seed(1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "lora_" in name:
                    p.normal_(std=0.3)
    else:
        model = nested(ours(), target_modules="all-linear")
    ids, lengths = torch.randint(5, 60, (17,)), [6, 3, 8]

    def run(copies: int) -> Tensor:
        bounds = torch.tensor([0, *(lengths * copies)]).cumsum(0).int()
        packed = {"input_ids": ids.repeat(copies), "cu_seqlens": bounds, "max_seqlen": 8}
        with torch.no_grad():
            return model(**packed).logits

    ranks = [2, 1, R, 4]
    expected = []
    for b in ranks:
        with loralib.at_rank(model, b):
            expected.append(run(1))
    with loralib.batched_ranks(model, ranks):
        found = run(4).chunk(4)
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=2e-5)


def test_conv1d_bases_and_layers_that_cannot_be_adapted() -> None:
    gpt2 = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(n_layer=1, n_head=2, n_embd=12, vocab_size=40, n_positions=16)
    )
    model = nested(gpt2, target_modules=["c_attn"], task_type="CAUSAL_LM")
    expected = {}
    for b in (1, 3):
        with model.at_rank(b):
            expected[b] = logits(model)
    with model.batched_ranks([1, 3]), torch.no_grad():
        found = model(IDS.repeat(2, 1)).logits.chunk(2)
    torch.testing.assert_close(found[0], expected[1], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[1], expected[3], rtol=0, atol=1e-5)
    model.set_rank(3)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected[3], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="Conv2d; adapters of type DYLORA go into Linear, Emb"):
        get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3)), DyLoraConfig(target_modules=["0"]))


def test_hooked_base_layers_compute_the_same() -> None:
    model = nested()
    expected = {}
    for b in (1, 4):
        with model.at_rank(b):
            expected[b] = logits(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda *unused: None)
    for b in (1, 4):
        with model.at_rank(b):
            torch.testing.assert_close(logits(model), expected[b], rtol=0, atol=1e-5)
    with model.batched_ranks([4, 1]), torch.no_grad():
        found = model(IDS.repeat(2, 1)).logits.chunk(2)
    torch.testing.assert_close(found[0], expected[4], rtol=0, atol=1e-5)


def test_mixed_adapters_at_their_own_ranks() -> None:
    model = nested()
    model.add_adapter("b", DyLoraConfig(r=2, target_modules=TARGETS, task_type="SEQ_CLS"))
    model.set_rank(3)
    alone = logits(model)
    names = ["default", "b", "default", "__base__"]
    with torch.no_grad():
        mixed = model(IDS, adapter_names=names).logits
    torch.testing.assert_close(mixed[[0, 2]], alone[[0, 2]], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="exclude each other"), model.batched_ranks([1, 2]):
        model(IDS, adapter_names=names)


# --- options --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r_min": 0}, "r_min=0: the smallest rank is a whole number from 1 to r=8"),
        ({"r_min": 9}, "r_min=9"),
        ({"r_min": True}, "r_min=True"),
        ({"dylora_mode": "half"}, "dylora_mode='half': use 'normal', 'frozen' or 'matryoshka'"),
        ({"dylora_dist": "geometric"}, r"dylora_dist='geometric': use 'uniform' or 'geometric\(p"),
        ({"dylora_dist": "geometric(1.5)"}, "0 < p < 1"),
        ({"dylora_dist": "geometric(1e)"}, "0 < p < 1"),
        ({"use_rslora": True}, "use_rslora=True"),
        ({"rank_pattern": {"query": 2}}, "one rank for all layers"),
        ({"init_lora_weights": "pissa"}, "PiSSA"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DyLoraConfig(**{"r": 8, **options})


def test_adapters_of_another_kind_are_refused() -> None:
    with pytest.raises(TypeError, match="takes LoraConfig, not DyLoraConfig"):
        get_peft_model(bert(), LoraConfig(target_modules=["query"])).add_adapter(
            "nested", DyLoraConfig(target_modules=["query"])
        )
    with pytest.raises(TypeError, match="takes DyLoraConfig, not LoraConfig"):
        nested().add_adapter("plain", LoraConfig(target_modules=["query"]))


# --- files ----------------------------------------------------------------------------------------
def test_save_and_load_the_nested_adapter(tmp_path: Path) -> None:
    model = nested(r_min=2, dylora_mode="frozen", dylora_dist="geometric(0.15)")
    model.set_rank(2)
    attach(model, torch.optim.AdamW(p for p in model.parameters() if p.requires_grad), 10).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    assert values["peft_type"] == "DYLORA" and values["r"] == R and "finished" not in values
    loaded = PeftModel.from_pretrained(bert(), tmp_path)
    assert loaded.get_rank() == R and schedule_finished(loaded.base_model)
    assert loaded.peft_config["default"].sampling == model.peft_config["default"].sampling
    for b in range(1, R + 1):
        with model.at_rank(b), loaded.at_rank(b):
            assert torch.equal(logits(model), logits(loaded))


def test_never_driven_is_unfinished(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="no optimiser has driven it"):
        nested().save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["finished"] is False
    assert not schedule_finished(PeftModel.from_pretrained(bert(), tmp_path).base_model)


@pytest.mark.parametrize("base", ["Hugging Face's", "ours, bf16"])
def test_peft_loads_the_export_at_any_rank(base: str, tmp_path: Path) -> None:
    def fresh() -> nn.Module:
        if base == "Hugging Face's":
            return bert()
        made = ours("Bert").to(torch.bfloat16)
        made.classifier.float()
        return made

    model = nested(fresh())
    attach(model, torch.optim.SGD((p for p in model.parameters() if p.requires_grad), 0.1), 1)
    for b in (1, 3, R):
        folder = tmp_path / str(b)
        model.save_pretrained(folder, rank=b)
        values = json.loads((folder / "adapter_config.json").read_text())
        assert (values["peft_type"], values["r"], values["lora_alpha"]) == ("LORA", b, 6)
        assert not [key for key in values if "dylora" in key or key in ("r_min", "finished")]
        again = PeftModel.from_pretrained(fresh(), folder)  # our own plain LoRA
        with model.at_rank(b):
            tolerance = 1e-5 if base == "Hugging Face's" else 0.03
            torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=tolerance)
            if base == "Hugging Face's":
                theirs = peft.PeftModel.from_pretrained(fresh(), str(folder)).eval()
                torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-5)


def test_copies_keep_their_ranks() -> None:
    model = nested()
    model.set_rank(2)
    other = copy.deepcopy(model)
    other.set_rank(4)
    assert (model.get_rank(), other.get_rank()) == (2, 4)
