"""The numba_cuda backend: meaning, in numba's simulator. What it compiles to is the suite ``compile``'s business."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

FP4_FORMATS = ("absmax7_tensor", "absmax7_row", "absmax7_g128", "nvfp4", "mxfp4", "nf4")
MXFP4_ENCODINGS = ("mxfp4_rceil", "mxfp4_even", "mxfp4_ceil")
DTYPES = ("bf16", "fp16", "fp32")
ACTIVATIONS = ("none", "relu", "gelu", "silu")

os.environ.setdefault("NUMBA_ENABLE_CUDASIM", "1")  # numba reads it once, when first imported

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from torch import Tensor  # noqa: E402

from vbench.errors import Unsupported  # noqa: E402
from vbench.kernels.numba_cuda import bits, codec_kernels, formats, linear_kernels  # noqa: E402
from vbench.kernels.numba_cuda.backend import BACKEND  # noqa: E402
from vbench.kernels.numba_cuda.dialect import SIMULATED  # noqa: E402
from vbench.kernels.numba_cuda.linear import LinearKernel  # noqa: E402
from vbench.reference import fp4  # noqa: E402
from vbench.reference.linear import linear_inputs, linear_oracle  # noqa: E402
from vbench.reference.ops import fp4 as ops  # noqa: E402
from vbench.reference.ops.fp4 import FORMAT_GROUPS, FP4_DEQUANTIZE, FP4_LINEAR, FP4_QUANTIZE  # noqa: E402
from vbench.spec import TORCH_DTYPE_NAMES, Case, Numerics, resolve  # noqa: E402

needs_simulator = pytest.mark.skipif(
    not SIMULATED, reason="numba was imported without NUMBA_ENABLE_CUDASIM=1 before this module"
)
pytestmark = needs_simulator


def kernel_of(case: Case) -> Any:
    return resolve(BACKEND.ops[case.op])(case, "", "cpu")


def guarded(like: Tensor) -> tuple[Tensor, Tensor]:
    """(buffer, view): a poisoned output of like's shape in the middle of a buffer of 0xA5 bytes, 64-byte aligned."""
    pad = 64
    size = like.numel() * like.element_size()
    buffer = torch.full((size + 2 * pad,), 0xA5, dtype=torch.uint8)
    return buffer, buffer[pad : pad + size].view(like.dtype).view(like.shape)


def run(case: Case, inputs: dict[str, Any], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """Run the kernel once; inputs must stay as they were and the bytes around each output untouched."""
    before = {name: t.clone() for name, t in inputs.items()}
    buffers = {name: guarded(t) for name, t in like.items()}
    launch = kernel_of(case).bind(inputs, {name: view for name, (_, view) in buffers.items()})
    assert launch() is None
    for name, t in inputs.items():
        assert same_bytes(t, before[name]), f"{name} was changed"
    for name, (buffer, _) in buffers.items():
        assert bool((buffer[:64] == 0xA5).all()) and bool((buffer[-64:] == 0xA5).all()), f"wrote around {name}"
    return {name: view for name, (_, view) in buffers.items()}


def same_bytes(a: Tensor, b: Tensor) -> bool:
    return (
        a.dtype == b.dtype
        and a.shape == b.shape
        and torch.equal(a.view(-1).view(torch.uint8), b.view(-1).view(torch.uint8))
    )


def quantized(case: Case, w: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(ours, reference's)"""
    want = fp4.quantize(case.text("fmt"), w)
    return run(case, {"w": w}, want), want


# --- probe and capabilities ---


def test_probe_says_what_this_process_can_do() -> None:
    here = BACKEND.probe("cpu")
    assert here.usable and here.mode == "simulated" and here.versions["numba"]
    assert not BACKEND.probe("cuda").usable


def test_importing_the_entry_point_imports_no_dsl() -> None:
    code = "import sys, vbench.kernels.numba_cuda.backend as b; print({'torch', 'numba', 'numpy'} & set(sys.modules))"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "set()"


@pytest.mark.parametrize(
    ("rule", "values"),
    [
        ("zero_size", {"n": 0, "k": 32}),
        ("zero_size", {"n": 4, "k": 0}),
        ("k_odd", {"fmt": "absmax7_row", "k": 33}),
        ("k_not_multiple_of_block", {"k": 24}),
        ("k_not_multiple_of_block", {"fmt": "absmax7_g128", "k": 64}),
    ],
)
def test_cases_without_meaning_are_refused_by_type(rule: str, values: dict[str, Any]) -> None:
    for op, extra in ((FP4_QUANTIZE, {}), (FP4_DEQUANTIZE, {}), (FP4_LINEAR, {"m": 1})):
        with pytest.raises(Unsupported) as caught:
            kernel_of(op.case(**{"fmt": "nvfp4", "n": 4, "k": 32, **extra, **values}))
        assert caught.value.rule == rule


def test_no_tokens_are_refused() -> None:
    with pytest.raises(Unsupported) as caught:
        kernel_of(FP4_LINEAR.case(fmt="nvfp4", m=0, n=4, k=32))
    assert caught.value.rule == "zero_size"


def test_the_simulator_refuses_what_would_take_it_minutes_and_the_gpu_does_not() -> None:
    for case in (
        FP4_QUANTIZE.case(fmt="nvfp4", n=512, k=512),
        FP4_DEQUANTIZE.case(fmt="nvfp4", n=512, k=512),
        FP4_LINEAR.case(fmt="nvfp4", m=64, n=128, k=256),
    ):
        with pytest.raises(Unsupported) as caught:
            kernel_of(case)
        assert caught.value.rule == "too_large_for_simulator"
        assert resolve(BACKEND.ops[case.op])(case, "", "cuda").produces


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_is_refused_before_launch(bad: float) -> None:
    case = FP4_QUANTIZE.case(fmt="nvfp4", w="fp32", n=4, k=32)
    w = torch.zeros(4, 32)
    out = fp4.quantize("nvfp4", w)
    kept = {name: t.clone() for name, t in out.items()}
    w[3, 31] = bad
    with pytest.raises(Unsupported) as caught:
        kernel_of(case).bind({"w": w}, out)
    assert caught.value.rule == "nonfinite_weight"
    assert all(same_bytes(out[name], kept[name]) for name in out)


@pytest.mark.parametrize(
    ("rule", "spoil"),
    [
        ("wrong_dtype", lambda i: i.update(x=i["x"].to(torch.float16))),
        ("wrong_dtype", lambda i: i.update(scale=i["scale"].to(torch.float32))),
        ("wrong_shape", lambda i: i.update(x=i["x"][:1])),
        ("wrong_device", lambda i: i.update(x=i["x"].to("meta"))),
        ("not_contiguous", lambda i: i.update(x=torch.zeros(32, 2, dtype=torch.float32).T)),
        ("missing_tensor", lambda i: i.pop("codes")),
        ("missing_tensor", lambda i: i.pop("bias")),
    ],
)
def test_bad_tensors_are_refused_by_type(rule: str, spoil: Callable[[dict[str, Any]], object]) -> None:
    case = FP4_LINEAR.case(fmt="nvfp4", x="fp32", bias=1, m=2, n=4, k=32)
    inputs = linear_inputs(case, "cpu")
    kernel_of(case).bind(inputs, {"y": torch.empty(2, 4)})
    spoil(inputs)
    with pytest.raises(Unsupported) as caught:
        kernel_of(case).bind(inputs, {"y": torch.empty(2, 4)})
    assert caught.value.rule == rule


def test_a_pair_store_needs_an_aligned_weight() -> None:
    case = FP4_DEQUANTIZE.case(fmt="nvfp4", y="bf16", n=2, k=16)
    weight = torch.empty(33, dtype=torch.bfloat16)[1:].view(2, 16)
    with pytest.raises(Unsupported) as caught:
        kernel_of(case).bind(fp4.dequantize_inputs(case, "cpu"), {"weight": weight})
    assert caught.value.rule == "misaligned"


# --- element types ---


def all_halves() -> np.ndarray[Any, Any]:
    return np.arange(65536, dtype=np.uint16)[::7]


def test_decoding_of_16_and_8_bit_floats_is_exact() -> None:
    halves = all_halves()
    with np.errstate(all="ignore"):
        bf16 = np.array([bits.decode_bf16(h) for h in halves], dtype=np.float32)
        fp16 = np.array([bits.decode_fp16(h) for h in halves], dtype=np.float32)
        e4m3 = np.array([bits.decode_e4m3(b) for b in np.arange(256, dtype=np.uint8)], dtype=np.float32)
    as_torch = torch.from_numpy(halves.copy())
    np.testing.assert_array_equal(bf16, as_torch.view(torch.bfloat16).float().numpy())
    np.testing.assert_array_equal(fp16, as_torch.view(torch.float16).float().numpy())
    np.testing.assert_array_equal(e4m3, torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy())


def test_decoding_of_4_bit_codes_is_the_table_signs_of_zero_included() -> None:
    tables = {"int4": fp4.ABSMAX7_TABLE, "e2m1": fp4.E2M1_TABLE, "nf4": fp4.NF4_TABLE}
    for decode, table in ((decode, tables[element]) for element, decode in bits.VALUE_OF.items()):
        got = np.array([decode(np.uint32(c)) for c in range(16)], dtype=np.float32)
        want = np.array(table, dtype=np.float32)
        np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


def rounding_points(dtype: torch.dtype) -> Tensor:
    """float32: values of a 16-bit type, the midpoints above them, and the float32 on either side of each midpoint."""
    finite = torch.arange(0, 65536, 13).to(torch.int32).to(torch.uint16).view(dtype).float()
    finite = finite[finite.isfinite()]
    step = torch.nextafter(finite.to(dtype), torch.full_like(finite, float("inf")).to(dtype)).float() - finite
    middle = finite + step / 2
    middle = middle[middle.isfinite()]
    return torch.cat((finite, middle, torch.nextafter(middle, middle + 1), torch.nextafter(middle, middle - 1)))


@pytest.mark.parametrize(("encode", "dtype"), [(bits.encode_bf16, torch.bfloat16), (bits.encode_fp16, torch.float16)])
def test_encoding_rounds_half_to_even_like_the_type(encode: Callable[[Any], Any], dtype: torch.dtype) -> None:
    extremes = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), 65519.996, 65520.0, 3.4e38, 2.0**-25, 2.0**-149])
    points = torch.cat((extremes, rounding_points(dtype)))
    want = points.to(dtype).view(torch.uint16).numpy()
    got = np.array([encode(v) for v in points.numpy()], dtype=np.uint16)
    np.testing.assert_array_equal(got, want)
    assert torch.tensor([int(encode(np.float32("nan")))], dtype=torch.int32).to(torch.uint16).view(dtype).isnan().all()
    # Control: truncation, the bug this would catch, differs on these points.
    if dtype is torch.bfloat16:
        assert (points.numpy().view(np.uint32) >> 16 != want).mean() > 0.2


def test_encoding_of_normal_e4m3_rounds_half_to_even() -> None:
    values = torch.arange(8, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (values[1:] + values[:-1]) / 2
    points = torch.cat((values, middle, torch.nextafter(middle, middle + 1), torch.nextafter(middle, middle - 1)))
    want = points.to(torch.float8_e4m3fn).view(torch.uint8).numpy()
    np.testing.assert_array_equal(np.array([bits.encode_e4m3_normal(v) for v in points.numpy()], dtype=np.uint8), want)


def test_e8m0_decodes_every_byte_and_encodes_by_each_rule() -> None:
    every = np.arange(256, dtype=np.uint8)
    want = fp4.e8m0_values(torch.from_numpy(every)).numpy()
    np.testing.assert_array_equal(np.array([bits.decode_e8m0(b) for b in every], dtype=np.float32), want)
    # Significands at each rule's threshold and next to it, at exponents around the clamp and at the top.
    significands = np.array([0, 1, 0x3FFFFF, 0x400000, 0x400001, 0x5FFFFF, 0x600000, 0x7FFFFF], dtype=np.uint32)
    exponents = np.array([0, 1, 2, 3, 4, 127, 253, 254], dtype=np.uint32)
    maxima = (significands | (exponents[:, None] << 23)).ravel().view(np.float32)
    assert formats.MXFP4_ROUNDING == fp4.MXFP4_ROUNDING
    for rounding in formats.MXFP4_ROUNDING.values():
        want = fp4.e8m0_bytes(torch.from_numpy(maxima), rounding).numpy()
        np.testing.assert_array_equal(np.array([bits.encode_e8m0(v, rounding) for v in maxima]), want)


# --- codec ---


@st.composite
def weights(draw: st.DrawFn, names: tuple[str, ...]) -> tuple[str, str, str, int, int, int]:
    """(format or encoding, dtype, distribution, n, k, power of two to scale by)"""
    fmt = draw(st.sampled_from(names))
    block = max(2, FORMAT_GROUPS[ops.decoded_as(fmt)])
    k = block * draw(st.integers(1, 64 // block if block < 64 else 2))
    n = draw(st.integers(1, 5))
    dist = draw(st.sampled_from(("normal", "grid", "student5", "zeros", "outlier")))
    power = draw(st.sampled_from((0, 0, 0, -12, 10, -130, 110)))
    return fmt, draw(st.sampled_from(DTYPES)), dist, n, k, power


@settings(max_examples=20)
@given(weights(ops.ENCODINGS))
def test_quantize_is_bitwise_the_encoder(drawn: tuple[str, str, str, int, int, int]) -> None:
    fmt, dtype, dist, n, k, power = drawn
    case = FP4_QUANTIZE.case(fmt=fmt, w=dtype, dist=dist, n=n, k=k)
    w = (fp4.make_weight(case, torch.float32, "cpu") * 2.0**power).to(getattr(torch, TORCH_DTYPE_NAMES[dtype]))
    w = torch.where(w.isfinite(), w, torch.ones_like(w))  # fp16 overflows at some powers
    got, want = quantized(case, w)
    for name in want:
        assert same_bytes(got[name], want[name]), name


@settings(max_examples=12)
@given(weights(FP4_FORMATS))
def test_dequantize_is_bitwise_the_decoder(drawn: tuple[str, str, str, int, int, int]) -> None:
    fmt, dtype, dist, n, k, power = drawn
    case = FP4_DEQUANTIZE.case(fmt=fmt, y=dtype, dist=dist, n=n, k=k)
    inputs = fp4.dequantize_inputs(case, "cpu")
    if fmt == "mxfp4":
        inputs["scale"] = (inputs["scale"].int() + power).clamp(0, 255).to(torch.uint8)
    else:
        which = "global_scale" if fmt == "nvfp4" else "scale"
        inputs[which] = inputs[which] * 2.0**power
    want = fp4.dequantize_oracle(case, inputs, Numerics(), None)["weight"].value
    got = run(case, inputs, {"weight": want})["weight"]
    assert same_bytes(got, want)


@pytest.mark.parametrize("fmt", FP4_FORMATS)
def test_an_encoder_that_rounds_otherwise_is_caught(fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = FP4_QUANTIZE.case(fmt=fmt, w="fp32", dist="grid", n=2, k=128)
    w = fp4.make_weight(case, torch.float32, "cpu")

    def ties_away_int4(value: Any, scale: Any) -> Any:
        q = np.clip(value / scale, -7, 7)
        return np.uint32(int(np.copysign(np.floor(np.abs(q) + 0.5), q)) + 8)

    def truncating_e2m1(value: Any, scale: Any) -> Any:
        q = np.float32(value / scale)
        return np.uint32(sum(abs(q) >= v for v in fp4.E2M1_MAGNITUDES[1:]) + 8 * int(np.signbit(q)))

    def ties_up_nf4(value: Any, scale: Any) -> Any:
        return np.uint32(sum(value / scale >= t for t in codec_kernels.NF4_THRESHOLDS))

    # Builders keep programs; build anew under the wrong function and forget those afterwards.
    codec_kernels.encode_group.cache_clear()
    monkeypatch.setattr(codec_kernels, "encode_nf4", ties_up_nf4)
    monkeypatch.setattr(codec_kernels, "encode_int4", ties_away_int4)
    monkeypatch.setattr(codec_kernels, "encode_e2m1", truncating_e2m1)
    got, want = quantized(case, w)
    codec_kernels.encode_group.cache_clear()
    assert same_bytes(got["scale"], want["scale"])
    assert not same_bytes(got["codes"], want["codes"])


# --- linear ---


def worst_over_budget(case: Case, inputs: dict[str, Any], y: Tensor) -> float:
    """Largest |error| / budget; inf where a result that must be exact is not, or is not finite."""
    want = linear_oracle(case, inputs, kernel_of(case).numerics, None)["y"]
    if not bool(y.isfinite().all()):
        return float("inf")
    if want.budget is None:
        return 0.0 if torch.equal(y, want.value) else float("inf")
    return float(((y.double() - want.value).abs() / want.budget).max())


def compute(case: Case, inputs: dict[str, Any]) -> Tensor:
    dtype = inputs["x"].dtype
    return run(case, inputs, {"y": torch.empty(case.axis("m"), case.axis("n"), dtype=dtype)})["y"]


@st.composite
def linear_cases(draw: st.DrawFn) -> Case:
    fmt = draw(st.sampled_from(FP4_FORMATS))
    block = max(2, FORMAT_GROUPS[fmt])
    k = draw(st.sampled_from([k for k in (32, 64, 128) if k % block == 0])) if draw(st.booleans()) else block
    return FP4_LINEAR.case(
        fmt=fmt,
        x=draw(st.sampled_from(DTYPES)),
        act=draw(st.sampled_from(ACTIVATIONS)),
        bias=draw(st.integers(0, 1)),
        dist=draw(st.sampled_from(("normal", "grid", "outlier", "zeros"))),
        m=draw(st.sampled_from((1, 2, 3, 8, 9, 17))),
        n=draw(st.integers(1, 3)),
        k=k,
    )


@settings(max_examples=12)
@given(linear_cases())
def test_linear_stays_within_its_budget(case: Case) -> None:
    inputs = linear_inputs(case, "cpu")
    assert worst_over_budget(case, inputs, compute(case, inputs)) <= 1.0


@pytest.mark.parametrize(
    ("m", "k", "aligned", "kernel"),
    [
        (1, 64, True, "gemv_words_nvfp4_fp32_none_bias1_m1"),
        (3, 64, True, "gemv_words_nvfp4_fp32_none_bias1_m4"),
        (16, 64, True, "gemv_words_nvfp4_fp32_none_bias1_m8"),
        (3, 48, True, "gemv_bytes_nvfp4_fp32_none_bias1_m4"),
        (3, 64, False, "gemv_bytes_nvfp4_fp32_none_bias1_m4"),
        (17, 64, True, "tiled_nvfp4_fp32_none_bias1"),
    ],
)
def test_the_choice_of_kernel_and_each_one_exact_on_the_grid(m: int, k: int, aligned: bool, kernel: str) -> None:
    case = FP4_LINEAR.case(fmt="nvfp4", x="fp32", bias=1, dist="grid", m=m, n=3, k=k)
    made = kernel_of(case)
    assert isinstance(made, LinearKernel)
    assert made.choose(codes_aligned=aligned)[0].name == kernel
    inputs = linear_inputs(case, "cpu")
    if not aligned:
        codes = torch.empty(inputs["codes"].numel() + 1, dtype=torch.uint8)[1:].view(inputs["codes"].shape)
        inputs["codes"] = codes.copy_(inputs["codes"])
    assert worst_over_budget(case, inputs, compute(case, inputs)) == 0.0


def swap_nibbles(i: dict[str, Any]) -> None:
    i["codes"] = (i["codes"] >> 4) | (i["codes"] << 4)


def shift_scales(i: dict[str, Any]) -> None:
    i["scale"] = i["scale"].view(torch.uint8).roll(1, dims=-1).contiguous().view(i["scale"].dtype)


def drop_last_columns(i: dict[str, Any]) -> None:
    i["x"] = i["x"].clone()
    i["x"][:, -8:] = 0


def drop_bias(i: dict[str, Any]) -> None:
    i["bias"] = torch.zeros_like(i["bias"])


def forget_global_scale(i: dict[str, Any]) -> None:
    i["global_scale"] = torch.ones_like(i["global_scale"])


@pytest.mark.parametrize("wrong", [swap_nibbles, shift_scales, drop_last_columns, drop_bias, forget_global_scale])
@pytest.mark.parametrize("m", [2, 17])
def test_the_budget_catches_wrong_kernels(m: int, wrong: Callable[[dict[str, Any]], None]) -> None:
    case = FP4_LINEAR.case(fmt="nvfp4", x="bf16", act="gelu", bias=1, dist="student5", m=m, n=3, k=32)
    inputs = linear_inputs(case, "cpu")
    spoiled = dict(inputs)
    wrong(spoiled)
    assert worst_over_budget(case, inputs, compute(case, spoiled)) > 1.0


def test_rows_do_not_depend_on_their_batch_and_reruns_agree_bitwise() -> None:
    batch = FP4_LINEAR.case(fmt="absmax7_g128", x="bf16", act="silu", m=3, n=3, k=128)
    inputs = linear_inputs(batch, "cpu")
    y = compute(batch, inputs)
    assert same_bytes(y, compute(batch, inputs))
    single = FP4_LINEAR.case(fmt="absmax7_g128", x="bf16", act="silu", m=1, n=3, k=128)
    for row in range(3):
        alone = compute(single, {**inputs, "x": inputs["x"][row : row + 1].clone()})
        assert same_bytes(alone, y[row : row + 1])


@pytest.mark.parametrize("fmt", FP4_FORMATS)
def test_one_hot_x_reads_a_decoded_column_bitwise(fmt: str) -> None:
    k = FORMAT_GROUPS[fmt] if FORMAT_GROUPS[fmt] > 32 else 32
    case = FP4_LINEAR.case(fmt=fmt, x="fp32", m=8, n=3, k=k)
    inputs = linear_inputs(case, "cpu")
    columns = torch.arange(8) * (k // 8) + 3
    inputs["x"] = torch.nn.functional.one_hot(columns, k).float()
    assert torch.equal(compute(case, inputs), fp4.dequantize(fmt, inputs, torch.float32)[:, columns].T)


def native_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Give the simulated kernels the block sizes they have on a GPU; index arithmetic depends on them."""
    for name, value in {
        "LANES": 32,
        "WARPS": 8,
        "GEMV_THREADS": 256,
        "PITCH": 33,
        "SCRATCH": 256,
        "BLOCK_M": 64,
        "BLOCK_N": 128,
        "BLOCK_K": 32,
        "TILE_M": 4,
        "TILE_N": 8,
        "COLUMNS": 16,
        "TILED_THREADS": 256,
        "PITCH_M": 65,
        "PITCH_N": 129,
        "X_TILE": 32 * 65,
        "W_TILE": 32 * 129,
        "TILE_SUMS": 32,
    }.items():
        monkeypatch.setattr(linear_kernels, name, value)
    monkeypatch.setattr(codec_kernels, "THREADS", 256)
    monkeypatch.setattr(codec_kernels, "group_lanes", lambda fmt: min(fmt.group // 2, 32))


def forget_programs() -> None:
    for builder in (linear_kernels.gemv_words, linear_kernels.gemv_bytes, linear_kernels.tiled):
        builder.cache_clear()
    for name in ("absmax_partials", "finish_tensor", "encode_tensor", "encode_row", "encode_group", "decode"):
        getattr(codec_kernels, name).cache_clear()


@pytest.fixture
def gpu_sizes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    forget_programs()
    native_sizes(monkeypatch)
    yield
    forget_programs()


@pytest.mark.usefixtures("gpu_sizes")
@pytest.mark.parametrize(("m", "k", "kernel"), [(2, 1056, "gemv_words"), (1, 48, "gemv_bytes"), (17, 64, "tiled")])
def test_linear_with_the_block_sizes_of_a_gpu(m: int, k: int, kernel: str) -> None:
    case = FP4_LINEAR.case(fmt="nvfp4", x="bf16", act="relu", bias=1, dist="grid", m=m, n=1, k=k)
    assert kernel_of(case).choose(codes_aligned=True)[0].name.startswith(kernel)
    inputs = linear_inputs(case, "cpu")
    assert worst_over_budget(case, inputs, compute(case, inputs)) == 0.0


@pytest.mark.usefixtures("gpu_sizes")
@pytest.mark.parametrize("fmt", FP4_FORMATS)
def test_codec_with_the_block_sizes_of_a_gpu(fmt: str) -> None:
    case = FP4_QUANTIZE.case(fmt=fmt, w="bf16", n=2, k=768 if fmt == "absmax7_row" else 128)
    got, want = quantized(case, fp4.make_weight(case, torch.bfloat16, "cpu"))
    for name in want:
        assert same_bytes(got[name], want[name]), name
