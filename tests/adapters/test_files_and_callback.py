"""Small promises of the files and of the Trainer's callback, each of which something relies on."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.peft_tiny import QV, bert
from torch import nn

from peft_custom import LoraConfig, get_peft_model
from peft_custom.files import written_aside
from peft_custom.state_files import read_tree, write_tree
from transformers_patched.files import write_atomically


def test_sets_are_written_in_order() -> None:
    entries = {f"m{i}" for i in range(20)}
    written = LoraConfig(target_modules=entries).to_dict()["target_modules"]
    assert written == sorted(entries)


def test_a_reader_keeps_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    with path.open() as reader:
        with written_aside(path) as aside:
            aside.write_text("newer")
        assert reader.read() == "old"
    assert path.read_text() == "newer"


def test_a_file_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, seen = tmp_path / "file", []
    monkeypatch.setattr("os.fsync", lambda number: seen.append(path.exists()))
    write_atomically(path, lambda aside: aside.write_text("x"))
    assert seen == [False]


def test_tuples_come_back_as_tuples(tmp_path: Path) -> None:
    tree = {"pair": (1, [2, (3.0, None)]), "rows": [torch.ones(2)]}
    write_tree(tmp_path / "state", tree)
    back = read_tree(tmp_path / "state")
    assert back["pair"] == tree["pair"] and torch.equal(back["rows"][0], tree["rows"][0])


def test_of_the_usual_head_names_absent_ones_are_dropped() -> None:
    config = LoraConfig(task_type="SEQ_CLS", modules_to_save=["classifier", "score"], **QV)
    assert get_peft_model(bert(), config).peft_config["default"].modules_to_save == ["classifier"]


def test_a_seed_of_the_callback_comes_before_the_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    from peft_custom import hf_trainer

    seeds = []

    def attach(*args: object, seed: int, **options: object) -> SimpleNamespace:
        seeds.append(seed)
        return SimpleNamespace(adapts=False)

    monkeypatch.setattr(hf_trainer, "attach", attach)
    args = SimpleNamespace(seed=7, output_dir="")
    state = SimpleNamespace(max_steps=1, global_step=0)
    for seed in (3, 0, None):
        callback = hf_trainer.TunerCallback(seed=seed)
        callback.on_train_begin(args, state, None, model=nn.Linear(1, 1), optimizer=object())
    assert seeds == [3, 0, 7]


def test_only_the_process_that_saves_writes_the_hooks_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("transformers")
    from peft_custom import hf_trainer

    written = []
    monkeypatch.setattr(hf_trainer, "save_hooks_state", lambda *a, **k: written.append(a[0]))
    callback = hf_trainer.TunerCallback()
    callback.hooks = SimpleNamespace(adapts=True, state_dict=dict)
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    for saves, expected in ((False, []), (True, [folder])):
        args = SimpleNamespace(should_save=saves, output_dir=str(tmp_path))
        callback.on_save(args, SimpleNamespace(global_step=5), None)
        assert written == expected
