"""Suites x backends -> ordered jobs. Pure: the same arguments give the same jobs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from vbench import regressions
from vbench.gate import Planned
from vbench.record import Kind
from vbench.registry import BackendInfo
from vbench.spec import Case, Frame, Generated, Suite, resolve

Effort = Literal["quick", "standard", "full"]
EFFORTS: tuple[Effort, ...] = ("quick", "standard", "full")

#: Seconds a job may take before its worker is killed. The interpreter and the simulator are slow on a shared core.
DEADLINE_S: Mapping[Kind, float] = {
    "probe": 120.0, "check": 60.0, "time": 180.0, "battery": 60.0, "arithmetic": 5.0, "compile": 180.0,
}  # fmt: skip

#: Of the drawn cases ``vbench run`` tries laws and other values at the same addresses on one in so many: each costs
#: some launches more, and interpreters are slow. ``vbench backend check`` does on all.
LAWFUL_ONE_IN = 5

#: Names of the harness's own executors in records; they take no entry point.
BATTERY = "trivial_kernels"
#: Suite name in records of ``vbench backend check``: their jobs are thorough.
CONFORMANCE = "conformance"
#: Suite name in records of ``vbench fuzz``: thorough too.
FUZZ = "fuzz"
ARITHMETIC = "arithmetic"


@dataclass(frozen=True, slots=True)
class Job:
    """One case on one backend: leaves exactly one Record. ``compiles``: by a worker in the place ``compile``.

    ``thorough`` consults every one of ``check.ORACLES`` but those in ``off``; without it the costly ones are left out.
    ``native``: checked only where the backend computes natively, neither interpreted nor simulated.
    ``first``: a timed case is there for this kernel, so that a limit of rows takes it before the op's others.
    """

    kind: Kind
    suite: str
    case: str
    op: str
    backend: str
    variant: str
    role: str
    deadline_s: float
    source: str = ""
    device: Literal["cuda", "any"] = "any"
    compiles: bool = False
    thorough: bool = False
    off: tuple[str, ...] = ()
    native: bool = False
    first: bool = False

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.kind, self.case, self.backend, self.variant


def run_probe(info: BackendInfo) -> Job:
    """Whether the backend can be used on the run's device."""
    return Job("probe", "", f"probe[{info.name}]", "", info.name, "", info.role, DEADLINE_S["probe"])


def compile_probe(info: BackendInfo) -> Job:
    """Whether the backend's compiler can be used."""
    case = f"probe[{info.name},place=compile]"
    return Job("probe", "compile", case, "", info.name, "", info.role, DEADLINE_S["probe"], compiles=True)


def is_compile(kind: str, case: str) -> bool:
    """Whether a record's job ran in the place ``compile``."""
    return kind == "compile" or (kind == "probe" and case.endswith(",place=compile]"))


def names(kernels: Iterable[str], backend: str, variant: str) -> bool:
    """Whether a suite's list of kernels, ``backend[variant]`` or ``backend`` for all its variants, has this one."""
    return any(kernel in (backend, f"{backend}[{variant}]") for kernel in kernels)


def draw(generated: Generated, count: int, seed: int, frames: Sequence[Frame] = ()) -> list[Case]:
    """``count`` examples of a strategy, reproducible from ``seed``, duplicates dropped.

    Args:
        frames: each example lies in one of these; without any, wherever the strategy goes.
    """
    from hypothesis import HealthCheck, Phase, given, settings
    from hypothesis import seed as with_seed
    from hypothesis import strategies as st

    cases: dict[str, Case] = {}
    make: Any = resolve(generated.strategy)
    strategy: Any = st.sampled_from(list(frames)).flatmap(make) if frames else make()

    @with_seed(seed)
    @settings(
        max_examples=count,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def collect(case: Case) -> None:
        cases.setdefault(case.id, case)

    collect()
    return list(cases.values())


def check_cases(suite: Suite, effort: Effort, seed: int) -> list[Case]:
    """What once failed first, then the fixed cases, then the drawn ones."""
    return [case for case, _ in _checks(suite, effort, seed)]


def _checks(suite: Suite, effort: Effort, seed: int) -> list[tuple[Case, bool]]:
    """``check_cases``, and of each whether ``vbench run`` tries the op's laws on it too."""
    cases = {case.id: (case, True) for case in regressions.cases_of(suite)}
    for case in suite.checks:
        cases.setdefault(case.id, (case, False))
    for number, generated in enumerate(suite.generated):
        drawn = draw(generated, generated.count[EFFORTS.index(effort)], seed * 1000 + number)
        for at, case in enumerate(drawn):
            cases.setdefault(case.id, (case, at % LAWFUL_ONE_IN == 0))
    return list(cases.values())


def plan(
    suites: Sequence[Suite],
    backends: Sequence[BackendInfo],
    *,
    ops: Iterable[str],
    effort: Effort,
    seed: int,
    claims: Iterable[str] = (),
    timing: bool = True,
    compiled: Mapping[str, Sequence[Planned]] | None = None,
) -> tuple[Job, ...]:
    """Jobs ordered by backend, then kind (compile, probe, check, time), then suite. Each (kind, case, backend, variant)
    once.

    Args:
        ops: operations to include.
        claims: ids of claims that arithmetic decides.
        timing: include timed cases.
        compiled: backend -> its configurations, for suites that compile; one left out has none.
    """
    wanted = set(ops)
    jobs: dict[tuple[str, str, str, str], Job] = {}

    def add(job: Job) -> None:
        jobs.setdefault(job.key, job)

    for claim in claims:
        add(Job("arithmetic", "claims", claim, "", ARITHMETIC, "", "harness", DEADLINE_S["arithmetic"]))
    checks = {s.name: [(c, lawful) for c, lawful in _checks(s, effort, seed) if c.op in wanted] for s in suites}
    reach = EFFORTS.index(effort)
    benches = {
        s.name: [b for b in s.benches if b.case.op in wanted and EFFORTS.index(b.effort) <= reach] for s in suites
    }
    for suite in suites:
        for case, _ in checks[suite.name]:
            add(Job("battery", suite.name, case.id, case.op, BATTERY, "", "harness", DEADLINE_S["battery"]))
    compilers = [s.name for s in suites if s.compiles]
    runs = [s for s in suites if not s.compiles or s.checks or s.generated or s.benches]
    for info in backends:
        if info.problem:
            add(run_probe(info))
            continue
        if compilers and info.configurations:
            add(compile_probe(info))
            for planned in (compiled or {}).get(info.name, ()):
                if (planned.op in wanted or not planned.op) and EFFORTS.index(planned.effort) <= reach:
                    add(
                        Job(
                            "compile",
                            compilers[0],
                            planned.case,
                            planned.op,
                            info.name,
                            "",
                            info.role,
                            DEADLINE_S["compile"],
                            compiles=True,
                        )
                    )
        if not runs:
            continue
        add(run_probe(info))
        for suite in suites:
            for case, lawful in checks[suite.name]:
                if case.op in info.ops:
                    # A subject is judged by the claims on it; the trivial kernels have jobs of their own.
                    beyond = lawful and info.role != "subject"
                    for variant in info.variants_of(case.op):
                        add(
                            Job(
                                "check",
                                suite.name,
                                case.id,
                                case.op,
                                info.name,
                                variant,
                                info.role,
                                DEADLINE_S["check"],
                                thorough=beyond,
                                off=("battery",) if beyond else (),
                                native=case in suite.native,
                            )
                        )
        if not (timing and info.timed):
            continue
        for suite in suites:
            for bench in benches[suite.name]:
                if bench.case.op in info.ops:
                    for variant in info.variants_of(bench.case.op):
                        if effort != "full" and names(bench.later, info.name, variant):
                            continue
                        add(
                            Job(
                                "time",
                                suite.name,
                                bench.case.id,
                                bench.case.op,
                                info.name,
                                variant,
                                info.role,
                                DEADLINE_S["time"],
                                bench.source,
                                bench.device,
                                first=names(bench.first, info.name, variant),
                            )
                        )
    return tuple(jobs.values())
