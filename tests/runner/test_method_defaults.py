"""The command line's defaults beside those of the libraries: equal, or different on purpose.

Options are read without torch and the libraries' configurations are not, so every default is
written down on both sides. Here is where they are compared.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from pathlib import Path

import pytest
import torch
from support.paths import ROOT

import peft_custom
from examples import program
from examples.cli.groups import OPTION_CLASSES
from examples.methods import pruning
from examples.methods.adalora import AdaLoraOptions, ViLoraOptions
from examples.methods.bim_lora import SAME, BimLoraOptions
from examples.methods.bim_reference import BIMLoRAConfig
from examples.methods.dylora import DyLoraOptions
from examples.methods.lora import LoraOptions
from examples.methods.pruning import PruningOptions
from examples.methods.splopa import SplopaOptions
from examples.methods.splora import SploraOptions
from examples.optimizers.adamw import AdamWOptions
from examples.optimizers.ivon import IvonOptions
from ivon import IVON

FIXED_RANK = {"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
ADALORA = {
    "adalora_target_r": "target_r",
    "adalora_init_r": "init_r",
    "adalora_tinit": "tinit",
    "adalora_tfinal": "tfinal",
    "adalora_delta_t": "deltaT",
    "adalora_orth_reg_weight": "orth_reg_weight",
    "adalora_sensitivity_timing": "sensitivity_timing",
    "lora_alpha": "lora_alpha",
    "lora_dropout": "lora_dropout",
}
PRUNING = {name: name for name in pruning.SAME}
UNRESOLVED = {  # the configuration turns none into what the pruning method has
    "initial_threshold": (None, 1.0),
    "final_threshold": (None, 0.7),
    "mask_scale": (None, 0.0),
    "mask_scores_learning_rate": (None, 0.01),
}
# class of options, class of the configuration, option -> field, and what differs on purpose:
# option -> (the option's default, the field's)
CASES = {
    "lora": (
        LoraOptions,
        peft_custom.LoraConfig,
        {
            **FIXED_RANK,
            "use_rslora": "use_rslora",
            "use_dora": "use_dora",
            "loraplus_lr_ratio": "loraplus_lr_ratio",
            "rank_from": "rank_from",
            "rank_rho": "rho",
            "rank_batches": "rank_batches",
        },
        {"lora_alpha": (16.0, 8)},  # 2·r, as most scripts have it; the field's default is PEFT's
    ),
    "dylora": (
        DyLoraOptions,
        peft_custom.DyLoraConfig,
        {
            **FIXED_RANK,
            "dylora_r_min": "r_min",
            "dylora_mode": "dylora_mode",
            "dylora_dist": "dylora_dist",
            "dylora_dense": "dylora_dense",
            "dylora_train_ranks": "train_ranks",
        },
        {"lora_alpha": (16.0, 8), "dylora_train_ranks": ((), None)},
    ),
    "adalora": (
        AdaLoraOptions,
        peft_custom.AdaLoraConfig,
        ADALORA,
        {"adalora_delta_t": (100, 1)},  # the AdaLoRA authors' scripts; the field's is PEFT's
    ),
    "vilora": (
        ViLoraOptions,
        peft_custom.VILoraConfig,
        {**ADALORA, "vilora_criterion": "criterion"},
        {"adalora_delta_t": (100, 1)},
    ),
    "bim_lora": (
        BimLoraOptions,
        peft_custom.BimLoraConfig,
        {**FIXED_RANK, **{name: name for name in SAME}},
        {},
    ),
    "block_prune": (PruningOptions, peft_custom.BlockPruneConfig, PRUNING, UNRESOLVED),
    "splopa": (
        SplopaOptions,
        peft_custom.SplopaConfig,
        {
            **PRUNING,
            "num_splopa_prototypes": "num_prototypes",
            "splopa_prototype_rank": "prototype_rank",
            "splopa_init_range": "init_range",
            "splopa_pos_weights_shared": "share_position_weights",
            "prototype_learning_rate": "prototype_learning_rate",
        },
        UNRESOLVED,
    ),
    "splora": (
        SploraOptions,
        peft_custom.SploraConfig,
        {**PRUNING, "lora_r": "r", "splora_init_range": "init_range"},
        UNRESOLVED,
    ),
}


@pytest.mark.parametrize("method", CASES)
def test_options_have_the_defaults_of_the_configuration(method: str) -> None:
    options, config, fields, on_purpose = CASES[method]
    ours, theirs = options(), config()
    found = {option: (getattr(ours, option), getattr(theirs, f)) for option, f in fields.items()}
    assert {option: pair for option, pair in found.items() if pair[0] != pair[1]} == on_purpose


def test_adamws_are_torchs() -> None:
    theirs, ours = inspect.signature(torch.optim.AdamW).parameters, AdamWOptions()
    assert (ours.adam_beta1, ours.adam_beta2) == theirs["betas"].default
    assert ours.adam_epsilon == theirs["eps"].default


def test_ivons_are_the_optimisers() -> None:
    theirs, ours = inspect.signature(IVON).parameters, dataclasses.asdict(IvonOptions())
    # a run has its own number of rows, and predicts at the mean unless told otherwise
    own = {"ivon_ess": 0, "ivon_infer_mc_samples": 0}
    assert {name: ours.pop(name) for name in own} == own
    names = {"ivon_train_mc_samples": "mc_samples"}
    pairs = {n: (v, theirs[names.get(n, n.removeprefix("ivon_"))].default) for n, v in ours.items()}
    differing = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    # the ViLoRA authors' scripts; the fields' are those of ivon-opt
    assert differing == {"ivon_weight_decay": (1e-8, 1e-4), "ivon_clip_radius": (1e-3, math.inf)}


def test_the_originals_bim_lora_differs_where_it_says() -> None:
    """Smaller blocks, a network trained half as long at half the rate, weights of the start."""
    theirs, ours = BIMLoRAConfig(), peft_custom.BimLoraConfig()
    shared = {f.name for f in dataclasses.fields(theirs)} & {
        f.name for f in dataclasses.fields(ours)
    }
    differing = {n for n in shared if getattr(theirs, n) != getattr(ours, n)}
    assert differing == {
        "block_size", "collection_steps", "mlp_batch_size", "mlp_epochs", "mlp_lr",
        "num_train_epochs", "target_modules",
    }  # fmt: skip


SWITCHES = sorted((ROOT / "hparams" / "switches").glob("*.yaml"))


@pytest.mark.parametrize("sheet", SWITCHES, ids=lambda path: path.stem)
def test_a_sheet_of_switches_goes_on_top_of_a_script(sheet: Path) -> None:
    """Each turns on what it is named for, and says where its values come from."""
    words = ["--task_name", "mrpc", "--model_name_or_path", "m", "--output_dir", "o"]
    words += ["--config", str(sheet), "--lora_r", "8", "--learning_rate", "4e-4"]
    options = program.parse(words, "run_glue", "", OPTION_CLASSES, "task_name")
    assert options is not None and options.config_file == str(sheet)
    own = dataclasses.asdict(options.method_options)
    plain = dataclasses.asdict(type(options.method_options)())
    assert any(own[name] != plain[name] for name in own if name not in ("lora_r", "lora_alpha"))
    assert sheet.read_text("utf-8").startswith("# ")


def test_there_are_sheets_of_switches() -> None:
    assert len(SWITCHES) == 6
