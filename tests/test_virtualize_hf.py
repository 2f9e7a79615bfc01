"""``virtualize`` on transformers' GPT-2 and Llama as they come: tiny random ones, nothing downloaded, no file changed.

Skipped, and counted as such, without the package: ``pip install 'vbench-kernels[models]'``; ``make models-test``, part
of ``make test``, runs them with it.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.test_virtualize import same, snapshot
from vbench.errors import Unsupported
from vbench.kernels.tiers.budget import Budget
from vbench.kernels.virtual.linears import find_linears, owners
from vbench.kernels.virtual.virtualize import Plan, virtualize
from vbench.reference.fp4 import dequantize, quantize

transformers = pytest.importorskip("transformers", reason="pip install 'vbench-kernels[models]'")

VOCABULARY = 48
KINDS = ("gpt2", "llama")
models = pytest.mark.parametrize("kind", KINDS)


def config(kind: str) -> Any:
    special: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None}
    if kind == "gpt2":
        dropouts = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
        return transformers.GPT2Config(
            n_layer=2, n_embd=32, n_head=2, vocab_size=VOCABULARY, n_positions=32, **dropouts, **special
        )
    return transformers.LlamaConfig(
        num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96,
        vocab_size=VOCABULARY, max_position_embeddings=32, tie_word_embeddings=False, **special,
    )  # fmt: skip


def make(kind: str, dtype: torch.dtype = torch.float32, attention: str = "sdpa") -> Any:
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config(kind), attn_implementation=attention)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and name.endswith("bias"):
            nn.init.normal_(parameter)
    return model.to(dtype).eval()


def ids(seed: int = 0, length: int = 7) -> Tensor:
    return torch.randint(0, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(seed))


def cached(model: Any, prompt: Tensor) -> dict[str, Any]:
    """The argument that goes on from ``prompt``; its name changes between releases of transformers."""
    cache = transformers.DynamicCache(config=model.config)
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    model(prompt, use_cache=True, **{name: cache})
    return {name: cache}


def twin_of(model: Any) -> Any:
    """A copy with decode(encode(w)) in each linear layer that is tied to nothing, a Conv1D as the same nn.Linear."""
    twin = copy.deepcopy(model)
    for site in find_linears(twin):
        if site.tied:
            continue
        n, k = site.shape
        linear = nn.Linear(k, n, bias=site.bias is not None, dtype=site.weight.dtype)
        weight = site.weight_nk(site.weight.detach()).contiguous()
        with torch.no_grad():
            linear.weight.copy_(dequantize("nvfp4", quantize("nvfp4", weight), weight.dtype))
            if site.bias is not None:
                linear.bias.copy_(site.bias)
        for parent, attribute in list(owners(twin, site.module)):
            setattr(parent, attribute, linear)
    return twin


@models
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_are_those_of_the_decoded_weights_and_undo_is_clean(kind: str, dtype: torch.dtype) -> None:
    model = make(kind, dtype)
    twin, before = twin_of(model), snapshot(model)
    with torch.no_grad():
        original = model(ids()).logits
        state = {name: value.clone() for name, value in model.state_dict().items()}
        with virtualize(model, Plan(fp4="all")) as handle:
            out = model(ids()).logits
            assert torch.equal(out, twin(ids()).logits) and not torch.equal(out, original)
            now = model.state_dict()
            assert list(now) == list(state) and all(torch.equal(now[name], state[name]) for name in state)
            kinds = [row.kind for row in handle.rows()]
        expected = 2 * 4 if kind == "gpt2" else 2 * 7 + 1
        assert kinds.count("fp4") == expected and kinds.count("tied") == len(kinds) - expected == (kind == "gpt2")
        assert same(before, snapshot(model)) and torch.equal(model(ids()).logits, original)
        if kind == "gpt2":
            assert model.lm_head.weight is model.transformer.wte.weight


@models
def test_generated_text_is_that_of_the_decoded_weights(kind: str) -> None:
    """With transformers' own cache: a prompt, then token by token."""
    model = make(kind)
    twin = twin_of(model)
    asked = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    with virtualize(model, Plan(fp4="all")):
        mine = model.generate(ids(), attention_mask=torch.ones_like(ids()), **asked)
    theirs = twin.generate(ids(), attention_mask=torch.ones_like(ids()), **asked)
    assert mine.shape == (2, 13) and torch.equal(mine, theirs)


@models
def test_attention_is_ours_in_prompts_and_with_a_cache(kind: str) -> None:
    model = make(kind)
    with torch.no_grad():
        full = model(ids(), use_cache=False).logits
        before = model.config._attn_implementation
        with virtualize(model, Plan(fp4="none", attention="triton")):
            assert model.config._attn_implementation == "vbench_triton"
            out = model(ids(), use_cache=False).logits
            step = model(ids()[:, 6:], **cached(model, ids()[:, :6])).logits
        # Two right answers in fp32, summed in different orders.
        torch.testing.assert_close(out, full, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(step[:, 0], full[:, 6], rtol=1e-4, atol=1e-4)
        assert model.config._attn_implementation == before and torch.equal(model(ids(), use_cache=False).logits, full)


@models
def test_what_our_attention_does_not_compute_is_refused(kind: str) -> None:
    model = make(kind)
    padded = torch.ones_like(ids())
    padded[0, :3] = 0
    with virtualize(model, Plan(fp4="none", attention="triton")):
        with pytest.raises(Unsupported) as refused:
            model(ids(), attention_mask=padded)
        assert refused.value.rule == "mask"
        with pytest.raises(Unsupported) as refused:  # three tokens against a cache of four
            model(ids()[:, 4:], **cached(model, ids()[:, :4]))
        assert refused.value.rule == "mask"
    scaled = make(kind)
    for module in scaled.modules():
        if hasattr(module, "scaling"):
            module.scaling = 1.0
    with virtualize(scaled, Plan(fp4="none", attention="triton")), pytest.raises(Unsupported) as refused:
        scaled(ids())
    assert refused.value.rule == "scaling"


@models
def test_training_the_rest_under_a_budget_is_bitwise_the_same(kind: str) -> None:
    model = make(kind).train()
    for site in find_linears(model):
        site.weight.requires_grad_(site.tied)
    twin = twin_of(model).train()
    for site in find_linears(twin):
        site.weight.requires_grad_(site.tied)
    objects = {name: id(p) for name, p in model.named_parameters()}
    budget = Budget(gpu=90_000, pinned=1 << 20, activations=0)
    with virtualize(model, Plan(budget=budget)) as handle:
        assert handle.tiers is not None
        for seed in range(2):
            losses = [m(input_ids=ids(seed), labels=ids(seed)).loss for m in (model, twin)]
            assert torch.equal(*losses)
            for loss in losses:
                loss.backward()
        theirs = dict(twin.named_parameters())
        for name, p in model.named_parameters():
            if p.requires_grad:
                assert p.grad is not None and torch.equal(p.grad, theirs[name].grad), name
    assert objects == {name: id(p) for name, p in model.named_parameters()}


def test_gpt2_xl_has_193_linear_layers_on_the_meta_device() -> None:
    large = transformers.GPT2Config(n_layer=48, n_embd=1600, n_head=25)
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(large)
    sites = find_linears(model)
    assert len(sites) == 48 * 4 + 1 and sum(site.transposed for site in sites) == 48 * 4
    assert [site.name for site in sites if site.tied] == ["lm_head"]
