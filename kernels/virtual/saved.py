"""Saved tensors of a tiered module that do not keep their graph alive."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def detached_saves(active: bool = True) -> AbstractContextManager[Any]:
    """Around a forward: tensors saved for its backward are kept detached; autograd gives them their place back.

    A tiered module's hooks hand most saved tensors on as they are. An operation's own output among them refers to the
    operation, which refers to it, where Python's collector does not see either: should the backward not run to its end,
    for want of memory, all that was saved would stay. (PyTorch's note on saved-tensor hooks warns of it.)
    """
    if not active:
        return nullcontext()
    return torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor)
