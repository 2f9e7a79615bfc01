"""The FP4 decoders' PTX, run bit by bit without a GPU, against what the codes mean.

``run_ptx`` is a model of the few instructions the decoders use. What a GPU does with them is checked there (one-hot
rows of ``docs/tuning/tune_fp4.py``); here all codes with all neighbours, and all scales, are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from vbench.kernels.triton import _fp4, linear_gluon, packing
from vbench.kernels.triton.linear_aot import unshared_scales, wgmma_from_memory
from vbench.reference import fp4

FLOATS = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}
LOP3 = {"0xEA": lambda a, b, c: (a & b) | c, "0xCA": lambda a, b, c: (a & b) | (~a & c)}


def half(values_i64: Tensor, top: bool, dtype: torch.dtype) -> Tensor:
    """One lane of 32-bit words as float64."""
    bits = (values_i64 >> 16 if top else values_i64) & 0xFFFF
    return ((bits ^ 0x8000) - 0x8000).to(torch.int16).view(dtype).double()


def fma(operands: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """a x b + c in both lanes, rounded once: the decoders' products and sums are exact in float64, subnormals too."""
    lanes = []
    for top in (False, True):
        a, b, c = (half(o, top, dtype) for o in operands)
        exact = a * b + c
        # So rounding to float32 on the way changes nothing, unless it is beyond both types.
        assert torch.equal(exact.float().double(), exact) or bool((exact.abs() > 2.0**128).any())
        lanes.append(exact.float().to(dtype).view(torch.int16).long() & 0xFFFF)
    return lanes[0] | (lanes[1] << 16)


def permute(a: Tensor, b: Tensor, selector: Tensor) -> Tensor:
    """prmt in its default mode."""
    table = [(a >> (8 * i)) & 0xFF for i in range(4)] + [(b >> (8 * i)) & 0xFF for i in range(4)]
    stacked = torch.stack([t.expand(a.shape) for t in table])
    out = torch.zeros_like(a)
    for i in range(4):
        pick = (selector >> (4 * i)) & 0xF
        byte = stacked.gather(0, (pick & 7).expand(a.shape)[None])[0]
        out |= torch.where(pick & 8 != 0, (byte >> 7) * 0xFF, byte) << (8 * i)
    return out


def run_ptx(asm: str, outputs: int, *inputs: Tensor) -> list[Tensor]:
    """The asm's outputs $0, $1, ... for int64 tensors of 32-bit words as its further operands.

    Raises:
        NotImplementedError: an instruction that this model lacks.
    """
    registers: dict[str, Tensor] = {f"${outputs + i}": t for i, t in enumerate(inputs)}
    shape = inputs[0].shape

    def value(name: str) -> Tensor:
        if name in registers:
            return registers[name]
        return torch.full(shape, int(name, 0), dtype=torch.int64)

    for line in re.sub(r"^\s*\{|\}\s*$|//.*", "", asm, flags=re.MULTILINE).split(";"):
        opcode, _, rest = line.strip().partition(" ")
        names = re.findall(r"\{[^}]*\}|[^,\s]+", rest)
        if opcode in ("", ".reg"):
            continue
        target, *sources = names
        if opcode == "mov.b32" and target.startswith("{"):
            low, high = re.findall(r"\w+", target)
            registers[low], registers[high] = value(sources[0]) & 0xFFFF, value(sources[0]) >> 16
            continue
        if opcode == "mov.b32" and sources[0].startswith("{"):
            low, high = re.findall(r"\w+", sources[0])
            registers[target] = value(low) | (value(high) << 16)
            continue
        kind = opcode.split(".")
        if opcode == "lop3.b32":
            a, b, c = (value(s) for s in sources[:3])
            result = LOP3[sources[3]](a, b, c)
        elif kind[0] == "fma":
            result = fma([value(s) for s in sources], FLOATS[kind[2]])
        elif kind[0] == "mul":
            zero = torch.full(shape, 0x80008000, dtype=torch.int64)
            result = fma([*(value(s) for s in sources), zero], FLOATS[kind[2]])
        else:
            v = [value(s) for s in sources]
            match opcode:
                case "mov.b32":
                    result = v[0]
                case "and.b32":
                    result = v[0] & v[1]
                case "shl.b32":
                    result = v[0] << v[1]
                case "shr.u32":
                    result = v[0] >> v[1]
                case "prmt.b32":
                    result = permute(v[0], v[1], v[2])
                case "mad.lo.u32":
                    result = v[0] * v[1] + v[2]
                case _:
                    raise NotImplementedError(opcode)
        registers[target] = result & 0xFFFFFFFF
    return [registers[f"${i}"] for i in range(outputs)]


def lanes(word: Tensor, x: str) -> Tensor:
    """[..., 2]: both lanes as float64."""
    dtype = torch.bfloat16 if x == "bf16" else torch.float16
    return torch.stack((half(word, False, dtype), half(word, True, dtype)), dim=-1)


#: 16-bit elements in which every code meets every neighbour, and others in the other lane.
ELEMENTS = torch.arange(0, 65536, 13)
OTHERS = (ELEMENTS * 40503 + 12345) & 0xFFFF
WORDS = ELEMENTS | (OTHERS << 16)
NIBBLES = torch.stack([torch.stack([(e >> (4 * j)) & 0xF for e in (ELEMENTS, OTHERS)], -1) for j in range(4)])


def text(asm: object) -> str:
    return str(asm.value)  # type: ignore[attr-defined]


@pytest.mark.parametrize("x", ["bf16", "fp16"])
def test_integers(x: str) -> None:
    """Every element of four codes, in the whole decoder and its two halves: q, or q over what the epilogue restores."""
    want = (NIBBLES - 8).double()
    if x == "bf16":
        want /= float(_fp4.INT4_DEFERRED.value)
    whole = run_ptx(text(getattr(_fp4, f"_INT4_{x.upper()}")), 4, WORDS)
    assert all(torch.equal(lanes(got, x), want[j]) for j, got in enumerate(whole))
    for first, name in ((0, "LOW"), (2, "HIGH")):
        parts = run_ptx(text(getattr(linear_gluon, f"_INT4_{x.upper()}_{name}")), 2, WORDS)
        assert all(torch.equal(lanes(got, x), want[first + j]) for j, got in enumerate(parts))


def scaled(scale: float, half_name: str) -> list[Tensor]:
    """Gluon's integers times a scale, restored: float64 [words, 2] for each of two code positions."""
    bits = torch.tensor([scale], dtype=torch.float32).to(torch.bfloat16).view(torch.int16).long() & 0xFFFF
    pair = (bits | (bits << 16)).expand(WORDS.shape)
    first, offset = run_ptx(text(linear_gluon._SCALED_BF16), 2, pair)
    out = run_ptx(text(getattr(linear_gluon, f"_INT4_BF16_{half_name}_TIMES")), 2, WORDS, first, first, offset, offset)
    return [lanes(word, "bf16") * float(linear_gluon.SCALED_DEFERRED.value) for word in out]


@pytest.mark.parametrize(
    "scale", [0.0, packing.SCALED_RANGE[0], 3.3e-5, 0.0371, 0.7, 1.0, 311.7, packing.SCALED_RANGE[1]]
)
def test_integers_times_a_scale_round_once(scale: float) -> None:
    """The scale's rounding to bf16, then one rounding of the product: what ``operand_roundings`` declares."""
    s = torch.tensor(scale).to(torch.bfloat16)
    for first, name in ((0, "LOW"), (2, "HIGH")):
        for j, got in enumerate(scaled(scale, name)):
            q = (NIBBLES[first + j] - 8).float()
            want = (q * s.float()).to(torch.bfloat16).double()
            assert torch.equal(got, want)


def test_scales_out_of_range_would_be_wrong_and_are_refused() -> None:
    """A control: beyond the range the decoder overflows, and the rule that keeps it off such scales says so."""
    low, high = packing.SCALED_RANGE
    ones = torch.ones(3, 4)
    assert not packing.has_far_scales(ones)
    assert not packing.has_far_scales(torch.tensor([[0.0, low, high]]))
    for far in (low / 2, high * 2, float("inf"), float("nan"), -1.0):
        scale = ones.clone()
        scale[1, 2] = far
        assert packing.has_far_scales(scale)
    assert not bool(torch.isfinite(scaled(high * 4, "LOW")[0]).all())


@pytest.mark.parametrize(("fmt", "slow"), [("absmax7_g128", True), ("absmax7_row", False), ("nf4", False)])
def test_a_packed_weight_remembers_scales_out_of_range(fmt: str, slow: bool) -> None:
    """Only groups of 128 have scales that multiply weights; a launch looks at no scales any more."""
    n, k = 2, 256
    weight = fp4.quantize(fmt, torch.ones(n, k))
    assert not packing.pack_weight(fmt, weight, n, k, 32, False).small_scales
    weight["scale"] = torch.full_like(weight["scale"], 2 * packing.SCALED_RANGE[1])
    assert packing.pack_weight(fmt, weight, n, k, 32, False).small_scales == slow


def e2m1(x: str, words: Tensor, scales: Sequence[Tensor], whole: bool) -> list[Tensor]:
    """The four code positions' decoded lanes, by ``_fp4``'s decoder or the two halves of Gluon's."""
    if whole:
        s01, s23 = scales
        return run_ptx(text(getattr(_fp4, f"_E2M1_{x.upper()}")), 4, words, s01, s01, s23, s23)
    out = []
    for name, s in zip(("LOW", "HIGH"), scales, strict=True):
        out += run_ptx(text(getattr(linear_gluon, f"_E2M1_{x.upper()}_{name}")), 2, words, s, s)
    return out


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "halves"])
@pytest.mark.parametrize(("fmt", "x"), [("nvfp4", "bf16"), ("nvfp4", "fp16"), ("mxfp4", "bf16")])
def test_e2m1_times_scale(fmt: str, x: str, whole: bool) -> None:
    """Elements, each with four scales of its own: exact, up to the power of two that the epilogue restores."""
    words = WORDS
    if x == "bf16":
        low, high = (packing._twiddle(NIBBLES[..., lane].T.int()).long() for lane in (0, 1))
        words = low | (high << 16)
    gen = torch.Generator().manual_seed(3)
    allowed = torch.arange(0x08, 0x7F) if fmt == "nvfp4" else torch.arange(0, packing.E8M0_NARROW_MAX + 1)
    picks = allowed[torch.randint(0, len(allowed), (4, len(WORDS)), generator=gen)]
    picks[:, : len(allowed)] = allowed
    packed = picks[0] | (picks[1] << 8) | (picks[2] << 16) | (picks[3] << 24)
    asm = "_E8M0_BF16" if fmt == "mxfp4" else f"_SCALES_{x.upper()}"
    got = e2m1(x, words, run_ptx(text(getattr(_fp4, asm)), 2, packed), whole)
    magnitude = torch.tensor(fp4.E2M1_MAGNITUDES, dtype=torch.float64)
    for j in range(4):
        sign = 1.0 - 2.0 * (NIBBLES[j] >> 3).double()
        if fmt == "nvfp4":
            scale = picks[j].to(torch.uint8).view(torch.float8_e4m3fn).double() / float(_fp4.E2M1_DEFERRED.value)
        else:
            scale = 2.0 ** (picks[j].double() - 127)
        want = sign * magnitude[NIBBLES[j] & 7] * scale[:, None]
        result = lanes(got[j], x)
        assert torch.equal(result, want)
        assert torch.equal(torch.signbit(result), NIBBLES[j] >= 8)


def test_unlike_registers_in_a_shared_pair_are_counted() -> None:
    ptx = "x;\n// shared: %r1 %r1, %r2 %r3\ny;\n// shared: %r4 %r4\n"
    assert unshared_scales(ptx) == 1
    assert unshared_scales(ptx.replace("%r3", "%r2")) == 0


def test_products_whose_weights_come_from_shared_memory_are_counted() -> None:
    head = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1, %r2, %r3, %r4}, "
    registers, memory = head + "{%r5, %r6, %r7, %r8}, %rd1, p, 1, 1, 1;\n", head + "%rd2, %rd1, p, 1, 1, 0, 1;\n"
    assert wgmma_from_memory(registers * 3) == 0
    assert wgmma_from_memory(registers + memory) == 1


def test_a_wrong_decoder_is_told() -> None:
    """A control: with one mask off by a bit the comparison above fails."""
    wrong = text(_fp4._INT4_BF16).replace("0x00F000F0", "0x007000F0", 1)
    got = run_ptx(wrong, 4, WORDS)
    want = (NIBBLES - 8).double() / 4
    assert torch.equal(lanes(got[0], "bf16"), want[0])
    assert not torch.equal(lanes(got[1], "bf16"), want[1])
