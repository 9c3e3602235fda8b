"""What must hold for any model and contexts: batches, repeats, cache growth, adapters, errors."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import transformers_patched as ours
from peft_custom import (
    AdaLoraConfig,
    BimLoraConfig,
    DyLoraConfig,
    LoraConfig,
    get_peft_model,
)
from transformers_patched.generation import cache, generate


def random_model(seed: int = 0, std: float = 0.5, **options) -> ours.GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = ours.GPT2Config(
        vocab_size=31, n_embd=24, n_layer=2, n_head=2, n_positions=64, **options
    )
    model = ours.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, std)
    return model


MODEL = random_model()
CONTEXTS = [[4], [7, 3, 3, 9, 12, 30], [1, 2], [11, 5, 8, 5, 8, 20, 21], [1, 2], [6, 6, 6]]
WAYS = (
    dict(num_beams=4, no_repeat_ngram_size=2, length_penalty=0.8),
    dict(num_beams=3, rules="transformers", min_new_tokens=3, repetition_penalty=1.2),
    dict(num_beams=1),
    dict(do_sample=True, temperature=0.8, top_p=0.9),
)


@settings(max_examples=30, deadline=None)
@given(
    contexts=st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=12), max_size=7),
    batch_size=st.integers(1, 8),
    eos=st.sets(st.integers(0, 30), min_size=1, max_size=6),
    way=st.sampled_from(WAYS),
)
def test_batches_change_nothing(contexts: list, batch_size: int, eos: set, way: dict) -> None:
    """Whoever is decoded beside a context, and in whatever lane."""

    def run(part: list, batch: int | None) -> list:
        seed = {"generator": torch.Generator().manual_seed(3)} if "do_sample" in way else {}
        return generate(
            MODEL, part, max_new_tokens=9, batch_size=batch, eos_token_id=sorted(eos), **way, **seed
        )

    together = run(contexts, batch_size)
    assert together == run(contexts, None)
    if "do_sample" not in way:
        assert together == [run([context], None)[0] for context in contexts]
    for tokens in together:
        assert len(tokens) == 9 or (tokens and tokens[-1] in eos)
        assert not eos & set(tokens[:-1])
        pairs = list(zip(tokens, tokens[1:], strict=False))
        assert "no_repeat_ngram_size" not in way or len(pairs) == len(set(pairs))


def test_equal_contexts_are_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    first = cache.Prefill.__init__

    def counting(self, pool, lane, layout) -> None:
        seen.append(layout.num_sequences)
        first(self, pool, lane, layout)

    monkeypatch.setattr(cache.Prefill, "__init__", counting)
    found = generate(MODEL, CONTEXTS * 3, max_new_tokens=4, num_beams=2)
    assert sum(seen) == 5 and found[:6] == found[6:12] == found[12:]
    assert found[2] == found[4] and found[2] is not found[4]


def test_slots_grow_and_are_used_again(monkeypatch: pytest.MonkeyPatch) -> None:
    options = dict(max_new_tokens=20, num_beams=6, eos_token_id=3)
    expected = generate(MODEL, CONTEXTS, **options)
    widths = []
    make, reserve = cache.KeyValuePool.__init__, cache.KeyValuePool.reserve

    def few(self, heads, lanes, beams, slots, like) -> None:
        make(self, heads, lanes, beams, 3, like)

    def noting(self, width) -> None:
        reserve(self, width)
        widths.append(width)

    monkeypatch.setattr(cache.KeyValuePool, "__init__", few)
    monkeypatch.setattr(cache.KeyValuePool, "reserve", noting)
    assert generate(MODEL, CONTEXTS, **options) == expected
    assert 7 < max(widths) < 7 + 6 * 19  # fewer than a slot for every token of every beam


def test_draws_of_a_context_are_its_own() -> None:
    options = dict(max_new_tokens=8, do_sample=True, eos_token_id=None)
    runs = [
        generate(MODEL, [[4]] * 3, generator=torch.Generator().manual_seed(s), **options)
        for s in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]
    assert len({tuple(tokens) for tokens in runs[0]}) > 1


# --- adapted models ------------------------------------------------------------------------------

TUNERS = {
    "lora": lambda: LoraConfig(r=3, lora_dropout=0.5),
    "dylora": lambda: DyLoraConfig(r=3),
    "adalora": lambda: AdaLoraConfig(init_r=3, target_r=2, total_step=10, tinit=1, tfinal=1),
    "bim_lora": lambda: BimLoraConfig(r=3, target_modules=["c_attn"], block_size=4),
}


@pytest.mark.parametrize("tuner", TUNERS)
def test_adapted_models_decode_merged_and_stay_as_they_are(tuner: str) -> None:
    model = get_peft_model(random_model(), TUNERS[tuner]())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.5)
    model.train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    options = dict(max_new_tokens=10, num_beams=3, eos_token_id=3, no_repeat_ngram_size=2)
    got = generate(model, CONTEXTS, **options)
    assert all(module.training for module in model.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert not any(getattr(module, "merged_adapters", []) for module in model.modules())
    model.eval()
    plain = model.merge_and_unload()
    assert got == generate(plain, CONTEXTS, **options)
    assert got != generate(random_model(), CONTEXTS, **options)


@pytest.mark.parametrize("kind", ["lora", "dylora"])
def test_loralib_layers(kind: str) -> None:
    model = random_model(apply_lora=True, lora_r=2, lora_type=kind)
    options = dict(max_new_tokens=10, num_beams=3, eos_token_id=3, no_repeat_ngram_size=2)
    got = generate(model.train(), CONTEXTS, **options)
    plain = random_model()
    plain.load_state_dict(model.state_dict(), strict=False)
    for mine, other in zip(model.transformer.h, plain.transformer.h, strict=True):
        other.attn.c_attn.weight.data += mine.attn.c_attn.delta_weight()
    assert got == generate(plain, CONTEXTS, **options)


def test_untied_and_bfloat16() -> None:
    assert generate(random_model(tie_word_embeddings=False), CONTEXTS, max_new_tokens=3)
    assert generate(random_model().bfloat16(), CONTEXTS, max_new_tokens=3, num_beams=2)


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("contexts", "options", "message"),
    [
        ([[1], []], {}, r"contexts\[1\] is empty"),
        ([[1], [2, 31]], {}, r"contexts\[1\] has the id 31.*ends at 30"),
        ([[-1]], {}, r"contexts\[0\] has the id -1"),
        ([[1] * 60], {}, r"contexts\[0\] has 60 tokens.*64 positions: keep its last 55"),
        ([5], {}, r"contexts\[0\] is a int"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens=0"),
        ([[1]], {"num_beams": 0}, "num_beams=0"),
        ([[1]], {"rules": "peft"}, "rules='peft'"),
        ([[1]], {"early_stopping": True}, "early_stopping=True belongs to rules='transformers'"),
        ([[1]], {"early_stopping": "ever", "rules": "transformers"}, "early_stopping='ever'"),
        ([[1]], {"repetition_penalty": 0.0}, "repetition_penalty=0.0"),
        ([[1]], {"do_sample": True, "num_beams": 2}, "num_beams must be 1"),
        ([[1]], {"top_p": 0.5}, "need do_sample=True"),
        ([[1]], {"top_p": 1.5, "do_sample": True}, "top_p=1.5"),
        ([[1]], {"batch_size": 0}, "batch_size=0"),
        ([[1]], {"length_penalty": float("nan")}, "length_penalty=nan"),
    ],
)
def test_errors_name_what_is_wrong(contexts: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(MODEL, contexts, **{"max_new_tokens": 10, **options})


def test_the_longest_possible_context() -> None:
    """The last new token needs no position."""
    assert len(generate(MODEL, [[1] * 55], max_new_tokens=10)[0]) == 10


def test_another_model_is_refused() -> None:
    with pytest.raises(TypeError, match="GPT2LMHeadModel.*not a Linear"):
        generate(torch.nn.Linear(2, 2), [[1]], max_new_tokens=1)


def test_no_contexts() -> None:
    assert generate(MODEL, [], max_new_tokens=3) == []


def test_gpt2_tokenizer_folder(real_data, tmp_path: Path) -> None:
    """vocab.json and merges.txt of GPT-2 are no RoBERTa's: no <s>, and no special tokens added."""
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).symlink_to(real_data(f"tokenizers/gpt2/{name}"))
    tokenizer = ours.AutoTokenizer.from_pretrained(tmp_path)
    text = "name : Blue Spice | Type : coffee shop | area : city centre"
    ids = [3672, 1058, 4518, 43537, 930, 5994, 1058, 6891, 6128, 930, 1989, 1058, 1748, 7372]
    assert tokenizer(text)["input_ids"] == ids
    assert tokenizer.decode(ids) == text and tokenizer.eos_token_id == 50256
