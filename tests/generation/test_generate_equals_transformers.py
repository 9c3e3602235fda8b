"""rules="transformers": the tokens of Transformers' `generate`, given one context at a time."""

import itertools

import pytest
import torch

import transformers_patched as ours
from transformers_patched.generation import generate

hf = pytest.importorskip("transformers")
hf.logging.set_verbosity_error()
hf.logging.disable_progress_bar()

VOCABULARY = 53


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[tuple]:
    """(Transformers', ours): one flat, one sure of itself, one with a leaning to end."""
    pairs = []
    for seed, std in enumerate((0.3, 0.9, 0.6)):
        torch.manual_seed(seed)
        config = hf.GPT2Config(
            vocab_size=VOCABULARY, n_embd=24, n_layer=2, n_head=2, n_positions=64,
            bos_token_id=1, eos_token_id=1,
        )  # fmt: skip
        theirs = hf.GPT2LMHeadModel(config).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.normal_(0.0, std)
            if seed == 2:
                theirs.transformer.ln_f.bias += 0.4 * theirs.transformer.wte.weight[3]
        folder = tmp_path_factory.mktemp(f"model{seed}")
        theirs.save_pretrained(folder)
        pairs.append((theirs, ours.GPT2LMHeadModel.from_pretrained(folder)))
    return pairs


def contexts() -> list[list[int]]:
    torch.manual_seed(7)
    return [torch.randint(4, VOCABULARY, (n,)).tolist() for n in (1, 13, 5, 21)]


def reference(model: torch.nn.Module, context: list[int], eos: tuple[int, ...], **options):
    """`generate` of Transformers without the context and the padding."""
    out = model.generate(
        torch.tensor([context]), attention_mask=torch.ones(1, len(context), dtype=torch.long),
        eos_token_id=list(eos), pad_token_id=0, do_sample=False, **options,
    )[0, len(context) :].tolist()  # fmt: skip
    for i, token in enumerate(out):
        if token in eos:
            return out[: i + 1]
    return out


SETTINGS = {
    "plain": dict(num_beams=4),
    "greedy": dict(num_beams=1),
    "greedy penalties": dict(num_beams=1, repetition_penalty=1.4, no_repeat_ngram_size=2),
    "greedy length": dict(num_beams=1, min_new_tokens=9),
    "recipe": dict(num_beams=10, length_penalty=0.8, no_repeat_ngram_size=4),
    "two beams": dict(num_beams=2, length_penalty=2.0),
    "no length penalty": dict(num_beams=3, length_penalty=0.0),
    "negative length penalty": dict(num_beams=3, length_penalty=-0.7),
    "unigrams": dict(num_beams=3, no_repeat_ngram_size=1),
    "bigrams": dict(num_beams=5, no_repeat_ngram_size=2, length_penalty=1.3),
    "repetition": dict(num_beams=3, repetition_penalty=1.7),
    "rewarded repetition": dict(num_beams=3, repetition_penalty=0.8),
    "minimum": dict(num_beams=4, min_new_tokens=6),
    "stop early": dict(num_beams=3, early_stopping=True, length_penalty=0.6),
    "never": dict(num_beams=3, early_stopping="never", length_penalty=1.5),
    "never short": dict(num_beams=3, early_stopping="never", length_penalty=-0.5),
    "everything": dict(
        num_beams=4, repetition_penalty=1.2, no_repeat_ngram_size=3, min_new_tokens=4,
        length_penalty=0.9, early_stopping=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("eos", [(1,), (3,), (3, 17, 20)], ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
def test_tokens_are_transformers(setting: str, eos: tuple[int, ...], models: list) -> None:
    options = SETTINGS[setting]
    for theirs, model in models:
        expected = [reference(theirs, c, eos, max_new_tokens=14, **options) for c in contexts()]
        got = generate(
            model, contexts(), max_new_tokens=14, eos_token_id=eos, rules="transformers", **options
        )
        assert got == expected


def test_one_new_token(models: list) -> None:
    theirs, model = models[1]
    for beams in (1, 3):
        expected = [reference(theirs, c, (3,), max_new_tokens=1, num_beams=beams)
                    for c in contexts()]  # fmt: skip
        assert expected == generate(
            model, contexts(), max_new_tokens=1, num_beams=beams, eos_token_id=3,
            rules="transformers",
        )  # fmt: skip


def test_sampling_has_transformers_probabilities(models: list) -> None:
    """Which tokens may come, and how often, against its own warpers on the same logits."""
    model = models[0][1]
    context = contexts()[2]
    logits = model(torch.tensor([context])).logits[0, -1:].detach()
    for temperature, top_k, top_p in itertools.product((0.7, 1.0), (None, 8), (1.0, 0.6)):
        scores = logits / temperature
        if top_k is not None:
            scores = hf.TopKLogitsWarper(top_k)(None, scores)
        if top_p < 1.0:
            scores = hf.TopPLogitsWarper(top_p)(None, scores)
        expected = scores.softmax(-1)[0]
        drawn = generate(
            model, [context] * 4000, max_new_tokens=1, do_sample=True, temperature=temperature,
            top_k=top_k, top_p=top_p, generator=torch.Generator().manual_seed(0),
            eos_token_id=None, batch_size=4000,
        )  # fmt: skip
        counts = torch.bincount(torch.tensor(drawn).flatten(), minlength=VOCABULARY)
        assert not counts[expected == 0].any()
        error = (counts / 4000 - expected).abs()
        assert (error <= 5 * (expected * (1 - expected) / 4000).sqrt() + 1e-9).all()
