"""``tier(module, codec="nvfp4")``: decode(encode(w)) bitwise, packed bytes counted, any timing, typed refusals."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.test_tiered_module import Model, by_address, same_gradients, tokens
from tests.test_tiers import BESIDE, COPY, LateLinks
from vbench.errors import Unsupported
from vbench.kernels.tiers import codec
from vbench.kernels.tiers.budget import Budget, BudgetError
from vbench.kernels.tiers.codec import BackendDecoder, TorchDecoder, encode, packed_views
from vbench.kernels.tiers.errors import TierError
from vbench.kernels.tiers.marks import Marks
from vbench.kernels.tiers.tiered import Tiered, tier
from vbench.kernels.tiers.units import Packing, discover
from vbench.reference.fp4 import dequantize, quantize

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def decoded(weight: Tensor) -> Tensor:
    return dequantize("nvfp4", quantize("nvfp4", weight), weight.dtype)


def linears(model: nn.Module) -> Iterator[nn.Linear]:
    """Linear layers whose weight no other kind of module shares."""
    embedded = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return (m for m in model.modules() if isinstance(m, nn.Linear) and id(m.weight) not in embedded)


def pair(**options: Any) -> tuple[Model, Model]:
    """A model with frozen linear weights, and the twin it must equal: with the decoded weights, untiered."""
    torch.manual_seed(0)
    mine = Model(**options)
    for module in linears(mine):
        module.weight.requires_grad_(False)
    theirs = copy.deepcopy(mine)
    with torch.no_grad():
        for module in linears(theirs):
            module.weight.copy_(decoded(module.weight))
    return mine, theirs


def coded(model: nn.Module, gpu: int | None = None, **options: Any) -> Tiered:
    pinned = options.pop("pinned", 1 << 22)
    file = options.pop("file", 0)
    folder = options.pop("folder", None)
    if gpu is None:
        gpu = least_bytes(model, options.get("slots", 2))
    budget = Budget(gpu=gpu, pinned=pinned, activations=0, file=file, dir=folder)
    return tier(model, budget=budget, device="cpu", codec="nvfp4", **options)


def least_bytes(model: nn.Module, slots: int = 2) -> int:
    """The smallest budget that is taken, from what ones that are too small say they lack."""
    gpu = 64
    for word in (" bytes less than", " short"):
        with pytest.raises(BudgetError) as refused:
            coded(model, gpu, slots=slots)
        gpu += int(str(refused.value).partition(word)[0].rpartition(" ")[2])
    return gpu


class LateStreams(LateLinks):
    """Copies and decodes run at random, as late as waits allow, each stream in its own order only; copies run ahead."""

    early = 0.5
    early_streams = (COPY, COPY, COPY, BESIDE)

    def copy(self, to: Tensor, source: Tensor, after: Marks) -> Marks:
        return super().copy(by_address(to), source, after)

    def compute_wait(self, marks: Marks) -> None:
        if self._forget != "compute_wait":
            self.host_wait(marks)  # a module computes at once, so that what it waits for must be over


@settings(max_examples=40)
@given(
    n=st.integers(1, 9),
    groups=st.integers(1, 7),
    dtype=st.sampled_from(DTYPES),
    scale=st.sampled_from([1.0, 1e-3, 3e4, 2.0**-120]),
    seed=st.integers(0, 1 << 16),
    chunk=st.sampled_from([16, 64, 1 << 22]),
)
def test_codes_are_those_the_format_defines(
    n: int, groups: int, dtype: torch.dtype, scale: float, seed: int, chunk: int
) -> None:
    gen = torch.Generator().manual_seed(seed)
    w = torch.randn(n, 16 * groups, generator=gen) * scale
    # Ties of the codes, zeros of both signs, and a block of nothing.
    w[0] = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0] * 2 * groups) * w.abs().max()
    w[-1, :16] = -0.0
    w = w.to(dtype)
    if not bool(torch.isfinite(w).all()):
        w = torch.nan_to_num(w, posinf=6e4, neginf=-6e4)
    packing = Packing(n, 16 * groups)
    memory_u8 = torch.full((packing.size_bytes,), 0xA5, dtype=torch.uint8)
    packed = packed_views(packing, memory_u8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(codec, "CHUNK", chunk)
        encode(w, packed, torch.device("cpu"))
        expected = quantize("nvfp4", w)
        for name in expected:
            assert torch.equal(packed[name].view(torch.uint8), expected[name].view(torch.uint8)), name
        for decoder in (TorchDecoder(), BackendDecoder("triton")):
            target = torch.full(w.shape, float("nan"), dtype=dtype)
            decoder.bind(packed, target)()
            exact = dequantize("nvfp4", expected, dtype)
            assert torch.equal(target, exact), type(decoder).__name__


@settings(max_examples=14, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    share=st.integers(0, 8),
    slots=st.integers(2, 4),
    schedule=st.none() | st.integers(0, 99),
    in_files=st.booleans(),
    orders=st.lists(st.permutations(range(3)).map(tuple) | st.just((0, 2)), min_size=1, max_size=3),
)
def test_a_module_computes_with_the_decoded_weights(
    tmp_path: Path, share: int, slots: int, schedule: int | None, in_files: bool, orders: list[tuple[int, ...]]
) -> None:
    mine, theirs = pair(layers=3)
    mine.requires_grad_(False)
    objects = dict(mine.named_parameters())
    gpu = least_bytes(mine, slots) + share * 3000
    links = None if schedule is None else (LateStreams(schedule, []), LateStreams(schedule, []))
    where = {"pinned": 14000, "file": 1 << 20, "folder": tmp_path} if in_files else {}
    with coded(mine, gpu, slots=slots, links=links, **where) as handle:
        assert (handle.plan()["file_bytes"] > 0) == in_files
        for order in orders * 2:
            with torch.no_grad():
                assert torch.equal(mine(tokens(), order), theirs(tokens(), order))
        state, expected = mine.state_dict(), theirs.state_dict()
        assert list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in expected)
    assert all(
        objects[name] is p and torch.equal(p, q)
        for (name, p), q in zip(mine.named_parameters(), theirs.parameters(), strict=True)
    )


@pytest.mark.parametrize("schedule", [None, 1, 2])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_what_trains_beside_codes_trains(schedule: int | None, checkpointed: bool) -> None:
    """Gradients flow through decoded weights, which the backward fetches again."""
    mine, theirs = pair(layers=3, checkpointed=checkpointed)
    slots = 6 if checkpointed else 2
    links = None if schedule is None else (LateStreams(schedule, []), LateStreams(schedule, []))
    with coded(mine, slots=slots, links=links) as handle:
        optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.01) for m in (mine, theirs)]
        for step in range(3):
            for model in (mine, theirs):
                model(tokens(step)).square().mean().backward()
            assert same_gradients(mine, theirs) == []
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        assert handle.stats()["to_device_bytes"] > 0
    assert all(torch.equal(a, b) for a, b in zip(mine.parameters(), theirs.parameters(), strict=True))


@pytest.mark.parametrize("forget", ["after", "beside_after", "compute_wait"])
def test_the_late_streams_see_a_wait_that_is_left_out(forget: str) -> None:
    def wrong(schedule: int, forget: str) -> bool:
        torch.manual_seed(schedule)
        mine = nn.Sequential(*(nn.Linear(16, 16) for _ in range(9))).requires_grad_(False)
        theirs = copy.deepcopy(mine)
        for layer in linears(theirs):
            layer.weight.copy_(decoded(layer.weight))
        links = (LateStreams(schedule, [], forget), LateStreams(schedule, [], forget))
        # More slots than staging buffers, so that a copy is issued while the decode before last is still to come.
        with coded(mine, slots=5, links=links), torch.no_grad():
            return any(not torch.equal(mine(x), theirs(x)) for x in torch.randn(4, 2, 16))

    assert any(wrong(schedule, forget) for schedule in range(8))
    assert not any(wrong(schedule, "") for schedule in range(8))


def test_the_plan_counts_packed_bytes_and_a_pass_moves_them() -> None:
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(4))).requires_grad_(False)
    packed = Packing(64, 64).size_bytes
    assert packed == 64 * 32 + 512 + 512  # codes, scales (256 bytes in a whole 512), the global scale
    slot = 64 * 64 * 4
    with coded(model, 2 * slot + 2 * packed) as handle, torch.no_grad():
        told = handle.plan()
        assert told["pinned_weight_bytes"] == told["streamed_bytes_per_pass"] == 4 * packed
        assert told["device_bytes"] == 2 * slot + 2 * packed and told["decode_staging_bytes"] == 2 * packed
        assert [unit["stored_bytes"] for unit in told["units"]] == [packed] * 4
        for _ in range(3):
            before = handle.stats()["to_device_bytes"]
            model(torch.ones(1, 64))
            assert handle.stats()["to_device_bytes"] - before == 4 * packed
        with pytest.raises(TierError, match="as codes; close"):
            model.load_state_dict({name: torch.zeros(64, 64) for name in model.state_dict()})
    raw = tier(model, budget=Budget(gpu=2 * slot, pinned=4 * slot, activations=0), device="cpu")
    assert raw.plan()["streamed_bytes_per_pass"] == 4 * slot
    raw.close()
    with coded(model, 8 * slot) as handle:
        assert (handle.plan()["device_bytes"], handle.plan()["decode_staging_bytes"]) == (4 * slot, 0)


def test_to_encode_what_was_decoded_changes_nothing() -> None:
    """A second ``tier`` of a module that ``close`` left decoded computes with the same weights."""
    mine, theirs = pair(layers=2)
    mine.requires_grad_(False)
    for _ in range(2):
        with coded(mine), torch.no_grad():
            assert torch.equal(mine(tokens(), (0, 1)), theirs(tokens(), (0, 1)))


def test_triton_decodes_into_slots_too() -> None:
    mine, theirs = pair(layers=2)
    mine.requires_grad_(False)
    with coded(mine, decoder=BackendDecoder("triton")), torch.no_grad():
        for _ in range(2):
            assert torch.equal(mine(tokens(), (0, 1)), theirs(tokens(), (0, 1)))


def test_refusals_name_the_rule_and_change_nothing() -> None:
    def refused(model: nn.Module, **options: Any) -> str:
        before = {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()}
        with pytest.raises(Unsupported) as caught:
            tier(model, budget=Budget(gpu=1 << 22, pinned=1 << 22, activations=0), device="cpu", **options)
        assert {name: (id(p), p.data_ptr()) for name, p in model.named_parameters()} == before
        return caught.value.rule

    assert refused(nn.Linear(16, 4), codec="nvfp4") == "codec_trainable"
    assert refused(nn.Linear(24, 4).requires_grad_(False), codec="nvfp4") == "codec_shape"
    assert refused(nn.Linear(16, 4).double().requires_grad_(False), codec="nvfp4") == "codec_dtype"
    assert refused(nn.Linear(16, 4), codec="zip") == "unknown_codec"
    broken = nn.Linear(16, 4).requires_grad_(False)
    broken.weight[1, 3] = float("nan")
    assert refused(broken, codec="nvfp4") == "nonfinite_weight"
    with pytest.raises(Unsupported) as caught:
        BackendDecoder("nobody")
    assert caught.value.rule == "no_decoder"


def test_a_weight_that_is_unfrozen_meanwhile_is_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)).requires_grad_(False)
    with coded(model, 1 << 20):
        model[0].weight.requires_grad_(True)
        with pytest.raises(Unsupported) as caught:
            model(torch.ones(1, 16))
        assert caught.value.rule == "codec_trainable"
        model.requires_grad_(False)
        model(torch.ones(1, 16))


def test_a_tied_weight_and_what_is_no_linear_layer_stay_raw() -> None:
    mine, _ = pair(layers=1)
    mine.requires_grad_(False)
    with coded(mine) as handle:
        told = {unit["name"]: unit["stored_bytes"] < unit["bytes"] for unit in handle.plan()["units"]}
    assert told["blocks.0.up"] and told["blocks.0.down"]
    assert not any(told[name] for name in ("embed", "(root)", "blocks.0.norm", "blocks.0.attention"))
    assert all(unit.stored_bytes == unit.size_bytes for unit in discover(mine)[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("share", [0, 3])
def test_on_a_gpu_streams_and_kernels_change_no_bit(share: int) -> None:
    """Copies, Triton's decodes and products on three streams, slots reused all the time; some layers stay or none."""
    torch.manual_seed(0)
    width, layers = 1024, 12
    mine = nn.Sequential(*(nn.Linear(width, width, dtype=torch.bfloat16) for _ in range(layers))).requires_grad_(False)
    theirs = copy.deepcopy(mine)
    for layer in linears(theirs):
        layer.weight.copy_(decoded(layer.weight))
    theirs.to("cuda")
    staging = 2 * (Packing(width, width).size_bytes + 2 * width + 512)
    gpu = (2 + share) * (2 * width * width + 4 * width) + staging
    budget = Budget(gpu=gpu, pinned=1 << 26, activations=0)
    with tier(mine, budget=budget, device="cuda", codec="nvfp4") as handle, torch.no_grad():
        assert sum(unit["resident"] for unit in handle.plan()["units"]) == share
        for seed in range(20):
            x = torch.randn(
                7, width, dtype=torch.bfloat16, device="cuda", generator=torch.Generator("cuda").manual_seed(seed)
            )
            assert torch.equal(mine(x), theirs(x)), seed
    assert all(torch.equal(p, q.cpu()) for p, q in zip(mine.parameters(), theirs.parameters(), strict=True))
