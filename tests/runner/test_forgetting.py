"""The rise of the language model's loss: of masked and of next tokens, by hand and in a run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.runner_cases import WORDS, pair_task, results, tiny_bert

from examples import program
from examples.cli.groups import ModelOptions
from examples.evaluation.forgetting import Forgetting, causal_batches, masked_batches
from examples.run_glue import main
from peft_custom import LoraConfig, get_peft_model
from transformers_patched import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
)

LINES = [" ".join(WORDS[i : i + 3 + i % 4]) for i in range(0, 36, 2)]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("home")
    tiny_bert(folder / "headless")
    tiny_bert(folder / "bert", initializer_range=0.2)
    torch.manual_seed(1)
    whole = BertForMaskedLM(BertConfig.from_pretrained(folder / "bert"))
    whole.bert.load_state_dict(
        AutoModelForMaskedLM.from_pretrained(folder / "bert").bert.state_dict()
    )
    whole.save_pretrained(folder / "bert")
    pair_task(folder / "mrpc", {"train": 24, "validation": 9})
    (folder / "text.txt").write_text("\n\n".join(LINES) + "\n", "utf-8")
    return folder


def where(folder: Path) -> ModelOptions:
    return ModelOptions(model_name_or_path=str(folder))


def run(home: Path, out: Path, model: str, *more: str) -> int:
    words = (
        "--task_name mrpc --max_length 40 --no_cache --disable_tqdm --base_dtype float32".split()
    )
    words += ["--model_name_or_path", str(home / model), "--data_dir", str(home)]
    words += ["--output_dir", str(out), "--forgetting", str(home / "text.txt"), *more]
    return program.run_main(main, words)


@pytest.mark.parametrize(
    "method",
    [
        ["lora"],
        ["full"],
        ["lora", "--wiring", "loralib"],
        ["dylora"],
    ],
    ids=" ".join,
)
def test_a_run_says_what_it_has_cost(
    home: Path, tmp_path: Path, method: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Beside the loss of the saved result under the checkpoint's head."""
    out = tmp_path / "run"
    steps = ["--max_train_steps", "3", "--learning_rate", "0.02", "--load_best_model_at_end", "no"]
    assert run(home, out, "bert", "--method", *method, *steps) == 0
    assert "forgetting" in capsys.readouterr().out
    found = results(out)
    before, after = found["language_loss_before"], found["language_loss_after"]
    assert found["forgetting"] == pytest.approx(after - before) and abs(after - before) > 1e-4
    tokenizer = AutoTokenizer.from_pretrained(home / "bert")
    model = AutoModelForMaskedLM.from_pretrained(home / "bert").eval()
    batches = masked_batches(LINES, tokenizer)
    assert before == pytest.approx(loss(model, batches), abs=1e-5)
    if method == ["full"]:
        trained = AutoModelForSequenceClassification.from_pretrained(out / "model")
        model.bert.load_state_dict(trained.bert.state_dict(), strict=False)
        assert after == pytest.approx(loss(model, batches), abs=1e-5)


@torch.no_grad()
def loss(model: torch.nn.Module, batches: list[dict[str, torch.Tensor]]) -> float:
    losses = []
    for batch in batches:
        logits = model(batch["input_ids"], batch["attention_mask"]).logits
        targets = batch["labels"][batch["labels"] != -100]
        rows = logits[batch["labels"] != -100].log_softmax(-1)
        losses += (-rows[range(len(targets)), targets]).tolist()
    return sum(losses) / len(losses)


def test_it_changes_nothing_of_the_training(home: Path, tmp_path: Path) -> None:
    steps = ["--method", "lora", "--max_train_steps", "2", "--learning_rate", "0.02"]
    for name, more in (("with", []), ("without", ["--forgetting", "none"])):
        assert run(home, tmp_path / name, "bert", *steps, *more) == 0
    one, two = (
        (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes()
        for name in ("with", "without")
    )
    assert one == two and "forgetting" not in results(tmp_path / "without")


def test_which_tokens_are_hidden(home: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(home / "bert")
    batches = masked_batches(LINES, tokenizer)
    again = masked_batches(LINES, tokenizer)
    for one, two in zip(batches, again, strict=True):
        assert all(torch.equal(one[name], two[name]) for name in one)
    first = batches[0]
    hidden = first["labels"] != -100
    assert (first["input_ids"][hidden] == tokenizer.mask_token_id).all()
    assert (hidden.sum(1) >= 1).all() and hidden.sum() < 0.4 * first["attention_mask"].sum()
    special = torch.tensor(tokenizer.all_special_ids)
    assert not torch.isin(first["labels"][hidden], special).any()


def test_a_decoder_is_scored_by_its_next_tokens(tmp_path: Path, home: Path) -> None:
    torch.manual_seed(2)
    tokenizer = AutoTokenizer.from_pretrained(home / "bert")
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    memory = Forgetting(str(home / "text.txt"), where(tmp_path), tokenizer, "cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    scored, total = 0, 0.0
    with torch.no_grad():
        for line in LINES:
            ids = torch.tensor([tokenizer.encode(line)])
            logits = model(ids).logits[0, :-1].log_softmax(-1)
            total -= float(logits[range(ids.shape[1] - 1), ids[0, 1:]].sum())
            scored += ids.shape[1] - 1
    assert memory.before == pytest.approx(total / scored, abs=1e-5)
    assert len(causal_batches(LINES, tokenizer)[0]["labels"]) == len(LINES)
    adapted = get_peft_model(model, LoraConfig(target_modules=["c_attn"], init_lora_weights=False))
    modes = [m.training for m in adapted.modules()]
    found = memory.figures(adapted)
    assert found["forgetting"] != 0 and modes == [m.training for m in adapted.modules()]
    with adapted.disable_adapter():
        assert memory.figures(adapted)["forgetting"] == pytest.approx(0, abs=1e-6)


def test_mistakes(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(home, tmp_path / "a", "headless") == 2
    assert "has no language-model head" in capsys.readouterr().err
    assert run(home, tmp_path / "b", "bert", "--forgetting", str(tmp_path / "none.txt")) == 2
    assert "--forgetting" in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text("\n \n")
    assert run(home, tmp_path / "c", "bert", "--forgetting", str(tmp_path / "empty.txt")) == 2
    assert "no line has enough tokens" in capsys.readouterr().err
    assert not list(tmp_path.glob("*/checkpoint-*"))
