"""GPT-2 is Hugging Face's in logits, losses and files; its fused layer is Microsoft's."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import loralib as lora
import transformers_patched as ours
from transformers_patched import heads

hf = pytest.importorskip("transformers")
hf.logging.set_verbosity_error()
hf.logging.disable_progress_bar()

SIZES = [
    dict(n_embd=36, n_head=3),
    dict(n_embd=35, n_head=5, n_inner=17, activation_function="relu"),
    dict(n_embd=24, n_head=1, activation_function="gelu", tie_word_embeddings=False),
]
LENGTHS = (17, 9, 4)


def peer(head: str, seed: int = 0, **sizes) -> torch.nn.Module:
    """A Hugging Face model with every weight random, biases and LayerNorms included."""
    torch.manual_seed(seed)
    config = hf.GPT2Config(
        vocab_size=61, n_layer=2, n_positions=29, num_labels=3, pad_token_id=0, eos_token_id=1,
        bos_token_id=1, **sizes,
    )  # fmt: skip
    model = getattr(hf, f"GPT2{head}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.7 / config.n_embd**0.5)
    return model


def batch(left: bool = False) -> tuple[Tensor, Tensor]:
    """Three rows of 17, 9 and 4 tokens, padded with 0."""
    mask = torch.stack([torch.arange(17) < n for n in LENGTHS])
    mask = mask.flip(1) if left else mask
    return torch.randint(4, 61, (3, 17)).where(mask, 0), mask


def packed(ids: Tensor, mask: Tensor) -> dict:
    offsets = F.pad(mask.sum(1).cumsum(0), (1, 0)).int()
    return {"input_ids": ids[mask], "cu_seqlens": offsets, "max_seqlen": 17}


def tiny(**options) -> ours.GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, n_embd=24, n_head=2, n_layer=2, n_positions=29)
    none = dict(embd_pdrop=0.0, attn_pdrop=0.0, resid_pdrop=0.0)
    return ours.GPT2LMHeadModel(ours.GPT2Config(**{**sizes, **none, **options})).eval()


@pytest.mark.parametrize("head", ["Model", "LMHeadModel", "ForSequenceClassification"])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda sizes: str(sizes["n_embd"]))
def test_equals_transformers_padded_and_packed(head: str, sizes: dict, tmp_path: Path) -> None:
    theirs = peer(head, **sizes)
    theirs.save_pretrained(tmp_path / "theirs")
    model, report = getattr(ours, f"GPT2{head}").from_pretrained(
        tmp_path / "theirs", output_loading_info=True
    )
    assert not report.missing and not report.unexpected
    ids, mask = batch()
    name = "last_hidden_state" if head == "Model" else "logits"
    with torch.no_grad():
        expected = theirs(ids, attention_mask=mask.long())[name]
        padded = model(ids, attention_mask=mask.long())[name]
        flat = model(**packed(ids, mask))[name]
    if head == "ForSequenceClassification":
        mask = slice(None)
    limit = 1e-5 * max(1.0, expected[mask].abs().max())
    assert (padded[mask] - expected[mask]).abs().max() <= limit
    assert (flat - expected[mask]).abs().max() <= limit

    model.save_pretrained(tmp_path / "ours")
    back, info = getattr(hf, f"GPT2{head}").from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not any(info.values()), info
    for key, weight in theirs.state_dict().items():
        assert torch.equal(back.state_dict()[key], weight), key


def test_a_single_token(tmp_path: Path) -> None:
    """Its query, key and value are views into one row."""
    theirs = peer("LMHeadModel", **SIZES[0])
    theirs.save_pretrained(tmp_path)
    model = ours.GPT2LMHeadModel.from_pretrained(tmp_path)
    with torch.no_grad():
        for ids in (torch.tensor([[5]]), torch.tensor([[5], [7]])):
            assert (model(ids).logits - theirs(ids).logits).abs().max() <= 1e-5


def test_hidden_states_attentions_embeds_and_left_padding(tmp_path: Path) -> None:
    theirs = peer("LMHeadModel", **SIZES[0])
    theirs.set_attn_implementation("eager")
    theirs.save_pretrained(tmp_path)
    model = ours.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids, mask = batch(left=True)
    embeds = model.get_input_embeddings()(ids).detach()
    asked = {"output_hidden_states": True, "output_attentions": True}
    with torch.no_grad():
        expected = theirs(inputs_embeds=embeds, attention_mask=mask.long(), **asked)
        got = model(inputs_embeds=embeds, attention_mask=mask.long(), **asked)
    assert (got.logits - expected.logits)[mask].abs().max() <= 1e-5
    for x, y in zip(got.hidden_states, expected.hidden_states, strict=True):
        assert (x - y)[mask].abs().max() <= 1e-5
    for x, y in zip(got.attentions, expected.attentions, strict=True):
        rows = mask[:, None, :, None].expand_as(x)
        assert (x - y)[rows].abs().max() <= 1e-6


@pytest.mark.parametrize("form", ["padded", "left", "packed"])
def test_losses_and_gradients(form: str, tmp_path: Path) -> None:
    theirs = peer("LMHeadModel", **SIZES[0])
    theirs.save_pretrained(tmp_path)
    model = ours.GPT2LMHeadModel.from_pretrained(tmp_path)
    ids, mask = batch(left=form == "left")
    labels = ids.masked_fill(~mask | (torch.rand(3, 17) < 0.4), -100)
    if form == "left":  # Transformers predicts each first token from the padding before it
        labels[[1, 2], [17 - 9, 17 - 4]] = -100
    expected = theirs(ids, attention_mask=mask.long(), labels=labels).loss
    if form == "packed":
        # a sequence's first token is never scored, whatever precedes it in the pack
        loss = model(**packed(ids, mask), labels=labels[mask]).loss
    else:
        loss = model(ids, attention_mask=mask.long(), labels=labels).loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    ours_by_name = dict(model.named_parameters())
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(
            ours_by_name[name].grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name
        )


@pytest.mark.parametrize("longest", [0, 512])
@pytest.mark.parametrize("form", ["padded", "left", "packed"])
def test_causal_attention_is_the_formula(
    form: str, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The grouped products and torch's kernel, forward and backward, and with dropout's mean."""
    from transformers_patched import attention as module
    from transformers_patched.layout import SequenceLayout

    monkeypatch.setattr(module, "LONGEST_PRODUCTS", longest)
    monkeypatch.setattr(module, "LONGEST_PRODUCTS_PADDED_FP32", longest)
    mask = batch(left=form == "left")[1]
    torch.manual_seed(1)
    q, k, v, g = torch.randn(4, 3, 17, 2, 8, dtype=torch.float64).float().unbind(0)
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / 8**0.5
    visible = torch.ones(17, 17).tril().bool() & mask[:, None, None, :]
    p = scores.masked_fill(~visible, float("-inf")).softmax(-1).nan_to_num()
    expected = torch.einsum("bhij,bjhd->bihd", p, v)[mask]
    if form == "packed":
        offsets = F.pad(mask.sum(1).cumsum(0), (1, 0)).int()
        layout = SequenceLayout.packed(offsets, 17)
        got = module.attention(q[mask], k[mask], v[mask], layout, causal=True)
    else:
        layout = SequenceLayout.padded(mask, 3, 17, "cpu")
        got = module.attention(q, k, v, layout, causal=True)[mask]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad((x * g[mask]).sum(), (q, k, v)) for x in (got, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


# --- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("rows_at_once", [1, 4, 100])
def test_sliced_loss_is_cross_entropy(
    epsilon: float, rows_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heads, "LOGITS_AT_ONCE", 31 * rows_at_once)
    hidden = torch.randn(11, 5, requires_grad=True)
    weight = torch.randn(31, 5, requires_grad=True)
    targets = torch.randint(0, 31, (11,))
    loss = heads.language_model_loss(hidden, weight, targets, epsilon)
    logits = hidden @ weight.T
    expected = F.cross_entropy(logits, targets, reduction="sum", label_smoothing=epsilon)
    torch.testing.assert_close(loss, expected)
    grads = [torch.autograd.grad(3 * x, (hidden, weight)) for x in (loss, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        heads.token_losses(hidden, weight, targets),
        F.cross_entropy(logits, targets, reduction="none"),
    )


def test_the_papers_smoothed_example() -> None:
    """Logits (ln 3, 0), target 0, ε = 0.1: 0.342613."""
    weight = torch.tensor([[3.0], [1.0]]).log()
    loss = heads.language_model_loss(torch.ones(1, 1), weight, torch.zeros(1).long(), 0.1)
    assert loss.item() == pytest.approx(0.342613, abs=1e-6)


def test_logits_never_exist_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that any operation gives, forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.is_floating_point():
                Largest.size = max(Largest.size, out.numel())
            return out

    vocabulary = 501
    monkeypatch.setattr(heads, "LOGITS_AT_ONCE", 4 * vocabulary)
    model = tiny(apply_lora=True, lora_r=2, vocab_size=vocabulary)
    lora.mark_only_lora_as_trainable(model)
    ids, mask = batch()
    with Largest():
        model(**packed(ids, mask), labels=ids[mask]).loss.backward()
    assert 0 < Largest.size < 27 * vocabulary  # 27 tokens are scored


def test_no_token_scored_gives_zero() -> None:
    model = tiny()
    ids, _ = batch()
    loss = model(ids, labels=torch.full_like(ids, -100)).loss
    loss.backward()
    assert loss.item() == 0.0


# --- files ---------------------------------------------------------------------------------------


def original_names(state: dict[str, Tensor], short: bool) -> dict[str, Tensor]:
    """What Microsoft's recipe writes, or what it reads (`short`: OpenAI's names)."""
    renamed = {}
    for key, value in state.items():
        if key == "lm_head.weight":
            key = "lm_head.decoder.weight"
        if short:
            key = key.replace(".weight", ".g" if ".ln_" in key else ".w").replace(".bias", ".b")
            key = key.replace("wte.w", "wte.weight").replace("wpe.w", "wpe.weight")
        renamed[f"module.{key}"] = value
    renamed["module.transformer.h.0.attn.bias"] = torch.ones(1, 1, 29, 29)
    return {"model_state_dict": renamed}


@pytest.mark.parametrize("names", ["bare", "recipe", "short", "masks"])
def test_checkpoints_of_every_origin(names: str, tmp_path: Path) -> None:
    theirs = peer("LMHeadModel", **SIZES[0])
    theirs.config.save_pretrained(tmp_path)
    state = theirs.state_dict()
    if names == "bare":  # as the hub's own gpt2
        state = {k.removeprefix("transformer."): v for k, v in state.items() if "lm_head" not in k}
    elif names == "masks":
        state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 29, 29)
        state["transformer.h.1.attn.masked_bias"] = torch.tensor(-1e4)
    else:
        state = original_names(state, names == "short")
    torch.save(state, tmp_path / "pytorch_model.bin")
    model, report = ours.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report.missing and not report.unexpected
    ids, _ = batch()
    with torch.no_grad():
        assert (model(ids).logits - theirs(ids).logits).abs().max() <= 1e-5


def test_another_prefix_is_an_error(tmp_path: Path) -> None:
    theirs = peer("LMHeadModel", **SIZES[0])
    theirs.config.save_pretrained(tmp_path)
    state = {k.replace("transformer.", "gpt."): v for k, v in theirs.state_dict().items()}
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ours.CheckpointError, match="'gpt.'"):
        ours.GPT2LMHeadModel.from_pretrained(tmp_path)


def test_sizes_that_are_no_gpt2() -> None:
    for wrong in (
        dict(n_embd=10, n_head=3),
        dict(scale_attn_weights=False),
        dict(scale_attn_by_inverse_layer_idx=True),
        dict(apply_lora=True, lora_modules=("dense",)),
    ):
        with pytest.raises(ours.ConfigError):
            ours.GPT2Model(ours.GPT2Config(**wrong))
    with pytest.raises(ValueError, match="longer than this model's 29 positions"):
        tiny()(torch.zeros(1, 30, dtype=torch.long))
    with pytest.raises(ours.CheckpointError, match="GPT2ForMaskedLM"):
        ours.AutoModelForMaskedLM.from_config(ours.GPT2Config())


# --- the fused layer's factors -------------------------------------------------------------------


def randomise(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()


@pytest.mark.parametrize("kind", ["lora", "dylora"])
def test_query_and_value_have_factors_of_their_own(kind: str) -> None:
    """ΔW, for counts cannot tell these factors from one pair over all of c_attn."""
    model = tiny(apply_lora=True, lora_r=3, lora_alpha=6, lora_type=kind)
    randomise(model)
    layer = model.transformer.h[1].attn.c_attn
    delta = layer.delta_weight()  # as stored, (24, 72)
    q, k, v = delta.T.chunk(3)  # logical (out, in) rows
    A, B = layer.lora_A, layer.lora_B  # (6, 24), (48, 3)
    torch.testing.assert_close(q, 2 * B[:24] @ A[:3])
    torch.testing.assert_close(v, 2 * B[24:] @ A[3:])
    assert not k.any()
    assert torch.linalg.matrix_rank(delta) == 6  # one shared A would give 3


def test_trainable_counts_of_the_papers_models() -> None:
    for sizes, expected in (
        (dict(), 147_456),
        (dict(n_embd=1024, n_layer=24, n_head=16), 393_216),
        (dict(n_embd=1280, n_layer=36, n_head=20), 737_280),
    ):
        config = ours.GPT2Config(apply_lora=True, lora_r=4, vocab_size=10, **sizes)
        with torch.device("meta"):
            model = ours.GPT2Model(config)
            lora.mark_only_lora_as_trainable(model)
        assert model.num_parameters(only_trainable=True) == expected


def test_every_named_layer_can_be_low_rank(tmp_path: Path) -> None:
    names = ("key", "attn.c_proj", "c_fc", "mlp.c_proj")
    tiny().save_pretrained(tmp_path)
    plain = ours.GPT2LMHeadModel.from_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="newly initialised.*lora_A"):
        model = ours.GPT2LMHeadModel.from_pretrained(
            tmp_path, apply_lora=True, lora_r=2, lora_modules=names
        )
    ids, _ = batch()
    torch.testing.assert_close(model(ids).logits, plain(ids).logits)  # B starts at zero
    randomise(model)
    block = model.transformer.h[0]
    q, k, v = block.attn.c_attn.delta_weight().T.chunk(3)
    assert k.any() and not q.any() and not v.any()
    expected = tiny()
    expected.load_state_dict(plain.state_dict())
    with torch.no_grad():
        for mine, other in zip(model.transformer.h, expected.transformer.h, strict=True):
            for path in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"):
                other.get_submodule(path).weight += mine.get_submodule(path).delta_weight()
        torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)


def test_recipe_adapters_load(tmp_path: Path) -> None:
    """Microsoft's LoRA-only file: factors under `module.`, with the layers' index buffers."""
    model = tiny(apply_lora=True, lora_r=2)
    randomise(model)
    state = {f"module.{k}": v for k, v in model.state_dict().items()}
    state["module.transformer.h.0.attn.c_attn.lora_ind"] = torch.ones(72).bool()
    torch.save({"model_state_dict": state}, tmp_path / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path)
    back, report = ours.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report.missing and not report.unexpected
    ids, _ = batch()
    torch.testing.assert_close(back(ids).logits, model(ids).logits)


# --- training ------------------------------------------------------------------------------------


def test_gradient_checkpointing_and_filler_change_nothing() -> None:
    model = tiny(apply_lora=True, lora_r=2).train()
    randomise(model)
    ids, mask = batch()
    losses, grads = [], []
    for on in (False, True):
        if on:
            model.gradient_checkpointing_enable()
        model.zero_grad()
        loss = model(**packed(ids, mask), labels=ids[mask]).loss
        loss.backward()
        losses.append(loss.item())
        grads.append(model.transformer.h[0].attn.c_attn.lora_A.grad)
    assert losses[0] == losses[1] and model.is_gradient_checkpointing
    torch.testing.assert_close(*grads)
    assert losses[0] == pytest.approx(model.eval()(ids, attention_mask=mask, labels=ids.masked_fill(
        ~mask, -100)).loss.item(), rel=1e-5)  # fmt: skip
