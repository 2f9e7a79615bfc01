"""What stands on one side of an A/B comparison: a backend with options, a revision, or a folder.

    triton                      a backend, its variant "" in every op
    torch_native[cublas_bf16]   a variant
    triton@num_warps=8          options that the backend declares
    HEAD~1, v0.1, a1b2c3        a git revision: its kernels, under this harness
    ../other                    a folder: its kernels, under this harness

Of a revision or folder only what lies on the import path of a kernel is taken: its ``kernels`` folder as
``vbench.kernels``, and its own modules (a plug-in's). Harness, oracle and inputs are the ones that run here, so that
both sides are measured alike.
"""

from __future__ import annotations

import io
import re
import subprocess
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vbench.errors import UsageError
from vbench.registry import BackendInfo

_SPEC = re.compile(r"(?P<backend>\w+)(?:\[(?P<variant>\w+)\])?(?:@(?P<options>[\w.=,+-]+))?")


@dataclass(frozen=True, slots=True)
class Side:
    """One side.

    Args:
        spec: as given.
        backend, variant, options: for a backend; ``backend`` is ``""`` where a tree is compared.
        tree: folder of other sources, ``None`` for what is installed.
        label: what to call the tree in records.
    """

    spec: str
    backend: str = ""
    variant: str = ""
    options: Mapping[str, str] = field(default_factory=dict)
    tree: Path | None = None
    label: str = ""


def parse_side(spec: str, infos: Mapping[str, BackendInfo], scratch: Path, root: Path | None = None) -> Side:
    """Read one side.

    Args:
        infos: the backends there are; a name among them is a backend, whatever else it could mean.
        scratch: folder that a revision is written into.
        root: inside the repository that revisions belong to; where the command runs by default.

    Raises:
        UsageError: no backend, folder or revision of that name, or an option that the backend does not declare.
    """
    match = _SPEC.fullmatch(spec)
    if match is not None and match["backend"] in infos:
        info = infos[match["backend"]]
        return Side(spec, info.name, match["variant"] or "", _options(spec, match["options"] or "", info))
    folder = Path(spec)
    if folder.is_dir():
        return Side(spec, tree=folder.resolve(), label=folder.resolve().name)
    commit = _git(["rev-parse", "--verify", "--quiet", f"{spec}^{{commit}}"], root).strip().decode()
    if not commit:
        known = ", ".join(infos)
        raise UsageError(f"{spec!r} is no backend ({known}), no folder, and no git revision of the repository here")
    tree = scratch / commit[:12]
    if not tree.is_dir():
        top = Path(_git(["rev-parse", "--show-toplevel"], root).decode().strip())
        with tarfile.open(fileobj=io.BytesIO(_git(["archive", "--format=tar", commit], top))) as archive:
            # Python before 3.11.4 has no filters; the archive is the repository's own, made a moment ago by git.
            safe: dict[str, Any] = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
            archive.extractall(tree, **safe)
    return Side(spec, tree=tree, label=f"{spec} ({commit[:12]})" if spec != commit else commit[:12])


def _options(spec: str, text: str, info: BackendInfo) -> dict[str, str]:
    options: dict[str, str] = {}
    declared = sorted({name for names in info.options.values() for name in names})
    for word in filter(None, text.split(",")):
        name, sep, value = word.partition("=")
        if not sep or not name or not value:
            raise UsageError(f"{spec}: {word!r} is not option=value")
        if name not in declared:
            known = ", ".join(declared) or "none"
            raise UsageError(f"{spec}: backend {info.name} declares no option {name!r} (declared: {known})")
        options[name] = value
    return options


def _git(arguments: list[str], root: Path | None) -> bytes:
    """What a git command prints; empty where it fails or there is no git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, check=False, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return b""
    return done.stdout if done.returncode == 0 else b""


def import_path(tree: Path, scratch: Path) -> str:
    """``PYTHONPATH`` under which the tree's kernels run with this harness.

    Args:
        scratch: a folder of links is made in it where the tree has kernels of ours.
    """
    here = Path(__file__).resolve().parent
    if not (tree / "kernels" / "__init__.py").is_file():
        return f"{tree}:{here.parent}"
    overlay = scratch / f"overlay-{tree.name}"
    package = overlay / "vbench"
    if not package.is_dir():
        package.mkdir(parents=True)
        for entry in sorted(here.iterdir()):
            if entry.name != "__pycache__":
                target = tree / "kernels" if entry.name == "kernels" else entry.resolve()
                (package / entry.name).symlink_to(target)
    return f"{overlay}:{tree}"
