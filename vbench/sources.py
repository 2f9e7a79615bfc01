"""Digest of the sources a result rests on: the kernel's module and all it imports from its own package, the oracle's.

Computed from the files' text by following import statements, so that nothing is executed and an edit elsewhere in the
repository changes no digest.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.machinery
import importlib.util
from collections.abc import Iterable
from pathlib import Path

#: Modules whose text decides nothing about a result: the contract and the harness.
_NEUTRAL_ROOTS = ("vbench.spec", "vbench.backend", "vbench.errors", "vbench.record")


def _file(module: str) -> Path | None:
    """The source file of a module, found without importing its parents, as ``find_spec`` of a dotted name would."""
    top, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(top)
        name = top
        for part in rest:
            if spec is None or spec.submodule_search_locations is None:
                return None
            name = f"{name}.{part}"
            spec = importlib.machinery.PathFinder.find_spec(name, list(spec.submodule_search_locations))
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin)


def _follows(module: str, root: str) -> bool:
    return (module == root or module.startswith(root + ".")) and not module.startswith(_NEUTRAL_ROOTS)


def _root(module: str) -> str:
    """The part of the module tree that counts as one body of source: a backend's folder, or a stranger's package."""
    parts = module.split(".")
    if parts[:2] == ["vbench", "kernels"]:
        return ".".join(parts[:3])
    if parts[:2] == ["vbench", "reference"]:
        return "vbench.reference"
    return parts[0]


def closure(modules: Iterable[str]) -> dict[str, Path]:
    """The modules and what they import from their own roots: name -> file."""
    found: dict[str, Path] = {}
    pending = [(m, _root(m)) for m in modules]
    while pending:
        module, root = pending.pop()
        if module in found:
            continue
        path = _file(module)
        if path is None:
            continue
        found[module] = path
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
            pending.extend((name, root) for name in names if _follows(name, root))
    return found


@functools.cache
def digest(modules: tuple[str, ...]) -> str:
    """``sha256:`` and 16 hex digits over names and contents of the closure; ``""`` if no module has a source file."""
    found = closure(modules)
    if not found:
        return ""
    total = hashlib.sha256()
    for module in sorted(found):
        total.update(module.encode() + b"\0" + found[module].read_bytes() + b"\0")
    return "sha256:" + total.hexdigest()[:16]


def job_digest(factory: str, oracle: str, inputs: str) -> str:
    """Digest for one backend's op: ``factory``, ``oracle`` and ``inputs`` are ``module:attribute`` references."""
    return digest(tuple(sorted({ref.partition(":")[0] for ref in (factory, oracle, inputs)})))
