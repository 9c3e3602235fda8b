"""Every form in which a checkpoint comes, and a clear error for every form that is broken."""

import json
import os
import pickle
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.models import SIZES
from support.paths import ROOT

import transformers_patched as tp
from transformers_patched.checkpoint import (
    CheckpointError,
    find_file,
    read_weights,
    write_atomically,
)
from transformers_patched.configuration import model_type

IDS = torch.tensor([[5, 9, 11, 4, 30], [7, 8, 3, 2, 6]])


@pytest.fixture
def model() -> tp.BertForMaskedLM:
    torch.manual_seed(0)
    return tp.BertForMaskedLM(tp.BertConfig(**SIZES)).eval()


@pytest.fixture
def folder(model: tp.BertForMaskedLM, tmp_path: Path) -> Path:
    model.save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict], dict]) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def to_shards(folder: Path, save: Callable, name: str) -> None:
    """Splits `model.safetensors` into two shards with an index, of `name`'s kind."""
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem, suffix = name.rsplit(".", 1)
    weight_map = {
        key: f"{stem}-0000{i % 2 + 1}-of-00002.{suffix}" for i, key in enumerate(sorted(state))
    }
    for shard in sorted(set(weight_map.values())):
        save({k: v.clone() for k, v in state.items() if weight_map[k] == shard}, folder / shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{name}.index.json").write_text(json.dumps(index))


def same_logits(model: torch.nn.Module, folder: Path, **options) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = tp.BertForMaskedLM.from_pretrained(folder, **options)
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


# ---------------------------------------------------------------------- what loads


def test_safetensors(model, folder) -> None:
    same_logits(model, folder)
    state = load_file(folder / "model.safetensors")
    assert not any("decoder" in key for key in state)  # tied to the embedding: written once
    config = json.loads((folder / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["BertForMaskedLM"], "bert")
    assert not any(key.startswith("lora") for key in config)


def test_bin(model, folder) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    same_logits(model, folder)


def test_bin_in_the_format_before_zip(model, folder) -> None:
    torch.save(
        load_file(folder / "model.safetensors"),
        folder / "pytorch_model.bin",
        _use_new_zipfile_serialization=False,
    )
    (folder / "model.safetensors").unlink()
    same_logits(model, folder)


def test_shards(model, folder) -> None:
    to_shards(folder, save_file, "model.safetensors")
    same_logits(model, folder)


def test_bin_shards(model, folder) -> None:
    to_shards(folder, torch.save, "pytorch_model.bin")
    same_logits(model, folder)


def test_old_names_and_stray_keys(model, folder) -> None:
    """`LayerNorm.gamma` and `beta` of 2019, `position_ids` of 2021, the decoder beside its tie."""

    def age(state: dict) -> dict:
        state = {
            key.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): value
            for key, value in state.items()
        }
        assert sum("gamma" in key for key in state) == 6
        state["bert.embeddings.position_ids"] = torch.arange(16)[None]
        state["cls.predictions.decoder.weight"] = torch.zeros(31, 12)
        return state

    rewrite(folder, age)
    same_logits(model, folder)


def test_a_tied_weight_under_its_other_name(model, folder) -> None:
    def rename(state: dict) -> dict:
        embedding = state.pop("bert.embeddings.word_embeddings.weight")
        bias = state.pop("cls.predictions.bias")
        decoder = "cls.predictions.decoder"
        return {**state, f"{decoder}.weight": embedding, f"{decoder}.bias": bias}

    rewrite(folder, rename)
    same_logits(model, folder)


def test_bare_weights_into_a_head_and_back(tmp_path) -> None:
    bare = tp.RobertaModel(tp.RobertaConfig(**SIZES))
    bare.save_pretrained(tmp_path / "bare")
    with pytest.warns(UserWarning) as caught:
        head = tp.RobertaForMultipleChoice.from_pretrained(tmp_path / "bare")
    assert len(caught) == 1
    assert "newly initialised, train before use: classifier.weight, classifier.bias" in str(
        caught[0].message
    )
    assert head.newly_initialised == ("classifier.weight", "classifier.bias")
    head.save_pretrained(tmp_path / "head")
    with pytest.warns(UserWarning, match="not in the model: classifier.bias, classifier.weight$"):
        again = tp.RobertaModel.from_pretrained(tmp_path / "head")
    for name, weight in bare.state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


def test_one_warning_names_missing_and_unexpected(folder) -> None:
    def change(state: dict) -> dict:
        del state["bert.encoder.layer.1.output.dense.weight"]
        return {**state, "surplus": torch.zeros(1)}

    rewrite(folder, change)
    with pytest.warns(UserWarning) as caught:
        loaded, report = tp.BertForMaskedLM.from_pretrained(folder, output_loading_info=True)
    (message,) = [str(warning.message) for warning in caught]
    assert "newly initialised, train before use: bert.encoder.layer.1.output.dense" in message
    assert "in the checkpoint but not in the model: surplus" in message
    assert (report.missing, report.unexpected) == (
        ["bert.encoder.layer.1.output.dense.weight"],
        ["surplus"],
    )
    drawn = loaded.bert.encoder.layer[1].output.dense.weight
    assert 0.2 < drawn.std() < 0.4  # N(0, initializer_range)


def test_nothing_is_drawn_for_weights_that_are_there(folder, monkeypatch) -> None:
    for name in ("normal_", "uniform_"):
        draw = getattr(torch.Tensor, name)

        def draw_nowhere(weight, *args, draw=draw, **kwargs):
            assert weight.is_meta, "a weight was drawn only to be overwritten"
            return draw(weight, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, draw_nowhere)
    loaded = tp.BertForMaskedLM.from_pretrained(folder)
    assert not any(weight.is_meta for weight in loaded.state_dict().values())
    with pytest.raises(AssertionError, match="was drawn"):
        tp.BertModel(loaded.config)


def test_the_first_load_of_minilm_takes_less_than_a_second(minilm_dir) -> None:
    """In a fresh process: what a load imports counts too, as torch's meta initialisers would."""
    script = (
        "import sys, time, transformers_patched as tp; tp.BertModel; start = time.perf_counter(); "
        "tp.BertModel.from_pretrained(sys.argv[1]); print(time.perf_counter() - start)"
    )
    output = subprocess.run(
        [sys.executable, "-c", script, str(minilm_dir)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    assert float(output) < 1.0


def test_loading_keeps_no_tie_to_the_file(model, folder) -> None:
    """Weights are mapped from the file; training must not write there, nor saving over it hurt."""
    loaded = tp.BertForMaskedLM.from_pretrained(folder)
    with torch.no_grad():
        for weight in loaded.parameters():
            weight.add_(1.0)
    same_logits(model, folder)
    loaded.save_pretrained(folder)
    same_logits(loaded, folder)


def test_dtypes(folder) -> None:
    half = tp.BertForMaskedLM.from_pretrained(folder, dtype="bfloat16")
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    half.save_pretrained(folder / "half")
    assert tp.BertForMaskedLM.from_pretrained(folder / "half").dtype == torch.float32
    assert tp.BertForMaskedLM.from_pretrained(folder / "half", dtype="auto").dtype == torch.bfloat16
    with pytest.raises(ValueError, match="'float31' is unknown"):
        tp.BertForMaskedLM.from_pretrained(folder, dtype="float31")


def test_saved_lora_factors_stay_in_the_dtype_of_what_is_trained(model, folder) -> None:
    tp.BertForMaskedLM.from_pretrained(folder, apply_lora=True).save_pretrained(folder / "lora")
    loaded = tp.BertForMaskedLM.from_pretrained(folder / "lora", base_dtype="bfloat16")
    query = loaded.bert.encoder.layer[0].attention.self.query
    assert (query.weight.dtype, query.lora_A.dtype) == (torch.bfloat16, torch.float32)


# ---------------------------------------------------------------------- prefixes and model types


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "_orig_mod.module.", "net."])
def test_a_prefix_before_all_keys_is_left_out(model, folder, prefix: str) -> None:
    """DataParallel, torch.compile and training loops leave one; in every kind of weights file."""
    rewrite(folder, lambda state: {prefix + key: value for key, value in state.items()})
    same_logits(model, folder)
    to_shards(folder, torch.save, "pytorch_model.bin")
    same_logits(model, folder)


def test_a_prefix_before_the_keys_of_a_bare_model(model, folder) -> None:
    bare = tp.BertModel(model.config).eval()
    bare.save_pretrained(folder)
    rewrite(folder, lambda state: {f"model.{key}": value for key, value in state.items()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = tp.BertModel.from_pretrained(folder)
    with torch.no_grad():
        assert torch.equal(loaded(IDS)[0], bare(IDS)[0])
    with pytest.warns(UserWarning, match="newly initialised, train before use: classifier"):
        head = tp.BertForSequenceClassification.from_pretrained(folder)
    assert head.newly_initialised == ("classifier.weight", "classifier.bias")


def test_weights_that_do_not_fit_are_no_random_model(model, folder) -> None:
    """Renamed, two models in one file, or another model that shares a few names."""
    original = load_file(folder / "model.safetensors")
    layers = "bert.encoder.layer."
    for state in (
        {f"x{i}.weight": value for i, value in enumerate(original.values())},
        {f"{n}.{k}": v.clone() for k, v in original.items() for n in ("student", "teacher")},
        {k.replace(layers, "bert.transformer.layer."): v for k, v in original.items()},
        {k.replace("bert.", "bert._orig_mod."): v for k, v in original.items()},
        {k: v for k, v in original.items() if k.startswith("cls.")},
        {},
    ):
        save_file(state, folder / "model.safetensors")
        with pytest.raises(CheckpointError) as caught:
            tp.BertForMaskedLM.from_pretrained(folder)
        message = str(caught.value)
        assert f"of the {len(state)} keys fit BertForMaskedLM" in message
        assert "bert.embeddings" in message and "\n" not in message


def test_more_or_fewer_layers_than_the_checkpoint_has(folder) -> None:
    for layers, words in ((1, "not in the model"), (9, "newly initialised")):
        with pytest.warns(UserWarning, match=words):
            loaded = tp.BertForMaskedLM.from_pretrained(folder, num_hidden_layers=layers)
        assert len(loaded.bert.encoder.layer) == layers


@pytest.mark.parametrize(
    ("architecture", "kind"),
    [
        ("BertForMaskedLM", "bert"),
        ("BertModel", "bert"),
        ("RobertaForSequenceClassification", "roberta"),
        ("DebertaV2Model", "deberta-v2"),
        ("GPT2LMHeadModel", "gpt2"),
        ("BertGenerationEncoder", None),
        (3, None),
    ],
)
def test_the_architecture_says_the_model_type(architecture: object, kind: str | None) -> None:
    for stated in ({}, {"model_type": None}, {"model_type": ""}):
        assert model_type({**stated, "architectures": [architecture]}) == kind
    assert model_type({"model_type": "t5", "architectures": [architecture]}) == "t5"
    assert model_type({"architectures": architecture}) is model_type({}) is None


def test_a_config_without_model_type(model, folder) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["model_type"]
    (folder / "config.json").write_text(json.dumps(config))
    loaded = tp.AutoModelForMaskedLM.from_pretrained(folder).eval()
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    same_logits(model, folder)
    with pytest.raises(tp.ConfigError, match="model_type 'bert', which is no RobertaConfig"):
        tp.RobertaModel.from_pretrained(folder)
    loaded.save_pretrained(folder / "again")
    assert json.loads((folder / "again" / "config.json").read_text())["model_type"] == "bert"
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"config\.json: neither model_type nor architectures"
    ):
        tp.AutoModel.from_pretrained(folder)


# ---------------------------------------------------------------------- what does not


def test_other_shapes_are_named_together(folder) -> None:
    with pytest.raises(CheckpointError) as caught:
        tp.BertForMaskedLM.from_pretrained(folder, vocab_size=40, intermediate_size=21)
    message = str(caught.value)
    assert "ignore_mismatched_sizes=True" in message
    shapes = {
        "bert.embeddings.word_embeddings.weight": ("(31, 12)", "(40, 12)"),
        "cls.predictions.bias": ("(31,)", "(40,)"),
        "bert.encoder.layer.1.intermediate.dense.weight": ("(20, 12)", "(21, 12)"),
        "bert.encoder.layer.0.output.dense.weight": ("(12, 20)", "(12, 21)"),
    }
    for key, (there, here) in shapes.items():
        assert f"{key}: {there} in {folder / 'model.safetensors'}, {here} here" in message
    with pytest.warns(UserWarning, match="newly initialised.*word_embeddings"):
        loaded = tp.BertForMaskedLM.from_pretrained(
            folder, vocab_size=40, ignore_mismatched_sizes=True
        )
    assert loaded(IDS + 9).logits.shape == (2, 5, 40)


@pytest.mark.parametrize("keep", [0, 4, 300, -100])
def test_truncated_safetensors(folder, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors .* truncated .* again"):
        tp.BertForMaskedLM.from_pretrained(folder)


def test_git_lfs_pointer(folder) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        tp.BertForMaskedLM.from_pretrained(folder)


class Exploit:
    """Unpickled without care, this makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


def test_a_pickle_with_code_in_it_is_not_run(folder) -> None:
    (folder / "model.safetensors").unlink()
    trace = folder / "executed"
    torch.save({"bert.embeddings": Exploit(trace)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin .* could run code.* refused"):
        tp.BertForMaskedLM.from_pretrained(folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Exploit(trace), protocol=2))
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin .* refused"):
        tp.BertForMaskedLM.from_pretrained(folder)
    assert not trace.exists()


def test_bins_of_other_things(folder) -> None:
    (folder / "model.safetensors").unlink()
    path = folder / "pytorch_model.bin"
    torch.save([torch.zeros(1)], path)
    with pytest.raises(CheckpointError, match="must hold a state dict, not a list"):
        tp.BertForMaskedLM.from_pretrained(folder)
    torch.save({"epoch": 3, "weight": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError, match="no tensors are epoch"):
        tp.BertForMaskedLM.from_pretrained(folder)
    torch.save({"weight": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin"):
        tp.BertForMaskedLM.from_pretrained(folder)


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "x.bin"]
)
def test_an_index_names_only_files_beside_it(folder, shard: str) -> None:
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = {"weight_map": {"cls.predictions.bias": shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="index.json names the shard .* beside"):
        tp.BertForMaskedLM.from_pretrained(folder)


def test_broken_shards(folder) -> None:
    to_shards(folder, save_file, "model.safetensors")
    index = folder / "model.safetensors.index.json"
    good = index.read_text()
    index.write_text(good.replace("cls.predictions.bias", "cls.predictions.bins"))
    with pytest.raises(CheckpointError, match=r"00002\.safetensors lacks cls\.predictions\.bins"):
        tp.BertForMaskedLM.from_pretrained(folder)
    for text in ("{", "[]", '{"weight_map": 3}', "{}"):
        index.write_text(text)
        with pytest.raises(CheckpointError, match="no index of shards"):
            tp.BertForMaskedLM.from_pretrained(folder)
    index.write_text(good)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match="model-00002-of-00002.safetensors, which is missing"):
        tp.BertForMaskedLM.from_pretrained(folder)


def test_missing_and_broken_files(folder) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="has no weights: expected model.safetensors"):
        tp.BertForMaskedLM.from_pretrained(folder)
    config = folder / "config.json"
    for text in ("{", "\x00"):
        config.write_text(text)
        with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
            tp.AutoModel.from_pretrained(folder)
    config.write_text("[1]")
    with pytest.raises(CheckpointError, match=r"config\.json must hold one JSON object"):
        tp.AutoModel.from_pretrained(folder)
    config.write_text('{"model_type": "t5"}')
    with pytest.raises(CheckpointError, match="model_type is 't5'; there are models for bert, rob"):
        tp.AutoModel.from_pretrained(folder)
    config.write_text('{"model_type": ["bert"]}')
    with pytest.raises(CheckpointError, match=r"model_type is \['bert'\]; there are models"):
        tp.AutoModel.from_pretrained(folder)
    config.write_text('{"model_type": "t5"}')
    with pytest.raises(tp.ConfigError, match="model_type 't5', which is no BertConfig"):
        tp.BertModel.from_pretrained(folder)
    config.unlink()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        tp.AutoModel.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="no such folder, and it is no hub id"):
        tp.AutoModel.from_pretrained(folder / "nowhere")
    (folder / "plain").write_text("")
    with pytest.raises(CheckpointError, match="is a file: give the folder"):
        tp.AutoModel.from_pretrained(folder / "plain")


def test_misspelt_override(folder) -> None:
    with pytest.raises(tp.ConfigError, match="no field 'hiden_size'"):
        tp.BertModel.from_pretrained(folder, hiden_size=3)


def test_a_write_that_fails_leaves_the_old_file(tmp_path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_text("old")

    def fail(aside: Path) -> None:
        aside.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


# ---------------------------------------------------------------------- the hub


class Hub(BaseHTTPRequestHandler):
    """Serves `folder` as the repository tiny/bert, the way the hub answers file requests."""

    folder: Path
    commit = "0123456789abcdef0123456789abcdef01234567"

    def do_HEAD(self) -> None:  # noqa: N802
        parts = self.path.strip("/").split("/")
        if self.path == "/":
            return self.answer(200)
        if parts[:3] != ["tiny", "bert", "resolve"]:
            return self.answer(404, {"X-Error-Code": "RepoNotFound"})
        if parts[3] not in ("main", self.commit):
            return self.answer(404, {"X-Error-Code": "RevisionNotFound"})
        path = self.folder / parts[4]
        if not path.exists():
            return self.answer(404, {"X-Error-Code": "EntryNotFound"})
        body = path.read_bytes()
        headers = {"ETag": f'"{len(body)}"', "X-Repo-Commit": self.commit}
        self.answer(200, {**headers, "Content-Length": str(len(body))}, body)

    do_GET = do_HEAD  # noqa: N815

    def answer(self, status: int, headers: dict | None = None, body: bytes = b"") -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": "0"} | (headers or {})).items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_args) -> None:
        pass


SCRIPT = """
import json, sys, time, torch, transformers_patched as tp
for name, options in json.loads(sys.argv[1]):
    start = time.perf_counter()
    try:
        model = tp.AutoModelForMaskedLM.from_pretrained(name, **options)
        answer = f"{type(model).__name__} {model.name_or_path}"
    except tp.CheckpointError as error:
        answer = f"CheckpointError: {error}"
    print(json.dumps([answer, time.perf_counter() - start]))
"""


def load_from(endpoint: str, cache: Path, *calls: tuple[str, dict]) -> list[tuple[str, float]]:
    """Loads in a process of its own: the hub's address is read when its client is imported.

    Returns:
        What every call gave, and its seconds.
    """
    env = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    env |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(cache), "HF_HUB_DISABLE_XET": "1"}
    env.pop("HF_HUB_OFFLINE", None)
    output = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(calls)],
        env=env,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    return [tuple(json.loads(line)) for line in output.splitlines()]


def test_hub_ids(folder, tmp_path_factory) -> None:
    to_shards(folder, save_file, "model.safetensors")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Tiny", (Hub,), {"folder": folder}))
    Thread(target=server.serve_forever, daemon=True).start()
    address, cache = f"http://127.0.0.1:{server.server_port}", tmp_path_factory.mktemp("cache")
    try:
        answers = load_from(
            address,
            cache,
            ("tiny/bert", {"local_files_only": True}),
            ("tiny/bert", {}),
            ("tiny/bert", {"revision": Hub.commit}),
            ("tiny/bert", {"revision": "v9"}),
            ("tiny/gpt", {}),
        )
    finally:
        server.shutdown()
        server.server_close()
    expected = (
        "not in the cache, and the hub is not asked",
        "BertForMaskedLM tiny/bert",
        "BertForMaskedLM tiny/bert",
        "tiny/bert has no revision 'v9'",
        "neither a folder here nor a repository you can read",
    )
    for (answer, _), part in zip(answers, expected, strict=True):
        assert part in answer
    # The server is gone; the cache serves what it has, asked to or not.
    answers = load_from(
        address,
        cache,
        ("tiny/bert", {"local_files_only": True}),
        ("tiny/bert", {}),
        ("tiny/bert", {"revision": Hub.commit}),
        ("tiny/gpt", {}),
    )
    for answer, _ in answers[:3]:
        assert "BertForMaskedLM tiny/bert" in answer
    assert f"hub at {address} did not answer" in answers[3][0]


def test_a_silent_hub_costs_at_most_five_seconds(tmp_path) -> None:
    """A port that takes connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        calls = [("tiny/bert", {}), ("tiny/gpt", {})]
        (first, seconds), (second, more) = load_from(address, tmp_path, *calls)
    assert f"hub at {address} did not answer: give a folder" in first
    assert f"hub at {address} did not answer: give a folder" in second
    assert seconds < 5.0 and more < 1.0  # the second call knows


def test_find_file(folder) -> None:
    assert find_file(folder, "config.json") == folder / "config.json"
    assert find_file(folder, "vocab.txt") is None
    tensors, files = read_weights(folder)
    assert set(files.values()) == {folder / "model.safetensors"} and tensors.keys() == files.keys()
