"""Our attention under scaled_dot_product_attention: chosen, compiled, trained with, refused, and taken away again.

The budget of a training run is derived by running it: attention's own elementwise budgets, of the forward and of each
gradient, are added with random signs to the exact results at every step. A run on our kernels must stay as near to the
maths backend's as those do; a run with another mask must not.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from vbench.reference.attention_backward import backward_oracle
from vbench.reference.ops.attention import ATTENTION, ATTENTION_BACKWARD
from vbench.spec import Numerics, resolve

sdpa = torch.nn.functional.scaled_dot_product_attention
DTYPE_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class Perturbed(torch.autograd.Function):
    """Causal attention in float64, rounded once, with +-budget of a kernel of the given numerics on every element."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, generator: torch.Generator) -> Tensor:
        b, h, s, d = q.shape
        case = ATTENTION.case(dtype=DTYPE_NAMES[q.dtype], causal="top_left", b=b, hq=h, hk=h, sq=s, sk=s, d=d)
        inputs = {"q": q.detach(), "k": k.detach(), "v": v.detach()}
        found = resolve(ATTENTION.oracle)(case, inputs, numerics_of(q), None)
        ctx.generator, ctx.lse = generator, found["lse"].value.float()
        out = shaken(found["out"], generator).to(q.dtype)
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        b, h, s, d = q.shape
        case = ATTENTION_BACKWARD.case(dtype=DTYPE_NAMES[q.dtype], causal="top_left", b=b, hq=h, hk=h, sq=s, sk=s, d=d)
        inputs = {"q": q, "k": k, "v": v, "out": out, "lse": ctx.lse, "dout": grads[0]}
        found = backward_oracle(case, inputs, numerics_of(q), None)
        return (*(shaken(found[name], ctx.generator).to(q.dtype) for name in ("dq", "dk", "dv")), None)


def numerics_of(q: Tensor) -> Numerics:
    return Numerics("fp32" if q.dtype == torch.float32 else "tensor_core", probabilities=DTYPE_NAMES[q.dtype])


def shaken(expected: Any, generator: torch.Generator) -> Tensor:
    """Value plus or minus budget, each sign drawn."""
    signs = torch.randint(0, 2, expected.value.shape, generator=generator).to(expected.value) * 2 - 1
    result: Tensor = expected.value + signs * expected.budget
    return result


class Block(nn.Module):
    """A GPT block on bytes: embedding, causal attention, MLP, logits."""

    def __init__(self, width: int, heads: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.heads, self.attend = heads, attend
        self.embed, self.logits = nn.Embedding(64, width), nn.Linear(width, 64)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        b, s, width = x.shape
        q, k, v = (t.view(b, s, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norms[0](x)).chunk(3, dim=2))
        x = x + self.proj(self.attend(q, k, v).transpose(1, 2).reshape(b, s, width))
        logits: Tensor = self.logits(x + self.mlp(self.norms[1](x)))
        return logits


def losses(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    steps: int,
    device: str,
    dtype: torch.dtype,
    sizes: tuple[int, int, int, int],
    compiler: str = "",
) -> Tensor:
    """Loss after each of ``steps`` steps of SGD from the same weights on the same tokens, float64 [steps].

    Args:
        sizes: batch, length, heads, head dim.
    """
    batch, length, heads, d = sizes
    torch.manual_seed(0)
    model: Any = Block(heads * d, heads, attend).to(device=device, dtype=dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    tokens = torch.randint(0, 64, (batch, length + 1), generator=torch.Generator().manual_seed(1)).to(device)
    run = torch.compile(model, backend=compiler, fullgraph=True) if compiler else model
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(run(tokens[:, :-1]).flatten(0, 1).float(), tokens[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        found.append(loss.detach().double().cpu())
    return torch.stack(found)


def distances(
    steps: int, device: str, dtype: torch.dtype, sizes: tuple[int, int, int, int], compiler: str
) -> dict[str, float]:
    """Largest difference of a loss from the maths backend's: ours, the perturbed runs' largest, and a wrong mask's."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from vbench.kernels.triton import attention_sdpa

    def through(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, is_causal=True)

    def unmasked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v)

    def run(attend: Callable[[Tensor, Tensor, Tensor], Tensor], backend: SDPBackend, how: str = "") -> Tensor:
        with sdpa_kernel(backend):
            return losses(attend, steps, device, dtype, sizes, how)

    maths = run(through, SDPBackend.MATH)
    with attention_sdpa.installed():
        ours = run(through, SDPBackend.FLASH_ATTENTION, compiler)
        wrong = run(unmasked, SDPBackend.FLASH_ATTENTION)
    shaken_runs = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)

        def perturbed(q: Tensor, k: Tensor, v: Tensor, generator: torch.Generator = generator) -> Tensor:
            result: Tensor = Perturbed.apply(q, k, v, generator)  # type: ignore[no-untyped-call]
            return result

        shaken_runs.append(losses(perturbed, steps, device, dtype, sizes))
    off = [float((r - maths).abs().max()) for r in (ours, wrong, *shaken_runs)]
    return {"ours": off[0], "wrong": off[1], "budget": max(off[2:]), "fell": float(maths[0] - maths[-1])}


def trained_on_cpu() -> dict[str, float]:
    torch.set_num_threads(1)
    return distances(5, "cpu", torch.float32, (1, 20, 2, 8), "aot_eager")


def behaviour(name: str) -> bool:
    """What holds of the registration, in the interpreting child."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from vbench.errors import Unsupported
    from vbench.kernels.triton import attention_sdpa
    from vbench.kernels.triton.attention_autograd import _of as kernel_of

    q, k, v = (torch.randn(1, 2, 9, 8, generator=torch.Generator().manual_seed(i)) for i in range(3))

    def call(**options: Any) -> Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return sdpa(q, k, v, **options)

    before = call(is_causal=True)
    assert attention_sdpa.active() is None
    with attention_sdpa.installed():
        assert attention_sdpa.active() == attention_sdpa.NAME
        if name in ("dropout", "scale", "mask"):
            refused: dict[str, dict[str, Any]] = {
                "dropout": {"dropout_p": 0.5},
                "scale": {"scale": 0.5},
                "mask": {"attn_mask": torch.zeros(9, 9)},
            }
            try:
                # Past SDPA's own choice, which turns to the maths backend for some of these.
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, **refused[name])
            except Unsupported as error:
                return error.rule == name
            return False
        ours = []
        with mock.patch.object(attention_sdpa, "kernel_of", side_effect=kernel_of) as asked:
            call(is_causal=True)
            ours.append(asked.call_count)
    with mock.patch.object(attention_sdpa, "kernel_of", side_effect=kernel_of) as asked:
        again = call(is_causal=True)
        ours.append(asked.call_count)
    return ours == [1, 0] and attention_sdpa.active() is None and torch.equal(before, again)


@pytest.mark.parametrize("name", ["restored", "dropout", "scale", "mask"])
def test_the_registration(interpreter: ProcessPoolExecutor, name: str) -> None:
    assert interpreter.submit(behaviour, name).result()


def test_without_the_registry_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vbench.errors import Unsupported
    from vbench.kernels.triton import attention_sdpa

    assert attention_sdpa.available()
    monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl")
    for refused in (attention_sdpa.register, attention_sdpa.active):
        with pytest.raises(Unsupported, match="no_flash_registry"):
            refused()


def test_a_block_trains_compiled_within_the_derived_budget(interpreter: ProcessPoolExecutor) -> None:
    found = interpreter.submit(trained_on_cpu).result()
    assert found["fell"] > 0.1
    assert found["ours"] <= found["budget"] < found["wrong"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU (about 3 minutes; with TRITON_INTERPRET=0)")
def test_a_block_trains_200_steps_on_the_gpu() -> None:
    assert os.environ.get("TRITON_INTERPRET") == "0", "set TRITON_INTERPRET=0: this test is of the compiled kernels"
    found = distances(200, "cuda", torch.bfloat16, (2, 128, 4, 64), "inductor")
    assert found["fell"] > 0.1
    assert found["ours"] <= found["budget"] < found["wrong"], found
