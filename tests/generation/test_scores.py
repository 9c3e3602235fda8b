"""The buffer of scores against torch's own reductions, for few and many hypotheses."""

import pytest
import torch
from torch import nn

from transformers_patched.generation import scores
from transformers_patched.generation.options import SearchOptions
from transformers_patched.generation.rules import Hypothesis, start

VOCABULARY = 101  # no whole number of blocks
OPTIONS = SearchOptions(
    max_new_tokens=9, num_beams=2, length_penalty=1.0, no_repeat_ngram_size=1, min_new_tokens=9,
    repetition_penalty=1.5, eos=frozenset({7}), rules="lora", early_stopping=False, do_sample=False,
    temperature=1.0, top_k=None, top_p=1.0,
)  # fmt: skip


@pytest.mark.parametrize("rows", [3, scores.FEW + 5])
@pytest.mark.parametrize("bias", [False, True])
def test_reductions(rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scores, "TOKENS", 32)
    monkeypatch.setattr(scores, "NUMBERS_AT_ONCE", 40 * rows)
    torch.manual_seed(rows)
    head, hidden = nn.Linear(12, VOCABULARY, bias=bias), torch.randn(rows, 12) * 9
    with torch.no_grad():
        expected = head(hidden)  # (rows, vocabulary)
        found = scores.Scores(head, VOCABULARY)
        found.of(torch.randn(rows + 2, 12))  # the buffer is used again
        found.of(hidden)
        torch.testing.assert_close(found.values[:VOCABULARY].T, expected, rtol=1e-5, atol=1e-5)
        log_sums = expected.logsumexp(1, keepdim=True)
        torch.testing.assert_close(found.log_sums(), log_sums, rtol=1e-6, atol=1e-5)
    assert torch.equal(found.highest(), expected.argmax(1))
    for count in (1, 8, VOCABULARY):
        values, tokens = found.best(count)
        assert torch.equal(tokens, expected.topk(count).indices)
        assert torch.equal(values, found.values.T.gather(1, tokens))


def test_equal_scores_take_the_first_token() -> None:
    head, found = nn.Linear(4, VOCABULARY), None
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    with torch.no_grad():
        head.bias[[40, 41, 90]] = 2.0
        found = scores.Scores(head, VOCABULARY)
        found.of(torch.randn(5, 4))
    assert found.highest().tolist() == [40] * 5


def test_edits_reach_the_maxima() -> None:
    """A penalty for what a hypothesis has, and what it must not repeat, row by row."""
    torch.manual_seed(0)
    head, hidden = nn.Linear(12, VOCABULARY, bias=False), torch.randn(3, 12) * 9
    search = start(0, (1, 2), OPTIONS)
    histories = [[5, 99], [100], [0, 17, 31]]
    rows = [(search, Hypothesis(tokens)) for tokens in histories]
    with torch.no_grad():
        expected = head(hidden)
        for row, history in zip(expected, histories, strict=True):
            row[[*history, 7]] = -torch.inf
        found = scores.Scores(head, VOCABULARY)
        found.of(hidden)
        found.maxima()
        found.edit(rows, None)
    assert torch.equal(found.best(20)[1], expected.topk(20).indices)
