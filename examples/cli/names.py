"""The originals' names for options: those with a meaning here, and those without."""

from __future__ import annotations

# Names that the originals give to one and the same thing.
ALIASES = {
    "max_seq_length": "max_length",
    "warmup_steps": "num_warmup_steps",
    "checkpointing_steps": "save_steps",
    "max_steps": "max_train_steps",
    "evaluation_strategy": "eval_strategy",
    "label_smoothing": "label_smoothing_factor",
    "lora_type": "method",
    "target_modules": "lora_modules",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "epochs": "num_train_epochs",
    "lr": "learning_rate",
    "clip_grad": "max_grad_norm",
    "torch_compile": "compile",
    "target_rank": "adalora_target_r",
    "init_warmup": "adalora_tinit",
    "mask_interval": "adalora_delta_t",
    "reg_orth_coef": "adalora_orth_reg_weight",
    "criterion": "vilora_criterion",
    "text_column_name": "text_column",
    "text_column_names": "text_column",
    "label_column_name": "label_column",
}
# Names that the originals of several methods have, each with its own meaning: of a method that has
# no option of this name it is another one.
BY_METHOD = {"final_warmup": "adalora_tfinal"}
# Switches of the originals that stand for a value of another option, unless that one is given too.
SWITCHES = {
    "bf16": ("mixed_precision", "bf16"),
    "fp16": ("mixed_precision", "fp16"),
    "apply_lora": ("method", "lora"),
    "with_tracking": ("report_to", "all"),
    "use_custom_lr_schedule": ("lr_scheduler_type", "clr"),
    "use_ivon": ("optimizer", "ivon"),
    "eval_only": ("do_train", "false"),
}
# Options of the originals that have no meaning here, and why.
GONE = {
    "use_slow_tokenizer": "every tokenizer is the fast one",
    "use_fast_tokenizer": "every tokenizer is the fast one",
    "trust_remote_code": "no code is ever loaded from a checkpoint",
    "use_deterministic_algorithms": "runs on one device repeat bit for bit as they are",
    "push_to_hub": "upload the run's adapter folder with `hf upload` when you have looked at it",
    "hub_model_id": "upload the run's adapter folder with `hf upload`",
    "hub_token": "log in with `hf auth login`",
}
