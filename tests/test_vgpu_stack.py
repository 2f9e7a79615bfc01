"""VGPUStack: the module runs bitwise as before, says where its weights lie, and is itself again after close."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.test_tiered_module import Model, least_bytes, pair, same_gradients, tokens
from vbench.kernels.tiers.budget import Budget, BudgetError
from vbench.kernels.tiers.errors import TierError
from vbench.kernels.tiers.vgpu import VGPUStack, VGPUStackLinear


def classes(module: nn.Module) -> list[type]:
    return [type(part) for part in module.modules()]


def stack_of(
    model: Model, extra: int = 0, pinned: int = 1 << 20, file: int = 0, folder: Path | None = None
) -> VGPUStack:
    return VGPUStack(model, Budget(least_bytes(model) + extra, pinned, 0, file, folder), "cpu")


def test_training_is_bitwise_the_same_and_close_undoes_it() -> None:
    mine, theirs = pair()
    before, parameters = classes(mine), list(mine.parameters())
    with stack_of(mine, 8000) as stack:
        # The head is tied to the embedding; attention's projections are no plain Linear.
        assert len(stack.linears) == 2 * len(mine.blocks) + 1
        assert all(type(linear) is VGPUStackLinear for linear in stack.linears)
        for model in (mine, theirs):
            model(tokens()).square().mean().backward()
        assert same_gradients(mine, theirs) == []
        assert list(mine.state_dict()) == list(theirs.state_dict())
        homes = {stack.home_of(linear) for linear in stack.linears}
        assert homes <= {"gpu", "host"} and stack.levels()["file"] == 0
        assert stack.levels()["gpu"] > 0 and stack.levels()["host"] > 0
        assert stack.stats()["miss"] > 0
    stack.close()
    assert stack.closed and classes(mine) == before
    assert all(a is b for a, b in zip(mine.parameters(), parameters, strict=True))
    assert not any("_vgpu_stack" in part.__dict__ for part in mine.modules())
    assert torch.equal(mine(tokens()), theirs(tokens()))


def test_weights_may_lie_in_files(tmp_path: Path) -> None:
    mine, theirs = pair()
    mine.requires_grad_(False)
    with stack_of(mine, pinned=16 << 10, file=1 << 20, folder=tmp_path) as stack, torch.no_grad():
        homes = [stack.home_of(linear) for linear in stack.linears]
        assert homes == [linear.home for linear in stack.linears]
        assert "file" in homes and stack.levels()["file"] > 0
        assert torch.equal(mine(tokens()), theirs(tokens()))
        with pytest.raises(TierError, match="close"):
            copy.deepcopy(stack.linears[homes.index("file")])
    assert list(tmp_path.glob("*.tensor")) == []


def test_a_copy_of_a_layer_is_a_plain_one() -> None:
    mine, _ = pair()
    with stack_of(mine) as stack:
        linear = stack.linears[0]
        copied = copy.deepcopy(linear)
        assert type(copied) is nn.Linear and torch.equal(copied.weight, linear.weight)
        assert copied.weight.data_ptr() != linear.weight.data_ptr()


def test_refusals_leave_the_module_as_it_was() -> None:
    mine, theirs = pair()
    before = classes(mine)
    with pytest.raises(BudgetError, match="short"):
        VGPUStack(mine, Budget(1024, 1 << 20, 0), "cpu")
    assert classes(mine) == before and torch.equal(mine(tokens()), theirs(tokens()))
    with stack_of(mine), pytest.raises(TierError, match="tiered already"):
        stack_of(mine)
    assert classes(mine) == before
    with pytest.raises(TierError, match="made by VGPUStack"):
        VGPUStackLinear(3, 4)


def test_a_layer_that_outlives_its_stack_refuses_to_run() -> None:
    mine, _ = pair()
    stack = stack_of(mine)
    linear = stack.linears[0]
    stack.linears.remove(linear)  # so that close does not give its class back
    stack.close()
    with pytest.raises(TierError, match="closed"):
        linear(torch.zeros(1, linear.in_features))
