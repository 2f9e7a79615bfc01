"""decoder_block out of this package's own kernels: FP4 linear layers, attention forward, and the glue between them.

Every layer and the attention are made by their own factories, so that each runs by the path its table names for its
shape, and refuses what it does not take. One launch runs them all on one stream; nothing synchronises, so a CUDA graph
captures it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton

from vbench.backend import Device, Kernel, Launch
from vbench.errors import Unsupported
from vbench.kernels.triton import attention, linear
from vbench.kernels.triton.block_kernels import add_kernel, add_norm_kernel, gate_kernel, rotate_kernel
from vbench.kernels.triton.packing import GROUPS
from vbench.kernels.triton.probe import INTERPRETED, check_device
from vbench.spec import TORCH_DTYPE_NAMES, Case, Numerics, ParamValue

EPS = 1e-5
#: Elements a program of the elementwise kernels takes.
ELEMENTS = 2048
ELEMENT_WARPS = 8
ROTATE_WARPS = 1
FIELDS = ("codes", "scale", "global_scale")


def norm_warps(block: int) -> int:
    """Warps of a norm whose row is padded to ``block`` elements."""
    return 4 if block <= 2048 else 8


def choose_attention(case: Case, device: Device) -> tuple[str, Kernel]:
    """The Hopper kernel where it takes the case, which only its own capability check decides; else the plain one.

    Here heads of 64 or 128 elements lie in rows of whole heads, so that the Hopper kernel's demands on strides hold.
    """
    try:
        return "gluon", attention.make(case, "gluon", device)
    except Unsupported:
        return "", attention.make(case, "", device)


class BlockKernel:
    """decoder_block of one case.

    Attributes:
        attention_variant: which attention kernel was taken.
        numerics: the sums of the coarsest linear layer, softmax weights in dtype x, and one rounding to dtype x of each
            tensor between two steps.
    """

    produces = ("y",)
    deterministic = True

    def __init__(self, case: Case, device: Device) -> None:
        self.device: Device = device
        self.case, self.x = case, case.text("x")
        self.gpt2 = case.text("family") == "gpt2"
        self.tokens = case.axis("b") * case.axis("s")
        hidden, hq, hk, inner = (case.axis(name) for name in ("hidden", "hq", "hk", "inner"))
        self.hidden, self.hq, self.hk, self.inner, self.d = hidden, hq, hk, inner, hidden // hq
        kv = hk * self.d
        shapes = (
            {
                "c_attn": (3 * hidden, hidden),
                "c_proj": (hidden, hidden),
                "mlp_c_fc": (inner, hidden),
                "mlp_c_proj": (hidden, inner),
            }
            if self.gpt2
            else {
                "q_proj": (hidden, hidden),
                "k_proj": (kv, hidden),
                "v_proj": (kv, hidden),
                "o_proj": (hidden, hidden),
                "gate_proj": (inner, hidden),
                "up_proj": (inner, hidden),
                "down_proj": (hidden, inner),
            }
        )
        self.linears = {name: linear.make(self._linear_case(*shape), "", device) for name, shape in shapes.items()}
        self.attention_variant, self.attention = choose_attention(self._attention_case(), device)
        roundings = max((k.numerics.operand_roundings for k in self.linears.values()), key=len)
        accumulate = "fp32" if INTERPRETED or self.x == "fp32" else "tensor_core"
        self.numerics = Numerics(accumulate, roundings, probabilities=self.x, stores=(self.x,))

    def _linear_case(self, n: int, k: int) -> Case:
        values: dict[str, ParamValue] = {"fmt": self.case.text("fmt"), "x": self.x, "act": "none"}
        values |= {"bias": int(self.gpt2), "dist": "normal", "m": self.tokens, "n": n, "k": k}
        return Case("fp4_linear", tuple(values.items()))

    def _attention_case(self) -> Case:
        b, s = self.case.axis("b"), self.case.axis("s")
        values: dict[str, ParamValue] = {"dtype": self.x, "causal": "top_left", "dist": "normal", "b": b}
        values |= {"hq": self.hq, "hk": self.hk, "sq": s, "sk": s, "d": self.d}
        return Case("attention", tuple(values.items()))

    def bind(self, inputs: Mapping[str, Any], out: Mapping[str, Any]) -> Launch:
        """The block's tensors as the op names them. Writes y [b s, hidden].

        Packs every weight into its kernel's layout and allocates what lies between the steps; the launch owns that
        scratch, so it must not run on two streams at once.

        Raises:
            Unsupported: ``wrong_device``, ``x_shape``, ``x_dtype``, ``not_contiguous``, and what the linear layers and
                the attention refuse.
        """
        x, y = inputs["x"], out["y"]
        dtype = getattr(torch, TORCH_DTYPE_NAMES[self.x])
        names = [f"{norm}.{field}" for norm in ("norm_1", "norm_2") for field in ("weight", "bias")[: 1 + self.gpt2]]
        wanted: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"x": ((self.tokens, self.hidden), dtype)}
        wanted |= dict.fromkeys(names, ((self.hidden,), dtype))
        if not self.gpt2:
            wanted |= {name: ((self.case.axis("s"), self.d // 2), torch.float32) for name in ("cos", "sin")}
        for name, (shape, kind) in wanted.items():
            t = inputs[name]
            if t.device.type != self.device:
                raise Unsupported("wrong_device", f"{name} is on {t.device}, the kernel was made for {self.device}")
            if tuple(t.shape) != shape:
                raise Unsupported("x_shape", f"{name} is {tuple(t.shape)}, the case says {shape}")
            if t.dtype != kind:
                raise Unsupported("x_dtype", f"{name} is {t.dtype}, this block takes {kind}")
            if not t.is_contiguous():
                raise Unsupported("not_contiguous", f"{name} must be contiguous; call .contiguous()")

        def scratch(width: int) -> Any:
            return torch.empty(self.tokens, width, dtype=dtype, device=x.device)

        normed, attended, r, last = (scratch(self.hidden) for _ in range(4))
        steps: list[Callable[[], object]] = [self._norm(inputs, "norm_1", x, None, None, normed)]
        if self.gpt2:
            fused = scratch(3 * self.hidden)
            steps.append(self._linear(inputs, "c_attn", normed, fused))
            q, k, v = (fused[:, i * self.hidden : (i + 1) * self.hidden] for i in range(3))
        else:
            q, k, v = scratch(self.hidden), scratch(self.hk * self.d), scratch(self.hk * self.d)
            for name, target in (("q_proj", q), ("k_proj", k), ("v_proj", v)):
                steps.append(self._linear(inputs, name, normed, target))
            steps += [self._rotate(inputs, q, self.hq), self._rotate(inputs, k, self.hk)]
        steps.append(self._attend(q, k, v, attended))
        steps.append(self._linear(inputs, "c_proj" if self.gpt2 else "o_proj", attended, last))
        steps.append(self._norm(inputs, "norm_2", x, last, r, normed))
        wide = scratch(self.inner)
        if self.gpt2:
            gate, up = scratch(self.inner), None
            steps.append(self._linear(inputs, "mlp_c_fc", normed, gate))
        else:
            gate, up = scratch(self.inner), scratch(self.inner)
            steps.append(self._linear(inputs, "gate_proj", normed, gate))
            steps.append(self._linear(inputs, "up_proj", normed, up))
        steps.append(self._gate(gate, up, wide))
        steps.append(self._linear(inputs, "mlp_c_proj" if self.gpt2 else "down_proj", wide, last))
        steps.append(self._add(r, last, y))

        def launch() -> None:
            for step in steps:
                step()

        return launch

    # -- steps -------------------------------------------------------------------------------------------------------

    def _stored(self, t: Any) -> Any:
        return t.view(torch.int16) if INTERPRETED and self.x == "bf16" else t

    def _linear(self, inputs: Mapping[str, Any], name: str, x: Any, y: Any) -> Launch:
        weight = {field: inputs[f"{name}.{field}"] for field in FIELDS}
        if self.gpt2:
            weight["bias"] = inputs[f"{name}.bias"]
        return self.linears[name].bind({"x": x, **weight}, {"y": y})

    def _attend(self, q: Any, k: Any, v: Any, out: Any) -> Launch:
        b, s = self.case.axis("b"), self.case.axis("s")

        def heads(t: Any, count: int) -> Any:
            return t.unflatten(0, (b, s)).unflatten(2, (count, self.d)).transpose(1, 2)

        lse = torch.empty(b, self.hq, s, dtype=torch.float32, device=out.device)
        tensors = {"q": heads(q, self.hq), "k": heads(k, self.hk), "v": heads(v, self.hk)}
        return self.attention.bind(tensors, {"out": heads(out, self.hq), "lse": lse})

    def _norm(self, inputs: Mapping[str, Any], name: str, x: Any, branch: Any, total: Any, y: Any) -> Launch:
        gain = inputs[f"{name}.weight"]
        shift = inputs[f"{name}.bias"] if self.gpt2 else gain
        block = triton.next_power_of_2(self.hidden)
        add = branch is not None
        arguments = (x, branch if add else x, self._stored(total) if add else x, gain, shift, self._stored(y))

        def launch() -> None:
            add_norm_kernel[(self.tokens,)](
                *arguments, self.hidden, EPS,
                ADD=add, CENTRED=self.gpt2, X=self.x, NATIVE=not INTERPRETED, BLOCK=block,
                num_warps=norm_warps(block),
            )  # fmt: skip

        return launch

    def _rotate(self, inputs: Mapping[str, Any], t: Any, heads: int) -> Launch:
        cos, sin, half = inputs["cos"], inputs["sin"], self.d // 2
        stored = self._stored(t)

        def launch() -> None:
            rotate_kernel[(self.tokens, heads)](
                t, stored, cos, sin, self.case.axis("s"), heads, half,
                X=self.x, NATIVE=not INTERPRETED, BLOCK=triton.next_power_of_2(half), num_warps=ROTATE_WARPS,
            )  # fmt: skip

        return launch

    def _gate(self, gate: Any, up: Any, y: Any) -> Launch:
        count, gated = gate.numel(), up is not None
        block = min(ELEMENTS, triton.next_power_of_2(count))
        arguments = (gate, up if gated else gate, self._stored(y), count)

        def launch() -> None:
            gate_kernel[(triton.cdiv(count, block),)](
                *arguments, GATED=gated, X=self.x, NATIVE=not INTERPRETED, BLOCK=block, num_warps=ELEMENT_WARPS
            )

        return launch

    def _add(self, a: Any, b: Any, y: Any) -> Launch:
        count, stored = a.numel(), self._stored(y)
        block = min(ELEMENTS, triton.next_power_of_2(count))

        def launch() -> None:
            add_kernel[(triton.cdiv(count, block),)](
                a, b, stored, count, X=self.x, NATIVE=not INTERPRETED, BLOCK=block, num_warps=ELEMENT_WARPS
            )

        return launch


def make(case: Case, variant: str, device: Device) -> BlockKernel:
    """Factory of decoder_block.

    Raises:
        Unsupported: ``unknown_variant``; ``dense_weights``; ``format``; ``too_wide``; what the factories of the linear
            layers and of the attention refuse; and ``probe.check_device``'s.
    """
    if variant:
        raise Unsupported("unknown_variant", f"decoder_block has no variant {variant!r}; leave it out")
    check_device(device)
    if case.text("fmt") == "dense":
        raise Unsupported("dense_weights", "these kernels multiply 4-bit weights; take torch_native for dense ones")
    if case.text("fmt") not in GROUPS:
        raise Unsupported("format", f"fmt={case.text('fmt')}: these kernels know {', '.join(GROUPS)}")
    if case.axis("hidden") > 65536:
        raise Unsupported("too_wide", f"hidden={case.axis('hidden')}: a row of a norm must fit one program's registers")
    return BlockKernel(case, device)
