"""Reads a cubin: registers, local and shared memory, and which instructions it holds, in all and inside its loops.

Needs NVIDIA's ``cuobjdump`` and no GPU: Triton's wheel carries one, a CUDA toolkit has it on the path.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from vbench.errors import DataError

#: Warp-group and warp matrix instructions in SASS, by operand type: 16-bit floats, 8-bit floats, integers, fp64.
MATRIX = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "QMMA", "IMMA", "DMMA", "UTCHMMA", "UTCQMMA", "UTCIMMA", "OMMA")
#: A loop counts as one that multiplies from this many FMAs on: fewer are address arithmetic and epilogues.
LOOP_FMAS = 64
#: Accesses to local memory.
SPILLS = ("LDL", "STL")
#: Shared memory that compute capability 9.0 and later reserve in each block and ``cuobjdump`` counts (CUDA C++
#: Programming Guide, technical specifications by compute capability: 1 KB a block).
RESERVED_SHARED_BYTES = 1024

DUMP_DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of SASS. ``predicated``: it starts with @P or @!P."""

    address: int
    predicated: bool
    opcode: str
    operands: str


@dataclass(frozen=True, slots=True)
class MachineCode:
    """What a cubin holds; the largest over its functions where the figure is one of a function.

    Args:
        registers: a thread's at entry.
        stack_bytes, local_bytes: local memory of a thread: spilled registers and arrays indexed at run time.
        shared_bytes: static shared memory of a block, without what the architecture reserves.
        total: opcode with its modifiers -> occurrences.
        loop: the same inside the innermost loops that multiply.
    """

    registers: int
    stack_bytes: int
    local_bytes: int
    shared_bytes: int
    total: Mapping[str, int]
    loop: Mapping[str, int]

    @property
    def spill_bytes(self) -> int:
        """Local memory of a thread, or 0 where no instruction touches it: ptxas also reserves a frame around the slow
        path of an IEEE division, and a frame alone costs nothing.
        """
        touched = any(count(self.total, access) for access in SPILLS)
        return self.stack_bytes + self.local_bytes if touched else 0


def count(opcodes: Mapping[str, int], prefix: str) -> int:
    """Occurrences of an opcode with at least these modifiers: ``LDG.E.128`` counts ``LDG.E.128.CONSTANT`` too."""
    return sum(n for opcode, n in opcodes.items() if opcode == prefix or opcode.startswith(prefix + "."))


def find_cuobjdump() -> Path | None:
    """The tool that comes with Triton, else the one on the path, else ``None``."""
    spec = importlib.util.find_spec("triton")
    if spec is not None and spec.origin is not None:
        found = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        if found.is_file():
            return found
    on_path = shutil.which("cuobjdump")
    return Path(on_path) if on_path else None


def instructions(sass: str) -> list[list[Instruction]]:
    """The functions of a ``cuobjdump -sass`` listing."""
    line = re.compile(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(@!?U?P\w+\s+)?(\S+?)(?:\s+(.*?))?\s*;", re.MULTILINE)
    functions = re.split(r"^\s*Function\s*:.*$", sass, flags=re.MULTILINE)
    listed = ([Instruction(int(m[1], 16), bool(m[2]), m[3], m[4] or "") for m in line.finditer(f)] for f in functions)
    return [found for found in listed if found]


def inner_loops(listing: Sequence[Instruction]) -> list[list[str]]:
    """Opcodes of the body of every loop of one function that multiplies and holds no other such loop.

    A loop ends in a backward branch. So does the way back from the spin loops of barriers, which ptxas puts behind the
    kernel (test, branch back to the test, branch back into the kernel): an unpredicated branch right after a predicated
    one is that, and no loop.
    """
    spans = []
    for before, last in pairwise(listing):
        target = re.search(r"0x([0-9a-f]+)", last.operands)
        returns = not last.predicated and before.predicated and before.opcode.startswith("BRA")
        if last.opcode.startswith("BRA") and not returns and target and int(target[1], 16) < last.address:
            begin, end = int(target[1], 16), last.address
            body = [line.opcode for line in listing if begin <= line.address <= end]
            if any(code.startswith(MATRIX) for code in body) or sum(c.startswith("FFMA") for c in body) >= LOOP_FMAS:
                spans.append((begin, end, body))
    return [
        body
        for begin, end, body in spans
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e, _ in spans)
    ]


def parse(usage: str, sass: str, arch: int) -> MachineCode:
    """From the text of ``cuobjdump -res-usage`` and ``-sass``.

    Raises:
        DataError: no function in it.
    """
    found = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    listings = instructions(sass)
    if not found or not listings:
        raise DataError(f"cuobjdump shows no function: {(usage + sass)[-200:]!r}")
    registers, stack, shared, local = (max(map(int, column)) for column in zip(*found, strict=True))
    total = Counter(line.opcode for listing in listings for line in listing)
    loop = Counter(opcode for listing in listings for body in inner_loops(listing) for opcode in body)
    reserved = RESERVED_SHARED_BYTES if arch >= 90 else 0
    return MachineCode(registers, stack, local, max(0, shared - reserved), total, loop)


def read(cubin: bytes, arch: int) -> MachineCode:
    """Read a cubin made for compute capability ``arch`` / 10.

    Raises:
        DataError: there is no ``cuobjdump``, or it cannot read this.
    """
    tool = find_cuobjdump()
    if tool is None:
        raise DataError("no cuobjdump: install Triton, whose wheel carries one, or put a CUDA toolkit's on the path")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        texts = []
        for option in ("-res-usage", "-sass"):
            done = subprocess.run(
                [str(tool), option, file.name], capture_output=True, text=True, check=False, timeout=DUMP_DEADLINE_S
            )
            if done.returncode != 0:
                raise DataError(f"cuobjdump {option} cannot read it: {(done.stdout + done.stderr).strip()[-300:]}")
            texts.append(done.stdout)
    return parse(texts[0], texts[1], arch)
