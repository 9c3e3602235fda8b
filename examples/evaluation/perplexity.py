"""Perplexity of a language model on blocks of text of equal length."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import numpy as np
from torch import Tensor, nn

from examples.evaluation.prediction import Weights
from transformers_patched.heads import CausalLMOutput


class BlockLoss:
    """Predicts a batch's mean loss, in place of logits, for each of its rows: (b, 1).

    Rows have equally many scored tokens, so the mean over rows is the mean over tokens.
    """

    probabilistic = False
    stacked = False

    def variants(self, final: bool) -> list[str]:
        return [""]

    def outputs(
        self, model: nn.Module, arguments: dict[str, Any], variants: list[str]
    ) -> list[Any]:
        loss: Tensor = model(**arguments).loss
        rows = len(arguments["cu_seqlens"]) - 1
        return [CausalLMOutput(loss=loss, logits=loss.expand(rows, 1))]

    def weights(self, model: nn.Module, final: bool) -> dict[str, Weights]:
        return {"": nullcontext}


def perplexity(losses: np.ndarray) -> dict[str, float]:
    """exp of the mean of (n, 1) losses per token, in nats."""
    return {"perplexity": math.exp(float(losses.mean(dtype=np.float64)))}
