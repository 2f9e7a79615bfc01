"""Where a training step's bytes go when one GPU is too small, and what the links make of it. Standard library only.

The rules are arithmetic, not promises: a step cannot take less than its arithmetic, nor less than each link's bytes at
the link's rate. With copies perfectly hidden it takes the largest of these; a plan says which one that is.

What is moved out first is what is touched least: optimizer states once a step, gradients once, parameters twice
(forward and backward). States outside the GPU are updated by the host's processor, so that they do not cross the link:
gradients go out, updated parameters come back (Ren et al. 2021, ZeRO-Offload, arXiv 2101.06840, section 4).
"""

from __future__ import annotations

from dataclasses import dataclass

from vbench.errors import UsageError
from vbench.kernels.virtual.estimate import Advice, Memory
from vbench.kernels.virtual.hardware import Card
from vbench.kernels.virtual.program import Workload
from vbench.kernels.virtual.shapes import ModelShape

#: Host processor's Adam, assumed: bytes of parameter, gradient and states it reads and writes each second.
HOST_OPTIMIZER_BYTES_S = 30e9


@dataclass(frozen=True, slots=True)
class Level:
    """One level and what of the step lies there, in bytes."""

    name: str
    capacity_bytes: int
    parameters: int
    gradients: int
    optimizer: int
    working: int

    @property
    def used_bytes(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.working


@dataclass(frozen=True, slots=True)
class TierPlan:
    """Levels from fastest to slowest, and seconds of one step.

    Args:
        levels: with what lies in each.
        compute_s: arithmetic at the card's rate, checkpointing's second forward included.
        to_gpu_bytes, from_gpu_bytes: over the host link, each way.
        link_s: the larger direction at the link's rate.
        disk_s: file bytes at the disk's rate, read and written.
        host_s: the host's optimizer.
        hidden_tokens: tokens a step needs for its arithmetic to cover the link; 0 where nothing is streamed.
        feasible: False if it fits nowhere; ``short_bytes`` then says by how much, ``why`` which level.
    """

    levels: tuple[Level, ...]
    compute_s: float
    to_gpu_bytes: int
    from_gpu_bytes: int
    link_s: float
    disk_s: float
    host_s: float
    hidden_tokens: int
    feasible: bool
    short_bytes: int
    why: str

    @property
    def step_s(self) -> float:
        """Lower bound of a step, all copies and the host's work perfectly overlapped."""
        return max(self.compute_s, self.link_s, self.disk_s, self.host_s)

    @property
    def overhead(self) -> float:
        """``step_s`` over the arithmetic alone, less 1."""
        return self.step_s / self.compute_s - 1

    @property
    def bound_by(self) -> str:
        """What the step waits for."""
        parts = {
            "arithmetic": self.compute_s, "host link": self.link_s, "disk": self.disk_s, "host optimizer": self.host_s
        }  # fmt: skip
        return max(parts, key=lambda name: parts[name])


def plan_tiers(
    shape: ModelShape, work: Workload, memory: Memory, card: Card, *, gpus: int, pinned_bytes: int, file_bytes: int
) -> TierPlan:
    """Place a step on ``gpus`` cards, pinned host memory and files.

    Two cards split the blocks between them: each holds half of parameters, gradients and states, and, since both halves
    of a batch's activations exist until its backward, half of the working memory of its blocks; context on both.

    Args:
        memory: of the step, as ``estimate`` gives it.
        gpus: 1 or 2.

    Raises:
        UsageError: another number of GPUs.
    """
    if gpus not in (1, 2):
        raise UsageError(f"--gpus {gpus}: a plan is made for 1 or 2")
    p = shape.parameters * work.parameter_bytes
    left = {"parameters": p, "gradients": p, "optimizer": memory.optimizer}
    largest_unit = max(shape.block_parameters, shape.vocabulary * shape.width) * work.parameter_bytes
    capacity = gpus * card.memory_bytes
    if memory.total + (gpus - 1) * memory.context <= capacity:
        # Nothing moves: parts that never live at one time share their room, so that what the peak takes decides.
        needs, slots = max(0, memory.total + (gpus - 1) * memory.context - sum(left.values())), 0
    else:
        # With anything streamed, two units' parameters and gradients need room beside the working memory.
        needs, slots = memory.working + (gpus - 1) * memory.context, gpus * 4 * largest_unit
    room = max(0, capacity - needs - slots)
    if needs + slots > capacity:
        return _infeasible(shape, work, card, gpus, needs + slots, capacity)
    here = {}
    for kind in ("parameters", "gradients", "optimizer"):
        here[kind] = min(left[kind], room)
        room -= here[kind]
        left[kind] -= here[kind]
    levels = [Level("gpu" if gpus == 1 else "2 gpus", capacity, here["parameters"], here["gradients"],
                    here["optimizer"], needs + slots)]  # fmt: skip
    for name, size in (("pinned host", pinned_bytes), ("file", file_bytes)):
        room, there = size, {}
        for kind in ("parameters", "gradients", "optimizer"):
            there[kind] = min(left[kind], room)
            room -= there[kind]
            left[kind] -= there[kind]
        levels.append(Level(name, size, there["parameters"], there["gradients"], there["optimizer"], 0))
    short = sum(left.values())
    streamed = p - here["parameters"]
    out_grads = p - here["gradients"]
    # The host updates the share of parameters whose states it has; those that live on the GPU come back over the link.
    host_share = 1 - here["optimizer"] / memory.optimizer if memory.optimizer else out_grads / p
    updated = max(0, int(host_share * p) - streamed)
    to_gpu, from_gpu = 2 * streamed + updated, max(out_grads, int(host_share * p))
    file_level = levels[-1]
    # States and gradients in a file are read and written once a step, parameters read twice and written once.
    disk = 3 * file_level.parameters + 2 * file_level.gradients + 2 * file_level.optimizer
    # Adam reads and writes parameter and states, and reads the gradient.
    host = int(host_share * (2 * p + p + 2 * memory.optimizer))
    compute_s = step_flops(shape, work) / (gpus * _rate(work, card))
    link_s = max(to_gpu, from_gpu) / card.link_bytes_s / gpus
    tokens = int(work.tokens * link_s / compute_s) if to_gpu or from_gpu else 0
    return TierPlan(
        tuple(levels), compute_s, to_gpu, from_gpu, link_s, disk / card.disk_bytes_s, host / HOST_OPTIMIZER_BYTES_S,
        tokens, short == 0, short,
        "" if short == 0 else "all levels together are too small: raise --pinned or --file",
    )  # fmt: skip


def step_flops(shape: ModelShape, work: Workload) -> int:
    """Floating-point operations of forward and backward: 3 forwards, 4 with every block run again."""
    return (4 if work.checkpointing else 3) * work.tokens * shape.flops_per_token(work.sequence)


def _rate(work: Workload, card: Card) -> float:
    return card.flops["fp32" if work.dtype == "fp32" else "16bit"]


def _infeasible(shape: ModelShape, work: Workload, card: Card, gpus: int, needs: int, capacity: int) -> TierPlan:
    compute_s = step_flops(shape, work) / (gpus * _rate(work, card))
    return TierPlan(
        (), compute_s, 0, 0, 0.0, 0.0, 0.0, 0, False, needs - capacity,
        "activations and slots for streamed weights must be on the GPU: lower --batch or --seq, or add --checkpointing",
    )  # fmt: skip


def tier_advice(plan: TierPlan, memory: Memory, card: Card) -> list[Advice]:
    """What tiers would do, as advice; empty where the step fits without them, or not with them."""
    if not plan.feasible or memory.total <= card.memory_bytes:
        return []
    cost = f"a step takes at least {1 + plan.overhead:.2f} x its arithmetic, bound by {plan.bound_by}"
    used = plan.levels[0].used_bytes
    return [Advice(f"tiers ({plan.levels[0].name} -> host -> file)", memory.total - used, used, True, cost)]
