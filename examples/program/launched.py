"""What `accelerate launch` asks for, read from the environment that it sets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from examples.cli.groups import TrainingOptions
from examples.errors import OptionError

FSDP = "ACCELERATE_USE_FSDP"
REFUSED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "accelerate's parallelism_config",
}
# What FSDP2 leaves to others: variable -> what to do instead.
LEFT_OUT = {
    "FSDP_OFFLOAD_PARAMS": "weights stay on their device: leave --fsdp_offload_params out",
    "FSDP_ACTIVATION_CHECKPOINTING": "give the program --gradient_checkpointing instead of "
    "--fsdp_activation_checkpointing",
}


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").strip().lower() in ("true", "1", "yes", "on")


def wants_sharding() -> bool:
    """Whether weights are to be sharded over the processes, with FSDP2."""
    return _is_on(FSDP) and int(os.environ.get("WORLD_SIZE", "1")) > 1


def frees_layers() -> bool:
    """Whether a layer's weights are let go between its forward and its backward pass."""
    asked = os.environ.get("FSDP_RESHARD_AFTER_FORWARD", "true").strip().lower()
    return asked not in ("false", "0", "no", "off", "shard_grad_op", "no_reshard")


def check_launch(options: TrainingOptions) -> None:
    """Raises OptionError where the launcher was told what is not supported."""
    for variable, name in REFUSED.items():
        if _is_on(variable):
            raise OptionError(
                f"accelerate launch: {name} is not supported; launch with DDP (--multi_gpu) or "
                "FSDP2 (--use_fsdp --fsdp_version 2)"
            )
    if not _is_on(FSDP):
        return
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise OptionError("accelerate launch: FSDP version 1 is not supported: --fsdp_version 2")
    for variable, instead in LEFT_OUT.items():
        if _is_on(variable):
            raise OptionError(f"FSDP2: {instead}")
    if options.mixed_precision == "fp16":
        raise OptionError("--mixed_precision fp16: not with FSDP2; use bf16 or no")
    if options.compile:
        raise OptionError("--compile: not with FSDP2; leave one of them out")


@contextmanager
def joined_as_ddp() -> Iterator[None]:
    """Within it accelerate joins the processes without sharding: the trainer does that itself."""
    asked = os.environ.pop(FSDP, None)
    try:
        yield
    finally:
        if asked is not None:
            os.environ[FSDP] = asked
