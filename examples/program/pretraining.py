"""A pretraining run: a GPT-2, new or read, trained on blocks of plain text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from examples.cli.groups import TrainingOptions
from examples.cli.pretraining import PretrainingOptions
from examples.data import batches as batching
from examples.data import plain_text
from examples.data.batches import Batch, TrainingBatches
from examples.data.encode import EncodedSplit
from examples.errors import OptionError, as_user_error
from examples.evaluation.perplexity import BlockLoss, perplexity
from examples.evaluation.prediction import EvaluationSet
from examples.methods.registry import AdaptedModel
from examples.methods.source import ModelSource
from examples.program.batching import accumulation, rows_at_once
from examples.program.main import Options
from examples.program.run import Run, make_accelerator
from transformers_patched import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    PreTrainedModel,
    PreTrainedTokenizer,
)


def pretrain(options: Options) -> None:
    """Reads the text, trains, and writes model and tokenizer into the run's `model/`."""
    o: PretrainingOptions = options[PretrainingOptions]
    training: TrainingOptions = options[TrainingOptions]
    accelerator = make_accelerator(training)
    tokenizer, splits = read(o)
    source = ModelSource(o.model_name_or_path or "", "AutoModelForCausalLM", "CAUSAL_LM")
    method = replace(options.method, build=lambda found, _: build(found, o, tokenizer))
    title = f"language model on {len(splits['train'].tokens):,} tokens"
    run = Run(replace(options, method=method), accelerator, source, title, "eval_loss")
    error: BaseException | None = None
    try:
        for name, split in splits.items():
            run.note_read(name, split)
        share = {"processes": accelerator.num_processes, "process": accelerator.process_index}
        train = TrainingBatches(
            splits["train"],
            rows_at_once(training, share["processes"]),
            accumulation=accumulation(training, share["processes"]),
            seed=training.seed,
            order="random",
            **share,
        )
        held_out = evaluation_set(splits["validation"], training, share)
        trainer = run.build(train, partial(collate, splits["train"]), [held_out])
        run.print_once(
            f"{train.split.tokens.size:,} tokens to train on, {splits['validation'].tokens.size:,} "
            f"held out; {trainer.total_steps:,} steps of "
            f"{train.global_batch_size * o.block_size:,} tokens"
        )
        figures = run.train(tokenizer)
        lengths = splits["train"].lengths
        run.add_flops(figures, lengths, int((lengths - 1).sum()))
        run.finish(trainer.evaluate(final=True), figures)
    except BaseException as raised:
        error = raised
        raise
    finally:
        run.folder.close(error)


def read(o: PretrainingOptions) -> tuple[PreTrainedTokenizer, dict[str, EncodedSplit]]:
    """The tokenizer, learnt from the training text or read, and the blocks of both splits."""
    files = plain_text.text_files(o.paths)
    texts = [plain_text.read_document(path, o.join_lines) for path in files]
    parts = [plain_text.hold_out(text, o.validation_share) for text in texts]
    train, validation = ([text for text in split if text] for split in zip(*parts, strict=True))
    if o.model_name_or_path is None:
        tokenizer = plain_text.train_tokenizer(train, o.vocab_size, o.block_size)
    else:
        tokenizer = as_user_error(AutoTokenizer.from_pretrained, o.model_name_or_path)
    return tokenizer, {
        name: plain_text.blocks(documents, tokenizer, o.block_size)
        for name, documents in (("train", train), ("validation", validation))
    }


def build(
    source: ModelSource, o: PretrainingOptions, tokenizer: PreTrainedTokenizer
) -> AdaptedModel:
    """The model, new or read; evaluated by its loss, and saved in the dtype asked for."""
    if o.model_name_or_path is not None:
        model = source.load(frozen=False)
        if o.block_size > model.config.n_positions:
            raise OptionError(
                f"--block_size {o.block_size}: {o.model_name_or_path} has "
                f"{model.config.n_positions} positions"
            )
    else:
        end = tokenizer.eos_token_id
        # So small a model does not learn its text by heart in a few epochs: no dropout.
        dropout = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
        model = AutoModelForCausalLM.from_config(
            GPT2Config(
                vocab_size=o.vocab_size, n_positions=o.block_size, n_embd=o.n_embd,
                n_layer=o.n_layer, n_head=o.n_head, bos_token_id=end, eos_token_id=end, **dropout,
            )
        )  # fmt: skip
    return AdaptedModel(model, partial(save, model, o.saved_dtype), BlockLoss())


def save(model: PreTrainedModel, dtype: str, folder: Path) -> None:
    """Writes the model in `dtype`; its weights stay rounded, so that the result is evaluated."""
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    model.float()


def collate(split: EncodedSplit, batch: Batch) -> dict[str, Any]:
    """A packed batch in which every token is a label; the model moves them itself."""
    data = batching.collate(split, batch, packed=True)
    return data | {"labels": data["input_ids"]}


def evaluation_set(
    split: EncodedSplit, training: TrainingOptions, share: Mapping[str, int]
) -> EvaluationSet:
    """The held-out blocks, scored by their mean loss per token and its exponential."""
    rows = training.per_device_eval_batch_size
    return EvaluationSet(
        "",
        len(split),
        lambda copies: batching.evaluation_batches(split, rows, **share),
        partial(collate, split),
        perplexity,
    )
