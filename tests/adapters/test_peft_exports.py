"""What `peft_custom` hands out: every method's names, and the import paths people know."""

import importlib
import pkgutil

import pytest

import peft_custom
from peft_custom import tuners
from peft_custom.tuners.base import TUNERS

METHODS = [found.name for found in pkgutil.iter_modules(tuners.__path__) if found.ispkg]


@pytest.mark.parametrize("method", METHODS)
def test_every_methods_package_is_handed_on(method: str) -> None:
    package = importlib.import_module(f"peft_custom.tuners.{method}")
    missing = set(package.__all__) - set(peft_custom.__all__)
    assert not missing, f"add an import line to peft_custom/__init__.py for {missing}"
    for name in package.__all__:
        assert getattr(peft_custom, name) is getattr(package, name)


def test_every_registered_methods_config_is_exported() -> None:
    own = [t for t in TUNERS.values() if t.__module__.startswith("peft_custom.")]
    assert len(own) >= len(METHODS)
    for tuner in own:
        for exported in (tuner, tuner.config_class):
            assert exported.__name__ in peft_custom.__all__
            assert getattr(peft_custom, exported.__name__) is exported


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        ("tasks", "task_models", "PeftModelForSequenceClassification"),
        ("integrations", "hf_trainer", "TunerCallback"),
        ("step_driver", "hooks.step_driver", "unwrap_optimizer"),
        ("hook_files", "hooks.state", "load_hooks_state"),
        ("hooks", "hooks.attach", "attach"),
        ("config", "files", "find_file"),
    ],
)
def test_former_import_paths_lead_to_the_same_objects(old: str, new: str, name: str) -> None:
    former = importlib.import_module(f"peft_custom.{old}")
    assert getattr(former, name) is getattr(importlib.import_module(f"peft_custom.{new}"), name)
