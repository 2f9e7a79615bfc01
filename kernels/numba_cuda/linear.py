"""Factory of ``fp4_linear``, and the choice between its kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vbench.backend import Device, Kernel, Launch
from vbench.errors import Unsupported
from vbench.kernels.numba_cuda.codec import dtype_of, packed_arrays
from vbench.kernels.numba_cuda.formats import MAX_GRID_Y, Format, format_of, require_simulable
from vbench.spec import TORCH_DTYPE_NAMES, Case, Numerics

if TYPE_CHECKING:
    from vbench.kernels.numba_cuda.program import Program

#: More tokens than this go to the tiled kernel: two passes of gemv over the weight, the second from L2 where it fits.
GEMV_MAX_TOKENS = 16


@dataclass(frozen=True)
class LinearKernel:
    """x [m, k], packed weight [n, k] and bias [n] or none -> y [m, n] in x's dtype; fp32 sums, one final rounding.

    ``numerics``: the weight and x are exact in float32 except absmax7_g128 and nf4, where a table value times its
    float32 group scale is rounded to float32.
    """

    fmt: Format
    dtype: str
    act: str
    bias: bool
    m: int
    n: int
    k: int
    device: Device
    numerics: Numerics
    produces: tuple[str, ...] = ("y",)
    deterministic: bool = True

    def choose(self, codes_aligned: bool) -> tuple[Program, tuple[int, int]]:
        """The kernel for this case and its grid: by m, by k and by whether the codes start at a multiple of 16 bytes.

        Raises:
            Unsupported: more tokens than a grid holds.
        """
        from vbench.kernels.numba_cuda import linear_kernels as programs

        m, n = self.m, self.n
        config = (self.fmt.name, self.dtype, self.act, self.bias)
        if m > GEMV_MAX_TOKENS:
            program = programs.tiled(*config)
            grid = (-(-n // programs.BLOCK_N), -(-m // programs.BLOCK_M))
        else:
            tokens = next((t for t in programs.TOKEN_COUNTS if t >= m), programs.TOKEN_COUNTS[-1])
            if codes_aligned and self.k % programs.SPAN == 0:
                program = programs.gemv_words(*config, tokens)
                rows_a_block = programs.WARPS * programs.ROWS
            else:
                program = programs.gemv_bytes(*config, tokens)
                rows_a_block = programs.WARPS
            grid = (-(-n // rows_a_block), -(-m // tokens))
        if grid[1] > MAX_GRID_Y:
            raise Unsupported("too_large", f"m={m}: more than {MAX_GRID_Y} blocks along the tokens")
        return program, grid

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """Chooses the kernel and compiles it; the launch is that one kernel.

        Raises:
            Unsupported: a tensor of the wrong dtype, shape, device or layout, or more tokens than a grid holds.
        """
        from vbench.kernels.numba_cuda.bits import HELD_AS
        from vbench.kernels.numba_cuda.program import Step, array, make_launch, require_process, tensor

        require_process(self.device)
        m, n, k, device = self.m, self.n, self.k, self.device
        torch_dtype, held = TORCH_DTYPE_NAMES[self.dtype], HELD_AS[self.dtype]
        align = 4 if self.dtype == "fp32" else 2
        x = array(tensor(inputs, "x", torch_dtype, (m, k), device, align), held)
        y = array(tensor(out, "y", torch_dtype, (m, n), device, align), held)
        # Without a bias the parameter is still there and never read; y stands in, being of the right type.
        bias = array(tensor(inputs, "bias", torch_dtype, (n,), device, align), held) if self.bias else y
        # 16-byte loads need every row of codes to start at a multiple of 16 bytes.
        codes = tensor(inputs, "codes", "uint8", (n, k // 2), device)
        program, grid = self.choose(codes_aligned=codes.data_ptr() % 16 == 0)
        held_codes = program.arguments[1].partition("[")[0]
        packed = packed_arrays(self.fmt, inputs, n, k, device, held_codes)
        return make_launch([Step(program, grid, (x, *packed, bias, y, m, n, k))])


def linear(case: Case, variant: str, device: Device) -> Kernel:
    """KernelFactory of ``fp4_linear``.

    Raises:
        Unsupported: m = 0, an unknown activation, or as ``formats.format_of`` and ``require_simulable``.
    """
    fmt = format_of(case)
    m, act = case.axis("m"), case.text("act")
    if m == 0:
        raise Unsupported("zero_size", "m=0: no tokens; skip the call instead")
    if act not in ("none", "relu", "gelu", "silu"):
        raise Unsupported("activation", f"act={act}: these kernels know none, relu, gelu and silu")
    require_simulable(case, device, products=m * case.axis("n") * case.axis("k"))
    group_of_float32 = fmt.scaling == "group" and fmt.scale == "fp32"
    numerics = Numerics(accumulate="fp32", operand_roundings=("fp32",) if group_of_float32 else ())
    bias = case.axis("bias") == 1
    return LinearKernel(fmt, dtype_of(case, "x"), act, bias, m, case.axis("n"), case.axis("k"), device, numerics)
