"""Downloads, from a hub on loopback and from folders: what arrives is whole, or one clear error."""

import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from support.fake_hub import FakeHub
from support.paths import ROOT

from examples import download
from examples.data.readers import read_split
from examples.data.tables import DataError, write_table
from examples.data.tasks import GLUE_TASKS, TASKS, Task

README = """---
configs:
- config_name: {name}
  data_files:
{splits}
---
"""


def columns(task: Task, split: str) -> dict[str, list]:
    """A few rows as the hub has them, hard characters included; test labels are hidden."""
    count = 7 if split == "train" else 4
    texts = ["tab\there", 'a "quote"', "line\u2028end", "naïve ☃", "back\\slash", "x", "new\nline"]
    labels = [i / 2 for i in range(count)] if task.regression else [i % 2 for i in range(count)]
    if split.startswith("test"):
        labels = [-1.0 if task.regression else -1] * count
    text = {name: [f"{name} {t}" for t in texts[:count]] for name in task.text}
    return {**text, "label": labels, "idx": list(range(10, 10 + count))}


def splits(task: Task) -> list[str]:
    return ["train", *task.evaluation.values(), *task.test_splits]


def parquet_folder(parent: Path, task: Task) -> Path:
    """The layout of the hub's own files, `mrpc/train-00000-of-00001.parquet`."""
    for split in splits(task):
        path = parent / task.name / f"{split}-00000-of-00001.parquet"
        write_table(path, columns(task, split))
    return parent


def call(*words: object, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`scripts/download.sh` in a process of its own, with a home of its own."""
    home = {"HF_HOME": str(cwd / "home"), "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_TELEMETRY": "1"}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", str(ROOT / "scripts" / "download.sh"), *map(str, words)],
        cwd=cwd,
        env={**os.environ, **home, "PATH": path, **environment},
        capture_output=True,
        text=True,
    )


def error_of(done: subprocess.CompletedProcess[str]) -> str:
    """The error line: the last, and the only one."""
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr
    return lines[0]


# -- tasks from a folder ------------------------------------------------------------------------


@pytest.mark.parametrize("name", GLUE_TASKS)
def test_parquet_files_become_json_lines_that_read_back_equal(tmp_path: Path, name: str) -> None:
    task = TASKS[name]
    source = parquet_folder(tmp_path / "from", task)
    assert download.main([name, "--from", str(source), "--to", str(tmp_path / "to")]) == 0
    for split in splits(task):
        got = read_split(task, tmp_path / "to", split)
        want = read_split(task, source, split)
        assert (got.text, got.labels, got.ids) == (want.text, want.labels, want.ids)
        assert (got.labels is None) == split.startswith("test")
        assert got.ids[0] == 10
        assert Path(got.source).suffix == ".jsonl"
    assert [path.name for path in (tmp_path / "to").iterdir()] == [name]


def test_official_files_are_a_source_too(real_data, tmp_path: Path, capsys) -> None:
    source = real_data("glue")
    words = ["MRPC", "cola", "STS-B", "sst-2", "--from", str(source), "--home", str(tmp_path)]
    assert download.main(words) == 0
    rows = read_split(TASKS["cola"], tmp_path / "data", "train")
    assert len(rows) == 8551 and rows.labels == read_split(TASKS["cola"], source, "train").labels
    shown = capsys.readouterr().out
    assert "(3,668 train, 408 validation, 1,725 test)" in shown
    assert f"872 validation; {source} has no test)" in shown
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["cola", "mrpc", "sst2", "stsb"]


def test_what_is_there_is_left_alone(tmp_path: Path, capsys) -> None:
    source = parquet_folder(tmp_path / "from", TASKS["rte"])
    (tmp_path / "to" / "RTE").mkdir(parents=True)
    assert download.main(["rte", "--from", str(source), "--to", str(tmp_path / "to")]) == 0
    assert "RTE is there already" in capsys.readouterr().out
    assert list((tmp_path / "to" / "RTE").iterdir()) == []


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_damaged_file_leaves_nothing(tmp_path: Path, capsys, split: str) -> None:
    source = parquet_folder(tmp_path / "from", TASKS["rte"])
    path = source / "rte" / f"{split}-00000-of-00001.parquet"
    path.write_bytes(path.read_bytes()[:-9])
    assert download.main(["rte", "--from", str(source), "--to", str(tmp_path / "to")]) == 2
    assert f"{path}: damaged or not parquet" in capsys.readouterr().err
    assert list((tmp_path / "to").glob("*")) == []


def test_a_label_out_of_range_is_found_when_fetching(tmp_path: Path, capsys) -> None:
    source = parquet_folder(tmp_path / "from", TASKS["rte"])
    rows = columns(TASKS["rte"], "train") | {"label": [0, 1, 0, 2, 0, 1, 0]}
    write_table(source / "rte" / "train-00000-of-00001.parquet", rows)
    assert download.main(["rte", "--from", str(source), "--to", str(tmp_path / "to")]) == 2
    assert "row 4: label 2 is out of range" in capsys.readouterr().err


def test_a_full_disk_is_one_error_and_leaves_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    source = parquet_folder(tmp_path / "from", TASKS["rte"])
    monkeypatch.setattr(download, "write_table", full)
    assert download.main(["rte", "--from", str(source), "--to", str(tmp_path / "to")]) == 2
    assert capsys.readouterr().err == "error: [Errno 28] No space left on device\n"
    assert list((tmp_path / "to").glob("*")) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rte", "--from", "nowhere"], "--from nowhere: no such folder"),
        (["some/model", "--from", "."], "some/model: no task (cola, mnli"),
        (["wording"], "wording: comes with the project"),
        (["a b"], "a b: neither a task (cola, mnli"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, monkeypatch, capsys, words, message) -> None:
    monkeypatch.chdir(tmp_path)
    assert download.main(words) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_without_datasets_the_extra_is_named(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(download, "find_spec", lambda name: None)
    assert download.main(["rte", "--to", str(tmp_path)]) == 2
    assert "pip install 'rankwise[data]'" in capsys.readouterr().err


# -- the hub ------------------------------------------------------------------------------------

MODEL = {
    "config.json": b'{"model_type": "roberta"}',
    "vocab.json": b"{}",
    "merges.txt": b"#version: 0.2\n",
    "model.safetensors": bytes(range(256)) * 400,
    "pytorch_model.bin": b"pickle",
    "tf_model.h5": b"tensorflow",
    "onnx/model.onnx": b"onnx",
}


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    task = TASKS["mrpc"]
    parquet_folder(tmp_path / "served", task)
    files = {
        f"mrpc/{path.name}": path.read_bytes() for path in (tmp_path / "served/mrpc").iterdir()
    }
    listed = "\n".join(f"  - split: {s}\n    path: mrpc/{s}-*" for s in splits(task))
    files["README.md"] = README.format(name="mrpc", splits=listed).encode()
    old = {name: data for name, data in MODEL.items() if name != "model.safetensors"}
    repos = {"models/org/small": MODEL, "models/org/old": old, "datasets/nyu-mll/glue": files}
    repos["models/org/empty"] = {"config.json": b"{}", "notes.txt": b"-"}
    with FakeHub(repos).running() as served:
        yield served


@pytest.fixture
def near(hub: FakeHub, monkeypatch) -> FakeHub:
    """The same hub for calls within this process."""
    from huggingface_hub import constants

    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + template)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return hub


def test_a_model_arrives_without_pickles(hub: FakeHub, tmp_path: Path) -> None:
    done = call("org/small", "--home", tmp_path, cwd=tmp_path, HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "checkpoints" / "small"
    wanted = ["config.json", "merges.txt", "model.safetensors", "vocab.json"]
    assert sorted(path.name for path in folder.rglob("*")) == wanted
    assert all((folder / name).read_bytes() == MODEL[name] for name in wanted)
    assert [path.name for path in folder.parent.iterdir()] == ["small"]
    asked = len(hub.asked)
    again = call("org/small", "--home", tmp_path, cwd=tmp_path, HF_ENDPOINT=hub.url)
    assert "is there already" in again.stdout and len(hub.asked) == asked


def test_weights_are_chosen_safe_first() -> None:
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    index = "model.safetensors.index.json"
    files = [
        "config.json",
        "spm.model",
        *shards,
        index,
        "pytorch_model.bin",
        "x.py",
        "training.bin",
    ]
    assert download.wanted(files) == ["config.json", "spm.model", *shards, index]
    assert download.wanted(["pytorch_model.bin", "tf_model.h5"]) == ["pytorch_model.bin"]


def test_an_old_model_says_that_it_is_a_pickle(near: FakeHub, tmp_path: Path, capsys) -> None:
    assert download.main(["--to", str(tmp_path / "to"), "org/old"]) == 0
    assert "org/old: has no safetensors" in capsys.readouterr().out
    assert (tmp_path / "to" / "old" / "pytorch_model.bin").read_bytes() == b"pickle"


def test_after_a_broken_download_only_what_lacks_is_fetched(
    near: FakeHub, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client's, between its attempts
    words = ["org/small", "--to", str(tmp_path / "to")]
    near.cut.add("model.safetensors")
    assert download.main(words) == 2
    assert "error: org/small: the download broke off" in capsys.readouterr().err
    assert not (tmp_path / "to" / "small").exists()
    near.cut.clear()
    before = len(near.asked)
    assert download.main(words) == 0
    got = (tmp_path / "to" / "small" / "model.safetensors").read_bytes()
    assert got == MODEL["model.safetensors"]
    fetched = [line for line in near.asked[before:] if line.startswith("GET /org")]
    assert len(fetched) == 1 and fetched[0].endswith("/model.safetensors")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["org/none"], "org/none: neither a task (cola, mnli"),
        (["org/small", "--revision", "v9"], "org/small has no revision 'v9'"),
        (["org/empty"], "org/empty: no config.json with model.safetensors"),
    ],
)
def test_what_the_hub_lacks_is_named(near: FakeHub, tmp_path: Path, capsys, words, message) -> None:
    assert download.main([*words, "--to", str(tmp_path / "to")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
    assert not list((tmp_path / "to").glob("[!.]*"))


def test_a_task_of_the_hub_becomes_files_that_read_back_equal(hub: FakeHub, tmp_path: Path) -> None:
    done = call("mrpc", "--to", tmp_path / "to", cwd=tmp_path, HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr
    assert "(7 train, 4 validation, 4 test)" in done.stdout
    task = TASKS["mrpc"]
    for split in splits(task):
        rows = read_split(task, tmp_path / "to", split)
        want = read_split(task, tmp_path / "served", split)
        assert (rows.text, rows.labels, rows.ids) == (want.text, want.labels, want.ids)


def test_a_task_whose_hub_breaks_off_leaves_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    def breaks(task: Task, name: str, config: str | None, split: str):
        if split == "train":
            return dataclasses.replace(read_split(task, source, split), source="hub")
        raise DataError("cannot be read") from ConnectionError("gone")

    source = parquet_folder(tmp_path / "from", TASKS["rte"])
    monkeypatch.setattr(download, "endpoint", lambda: "http://hub")
    monkeypatch.setattr(download, "read_hub", breaks)
    assert download.main(["rte", "--to", str(tmp_path / "to")]) == 2
    message = "rte: the hub's nyu-mll/glue, split validation, did not come through"
    assert message in capsys.readouterr().err
    assert list((tmp_path / "to").glob("*")) == []


@pytest.mark.parametrize("name", ["rte", "org/small"])
def test_an_absent_hub_is_one_quick_error(tmp_path: Path, name: str) -> None:
    done = call(name, "--to", tmp_path / "to", cwd=tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert "the hub at http://127.0.0.1:9 does not answer" in error_of(done)
    assert not (tmp_path / "to").exists()


def test_a_hub_switched_off_is_named(monkeypatch, capsys, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert download.main(["org/small", "--to", str(tmp_path / "to")]) == 2
    assert "HF_HUB_OFFLINE is set" in capsys.readouterr().err


# -- text generation ----------------------------------------------------------------------------

SPLITS = ("train", "dev", "test")
E2E = "name : Blue Spice | food : Thai||Blue Spice serves Thai food .\n"
TRIPLE = {"subject": "A", "property": "of", "object": "B"}
WEBNLG = {
    "entries": [
        {
            "1": {
                "category": "City",
                "modifiedtripleset": [TRIPLE],
                "lexicalisations": [{"lex": "A is of B.", "comment": "good"}],
            }
        }
    ]
}
DART = [{"tripleset": [["A", "OF", "B"]], "annotations": [{"source": "x", "text": "A of B"}]}]
SERVED = {
    **{f"data/e2e/{split}.txt": E2E for split in ("train", "valid", "test")},
    **{
        f"data/webnlg_challenge_2017/{s}.json": json.dumps(WEBNLG) for s in ("train", "dev", "test")
    },
    **{f"data/dart/dart-v1.1.1-full-{s}.json": json.dumps(DART) for s in SPLITS},
}


@pytest.fixture
def web(tmp_path: Path, monkeypatch) -> Iterator[Path]:
    """A server on loopback in place of the original recipe's; its files are in this folder."""
    folder = tmp_path / "web"
    for name, text in SERVED.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    class Handler(SimpleHTTPRequestHandler):
        def __init__(self, *arguments, **more) -> None:
            super().__init__(*arguments, directory=str(folder), **more)

        def log_message(self, *arguments: object) -> None:
            pass

        def send_header(self, name: str, value: str) -> None:
            if name == "Content-Length" and "cut" in self.path:
                value = str(int(value) + 9)
            super().send_header(name, value)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("examples.data.fetch_nlg.NLG_DATA", f"{url}/data")
    monkeypatch.setattr("examples.data.fetch_squad.SITE", f"{url}/squad")
    monkeypatch.setitem(download.ADAPTERS, "gpt2_md_lora_e2e", f"{url}/gpt2_md_lora_e2e.pt")
    monkeypatch.setitem(download.ADAPTERS, "cut", f"{url}/cut.pt")
    yield folder
    server.shutdown()
    server.server_close()


def test_raw_files_of_text_generation_come_from_the_web(web: Path, tmp_path: Path, capsys) -> None:
    assert download.main(["e2e", "webnlg_2017", "DART", "--home", str(tmp_path)]) == 0
    got = sorted(str(p.relative_to(tmp_path / "data")) for p in (tmp_path / "data").rglob("*.*"))
    assert got == [
        *(f"dart/dart-v1.1.1-full-{split}.json" for split in ("dev", "test", "train")),
        *(f"e2e/{split}.txt" for split in ("test", "train", "valid")),
        *(f"webnlg/{split}.json" for split in ("dev", "test", "train")),
    ]
    assert (tmp_path / "data/e2e/test.txt").read_text() == E2E
    shown = capsys.readouterr().out
    assert "(1 train, not the published file, 1 valid, not the published file, 1 test" in shown
    assert download.main(["e2e", "--home", str(tmp_path)]) == 0
    assert "is there already" in capsys.readouterr().out


def test_published_files_are_known(real_data, tmp_path: Path, capsys) -> None:
    source = real_data("e2e").parent
    assert download.main(["e2e", "dart", "xsum", "--from", str(source), "--to", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "4,672 valid, as published, 4,693 test, as published)" in shown
    assert "(42,061 train, not the published file, " in shown  # converted from the official CSV
    assert "(no train, 6,980 valid, as published, no test)" in shown
    assert "xsum" in shown and "(no train, no valid, 1,000 test)" in shown
    test = (source / "e2e/test.txt").read_bytes()
    assert (tmp_path / "e2e/test.txt").read_bytes() == test


def test_squad_comes_whole_or_not_at_all(web: Path, tmp_path: Path, capsys) -> None:
    from support.squad_cases import squad_task

    words = ["SQuAD", "--home", str(tmp_path / "home")]
    squad_task(web / "squad", {"train-v1.1": 5})
    assert download.main(words) == 2  # there is no dev-v1.1.json
    assert "dev-v1.1.json: cannot be fetched" in capsys.readouterr().err
    assert list((tmp_path / "home" / "data").iterdir()) == []
    squad_task(web / "squad", {"dev-v1.1": 3})
    assert download.main(words) == 0
    assert "(5 train, 3 dev)" in capsys.readouterr().out
    got = tmp_path / "home" / "data" / "squad" / "dev-v1.1.json"
    assert got.read_bytes() == (web / "squad" / got.name).read_bytes()
    assert download.main(words) == 0 and "is there already" in capsys.readouterr().out
    (web / "squad" / got.name).write_text("{")
    assert download.main(["squad", "--from", str(web), "--to", str(tmp_path / "to")]) == 2
    assert got.name in capsys.readouterr().err and not (tmp_path / "to" / "squad").exists()


def test_boolq_comes_from_the_hub(tmp_path: Path) -> None:
    rows = {"question": ["is it", "why"], "answer": [True, False], "passage": ["It is.", "No."]}
    files = {}
    for split in ("train", "validation"):
        path = tmp_path / f"{split}-00000-of-00001.parquet"
        write_table(path, rows)
        files[f"data/{path.name}"] = path.read_bytes()
    listed = "\n".join(f"  - split: {s}\n    path: data/{s}-*" for s in ("train", "validation"))
    files["README.md"] = README.format(name="default", splits=listed).encode()
    with FakeHub({"datasets/google/boolq": files}).running() as hub:
        done = call("boolq", "--to", tmp_path / "to", cwd=tmp_path, HF_ENDPOINT=hub.url)
    assert done.returncode == 0, done.stderr
    assert "boolq: " in done.stdout and "(2 train, 2 valid, no test)" in done.stdout
    lines = (tmp_path / "to/boolq/validation.jsonl").read_text().splitlines()
    assert json.loads(lines[0]) == {"question": "is it", "answer": True, "passage": "It is."}


def test_a_published_adapter_comes_whole_or_not_at_all(web: Path, tmp_path: Path, capsys) -> None:
    name = "module.transformer.h.0.attn.c_attn.lora_A"
    torch.save({"model_state_dict": {name: torch.ones(8, 6)}}, web / "gpt2_md_lora_e2e.pt")
    words = ["gpt2_md_lora_e2e.pt", "--home", str(tmp_path)]
    assert download.main(words) == 0
    path = tmp_path / "checkpoints" / "gpt2_md_lora_e2e.pt"
    assert path.read_bytes() == (web / path.name).read_bytes()
    assert download.main(words) == 0 and "is there already" in capsys.readouterr().out
    path.unlink()
    (web / path.name).write_bytes(b"<html>")
    assert download.main(words) == 2
    assert "gpt2_md_lora_e2e: " in (told := capsys.readouterr().err) and "damaged" in told
    (web / "cut.pt").write_bytes(b"PK")
    assert download.main(["cut", "--home", str(tmp_path)]) == 2
    assert "/cut.pt: broke off at 2 of 11 bytes" in capsys.readouterr().err
    assert list((tmp_path / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("broken", ["absent", "damaged"])
def test_a_raw_file_that_fails_leaves_nothing(web: Path, tmp_path: Path, capsys, broken) -> None:
    path = web / "data/dart/dart-v1.1.1-full-dev.json"
    path.unlink() if broken == "absent" else path.write_text("{")
    assert download.main(["dart", "--home", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and "dart-v1.1.1-full-dev.json" in told
    assert ("cannot be fetched (File not found)" in told) == (broken == "absent")
    assert list((tmp_path / "data").iterdir()) == []
    (tmp_path / "none").mkdir()
    assert download.main(["e2e", "--from", str(tmp_path / "none"), "--home", str(tmp_path)]) == 2
    assert "no file of e2e; looked for train.txt" in capsys.readouterr().err


def test_gpt2_has_the_names_that_people_know() -> None:
    known = download.names(["gpt2", "gpt2-medium", "gpt2.md", "gpt2.lg", "gpt2-xl", "org/gpt2"])
    assert known == [
        *(f"openai-community/gpt2{size}" for size in ("", "-medium", "-medium", "-large", "-xl")),
        "org/gpt2",
    ]
    assert [task.name for task in download.names(["nlg"])] == [
        "e2e", "webnlg", "dart", "boolq", "xsum",
    ]  # fmt: skip


def test_bert_comes_to_where_its_scripts_look(near: FakeHub, tmp_path: Path, capsys) -> None:
    """checkpoints/bert-base-uncased/, with the files of a tokenizer and without an owner's name."""
    assert download.names(["bert-base-uncased"]) == ["google-bert/bert-base-uncased"]
    kept = ("config.json", "model.safetensors", "tokenizer_config.json", "vocab.txt")
    files = dict.fromkeys((*kept, "tf_model.h5", "rust_model.ot"), b"{}")
    near.repos["models/google-bert/bert-base-uncased"] = files
    assert download.main(["bert-base-uncased", "--home", str(tmp_path)]) == 0
    found = sorted(path.name for path in (tmp_path / "checkpoints/bert-base-uncased").iterdir())
    assert found == sorted(kept)
