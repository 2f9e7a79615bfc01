"""Factory of ``attention`` (forward)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vbench.backend import Device, Kernel, Launch, refuse_beyond
from vbench.errors import Unsupported
from vbench.kernels.numba_cuda.codec import dtype_of
from vbench.kernels.numba_cuda.formats import MAX_GRID_X
from vbench.spec import TORCH_DTYPE_NAMES, Case, Numerics

FLOAT32 = Numerics(accumulate="fp32", probabilities="fp32")
#: Multiply-adds the simulator is given at most; a launch takes it up to two seconds then.
SIMULATED_PRODUCTS = 2**13


@dataclass(frozen=True)
class AttentionKernel:
    """q [b, hq, sq, d], k and v [b, hk, sk, d] in any strides -> out like q and lse float32 [b, hq, sq], contiguous.

    ``numerics``: products and sums in float32; the softmax weights are not rounded further.
    """

    dtype: str
    causal: str
    b: int
    hq: int
    hk: int
    sq: int
    sk: int
    d: int
    device: Device
    numerics: Numerics = FLOAT32
    produces: tuple[str, ...] = ("out", "lse")
    deterministic: bool = True

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """Compiles; the launch is one kernel.

        Raises:
            Unsupported: a tensor of the wrong dtype, shape, device or alignment, an output that is not contiguous, or
                more blocks than a grid holds.
        """
        import numpy as np

        from vbench.kernels.numba_cuda import attention_kernels as programs
        from vbench.kernels.numba_cuda.bits import HELD_AS
        from vbench.kernels.numba_cuda.program import Step, array, make_launch, require_process, strided, tensor

        require_process(self.device)
        q_shape, k_shape = (self.b, self.hq, self.sq, self.d), (self.b, self.hk, self.sk, self.d)
        torch_dtype, held = TORCH_DTYPE_NAMES[self.dtype], HELD_AS[self.dtype]
        align = 4 if self.dtype == "fp32" else 2
        arrays: list[Any] = []
        strides: list[int] = []
        for name, shape in (("q", q_shape), ("k", k_shape), ("v", k_shape)):
            values, steps = strided(inputs, name, torch_dtype, shape, self.device, align, held)
            arrays.append(values)
            strides.extend(steps)
        arrays.append(array(tensor(out, "out", torch_dtype, q_shape, self.device, align), held))
        arrays.append(array(tensor(out, "lse", "float32", q_shape[:3], self.device, align=4), "float32"))
        columns = programs.columns_of(self.d)
        blocks = self.b * self.hq * -(-self.sq // (programs.TY * programs.rows_of(columns)))
        if blocks > MAX_GRID_X:
            raise Unsupported("too_large", f"{blocks} blocks of queries: a grid has at most {MAX_GRID_X}")
        shift = self.sk - self.sq if self.causal == "bottom_right" else 0
        sizes = (self.hq, self.hq // self.hk, self.sq, self.sk, self.d, shift)
        program = programs.forward(self.dtype, columns, self.causal != "none")
        arguments = (*arrays, *sizes, np.float32(self.d**-0.5), *strides)
        return make_launch([Step(program, (blocks, 1), arguments)])


#: Parameters of a case that this kernel takes; it has neither windows nor capped scores.
PARAMETERS = ("dtype", "causal", "dist", "layout", "b", "hq", "hk", "sq", "sk", "d")


def attention(case: Case, variant: str, device: Device) -> Kernel:
    """KernelFactory of ``attention``.

    Raises:
        Unsupported: ``parameter_not_taken``; a zero size, query heads no multiple of key heads, a head dim above 256,
            an unknown dtype or mask, or, on the CPU, more work than the simulator does in seconds.
    """
    refuse_beyond(case, PARAMETERS)
    sizes = {name: case.axis(name) for name in ("b", "hq", "hk", "sq", "sk", "d")}
    for name, size in sizes.items():
        if size == 0:
            raise Unsupported("zero_size", f"{name}=0: attention over nothing has no value; skip the call instead")
    if sizes["hq"] % sizes["hk"]:
        raise Unsupported("heads_not_multiple", f"hq={sizes['hq']} must be a multiple of hk={sizes['hk']}")
    if sizes["d"] > 256:
        raise Unsupported("head_dim_above_256", f"d={sizes['d']}: its sums would not fit the registers")
    causal = case.text("causal")
    if causal not in ("none", "top_left", "bottom_right"):
        raise Unsupported("mask", f"causal={causal}: this kernel knows none, top_left and bottom_right")
    products = 2 * sizes["b"] * sizes["hq"] * sizes["sq"] * sizes["sk"] * sizes["d"]
    if device == "cpu" and products > SIMULATED_PRODUCTS:
        raise Unsupported(
            "too_large_for_simulator",
            f"{products} products: the simulator takes {SIMULATED_PRODUCTS}; check this case on a GPU",
        )
    b, hq, hk, sq, sk, d = sizes.values()
    return AttentionKernel(dtype_of(case, "dtype"), causal, b, hq, hk, sq, sk, d, device)
