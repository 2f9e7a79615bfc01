"""``vbench doctor``: what is usable here, why the rest is not, and the line that installs it.

Nothing heavy is imported in this process: packages are looked up by their metadata and each backend is probed in a
worker process of its own, as a run would.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import tempfile
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vbench import registry
from vbench.backend import Device
from vbench.plan import DEADLINE_S
from vbench.registry import OWN_DISTRIBUTION, BackendInfo

#: Name of an unrelated distribution (a video benchmark) that installs the same package folder and the same command.
FOREIGN = "vbench"

#: Optional extra -> the packages it brings; a test holds it to pyproject.toml.
EXTRAS: Mapping[str, tuple[str, ...]] = {
    "triton": ("triton",),
    "numba": ("numba", "numba-cuda"),
    "nvml": ("nvidia-ml-py",),
}

#: Always needed; missing only where the installation is broken.
REQUIRED = ("torch", "numpy", "hypothesis", "pandas", "tabulate", "rich")


@dataclass(frozen=True, slots=True)
class Package:
    """An installed or missing distribution. ``install`` is the exact line, empty where it is there."""

    name: str
    version: str
    install: str = ""


@dataclass(frozen=True, slots=True)
class Usable:
    """A backend on a device.

    Args:
        state: ``native``, ``interpreted``, ``simulated`` (usable), or the code of why not: ``not_usable``, the
            registry's problem, or how its worker ended.
        install: the line that installs the packages it is known to lack, where that is why.
    """

    backend: str
    role: str
    device: str
    usable: bool
    state: str
    reason: str = ""
    install: str = ""


@dataclass(slots=True)
class Findings:
    """All that ``vbench doctor`` prints."""

    python: str
    location: str
    device: str
    packages: list[Package] = field(default_factory=list)
    backends: list[Usable] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def code(self) -> int:
        """0 fine; 3 where something is wrong with the installation, or no backend of ours is usable."""
        own = any(b.usable and b.role == "own" for b in self.backends)
        return 0 if own and not self.problems else 3


def version_of(name: str) -> str:
    """Version of an installed distribution, ``""`` where there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def packages() -> list[Package]:
    """What results depend on, required first; each missing one with its line."""
    found = [Package(n, v, "" if v else f"pip install {OWN_DISTRIBUTION}") for n in REQUIRED for v in [version_of(n)]]
    for extra, names in EXTRAS.items():
        for name in names:
            version = version_of(name)
            found.append(Package(name, version, "" if version else f"pip install '{OWN_DISTRIBUTION}[{extra}]'"))
    return found


def installation_problems(device: Device, nodes: Path = Path("/dev")) -> list[str]:
    """A GPU that torch cannot use, the foreign distribution of our import name, entry points that do not load.

    Args:
        device: what torch can use.
        nodes: where the NVIDIA driver's device nodes would be.
    """
    found = []
    if device == "cpu" and any(nodes.glob("nvidia[0-9]*")):
        found.append(
            f"there is an NVIDIA GPU, and torch {version_of('torch')} cannot use it; if that is a CPU build: "
            "pip install --force-reinstall torch"
        )
    foreign = version_of(FOREIGN)
    if foreign:
        found.append(
            f"the unrelated distribution {FOREIGN} {foreign} is installed, whose files share our folder and command; "
            f"remove both and install ours again: pip uninstall -y {FOREIGN} {OWN_DISTRIBUTION} && "
            f"pip install {OWN_DISTRIBUTION}"
        )
    if not version_of(OWN_DISTRIBUTION):
        found.append(f"no distribution {OWN_DISTRIBUTION} is installed, so that nothing is found: pip install -e .")
    broken: list[registry.Problem] = []
    registry.ops(broken), registry.suites(broken), registry.ledger_paths(broken)
    return found + [f"{p.group} {p.name}: {p.detail}" for p in broken]


def probe(info: BackendInfo, device: Device, log: Path) -> Usable:
    """Ask one backend in a worker process, which is gone afterwards."""
    from vbench.runner import Failure, WorkerProcess

    if info.problem:
        return Usable(info.name, info.role, device, False, info.problem, info.detail)
    worker = WorkerProcess(info, device, log, 1)
    try:
        answer = worker.ask({"kind": "probe"}, DEADLINE_S["probe"])
    finally:
        worker.close()
    if isinstance(answer, Failure):
        return Usable(info.name, info.role, device, False, answer.reason, answer.detail)
    if answer["outcome"] == "PASSED":
        return Usable(info.name, info.role, device, True, answer["reason"], answer["detail"])
    lacking = _extra_of(info)
    return Usable(info.name, info.role, device, False, answer["reason"], answer["detail"], lacking)


def _extra_of(info: BackendInfo) -> str:
    """The line for our own backend whose extra (of the same first word) is not installed whole."""
    extra = info.name.partition("_")[0]
    if info.distribution != OWN_DISTRIBUTION or all(version_of(name) for name in EXTRAS.get(extra, ())):
        return ""
    return f"pip install '{OWN_DISTRIBUTION}[{extra}]'"


def examine(infos: Iterable[BackendInfo], device: Device) -> Findings:
    """Everything. Backends are probed on the CPU, and on the GPU where there is one, two at a time."""
    import vbench

    location = str(Path(next(iter(vbench.__path__))).parent)
    found = Findings(platform.python_version(), location, device, packages(), problems=installation_problems(device))
    devices: tuple[Device, ...] = ("cpu", "cuda") if device == "cuda" else ("cpu",)
    pairs = [(info, where) for info in infos for where in devices]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max_workers=2) as pool:

        def one(pair: tuple[BackendInfo, Device]) -> Usable:
            info, where = pair
            return probe(info, where, Path(folder) / f"{info.name.replace('/', '_')}-{where}.log")

        found.backends = list(pool.map(one, pairs))
    return found


def to_json(found: Findings) -> str:
    body: dict[str, Any] = {**asdict(found), "exit": found.code}
    return json.dumps(body, indent=1, ensure_ascii=False)


def to_text(found: Findings) -> str:
    lines = [f"vbench at {found.location}, Python {found.python}, device {found.device}", "", "packages"]
    for p in found.packages:
        lines.append(f"  {p.name:<14} {p.version or 'missing':<12} {p.install}".rstrip())
    lines += ["", "backends"]
    for b in found.backends:
        state = b.state if b.usable else f"not usable: {b.state}"
        lines.append(f"  {b.backend:<14} {b.role:<8} {b.device:<5} {state}")
        lines += [f"      {text}" for text in (b.reason.strip().splitlines() or [""])[-1:] if text]
        lines += [f"      {b.install}"] if b.install else []
    lines += ["", *([f"problem: {p}" for p in found.problems] or ["no problem with the installation"])]
    return "\n".join(lines)
