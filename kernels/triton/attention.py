"""Attention forward of backend ``triton``: capability checks, then one launch. See attention_forward.py for the kernel.

Imports no torch and no Triton at the top, so that listing what a kernel takes stays cheap.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vbench.backend import Device, Kernel, Launch, refuse_beyond
from vbench.errors import Unsupported
from vbench.kernels.triton.attention_tiles import (
    INTERPRETED,
    L2_WORKING_SET_BYTES,
    Tile,
    choose,
    heads_per_group,
    padded_head_dim,
)
from vbench.spec import TORCH_DTYPE_NAMES, Case, Numerics

VARIANTS = ("", "gluon")
#: Parameters of a case that the Gluon kernels take, and those that the plain ones take.
GLUON_PARAMETERS = ("dtype", "causal", "dist", "layout", "dlse", "b", "hq", "hk", "sq", "sk", "d")
PLAIN_PARAMETERS = (*GLUON_PARAMETERS, "window", "softcap")
MAX_HEAD_DIM = 256
#: Largest offset, in elements, inside one block of rows.
MAX_BLOCK_SPAN = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Shape:
    """A case, read: ``b`` batch, ``hq`` query heads, ``hk`` key heads, ``sq`` queries, ``sk`` keys, ``d`` head dim."""

    b: int
    hq: int
    hk: int
    sq: int
    sk: int
    d: int
    dtype: str
    causal: str
    window: int = 0
    softcap: int = 0

    @classmethod
    def of(cls, case: Case) -> Shape:
        """Read a case of op ``attention``.

        Raises:
            Unsupported: ``zero_size``, ``heads_not_multiple`` (no meaning for any kernel), ``head_dim_above_256``.
        """
        axes = {name: case.axis(name) for name in ("b", "hq", "hk", "sq", "sk", "d")}
        for name, size in axes.items():
            if size == 0:
                raise Unsupported("zero_size", f"{name}=0: nothing to attend with; skip the call instead")
        if axes["hq"] % axes["hk"]:
            raise Unsupported("heads_not_multiple", f"hq={axes['hq']} must be a multiple of hk={axes['hk']}")
        if axes["d"] > MAX_HEAD_DIM:
            raise Unsupported("head_dim_above_256", f"d={axes['d']}: its accumulator would not fit the registers")
        given = dict(case.params)
        rule = {name: int(given.get(name, 0)) for name in ("window", "softcap")}
        return cls(**axes, **rule, dtype=case.text("dtype"), causal=case.text("causal"))

    @property
    def shift(self) -> int:
        """Row i sees keys j <= i + shift when causal."""
        return self.sk - self.sq if self.causal == "bottom_right" else 0

    @property
    def above(self) -> int:
        """Row i sees keys j <= i + above where ``bounded``."""
        return self.shift if self.causal != "none" else self.window - 1

    @property
    def below(self) -> int:
        """Row i sees keys j >= i - below where there is a window."""
        return self.window - 1 - self.shift

    @property
    def bounded(self) -> bool:
        return self.causal != "none" or self.window > 0

    @property
    def exponent_scale(self) -> float:
        """log2(e) / sqrt(d): weights are powers of two of scaled scores."""
        return math.log2(math.e) / math.sqrt(self.d)

    @property
    def cap_exponent(self) -> float:
        """2 log2(e) / (sqrt(d) cap), of which the tanh of a product is made; 0 without a cap."""
        return 2 * self.exponent_scale / self.softcap if self.softcap else 0.0

    @property
    def tanh_scale(self) -> float:
        """log2(e) times the cap: what an exponent is of a capped score's tanh; without a cap ``exponent_scale``."""
        return self.softcap * math.log2(math.e) if self.softcap else self.exponent_scale


def check_tensors(shape: Shape, inputs: Mapping[str, Any], out: Mapping[str, Any], device: Device) -> None:
    """Refuse what would read or write out of bounds or silently convert.

    Args:
        inputs: ``q`` [b, hq, sq, d], ``k`` and ``v`` [b, hk, sk, d] of the case's dtype, any strides.
        out: ``out`` like ``q``, ``lse`` float32 [b, hq, sq], any strides that do not overlap.

    Raises:
        Unsupported: ``wrong_shape``, ``wrong_dtype``, ``wrong_device``, ``overlapping_output``.
    """
    check_all(shape, inputs, {"q": "q", "k": "k", "v": "k"}, device)
    check_all(shape, out, {"out": "q", "lse": "row"}, device, outputs=True)
    if out["out"].device != inputs["q"].device:
        raise Unsupported("wrong_device", f"out is on {out['out'].device}, q on {inputs['q'].device}; move one")


def check_all(
    shape: Shape, tensors: Mapping[str, Any], kinds: Mapping[str, str], device: Device, *, outputs: bool = False
) -> None:
    """Shape, dtype and device of each tensor named in ``kinds``; for outputs also that no two elements coincide.

    Args:
        kinds: name -> ``q`` ([b, hq, sq, d]) or ``k`` ([b, hk, sk, d]), both of the case's dtype, or ``row``
            ([b, hq, sq], float32).

    Raises:
        Unsupported: ``wrong_shape``, ``wrong_dtype``, ``wrong_device``, ``overlapping_output``.
    """
    of_q = (shape.b, shape.hq, shape.sq, shape.d)
    shapes = {"q": of_q, "k": (shape.b, shape.hk, shape.sk, shape.d), "row": of_q[:3]}
    first = tensors[next(iter(kinds))].device
    for name, kind in kinds.items():
        tensor, want = tensors[name], shapes[kind]
        dtype = "float32" if kind == "row" else TORCH_DTYPE_NAMES[shape.dtype]
        if tuple(tensor.shape) != want:
            raise Unsupported("wrong_shape", f"{name} has shape {tuple(tensor.shape)}, the case needs {want}")
        if str(tensor.dtype) != f"torch.{dtype}":
            raise Unsupported("wrong_dtype", f"{name} is {tensor.dtype}, the case needs torch.{dtype}; convert it")
        if tensor.device != first or tensor.device.type != device:
            raise Unsupported("wrong_device", f"{name} is on {tensor.device}; all must be on one {device} device")
        strides = tensor.stride()
        if outputs and any(size > 1 and stride == 0 for size, stride in zip(want, strides, strict=True)):
            raise Unsupported("overlapping_output", f"{name} has strides {strides}: two elements share an address")


def takes_descriptor(tensor: Any) -> bool:
    """Can the bulk tensor copy engine read this [b, h, s, d] tensor in place?

    CUDA driver API, cuTensorMapEncodeTiled: base and every stride but the last multiples of 16 bytes, last stride 1.
    """
    item = tensor.element_size()
    outer = [stride for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if size > 1]
    return (
        tensor.data_ptr() % 16 == 0
        and tensor.stride(-1) == 1
        and (tensor.shape[-1] * item) % 16 == 0
        and all(stride > 0 and stride * item % 16 == 0 for stride in outer)
    )


def descriptor_strides(tensor: Any) -> list[int]:
    """Strides in elements; an axis of one element, whose stride is arbitrary and never used, gets one that is legal."""
    return [
        stride if size > 1 or axis == 3 else tensor.shape[-1]
        for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True))
    ]


def check_spans(tensors: Mapping[str, Any], block_rows: int, width: int, *, walked: tuple[str, ...]) -> None:
    """Offsets inside a block are 32-bit: ``block_rows`` rows of the tensors ``walked``, one row of the others.

    Args:
        width: columns of a block.

    Raises:
        Unsupported: ``block_span``.
    """
    for name, tensor in tensors.items():
        rows = block_rows if name in walked else 1
        span = rows * tensor.stride(2) + width * tensor.stride(3)
        if span > MAX_BLOCK_SPAN:
            raise Unsupported("block_span", f"{name}: {rows} rows of {width} span {span} elements; make it contiguous")


def block_source(tensor: Any, block_rows: int, width: int, descriptors: bool) -> Any:
    """What ``attention_forward._load_block`` reads blocks from: the tensor, or a descriptor of it."""
    if not descriptors:
        return tensor
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(tensor, list(tensor.shape), descriptor_strides(tensor), [1, 1, block_rows, width])


@dataclass(frozen=True)
class PlainForward:
    """The plain Triton kernel for one case. See ``vbench.backend.Kernel``.

    ``copy_engine``: the GPU has the bulk tensor copy engine and 227 KB of shared memory for a program.
    """

    shape: Shape
    device: Device
    interpreted: bool
    copy_engine: bool
    numerics: Numerics
    produces: tuple[str, ...] = ("out", "lse")
    deterministic: bool = True
    #: Tile and path follow from lengths, head dim, mask and strides, not from the number of heads or batch elements.
    batch_invariant: bool = True

    def plan(self, k: Any, v: Any) -> tuple[Tile, bool]:
        """The tile, and whether K and V come through tensor descriptors."""
        descriptors = self.copy_engine and self.shape.dtype != "fp32" and takes_descriptor(k) and takes_descriptor(v)
        if self.interpreted:
            return INTERPRETED, descriptors
        shape = self.shape
        tile = choose(
            shape.dtype,
            shape.d,
            shape.sq,
            shape.sk,
            causal=shape.bounded,
            descriptors=descriptors,
            shared_227kb=self.copy_engine,
        )
        return tile, descriptors

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """Bind q, k, v (any strides) to a launch that writes ``out`` and ``lse``.

        Raises:
            Unsupported: see ``check_tensors`` and ``check_spans``.
        """
        check_tensors(self.shape, inputs, out, self.device)
        tile, descriptors = self.plan(inputs["k"], inputs["v"])
        return self.bind_tile(inputs, out, tile, descriptors)

    def bind_tile(
        self,
        inputs: Mapping[str, Any],
        out: Mapping[str, Any],
        tile: Tile,
        descriptors: bool,
        l2_bytes: int = L2_WORKING_SET_BYTES,
    ) -> Launch:
        """As ``bind``, with a tile, and heads walked together, of the caller's choice (the tuner's)."""
        from vbench.kernels.triton.attention_forward import attention_forward

        shape = self.shape
        q, k, v, out_tensor, lse = inputs["q"], inputs["k"], inputs["v"], out["out"], out["lse"]
        width = padded_head_dim(shape.d)
        check_spans({"q": q, "k": k, "v": v, "out": out_tensor}, tile.block_n, width, walked=("k", "v"))
        k_source, v_source = (block_source(t, tile.block_n, width, descriptors) for t in (k, v))
        heads = shape.b * shape.hq
        per_kv = shape.hq // shape.hk
        grid = (heads * -(-shape.sq // tile.block_m),)
        group = heads_per_group(heads, per_kv, shape.sk, shape.d, q.element_size(), l2_bytes)
        sizes = (shape.hq, per_kv, shape.sq, shape.sk, shape.above, shape.below, heads, group)
        strides = (*q.stride(), *k.stride(), *v.stride(), *out_tensor.stride(), *lse.stride())
        arguments = (q, k_source, v_source, out_tensor, lse, shape.tanh_scale, shape.cap_exponent, *sizes, *strides)
        constants: dict[str, Any] = {
            "D": shape.d,
            "BLOCK_D": width,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BOUNDED": shape.bounded,
            "WINDOW": shape.window > 0,
            "SOFTCAP": shape.softcap > 0,
            "DESCRIPTORS": descriptors,
            "EMULATE": self.interpreted,
            # "ieee" keeps fp32 products exact; Triton's default would silently round operands to tf32.
            "PRECISION": "ieee" if shape.dtype == "fp32" else "tf32",
            "num_warps": tile.warps,
            "num_stages": tile.stages,
        }

        def launch() -> None:
            attention_forward[grid](*arguments, **constants)

        return launch


def make(case: Case, variant: str, device: Device) -> Kernel:
    """Kernel factory of op ``attention``.

    Args:
        variant: ``""`` plain Triton (sm_80 and later, or the interpreter on a CPU); ``"gluon"`` the warp-specialised
            Hopper kernel.

    Raises:
        Unsupported: ``unknown_variant``; ``interpreter_off`` (device cpu without TRITON_INTERPRET=1);
            ``gpu_before_sm_80``; ``parameter_not_taken``; and what ``Shape.of`` and the Gluon kernel refuse.
    """
    shape = Shape.of(case)
    if variant not in VARIANTS:
        raise Unsupported("unknown_variant", f"{variant!r} is not one of {VARIANTS}")
    if variant == "gluon":
        from vbench.kernels.triton.attention_gluon_host import make_gluon

        refuse_beyond(case, GLUON_PARAMETERS)
        return make_gluon(shape, device)
    refuse_beyond(case, PLAIN_PARAMETERS)
    interpreted, copy_engine = plain_machine(device)
    return PlainForward(shape, device, interpreted, copy_engine, plain_numerics(shape))


def plain_numerics(shape: Shape) -> Numerics:
    """Sums on the FMA units for fp32, else on the tensor core with weights rounded to the inputs' dtype."""
    return Numerics(
        accumulate="fp32" if shape.dtype == "fp32" else "tensor_core",
        probabilities=shape.dtype,
    )


def plain_machine(device: Device) -> tuple[bool, bool]:
    """(interpreted, copy engine and 227 KB of shared memory for a program) of the plain kernels here.

    Raises:
        Unsupported: ``interpreter_off``, ``gpu_before_sm_80``.
    """
    if device == "cpu":
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise Unsupported("interpreter_off", "on a CPU this kernel needs TRITON_INTERPRET=1 before Triton's import")
        # The interpreter takes descriptors too, so that path is checked there as well.
        return True, True
    import torch

    capability = torch.cuda.get_device_capability()
    if capability < (8, 0):
        raise Unsupported("gpu_before_sm_80", f"compute capability {capability}: cp.async and bf16 need 8.0")
    # sm_120 has the engine too, but not the 227 KB of shared memory that those tables count on.
    return False, capability[0] in (9, 10)
