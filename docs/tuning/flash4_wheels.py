"""FlashAttention-4 on a GPU machine that fetches nothing and takes 64 MiB at a time.

Where there is a package index (Linux x86-64, any Python with pip), wheels for the GPU machine's Python 3.12:

    python docs/tuning/flash4_wheels.py fetch build/flash4

leaves build/flash4/first and build/flash4/second, each below the limit: the library wheel (92 MB) is cut in two. Carry
one folder a call; in the call that carries the second, with both there:

    python3 docs/tuning/flash4_wheels.py install build/flash4

which checks every size and digest written down in ``fetch``, unpacks into build/flash4/site and prints the line to
put in front of a command, as in

    PYTHONPATH=... vbench run --suite attention --backend flash_attn_4 --device cuda

``WHEELS`` is what ``pip download --no-deps`` gave on 2026-11-25 and what their metadata asks for beside torch, einops,
cuda-bindings >= 12.8, protobuf >= 4.21.12 and typing-extensions >= 4.13, which the GPU machine has. The CUDA 12
libraries that nvidia-cutlass-dsl names as well are left out: nothing loads them beside a CUDA 13 torch.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import zipfile
from pathlib import Path

WHEELS = (
    "flash-attn-4==4.0.0b36",
    "quack-kernels==0.6.5",
    "apache-tvm-ffi==0.1.15.post2",
    "torch-c-dlpack-ext==0.1.5",
    "nvidia-cutlass-dsl==4.8.1",
    "nvidia-cutlass-dsl-libs-base==4.8.1",
    "nvidia-cutlass-dsl-libs-core==4.8.1",
    "nvidia-cutlass-dsl-libs-cu13==4.8.1",
)
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "any")
FOLDERS = ("first", "second")
LIMIT_BYTES = 60 * 2**20
LIST = "wheels.json"


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def fetch(folder: Path) -> None:
    """Download the wheels and deal them out."""
    wheels = folder / "wheels"
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--python-version", "3.12"]
    subprocess.run([*command, *platforms, "--dest", str(wheels), *WHEELS], check=True)
    deal(sorted(wheels.glob("*.whl")), folder)


def deal(wheels: list[Path], folder: Path) -> None:
    """Cut the largest wheel in two and write both folders, the list of sizes and digests in each."""
    if len(wheels) != len(WHEELS):
        raise SystemExit(f"{len(wheels)} wheels for {len(WHEELS)} packages: empty {folder} and fetch again")
    largest = max(wheels, key=lambda wheel: wheel.stat().st_size)
    data = largest.read_bytes()
    half = len(data) // 2
    parts = {"first": {f"{largest.name}.0": data[:half]}, "second": {f"{largest.name}.1": data[half:]}}
    parts["first"] |= {wheel.name: wheel.read_bytes() for wheel in wheels if wheel != largest}
    whole = {wheel.name: digest(wheel.read_bytes()) for wheel in wheels}
    for name in FOLDERS:
        total = sum(map(len, parts[name].values()))
        if total > LIMIT_BYTES:
            raise SystemExit(f"{name}: {total} bytes are over {LIMIT_BYTES}; a newer wheel is larger: cut it in three")
        (folder / name).mkdir(parents=True, exist_ok=True)
        for part, content in parts[name].items():
            (folder / name / part).write_bytes(content)
        (folder / name / LIST).write_text(json.dumps(whole, indent=1), encoding="utf-8")
        print(f"{folder / name}: {len(parts[name])} files, {total / 2**20:.1f} MiB")


def install(folder: Path) -> None:
    """Join, check and unpack; print what goes on PYTHONPATH (from which no ``.pth`` file is read)."""
    listed = json.loads((folder / FOLDERS[0] / LIST).read_text(encoding="utf-8"))
    site = folder / "site"
    for name, want in listed.items():
        parts = sorted(part for where in FOLDERS for part in (folder / where).glob(f"{name}*"))
        data = b"".join(part.read_bytes() for part in parts)
        if digest(data) != want:
            raise SystemExit(f"{name}: {len(data)} bytes in {len(parts)} parts are not the wheel; carry both folders")
        joined = folder / name
        joined.write_bytes(data)
        with zipfile.ZipFile(joined) as wheel:
            wheel.extractall(site)
        joined.unlink()
    # What the .pth file of nvidia-cutlass-dsl adds.
    paths = [site, site / "nvidia_cutlass_dsl" / "dsl_packages"]
    print("PYTHONPATH=" + ":".join(str(path.resolve()) for path in paths))


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("fetch", "install"):
        raise SystemExit(__doc__)
    {"fetch": fetch, "install": install}[sys.argv[1]](Path(sys.argv[2]))
