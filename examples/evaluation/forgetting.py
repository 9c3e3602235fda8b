"""What training on a task costs a model as a language model: the rise of its loss on other text.

The loss is that of the checkpoint's own language-model head, before training and with the trained
body under it: per masked token for encoders (15 % of a text's tokens, the same ones every time, are
replaced by the mask), per next token for decoders.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from examples.cli.groups import ModelOptions
from examples.errors import DataError, RunError
from peft_custom import PeftModel
from peft_custom.rng import generator
from transformers_patched import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

TOKENS, ROWS = 128, 32  # of a text at most, and texts at once
MASKED = 0.15
DECODERS = ("gpt2",)

Batch = dict[str, Tensor]  # input_ids, attention_mask, labels: (n, L)


class Forgetting:
    """The loss before training; `figures` adds that of the trained model.

    Args:
        path: of the text, a text a line, UTF-8.
        where: the pretrained model.
        tokenizer: its own.
        device: to compute on.

    Raises:
        DataError: the file cannot be used.
        RunError: the checkpoint has no head to predict words with.
    """

    def __init__(self, path: str, where: ModelOptions, tokenizer: Any, device: str) -> None:
        self.where, self.device = where, device
        place = {"revision": where.revision, "local_files_only": where.local_files_only}
        config = AutoConfig.from_pretrained(where.model_name_or_path, **place)
        self.causal, self.place = config.model_type in DECODERS, place
        lines = read_lines(Path(path).expanduser())
        self.batches = (
            causal_batches(lines, tokenizer) if self.causal else masked_batches(lines, tokenizer)
        )
        if not self.batches:
            raise DataError(f"--forgetting {path}: no line has enough tokens to score one")
        self.before = self._loss(self._language_model())

    def figures(self, model: nn.Module) -> dict[str, float]:
        """`forgetting`, and the two losses that it is the difference of.

        Args:
            model: trained, of any method; evaluated in eval mode and left as found.
        """
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        whole = self._language_model()
        modes = {module: module.training for module in inner.modules()}
        setattr(whole, whole.base_model_prefix, inner.base_model)
        table = inner.get_input_embeddings()
        if any(p.requires_grad for p in table.parameters(recurse=False)):
            whole.tie_weights()  # a head tied to the words follows those that were trained
        try:
            after = self._loss(whole)
        finally:
            for module, mode in modes.items():
                module.training = mode
        return {
            "forgetting": after - self.before,
            "language_loss_before": self.before,
            "language_loss_after": after,
        }

    def _language_model(self) -> Any:
        loader = AutoModelForCausalLM if self.causal else AutoModelForMaskedLM
        name = self.where.model_name_or_path
        with torch.random.fork_rng(devices=[]):  # the run draws what it would have drawn without
            model, report = loader.from_pretrained(name, output_loading_info=True, **self.place)
        if report.missing:
            raise RunError(
                f"--forgetting: {name} has no language-model head ({report.missing[0]} is not in "
                "it), so it has no loss that could rise"
            )
        return model.to(self.device)

    @torch.inference_mode()
    def _loss(self, model: nn.Module) -> float:
        """Mean over all scored tokens."""
        model.eval()
        total, count = 0.0, 0
        for batch in self.batches:
            given = {name: value.to(self.device) for name, value in batch.items()}
            labels = given["labels"][:, 1:] if self.causal else given["labels"]
            scored = int((labels != -100).sum())
            total += float(model(**given).loss) * scored
            count += scored
        return total / count


def read_lines(path: Path) -> list[str]:
    """The lines of a text that are not empty."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--forgetting {path}: {error}") from error
    return [line.strip() for line in lines if line.strip()]


def causal_batches(lines: list[str], tokenizer: Any) -> list[Batch]:
    """Batches in which every real token but a text's first one is scored."""
    rows = [tokenizer.encode(line, truncation=True, max_length=TOKENS) for line in lines]
    return [_padded([(row, row) for row in chunk], 0) for chunk in _chunks(rows)]


def masked_batches(lines: list[str], tokenizer: Any) -> list[Batch]:
    """Batches with 15 % of each text's own tokens (at least one) behind the mask."""
    special = set(tokenizer.all_special_ids)
    rows = []
    for number, line in enumerate(lines):
        ids = tokenizer.encode(line, truncation=True, max_length=TOKENS)
        own = [i for i, token in enumerate(ids) if token not in special]
        if own:
            order = torch.randperm(len(own), generator=generator(0, number)).tolist()
            hidden = {own[i] for i in order[: max(1, round(MASKED * len(own)))]}
            shown = [tokenizer.mask_token_id if i in hidden else t for i, t in enumerate(ids)]
            rows.append((shown, [t if i in hidden else -100 for i, t in enumerate(ids)]))
    return [_padded(chunk, tokenizer.pad_token_id) for chunk in _chunks(rows)]


def _chunks(rows: list[Any]) -> list[list[Any]]:
    return [rows[i : i + ROWS] for i in range(0, len(rows), ROWS)]


def _padded(pairs: list[tuple[list[int], list[int]]], pad: int) -> Batch:
    """(ids, labels) of texts as one batch."""
    longest = max(len(ids) for ids, _ in pairs)
    fill = [longest - len(ids) for ids, _ in pairs]
    sides = {
        "input_ids": [ids + [pad] * n for (ids, _), n in zip(pairs, fill, strict=True)],
        "attention_mask": [[1] * (longest - n) + [0] * n for n in fill],
        "labels": [labels + [-100] * n for (_, labels), n in zip(pairs, fill, strict=True)],
    }
    return {name: torch.tensor(values) for name, values in sides.items()}
