"""Forward and backward of a model that is several times its budget, held against the same model without tiers.

    python docs/tuning/tier_54gb.py [--out FOLDER] [--layers 402 --width 8192 --tokens 512 --gpu 8GiB --pinned 110GB]

The defaults are 402 square bf16 layers of 8192 features: 54.0 GB of weights and as much of gradients. They need a GPU
of 72 GB or more (139 GB for the timing of the all-resident step too, which is left out where it does not fit) and about
101 GiB of host memory; page-locking that much takes most of the time (about 20 s per 54 GB on a virtual machine).

Refused at once (exit code 2) where host or device memory cannot hold it. Expected: 70 s on one H200, most of it
page-locking 108 GB. FOLDER/tier_54gb.json is written anew after every step, so that a run that is cut off leaves what
it had, with the verdict ``UNFINISHED``.

Steps: weights are made on the device from seeds and go to the host (``tier``); torch's allocator is then limited to the
budget, so that a byte more is an out-of-memory error and not a wrong figure; forward and backward run STEPS times; the
limit is lifted; the same weights are made again from their seeds, all-resident, and output, input gradient, every
weight and every weight gradient are compared bitwise, layer by layer as the backward reaches them. Prints one line a
step and the verdict. Exit code 1 where anything differs or the peak is above the
budget. With ``--device cpu`` and small sizes it tests itself: no limit, no peak.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vbench.kernels.tiers.budget import Budget, parse_bytes
from vbench.kernels.tiers.offload import LinearStack
from vbench.kernels.tiers.tiered import Tiered, tier
from vbench.reference.offload import Weights

STEPS = 3


class Report:
    """What is known so far; on disk after every change, where a folder is given."""

    def __init__(self, folder: Path | None, told: dict[str, Any]) -> None:
        self._folder = folder
        self.body: dict[str, Any] = {"verdict": "UNFINISHED", **told}

    def add(self, **told: Any) -> None:
        """Take in and write."""
        self.body |= told
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.body, indent=1)
            (self._folder / "tier_54gb.json").write_text(text, encoding="utf-8")


class Clock:
    """Seconds of named stretches of work, device included; each goes into the report."""

    def __init__(self, device: torch.device, report: Report) -> None:
        self._cuda = device.type == "cuda"
        self._report = report
        self.took_s: dict[str, float] = {}

    def __call__(self, name: str, work: Callable[[], Any]) -> Any:
        self._synchronize()
        began = time.perf_counter()
        result = work()
        self._synchronize()
        self.took_s[name] = time.perf_counter() - began
        print(f"{name}: {self.took_s[name]:.3f} s", flush=True)
        self._report.add(took_s=self.took_s)
        return result

    def _synchronize(self) -> None:
        if self._cuda:
            torch.cuda.synchronize()


def step(stack: nn.Module, x: Tensor, dy: Tensor, clock: Clock, name: str) -> tuple[Tensor, Tensor]:
    """(y, dx) of one forward and backward; the weights' gradients are left in ``p.grad``."""
    stack.zero_grad(set_to_none=True)
    leaf = x.detach().requires_grad_()
    y = clock(f"{name} forward", lambda: stack(leaf))
    clock(f"{name} backward", lambda: torch.autograd.backward(y, dy))
    assert leaf.grad is not None
    return y.detach(), leaf.grad


def limit(device: torch.device, size_bytes: int | None) -> None:
    """Let torch's allocator have ``size_bytes`` of the device, or all of it."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(1.0 if size_bytes is None else size_bytes / total, device)


def differences(weights: Weights, x: Tensor, dy: Tensor, tiered: nn.Module, got: tuple[Tensor, Tensor]) -> list[str]:
    """Names of what is not ``torch.equal`` between the tiered stack and an all-resident one made anew."""
    found: list[str] = []
    resident = LinearStack(weights, trainable=True)

    def compare(name: str, theirs: nn.Parameter) -> Callable[[Any], None]:
        def hook(parameter: Any) -> None:
            for what, here, there in (
                ("weight", parameter.detach(), theirs.detach()),
                ("gradient", parameter.grad, theirs.grad),
            ):
                if there is None or here is None or not torch.equal(here, there.to(here.device)):
                    found.append(f"{what} of {name}")
            parameter.grad = None  # so that all gradients never lie there at once
            seen.append(name)

        return hook

    seen: list[str] = []
    for (name, mine), theirs in zip(resident.named_parameters(), tiered.parameters(), strict=True):
        anything: Any = mine  # its registration methods carry no types
        anything.register_post_accumulate_grad_hook(compare(name, theirs))
    leaf = x.detach().requires_grad_()
    y = resident(leaf)
    torch.autograd.backward(y, dy)
    assert leaf.grad is not None
    if len(seen) != weights.layers:
        found.append(f"only {len(seen)} of {weights.layers} layers were compared")
    for what, here, there in (("y", y.detach(), got[0]), ("dx", leaf.grad, got[1])):
        if not torch.equal(here, there):
            found.append(what)
    return found


def placement(handle: Tiered) -> dict[str, Any]:
    """The plan without its units."""
    return {name: value for name, value in handle.plan().items() if name != "units"}


def host_free_bytes(meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")) -> int:
    """What the kernel, and the control group, have left for this process; a huge number where neither tells.

    What the group holds of files that nobody reads counts as free, as in the kernel's MemAvailable: it gives that up
    before it runs out.
    """
    free = [sys.maxsize]
    if meminfo.is_file():
        found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text(encoding="ascii"))
        free += [int(found.group(1)) * 1024] if found else []
    limits = [group / name for name in ("memory.max", "memory.current", "memory.stat")]
    if all(path.is_file() for path in limits):
        most, used, stat = (path.read_text(encoding="ascii").strip() for path in limits)
        cached = re.search(r"^inactive_file (\d+)$", stat, re.MULTILINE)
        free += [int(most) - int(used) + (int(cached.group(1)) if cached else 0)] if most.isdigit() else []
    return min(free)


def shortage(device: torch.device, weight_bytes: int) -> str:
    """Why this cannot run here; empty where it can."""
    host = 2 * weight_bytes + (4 << 30 if device.type == "cuda" else 0)
    if host_free_bytes() < host:
        return f"host memory: weights and gradients take {host} bytes, {host_free_bytes()} are free; lower --layers"
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        needed = weight_bytes + (6 << 30)
        if free < needed:
            return f"device memory: the comparison takes {needed} bytes, {free} are free; lower --layers"
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=402)
    parser.add_argument("--width", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--gpu", default="8GiB")
    parser.add_argument("--activations", default="5GiB", help="the part of --gpu for activations and gradients")
    parser.add_argument("--pinned", default="110GB")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=None)
    given = parser.parse_args(argv)
    device = torch.device(given.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    told = {name: str(value) for name, value in vars(given).items() if name != "out"}
    report = Report(given.out, told | {"torch": str(torch.__version__)})
    weight_bytes = given.layers * given.width**2 * 2
    report.add(weight_bytes=weight_bytes)
    if lacking := shortage(device, weight_bytes):
        report.add(verdict="REFUSED", reason=lacking)
        print(lacking, file=sys.stderr)
        return 2
    clock = Clock(device, report)
    weights = Weights(given.layers, given.width, 0, given.device)
    gen = torch.Generator(given.device).manual_seed(1)
    shape = (given.tokens, given.width)
    x, dy = (torch.randn(shape, generator=gen, device=device, dtype=torch.bfloat16) for _ in range(2))
    if device.type == "cuda":
        report.add(gpu_name=torch.cuda.get_device_name(device))

    stack: LinearStack = clock("make weights", lambda: LinearStack(weights, trainable=True))
    budget = Budget(gpu=given.gpu, pinned=given.pinned, activations=given.activations)
    handle = clock("tier", lambda: tier(stack, budget=budget, device=device))
    resident_layers = sum(unit["resident"] for unit in handle.plan()["units"])
    report.add(plan=placement(handle), resident_layers=resident_layers)
    if device.type == "cuda":
        limit(device, budget.gpu_bytes)
        torch.cuda.reset_peak_memory_stats(device)
    got = step(stack, x, dy, clock, "tiered step 1 (page-locks gradients)")
    for i in range(1, STEPS):
        got = step(stack, x, dy, clock, f"tiered step {i + 1}")
    report.add(stats=handle.stats(), plan=placement(handle))
    within, peak = True, ""
    if device.type == "cuda":
        peak_bytes = torch.cuda.max_memory_allocated(device)
        report.add(peak_bytes=peak_bytes, peak_reserved_bytes=torch.cuda.max_memory_reserved(device))
        within = peak_bytes <= parse_bytes(given.gpu)
        peak = f"peak {peak_bytes / 2**30:.2f} GiB of {given.gpu}; "
        limit(device, None)

    found: list[str] = clock("compare with all-resident", lambda: differences(weights, x, dy, stack, got))
    good = within and not found
    verdict = "EQUAL" if good else "DIFFERENT" if found else "OVER_BUDGET"
    report.add(different=found, verdict=verdict)
    free = sys.maxsize
    if device.type == "cuda":
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
    if free > 2.1 * weight_bytes + (8 << 30):
        resident = LinearStack(weights, trainable=True)
        for i in range(2):
            step(resident, x, dy, clock, f"all-resident step {i + 1}")
        del resident
    else:
        report.add(all_resident_step="not timed: weights and gradients do not fit the device")
    handle.close()
    print(
        f"{verdict}: {weight_bytes / 1e9:.1f} GB of weights, {peak}"
        f"{resident_layers} of {given.layers} layers resident, {len(found)} tensors differ {found[:3]}; "
        f"stats {report.body['stats']}",
        flush=True,
    )
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
