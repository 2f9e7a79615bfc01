"""Checkpoints: one safetensors file each, published at once or not at all, every byte of it under a checksum.

The format is safetensors' own (8 bytes of header length, JSON header, tensors without gaps; huggingface/safetensors,
README, "Format"), written here so that training needs no further package; any safetensors reader opens it. What that
format lacks stands in its ``__metadata__``: SHA-256 of each tensor's bytes, and of all other metadata and the layout,
so that a flipped bit, a shortened file or a swapped tensor is an error and never a value.

Write: temporary file, reserve, write, fdatasync, rename, fsync of the folder. A process killed at any point leaves the
old checkpoint, the new one, or both.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vbench.kernels.tiers.fileio import FileIO, SystemIO
from vbench.kernels.virtual.errors import CheckpointError, TrainingError

FORMAT = "vbench-training-1"
_NAME = re.compile(r"checkpoint-(\d{8})\.safetensors")
_TEMPORARY = ".tmp"
_DTYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64", torch.int64: "I64",
    torch.int32: "I32", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
_TORCH = {name: dtype for dtype, name in _DTYPES.items()}
#: A header longer than this is not one of ours (safetensors' own limit is 100 MB).
_LONGEST_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a file holds: tensors by name, on the CPU, and anything JSON can say."""

    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


def path_of(folder: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps lies."""
    return folder / f"checkpoint-{step:08d}.safetensors"


def checkpoints(folder: Path) -> list[Path]:
    """Published checkpoints of ``folder``, oldest first."""
    return sorted(path for path in folder.iterdir() if _NAME.fullmatch(path.name))


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match.group(1))


def clean(folder: Path) -> None:
    """Remove what a killed write left."""
    for path in folder.glob(f"checkpoint-*{_TEMPORARY}"):
        path.unlink()


def save(path: Path, checkpoint: Checkpoint, io: FileIO | None = None) -> None:
    """Write and publish; durable on return.

    Raises:
        TrainingError: the system refused; nothing of the new file remains, older ones are as they were.
    """
    io = io if io is not None else SystemIO()
    views = {name: _bytes(tensor) for name, tensor in checkpoint.tensors.items()}
    header = _header(checkpoint, views)
    temporary = path.with_suffix(path.suffix + _TEMPORARY)
    try:
        descriptor = io.create(temporary)
        try:
            io.reserve(descriptor, len(header) + sum(len(v) for v in views.values()))
            for part in (memoryview(header), *views.values()):
                _write_all(io, descriptor, part)
            io.sync_data(descriptor)
        finally:
            io.close(descriptor)
        io.rename(temporary, path)
        io.sync_folder(path.parent)
    except OSError as error:
        with suppress(OSError):
            io.unlink(temporary)
        raise TrainingError(
            f"{path}: the checkpoint could not be written: {error.strerror or error}. Earlier ones are as they were: "
            "make room and go on with --resume"
        ) from error
    except BaseException:
        with suppress(OSError):
            io.unlink(temporary)
        raise


def load(path: Path) -> Checkpoint:
    """Read and verify every byte.

    Raises:
        CheckpointError: torn, altered, or not one of ours.
    """
    try:
        data = bytearray(path.read_bytes())
    except OSError as error:
        raise CheckpointError(path, "unreadable", error.strerror or str(error)) from error
    if len(data) < 8:
        raise CheckpointError(path, "torn", f"{len(data)} bytes hold no header; {_ADVICE}")
    length = int.from_bytes(data[:8], "little")
    if length > _LONGEST_HEADER or 8 + length > len(data):
        raise CheckpointError(path, "torn", f"the header says {length} bytes, {len(data) - 8} follow; {_ADVICE}")
    try:
        header = json.loads(data[8 : 8 + length].decode("utf-8"))
        metadata = header.pop("__metadata__")
        digest = metadata.pop("sha256")
        told = json.loads(metadata["vbench"])
        sums = told["tensor_sha256"]
        ours = told["format"] == FORMAT
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(path, "header", f"not a checkpoint of this program, or altered; {_ADVICE}") from error
    if not ours or digest != _digest(header, metadata["vbench"]):
        raise CheckpointError(path, "header_checksum", f"the header is not what was written; {_ADVICE}")
    # From here on the header is what we wrote: only the tensors' bytes can still be wrong.
    expected = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if len(data) != expected:
        raise CheckpointError(path, "torn", f"{len(data)} bytes where {expected} were written; {_ADVICE}")
    body, tensors = memoryview(data)[8 + length :], {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        if hashlib.sha256(body[start:end]).hexdigest() != sums[name]:
            raise CheckpointError(path, "tensor_checksum", f"{name} is not what was written; {_ADVICE}")
        dtype = _TORCH[entry["dtype"]]
        flat = torch.frombuffer(body[start:end], dtype=dtype) if end > start else torch.empty(0, dtype=dtype)
        tensors[name] = flat.reshape(entry["shape"]).clone()
    return Checkpoint(tensors, told["state"])


_ADVICE = "remove the file to resume from the one before"


def _bytes(tensor: Tensor) -> memoryview:
    plain = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    array: Any = plain.numpy()
    return memoryview(array).cast("B") if plain.numel() else memoryview(b"")


def _header(checkpoint: Checkpoint, views: Mapping[str, memoryview]) -> bytes:
    entries: dict[str, Any] = {}
    at = 0
    for name, view in views.items():
        tensor = checkpoint.tensors[name]
        entries[name] = {
            "dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + len(view)]
        }  # fmt: skip
        at += len(view)
    told = json.dumps({
        "format": FORMAT,
        "state": dict(checkpoint.state),
        "tensor_sha256": {name: hashlib.sha256(view).hexdigest() for name, view in views.items()},
    })  # fmt: skip
    metadata = {"vbench": told, "sha256": _digest(entries, told)}
    text = json.dumps({"__metadata__": metadata, **entries}).encode("utf-8")
    text += b" " * (-len(text) % 8)  # so that tensors start aligned
    return len(text).to_bytes(8, "little") + text


def _digest(entries: Mapping[str, Any], told: str) -> str:
    layout = json.dumps([[name, entries[name]] for name in entries])
    return hashlib.sha256(f"{layout}\n{told}".encode()).hexdigest()


def _write_all(io: FileIO, descriptor: int, view: memoryview) -> None:
    while len(view):
        view = view[io.write(descriptor, view) :]
