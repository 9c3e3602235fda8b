"""Pretraining: what is read, the tokenizer, the blocks, the run, its result elsewhere."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.runner_cases import WORDS

from examples import program
from examples.data import plain_text
from examples.errors import DataError
from examples.pretrain import main
from examples.training.trainer import Trainer
from transformers_patched import AutoModelForCausalLM, AutoTokenizer

SIZES = "--vocab_size 290 --block_size 24 --n_embd 16 --n_layer 2 --n_head 2".split()
TRAINING = (
    "--learning_rate 3e-3 --per_device_train_batch_size 3 --max_train_steps 6 --logging_steps 1 "
    "--eval_strategy steps --eval_steps 3 --save_strategy steps --save_steps 2 --disable_tqdm"
).split()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two documents."""
    folder, draw = tmp_path_factory.mktemp("text"), random.Random(0)
    for name in "ab":
        lines = [" ".join(draw.choices(WORDS, k=9)) + ".\n" for _ in range(60)]
        (folder / f"{name}.txt").write_text("".join(lines), encoding="utf-8")
    (folder / "README").write_text("not a document")
    return folder


def words(text: Path, folder: Path, *more: str) -> list[str]:
    data = ["--train_file", str(text), "--validation_share", "0.2"]
    return [*data, *SIZES, *TRAINING, "--output_dir", str(folder), *more]


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert program.run_main(main, words(text, folder)) == 0
    return folder


# --- what is read --------------------------------------------------------------------------------


def test_what_project_gutenberg_adds_is_no_text(tmp_path: Path) -> None:
    book = (
        "*** START OF THE PROJECT GUTENBERG EBOOK X ***\nCall me.\n\nEnd of Project Gutenberg's X"
    )
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbfLicence\r\n" + book.encode())
    assert plain_text.read_document(tmp_path / "x.txt") == "Call me.\n"


def test_long_lines_go_on_and_short_ones_end(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_text("aaaa bbbb\ncc\ndddd eeee\n\nffff gggg\n  hh\n")
    assert plain_text.read_document(path, 8) == "aaaa bbbb cc\ndddd eeee\n\nffff gggg\n  hh\n"


def test_the_end_of_a_document_is_held_out_at_a_line() -> None:
    document = "one\ntwo\nthree\nfour\n"
    assert plain_text.hold_out(document, 0.3) == ("one\ntwo\nthree\n", "four\n")
    assert plain_text.hold_out("no break", 0.5) == ("", "no break")


def test_blocks_are_the_documents_with_an_end_after_each() -> None:
    documents = ["bado.\n" * 9, "cado.\n" * 7]
    tokenizer = plain_text.train_tokenizer(documents, 260, 8)
    rows = plain_text.blocks(documents, tokenizer, 8)
    lines = [[tokenizer(line)["input_ids"] for line in text.splitlines(True)] for text in documents]
    whole = [i for text in lines for i in [*sum(text, []), 0]]
    assert tokenizer.eos_token_id == 0 and rows.tokens.tolist() == whole[: len(rows) * 8]
    assert len(rows) == len(whole) // 8 and np.all(rows.lengths == 8)


def test_the_tokenizer_is_the_same_every_time_and_takes_any_text() -> None:
    documents = ["bado beno biru cado\n" * 30]
    made = [plain_text.train_tokenizer(documents, 268, 16) for _ in range(2)]
    assert made[0].fingerprint() == made[1].fingerprint()
    odd = "Zürich\t— 17 °C 🦊"
    assert made[0].decode(made[0](odd)["input_ids"]) == odd
    assert len(made[0]("bado beno")["input_ids"]) < 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"\xff\xfe", "x.txt: not UTF-8 at byte 0"),
        ("x.txt", b" \n", "x.txt: there is no text in it"),
        ("x.txt", b"short", "fewer than one block of 24"),
        ("x.md", b"words", "there is no *.txt in this folder"),
    ],
)
def test_text_that_cannot_be_used_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture, name: str, content: bytes, message: str
) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / name).write_bytes(content)
    vocabulary = ["--vocab_size", "258"]
    arguments = words(tmp_path / "text", tmp_path / "run", *vocabulary)
    assert program.run_main(main, arguments) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--train_file", ""], "--train_file is needed"),
        (["--train_file", "nowhere"], "nowhere: no such file or folder"),
        (["--method", "lora"], "leave --method out"),
        (["--n_head", "3"], "no multiple of --n_head 3"),
        (["--vocab_size", "4000"], "lower --vocab_size"),
        (["--eval_only"], "pretraining trains"),
    ],
)
def test_options_that_cannot_be(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture, more: list[str], message: str
) -> None:
    assert program.run_main(main, words(text, tmp_path / "run", *more)) == 2
    assert message in capsys.readouterr().err


def test_a_text_of_few_words_gives_no_large_vocabulary() -> None:
    with pytest.raises(DataError, match="lower --vocab_size"):
        plain_text.train_tokenizer(["a b"], 400, 8)


# --- the run -------------------------------------------------------------------------------------


def test_an_interrupted_run_ends_as_the_whole_one(
    run: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.step

    def killed(self: Trainer, batch: object) -> None:
        if self.progress.step == 3:  # its last checkpoint is the second step's
            raise KeyboardInterrupt
        step(self, batch)

    arguments = words(text, tmp_path / "run", "--resume_from_checkpoint", "auto")
    monkeypatch.setattr(Trainer, "step", killed)
    assert program.run_main(main, arguments) == 130
    monkeypatch.setattr(Trainer, "step", step)
    assert program.run_main(main, arguments) == 0
    whole, resumed = (load_file(f / "model" / "model.safetensors") for f in (run, tmp_path / "run"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_other_text_is_another_run(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    own = tmp_path / "text"
    shutil.copytree(text, own)
    arguments = words(own, tmp_path / "run", "--max_train_steps", "2")
    assert program.run_main(main, arguments) == 0
    (tmp_path / "run" / "all_results.json").unlink()
    lines = (own / "a.txt").read_text().splitlines(keepends=True)
    (own / "a.txt").write_text("".join(reversed(lines)))
    assert program.run_main(main, [*arguments, "--resume_from_checkpoint", "auto"]) == 2
    assert "texts of the train split" in capsys.readouterr().err


def test_held_out_loss_is_torchs(run: Path, text: Path) -> None:
    """Over the blocks of the held-out text, each token after the first of its block."""
    results = json.loads((run / "all_results.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    model = AutoModelForCausalLM.from_pretrained(run / "model")
    files = plain_text.text_files([str(text)])
    held = [plain_text.hold_out(plain_text.read_document(path), 0.2)[1] for path in files]
    rows = torch.from_numpy(plain_text.blocks(held, tokenizer, 24).tokens).long().view(-1, 24)
    with torch.no_grad():
        logits = model(input_ids=rows).logits[:, :-1]  # (n, 23, vocabulary)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()).item()
    assert results["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert results["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics] == [3, 6]
    assert metrics[1]["eval_loss"] < metrics[0]["eval_loss"]


def test_the_run_counts_its_arithmetic(run: Path) -> None:
    """6 steps of 3 blocks of 24 tokens: layers of 12 H² weights, the head at 23 of each block."""
    found = json.loads((run / "all_results.json").read_text())
    blocks, length, hidden, layers = 6 * 3, 24, 16, 2
    assert found["train_tokens"] == blocks * length
    matrices = 6 * blocks * (length * layers * 12 * hidden**2 + (length - 1) * 290 * hidden)
    attention = 6 * blocks * layers * hidden * length**2  # half of 12: causal
    assert found["train_flops"] == matrices + attention


def test_transformers_reads_model_and_tokenizer(run: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(run / "model").eval()
    ours = AutoModelForCausalLM.from_pretrained(run / "model")
    sentence = "bado Beno, ciru 17 … dosa."
    ids = AutoTokenizer.from_pretrained(run / "model")(sentence)["input_ids"]
    assert transformers.AutoTokenizer.from_pretrained(run / "model")(sentence)["input_ids"] == ids
    with torch.no_grad():
        a, b = (model(input_ids=torch.tensor([ids])).logits for model in (ours, theirs))
    assert (a - b).abs().max() <= 1e-5 * max(1.0, b.abs().max())


def test_rounded_weights_are_the_ones_evaluated(run: Path, text: Path, tmp_path: Path) -> None:
    """And a run goes on from a model: its tokenizer, its sizes, no step taken worth a name."""
    arguments = words(text, tmp_path / "run", "--model_name_or_path", str(run / "model"))
    more = ["--saved_dtype", "bfloat16", "--max_train_steps", "1", "--learning_rate", "0"]
    assert program.run_main(main, [*arguments, *more]) == 0
    rounded = load_file(tmp_path / "run" / "model" / "model.safetensors")
    whole = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(rounded[name], whole[name].bfloat16()) for name in whole)
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    before = json.loads((run / "all_results.json").read_text())
    assert results["eval_loss"] != before["eval_loss"]
    assert results["eval_loss"] == pytest.approx(before["eval_loss"], rel=1e-2)


def test_a_block_longer_than_the_model_is_refused(
    run: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    more = ["--model_name_or_path", str(run / "model"), "--block_size", "32"]
    assert program.run_main(main, words(text, tmp_path / "run", *more)) == 2
    assert "has 24 positions" in capsys.readouterr().err
