"""The ahead-of-time gate: what a compiled configuration must be like. Pure; the worker compiles and reads.

Reason codes of a fault, in the order in which one names the record: ``spills``, ``shared_memory``, ``wrong_unit``,
``missing_unit``, ``missing_instruction``, ``bound``; the detail holds every fault.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vbench.backend import Configuration, Cubin, Effort
from vbench.machine_code import MATRIX, SPILLS, MachineCode, count
from vbench.record import Outcome

#: Compute capability times ten -> largest shared memory of a block, bytes (CUDA C++ Programming Guide, technical
#: specifications by compute capability: 163 KB, 99 KB and 227 KB).
SHARED_LIMIT_BYTES: Mapping[int, int] = {
    80: 166912, 86: 101376, 87: 166912, 89: 101376, 90: 232448, 100: 232448, 103: 232448, 120: 101376,
}  # fmt: skip

#: A declared unit's opcode in SASS.
UNIT_OPCODES: Mapping[str, str] = {
    name: name.upper() for name in ("hgmma", "qgmma", "igmma", "hmma", "qmma", "imma", "ffma")
}

#: Stands for all configurations of a backend where they could not be listed.
UNLISTED = "compile[configurations]"

LIST_DEADLINE_S = 120.0


@dataclass(frozen=True, slots=True)
class Judged:
    """How a configuration fared, as its record says it."""

    outcome: Outcome
    reason: str
    detail: str
    metrics: dict[str, float]


@dataclass(frozen=True, slots=True)
class Planned:
    """A configuration as the plan needs it: it travels from the process that may import the compiler."""

    case: str
    op: str
    effort: Effort


def figures_of(configuration: Configuration, cubin: Cubin, code: MachineCode) -> dict[str, float]:
    """Every figure by name: what is always stored, and what the bounds ask for.

    Raises:
        KeyError: a bound on a figure that nothing gives.
    """
    in_loops = sum(code.loop.values())
    loop_spills = sum(count(code.loop, opcode) for opcode in SPILLS)
    found: dict[str, float] = {
        "registers": code.registers,
        "spill_bytes": code.spill_bytes,
        "spill_bytes_allowed": configuration.spill_bytes_allowed,
        "shared_bytes": code.shared_bytes + cubin.dynamic_shared_bytes,
        "shared_bytes_limit": SHARED_LIMIT_BYTES[configuration.arch],
        "instructions": sum(code.total.values()),
        "loop_instructions": in_loops,
        "loop_spills": loop_spills,
        "loop_spill_share": loop_spills / in_loops if in_loops else 0.0,
        **cubin.figures,
    }
    for name in configuration.bounds:
        where, _, opcode = name.partition(".")
        if opcode and where in ("total", "loop"):
            found[name] = count(code.total if where == "total" else code.loop, opcode)
    unknown = [name for name in configuration.bounds if name not in found]
    if unknown:
        raise KeyError(f"{configuration.case_id}: a bound on {unknown[0]}, which is none of {', '.join(sorted(found))}")
    unit = UNIT_OPCODES.get(configuration.unit)
    if unit is not None:
        found[f"total.{unit}"] = count(code.total, unit)
    return {name: float(value) for name, value in found.items()}


def judge(configuration: Configuration, cubin: Cubin, code: MachineCode) -> Judged:
    """Compare machine code with what its configuration declares and the architecture has.

    Returns:
        PASSED (reason ``spill_allowed`` where the declared allowance was needed), or INVALID with the first fault's
        code.
    """
    if configuration.arch not in SHARED_LIMIT_BYTES:
        detail = f"no limits are known for arch {configuration.arch}; add it to vbench.gate.SHARED_LIMIT_BYTES"
        return Judged(Outcome.INVALID, "unknown_architecture", detail, {})
    figures = figures_of(configuration, cubin, code)
    faults: list[tuple[str, str]] = []
    allowed = configuration.spill_bytes_allowed
    if code.spill_bytes > allowed:
        faults.append(("spills", f"{code.spill_bytes} B of local memory a thread, {allowed} allowed"))
    shared, limit = int(figures["shared_bytes"]), SHARED_LIMIT_BYTES[configuration.arch]
    if shared > limit:
        faults.append(("shared_memory", f"{shared} B of shared memory a block, arch {configuration.arch} has {limit}"))
    if configuration.unit in ("ffma", "none"):
        matrix = sorted({o.partition(".")[0] for o in code.total if o.startswith(MATRIX)})
        if matrix:
            faults.append(("wrong_unit", f"declared unit {configuration.unit}, but the code holds {', '.join(matrix)}"))
    opcode = UNIT_OPCODES.get(configuration.unit)
    if opcode is not None and not count(code.total, opcode):
        faults.append(("missing_unit", f"declared unit {configuration.unit}, but no {opcode} in the code"))
    for wanted in configuration.instructions:
        if not count(code.total, wanted):
            faults.append(("missing_instruction", f"no {wanted} in the code"))
    for name, (least, most) in configuration.bounds.items():
        if not least <= figures[name] <= most:
            wanted = f"at least {least:g}" if math.isinf(most) else f"in [{least:g}, {most:g}]"
            faults.append(("bound", f"{name} is {figures[name]:.4g}, must be {wanted}"))
    if faults:
        return Judged(Outcome.INVALID, faults[0][0], "; ".join(f"{c}: {text}" for c, text in faults), figures)
    if code.spill_bytes:
        detail = f"{code.spill_bytes} B of local memory a thread, {allowed} allowed: {configuration.spill_reason}"
        return Judged(Outcome.PASSED, "spill_allowed", detail, figures)
    return Judged(Outcome.PASSED, "", "", figures)


def in_order(configurations: Sequence[Configuration]) -> dict[str, Configuration]:
    """By case id. Raises ValueError where two have the same: one of them would never be compiled."""
    found: dict[str, Configuration] = {}
    for configuration in configurations:
        if found.setdefault(configuration.case_id, configuration) is not configuration:
            raise ValueError(f"two configurations are called {configuration.case_id}; name what tells them apart")
    return found


def listed(name: str, distribution: str, environment: Mapping[str, str]) -> tuple[Planned, ...]:
    """The configurations of a backend, listed by a child process, since their tables may stand beside compiler code.

    Where that fails, one stands for all of them, so that the worker meets the error and it leaves a record.
    """
    command = [sys.executable, "-m", "vbench.describe", name, distribution, "configurations"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={**os.environ, **environment},
            timeout=LIST_DEADLINE_S,
            check=False,
        )
        body = json.loads(done.stdout.rstrip("\n").rpartition("\n")[2])
        return tuple(Planned(**item) for item in body)
    except (subprocess.TimeoutExpired, json.JSONDecodeError, TypeError):
        return (Planned(UNLISTED, "", "quick"),)


def to_json(configurations: Mapping[str, Configuration]) -> str:
    """What ``listed`` reads."""
    body: list[dict[str, Any]] = [{"case": c, "op": v.op, "effort": v.effort} for c, v in configurations.items()]
    return json.dumps(body)
