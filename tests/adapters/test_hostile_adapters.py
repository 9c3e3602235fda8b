"""Adapter folders of strangers: each fault is one error that names file and field, at once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from peft_custom import (
    AdaLoraConfig,
    BimLoraConfig,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
)
from peft_custom.patterns import matches, matches_end
from peft_custom.state_files import read_tree
from peft_custom.tuners.targets import layer_index

pytestmark = pytest.mark.timeout(120)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))


def saved(folder: Path, config: PeftConfig | None = None, **changed: object) -> Path:
    """An adapter's folder whose configuration then says something else."""
    config = LoraConfig(r=2, target_modules=["0", "2"]) if config is None else config
    get_peft_model(model(), config).save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changed}))
    return folder


def refused(folder: Path, *words: str) -> None:
    """The load raises one ValueError with these words, and leaves the base as it was."""
    base = model()
    before = [(name, type(m)) for name, m in base.named_modules()]
    with pytest.raises(ValueError) as caught:
        PeftModel.from_pretrained(base, folder)
    for word in (*words, str(folder)):
        assert word in str(caught.value)
    assert before == [(name, type(m)) for name, m in base.named_modules()]
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize(
    "changed",
    [
        {"lora_alpha": "16"},
        {"lora_alpha": float("inf")},
        {"r": 2.5},
        {"r": "2"},
        {"r": True},
        {"r": None},
        {"rank_pattern": {"0": "2"}},
        {"rank_pattern": {"(": 2}},
        {"alpha_pattern": {"(": 2}},
        {"alpha_pattern": [1]},
        {"target_modules": {"0": 1}},
        {"target_modules": [0]},
        {"target_modules": "(0"},
        {"exclude_modules": "(0"},
        {"layers_to_transform": [0], "layers_pattern": ["("]},
        {"layers_to_transform": "0"},
        {"lora_dropout": "0.1"},
        {"bias": 3},
        {"modules_to_save": 7},
        {"fan_in_fan_out": "yes"},
    ],
    ids=str,
)
def test_a_field_of_the_wrong_type_or_value_is_named(changed: dict, tmp_path: Path) -> None:
    refused(saved(tmp_path / "a", **changed), next(reversed(changed)))


@pytest.mark.parametrize(
    "pattern",
    [r"([a-z]+)+\!", "([0-9]|[0-9])+!", "(.*)*.*.*.*.*.*!", "(" * 3000 + "0" + ")" * 3000],
)
@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern"])
def test_a_pattern_that_never_ends_ends(field: str, pattern: str, tmp_path: Path) -> None:
    value = {pattern: 2} if field == "rank_pattern" else pattern
    folder = saved(tmp_path / "a", **{field: value})
    base = nn.Sequential()
    base.add_module("a" * 60, nn.Linear(3, 3))
    with pytest.raises(ValueError):
        PeftModel.from_pretrained(base, folder)


@pytest.mark.parametrize("config", [
    LoraConfig(r=2, target_modules=["0", "2"]),
    AdaLoraConfig(init_r=2, target_r=2, target_modules=["0", "2"]),
    BimLoraConfig(r=2, target_modules=["0", "2"], mask_init="constant"),
], ids=["lora", "adalora", "bim_lora"])  # fmt: skip
def test_what_the_file_cannot_hold_is_not_built(config: PeftConfig, tmp_path: Path) -> None:
    huge = 10**13  # no machine could hold it
    name = "init_r" if isinstance(config, AdaLoraConfig) else "r"
    refused(saved(tmp_path / "a", config, **{name: huge}), f"{name}={huge}")


def test_a_huge_rank_by_pattern_and_a_second_adapter_are_not_built(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", rank_pattern={"0": 10**13})
    refused(folder, "rank_pattern")
    two = get_peft_model(model(), LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="cannot hold"):
        two.load_adapter(folder, "second")
    assert list(two.peft_config) == ["default"]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 3000 + "1" + "}" * 3000, "[]", "3",
                                  '{"r": ', "\x00"], ids=range(6))  # fmt: skip
def test_a_configuration_that_is_no_object_is_named(text: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    (folder / "adapter_config.json").write_text(text)
    refused(folder, "adapter_config.json")
    config = saved(tmp_path / "b")
    (config / "adapter_config.json").write_bytes(b"\xff\xfe{}")
    refused(config, "adapter_config.json")


@pytest.mark.parametrize("field", ["auto_mapping", "unheard_of"])
def test_nesting_that_python_cannot_copy_is_refused(field: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    text = (folder / "adapter_config.json").read_text().rstrip().removesuffix("}")
    deep = '{"a":' * 800 + "1" + "}" * 800
    text = "".join(line for line in text.splitlines() if field not in line)
    (folder / "adapter_config.json").write_text(f'{text}, "{field}": {deep}}}')
    refused(folder, "adapter_config.json")


@pytest.mark.parametrize("keep", [0, 4, 30, -8])
def test_cut_weights_are_named_and_leave_the_base_alone(keep: int, tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:keep])
    refused(folder, "adapter_model.safetensors")


def test_missing_tensors_leave_the_base_alone(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a")
    save_file({"x": torch.ones(2)}, folder / "adapter_model.safetensors")
    refused(folder, "missing", "unknown")


def test_deep_json_in_a_state_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    save_file({"x": torch.ones(1)}, path, metadata={"tree": "[" * 100_000 + "]" * 100_000})
    with pytest.raises(ValueError, match=re.escape(str(path))):
        read_tree(path)


def test_a_features_file_is_neither_saved_nor_obeyed(tmp_path: Path) -> None:
    here = str(tmp_path / "features.safetensors")
    config = BimLoraConfig(r=2, target_modules=["0"], mask_init="constant", features_file=here)
    folder = saved(tmp_path / "a", config)
    assert "features_file" not in json.loads((folder / "adapter_config.json").read_text())
    folder = saved(tmp_path / "b", config, features_file=here)
    assert PeftConfig.from_pretrained(folder).features_file is None
    assert config.features_file == here


def test_null_for_an_empty_default_is_that_default(tmp_path: Path) -> None:
    folder = saved(tmp_path / "a", rank_pattern=None, loftq_config=None, lora_dropout=None)
    config = PeftConfig.from_pretrained(folder)
    assert (config.rank_pattern, config.loftq_config, config.lora_dropout) == ({}, {}, 0.0)


# --- patterns ------------------------------------------------------------------------------------

ATOMS = ["a", "b", r"\.", ".", "[ab]", "[^a.]", r"\d", r"\D", r"\w", "[0-9a]", "(ab|b)", "(a|a)",
         "(?:a*b)", "(a(b|1)+)"]  # fmt: skip
ZERO_WIDTH = [r"\b", r"\B", "(?=a)", "(?!b)", "(?<=a)", "(?<!b)", "^", "$"]
QUANTIFIERS = ["", "", "*", "+", "?", "{2}", "{1,3}", "*?", "+?", "??", "{0}", "{2,}"]
parts = st.one_of(
    st.tuples(st.sampled_from(ATOMS), st.sampled_from(QUANTIFIERS)).map("".join),
    st.sampled_from(ZERO_WIDTH),
)
patterns = st.lists(parts, max_size=5).map("".join)


@given(
    st.lists(patterns, min_size=1, max_size=3),
    st.text("ab.1B_", min_size=1, max_size=7),
    st.booleans(),
)
def test_patterns_match_as_those_of_python(branches: list[str], name: str, ignore: bool) -> None:
    pattern = ("(?i)" if ignore else "") + "|".join(branches)
    assert matches(pattern, name) == (re.fullmatch(pattern, name) is not None)
    if not ignore:
        expected = re.fullmatch(rf"(.*\.)?({pattern})", name)
        assert matches_end(pattern, name) == (expected is not None)


NAMES = [f"model.layers.{i}.self_attn.{k}_proj" for i in (0, 1, 12) for k in "qkvo"]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        (r".*\.(q|v)_proj", 6),
        (r"(?:.*?(?:language|model).*?(?:self_attn|mlp).*?(?:q_proj|k_proj).*?)"
         r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp)\.(?:up_proj))", 6),
        (r".*\.layers\.([0-9]|1[0-1])\..*(?<!o)_proj", 6),
        (r"(?:[a-z_0-9]+\.)*v_proj", 3),
        (r"^model\.layers\.(?!0)\d+\.self_attn\.[qv]_proj$", 4),
    ],
)  # fmt: skip
def test_patterns_that_people_write(pattern: str, count: int) -> None:
    assert sum(matches(pattern, name) for name in NAMES) == count


@pytest.mark.parametrize("pattern", [r"(a)\1", r"(?P<x>a)(?P=x)"])
def test_references_back_are_refused_in_words(pattern: str) -> None:
    with pytest.raises(ValueError, match="refers back"):
        matches(pattern, "aa")


def test_the_outer_layer_number_counts() -> None:
    name = "model.layers.3.experts.7.up"
    assert layer_index(name, []) == 3
    assert layer_index(name, ["experts"]) == 7
    assert layer_index(name, ["h|layers"]) == 3
    assert layer_index("model.norm", []) is None
