"""What ``virtual-blackwell estimate`` says: gathered once, printed as text or JSON."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vbench.errors import UsageError
from vbench.kernels.virtual.estimate import (
    Advice,
    Memory,
    advise,
    assumptions,
    by_saving,
    estimator,
    fp4_advice,
    largest_batch,
    memory_json,
    step_assumptions,
)
from vbench.kernels.virtual.hardware import Card, find_card
from vbench.kernels.virtual.program import Workload
from vbench.kernels.virtual.shapes import PRESETS, find_shape
from vbench.kernels.virtual.tierplan import HOST_OPTIMIZER_BYTES_S, TierPlan, plan_tiers, tier_advice
from vbench.kernels.virtual.units import parse_bytes, show_bytes

PARTS = ("parameters", "codes", "gradients", "optimizer", "activations", "logits", "workspace", "context")


@dataclass(frozen=True, slots=True)
class Report:
    """An estimate and what follows from it; ``plan`` is absent where the model's blocks are not known."""

    model: str
    parameters: int
    work: Workload
    optimizer: str
    card: Card
    gpus: int
    memory: Memory
    batch: int
    plan: TierPlan | None
    advice: Sequence[Advice]
    assumptions: Sequence[str]

    @property
    def fits(self) -> bool:
        """Whether one step fits the card without tiers."""
        return self.memory.total <= self.card.memory_bytes

    def json(self) -> dict[str, Any]:
        """Everything, bytes and seconds as numbers."""
        plan = self.plan
        return {
            "model": self.model,
            "parameters": self.parameters,
            "workload": asdict(self.work),
            "optimizer": self.optimizer,
            "card": asdict(self.card),
            "bytes": memory_json(self.memory),
            "fits": self.fits,
            "largest_batch": self.batch,
            "plan": None if plan is None else {
                **asdict(plan), "step_s": plan.step_s, "overhead": plan.overhead, "bound_by": plan.bound_by,
                "gpus": self.gpus,
            },
            "advice": [asdict(a) for a in self.advice],
            "assumptions": list(self.assumptions),
        }  # fmt: skip

    def text(self) -> str:
        """For people."""
        memory, card = self.memory, self.card
        verdict = "fits" if self.fits else f"does not fit, by {show_bytes(memory.total - card.memory_bytes)}"
        lines = [
            f"{self.model}: {self.parameters / 1e6:.2f} M parameters; one training step, largest at: {memory.peak_at}",
            *(
                f"  {part:<12} {show_bytes(getattr(memory, part)):>12}"
                for part in PARTS
                if part != "codes" or memory.codes
            ),
            f"  {'total':<12} {show_bytes(memory.total):>12}   on {card.name} "
            f"({show_bytes(card.memory_bytes)}): {verdict}",
            f"largest batch of {self.work.sequence} tokens without tiers: {self.batch}",
            *(self._plan_lines(self.plan) if self.plan is not None else ()),
            "advice, most saving first:",
        ]
        for item in self.advice:
            end = "fits" if item.fits else "does not fit"
            lines.append(
                f"  {item.change:<24} saves {show_bytes(item.saves_bytes):>10} -> {show_bytes(item.total_bytes)}, "
                f"{end}; cost: {item.cost}"
            )
        return "\n".join([*lines, "assumptions:", *(f"  {line}" for line in self.assumptions)])

    def _plan_lines(self, plan: TierPlan) -> list[str]:
        if not plan.feasible:
            return [f"no tier plan: {plan.why} (short by {show_bytes(plan.short_bytes)})"]
        lines = ["tier plan:"]
        for level in plan.levels:
            lines.append(
                f"  {level.name:<12} {show_bytes(level.used_bytes):>12} of {show_bytes(level.capacity_bytes)}: "
                f"parameters {show_bytes(level.parameters)}, gradients {show_bytes(level.gradients)}, optimizer "
                f"{show_bytes(level.optimizer)}, working {show_bytes(level.working)}"
            )
        lines.append(
            f"  a step takes at least {plan.step_s:.3g} s, bound by {plan.bound_by} "
            f"(arithmetic {plan.compute_s:.3g} s, "
            f"host link {plan.link_s:.3g} s, disk {plan.disk_s:.3g} s, host optimizer {plan.host_s:.3g} s)"
        )
        if plan.hidden_tokens > self.work.tokens:
            lines.append(
                f"  the link hides behind arithmetic from {plan.hidden_tokens} tokens a step on, "
                f"not at {self.work.tokens}"
            )
        return lines


def report(arguments: argparse.Namespace) -> Report:
    """Estimate what the command line names.

    Raises:
        UsageError, DataError, Unsupported: bad input.
    """
    card = find_card(arguments.gpu)
    pinned, file = parse_bytes(arguments.pinned, "--pinned"), parse_bytes(arguments.file, "--file")
    if arguments.implementation == "transformers":
        return _of_transformers(arguments, card)
    shape = find_shape(arguments.model)
    if arguments.tied is not None:
        shape = replace(shape, tied=arguments.tied)
    work, optimizer = _workload(arguments, shape.context), arguments.optimizer
    of = estimator(shape, card)
    memory = of(work, optimizer)
    plan = plan_tiers(shape, work, memory, card, gpus=arguments.gpus, pinned_bytes=pinned, file_bytes=file)
    advice = by_saving(
        [
            *advise(of, work, optimizer, card),
            fp4_advice(shape, work, optimizer, card),
            *tier_advice(plan, memory, card),
        ]
    )
    known = [
        *assumptions(shape, work, optimizer, card),
        f"plan: --pinned {arguments.pinned}, --file {arguments.file}; host optimizer at "
        f"{HOST_OPTIMIZER_BYTES_S / 1e9:g} GB/s assumed; times are lower bounds with all copies overlapped",
    ]
    batch = largest_batch(of, work, optimizer, card)
    return Report(
        shape.name, shape.parameters, work, optimizer, card, arguments.gpus, memory, batch, plan, advice, known
    )  # fmt: skip


def _of_transformers(arguments: argparse.Namespace, card: Card) -> Report:
    from vbench.kernels.virtual.hf import HfModel

    if arguments.model in PRESETS:
        raise UsageError(f"--implementation transformers takes a config.json, not the preset {arguments.model}")
    if arguments.tied is not None:
        raise UsageError("--tied, --no-tied: with --implementation transformers the config.json says it")
    if arguments.use_fp4:
        raise UsageError("--use-fp4: this package's models train so, not those of --implementation transformers")
    if arguments.gpus != 1:
        raise UsageError("--gpus: no tier plan is made with --implementation transformers")
    model = HfModel(Path(arguments.model))
    work, optimizer = _workload(arguments, model.context), arguments.optimizer
    of = model.estimator(card)
    memory = of(work, optimizer)
    known = [
        f"model: {model.parameters:,} parameters; the code of transformers {model.version}, traced with fake "
        "tensors on the CPU, whose composite operations (RMSNorm) are counted where a GPU has one kernel",
        "activations: logits and loss are among them; memory inside kernels is not seen",
        *step_assumptions(work, optimizer, card),
    ]
    batch = largest_batch(of, work, optimizer, card)
    advice = by_saving(advise(of, work, optimizer, card))
    return Report(
        str(model.path), model.parameters, work, optimizer, card, 1, memory, batch, None, advice, known
    )  # fmt: skip


def _workload(arguments: argparse.Namespace, context: int) -> Workload:
    sequence = arguments.seq if arguments.seq is not None else min(context, 1024)
    return Workload(
        arguments.batch, sequence, arguments.dtype, arguments.attention, arguments.checkpointing, arguments.dropout,
        fp4=arguments.use_fp4,
    )  # fmt: skip
