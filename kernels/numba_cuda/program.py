"""A kernel before compilation, and the way from torch tensors to its launch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from vbench.backend import Device
from vbench.errors import Unsupported
from vbench.kernels.numba_cuda.dialect import SIMULATED, cuda


@dataclass(frozen=True)
class Program:
    """A kernel function with its one signature and its block size.

    Make each through a cached builder, so that equal parameters give the same object and compile once a process.

    Args:
        name: shown in tests and profiles.
        function: the Python function; parameters in the order of ``arguments``.
        arguments: numba element types, ``uint8[::1]`` for a 1-D C-contiguous array, ``int64`` for a size.
        threads: threads a block, along x. Compiled into ``function``.
    """

    name: str
    function: Callable[..., None]
    arguments: tuple[str, ...]
    threads: int

    @property
    def signature(self) -> str:
        """As ``numba.cuda.jit`` takes it."""
        return f"void({', '.join(self.arguments)})"


@cache
def compiled(program: Program) -> Any:
    """The kernel for the current device, loaded; the simulator only wraps the function.

    A list of signatures, not a bare one: with a bare one numba skips the check of argument types at launch.
    """
    if SIMULATED:
        return cuda.jit(program.function)
    return cuda.jit([program.signature], fastmath=False)(program.function)


@dataclass(frozen=True)
class Step:
    """One launch of a program: grid in blocks (x, y) and arguments."""

    program: Program
    grid: tuple[int, int]
    arguments: tuple[Any, ...]


def make_launch(steps: Sequence[Step]) -> Callable[[], None]:
    """Compile every step now; the returned function only launches, on torch's current stream, in order."""
    kernels = [(compiled(s.program), s.grid, s.program.threads, s.arguments) for s in steps]

    def launch_simulated() -> None:
        with warnings.catch_warnings():
            # numpy warns of overflow and invalid values that IEEE arithmetic, and so the device, gives silently.
            warnings.simplefilter("ignore", RuntimeWarning)
            for kernel, grid, threads, arguments in kernels:
                kernel[grid, threads](*arguments)

    configured: dict[int, list[tuple[Any, tuple[Any, ...]]]] = {}

    def launch_native() -> None:
        import torch

        # Looked up at each launch: while torch captures a CUDA graph its current stream is the capturing one.
        pointer = torch.cuda.current_stream().cuda_stream
        if pointer not in configured:
            stream = cuda.external_stream(pointer) if pointer else 0
            configured[pointer] = [(kernel[grid, threads, stream], a) for kernel, grid, threads, a in kernels]
        for kernel, arguments in configured[pointer]:
            kernel(*arguments)

    return launch_simulated if SIMULATED else launch_native


def require_process(device: Device) -> None:
    """Check that this process runs numba the way ``device`` needs.

    Raises:
        Unsupported: simulator for cuda, or real compilation for cpu.
    """
    if (device == "cpu") != SIMULATED:
        raise Unsupported(
            "wrong_numba_mode",
            f"device {device} needs NUMBA_ENABLE_CUDASIM={'1' if device == 'cpu' else '0'} before numba is imported",
        )


def tensor(
    tensors: Mapping[str, Any], name: str, dtype: str, shape: tuple[int, ...], device: Device, align: int = 1
) -> Any:
    """The tensor ``name`` after checking it: torch dtype name, shape, device, contiguity and alignment in bytes.

    Raises:
        Unsupported: missing, or any of these differs.
    """
    t = _shaped(tensors, name, dtype, shape, align)
    _require_device(name, t, device)
    _require_contiguous(name, t)
    return t


def strided(
    tensors: Mapping[str, Any], name: str, dtype: str, shape: tuple[int, ...], device: Device, align: int, element: str
) -> tuple[Any, tuple[int, ...]]:
    """The memory from the first to the last element of tensor ``name`` as an array, and its strides in elements.

    Raises:
        Unsupported: as ``tensor``, but for contiguity.
    """
    t = _shaped(tensors, name, dtype, shape, align)
    _require_device(name, t, device)
    span = 1 + sum((size - 1) * stride for size, stride in zip(shape, t.stride(), strict=True))
    return array(t.detach().as_strided((span,), (1,)), element), tuple(t.stride())


def host_tensor(
    tensors: Mapping[str, Any], name: str, dtype: str, shape: tuple[int, ...], device: Device, align: int = 1
) -> Any:
    """As ``tensor``, for one in host memory; for cuda it must be page-locked, so that the device can read it.

    Raises:
        Unsupported: also ``not_on_host`` and ``not_pinned``.
    """
    t = _shaped(tensors, name, dtype, shape, align)
    if t.device.type != "cpu":
        raise Unsupported("not_on_host", f"{name} is on {t.device}; this op fetches from host memory")
    if device == "cuda" and not t.is_pinned():
        raise Unsupported("not_pinned", f"{name} is pageable, which a GPU cannot read; call .pin_memory()")
    _require_contiguous(name, t)
    return t


def _shaped(tensors: Mapping[str, Any], name: str, dtype: str, shape: tuple[int, ...], align: int) -> Any:
    t = tensors.get(name)
    if t is None:
        raise Unsupported("missing_tensor", f"{name} is missing")
    if str(t.dtype) != f"torch.{dtype}":
        raise Unsupported("wrong_dtype", f"{name} is {t.dtype}, this kernel takes torch.{dtype}")
    if tuple(t.shape) != shape:
        raise Unsupported("wrong_shape", f"{name} is {tuple(t.shape)}, the case says {shape}")
    if t.data_ptr() % align:
        raise Unsupported("misaligned", f"{name} must start at a multiple of {align} bytes")
    return t


def _require_device(name: str, t: Any, device: Device) -> None:
    if t.device.type != device:
        raise Unsupported("wrong_device", f"{name} is on {t.device}, this kernel was made for {device}")


def _require_contiguous(name: str, t: Any) -> None:
    if not t.is_contiguous():
        raise Unsupported("not_contiguous", f"{name} must be contiguous; call .contiguous() first")


def array(t: Any, element: str) -> Any:
    """The memory of a contiguous tensor as a 1-D array of ``element`` (a numpy name), shared and not copied.

    Goes through bytes, since neither numpy nor the CUDA array interface knows torch's bfloat16 and float8 types.
    """
    import torch

    flat = t.detach().view(-1).view(torch.uint8)
    held = flat.numpy() if SIMULATED else cuda.as_cuda_array(flat)
    return held.view(np.dtype(element))


@dataclass(frozen=True)
class _Mapped:
    """Page-locked bytes, described as the CUDA array interface does (numba: "CUDA Array Interface", version 3)."""

    owner: Any
    size_bytes: int

    @property
    def __cuda_array_interface__(self) -> Mapping[str, Any]:
        data = (self.owner.data_ptr(), False)
        return {"shape": (self.size_bytes,), "typestr": "|u1", "data": data, "strides": None, "version": 3}


def host_array(t: Any, element: str) -> Any:
    """As ``array``, for a contiguous tensor in host memory (page-locked where a device is to read it)."""
    import torch

    flat = t.detach().view(-1).view(torch.uint8)
    held = flat.numpy() if SIMULATED else cuda.as_cuda_array(_Mapped(flat, flat.numel()))
    return held.view(np.dtype(element))
