"""run_squad --teacher: the loss of starts and ends, logits kept or not, padded, packed, pruned."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.runner_cases import lines, results, tiny_bert
from support.squad_cases import squad_task

from examples import program
from examples.program import teacher
from examples.run_squad import main
from transformers_patched import AutoModelForQuestionAnswering, AutoTokenizer

RUN = (
    "--base_dtype float32 --max_length 40 --doc_stride 8 --max_query_length 8 --disable_tqdm "
    "--num_train_epochs 2 --per_device_train_batch_size 6 --learning_rate 0.02 --no_do_eval "
    "--adam_epsilon 1e-3 --alpha_distil 0.9 --alpha_ce 0.1"
).split()
ROWS = 14


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student, questions of one window each, and a trained teacher."""
    folder = tmp_path_factory.mktemp("home")
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    tiny_bert(folder / "bert", initializer_range=0.2, **still)
    squad_task(folder / "squad", {"train": ROWS, "dev": 3})
    run(folder, folder / "teacher", "--method", "full", "--learning_rate", "3e-3", "--no_cache")
    return folder


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "teacher"


def run(home: Path, out: Path, *more: str) -> Path:
    where = ["--model_name_or_path", str(home / "bert"), "--data_dir", str(home)]
    assert program.run_main(main, [*where, *RUN, "--output_dir", str(out), *more]) == 0
    return out


def taught(home: Path, out: Path, *more: str) -> Path:
    return run(home, out, "--teacher", str(home / "teacher"), *more)


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def assert_close(one: Path, two: Path) -> None:
    assert adapter(one).keys() == adapter(two).keys()
    for name, tensor in adapter(one).items():
        if not name.endswith("qa_outputs.bias"):  # a softmax does not see it
            torch.testing.assert_close(adapter(two)[name], tensor, atol=2e-6, rtol=1e-4, msg=name)


def test_a_step_is_the_plain_formula(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Question by question in fp64: the loss, and the norm of the gradient of all that trains."""
    norms = []
    clip = torch.nn.utils.clip_grad_norm_
    monkeypatch.setattr(
        torch.nn.utils, "clip_grad_norm_", lambda *args: norms.append(clip(*args)) or norms[-1]
    )
    more = "--temperature 3 --alpha_ce 0.25 --alpha_distil 2 --max_train_steps 1 --method full "
    more += f"--per_device_train_batch_size {ROWS} --logging_steps 1 --seed 5"
    out = taught(home, tmp_path / "run", *more.split())
    torch.manual_seed(5)  # the head is random
    student = AutoModelForQuestionAnswering.from_pretrained(home / "bert").double().eval()
    wise = AutoModelForQuestionAnswering.from_pretrained(home / "teacher" / "model").double().eval()
    total = torch.zeros((), dtype=torch.float64)
    for tokens, places in questions(home):
        own = student(input_ids=tokens[0], token_type_ids=tokens[1])
        with torch.no_grad():
            their = wise(input_ids=tokens[0], token_type_ids=tokens[1])
        for name, place in zip(("start_logits", "end_logits"), places, strict=True):
            z, t = own[name][0], their[name][0]
            p, q = (t / 3).softmax(0), (z / 3).softmax(0)
            row = -0.25 * z.log_softmax(0)[place] + 2 * 9 * (p * (p / q).log()).sum()
            total = total + row / (2 * ROWS)
    total.backward()
    squares = [p.grad.square().sum() for p in student.parameters() if p.grad is not None]
    [logged] = lines(out / "log.jsonl")
    assert logged["loss"] == pytest.approx(float(total.detach()), rel=1e-5)
    assert float(norms[0]) == pytest.approx(float(sum(squares)) ** 0.5, rel=1e-4)


def questions(home: Path) -> Iterator[tuple[tuple[torch.Tensor, torch.Tensor], tuple[int, int]]]:
    """Ids and types (1, L) of each question, and the first and last token of its answer."""
    tokenizer = AutoTokenizer.from_pretrained(home / "bert")
    articles = json.loads((home / "squad" / "train.json").read_text())["data"]
    for paragraph in articles[0]["paragraphs"]:
        for asked in paragraph["qas"]:
            pair = tokenizer(
                asked["question"], paragraph["context"], return_offsets_mapping=True
            )  # fmt: skip
            [answer] = asked["answers"]
            first, end = answer["answer_start"], answer["answer_start"] + len(answer["text"])
            told = enumerate(zip(pair["offset_mapping"], pair["token_type_ids"], strict=True))
            inside = [i for i, ((a, b), kind) in told if kind and first <= a < b <= end]
            ids, types = (torch.tensor([pair[n]]) for n in ("input_ids", "token_type_ids"))
            yield (ids, types), (inside[0], inside[-1])


def test_kept_logits_are_those_of_the_moment(
    home: Path, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = taught(home, tmp_path / "kept")
    [file] = cache.iterdir()
    assert load_file(file)["logits"].shape[1] == 2  # of start and end, for every real token
    monkeypatch.setattr(teacher, "KEPT_BYTES", 0)
    shutil.rmtree(cache)
    asked = taught(home, tmp_path / "asked")
    assert not cache.exists()
    assert_close(kept, asked)
    alone = run(home, tmp_path / "alone")
    assert any(
        not torch.allclose(adapter(alone)[n], x, atol=1e-3) for n, x in adapter(kept).items()
    )


def test_padded_and_packed_runs_are_one(home: Path, tmp_path: Path) -> None:
    """Windows of many lengths: a row's padding has no part in what it learns."""
    short = ["--max_length", "24", "--doc_stride", "6"]
    plain = taught(home, tmp_path / "plain", *short)
    assert all(x.isfinite().all() for x in adapter(plain).values())
    packed = ["--packing", "--group_by_length", "true", "--max_tokens", "60"]
    for name, more in (("packed", packed), ("wide", ["--pad_to_max_length"])):
        assert_close(plain, taught(home, tmp_path / name, *short, *more))


def test_a_pruned_student_is_taught(home: Path, tmp_path: Path) -> None:
    more = (
        "--method splopa --mask_block_rows 8 --mask_block_cols 16 --final_threshold 0.5 --do_eval"
    )
    out = taught(home, tmp_path / "run", *more.split())
    assert all(x.isfinite().all() for x in adapter(out).values())
    assert results(out)["density"] < 0.55
