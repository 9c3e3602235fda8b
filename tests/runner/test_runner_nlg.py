"""Whole runs of run_nlg on tables of few words: losses, decoding, resuming, processes, errors."""

from __future__ import annotations

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from support.gpt2_tiny import tiny_gpt2
from support.processes import WAYS, launch_two
from support.runner_cases import lines, results

from examples import evaluate_nlg, program
from examples.data import prepare_nlg
from examples.program import teacher
from examples.run_nlg import main
from peft_custom import PeftModel
from transformers_patched import GPT2LMHeadModel
from transformers_patched.models.gpt2 import modeling_gpt2

NAMES, FOODS = ("Aro", "Blue Bay", "Cup"), ("fish", "tea and cake", "ham")
RUN = (
    "--base_dtype float32 --learning_rate 1e-2 --max_train_steps 6 --max_length 96 "
    "--per_device_train_batch_size 8 --logging_steps 1 --disable_tqdm --label_smooth 0.1 "
    "--max_new_tokens 12"
).split()
LORA = "--lora_modules c_attn --lora_r 2".split()
TIMES = re.compile("seconds|memory|tokens_per")


def table_task(folder: Path, rows: dict[str, int]) -> Path:
    """E2E's raw files; names and foods of different lengths, some tables twice."""
    folder.mkdir(parents=True)
    rng = random.Random(0)
    for split, count in rows.items():
        pairs = [(rng.choice(NAMES), rng.choice(FOODS)) for _ in range(count)]
        text = "".join(f"name : {n} | food : {f}||{n} has {f} .\n" for n, f in pairs)
        (folder / f"{split}.txt").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    tiny_gpt2(folder / "gpt2", n_positions=96, initializer_range=0.2)
    table_task(folder / "e2e", {"train": 29, "valid": 11, "test": 14})
    return folder


def words(home: Path, out: Path, *more: str) -> list[str]:
    """Of a run; another method than LoRA has its own options in `more`."""
    where = ["--task_name", "e2e", "--data_dir", str(home), "--output_dir", str(out)]
    model = ["--model_name_or_path", str(home / "gpt2")]
    return [*where, *model, *RUN, *([] if "--method" in more else LORA), *more]


def run(home: Path, out: Path, *more: str) -> Path:
    assert program.run_main(main, words(home, out, *more)) == 0
    return out


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / "adapter" / "adapter_model.safetensors")


def error(capsys: pytest.CaptureFixture, *command: str) -> str:
    capsys.readouterr()
    assert program.run_main(main, command) == 2
    return capsys.readouterr().err


# --- training ------------------------------------------------------------------------------------


def test_a_step_is_the_mean_over_its_scored_tokens(home: Path, tmp_path: Path) -> None:
    """The loss of all 29 rows in one step, however they are cut and laid out, is Σ / Σ."""
    from examples.data.nlg import encoded_pairs, read_pairs, token_ids
    from examples.data.tasks.nlg import NLG_TASKS
    from transformers_patched import AutoTokenizer

    pairs = read_pairs(NLG_TASKS["e2e"], home / "e2e" / "train.txt")
    rows = encoded_pairs(token_ids(pairs, AutoTokenizer.from_pretrained(home / "gpt2")), "")
    model = GPT2LMHeadModel.from_pretrained(home / "gpt2").eval()
    sums, counts = {"clm": 0.0, "jlm": 0.0}, {"clm": 0, "jlm": 0}
    for i in range(len(rows)):
        context, completion = rows.context(i), rows.completion(i)
        ids = torch.tensor(context + completion)
        with torch.no_grad():
            logits = model(ids[None]).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(
            logits, ids[1:], reduction="none", label_smoothing=0.1
        )
        for objective, first in (("clm", len(context) - 1), ("jlm", 0)):
            sums[objective] += float(losses[first:].sum())
            counts[objective] += len(losses) - first
    cuts = {
        "clm": ["--per_device_train_batch_size", "29"],
        "jlm": ["--per_device_train_batch_size", "29", "--obj", "jlm"],
        "pieces": ["--global_batch_size", "29", "--per_device_train_batch_size", "1"],
        "packed": ["--per_device_train_batch_size", "29", "--packing", "--max_tokens", "300"],
    }
    for name, more in cuts.items():
        out = run(home, tmp_path / name, "--max_train_steps", "1", "--no_do_eval", *more)
        objective = name if name in sums else "clm"
        expected = sums[objective] / (counts[objective] + 1e-4)
        assert lines(out / "log.jsonl")[0]["loss"] == pytest.approx(expected, abs=2e-6), name


def test_how_a_step_is_cut_does_not_matter(home: Path, tmp_path: Path) -> None:
    """1×8 = 2×4 = two processes of 4; the last step of an epoch has 5 rows.

    Sharded weights are whole again where texts are decoded, of which one process has more.
    """
    steady = ["--adam_epsilon", "1e-3", "--group_by_length", "false"]
    steady += ["--eval_generate", "3", "--do_predict", "--eval_strategy", "no"]
    small = ["--per_device_train_batch_size", "4", "--per_device_eval_batch_size", "3"]
    cuts = {"1x8": [], "2x4": [*small, "--grad_acc", "2"]}
    found = {name: run(home, tmp_path / name, *steady, *more) for name, more in cuts.items()}
    for way in WAYS:
        found[way] = tmp_path / way
        launch_two(["-m", "examples.run_nlg"], *words(home, found[way], *steady, *small), way=way)
    same = {**weights(found["1x8"])}
    for name in ("2x4", *WAYS):
        for key, tensor in weights(found[name]).items():
            torch.testing.assert_close(tensor, same[key], atol=1e-6, rtol=1e-5)
    one, texts = results(found["1x8"]), Path("submission", "test_predictions.txt")
    for way in WAYS:
        two = results(found[way])
        assert one["eval_loss"] == pytest.approx(two["eval_loss"], abs=1e-5)
        assert one["eval_BLEU"] == two["eval_BLEU"] and one["train_tokens"] == two["train_tokens"]
        assert (found["1x8"] / texts).read_text() == (found[way] / texts).read_text()


@pytest.mark.parametrize("method", ["lora", "dylora", "vilora", "bim_lora"])
def test_a_stopped_run_goes_on_to_the_same_bytes(home: Path, tmp_path: Path, method: str) -> None:
    own = {
        "vilora": "--adalora_init_r 3 --adalora_target_r 2 --adalora_delta_t 1 --learning_rate 9",
        "bim_lora": "--lora_r 4 --block_size 8",
    }.get(method, "--lora_modules c_attn --lora_r 2")
    more = ["--method", method, "--lora_dropout", "0.1", "--save_steps", "2", *own.split()]
    more += ["--save_total_limit", "0", "--do_predict", "--packing", "--dropout", "0.1"]
    run(home, tmp_path / "whole", *more)
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for name in ("checkpoint-4", "checkpoint-6", "adapter", "submission"):
        shutil.rmtree(tmp_path / "stopped" / name)
    (tmp_path / "stopped" / "all_results.json").unlink()
    run(home, tmp_path / "stopped", *more, "--resume_from_checkpoint", "auto")
    for name in ("adapter/adapter_model.safetensors", "metrics.jsonl",
                 "submission/test_predictions.txt"):  # fmt: skip
        assert (tmp_path / "whole" / name).read_bytes() == (
            tmp_path / "stopped" / name
        ).read_bytes()
    ends = [results(tmp_path / name) for name in ("whole", "stopped")]
    ends = [{k: v for k, v in end.items() if not TIMES.search(k)} for end in ends]
    assert ends[0] == ends[1]


PRUNING = {
    "splora": "--mask_structure blocks --lora_r 2",
    "splopa": "--num_splopa_prototypes 4",
    "block_prune": "--pruning_method magnitude",
}


@pytest.mark.parametrize("method", PRUNING)
def test_a_pruned_gpt2_is_transformers_model(home: Path, tmp_path: Path, method: str) -> None:
    """Blocks of 36 × 8 fit c_attn's 72 outputs × 24 inputs, not the (24, 72) that it keeps."""
    more = "--lora_modules c_attn --mask_block_rows 36 --mask_block_cols 8 --final_threshold 0.5"
    out = run(home, tmp_path / "run", "--method", method, *more.split(), *PRUNING[method].split())
    base = GPT2LMHeadModel.from_pretrained(home / "gpt2")
    folder = tmp_path / "merged"
    shutil.copytree(home / "gpt2", folder)
    PeftModel.from_pretrained(base, out / "adapter").merge_and_unload().save_pretrained(folder)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(folder).eval()
    for layer in theirs.transformer.h:
        blocks = layer.attn.c_attn.weight.T.unflatten(1, (3, 8)).unflatten(0, (2, 36))
        open_ones = (blocks != 0).sum((1, 3))  # (2, 3)
        assert sorted(open_ones.flatten().tolist()) == [0, 0, 0, 288, 288, 288]
    assert results(out)["eval_loss"] == pytest.approx(plain_loss(theirs, home), rel=1e-5)


def plain_loss(model: transformers.GPT2LMHeadModel, home: Path) -> float:
    """Per scored token of the validation rows, one row at a time."""
    from examples.data.nlg import encoded_pairs, read_pairs, token_ids
    from examples.data.tasks.nlg import NLG_TASKS
    from transformers_patched import AutoTokenizer

    pairs = read_pairs(NLG_TASKS["e2e"], home / "e2e" / "valid.txt")
    rows = encoded_pairs(token_ids(pairs, AutoTokenizer.from_pretrained(home / "gpt2")), "")
    total, tokens = 0.0, 0
    for i in range(len(rows)):
        context, completion = rows.context(i), rows.completion(i)
        ids = torch.tensor(context + completion)
        with torch.no_grad():
            logs = model(ids[None]).logits[0, len(context) - 1 : -1].log_softmax(1)
        total -= float(logs.gather(1, ids[len(context) :, None]).sum())
        tokens += len(completion)
    return total / tokens


# --- a teacher -----------------------------------------------------------------------------------

TAUGHT = (
    "--alpha_distil 0.75 --alpha_ce 0.25 --temperature 2 --label_smooth 0 --lora_dropout 0 "
    "--no_group_by_length"
).split()


@pytest.fixture(scope="module")
def wide(home: Path) -> Path:
    """A teacher of another width."""
    more = {"n_positions": 96, "initializer_range": 0.2, "n_embd": 36}
    return tiny_gpt2(home / "wide", **more)


def taught(home: Path, out: Path, *more: str) -> Path:
    return run(home, out, "--teacher", str(home / "wide"), *TAUGHT, "--no_do_eval", *more)


@pytest.mark.parametrize("objective", ["clm", "jlm"])
def test_the_first_loss_is_the_formula(
    home: Path, wide: Path, tmp_path: Path, objective: str
) -> None:
    """On logits of whole vocabularies, from Transformers; B is 0, so the student is its base."""
    size = "--per_device_train_batch_size 29 --max_train_steps 1".split()
    out = taught(home, tmp_path / "run", *size, "--obj", objective)
    models = [transformers.GPT2LMHeadModel.from_pretrained(home / n) for n in ("gpt2", "wide")]
    tokenizer = transformers.AutoTokenizer.from_pretrained(home / "gpt2")
    total, tokens = 0.0, 0
    for line in (home / "e2e" / "train.txt").read_text().splitlines():
        context, completion = line.split("||")
        first = [*tokenizer(context).input_ids, tokenizer.eos_token_id]
        second = [*tokenizer(f" {completion}").input_ids, tokenizer.eos_token_id]
        ids, start = first + second, len(first) if objective == "clm" else 1
        with torch.no_grad():
            own, theirs = (
                model.double()(torch.tensor([ids])).logits[0, start - 1 : -1] for model in models
            )
        target = torch.tensor(ids[start:])
        ce = torch.nn.functional.cross_entropy(own, target, reduction="sum")
        p, log_p = (theirs / 2).softmax(1), (theirs / 2).log_softmax(1)
        kl = (p * (log_p - (own / 2).log_softmax(1))).sum()
        total += float(0.25 * ce + 0.75 * 4 * kl)
        tokens += len(target)
    assert lines(out / "log.jsonl")[0]["loss"] == pytest.approx(total / tokens, rel=2e-5)


def test_states_kept_or_not_packed_or_padded_are_one_run(
    home: Path, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANKWISE_CACHE", str(tmp_path / "cache"))
    first, again = taught(home, tmp_path / "a"), taught(home, tmp_path / "b")
    assert list((tmp_path / "cache" / "teacher").iterdir())
    packed = taught(home, tmp_path / "c", "--packing")
    monkeypatch.setattr(teacher, "KEPT_BYTES", 0)
    asked = taught(home, tmp_path / "d", "--packing")
    for name, value in weights(first).items():
        assert torch.equal(value, weights(again)[name])
        for other in (packed, asked):
            torch.testing.assert_close(weights(other)[name], value, atol=2e-4, rtol=2e-3)


def test_a_teacher_forms_no_loss_of_its_own(
    home: Path, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its states are those that it has beside a loss."""
    model = GPT2LMHeadModel.from_pretrained(wide).eval()
    ids = torch.arange(3, 15).view(2, 6)
    given = {"input_ids": ids, "labels": ids.where(ids > 5, -100), "output_scored_states": True}
    with torch.no_grad():
        beside, alone = model(**given), model(**given, return_loss=False)
    assert torch.equal(beside.scored_states[0], alone.scored_states[0])
    assert beside.loss is not None and alone.loss is None
    graded = []
    plain = modeling_gpt2.language_model_loss

    def watched(*args: object) -> torch.Tensor:
        graded.append(torch.is_grad_enabled())
        return plain(*args)

    monkeypatch.setattr(modeling_gpt2, "language_model_loss", watched)
    monkeypatch.setattr(teacher, "KEPT_BYTES", 0)
    taught(home, tmp_path / "run", "--max_train_steps", "2")
    assert graded == [True, True]  # the student's


def test_a_teacher_of_another_vocabulary_is_refused(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    tiny_gpt2(tmp_path / "other", n_positions=96, vocab_size=300)
    said = error(capsys, *words(home, tmp_path / "run", "--teacher", str(tmp_path / "other")))
    assert "300 tokens apart, this model 257" in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_ranks_of_the_built_in_wiring_are_decoded(home: Path, tmp_path: Path) -> None:
    """Rank 1 has texts of its own, and a run that starts from the adapter has the same."""
    common = (
        "--method dylora --wiring loralib --lora_modules c_attn --lora_r 4 --lora_alpha 99 "
        "--do_predict --dylora_eval_ranks 1 --num_beams 2 --max_predict_samples 4"
    ).split()
    out = run(
        home, tmp_path / "run", *common, "--eval_generate", "2", "--max_train_steps", "12",
        "--learning_rate", "0.1",
    )  # fmt: skip
    found = results(out)
    assert {"test_BLEU", "test_r1_BLEU", "test_r4_NIST", "eval_r1_CIDEr"} <= found.keys()
    assert found["test_BLEU"] == found["test_r4_BLEU"]
    files = [Path("submission", name, "test_predictions.txt") for name in ("", "r1")]
    assert (out / files[0]).read_text() != (out / files[1]).read_text()
    again = run(home, tmp_path / "again", *common, "--lora_path", str(out), "--eval_only")
    for file in files:
        assert (again / file).read_text() == (out / file).read_text()


# --- prediction ----------------------------------------------------------------------------------


def test_predictions_are_what_evaluate_nlg_reads(home: Path, tmp_path: Path) -> None:
    out = run(home, tmp_path / "run", "--do_predict", "--max_predict_samples", "3")
    folder = out / "submission"
    assert (folder / "test_predictions.txt").read_text().count("\n") == 3
    files = ["--pred", str(folder / "test_predictions.txt")]
    files += ["--ref", str(folder / "test_references.txt"), "--output", str(tmp_path / "m.json")]
    assert evaluate_nlg.main(files) == 0
    metrics = json.loads((tmp_path / "m.json").read_text())
    assert metrics == json.loads((folder / "test_metrics.json").read_text())
    assert metrics == {k[5:]: v for k, v in results(out).items() if k.startswith("test_")}


def prepared(home: Path, out: Path) -> Path:
    tokenizer = ["--tokenizer", str(home / "gpt2"), "--output_dir", str(out)]
    assert prepare_nlg.main(["e2e", "--data_dir", str(home), *tokenizer]) == 0
    return out


def test_raw_prepared_and_own_files_are_the_same(home: Path, tmp_path: Path) -> None:
    data = prepared(home, tmp_path / "data")
    ids = tmp_path / "ids"  # without the texts, which are decoded from them
    ids.mkdir()
    for split in ("train", "valid", "test"):
        shutil.copy(data / f"{split}.jsonl", ids)
    first = run(home, tmp_path / "raw", "--do_predict")
    own = ("--train_data", ids / "train.jsonl", "--valid_data", ids / "valid.jsonl",
           "--test_data", ids / "test.jsonl")  # fmt: skip
    sources = {
        "prepared": ["--task_name", "e2e", "--data_dir", data],
        "own": own,
    }
    for name, where in sources.items():
        out = tmp_path / name
        model = ["--model_name_or_path", home / "gpt2", "--output_dir", out, "--do_predict"]
        assert program.run_main(main, [*map(str, [*where, *model]), *RUN, *LORA]) == 0
        for file in ("adapter/adapter_model.safetensors", "submission/test_references.txt",
                     "submission/test_predictions.txt"):  # fmt: skip
            assert (out / file).read_bytes() == (first / file).read_bytes(), (name, file)


def test_yes_or_no_by_likelihood_and_by_generation(home: Path, tmp_path: Path) -> None:
    """Answers that say what the passage says are learned; both ways agree then."""
    rng = random.Random(1)
    folder = tmp_path / "data" / "boolq"
    folder.mkdir(parents=True)
    for split, count in {"train": 48, "valid": 10, "test": 9}.items():
        rows = [{"passage": "y" if a else "n", "question": "so", "answer": bool(a)}
                for a in (rng.randint(0, 1) for _ in range(count))]  # fmt: skip
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    out = run(
        home, tmp_path / "run", "--task_name", "boolq", "--data_dir", str(tmp_path / "data"),
        "--max_train_steps", "40", "--do_predict", "--label_smooth", "0", "--method", "full",
        "--eval_generate", "4", "--eval_strategy", "no", "--logging_steps", "20",
    )  # fmt: skip
    found = results(out)
    assert found["eval_likelihood_accuracy"] == found["test_likelihood_accuracy"] == 1.0
    assert found["test_accuracy"] == found["eval_accuracy"] == 1.0


def test_seen_and_unseen_categories_have_their_own_metrics(home: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for split in ("train", "valid", "test"):
        rows = [{"context": f"{n} : has : {f}", "completion": f"{n} has {f}", "cate": n == "Cup"}
                for n in NAMES for f in FOODS]  # fmt: skip
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (data / f"{split}_formatted.jsonl").write_text(text, encoding="utf-8")
    pytest.importorskip("nltk")
    out = run(
        home, tmp_path / "run", "--task_name", "webnlg", "--data_dir", str(data), "--do_predict",
    )  # fmt: skip
    found = results(out)
    assert {"test_BLEU", "test_seen_TER", "test_unseen_chrF++"} <= found.keys()


# --- errors --------------------------------------------------------------------------------------


def test_errors_say_what_to_mend(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = prepared(home, tmp_path / "data")

    def said(*more: str) -> str:
        command = words(home, tmp_path / "out", "--data_dir", str(data), *more)
        return error(capsys, *command)

    assert "--max_length 97 is more than the 96 positions" in said("--max_length", "97")
    few = said("--max_new_tokens", "96", "--do_predict")
    assert "leaves no token of --max_length 96 to the context" in few
    assert "perplexity: e2e has loss; --eval_generate" in said(
        "--metric_for_best_model", "perplexity"
    )
    assert "constant_with_warmup" in said("--scheduler", "constant", "--warmup_step", "2")
    for name, spoil, message in (
        ("train", lambda text: text[: len(text) // 2], "train.jsonl, line "),
        ("valid", lambda text: text.replace("[", "[300, ", 1), "line 1: 'context' holds token 300"),
        ("test", lambda text: "\n".join(text.splitlines()[:-1]), "prepare the data again"),
    ):
        path = data / f"{name}.jsonl"
        text = path.read_text()
        path.write_text(spoil(text))
        assert message in said("--do_predict"), name
        path.write_text(text)
    (data / "valid.jsonl").unlink()
    (data / "valid_formatted.jsonl").unlink()
    assert "no valid split of e2e" in said()
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_is_refused(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """Of the same shapes: only the weights tell them apart."""
    out = run(home, tmp_path / "run", "--no_do_eval", "--wiring", "loralib")
    shutil.copytree(home / "gpt2", tmp_path / "other")
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "other")
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[3, 5] += 1e-3
    model.save_pretrained(tmp_path / "other")
    start = ["--lora_path", str(out), "--eval_only", "--wiring", "loralib"]
    other = [*words(home, tmp_path / "x", *start), "--model_name_or_path", str(tmp_path / "other")]
    said = error(capsys, *other)
    assert "trained over other base weights" in said and str(home / "gpt2") in said
    assert program.run_main(main, words(home, tmp_path / "x", *start)) == 0
