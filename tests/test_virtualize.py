"""``virtualize``: this package's GPT and LLaMA compute bit for bit as with decoded weights, and come back unchanged."""

from __future__ import annotations

import copy
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vbench.errors import Unsupported, UsageError
from vbench.kernels.tiers.budget import Budget, BudgetError
from vbench.kernels.tiers.codec import BackendDecoder
from vbench.kernels.tiers.tiered import tier, tiered_modules
from vbench.kernels.virtual.linears import find_linears
from vbench.kernels.virtual.modules import LanguageModel
from vbench.kernels.virtual.shapes import PRESETS, ModelShape
from vbench.kernels.virtual.virtualize import Plan, Row, virtualize
from vbench.reference.fp4 import dequantize, quantize

GPT = ModelShape("tiny gpt", "gpt", 2, 32, 2, 2, 16, 64, 48, 16, tied=True)
LLAMA = replace(GPT, name="tiny llama", family="llama", kv_heads=1, inner=48, tied=False)
SHAPES = pytest.mark.parametrize("shape", [GPT, LLAMA], ids=lambda s: s.name)
ALL = Plan(fp4="all")


def make(shape: ModelShape, dtype: torch.dtype = torch.float32) -> LanguageModel:
    torch.manual_seed(0)
    model = LanguageModel(shape).to(dtype)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter)  # biases that are zero would hide one that is left out
    return model


def ids(seed: int = 0, vocabulary: int = 48) -> Tensor:
    return torch.randint(0, vocabulary, (2, 7), generator=torch.Generator().manual_seed(seed))


def decoded(model: LanguageModel) -> LanguageModel:
    """A twin with decode(encode(w)) in every linear layer that is tied to nothing."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for site in find_linears(twin):
            if not site.tied:
                site.weight.copy_(dequantize("nvfp4", quantize("nvfp4", site.weight), site.weight.dtype))
    return twin


def snapshot(model: nn.Module) -> list[tuple[str, int, int, str, Tensor]]:
    """Names, identities, places and values of every parameter, and the identity of every module."""
    parameters = [
        (n, id(p), p.data_ptr(), str(p.requires_grad), p.detach().clone()) for n, p in model.named_parameters()
    ]
    return parameters + [(n, id(m), 0, "", torch.empty(0)) for n, m in model.named_modules()]


def tiered(model: nn.Module) -> list[nn.Module]:
    """The modules of a model that are tiered now."""
    return [module for module in model.modules() if module in tiered_modules()]


def same(before: list[tuple[str, int, int, str, Tensor]], after: list[tuple[str, int, int, str, Tensor]]) -> bool:
    return [row[:4] for row in before] == [row[:4] for row in after] and all(
        torch.equal(a[4], b[4]) for a, b in zip(before, after, strict=True)
    )


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("triton", [False, True])
def test_outputs_are_those_of_the_decoded_weights(shape: ModelShape, dtype: torch.dtype, triton: bool) -> None:
    model = make(shape, dtype)
    twin, original, before = decoded(model), model(ids()).detach(), snapshot(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with virtualize(model, ALL, decoder=BackendDecoder("triton") if triton else None) as handle, torch.no_grad():
        out = model(ids())
        assert torch.equal(out, twin(ids())) and not torch.equal(out, original)
        now = model.state_dict()
        assert list(now) == list(state) and all(torch.equal(now[name], state[name]) for name in state)
        assert {row.kind for row in handle.rows()} == ({"fp4", "tied"} if shape.tied else {"fp4"})
        assert model.head.weight is model.embedding.weight if shape.tied else True
    assert same(before, snapshot(model)) and torch.equal(model(ids()), original)
    handle.undo()  # again: nothing


@SHAPES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp4_linear_takes_the_place_too(shape: ModelShape, dtype: torch.dtype) -> None:
    """On a CPU its engine is plain torch, so the same bits; another format; state, gradients and undo as before."""
    model = make(shape, dtype)
    for site in find_linears(model):
        site.weight.requires_grad_(site.tied)
    twin, before = decoded(model), snapshot(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with virtualize(model, Plan(linear="fused")) as handle:
        for one in (model, twin):
            one(ids(), ids(1)).backward()
        theirs = dict(twin.named_parameters())
        for name, p in model.named_parameters():
            mine, expected = p.grad, theirs[name].grad
            assert mine is not None and expected is not None and torch.equal(mine, expected), name
        now = model.state_dict()
        assert list(now) == list(state) and all(torch.equal(now[name], state[name]) for name in state)
        assert sum(row.device_bytes for row in handle.rows()) == sum(b.nbytes for b in model.buffers())
        model.load_state_dict({name: value * 1.5 for name, value in state.items()})
        model.load_state_dict(state)
    model.zero_grad()
    assert same(before, snapshot(model))
    with virtualize(model, Plan(linear="fused", format="absmax7_row")), torch.no_grad():
        assert not torch.equal(model(ids()), twin(ids()))


@SHAPES
def test_codes_take_their_packed_bytes_and_nothing_else_stays(shape: ModelShape) -> None:
    model = make(shape)
    with virtualize(model, ALL) as handle:
        for row in handle.rows():
            n, k = row.shape
            if row.kind == "fp4":
                # 4 bits an element, 8 for each 16 of them, and the global scale, in places of 512 bytes.
                assert row.before_bytes == 4 * n * k and 0 <= row.device_bytes - n * k * 9 // 16 < 3 * 512
        held = sum(b.numel() for b in model.buffers())
        assert held == sum(row.device_bytes for row in handle.rows())
        names = {name for name, _ in model.named_parameters()}
        assert not any(row.name + ".weight" in names for row in handle.rows() if row.kind == "fp4")


@SHAPES
@pytest.mark.parametrize("amp", [False, True])
def test_gradients_of_what_still_trains_are_those_of_the_decoded_model(shape: ModelShape, amp: bool) -> None:
    """Frozen linear layers in fp4; norms, biases and the embedding train through them."""
    model = make(shape)
    for site in find_linears(model):
        site.weight.requires_grad_(site.tied)
    twin = decoded(model)
    with virtualize(model, Plan()) as handle:
        assert all(row.kind != "kept" for row in handle.rows())
        for one in (model, twin):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
                loss = one(ids(), ids(1))
            loss.backward()
        theirs = dict(twin.named_parameters())
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        assert len(trained) > 5
        for name, p in trained:
            mine, expected = p.grad, theirs[name].grad
            assert mine is not None and expected is not None and torch.equal(mine, expected), name


@SHAPES
def test_what_trains_is_streamed_where_a_budget_is_given(shape: ModelShape) -> None:
    model = make(shape)
    for block in model.blocks:
        block.mlp.requires_grad_(False)
    twin = copy.deepcopy(model)
    for site in find_linears(twin):
        if ".mlp." in site.name:
            with torch.no_grad():
                site.weight.copy_(dequantize("nvfp4", quantize("nvfp4", site.weight), site.weight.dtype))
    before = snapshot(model)
    budget = Budget(gpu=100_000, pinned=1 << 20, activations=0)
    with virtualize(model, Plan(budget=budget)) as handle:
        kinds = {row.name: row.kind for row in handle.rows()}
        assert {kinds[name] for name in kinds if ".mlp." in name} == {"fp4"}
        assert {kinds[name] for name in kinds if ".attn." in name} == {"tiered"}
        assert handle.tiers is not None and handle.tiers.plan()["streamed_bytes_per_pass"] > 0
        optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], 0.1) for m in (model, twin)]
        for step in range(2):
            losses = [m(ids(step), ids(step + 1)) for m in (model, twin)]
            assert torch.equal(*losses)
            for loss, optimizer in zip(losses, optimizers, strict=True):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    assert [row[1] for row in before] == [row[1] for row in snapshot(model)] and not tiered(model)
    values = dict(twin.named_parameters())
    assert all(torch.equal(p, values[name]) for name, p in model.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("shape", [GPT, replace(LLAMA, width=64, heads=4, kv_heads=2)], ids=lambda s: s.name)
def test_attention_is_ours(shape: ModelShape) -> None:
    """Our kernel's result, called by hand on the same q, k and v, is what the model goes on with."""
    from vbench.kernels.triton.attention_autograd import attention

    model = make(shape)
    without = model(ids()).detach()
    seen: list[bool] = []
    blocks: Any = model.blocks
    with virtualize(model, Plan(fp4="none", attention="triton")):
        for block in blocks:
            attn = block.attn
            run = attn.kernel

            def spy(q: Tensor, k: Tensor, v: Tensor, causal: str, run: Any = run) -> Tensor:
                out: Tensor = run(q, k, v, causal)
                assert causal == "top_left" and k.shape[1] == shape.kv_heads
                seen.append(torch.equal(out, attention(q, k, v, causal="top_left")[0]))
                return out

            attn.kernel = spy
        out = model(ids())
    assert seen == [True] * shape.layers
    # Two right answers in fp32, summed in different orders.
    torch.testing.assert_close(out, without, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(ids()), without) and all(block.attn.kernel is None for block in blocks)


def test_a_state_dict_loaded_meanwhile_is_encoded_and_stays_after_undo() -> None:
    model, other = make(LLAMA), make(LLAMA)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    with virtualize(model, ALL):
        model.load_state_dict(other.state_dict())
        assert torch.equal(model(ids()), decoded(other)(ids()))
        broken = dict(other.state_dict())
        del broken["head.weight"]
        with pytest.raises(RuntimeError, match=r"Missing key.*head\.weight"):
            model.load_state_dict(broken)
        broken["head.weight"] = torch.zeros(3, 3)
        with pytest.raises(RuntimeError, match=r"size mismatch for head\.weight"):
            model.load_state_dict(broken)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters(), strict=True))


def test_threads_and_copies_decode_their_own_weights() -> None:
    """Layers of one shape share a place to decode to, a thread each; a copy of the model has codes of its own."""
    model = make(LLAMA)
    expected = [decoded(model)(ids(i)).detach() for i in range(4)]
    wrong: list[int] = []

    def run(i: int) -> None:
        with torch.no_grad():
            wrong.extend(i for _ in range(20) if not torch.equal(model(ids(i)), expected[i]))

    with virtualize(model, ALL):
        threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
        twin = copy.deepcopy(model)
        other = make(LLAMA)
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(1.5)
        model.load_state_dict(other.state_dict())
        assert torch.equal(twin(ids()), expected[0]) and torch.equal(model(ids()), decoded(other)(ids()))


def test_gpt2_xl_has_193_linear_layers_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = LanguageModel(PRESETS["gpt2-xl"])
    sites = find_linears(model)
    assert len(sites) == 48 * 4 + 1 and [site.name for site in sites if site.tied] == ["head"]
    assert sum(site.weight.numel() for site in sites) > 1.4e9
    with pytest.raises(Unsupported) as refused:
        virtualize(model, ALL)
    assert refused.value.rule == "meta_parameter"


def test_a_layer_in_two_places_and_a_weight_of_two_layers() -> None:
    shared = nn.Linear(16, 16)
    twin_weight = nn.Linear(16, 16, bias=False)
    twin_weight.weight = shared.weight
    model = nn.ModuleDict({"a": shared, "b": shared, "c": twin_weight})
    before, x = snapshot(model), torch.randn(3, 16)
    w = dequantize("nvfp4", quantize("nvfp4", shared.weight.detach()), torch.float32)
    with virtualize(model, ALL) as handle, torch.no_grad():
        assert [row.name for row in handle.rows()] == ["a", "c"] and model["a"] is model["b"]
        assert torch.equal(model["b"](x), nn.functional.linear(x, w, shared.bias))
        assert torch.equal(model["c"](x), nn.functional.linear(x, w))
    assert same(before, snapshot(model)) and model["a"] is shared and model["c"] is twin_weight


def test_refusals_name_the_rule_and_change_nothing() -> None:
    def refused(model: nn.Module, plan: Plan, kind: type[Exception] = Unsupported) -> Exception:
        before = snapshot(model)
        with pytest.raises(kind) as caught:
            virtualize(model, plan)
        assert same(before, snapshot(model)) and not tiered(model)
        return caught.value

    def rule(model: nn.Module, plan: Plan = ALL) -> str:
        error = refused(model, plan)
        assert isinstance(error, Unsupported)
        return error.rule

    assert rule(nn.Sequential(nn.Linear(16, 4), nn.Linear(24, 4))) == "codec_shape"
    assert rule(nn.Sequential(nn.Linear(16, 4), nn.Linear(16, 4).double())) == "codec_dtype"
    bad = nn.Linear(16, 4)
    bad.weight.data[0, 0] = float("inf")
    assert rule(nn.Sequential(nn.Linear(16, 4), bad)) == "nonfinite_weight"
    assert rule(nn.Sequential(nn.Linear(16, 4)), Plan(attention="triton")) == "no_known_attention"
    hooked = nn.Linear(16, 4)
    hooked.register_forward_hook(lambda *_: None)
    assert rule(nn.Sequential(hooked)) == "hooked"
    small = Budget(gpu=8, pinned=1 << 20, activations=0)
    refused(nn.Sequential(nn.Linear(16, 4), nn.LayerNorm(4)), Plan(fp4="all", budget=small), BudgetError)
    for plan in (Plan(fp4="some"), Plan(attention="flash"), Plan(keep=("7",)), Plan(format="nf4")):  # type: ignore[arg-type]
        refused(nn.Sequential(nn.Linear(16, 4)), plan, UsageError)
    refused(nn.ReLU(), ALL, UsageError)
    model = nn.Sequential(nn.Linear(16, 4), nn.LayerNorm(4))
    with virtualize(model, ALL):
        refused(model, ALL, UsageError)
    with (
        tier(model, budget=Budget(gpu=1 << 20, pinned=1 << 20, activations=0), device="cpu"),
        pytest.raises(UsageError),
    ):
        virtualize(model, ALL)
    kept = nn.Sequential(nn.Linear(24, 4), nn.Linear(16, 16))
    with virtualize(kept, Plan(fp4="all", keep=("0",))) as handle:
        assert handle.rows() == [Row("0", "kept", (4, 24), 384, 384), Row("1", "fp4", (16, 16), 1024, 3 * 512)]


def test_dropout_is_refused_by_the_replaced_attention() -> None:
    model = LanguageModel(GPT, dropout=0.1).train()
    with virtualize(model, Plan(fp4="none", attention="triton")), pytest.raises(Unsupported) as refused:
        model(ids())
    assert refused.value.rule == "dropout"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("budgeted", [False, True])
def test_on_a_gpu_codes_and_streams_change_no_bit(budgeted: bool) -> None:
    """Triton decodes there; what is no linear layer is streamed; undo brings every weight back to where it was."""
    shape = replace(LLAMA, width=256, heads=4, kv_heads=4, head_dim=64, inner=512, layers=4, vocabulary=512, context=64)
    model = make(shape, torch.bfloat16)
    twin = decoded(model).to("cuda")
    model.to("cuda")
    before = [(name, id(p), p.device.type, p.detach().cpu()) for name, p in model.named_parameters()]
    budget = Budget(gpu=1 << 23, pinned=1 << 24, activations=1 << 20) if budgeted else None
    x = ids(vocabulary=512).to("cuda")
    with virtualize(model, Plan(fp4="all", budget=budget)), torch.no_grad():
        for _ in range(5):
            assert torch.equal(model(x), twin(x))
    after = [(name, id(p), p.device.type, p.detach().cpu()) for name, p in model.named_parameters()]
    for old, new in zip(before, after, strict=True):
        assert old[:2] == new[:2] and torch.equal(old[3], new[3])
        assert budgeted or old[2] == new[2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("choice", ["triton", "gluon"])
def test_on_a_gpu_attention_is_ours(choice: Any) -> None:
    shape = replace(GPT, width=256, heads=4, kv_heads=4, head_dim=64, inner=512, vocabulary=512, context=256)
    if choice == "gluon" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the Gluon kernels are for Hopper")
    model = make(shape, torch.bfloat16).to("cuda")
    x = torch.randint(0, 512, (2, 256), device="cuda")
    with torch.no_grad():
        without = model(x)
        with virtualize(model, Plan(fp4="none", attention=choice)):
            out = model(x)
    assert not torch.equal(out, without)
    # bf16 keeps 8 bits; the two differ by roundings of the attention's output, carried through two blocks.
    assert (out - without).float().norm() / without.float().norm() < 2.0**-5
