"""Training on FP4 codes: the straight-through gradient in float64, bits over resumes and tiers, bytes as planned."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vbench.errors import Unsupported
from vbench.kernels.tiers.codec import default_decoder, packed_views
from vbench.kernels.tiers.units import Packing, discover
from vbench.kernels.virtual import checkpoint as files
from vbench.kernels.virtual import cli, training
from vbench.kernels.virtual.estimate import estimate, fp4_blocks
from vbench.kernels.virtual.fp4_training import TrainedFP4Linear, _bind_encoder, install, masters_aside
from vbench.kernels.virtual.hardware import CARDS, find_card
from vbench.kernels.virtual.modules import LanguageModel
from vbench.kernels.virtual.placement import place, unit_sizes
from vbench.kernels.virtual.program import Workload
from vbench.kernels.virtual.shapes import PRESETS
from vbench.reference import fp4
from vbench.reference.budget import UNIT_ROUNDOFF, sum_factor

TINY = PRESETS["vb-tiny"]
CPU = torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def base() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as name:
        yield Path(name)


def layer_of(n: int, k: int, bias: bool, dtype: torch.dtype, device: torch.device = CPU) -> TrainedFP4Linear:
    linear = nn.Linear(k, n, bias=bias, device=device)
    return TrainedFP4Linear(linear, torch.empty(n, k, dtype=dtype, device=device), default_decoder(device))


def expected(layer: TrainedFP4Linear, x: Tensor, dy: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The straight-through formula in float64, by the reference's own encoder and decoder: value, sum of magnitudes."""
    w = fp4.decode_float64("nvfp4", fp4.quantize("nvfp4", layer.weight.detach()))
    w = w.to(layer._place.dtype).double()  # rounded once, as the layer's numerics say
    x, dy = x.double(), dy.double()
    out = {
        "y": (x @ w.t(), x.abs() @ w.abs().t()),
        "dx": (dy @ w, dy.abs() @ w.abs()),
        "dw": (dy.t() @ x, dy.abs().t() @ x.abs()),
    }
    if layer.bias is not None:
        b = layer.bias.detach().to(layer._place.dtype).double()
        out["y"] = (out["y"][0] + b, out["y"][1] + b.abs())
        out["db"] = (dy.sum(0), dy.abs().sum(0))
    return out


def worst(layer: TrainedFP4Linear, x: Tensor, dy: Tensor) -> dict[str, float]:
    """Largest error over its budget of a forward and backward: sums in fp32, then one rounding to the layer's dtype."""
    name = {torch.float32: "fp32", torch.bfloat16: "bf16"}[layer._place.dtype]
    given = x.clone().requires_grad_()
    y = layer(given)
    y.backward(dy)
    assert given.grad is not None and layer.weight.grad is not None and layer.weight.grad.dtype is torch.float32
    got = {"y": y.detach(), "dx": given.grad, "dw": layer.weight.grad}
    if layer.bias is not None:
        assert layer.bias.grad is not None
        got["db"] = layer.bias.grad
    terms = {"y": x.shape[1] + 1, "dx": dy.shape[1], "dw": len(x), "db": len(x)}
    out = {}
    for key, (value, magnitude) in expected(layer, x, dy).items():
        sums = sum_factor(terms[key], "fp32") * magnitude
        budget = sums + UNIT_ROUNDOFF[name] * (value.abs() + sums) + 2.0**-126
        out[key] = float(((got[key].double() - value).abs() / budget).max())
    return out


def drawn(n: int, k: int, m: int, seed: int, dtype: torch.dtype, bias: bool = True) -> tuple[Any, Tensor, Tensor]:
    torch.manual_seed(seed)
    return layer_of(n, k, bias, dtype), torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)


@settings(max_examples=25)
@given(
    st.integers(1, 40), st.integers(1, 6), st.integers(1, 30), st.booleans(),
    st.sampled_from((torch.float32, torch.bfloat16)), st.integers(0, 2**20),
)  # fmt: skip
def test_forward_and_gradients_are_the_straight_through_formula_in_float64(
    n: int, blocks: int, m: int, bias: bool, dtype: torch.dtype, seed: int
) -> None:
    errors = worst(*drawn(n, 16 * blocks, m, seed, dtype, bias))
    assert max(errors.values()) <= 1, errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_control_a_gradient_by_the_master_instead_of_the_codes_is_noticed(dtype: torch.dtype) -> None:
    layer, x, dy = drawn(32, 64, 16, 0, dtype)
    honest = layer.decoded
    assert max(worst(layer, x, dy).values()) <= 1
    layer.weight.grad = layer.bias.grad = None
    calls = []

    def master_in_backward() -> Tensor:
        calls.append(0)
        master: Tensor = layer.weight.detach().to(dtype)
        return honest() if len(calls) == 1 else master

    layer.decoded = master_in_backward
    errors = worst(layer, x, dy)
    assert errors["y"] <= 1 and errors["dw"] <= 1 and errors["dx"] > 2


def test_under_autocast_it_is_the_layer_with_decoded_weights_bit_for_bit() -> None:
    layer, x, dy = drawn(48, 64, 10, 3, torch.bfloat16)
    plain = nn.Linear(64, 48)
    with torch.no_grad():
        plain.weight.copy_(fp4.dequantize("nvfp4", fp4.quantize("nvfp4", layer.weight.detach()), torch.float32))
        plain.bias.copy_(layer.bias)
    results = []
    for module in (layer, plain):
        given = x.float().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = module(given)
        y.backward(dy)
        assert given.grad is not None
        results.append([y, given.grad, module.weight.grad, module.bias.grad])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_codes_follow_the_master_and_are_no_state() -> None:
    torch.manual_seed(0)
    model = LanguageModel(TINY)
    names = [name for name, _ in model.named_parameters()]
    before = dict(model.named_parameters())
    layers = install(model, CPU, torch.float32)
    assert len(layers) == 4 * TINY.layers and not isinstance(model.head, TrainedFP4Linear)
    assert {name: id(p) for name, p in model.named_parameters()} == {name: id(p) for name, p in before.items()}
    assert set(model.state_dict()) == {*names, "head.weight"}
    first = layers[0]
    codes = first.codes.clone()
    with torch.no_grad():
        first.weight.mul_(-1)
    assert torch.equal(first.codes, codes)
    first.encode()
    assert not torch.equal(first.codes, codes)
    with masters_aside(layers):
        found, _ = discover(model)
        units, _ = unit_sizes(TINY, 4, without_matrices=True)
        assert [u.size_bytes for u in found] == [u.size_bytes for u in units]
    assert [name for name, _ in model.named_parameters()] == names


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter")
@settings(max_examples=10)
@given(st.integers(1, 20), st.integers(1, 8), st.integers(0, 2**20))
def test_the_encoding_kernel_gives_the_same_codes(n: int, blocks: int, seed: int) -> None:
    layer, _, _ = drawn(n, 16 * blocks, 1, seed, torch.float32)
    packing = Packing(n, 16 * blocks)
    memory = torch.zeros(packing.size_bytes, dtype=torch.uint8)
    _bind_encoder(layer.weight.detach(), packed_views(packing, memory))()
    mine = packed_views(packing, layer.codes)
    for name, tensor in packed_views(packing, memory).items():
        assert torch.equal(tensor.view(torch.uint8), mine[name].view(torch.uint8)), name


def test_what_cannot_be_encoded_is_refused() -> None:
    with pytest.raises(Unsupported, match="codec_shape"):
        layer_of(4, 24, True, torch.float32)
    with pytest.raises(Unsupported, match="codec_dtype"):
        TrainedFP4Linear(nn.Linear(16, 4).bfloat16(), torch.empty(4, 16), default_decoder(CPU))
    with pytest.raises(Unsupported, match="x_dtype"):
        layer_of(4, 16, True, torch.bfloat16)(torch.ones(2, 16))


# --- the command --------------------------------------------------------------------------------------------------

SMALL = ["--preset", "tiny", "--batch", "2", "--seq", "16", "--sample", "0", "--eval-batches", "1", "--device", "cpu"]


def data(base: Path) -> Path:
    path = base / "words.txt"
    path.write_text("the quick brown fox jumps over the lazy dog and runs away\n" * 120)
    return path


def train(base: Path, name: str, *more: str) -> list[dict[str, Any]]:
    argv = ["train", *SMALL, "--threads", "1", "--out", str(base / name), *more]
    if "--resume" not in more:
        argv += ["--data", str(data(base))]
    assert cli.main(argv) == 0
    return [json.loads(line) for line in (base / name / "log.jsonl").read_text().splitlines()]


def losses(log: list[dict[str, Any]]) -> list[float]:
    return [r[key] for r in log for key in ("loss", "validation_loss") if key in r]


def test_the_loss_falls_and_the_bytes_are_told(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = train(base, "out", "--use-fp4", "--batch", "4", "--seq", "32", "--steps", "30")
    by_step = {r["step"]: r["loss"] for r in log if "loss" in r}
    assert by_step[1] > 5 and by_step[30] < 3.2
    told = next(r["fp4"] for r in log if "fp4" in r)
    codes, places = fp4_blocks(TINY, Workload(4, 32, fp4=True))
    assert told == {"codes_bytes": sum(codes), "masters_bytes": 4 * TINY.linear_weights, "masters_on_host": 0}
    assert places and "adds the codes and saves nothing" in capsys.readouterr().out


@pytest.mark.parametrize("options", [[], ["--mixed-precision", "--gradient-checkpointing", "--accumulation", "2"]])
def test_resumed_with_and_without_tiers_it_is_bitwise_the_unbroken_run(base: Path, options: list[str]) -> None:
    given = ["--use-fp4", "--steps", "5", "--checkpoint-every", "2", *options]
    whole = losses(train(base, "whole", *given))
    mixed = bool(options)
    work = Workload(2, 16, "amp" if mixed else "fp32", checkpointing=mixed, fp4=True)
    card = find_card("8GB")
    room = next(
        size for size in range(card.context_bytes + 2**20, 2**30, 2**19)
        if place_or_none(work, size, accumulation=2 if mixed else 1)
    )  # fmt: skip
    tiers = ["--vgpu-auto", "--budget", f"{room}B"]
    tiered = train(base, "tiered", *given, *tiers)
    assert losses(tiered) == whole
    assert {r["fp4"]["masters_on_host"] for r in tiered if "fp4" in r} == {1}
    for more in (tiers, []):
        files.checkpoints(base / "tiered")[-1].unlink()
        assert losses(train(base, "tiered", "--resume", *more)) == whole


def place_or_none(work: Workload, size: int, accumulation: int) -> bool:
    """Whether a card of this size takes the training only with tiers."""
    card = replace(find_card("8GB"), memory_bytes=size)
    try:
        placed = place(TINY, work, card, tiers=True, accumulation=accumulation)
    except Exception as error:
        assert "--vgpu-auto" in str(error)
        return False
    return placed is not None and placed.residency is not None


def test_off_by_default_nothing_is_replaced(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = losses(train(base, "plain", "--steps", "3"))
    with monkeypatch.context() as patch:
        patch.setattr(training, "install", lambda *given: pytest.fail("installed unasked"))
        assert losses(train(base, "again", "--steps", "3")) == without
    assert losses(train(base, "fp4", "--steps", "3", "--use-fp4")) != without


def test_resuming_without_the_flag_it_began_with_goes_on_with_it_and_another_is_refused(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(base, "plain", "--steps", "2")
    assert cli.main(["train", "--out", str(base / "plain"), "--resume", "--use-fp4"]) == 2
    assert "--use-fp4 True differs" in capsys.readouterr().err


def test_the_estimate_counts_codes_and_masters() -> None:
    shape, work = PRESETS["vb-large"], Workload(2, 1024, "fp32", checkpointing=True)
    plain, packed = (estimate(shape, replace(work, fp4=on), "adamw", CARDS["h200"]) for on in (False, True))
    assert packed.parameters == plain.parameters and packed.optimizer == plain.optimizer
    assert packed.codes == sum(map(sum, fp4_blocks(shape, replace(work, fp4=True)))) > shape.linear_weights // 2
    assert packed.total == plain.total + packed.codes
    amp = [
        estimate(shape, replace(work, dtype="amp", checkpointing=False, fp4=on), "adamw", CARDS["h200"])
        for on in (False, True)
    ]
    assert amp[1].activations < amp[0].activations  # no 16-bit copies of the matrices are kept


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_codes_and_gradients_are_those_of_a_cpu_within_budget() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        device = torch.device("cuda")
        layer = layer_of(256, 512, True, dtype, device)
        x, dy = (torch.randn(64, size, device=device).to(dtype) for size in (512, 256))
        codes = {name: t.cpu() for name, t in packed_views(Packing(256, 512), layer.codes).items()}
        for name, tensor in fp4.quantize("nvfp4", layer.weight.detach().cpu()).items():
            assert torch.equal(codes[name].view(torch.uint8), tensor.view(torch.uint8)), name
        errors = worst(layer, x, dy)
        assert max(errors.values()) <= 1, errors
        with torch.no_grad():
            layer.weight.mul_(0.5)
        layer.encode()  # the launch that was bound reads the master as it is now
        layer.weight.grad = layer.bias.grad = None
        assert max(worst(layer, x, dy).values()) <= 1
