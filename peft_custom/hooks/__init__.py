"""How an adaptive method rides on the optimiser: attached once, driven by every applied step.

    hooks = peft_custom.attach(model, optimizer, total_steps=T)
    hooks.prepare(loader, lambda batch: model(**batch).loss)   # methods that look at data first
    for batch in loader:
        model(**batch).loss.backward()
        optimizer.step()                          # enter_step, before_step, the update, after_step
        optimizer.zero_grad()

One step walks down this ladder and up again; `before_step` is the same moment on every rung:

    optimizer.step()                 torch calls its step hooks before and after the update
      StepDriver                     step_driver.py: only applied steps, only final gradients
        AttachedHooks.before_step    attach.py: the counter t, every tuner of the model in turn
          AdaLoraHooks.before_step   tuners/<method>/hooks.py: a method's `TrainingHooks` (base.py)
            mask                     in the layers: what the next forward pass computes with

Rules every loop can rely on:

* One applied optimiser step is one step t = 0, 1, … of the schedule, however many micro-batches
  made its gradient. The counter is the hooks' own. A step that a GradScaler skips is no step.
* Hooks sit on the innermost `torch.optim.Optimizer`, so they survive `accelerator.prepare` and
  `load_state_dict`. A copy of an optimiser has no hooks: stepping one raises.
* All trainable adapter parameters of `model` belong to that one optimiser. Where several optimisers
  train parts of a model, attach each part to its own. Attaching again starts a new schedule.
* Past `total_steps` training goes on with the schedule's end state (`fraction` stays 1), after a
  warning.
* The loss the model returns stays the task loss: regularisers add their gradient in `before_step`.
"""

from .attach import AttachedHooks, attach
from .base import MicroBatch, TrainingHooks
from .finished import schedule_finished, set_finished, warn_if_unfinished
from .owners import LayerOwner, attached_hooks, refuse_if_attached, register_layer_owner
from .state import load_hooks_state, save_hooks_state, saved_token
from .step_driver import StepDriver, unwrap_optimizer

__all__ = [
    "AttachedHooks",
    "LayerOwner",
    "MicroBatch",
    "StepDriver",
    "TrainingHooks",
    "attach",
    "attached_hooks",
    "load_hooks_state",
    "refuse_if_attached",
    "register_layer_owner",
    "save_hooks_state",
    "saved_token",
    "schedule_finished",
    "set_finished",
    "unwrap_optimizer",
    "warn_if_unfinished",
]
