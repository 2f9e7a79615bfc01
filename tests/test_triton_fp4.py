"""The Triton FP4 backend: codecs bit for bit, linear inside the derived budget, packing a bijection.

Runs in Triton's interpreter. What the kernels compile to is the business of suite ``compile``.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # before the first import of Triton: it decides at decoration

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from vbench.errors import Unsupported
from vbench.kernels.triton import _fp4, codec, linear, linear_gluon_host, linear_stationary_host, packing
from vbench.kernels.triton.backend import BACKEND
from vbench.reference import fp4
from vbench.reference.linear import linear_inputs, linear_oracle
from vbench.reference.ops import fp4 as ops
from vbench.reference.ops.types import ITEMSIZE
from vbench.spec import Case, Numerics

FORMATS = st.sampled_from(ops.FORMATS)
ENCODINGS = st.sampled_from(ops.ENCODINGS)
DTYPES = st.sampled_from(tuple(ITEMSIZE))
# fp16 results beyond 65504 become Inf, as in torch; NumPy warns where a GPU does not.
# So do mxfp4's largest scales.
pytestmark = [
    pytest.mark.filterwarnings("ignore:overflow encountered in (cast|multiply):RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered in (cast|multiply):RuntimeWarning"),
]

needs_interpreter = pytest.mark.skipif(
    not triton.knobs.runtime.interpret, reason="TRITON_INTERPRET=1 was not in place when Triton was first imported"
)


def fit_k(fmt: str, half: int) -> int:
    """A k that the format admits, near 2 * half."""
    group = ops.FORMAT_GROUPS[ops.decoded_as(fmt)]
    return 2 * half if group <= 0 else max(1, 2 * half // group) * group


def poisoned(expected: Any) -> torch.Tensor:
    out = torch.empty(expected.shape, dtype=expected.dtype)
    out.view(torch.uint8).fill_(0xA5)
    return out


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bitwise, but for the payload of NaN."""
    nan = b.isnan()
    return torch.equal(a.isnan(), nan) and same_bits(a.masked_fill(nan, 0), b.masked_fill(nan, 0))


def run(
    case: Case, make: Callable[..., Any], inputs: dict[str, Any], oracle: Callable[..., Any]
) -> tuple[dict[str, torch.Tensor], dict[str, Any], Any]:
    kernel = make(case, "", "cpu")
    expected = oracle(case, inputs, kernel.numerics, None)
    outputs = {name: poisoned(e) for name, e in expected.items()}
    before = {name: t.clone() for name, t in inputs.items()}
    assert kernel.bind(inputs, outputs)() is None
    for name, t in inputs.items():
        assert same_bits(t, before[name]), f"{name} was changed"
    return outputs, expected, kernel


def over_budget(y: torch.Tensor, e: Any) -> int:
    """Elements outside the oracle's word; zero means right."""
    if e.budget is None:
        return int((y != e.value).sum())
    inside = (y.double() - e.value).abs() <= e.budget
    overflowed = e.value.to(e.dtype).isinf() & (y == e.value.to(e.dtype))  # fp16: Inf beyond 65504 is right
    return int((~(inside | overflowed)).sum())


# ---------------------------------------------------------------- packing


def random_weight(fmt: str, n: int, k: int, gen: torch.Generator, wide: bool = False) -> dict[str, torch.Tensor]:
    """A canonical weight of random codes and scales, drawn without the encoder. ``wide``: any E8M0 byte but NaN."""
    group = ops.FORMAT_GROUPS[fmt]
    shape = (1,) if group == 0 else (n,) if group == -1 else (n, k // group)
    scale = torch.rand(shape, generator=gen) + 0.5
    if fmt == "nvfp4":
        scale = scale.to(torch.float8_e4m3fn)
    elif fmt == "mxfp4":
        top = 255 if wide else packing.E8M0_NARROW_MAX + 1
        scale = torch.randint(0, top, shape, generator=gen).to(torch.uint8)
    return {
        "codes": torch.randint(0, 256, (n, k // 2), generator=gen, dtype=torch.uint8),
        "scale": scale,
        "global_scale": torch.rand(1, generator=gen),
    }


@given(
    fmt=FORMATS,
    n=st.integers(1, 140),
    half=st.integers(1, 320),
    layout=st.sampled_from((("rows", 16), ("rows", 32), ("rows", 64), ("fragments", 16))),
    twiddled=st.booleans(),
    wide=st.booleans(),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60)
def test_packing_is_a_bijection(
    fmt: str, n: int, half: int, layout: tuple[packing.Order, int], twiddled: bool, wide: bool, seed: int
) -> None:
    k, (order, bkw) = fit_k(fmt, half), layout
    twiddled, wide = twiddled and fmt in packing.BYTE_SCALES, wide and fmt == "mxfp4"
    weight = random_weight(fmt, n, k, torch.Generator().manual_seed(seed), wide)
    packed = packing.pack_weight(fmt, weight, n, k, bkw, twiddled, wide, order)
    back = packing.unpack_weight(packed)
    assert all(same_bits(back[name], weight[name]) for name in weight)


def test_fragments_are_what_the_matrix_unit_s_lanes_hold() -> None:
    """PTX ISA, mma.m16n8k16, matrix A of 16-bit elements: lane 4 g + t holds rows g and g + 8, columns 2 t, 2 t + 1 and
    those plus 8. Element values that name their row and column show where each went."""
    row, column = torch.arange(32).reshape(32, 1, 1), torch.arange(8 * 16).reshape(1, 8, 16)
    fragments = packing._to_fragments(row * 128 + column)
    assert fragments.shape == (2, 2, 4, 32, 8)
    for tile, block, quarter, lane, (i, (high_column, high_row, last)) in itertools.product(
        range(2), range(2), range(4), range(32), enumerate(itertools.product(range(2), repeat=3))
    ):
        r = tile * 16 + lane // 4 + 8 * high_row
        c = (block * 4 + quarter) * 16 + 2 * (lane % 4) + last + 8 * high_column
        assert fragments[tile, block, quarter, lane, i] == r * 128 + c


def test_twiddle_is_a_bijection_of_all_words() -> None:
    assert sorted(bit for bits in packing.TWIDDLE for bit in bits) == list(range(16))
    words = torch.arange(65536, dtype=torch.int32)
    codes = torch.stack([(words >> (4 * j)) & 0xF for j in range(4)], dim=-1)
    twiddled = packing._twiddle(codes)
    assert torch.equal(torch.sort(twiddled).values, words)
    assert torch.equal(packing._untwiddle(twiddled), codes)


@pytest.mark.parametrize("fmt", ops.FORMATS)
def test_packed_memory_is_the_format_s_own(fmt: str) -> None:
    """At a real layer's shape packing adds nothing to the format's bytes but the unused global scale."""
    n, k = 256, 4096
    weight = fp4.quantize(fmt, torch.zeros(n, k))
    layouts: tuple[tuple[packing.Order, int], ...] = (("rows", 32), ("rows", 64), ("fragments", 16))
    for order, bkw in layouts:
        packed = packing.pack_weight(fmt, weight, n, k, bkw, fmt in packing.BYTE_SCALES, False, order)
        assert packed.bytes - ops.packed_bytes(fmt, n, k) in (0, 4)


# ---------------------------------------------------------------- codecs


@needs_interpreter
@given(
    fmt=ENCODINGS,
    w=DTYPES,
    dist=st.sampled_from(("normal", "uniform", "student5", "grid", "zeros", "outlier")),
    n=st.integers(1, 70),
    half=st.integers(1, 200),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=40)
def test_quantize_and_dequantize_are_bit_exact(fmt: str, w: str, dist: str, n: int, half: int, seed: int) -> None:
    k = fit_k(fmt, half)
    case = ops.FP4_QUANTIZE.case(fmt=fmt, w=w, dist=dist, n=n, k=k, seed=seed)
    outputs, expected, _ = run(case, codec.make_quantize, fp4.quantize_inputs(case, "cpu"), fp4.quantize_oracle)
    for name, out in outputs.items():
        assert same_bits(out, expected[name].value), name
    case = ops.FP4_DEQUANTIZE.case(fmt=ops.decoded_as(fmt), y=w, dist=dist, n=n, k=k, seed=seed)
    inputs = fp4.dequantize_inputs(case, "cpu")
    outputs, expected, _ = run(case, codec.make_dequantize, inputs, fp4.dequantize_oracle)
    assert same_values(outputs["weight"], expected["weight"].value)


@needs_interpreter
@pytest.mark.parametrize("fmt", ["absmax7_row", "nvfp4"])
def test_every_tie_and_its_neighbours_round_as_the_format_says(fmt: str) -> None:
    top = 6.0 if fmt == "nvfp4" else 7.0
    ties = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0) if fmt == "nvfp4" else tuple(i + 0.5 for i in range(7))
    values = [0.0, -0.0, top, -top]
    for tie in ties:
        for v in (np.nextafter(np.float32(tie), np.float32(0)), tie, np.nextafter(np.float32(tie), np.float32(9))):
            values += [float(v), -float(v)]
    row = torch.tensor(values + [top] * (-len(values) % 128), dtype=torch.float32)
    row[::16] = top  # every block's largest value, so that its scale is 1 (nvfp4: over the global one)
    w = torch.stack([row, row.flip(0)])
    inputs = {"w": w}
    case = ops.FP4_QUANTIZE.case(fmt=fmt, w="fp32", n=2, k=int(row.numel()))
    outputs, expected, _ = run(case, codec.make_quantize, inputs, fp4.quantize_oracle)
    assert all(same_bits(outputs[name], e.value) for name, e in expected.items())


@needs_interpreter
def test_e4m3_decodes_every_byte() -> None:
    """All 16 codes under all 256 scale bytes but the NaNs, through the decoder."""
    scale_bytes = torch.tensor([b for b in range(256) if b & 0x7F != 0x7F], dtype=torch.uint8).reshape(-1, 1)
    n = scale_bytes.shape[0]
    weight = {
        "codes": fp4.pack(torch.arange(16, dtype=torch.uint8).repeat(n, 1)),
        "scale": scale_bytes[:, :1].view(torch.float8_e4m3fn),
        "global_scale": torch.full((1,), 0.37),
    }
    out = torch.empty(n, 16)
    codec.decode_launcher("nvfp4", "fp32", weight, out, n, 16)()
    assert same_bits(out, fp4.dequantize("nvfp4", weight, torch.float32))


# ---------------------------------------------------------------- linear


@needs_interpreter
@given(
    fmt=FORMATS,
    x=DTYPES,
    act=st.sampled_from(("none", "relu", "gelu", "silu")),
    bias=st.integers(0, 1),
    dist=st.sampled_from(("normal", "student5", "grid", "grid", "outlier")),
    m=st.sampled_from((1, 2, 7, 8, 9, 16, 31, 65)),
    n=st.integers(1, 140),
    half=st.integers(1, 300),
    seed=st.integers(0, 2**20),
)
@settings(max_examples=30)
def test_linear_is_inside_its_budget(
    fmt: str, x: str, act: str, bias: int, dist: str, m: int, n: int, half: int, seed: int
) -> None:
    case = ops.FP4_LINEAR.case(fmt=fmt, x=x, act=act, bias=bias, dist=dist, m=m, n=n, k=fit_k(fmt, half), seed=seed)
    outputs, expected, _ = run(case, linear.make, linear_inputs(case, "cpu"), linear_oracle)
    assert over_budget(outputs["y"], expected["y"]) == 0


@needs_interpreter
@pytest.mark.parametrize("fmt", ops.FORMATS)
def test_split_k_and_one_hot_rows_give_decoded_columns(fmt: str) -> None:
    """x = e_i picks a column of the decoded weight: nibble order, scale index, tile and K-tail errors all show.

    k is deep enough for split-K to be planned, so the ticketed reduction runs too.
    """
    n, k, dtype = 40, 2304, torch.float16
    case = ops.FP4_LINEAR.case(fmt=fmt, x="fp16", dist="grid", m=24, n=n, k=k)
    inputs = linear_inputs(case, "cpu")
    picks = torch.cat([torch.tensor([0, 1, 15, 16, 63, 64, 127, 128, 255, 256, k - 1]), torch.randperm(k)[:13]])
    inputs["x"] = torch.nn.functional.one_hot(picks, k).to(dtype)
    kernel = linear.make(case, "", "cpu")
    assert kernel.plan.split > 1
    y = torch.full((24, n), float("nan"), dtype=dtype)
    launch = kernel.bind(inputs, {"y": y})
    launch()
    want = fp4.decode_float64(fmt, inputs).T[picks].to(dtype)
    assert torch.equal(y, want)
    first = y.clone()
    y.fill_(float("nan"))
    launch()  # the tickets were left at zero
    assert same_bits(first, y)


@needs_interpreter
@pytest.mark.parametrize("fmt", ops.FORMATS)
def test_one_program_walking_all_parts_gives_the_bits_of_split_k(fmt: str) -> None:
    """Batch invariance between kernels rests on it. Five or three blocks, so that a last part is shorter."""
    for k, split in ((1280, 2), (1280, 4), (768, 2)):
        case = ops.FP4_LINEAR.case(fmt=fmt, x="bf16", act="gelu", bias=1, m=9, n=40, k=k)
        inputs = linear_inputs(case, "cpu")
        chosen = linear.make(case, "", "cpu").plan
        results = []
        for walk in (False, True):
            y = torch.full((9, 40), float("nan"), dtype=torch.bfloat16)
            plan = dataclasses.replace(chosen, split=split, walk=walk)
            linear.LinearKernel(case, "cpu", plan).bind(inputs, {"y": y})()
            results.append(y)
        assert same_bits(*results)


@needs_interpreter
@given(fmt=FORMATS, fault=st.sampled_from(("swap_nibbles", "drop_tail", "shift_scales", "zeros", "half")))
@settings(max_examples=20)
def test_control_wrong_weights_and_outputs_are_caught(fmt: str, fault: str) -> None:
    """The same check must fail a kernel that reads the weight wrongly: the gate above can trip."""
    m, n, k = 4, 64, 512
    case = ops.FP4_LINEAR.case(fmt=fmt, x="bf16", m=m, n=n, k=k)
    inputs = linear_inputs(case, "cpu")
    expected = linear_oracle(case, inputs, Numerics("fp32"), None)["y"]
    broken = {name: t.clone() for name, t in inputs.items()}
    if fault == "swap_nibbles":
        broken["codes"] = (broken["codes"] >> 4) | (broken["codes"] << 4)
    elif fault == "drop_tail":
        broken["codes"][:, -32:] = packing.ZERO_CODE[fmt] * 0x11
    elif fault == "shift_scales":
        if broken["scale"].numel() == 1:
            broken["scale"] = broken["scale"] * (1 + 2.0**-6)
        else:
            rolled = broken["scale"].view(torch.uint8) if fmt == "nvfp4" else broken["scale"]
            rolled = torch.roll(rolled, 1, 0)
            broken["scale"] = rolled.view(torch.float8_e4m3fn) if fmt == "nvfp4" else rolled
    y = torch.full((m, n), float("nan"), dtype=torch.bfloat16)
    linear.make(case, "", "cpu").bind(broken, {"y": y})()
    if fault == "zeros":
        y.zero_()
    elif fault == "half":
        y.mul_(0.5)
    assert over_budget(y, expected) > m * n // 10


@needs_interpreter
def test_strided_x_and_y() -> None:
    case = ops.FP4_LINEAR.case(fmt="absmax7_row", x="fp16", dist="grid", m=5, n=33, k=130)
    inputs = linear_inputs(case, "cpu")
    expected = linear_oracle(case, inputs, Numerics("fp32"), None)["y"]
    wide = torch.full((5, 200), float("nan"), dtype=torch.float16)
    wide[:, 3:133] = inputs["x"]
    inputs["x"] = wide[:, 3:133]
    y = torch.full((5, 40), 77.0, dtype=torch.float16)
    linear.make(case, "", "cpu").bind(inputs, {"y": y[:, :33]})()
    assert torch.equal(y[:, :33], expected.value) and bool((y[:, 33:] == 77).all())


@given(n=st.integers(1, 40000), k=st.integers(1, 20000), x=DTYPES, fmt=FORMATS)
@settings(max_examples=200)
def test_split_depends_on_the_weight_only(n: int, k: int, x: str, fmt: str) -> None:
    """Batch invariance up to SPLIT_MAX_M rests on it: same parts of K, sums over the same K blocks, whatever kernel."""
    wide = linear.needs_wide(fmt, x)
    for hopper in (False, True):
        plans = [
            linear.choose_plan(m, n, 2 * k, fmt, x, "none", "cuda", hopper, wide)
            for m in range(1, linear.SPLIT_MAX_M + 1)
        ]
        assert len({p.split for p in plans}) == 1
        columns = set()
        for p in plans:
            assert p.block_sums
            columns.add(4 * p.bkw if p.path == "fused" else packing.FRAGMENT_COLUMNS)
            if p.path == "stationary":
                on = linear_stationary_host.mapping(2 * k, p.split)
                assert on.part == triton.cdiv(triton.cdiv(2 * k, packing.FRAGMENT_COLUMNS), p.split)
                assert on.parts * on.split >= p.split and on.part * on.parts <= on.warps
        assert len(columns) == 1


def test_a_bias_never_goes_through_the_vendors_product() -> None:
    for fmt in ops.FORMATS:
        paths = {
            bias: linear.choose_plan(8192, 4096, 4096, fmt, "bf16", "none", "cuda", True, False, bias).path
            for bias in (False, True)
        }
        assert paths == {False: "dequant_cublas", True: "gluon"}


@given(
    fmt=FORMATS,
    x=DTYPES,
    act=st.sampled_from(("none", "relu", "gelu", "silu")),
    m=st.integers(1, 20000),
    n=st.integers(1, 40000),
    half=st.integers(1, 20000),
    hopper=st.booleans(),
)
@settings(max_examples=300)
def test_tables_take_every_case_by_a_path_that_admits_it(
    fmt: str, x: str, act: str, m: int, n: int, half: int, hopper: bool
) -> None:
    k = fit_k(fmt, half)
    plan = linear.choose_plan(m, n, k, fmt, x, act, "cuda", hopper, linear.needs_wide(fmt, x))
    if plan.path == "gluon":
        assert hopper and x != "fp32" and n % 8 == k % 8 == 0
    elif plan.path == "stationary":
        assert hopper and m <= 16 and x != "fp32" and k % 8 == 0
    elif plan.path == "dequant_cublas":
        assert act in ("none", "relu") and x != "fp32"
    kernel = linear.LinearKernel(ops.FP4_LINEAR.case(fmt=fmt, x=x, act=act, m=m, n=n, k=k), "cuda", plan)
    lossy = plan.path == "dequant_cublas" and fmt in ("absmax7_row", "absmax7_g128", "nf4")
    # Interpreted, nf4's values stay float32.
    assert kernel.numerics.operand_roundings == (("bf16",) if lossy else (x, x) if plan.scaled else ())
    assert not plan.scaled or (plan.path, fmt) == ("gluon", "absmax7_g128")


def test_rule_for_the_copy_engine() -> None:
    """Aligned rows and normal scales, or the plain kernel; the rule is asked before the launch."""
    x, y = torch.zeros(3, 64, dtype=torch.bfloat16), torch.zeros(3, 32, dtype=torch.bfloat16)
    float_scales = {"scale": torch.ones(32)}
    takes = linear_gluon_host.takes_tensors
    assert takes(float_scales, x, y)
    assert not takes(float_scales, torch.zeros(200, dtype=torch.bfloat16)[1:193].view(3, 64), y)  # base
    assert not takes(float_scales, torch.zeros(3, 68, dtype=torch.bfloat16)[:, :64], y)  # row stride
    normal = torch.full((32, 4), 0x38, dtype=torch.uint8)
    subnormal = normal.clone()
    subnormal[5, 1] = 0x07
    assert takes({"scale": normal.view(torch.float8_e4m3fn)}, x, y)
    assert not takes({"scale": subnormal.view(torch.float8_e4m3fn)}, x, y)
    assert not linear_gluon_host.available()


#: Every tile once, with one of the formats that share it: `test_linear_is_inside_its_budget` mixes the rest.
TILES = [(fmt, plan) for plan, fmt in {p: fmt for fmt, table in linear.TABLES.items() for _, p in table}.items()]
TILES += [("mxfp4", plan) for _, plan in linear.TABLE_WIDE]


@needs_interpreter
@pytest.mark.parametrize(("fmt", "plan"), TILES, ids=[f"{f}-{p.bn}x{p.bm}" for f, p in TILES])
def test_every_plan_of_the_tables_is_right(fmt: str, plan: linear.Plan) -> None:
    """Each tile on ragged sizes, grid values (exact), and with two parts of K where the plan may split."""
    n, k = 70, 1152
    case = ops.FP4_LINEAR.case(fmt=fmt, x="fp16", dist="grid", bias=1, m=min(plan.bm, 24) + 1, n=n, k=k)
    inputs = linear_inputs(case, "cpu")
    plan = dataclasses.replace(plan, split=2 if plan.bm <= 64 else 1)
    kernel = linear.LinearKernel(case, "cpu", plan)
    expected = linear_oracle(case, inputs, kernel.numerics, None)["y"]
    y = torch.full((case.axis("m"), n), float("nan"), dtype=torch.float16)
    kernel.bind(inputs, {"y": y})()
    assert torch.equal(y, expected.value)


@needs_interpreter
@pytest.mark.parametrize("chunk", [16, 64])
@pytest.mark.parametrize("act", ["none", "relu"])
@pytest.mark.parametrize("fmt", ops.FORMATS)
def test_dequantised_path_is_inside_the_budget_it_declares(fmt: str, act: str, chunk: int) -> None:
    """On the CPU the GEMM is torch's; chunks, scales and alpha are ours. float32 sums, one rounding."""
    case = ops.FP4_LINEAR.case(fmt=fmt, x="bf16", act=act, m=9, n=40, k=256)
    inputs = linear_inputs(case, "cpu")
    plan = linear.Plan("dequant_cublas", 0, 0, 0, 0, 0, chunk=chunk)
    kernel = linear.LinearKernel(case, "cpu", plan)
    expected = linear_oracle(case, inputs, kernel.numerics, None)["y"]
    y = torch.full((9, 40), float("nan"), dtype=torch.bfloat16)
    kernel.bind(inputs, {"y": y})()
    assert over_budget(y, expected) == 0


@needs_interpreter
@pytest.mark.parametrize("x", ["bf16", "fp16", "fp32"])
def test_every_e8m0_scale(x: str) -> None:
    """Bytes 0 to 254 in one weight: those an operand cannot hold multiply sums. x brings them back into range."""
    n, k = 8, 1024
    case = ops.FP4_LINEAR.case(fmt="mxfp4", x=x, dist="grid", m=4, n=n, k=k)
    inputs = linear_inputs(case, "cpu")
    inputs["scale"] = torch.arange(n * k // 32, dtype=torch.int32).remainder(255).to(torch.uint8).reshape(n, k // 32)
    picks = torch.tensor([0, 37, 500, 1023])
    inputs["x"] = torch.nn.functional.one_hot(picks, k).to(inputs["x"].dtype)
    y = torch.empty(4, n, dtype=inputs["x"].dtype)
    kernel = linear.make(case, "", "cpu")
    kernel.bind(inputs, {"y": y})()
    assert kernel.plan.wide
    assert torch.equal(y, fp4.decode_float64("mxfp4", inputs).T[picks].float().to(y.dtype))


@needs_interpreter
@pytest.mark.parametrize("x", ["bf16", "fp16"])
def test_zero_and_subnormal_block_scales(x: str) -> None:
    """Encoders with a floor of 2^-6 write none, others do; every positive E4M3 scale must decode."""
    n, k = 16, 512
    case = ops.FP4_LINEAR.case(fmt="nvfp4", x=x, dist="grid", m=3, n=n, k=k)
    inputs = linear_inputs(case, "cpu")
    inputs["scale"] = torch.arange(n * k // 16, dtype=torch.int32).remainder(0x7F).to(torch.uint8).view(
        torch.float8_e4m3fn
    ).reshape(n, k // 16)  # fmt: skip
    picks = torch.tensor([0, 17, 511])
    inputs["x"] = torch.nn.functional.one_hot(picks, k).to(inputs["x"].dtype)
    y = torch.empty(3, n, dtype=inputs["x"].dtype)
    linear.make(case, "", "cpu").bind(inputs, {"y": y})()
    assert torch.equal(y, fp4.decode_float64("nvfp4", inputs).T[picks].to(y.dtype))


# ---------------------------------------------------------------- bad input


def _linear_case(**changes: Any) -> Case:
    return ops.FP4_LINEAR.case(**{"fmt": "nvfp4", "x": "fp16", "m": 2, "n": 8, "k": 32, **changes})


@pytest.mark.parametrize(
    ("rule", "changes"),
    [
        ("k_not_multiple_of_block", {"k": 24}),
        ("k_not_multiple_of_block", {"fmt": "absmax7_g128", "k": 192}),
        ("k_odd", {"fmt": "absmax7_row", "k": 33}),
        ("zero_size", {"m": 0}),
        ("too_large", {"n": 2**20, "k": 2**14}),
    ],
)
def test_cases_it_cannot_take_are_refused_by_the_factory(rule: str, changes: dict[str, Any]) -> None:
    with pytest.raises(Unsupported) as caught:
        linear.make(_linear_case(**changes), "", "cpu")
    assert caught.value.rule == rule


@pytest.mark.parametrize(
    ("rule", "change"),
    [
        ("x_dtype", lambda i: i | {"x": i["x"].float()}),
        ("x_shape", lambda i: i | {"x": i["x"][:1]}),
        ("x_not_row_contiguous", lambda i: i | {"x": i["x"].T.contiguous().T}),
        ("weight_shape", lambda i: i | {"codes": i["codes"][:, :-1]}),
        ("weight_dtype", lambda i: i | {"scale": i["scale"].float()}),
        ("wrong_device", lambda i: i | {"x": i["x"].to("meta")}),
        (
            "scale_not_finite_positive",
            lambda i: i | {"scale": torch.full((8, 2), float("nan")).to(torch.float8_e4m3fn)},
        ),
    ],
)
def test_inputs_it_cannot_take_are_refused_before_the_launch(rule: str, change: Any) -> None:
    case = _linear_case()
    inputs = linear_inputs(case, "cpu")
    with pytest.raises(Unsupported) as caught:
        linear.make(case, "", "cpu").bind(change(inputs), {"y": torch.empty(2, 8, dtype=torch.float16)})
    assert caught.value.rule == rule


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("fmt", ops.FORMATS)
def test_encoder_refuses_what_has_no_code(fmt: str, value: float) -> None:
    case = ops.FP4_QUANTIZE.case(fmt=fmt, w="bf16", n=3, k=128)
    w = torch.zeros(3, 128, dtype=torch.bfloat16)
    w[1, 77] = value
    with pytest.raises(Unsupported) as caught:
        codec.make_quantize(case, "", "cpu").bind({"w": w}, {})
    assert caught.value.rule == "nonfinite_weight"


def test_cuda_is_refused_in_an_interpreting_process() -> None:
    with pytest.raises(Unsupported) as caught:
        linear.make(_linear_case(), "", "cuda")
    assert caught.value.rule == "interpreted_on_gpu"
    assert not BACKEND.probe("cuda").usable
    assert BACKEND.probe("cpu").mode == "interpreted"


# ---------------------------------------------------------------- the interpreter's bfloat16


@triton.jit  # type: ignore[untyped-decorator]
def _round_kernel(x_ptr: Any, y_ptr: Any, BLOCK: tl.constexpr) -> None:
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, _fp4.round_bf16_bits(tl.load(x_ptr + i)))


@triton.jit  # type: ignore[untyped-decorator]
def _add_kernel(x_ptr: Any, y_ptr: Any, BLOCK: tl.constexpr) -> None:
    i = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, x + x)


@needs_interpreter
@given(seed=st.integers(0, 2**31))
@settings(max_examples=20)
def test_bf16_rounding_by_bits_is_torch_s(seed: int) -> None:
    gen = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, (1024,), generator=gen).to(torch.int32)
    bits[:512] = (bits[:512] & ~0xFFFF) | 0x8000  # ties
    bits[-4:] = torch.tensor([0x7F800000, -0x800000, 0x7F7FFFFF, -0x7FFFFFFF - 1])
    x = bits.view(torch.float32)
    out = torch.empty(1024, dtype=torch.int16)
    _round_kernel[(1,)](x, out, BLOCK=1024)
    got, want = out.view(torch.bfloat16), x.to(torch.bfloat16)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got[~want.isnan()].view(torch.int16), want[~want.isnan()].view(torch.int16))


@needs_interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_guard_interpreter_arithmetic_on_bf16_is_still_wrong() -> None:
    """Why nothing but a load touches bf16 when interpreted. If this fails, Triton fixed it: drop the detour."""
    x = torch.linspace(1, 2, 64).to(torch.bfloat16)
    y = torch.empty_like(x)
    _add_kernel[(1,)](x, y, BLOCK=64)
    assert not torch.equal(y, x + x)
