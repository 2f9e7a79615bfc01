"""Our attention under scaled_dot_product_attention: the same bits as the operator, refusals, training, restoring."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from torch import Tensor

#: Steps by device: the interpreter takes 0.1 s for one.
STEPS = {"cpu": 20, "cuda": 200}
LENGTH, HEADS, HEAD_DIM, WORDS = 12, 2, 8, 16


def _leaves(q_heads: int, kv_heads: int, *, rows_apart: bool) -> tuple[Tensor, ...]:
    import torch

    generator = torch.Generator().manual_seed(1)
    drawn = (torch.randn(2, 9, heads, 8, generator=generator) for heads in (q_heads, kv_heads, kv_heads))
    views = (t.transpose(1, 2) for t in drawn)
    return tuple((t if rows_apart else t.contiguous()).requires_grad_() for t in views)


def _with_gradients(call: Callable[..., Tensor], leaves: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    import torch

    out = call(*leaves)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return (out.detach(), *torch.autograd.grad((out * weights).sum(), leaves))


def _equal(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> bool:
    import torch

    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def under_sdpa(name: str) -> bool:
    """One property of the registration, in a process that interprets Triton."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    from vbench.errors import Unsupported
    from vbench.kernels.triton import attention_sdpa
    from vbench.kernels.triton.attention_autograd import attention

    leaves = _leaves(3, 3, rows_apart=name == "rows apart")

    def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v, is_causal=True)

    def operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, causal="top_left")[0]

    if name == "restored":
        before = _with_gradients(causal, leaves)
        with attention_sdpa.active():
            inside, ours = attention_sdpa.current(), _with_gradients(causal, leaves)
            with attention_sdpa.active("vbench_gluon"):
                inner = attention_sdpa.current()
            back = attention_sdpa.current()
        names = (inside, inner, back, attention_sdpa.current())
        same = _equal(before, _with_gradients(causal, leaves))
        return names == ("vbench", "vbench_gluon", "vbench", "") and same and not _equal(before, ours)
    if name == "recorded":
        from vbench.kernels.peers.torch_native import probe

        with attention_sdpa.active():
            versions = probe("cpu").versions
        return versions["flash_attention_impl"] == "vbench" and "flash_attention_impl" not in probe("cpu").versions
    if name == "refusals":
        q, k, v = leaves
        mask = torch.zeros(9, 9)
        calls: dict[str, Callable[[], object]] = {
            "scale": lambda: sdpa(q, k, v, scale=0.5),
            "mask": lambda: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask),
            "dropout": lambda: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.5),
            "dtype": lambda: sdpa(q.double(), k.double(), v.double()),
        }
        with attention_sdpa.active():
            for rule, call in calls.items():
                with pytest.raises(Unsupported) as caught:
                    call()
                assert caught.value.rule == rule
        with pytest.raises(Unsupported) as caught, attention_sdpa.active("FA9"):
            pass
        return caught.value.rule == "unknown_variant" and attention_sdpa.current() == ""
    with attention_sdpa.active():
        if name == "compiled":
            return _equal(
                _with_gradients(causal, leaves),
                _with_gradients(torch.compile(causal, backend="aot_eager", fullgraph=True), leaves),
            )
        return _equal(_with_gradients(causal, leaves), _with_gradients(operator, leaves))


@pytest.mark.parametrize("name", ["contiguous", "rows apart", "compiled", "restored", "recorded", "refusals"])
def test_under_sdpa(interpreter: ProcessPoolExecutor, name: str) -> None:
    assert interpreter.submit(under_sdpa, name).result(timeout=240)


def _block() -> Any:
    """A GPT block between an embedding and a head: pre-norm attention through SDPA, and an MLP."""
    import torch
    from torch import nn

    width = HEADS * HEAD_DIM

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(WORDS, width), nn.Embedding(LENGTH, width)
            self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
            self.head = nn.Linear(width, WORDS)

        def forward(self, tokens_BS: Tensor, attend: Callable[..., Tensor]) -> Tensor:
            b, s = tokens_BS.shape
            x = self.words(tokens_BS) + self.places.weight[:s]
            q, k, v = (t.view(b, s, HEADS, -1).transpose(1, 2) for t in self.qkv(self.norms[0](x)).chunk(3, dim=-1))
            x = x + self.out(attend(q, k, v).transpose(1, 2).reshape(b, s, -1))
            x = x + self.mlp(self.norms[1](x))
            logits: Tensor = self.head(self.norms[2](x))
            return logits

    torch.manual_seed(0)
    return Block()


def _sdpa(working: str, coarse_keys: bool, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA of float64 tensors in dtype ``working``: what differs between two runs then comes from attention alone.

    ``coarse_keys``: the control; keys are rounded to the next coarser format.
    """
    import torch

    dtype, coarser = {
        "fp32": (torch.float32, torch.bfloat16),
        "bf16": (torch.bfloat16, torch.float8_e4m3fn),
    }[working]
    keys = k.to(coarser).to(dtype) if coarse_keys else k.to(dtype)
    out = torch.nn.functional.scaled_dot_product_attention(q.to(dtype), keys, v.to(dtype), is_causal=True)
    return out.double()


def _at_the_budget(seed: int, device: str, dtype: str) -> Callable[..., Tensor]:
    """SDPA whose result and gradients are moved by their whole derived budgets, with random signs."""
    import torch

    from vbench.reference.attention import attention_oracle
    from vbench.reference.attention_backward import backward_oracle
    from vbench.reference.ops.attention import ATTENTION, ATTENTION_BACKWARD
    from vbench.spec import Numerics

    signs = torch.Generator().manual_seed(seed)
    numerics = Numerics("fp32" if dtype == "fp32" else "tensor_core", (), dtype, own_forward=True)

    def moved(want: Any, like: Tensor) -> Tensor:
        sign = torch.randint(0, 2, want.value.shape, generator=signs).to(device) * 2 - 1
        found: Tensor = (want.value + sign * want.budget).to(like.dtype)
        return found

    class Moved(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            b, h, s, d = q.shape
            sizes = {"b": b, "hq": h, "hk": h, "sq": s, "sk": s, "d": d}
            given = {"q": q, "k": k, "v": v}
            wanted = attention_oracle(ATTENTION.case(dtype=dtype, causal="top_left", **sizes), given, numerics, None)
            out = moved(wanted["out"], q)
            ctx.sizes = sizes
            ctx.save_for_backward(q, k, v, wanted["out"].value.to(q.dtype), wanted["lse"].value.float())
            return out

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
            q, k, v, out, lse = ctx.saved_tensors
            given = {"q": q, "k": k, "v": v, "out": out, "lse": lse, "dout": grads[0]}
            case = ATTENTION_BACKWARD.case(dtype=dtype, causal="top_left", **ctx.sizes)
            wanted = backward_oracle(case, given, numerics, None)
            return tuple(moved(wanted[f"d{name}"], given[name]) for name in ("q", "k", "v"))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        working = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
        out: Tensor = Moved.apply(*(t.to(working) for t in (q, k, v)))  # type: ignore[no-untyped-call]
        return out.double()

    return attend


def _losses(attend: Callable[..., Tensor], device: str, *, compiled: str = "") -> Tensor:
    """float64 [steps]: losses of plain gradient descent on a fixed batch of sequences."""
    import torch

    model = _block().to(device).double()
    tokens = (torch.arange(LENGTH + 1) * 5 + torch.arange(2)[:, None] * 3).remainder(WORDS).to(device)
    step = torch.compile(model, backend=compiled, fullgraph=True) if compiled else model
    losses = []
    for _ in range(STEPS[device]):
        logits = step(tokens[:, :-1], attend)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        for parameter, gradient in zip(
            model.parameters(), torch.autograd.grad(loss, tuple(model.parameters())), strict=True
        ):
            parameter.data.sub_(gradient, alpha=0.05)
        losses.append(loss.detach().cpu())
    return torch.stack(losses)


@contextmanager
def _forced(backend: str) -> Iterator[None]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(getattr(SDPBackend, backend)):
        yield


@lru_cache(maxsize=1)
def _maths_and_budget(device: str, dtype: str, compiled: str) -> tuple[Tensor, float]:
    """Losses of the SDPA-math run, and how far a run at the whole budget of every attention comes from it.

    The derived budgets of out, dq, dk and dv are elementwise; a simulation carries them through training, with random
    signs.
    """
    with _forced("MATH"):
        maths = _losses(partial(_sdpa, dtype, False), device, compiled=compiled)
    moved = _losses(_at_the_budget(0, device, dtype), device)
    return maths, float((moved - maths).abs().max())


def training_over_budget(device: str, dtype: str, compiled: str, *, fault: bool = False) -> float:
    """Largest distance of a training run's losses from the SDPA-math run's, over the propagated budget."""
    import torch

    from vbench.kernels.triton import attention_sdpa

    torch.set_num_threads(1)
    maths, budget = _maths_and_budget(device, dtype, compiled)
    assert maths[-1] < 0.9 * maths[0], "the run learns nothing, so it compares nothing"
    with nullcontext() if fault else attention_sdpa.active(), _forced("MATH" if fault else "FLASH_ATTENTION"):
        run = _losses(partial(_sdpa, dtype, fault), device, compiled=compiled)
    return float((run - maths).abs().max()) / budget


@pytest.mark.parametrize("fault", [False, True], ids=["ours", "control: coarse keys"])
def test_a_gpt_block_trains_as_with_sdpa_math(interpreter: ProcessPoolExecutor, fault: bool) -> None:
    """Through torch.compile; the control's keys are off by less than half a percent."""
    ratio = interpreter.submit(training_over_budget, "cpu", "fp32", "aot_eager", fault=fault).result(timeout=240)
    assert ratio > 1 if fault else ratio <= 1


GPU_SCRIPT = "from tests.test_attention_sdpa import on_a_gpu; on_a_gpu()"


def on_a_gpu() -> None:
    """Prints ours and the control's distance over the budget, 200 steps through inductor; exit 1 if either is wrong."""
    ours, control = (training_over_budget("cuda", "bf16", "inductor", fault=fault) for fault in (False, True))
    print(f"ours {ours:.3f} of the budget, control {control:.3f}")
    if not ours <= 1 < control:
        raise SystemExit(1)


def test_a_gpt_block_trains_200_steps_on_a_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", GPU_SCRIPT], env=environment, capture_output=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
