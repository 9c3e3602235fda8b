"""FSDP2 on two CPU processes: what is in pieces, what is whole, and that runs end the same."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support.processes import in_two, launch_runs
from support.runner_cases import SIZES, lines, pair_task, results, tiny_bert, tiny_deberta
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from examples import program
from examples.cli.groups import TrainingOptions
from examples.program import launched
from examples.run_glue import main
from examples.training.sharding import ShardedModel, gathered
from peft_custom import LoraConfig, get_peft_model
from transformers_patched import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
)

# --- a model in pieces ---------------------------------------------------------------------------


def bert() -> BertForSequenceClassification:
    torch.manual_seed(0)
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(vocab_size=64, **SIZES, **still))


def with_lora() -> nn.Module:
    return get_peft_model(bert(), LoraConfig(r=4, task_type="SEQ_CLS"))


def tied() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"n_embd": 24, "n_head": 2, "n_layer": 2, "n_positions": 32}
    still = dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), 0.0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, **sizes, **still))


MODELS = {"bert": bert, "lora": with_lora, "gpt2": tied}


def inputs(model: nn.Module, rows: slice) -> dict[str, Tensor]:
    ids = torch.randint(5, 64, (4, 7), generator=torch.Generator().manual_seed(1))[rows]
    return {
        "input_ids": ids,
        "labels": ids if isinstance(model, GPT2LMHeadModel) else ids[:, 0] % 2,
    }


def local_bytes(model: nn.Module, trained: bool) -> int:
    found = [p for p in model.parameters() if p.requires_grad == trained]
    return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in found)


def in_pieces(rank: int) -> dict[str, Any]:
    """Two steps of every model on half of the rows, and then alone on one process."""
    found: dict[str, Any] = {}
    for name, make in MODELS.items():
        model, optimizer = _made(make)
        before = {trained: local_bytes(model, trained) for trained in (True, False)}
        shards = ShardedModel(model, optimizer, trained_too=name != "lora")
        found[f"{name} frozen"] = local_bytes(model, False) / max(1, before[False])
        found[f"{name} trained"] = local_bytes(model, True) / before[True]
        for _ in range(2):
            _step(model, optimizer, slice(2 * rank, 2 * rank + 2), shards)
        moments = [state["exp_avg"] for state in optimizer.state.values()]
        found[f"{name} moments"] = sum(
            (m.to_local() if isinstance(m, DTensor) else m).nbytes for m in moments
        ) / sum(m.nbytes for m in gathered(moments))
        with shards.whole():
            found[f"{name} whole"] = sum(isinstance(p, DTensor) for p in model.parameters())
            if rank:  # alone: within it the other process need not pass
                model.eval()(**inputs(model, slice(0, 4)))
        found[f"{name} again"] = local_bytes(model.train(), False) / max(1, before[False])
        shards.end()
        found |= {f"{name} end {n}": t.clone() for n, t in model.state_dict().items()}
        found[f"{name} kind"] = type(model).__name__
        if name == "gpt2":
            found["still tied"] = model.lm_head.weight is model.transformer.wte.weight
        if not rank:  # an ordinary model, which can be copied, and needs nobody else
            found[f"{name} loss"] = copy.deepcopy(model).eval()(**inputs(model, slice(0, 4))).loss
    dist.barrier()
    return found


def _made(make: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = make().train()
    trained = [p for p in model.parameters() if p.requires_grad]
    return model, torch.optim.AdamW(trained, lr=1e-2, eps=1e-3, fused=True)


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: slice,
    shards: ShardedModel | None = None,
) -> None:
    model(**inputs(model, rows)).loss.backward()
    if shards is not None:
        shards.average_gradients()
    trained = [p for p in model.parameters() if p.requires_grad]
    nn.utils.clip_grad_norm_(trained, 0.1)
    optimizer.step()
    optimizer.zero_grad()


def test_pieces_are_halves_and_train_what_the_whole_does(tmp_path: Path) -> None:
    one, two = in_two(in_pieces, tmp_path)
    assert one["still tied"] and two["still tied"]
    for name, make in MODELS.items():
        model, optimizer = _made(make)
        for _ in range(2):
            _step(model, optimizer, slice(0, 4))
        if name == "lora":  # 0.51: rows are shared out, and a matrix may have an odd number
            assert one["lora frozen"] == pytest.approx(0.5, abs=0.03)
            assert one["lora trained"] == 1
        else:
            for what in ("trained", "moments"):
                assert one[f"{name} {what}"] == pytest.approx(0.5, abs=0.03), what
        for found in (one, two):
            assert found[f"{name} again"] == found[f"{name} frozen"]
            assert found[f"{name} whole"] == 0
            assert found[f"{name} kind"] == type(model).__name__
            for key, tensor in model.state_dict().items():
                value = found[f"{name} end {key}"]
                torch.testing.assert_close(value, tensor, atol=1e-6, rtol=1e-5, msg=key)
        loss = model.eval()(**inputs(model, slice(0, 4))).loss
        torch.testing.assert_close(one[f"{name} loss"], loss, atol=1e-6, rtol=1e-5)


# --- runs ----------------------------------------------------------------------------------------

RUN = (
    "--task_name mrpc --num_train_epochs 2 --max_length 40 --no_cache --disable_tqdm "
    "--learning_rate 2e-2 --adam_epsilon 1e-3 --per_device_train_batch_size 3 "
    "--gradient_accumulation_steps 2 --per_device_eval_batch_size 4 --metric_for_best_model loss"
).split()
PRUNE = "--mask_block_rows 4 --mask_block_cols 8 --final_threshold 0.5 --pruning_warmup 1"
CASES = {
    "full": "--method full --learning_rate 2e-3",
    "full_best": "--method full --save_strategy no",  # the best weights are kept in memory
    "checkpointing": "--method full --gradient_checkpointing --learning_rate 2e-3",
    "deberta": "--method lora --lora_r 2 --packing",
    "magnitude": f"--method splopa --num_splopa_prototypes 5 --pruning_method magnitude {PRUNE}",
    "trained_words": "--method lora --lora_modules query,word_embeddings",
    "bf16_base": "--method lora --base_dtype bfloat16",
    "bf16": "--method full --mixed_precision bf16 --learning_rate 2e-3",
}
# Half of the mantissa: what is compared is equal but for the order of sums.
LOOSE = {"bf16_base": 2e-2, "bf16": 2e-2}


def words(home: Path, out: Path, case: str, *more: str) -> list[str]:
    model = "deberta" if case == "deberta" else "bert"
    own = CASES[case].split()
    if "--base_dtype" not in own and "full" not in own:
        own += ["--base_dtype", "float32"]
    where = ["--model_name_or_path", str(home / model), "--data_dir", str(home)]
    return [*RUN, *where, *own, "--output_dir", str(out), *more]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """29 rows, 12 a step: the last step has 5, in pieces of 2, 2 and 1 and a filler."""
    folder = tmp_path_factory.mktemp("home")
    still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    tiny_bert(folder / "bert", initializer_range=0.2, **still)
    file = tiny_deberta(folder / "deberta") / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | still))
    pair_task(folder / "mrpc", {"train": 29, "validation": 13})
    return folder


RESUMED = ("full", "magnitude")  # once more, from the checkpoint of step 3


@pytest.fixture(scope="module")
def sharded(home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Runs of all cases on two processes, and of some a second half; what was said."""
    out = tmp_path_factory.mktemp("sharded")
    every = ["--save_steps", "3", "--save_total_limit", "0"]
    runs: list[Sequence[str]] = []
    for case in CASES:
        more = every if case in RESUMED else []
        runs.append(["run_glue", *words(home, out / case, case, *more)])
    for case in RESUMED:
        start = ["--resume_from_checkpoint", str(out / case / "checkpoint-3")]
        runs.append(["run_glue", *words(home, out / f"{case}_again", case, *every, *start)])
    return out, launch_runs(runs, out, "fsdp2")


def weights(run: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(next(run.glob("*/*model.safetensors")))


@pytest.mark.parametrize("case", CASES)
def test_a_sharded_run_is_the_run_on_one_process(
    home: Path, sharded: tuple[Path, str], case: str, tmp_path: Path
) -> None:
    out, said = sharded
    assert (out / case / "all_results.json").is_file(), said[-4000:]
    # one process has twice as many micro-batches instead of the second process
    twice = ["--gradient_accumulation_steps", "4"]
    assert program.run_main(main, words(home, tmp_path / "one", case, *twice)) == 0
    one, two = weights(tmp_path / "one"), weights(out / case)
    assert one.keys() == two.keys()
    close = LOOSE.get(case, 1e-6)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=close, rtol=10 * close, msg=name)
    evaluations = [lines(run / "metrics.jsonl") for run in (tmp_path / "one", out / case)]
    for a, b in zip(*evaluations, strict=True):
        assert a == pytest.approx(b, abs=max(1e-5, close))
    names = ("total_parameters", "trainable_parameters", "best_step", "steps", "train_tokens")
    assert [results(tmp_path / "one")[n] for n in names] == [results(out / case)[n] for n in names]


@pytest.mark.parametrize("case", RESUMED)
def test_a_sharded_run_goes_on_to_the_same_bytes(sharded: tuple[Path, str], case: str) -> None:
    out, said = sharded
    whole, again = weights(out / case), weights(out / f"{case}_again")
    assert whole.keys() == again.keys(), said[-4000:]
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_whole_model_is_saved_as_an_ordinary_checkpoint(sharded: tuple[Path, str]) -> None:
    transformers = pytest.importorskip("transformers")
    folder = sharded[0] / "full" / "model"
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert theirs.config.architectures == ["BertForSequenceClassification"]
    ours = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = torch.arange(5, 17).view(2, 6)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)


# --- what the launcher asks for -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "shards", "frees", "refusal"),
    [
        ("--use_fsdp --fsdp_version 2", True, True, None),
        ("--use_fsdp --fsdp_version 2 --fsdp_reshard_after_forward false", True, False, None),
        ("--use_fsdp", True, True, "FSDP version 1"),
        ("--use_fsdp --fsdp_version 2 --fsdp_offload_params true", True, True, "leave --fsdp_offl"),
        ("--multi_gpu", False, True, None),
    ],
)
def test_it_is_read_as_accelerate_says_it(
    monkeypatch: pytest.MonkeyPatch, asked: str, shards: bool, frees: bool, refusal: str | None
) -> None:
    from accelerate.commands.launch import launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    fixed = "--num_processes 2 --num_machines 1 --main_process_port 0 --mixed_precision no".split()
    words = [*asked.split(), *fixed, "--dynamo_backend", "no", "program.py"]
    for name, value in prepare_multi_gpu_env(launch_command_parser().parse_args(words)).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "2")  # by torch, in each process
    assert (launched.wants_sharding(), launched.frees_layers()) == (shards, frees)
    options = TrainingOptions(output_dir="o")
    if refusal is None:
        launched.check_launch(options)
    else:
        with pytest.raises(program.OptionError, match=refusal):
            launched.check_launch(options)


# --- what is refused -----------------------------------------------------------------------------

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("environment", "more", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "", "DeepSpeed is not supported; launch with DDP"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "", "Megatron-LM is not supported"),
        ({"ACCELERATE_USE_FSDP": "true"}, "", "FSDP version 1 is not supported: --fsdp_version 2"),
        (FSDP | {"FSDP_VERSION": "1"}, "", "--fsdp_version 2"),
        (FSDP | {"FSDP_OFFLOAD_PARAMS": "True"}, "", "leave --fsdp_offload_params out"),
        (FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "", "--gradient_checkpointing instead"),
        (FSDP, "--mixed_precision fp16", "--mixed_precision fp16: not with FSDP2"),
        (FSDP, "--compile", "--compile: not with FSDP2"),
    ],
)
def test_what_cannot_be_is_one_line_before_anything_is_done(
    home: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    environment: dict[str, str],
    more: str,
    message: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    command = words(home, tmp_path / "run", "trained_words", *more.split())
    assert program.run_main(main, command) == 2
    said = capsys.readouterr().err.strip()
    assert message in said and len(said.splitlines()) == 1
    assert not (tmp_path / "run").exists()
