"""FP4Linear: exact encoder and layouts, results within budget, state dicts, gradients, torch.compile, bad input."""

from __future__ import annotations

import copy
import json
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vbench.errors import Unsupported
from vbench.kernels.fp4_linear import LAYOUT_VERSION, FP4Linear, codec, tiles
from vbench.reference import fp4
from vbench.reference.linear import linear_inputs, linear_oracle
from vbench.reference.ops.fp4 import FORMAT_GROUPS, FORMATS, FP4_LINEAR, FP4_QUANTIZE, packed_bytes
from vbench.spec import Numerics

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def a_linear(k: int, n: int, dtype: torch.dtype = torch.float32, seed: int = 0, bias: bool = True) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(k, n, bias=bias, dtype=dtype)


def same(a: Tensor, b: Tensor) -> bool:
    """The same dtype, shape and bits."""
    return a.dtype == b.dtype and a.shape == b.shape and bool((a.view(torch.uint8) == b.view(torch.uint8)).all())


# The encoder and the decoder


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("dist", ["normal", "grid", "outlier", "zeros", "student5"])
def test_codes_and_scales_are_the_oracles_bit_for_bit(fmt: str, dist: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w = fp4.quantize_inputs(FP4_QUANTIZE.case(fmt=fmt, w="fp32", dist=dist, n=37, k=256), "cpu")["w"]
    want = fp4.quantize(fmt, w)
    for slice_weights in (codec.SLICE, 1024):  # whole, and four rows at a time
        monkeypatch.setattr(codec, "SLICE", slice_weights)
        got = codec.encode(fmt, w)
        assert all(same(got[name], want[name]) for name in codec.FIELDS)
        for dtype in DTYPES:
            assert same(codec.decode(fmt, got, dtype), fp4.dequantize(fmt, want, dtype))


@pytest.mark.parametrize("fmt", ["nvfp4", "mxfp4", "nf4"])
def test_a_boundary_moved_by_one_number_would_be_seen(fmt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = torch.nextafter(codec._boundaries(fmt), torch.tensor(9.0))
    monkeypatch.setattr(codec, "_boundaries", lambda fmt: moved)
    w = fp4.quantize_inputs(FP4_QUANTIZE.case(fmt=fmt, w="fp32", dist="grid", n=64, k=256), "cpu")["w"]
    assert not same(codec.encode(fmt, w)["codes"], fp4.quantize(fmt, w)["codes"])


@settings(max_examples=40)
@given(
    fmt=st.sampled_from(FORMATS), dtype=st.sampled_from(DTYPES), n=st.integers(1, 140), blocks=st.integers(1, 3),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_packing_is_a_bijection_and_decodes_by_slices(
    fmt: str, dtype: torch.dtype, n: int, blocks: int, seed: int
) -> None:
    k = blocks * max(2, FORMAT_GROUPS[fmt])
    weight = codec.encode(fmt, torch.randn(n, k, generator=torch.Generator().manual_seed(seed)))
    tensors, layout = tiles.pack(fmt, weight, n, k, dtype)
    back = tiles.unpack(fmt, tensors, n, k, layout)
    assert all(same(back[name], weight[name]) for name in codec.FIELDS)
    assert same(tiles.dense(tiles.packed(fmt, tensors, n, k, layout), dtype), codec.decode(fmt, weight, dtype))


@pytest.mark.parametrize("fmt", FORMATS)
def test_memory_is_the_formats_bits_within_a_hundredth(fmt: str) -> None:
    n, k = 1024, 2048
    layer = FP4Linear(k, n, bias=False, format=fmt)
    tensors, _ = tiles.pack(fmt, layer.weight(), n, k, torch.bfloat16)
    want = packed_bytes(fmt, n, k)
    assert want <= layer.weight_bytes <= 1.01 * want
    assert want <= sum(t.nbytes for t in tensors.values()) <= 1.01 * want
    held = [*layer.buffers(), *layer.parameters()]
    assert sum(t.nbytes for t in held) == layer.weight_bytes  # nothing beside it


# Results


def over_budget(fmt: str, x_name: str, bias: int, m: int, n: int, k: int, engine: str, wrong: bool = False) -> float:
    case = FP4_LINEAR.case(fmt=fmt, x=x_name, bias=bias, m=m, n=n, k=k)
    inputs = linear_inputs(case, "cpu")
    layer = FP4Linear.from_weight(
        inputs, inputs.get("bias"), format=fmt, dtype=inputs["x"].dtype, engine=engine
    )  # fmt: skip
    if wrong:
        layer.codes = layer.codes.clone()  # engine torch shares the caller's
        layer.codes[0, ...] ^= 1
    y = layer(inputs["x"]).detach()
    roundings = ("fp32",) if x_name == "fp32" else ("fp32", x_name)
    want = linear_oracle(case, inputs, Numerics("fp32", roundings if engine == "torch" else ()), None)["y"]
    assert want.budget is not None and y.dtype == want.dtype and y.shape == want.shape
    return float(((y.double() - want.value).abs() / want.budget).max())


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("x_name", ["bf16", "fp16", "fp32"])
def test_the_torch_engine_is_within_its_budget(fmt: str, x_name: str) -> None:
    assert over_budget(fmt, x_name, 1, 5, 33, 256, "torch") <= 1
    assert over_budget(fmt, x_name, 1, 5, 33, 256, "torch", wrong=True) > 1


@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize(("x_name", "m"), [("bf16", 3), ("fp16", 20), ("bf16", 70), ("fp32", 3)])
def test_the_triton_engine_is_within_its_budget(
    interpreter: ProcessPoolExecutor, fmt: str, x_name: str, m: int
) -> None:
    assert interpreter.submit(over_budget, fmt, x_name, 1, m, 33, 384, "triton").result(timeout=120) <= 1


def test_control_a_wrong_code_exceeds_the_triton_engines_budget(interpreter: ProcessPoolExecutor) -> None:
    assert interpreter.submit(over_budget, "nvfp4", "bf16", 0, 3, 33, 384, "triton", True).result(timeout=120) > 1


def test_any_leading_shape_any_strides_and_no_token() -> None:
    layer = FP4Linear.from_linear(a_linear(32, 6), "mxfp4")
    x = torch.randn(2, 3, 32)
    assert torch.equal(layer(x), layer(x.reshape(6, 32)).reshape(2, 3, 6))
    strided = torch.randn(32, 5).T
    assert torch.equal(layer(strided), layer(strided.contiguous()))
    assert layer(torch.empty(0, 32)).shape == (0, 6) and layer(torch.empty(2, 0, 32)).shape == (2, 0, 6)
    assert layer(x[0, 0]).shape == (6,)


# State dicts


@pytest.mark.parametrize("fmt", FORMATS)
def test_saved_and_loaded_by_either_engine_it_is_the_same_bits(fmt: str) -> None:
    layer = FP4Linear.from_linear(a_linear(256, 70, torch.bfloat16), fmt)
    saved = layer.state_dict()
    assert sorted(saved) == ["bias", "weight_codes", "weight_global_scale", "weight_layout", "weight_scale"]
    for engine in ("torch", "triton"):
        other = FP4Linear(256, 70, format=fmt, engine=engine)
        loaded = other.load_state_dict(saved)
        assert not loaded.missing_keys and not loaded.unexpected_keys
        again = other.state_dict()
        assert sorted(again) == sorted(saved) and all(same(again[key], saved[key]) for key in saved)


@pytest.mark.parametrize("fmt", FORMATS)
def test_a_state_dict_is_a_safetensors_file(fmt: str, tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    saved = FP4Linear.from_linear(a_linear(256, 70, torch.bfloat16), fmt).state_dict()
    safetensors.save_file(saved, tmp_path / "layer.safetensors")
    read = safetensors.load_file(tmp_path / "layer.safetensors")
    assert all(same(read[key], saved[key]) for key in saved)


def test_a_state_dict_of_another_version_format_or_layer_is_refused_and_changes_nothing() -> None:
    layer = FP4Linear.from_linear(a_linear(64, 8), "nvfp4")
    before = copy.deepcopy(layer.state_dict())

    def described(**values: object) -> Tensor:
        text = {"version": LAYOUT_VERSION, "format": "nvfp4", "n": 8, "k": 64} | values
        return torch.tensor(list(json.dumps(text).encode()), dtype=torch.uint8)

    wrong: dict[str, dict[str, Tensor]] = {
        "layout_version": {"weight_layout": described(version=2)},
        "other_layer": {"weight_layout": described(format="mxfp4")},
        "layout_unreadable": {"weight_layout": torch.zeros(3, dtype=torch.uint8)},
        "weight_shape": {"weight_codes": torch.zeros(8, 31, dtype=torch.uint8)},
        "weight_dtype": {"weight_scale": torch.ones(8, 4)},
        "scale_not_finite_positive": {"weight_scale": torch.full((8, 4), float("nan")).to(torch.float8_e4m3fn)},
    }
    for rule, change in wrong.items():
        with pytest.raises(Unsupported, match=rule):
            layer.load_state_dict({**before, **change})
        assert all(same(t, before[key]) for key, t in layer.state_dict().items())
    with pytest.raises(RuntimeError, match="weight_codes"):
        layer.load_state_dict({key: t for key, t in before.items() if key != "weight_codes"})


def test_copies_conversions_and_moves() -> None:
    layer = FP4Linear.from_linear(a_linear(64, 8, torch.bfloat16), "nf4")
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert layer.to("cpu") is layer and layer.to(torch.bfloat16) is layer
    with pytest.raises(Unsupported, match="fixed_at_construction"):
        layer.to(torch.float16)
    with pytest.raises(Unsupported, match="fixed_at_construction"):
        layer.to("meta")
    wider = layer.converted(dtype=torch.float32)
    assert same(wider.codes, layer.codes) and wider(x.float()).dtype == torch.float32
    assert "engine=torch" in repr(layer) and "format=nf4" in repr(layer)


# Gradients and torch.compile


@pytest.mark.parametrize("fmt", FORMATS)
def test_gradients_go_through_the_decoded_weight(fmt: str) -> None:
    layer = FP4Linear.from_linear(a_linear(128, 12), fmt)
    x = torch.randn(4, 128, requires_grad=True)
    dy = torch.randn(4, 12)
    assert layer.bias is not None
    dx, dbias = torch.autograd.grad(layer(x), (x, layer.bias), dy)
    dense = codec.decode(fmt, layer.weight(), torch.float32)
    torch.testing.assert_close(dx, dy @ dense)
    torch.testing.assert_close(dbias, dy.sum(0))
    assert not torch.allclose(dx, dy @ dense.flip(0))


def test_the_operator_is_sound() -> None:
    from vbench.kernels.fp4_linear.operator import fp4_linear

    w = codec.encode("mxfp4", torch.randn(6, 32))  # opcheck itself cannot compare E4M3 scales
    x, bias = torch.randn(3, 32, requires_grad=True), torch.randn(6, requires_grad=True)
    arguments: tuple[Any, ...] = (x, w["codes"], w["scale"], w["global_scale"], bias, "mxfp4", 6, "torch", [])
    assert set(torch.library.opcheck(fp4_linear, arguments).values()) == {"SUCCESS"}


class Block(nn.Module):
    """A LLaMA block: RMS norm, rotary attention with grouped heads, gated MLP."""

    def __init__(self, width: int = 64, heads: int = 4, kv_heads: int = 2, inner: int = 128) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.d = heads, kv_heads, width // heads
        self.norm_1, self.norm_2 = nn.RMSNorm(width), nn.RMSNorm(width)
        self.q, self.o = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.k, self.v = (nn.Linear(width, kv_heads * self.d, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, width, bias=False)

    def rotate(self, t: Tensor) -> Tensor:
        half = self.d // 2
        angle = torch.arange(t.shape[2], device=t.device)[:, None] * 10000.0 ** (
            -torch.arange(half, device=t.device) / half
        )
        cos, sin = angle.cos().to(t.dtype), angle.sin().to(t.dtype)
        a, b = t[..., :half], t[..., half:]
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        h = self.norm_1(x)
        q, k, v = (
            p(h).reshape(b, s, count, self.d).transpose(1, 2)
            for p, count in ((self.q, self.heads), (self.k, self.kv_heads), (self.v, self.kv_heads))
        )
        k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (self.rotate(k), v))
        a = nn.functional.scaled_dot_product_attention(self.rotate(q), k, v, is_causal=True)
        x = x + self.o(a.transpose(1, 2).reshape(b, s, -1))
        h = self.norm_2(x)
        out: Tensor = x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))
        return out


def quantised(block: nn.Module, fmt: str) -> nn.Module:
    for name, child in list(block.named_children()):
        if isinstance(child, nn.Linear):
            setattr(block, name, FP4Linear.from_linear(child, fmt))
    return block


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_llama_block_compiled_whole_is_eager_bitwise(backend: str) -> None:
    torch.manual_seed(0)
    block = quantised(Block(), "nvfp4").to(torch.float32)
    assert sum(isinstance(m, FP4Linear) for m in block.modules()) == 7
    compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=True)
    for tokens in (1, 7):
        x = torch.randn(2, tokens, 64)
        assert torch.equal(compiled(x), block(x))
    x = torch.randn(2, 5, 64, requires_grad=True)
    eager, traced = (torch.autograd.grad(f(x).square().sum(), x)[0] for f in (block, compiled))
    assert torch.equal(eager, traced) and bool(eager.any())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("fmt", FORMATS)
def test_on_a_gpu_inductor_and_a_cuda_graph_are_eager_bitwise(fmt: str) -> None:
    torch.manual_seed(0)
    block = Block(512, 8, 4, 1024).cuda().to(torch.bfloat16)
    quantised(block, fmt)
    layers = [m for m in block.modules() if isinstance(m, FP4Linear)]
    assert {layer.engine for layer in layers} == {"triton"} and "engine=triton" in repr(block)
    for tokens in (1, 16, 200):
        x = torch.randn(1, tokens, 512, device="cuda", dtype=torch.bfloat16)
        with torch.no_grad():
            layer_eager = layers[0](x)
            assert torch.equal(torch.compile(layers[0], fullgraph=True)(x), layer_eager)
            eager = block(x)
            for _ in range(2):
                block(x)  # warm, so that nothing is compiled under capture
            graph = torch.cuda.CUDAGraph()
            static = x.clone()
            with torch.cuda.graph(graph):
                out = block(static)
            out.zero_()
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(out, eager)
    saved = layers[0].state_dict()
    other = FP4Linear(512, 512, bias=False, format=fmt, device="cuda")
    other.load_state_dict(saved)
    assert all(same(t, saved[key]) for key, t in other.state_dict().items())
    dx = torch.randn(5, 512, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(5, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    (got,) = torch.autograd.grad(layers[0](x), x, dx)
    torch.testing.assert_close(got, dx @ codec.decode(fmt, layers[0].weight(), torch.bfloat16))


# Bad input


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused(value: float) -> None:
    linear = a_linear(32, 8)
    with torch.no_grad():
        linear.weight[5, 3] = value
    for fmt in ("nvfp4", "absmax7_row"):
        with pytest.raises(Unsupported, match="nonfinite_weight"):
            FP4Linear.from_linear(linear, fmt)


def test_what_has_no_meaning_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = FP4Linear.from_linear(a_linear(32, 8), "nvfp4")

    def refused(rule: str, call: Any) -> None:
        with pytest.raises(Unsupported) as caught:
            call()
        assert caught.value.rule == rule

    refused("k_not_multiple_of_block", lambda: FP4Linear.from_linear(a_linear(40, 8), "nvfp4"))
    refused("k_odd", lambda: FP4Linear.from_linear(a_linear(7, 8), "absmax7_row"))
    refused("unknown_format", lambda: FP4Linear.from_linear(a_linear(32, 8), "fp4"))
    refused("zero_size", lambda: FP4Linear(0, 8, format="nvfp4"))
    refused("unknown_engine", lambda: FP4Linear(32, 8, format="nvfp4", engine="cublas"))
    refused("device", lambda: FP4Linear(32, 8, format="nvfp4", device="meta"))
    refused("x_dtype", lambda: FP4Linear(32, 8, format="nvfp4", dtype=torch.float64))
    refused("weight_dtype", lambda: FP4Linear.from_linear(a_linear(64, 8, torch.float64), "nf4", dtype=torch.float32))
    # more than 2^33 packed positions, before anything is allocated
    refused("too_large", lambda: FP4Linear(1 << 17, 1 << 17, format="nvfp4", engine="triton"))
    refused("x_dtype", lambda: layer(torch.randn(2, 32, dtype=torch.float16)))
    refused("x_shape", lambda: layer(torch.randn(2, 31)))
    refused("wrong_device", lambda: layer(torch.empty(2, 32, device="meta")))
    from vbench.kernels.triton import probe

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    monkeypatch.setattr(probe, "INTERPRETED", False)
    refused("gpu_too_old", lambda: FP4Linear(32, 8, format="nvfp4", device="cuda"))
    refused("not_interpreted", lambda: FP4Linear(32, 8, format="nvfp4", engine="triton"))
