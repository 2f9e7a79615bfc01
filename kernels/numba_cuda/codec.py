"""Factories of ``fp4_quantize`` and ``fp4_dequantize``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vbench.backend import Device, Kernel, Launch
from vbench.errors import Unsupported
from vbench.kernels.numba_cuda.formats import MAX_GRID_X, Format, format_of, require_simulable
from vbench.spec import TORCH_DTYPE_NAMES, Case, Numerics

#: Both ops are judged bitwise; nothing is accumulated.
EXACT = Numerics(accumulate="fp32")


def blocks_of(items: int, threads: int) -> int:
    """Blocks that give each item a thread. Raises Unsupported: ``too_large`` for a grid."""
    blocks = -(-items // threads)
    if blocks > MAX_GRID_X:
        raise Unsupported("too_large", f"{items} work items need more than {MAX_GRID_X} blocks")
    return blocks


@dataclass(frozen=True)
class QuantizeKernel:
    """w [n, k] bf16, fp16 or fp32 -> codes u8 [n, k/2], scale, global_scale float32 [1]; bitwise the op's encoder."""

    fmt: Format
    encoding: str
    dtype: str
    n: int
    k: int
    device: Device
    numerics: Numerics = EXACT
    produces: tuple[str, ...] = ("codes", "scale", "global_scale")
    deterministic: bool = True

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """Allocates the partial maxima (at most 4 KiB) and compiles; the launch is one to three kernels.

        Raises:
            Unsupported: NaN or infinity in w, or a tensor of the wrong dtype, shape, device, layout or alignment.
        """
        import torch

        from vbench.kernels.numba_cuda import codec_kernels as programs
        from vbench.kernels.numba_cuda.bits import HELD_AS
        from vbench.kernels.numba_cuda.program import Step, array, make_launch, require_process, tensor

        require_process(self.device)
        n, k, fmt, dtype = self.n, self.k, self.fmt, self.dtype
        w = tensor(inputs, "w", TORCH_DTYPE_NAMES[dtype], (n, k), self.device, align=2 if dtype != "fp32" else 4)
        if not bool(torch.isfinite(w).all()):
            raise Unsupported("nonfinite_weight", "the weight holds NaN or Inf and FP4 has no code for them")
        codes = array(tensor(out, "codes", "uint8", (n, k // 2), self.device), "uint8")
        scale = scale_array(fmt, out, n, k, self.device)
        global_scale = array(tensor(out, "global_scale", "float32", (1,), self.device, align=4), "float32")
        values = array(w, HELD_AS[dtype])
        steps = []
        if fmt.scaling == "tensor" or fmt.scale == "e4m3":
            blocks = min(blocks_of(n * k, programs.THREADS), programs.MAX_PARTIALS)
            partials = array(torch.empty(blocks, dtype=torch.float32, device=w.device), "float32")
            steps.append(Step(programs.absmax_partials(dtype), (blocks, 1), (values, partials, n * k)))
            steps.append(Step(programs.finish_tensor(fmt.name), (1, 1), (partials, scale, global_scale, blocks)))
        if fmt.scaling == "tensor":
            grid = (blocks_of(n * k // 2, programs.THREADS), 1)
            steps.append(Step(programs.encode_tensor(dtype), grid, (values, codes, scale, n * k // 2)))
        elif fmt.scaling == "row":
            steps.append(Step(programs.encode_row(dtype), (n, 1), (values, codes, scale, global_scale, k)))
        else:
            groups = n * k // fmt.group
            grid = (blocks_of(groups * programs.group_lanes(fmt), programs.THREADS), 1)
            program = programs.encode_group(self.encoding, dtype)
            steps.append(Step(program, grid, (values, codes, scale, global_scale, groups)))
        return make_launch(steps)


@dataclass(frozen=True)
class DequantizeKernel:
    """codes u8 [n, k/2], scale, global_scale -> weight [n, k] bf16, fp16 or fp32; bitwise the op's decoder."""

    fmt: Format
    dtype: str
    n: int
    k: int
    device: Device
    numerics: Numerics = EXACT
    produces: tuple[str, ...] = ("weight",)
    deterministic: bool = True

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """Compiles; the launch is one kernel.

        Raises:
            Unsupported: a tensor of the wrong dtype, shape, device or layout, or a weight that does not start at a
                multiple of 4 bytes (two 16-bit values are stored at once).
        """
        from vbench.kernels.numba_cuda import codec_kernels as programs
        from vbench.kernels.numba_cuda.bits import PAIR_HELD_AS
        from vbench.kernels.numba_cuda.program import Step, array, make_launch, require_process, tensor

        require_process(self.device)
        weight = tensor(out, "weight", TORCH_DTYPE_NAMES[self.dtype], (self.n, self.k), self.device, align=4)
        arguments = (
            *packed_arrays(self.fmt, inputs, self.n, self.k, self.device),
            array(weight, PAIR_HELD_AS[self.dtype]),
            self.k,
        )
        return make_launch([Step(programs.decode(self.fmt.name, self.dtype), (self.n, 1), arguments)])


def packed_arrays(
    fmt: Format, inputs: Mapping[str, Any], n: int, k: int, device: Device, codes_held: str = "uint8"
) -> tuple[Any, Any, Any]:
    """The packed weight as arrays: codes (as ``codes_held``), scale (float32, or bytes as uint8), global scale.

    Raises:
        Unsupported: see ``program.tensor``.
    """
    from vbench.kernels.numba_cuda.program import array, tensor

    codes = tensor(inputs, "codes", "uint8", (n, k // 2), device)
    global_scale = array(tensor(inputs, "global_scale", "float32", (1,), device, align=4), "float32")
    return array(codes, codes_held), scale_array(fmt, inputs, n, k, device), global_scale


def scale_array(fmt: Format, tensors: Mapping[str, Any], n: int, k: int, device: Device) -> Any:
    """The tensor ``scale`` of an n x k weight as an array of ``fmt.scale_held``.

    Raises:
        Unsupported: see ``program.tensor``.
    """
    from vbench.kernels.numba_cuda.program import array, tensor

    align = 4 if fmt.scale_held == "float32" else 1
    return array(tensor(tensors, "scale", fmt.scale_torch, fmt.scale_shape(n, k), device, align), fmt.scale_held)


def dtype_of(case: Case, parameter: str) -> str:
    """The dtype short name in this parameter of the case. Raises Unsupported for one these kernels do not take."""
    name = case.text(parameter)
    if name not in ("bf16", "fp16", "fp32"):
        raise Unsupported("dtype", f"{parameter}={name}: these kernels take bf16, fp16 and fp32")
    return name


def quantize(case: Case, variant: str, device: Device) -> Kernel:
    """KernelFactory of ``fp4_quantize``. Raises Unsupported as ``formats.format_of`` and ``require_simulable`` do."""
    fmt = format_of(case)
    require_simulable(case, device)
    return QuantizeKernel(fmt, case.text("fmt"), dtype_of(case, "w"), case.axis("n"), case.axis("k"), device)


def dequantize(case: Case, variant: str, device: Device) -> Kernel:
    """KernelFactory of ``fp4_dequantize``. Raises Unsupported as ``formats.format_of`` and ``require_simulable`` do."""
    fmt = format_of(case)
    require_simulable(case, device)
    return DequantizeKernel(fmt, dtype_of(case, "y"), case.axis("n"), case.axis("k"), device)
