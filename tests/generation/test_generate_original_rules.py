"""rules="lora": an independent plain statement of the original's beam search, without any cache."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from transformers_patched import GPT2Config, GPT2LMHeadModel
from transformers_patched.generation import generate

VOCABULARY = 31


def random_model(seed: int, std: float, vocabulary: int = VOCABULARY) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=vocabulary, n_embd=24, n_layer=2, n_head=2, n_positions=64)
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, std)
    return model


MODELS = [random_model(0, 0.3), random_model(1, 0.9), random_model(5, 0.5)]
CONTEXTS = [[4], [7, 3, 3, 9, 12, 30], [1, 2], [11, 5, 8, 5, 8, 5, 8, 20, 21, 22, 2, 9]]


def edited(logits: Tensor, tokens: list[int], n: int, rho: float, least: int, eos: set) -> Tensor:
    """The raw scores of one hypothesis after penalty, minimum length and n-gram ban."""
    logits = logits.clone()
    for token in set(tokens):
        logits[token] = logits[token] * rho if logits[token] < 0 else logits[token] / rho
    if len(tokens) < least:
        logits[list(eos)] = -math.inf
    if n:
        seen = {tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)}
        for token in range(len(logits)):
            if (*tokens[len(tokens) - n + 1 :], token) in seen:
                logits[token] = -math.inf
    return logits


@torch.no_grad()
def reference(
    model: GPT2LMHeadModel, context: list[int], *, max_new_tokens: int, num_beams: int = 1,
    length_penalty: float = 1.0, no_repeat_ngram_size: int = 0, repetition_penalty: float = 1.0,
    min_new_tokens: int = 0, eos_token_id: tuple[int, ...],
) -> list[int]:  # fmt: skip
    """The best hypothesis of spec 4.5's steps 1 to 6, always to the last step."""
    eos, live = set(eos_token_id), [([], 0.0)]
    best, best_score = [], -math.inf
    for t in range(max_new_tokens):
        logits = model(torch.tensor([context + tokens for tokens, _ in live])).logits[:, -1]
        pool = []
        for (tokens, score), row in zip(live, logits, strict=True):
            row = edited(row, tokens, no_repeat_ngram_size, repetition_penalty, min_new_tokens, eos)
            for token, p in enumerate(row.log_softmax(-1).tolist()):
                if p > -math.inf:
                    pool.append((score + p, [*tokens, token]))
        pool = sorted(pool, key=lambda item: -item[0])[:num_beams]
        live = []
        for score, tokens in pool:
            if tokens[-1] in eos or t == max_new_tokens - 1:
                if score / (t + 1) ** length_penalty > best_score:
                    best, best_score = tokens, score / (t + 1) ** length_penalty
            else:
                live.append((tokens, score))
        if not live:
            break
    return best


SETTINGS = {
    "greedy": dict(num_beams=1),
    "greedy edits": dict(num_beams=1, no_repeat_ngram_size=2, repetition_penalty=1.5),
    "two": dict(num_beams=2),
    "recipe": dict(num_beams=10, length_penalty=0.8, no_repeat_ngram_size=4),
    "unigrams": dict(num_beams=4, no_repeat_ngram_size=1),
    "bigrams": dict(num_beams=4, no_repeat_ngram_size=2, length_penalty=2.0),
    "trigrams": dict(num_beams=3, no_repeat_ngram_size=3, repetition_penalty=1.3),
    "rewarded": dict(num_beams=3, repetition_penalty=0.7),
    "no length": dict(num_beams=5, length_penalty=0.0),
    "negative length": dict(num_beams=5, length_penalty=-1.0),
    "minimum": dict(num_beams=4, min_new_tokens=5),
}


@pytest.mark.parametrize("eos", [(3,), (3, 17, 20, 9, 12, 28, 0)], ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
def test_hypotheses_are_the_statements(setting: str, eos: tuple[int, ...]) -> None:
    options = dict(max_new_tokens=11, eos_token_id=eos, **SETTINGS[setting])
    for model in MODELS:
        expected = [reference(model, context, **options) for context in CONTEXTS]
        assert generate(model, CONTEXTS, **options) == expected
        assert generate(model, CONTEXTS, batch_size=1, **options) == expected


def test_wide_beams_find_the_best_of_all() -> None:
    """With at least vocabulary^(T-1) beams nothing is left out: brute force over all sequences."""
    model, T, eos, penalty = random_model(3, 0.6, vocabulary=4), 4, 2, 0.7
    scores: dict[tuple, float] = {}
    for tokens in itertools.product(range(4), repeat=T):
        end = tokens.index(eos) + 1 if eos in tokens else T
        if tokens[:end] in scores:
            continue
        with torch.no_grad():
            logits = model(torch.tensor([[1, *tokens[:end]]])).logits[0, :-1].log_softmax(-1)
        total = logits.gather(1, torch.tensor(tokens[:end])[:, None]).sum().item()
        scores[tokens[:end]] = total / end**penalty
    found = generate(
        model, [[1]], max_new_tokens=T, num_beams=64, length_penalty=penalty, eos_token_id=eos
    )
    assert tuple(found[0]) == max(scores, key=scores.get)


def chain(probabilities: list[list[float]]) -> GPT2LMHeadModel:
    """A model whose next token depends on the last one alone."""
    count = len(probabilities)
    config = GPT2Config(
        vocab_size=count, n_embd=8, n_layer=1, n_head=1, n_positions=16, tie_word_embeddings=False
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight")):
                parameter.zero_()
        model.transformer.wte.weight.copy_(torch.eye(count, 8))
        states = model.transformer.ln_f(model.transformer.wte.weight)  # (tokens, 8)
        wanted = torch.tensor(probabilities).log()  # (tokens, next)
        model.lm_head.weight.copy_((torch.linalg.pinv(states) @ wanted).T)
    return model


def test_the_worked_example() -> None:
    """Spec E5: tokens a, b, E; beam 1 takes the likelier start, beam 2 the likelier whole."""
    a, b, E, start = range(4)
    rest = 1e-9
    model = chain([
        [0.30, 0.30, 0.40, rest], [0.05, 0.05, 0.90, rest], [1 / 3, 1 / 3, 1 / 3, rest],
        [0.60, 0.39, 0.01, rest],
    ])  # fmt: skip
    options = dict(max_new_tokens=3, eos_token_id=E)
    assert generate(model, [[start]], num_beams=1, length_penalty=0.8, **options) == [[a, E]]
    for penalty, expected in ((0.8, [b, E]), (0.0, [b, E]), (2.0, [a, b, E])):
        found = generate(model, [[start]], num_beams=2, length_penalty=penalty, **options)
        wide = generate(model, [[start]], num_beams=9, length_penalty=penalty, **options)
        assert wide == [expected]
        assert penalty == 2.0 or found == [expected]


def test_nothing_but_forbidden_tokens_gives_nothing() -> None:
    """A vocabulary of two, no unigram twice and no end: after two tokens nothing may come."""
    model = random_model(0, 0.5, vocabulary=2)
    options = dict(max_new_tokens=5, no_repeat_ngram_size=1, eos_token_id=None)
    for rules in ("lora", "transformers"):
        assert generate(model, [[0]], num_beams=3, rules=rules, **options) == [[]]
