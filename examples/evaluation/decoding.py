"""Texts that a model generates for the contexts of a split: decoded once each, written, scored."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from examples.data.nlg import Instance
from examples.evaluation.nlg import score
from examples.evaluation.nlg.texts import FORMS, clean
from transformers_patched.files import write_atomically
from transformers_patched.generation import generate

if TYPE_CHECKING:
    from transformers_patched import PreTrainedTokenizer

LINE_BREAKS = re.compile(r"[\r\n\v\f\x1c-\x1e\x85\u2028\u2029]+")
PREDICTIONS, REFERENCES = "predictions.txt", "references.txt"


@dataclass(frozen=True)
class Contexts:
    """The distinct contexts of a split, and what their continuations are compared with.

    Attributes:
        instances: n of them, with their references.
        ids: n lists of token ids, what is continued.
        format: whose metrics, of `examples.evaluation.nlg`.
        tokenizer: decodes ids.
        search: arguments of `generate`.
    """

    instances: Sequence[Instance]
    ids: Sequence[list[int]]
    format: str
    tokenizer: PreTrainedTokenizer
    search: Mapping[str, Any]

    def decode(self, model: nn.Module, accelerator: Accelerator) -> list[str]:
        """n texts, in the form that is scored; every process decodes a share and gets all.

        Raises:
            ValueError: a context or an option does not fit the model.
        """
        share, step = accelerator.process_index, accelerator.num_processes
        own = generate(model, self.ids[share::step], **self.search)
        texts: list[str] = [""] * len(self.ids)
        gathered = gather_object([(share, own)]) if step > 1 else [(share, own)]
        for start, found in gathered:
            texts[start::step] = [self._text(ids) for ids in found]
        return texts

    def _text(self, ids: list[int]) -> str:
        text = clean(self.tokenizer.decode(ids), FORMS[self.format])
        return LINE_BREAKS.sub(" ", text)

    def references(self) -> list[list[str]]:
        """n lists of texts in the form that is scored, none empty."""
        form = FORMS[self.format]
        found = []
        for instance in self.instances:
            texts = [clean(text, form) for text in instance.references[: form.references]]
            texts = [LINE_BREAKS.sub(" ", text) for text in texts]
            found.append([text for text in texts if text] or texts[:1])
        return found

    def score(
        self, texts: Sequence[str], *, java: bool = True
    ) -> tuple[dict[str, float], list[str]]:
        """Metrics, and a line for each that could not be had.

        Where the categories of contexts are known to be training's or not, there are metrics of
        all, `seen_` and `unseen_`.

        Args:
            texts: n predictions.
            java: METEOR, which starts a Java program, is asked for too.
        """
        references = self.references()
        metrics, notes = score(self.format, texts, references, java=java)
        for name, kind in (("seen", True), ("unseen", False)):
            rows = [i for i, instance in enumerate(self.instances) if instance.seen is kind]
            if rows:
                part = [texts[i] for i in rows], [references[i] for i in rows]
                values, _ = score(self.format, *part, java=java)
                metrics |= {f"{name}_{metric}": value for metric, value in values.items()}
        return metrics, notes

    def write(self, folder: Path, split: str, texts: Sequence[str]) -> Path:
        """Writes predictions and references as `examples.evaluate_nlg` reads them.

        Returns:
            The file of the predictions, one a line.
        """
        folder.mkdir(parents=True, exist_ok=True)
        groups = "\n".join("".join(f"{text}\n" for text in texts) for texts in self.references())
        path = folder / f"{split}_{PREDICTIONS}"
        for file, content in (
            (path, "".join(f"{text}\n" for text in texts)),
            (folder / f"{split}_{REFERENCES}", groups),
        ):
            write_atomically(file, lambda aside, text=content: aside.write_text(text, "utf-8"))
        return path
