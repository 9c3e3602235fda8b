"""What the Hugging Face `Trainer` reads off a model's `forward`, told of the wrapped model's.

It keeps the columns of a dataset that the signature names, finds the labels there by the class, and
asks whether the loss wants `num_items_in_batch`.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import types
from typing import TypeVar

from torch import nn

ItemsT = TypeVar("ItemsT", bound=type[nn.Module])
ITEMS = "num_items_in_batch"
NAMELESS = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
# Losses of Transformers that take a mean over rows whatever the number of items they are given.
ROW_LOSSES = ("ForSequenceClassification", "ForQuestionAnswering")


@functools.cache
def like_base(wrapper: ItemsT, base: type[nn.Module]) -> ItemsT:
    """`wrapper`, or a subclass of it whose `forward` has the signature of `base`'s.

    Nothing else changes: the code of `forward` is the wrapper's own. A base that names none of its
    inputs (`*args, **kwargs`) leaves the wrapper's signature as it is.
    """
    signature = inspect.signature(base.forward)
    inputs = list(signature.parameters.values())[1:]  # without self
    if "_like" in wrapper.__dict__ or all(p.kind in NAMELESS for p in inputs):
        return wrapper
    own = wrapper.forward
    forward = types.FunctionType(
        own.__code__, own.__globals__, own.__name__, own.__defaults__, own.__closure__
    )
    functools.update_wrapper(forward, own)
    del forward.__wrapped__  # `inspect.signature` would follow it
    forward.__kwdefaults__ = own.__kwdefaults__
    forward.__signature__ = signature
    # the Trainer knows a model of answer spans by its class's name
    spans = "QuestionAnswering" in base.__name__ and "QuestionAnswering" not in wrapper.__name__
    name = f"{wrapper.__name__}ForQuestionAnswering" if spans else wrapper.__name__
    inside = {"forward": forward, "_like": base, "__module__": wrapper.__module__,
              "__doc__": wrapper.__doc__}  # fmt: skip
    return type(wrapper)(name, (wrapper,), inside)


def counts_items(model: nn.Module) -> bool:
    """Whether the model's loss is seen to be divided by `num_items_in_batch`.

    Its `forward` names that, or hands its `**kwargs` on to Transformers' `self.loss_function`. What
    cannot be seen (no source, a forward that delegates, a class whose loss the Trainer does not
    know and counts the wrong items for, such as `GPT2LMHeadModel`) counts as no.
    """
    kind = getattr(model, "loss_type", None)  # of a model of Transformers: which loss it has
    if kind in ROW_LOSSES:
        return False
    forward = inspect.unwrap(type(model).forward)
    if ITEMS in inspect.signature(forward).parameters:
        return True
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    return any(
        isinstance(node, ast.Constant) and node.value == ITEMS
        or kind is not None and isinstance(node, ast.Call) and _hands_on(node)
        for node in ast.walk(tree)
    )  # fmt: skip


def _hands_on(call: ast.Call) -> bool:
    to_loss = isinstance(call.func, ast.Attribute) and call.func.attr == "loss_function"
    return to_loss and any(keyword.arg is None for keyword in call.keywords)  # **kwargs
