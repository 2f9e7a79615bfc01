"""Our codecs against other people's, where those are installed: torchao's NVFP4 and MXFP4, bitsandbytes' NF4.

A disagreement is ours until it is explained; what is explained stands in docs/adr/0007 and is asserted here as it is.
Skipped, and so counted, where the package is missing: pip install torchao bitsandbytes. ml_dtypes is always there
(tests/test_reference.py, tests/test_formats.py).
"""

from __future__ import annotations

import warnings
from types import ModuleType

import pytest
import torch
from torch import Tensor

from vbench.reference import fp4

N, K = 64, 256


def other(name: str) -> ModuleType:
    """A package that is no dependency of ours; its own warnings are its own."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module: ModuleType = pytest.importorskip(name, exc_type=ImportError)
    return module


def draws() -> dict[str, Tensor]:
    """float32 weights: usual ones, outliers, zero blocks, ties of E2M1, and magnitudes near both ends of a scale."""
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(N, K, generator=generator)
    ties = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0])
    outlier = normal.clone()
    outlier[3, 7], outlier[10, 200] = 3000.0, -5000.0
    blank = normal.clone()
    blank[5], blank[:, 64:128] = 0.0, 0.0
    return {
        "normal": normal,
        "outlier": outlier,
        "zero blocks": blank,
        "ties": ties.repeat(N, K // len(ties)),
        "small": normal * 2.0**-100,
        "large": normal * 2.0**100,
    }


def differ(ours: Tensor, theirs: Tensor) -> int:
    return int((ours != theirs).sum())


@pytest.mark.parametrize("which", sorted(draws()))
def test_nvfp4_is_torchaos_but_for_the_order_of_a_product(which: str) -> None:
    """torchao divides by the two scales in another order than by their product, so that a quotient within two units of
    a tie may fall on its other side, and a decoded value differs by a unit."""
    module = other("torchao.prototype.mx_formats.nvfp4_tensor")
    w = draws()[which]
    ours = fp4.quantize("nvfp4", w)
    theirs = module.NVFP4Tensor.to_nvfp4(w, per_tensor_scale=module.per_tensor_amax_to_scale(w.abs().max()))
    assert differ(ours["scale"].view(torch.uint8), theirs.scale.view(torch.uint8)) == 0
    codes, others = fp4.unpack(ours["codes"]), fp4.unpack(theirs.qdata)
    scale = (ours["scale"].double() * ours["global_scale"].double()).repeat_interleave(16, dim=1)
    magnitudes = torch.tensor(fp4.E2M1_MAGNITUDES, dtype=torch.float64)
    ties = (magnitudes[1:] + magnitudes[:-1]) / 2
    away = ((w.double() / scale).abs()[..., None] / ties - 1).abs().amin(dim=2)
    assert bool(((codes == others) | (away <= 2.0**-22)).all())
    decoded, theirs_decoded = fp4.dequantize("nvfp4", ours, torch.float32), theirs.dequantize(torch.float32)
    same = codes == others
    assert torch.allclose(decoded[same], theirs_decoded[same], rtol=2.0**-22, atol=0.0)
    # control: a code next to ours would be seen
    assert which == "ties" or bool(((codes ^ 1) != others)[away > 2.0**-22].all())


@pytest.mark.parametrize("rule", ["floor", "rceil", "even", "ceil"])
@pytest.mark.parametrize("which", sorted(draws()))
def test_mxfp4_is_torchaos(which: str, rule: str) -> None:
    module = other("torchao.prototype.mx_formats.mx_tensor")
    w = draws()[which]
    ours = fp4.quantize("mxfp4" if rule == "floor" else f"mxfp4_{rule}", w)
    mode = module.ScaleCalculationMode(rule)
    theirs = module.MXTensor.to_mx(w, torch.float4_e2m1fn_x2, 32, mode)
    assert differ(ours["scale"], theirs.scale.view(torch.uint8)) == 0
    assert differ(ours["codes"], theirs.qdata) == 0
    assert torch.equal(fp4.dequantize("mxfp4", ours, torch.float32), theirs.dequantize(torch.float32))


@pytest.mark.parametrize("which", ["normal", "outlier", "zero blocks", "large"])
def test_nf4_is_bitsandbytes_but_next_to_a_threshold(which: str) -> None:
    """bitsandbytes multiplies by fl32(1 / absmax), so that a quotient within two units of a threshold may fall on its
    other side; and has element 0 in the high nibble, and scale 0 for a zero block."""
    module = other("bitsandbytes.functional")
    w = draws()[which]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        packed, state = module.quantize_4bit(w, blocksize=64, quant_type="nf4", quant_storage=torch.uint8)
    ours = fp4.quantize("nf4", w)
    codes = fp4.unpack(ours["codes"]).reshape(-1)
    raw = packed.reshape(-1)
    theirs = torch.stack((raw >> 4, raw & 15), dim=1).reshape(-1)
    scale = ours["scale"].reshape(-1)
    assert torch.equal(torch.where(scale > fp4.MIN_NORMAL, scale, 0.0), state.absmax)
    quotient = w.reshape(-1, 64) / scale[:, None]
    away = (quotient.reshape(-1, 1) - fp4.NF4_THRESHOLDS).abs().amin(dim=1)
    # A zero block's code says nothing: its values are zeros under any.
    near = (away <= 2.0**-22) | (quotient.reshape(-1) == 0)
    assert bool(((codes == theirs) | near).all())
    # control: few lie that near
    assert float(((quotient.reshape(-1) != 0) & (away <= 2.0**-22)).float().mean()) < 1e-3
