"""The operations of ``modules.py`` as a program for the tape: what each allocates, saves and frees. No torch.

Checked two ways: the saved bytes equal what ``torch.autograd.graph.saved_tensors_hooks`` counts on a CPU, for generated
shapes (``tests/test_virtual_estimate.py``), and for a GPT in 16 bits with dropout they are, per block, the published
formula ``s b h (34 + 5 a s / h)`` (Korthikanti et al. 2022, arXiv 2205.05198, equation 1), statistics of the norms
aside, which it leaves out.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Literal

from vbench.kernels.virtual.shapes import ModelShape
from vbench.kernels.virtual.tape import Tape, Value, WeightGrad

Dtype = Literal["fp32", "bf16", "amp"]
Attention = Literal["eager", "sdpa"]
Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Workload:
    """One training step.

    Args:
        batch, sequence: sequences, tokens of each.
        dtype: ``fp32``, ``bf16`` (parameters, states and arithmetic), or ``amp`` (fp32 parameters, bf16 autocast).
        attention: ``eager`` (the score matrix exists) or ``sdpa`` (PyTorch's fused flash kernel; ``fp32`` on a GPU: its
            memory-efficient kernel).
        checkpointing: each block is run again in the backward.
        dropout: on embedding, attention weights and both branches of a block. gpt only.
        device: whose kernels: a GPU fuses RMSNorm and keeps norm statistics in fp32, a CPU does neither.
        fp4: the blocks' linear layers compute with nvfp4 codes of their weights (``fp4_training.py``).
    """

    batch: int
    sequence: int
    dtype: Dtype = "fp32"
    attention: Attention = "sdpa"
    checkpointing: bool = False
    dropout: bool = False
    device: Device = "cuda"
    fp4: bool = False

    @property
    def tokens(self) -> int:
        return self.batch * self.sequence

    @property
    def parameter_bytes(self) -> int:
        """Bytes of one parameter, and of the residual stream's elements."""
        return 2 if self.dtype == "bf16" else 4

    @property
    def compute_bytes(self) -> int:
        """Bytes of one element of a matrix product's operands."""
        return 4 if self.dtype == "fp32" else 2


class Program:
    """A model's forward on a tape.

    Args:
        shape: the model.
        work: the step.
        tape: fresh.
    """

    def __init__(self, shape: ModelShape, work: Workload, tape: Tape) -> None:
        self.shape = shape
        self.work = work
        self.tape = tape
        self._parameters = tape.outside("parameters")
        #: 16-bit copies of weights, which autocast keeps until its context ends
        self._casts: list[Value] = []

    def forward(self) -> Value:
        """Token ids to loss; local names but the loss are dead on return."""
        shape, work, tape = self.shape, self.work, self.tape
        n, r = work.tokens, work.parameter_bytes
        tables = self._embedding_grads()
        x = tape.op("embedding", [], n * shape.width * r, weight_grads=tables[:1])
        if shape.family == "gpt":
            # The position rows are a slice of their table: its gradient is a table of zeros with the rows filled in.
            x2 = tape.op("positions", [x], n * shape.width * r, passes_gradient=True, weight_grads=tables[1:])
            tape.free(x)
            x = self._dropout(x2, "embedding")
        shared = self._shared()
        for index in range(shape.layers):
            run = partial(self._block, f"block{index}", shared)
            if work.checkpointing:
                x = tape.checkpoint(f"block{index}", run, x)
            else:
                y = run(tape, x)
                tape.free(x)
                x = y
        if not work.checkpointing:  # a checkpoint holds on to its arguments
            tape.free(*shared.values())
        y = self._norm("norm", x)
        tape.free(x)
        head = "embedding" if shape.tied else "head"
        logits = self._linear("head", y, shape.vocabulary, shape.width, bias=False, weight=head)
        tape.free(y)
        loss = self._loss(logits)
        tape.free(*self._casts)
        self._casts.clear()
        return loss

    def _embedding_grads(self) -> list[WeightGrad]:
        shape, r = self.shape, self.work.parameter_bytes
        out = [WeightGrad("embedding", shape.vocabulary * shape.width * r)]
        if shape.family == "gpt":
            out.append(WeightGrad("positions", shape.context * shape.width * r))
        return out

    def _shared(self) -> dict[str, Value]:
        """What all blocks share: the causal mask, the rotary angles in the type they are applied in."""
        work, shape, out = self.work, self.shape, {}
        if work.attention == "eager":
            out["mask"] = self.tape.constant("mask", work.sequence * work.sequence)
        if shape.family == "llama":
            size = work.sequence * shape.head_dim * work.compute_bytes
            for name in ("cos", "sin"):
                out[name] = self.tape.constant(name, size)
        return out

    # --- a block ----------------------------------------------------------------------------------------------------

    def _block(self, name: str, shared: dict[str, Value], tape: Tape, x: Value) -> Value:
        """One block; ``x``'s local name lives on. A recomputed block keeps its weight copies to itself."""
        assert tape is self.tape
        again, outer = self.work.checkpointing and tape.saving, self._casts
        if again:
            self._casts = []
        h = self._norm(f"{name}.norm1", x)
        h = self._attention(name, h, shared)
        x1 = self._residual(f"{name}.add1", x, h)
        h = self._norm(f"{name}.norm2", x1)
        h = self._mlp(name, h)
        x2 = self._residual(f"{name}.add2", x1, h)
        tape.free(x1)
        if again:
            tape.free(*self._casts)
            self._casts = outer
        return x2

    def _residual(self, name: str, x: Value, branch: Value) -> Value:
        branch = self._dropout(branch, name)
        out = self.tape.op(name, [x, branch], x.grad_bytes, passes_gradient=True)
        self.tape.free(branch)
        return out

    def _norm(self, name: str, x: Value) -> Value:
        shape, work = self.shape, self.work
        n, r = work.tokens, work.parameter_bytes
        size = n * shape.width * r
        grads = [WeightGrad(f"{name}.weight", shape.width * r)]
        if shape.family == "gpt":
            grads.append(WeightGrad(f"{name}.bias", shape.width * r))
            statistic = 4 if work.device == "cuda" else r
            return self.tape.op(
                name, [x], size, saves=[x], saves_new=[("mean", n * statistic), ("rstd", n * statistic)],
                weight_grads=grads,
            )  # fmt: skip
        if work.device == "cuda":
            return self.tape.op(name, [x], size, saves=[x], saves_new=[("rstd", n * 4)], weight_grads=grads)
        # Composite on a CPU: in fp32, a product by 1/rms that the weight's gradient needs, and a cast back.
        wide = x if r == 4 else self.tape.op(f"{name}.wide", [x], n * shape.width * 4)
        unit = self.tape.op(
            f"{name}.unit", [wide], n * shape.width * 4, saves=[wide], saves_new=[("rstd", n * 4)],
            workspace_bytes=n * shape.width * 4,
        )  # fmt: skip
        out = self.tape.op(f"{name}.scale", [unit], n * shape.width * 4, saves=[unit], weight_grads=grads)
        self.tape.free(unit)
        if wide is not x:
            self.tape.free(wide)
            narrow = self.tape.op(f"{name}.narrow", [out], size)
            self.tape.free(out)
            return narrow
        return out

    def _linear(self, name: str, x: Value, n_out: int, n_in: int, *, bias: bool, weight: str = "") -> Value:
        """``x``'s local name lives on."""
        tape, work = self.tape, self.work
        c, r = work.compute_bytes, work.parameter_bytes
        operand, saves = x, []
        grads = []
        parts = [(weight or name, n_out * n_in)] + ([(f"{name}.bias", n_out)] if bias else [])
        # Codes are decoded into a place that is there anyway; autocast has nothing to copy and nothing is saved.
        decoded = work.fp4 and name.startswith("block")
        for part, elements in parts:
            if work.dtype == "amp" and not (decoded and part == parts[0][0]):
                cast = tape.constant(f"{part} in 16 bits", elements * c)
                self._casts.append(cast)
                if part == parts[0][0]:
                    saves.append(cast)
            mixed = work.dtype == "amp"
            grads.append(WeightGrad(part, elements * r, elements * c if mixed else 0, not bias))
        if work.dtype == "amp" and x.grad_bytes != work.tokens * n_in * c:
            operand = tape.op(f"{name}.cast", [x], work.tokens * n_in * c)
        out = tape.op(name, [operand], work.tokens * n_out * c, saves=[operand, *saves], weight_grads=grads)
        if operand is not x:
            tape.free(operand)
        return out

    def _dropout(self, x: Value, name: str) -> Value:
        """Ends ``x``'s local name."""
        if not self.work.dropout:
            return x
        mask_size = self.work.tokens * self.shape.width
        return self.tape.op(f"{name}.dropout", [x], x.grad_bytes, saves_new=[("mask", mask_size)], frees=[x])

    def _attention(self, name: str, h: Value, shared: dict[str, Value]) -> Value:
        """Ends ``h``'s local name; returns the projected context."""
        shape, work, tape = self.shape, self.work, self.tape
        n, c = work.tokens, work.compute_bytes
        q_size, kv_size = n * shape.heads * shape.head_dim * c, n * shape.kv_heads * shape.head_dim * c
        linears = {linear[0]: linear for linear in shape.block_linears}
        if shape.family == "gpt":
            _, n_out, n_in, bias = linears["attn.qkv"]
            qkv = self._linear(f"{name}.attn.qkv", h, n_out, n_in, bias=bias)
            tape.free(h)
            q, k, v = tape.split(f"{name}.attn.split", qkv, 3)
        else:
            q, k, v = (
                self._linear(f"{name}.{part}", h, linears[part][1], linears[part][2], bias=linears[part][3])
                for part in ("attn.q", "attn.k", "attn.v")
            )
            tape.free(h)
            q = self._rotary(f"{name}.attn.q", q, q_size, shared)
            k = self._rotary(f"{name}.attn.k", k, kv_size, shared)
        if shape.kv_heads != shape.heads and (work.attention == "eager" or work.dtype == "fp32"):
            k = tape.op(f"{name}.attn.k.repeat", [k], q_size, frees=[k])
            v = tape.op(f"{name}.attn.v.repeat", [v], q_size, frees=[v])
        fused = self._fused_attention if work.attention == "sdpa" else self._eager_attention
        context = fused(f"{name}.attn", q, k, v, q_size, shared)
        _, n_out, n_in, bias = linears["attn.proj"]
        out = self._linear(f"{name}.attn.proj", context, n_out, n_in, bias=bias)
        tape.free(context)
        return out

    def _rotary(self, name: str, x: Value, size_bytes: int, shared: dict[str, Value]) -> Value:
        """x cos + rotate(x) sin; ends ``x``'s local name."""
        return self.tape.op(
            f"{name}.rotary", [x], size_bytes, saves=[shared["cos"], shared["sin"]], frees=[x],
            temporary_bytes=2 * size_bytes, workspace_bytes=2 * size_bytes,
        )  # fmt: skip

    def _fused_attention(self, name: str, q: Value, k: Value, v: Value, q_size: int, shared: dict[str, Value]) -> Value:
        work, shape = self.work, self.shape
        rows = work.batch * shape.heads * work.sequence
        workspace = 0
        if work.device == "cuda":
            # The flash backward sums dQ in fp32 and keeps a row sum (FlashAttention 2, flash_api.cpp: dq_accum,
            # softmax_d).
            workspace = rows * shape.head_dim * 4 + rows * 4
        return self.tape.op(
            f"{name}.sdpa", list({q: None, k: None, v: None}), q_size, saves=[q, k, v], saves_output=True,
            saves_new=[("logsumexp", rows * 4)], workspace_bytes=workspace, frees=[q, k, v],
        )  # fmt: skip

    def _eager_attention(self, name: str, q: Value, k: Value, v: Value, q_size: int, shared: dict[str, Value]) -> Value:
        work, shape, tape = self.work, self.shape, self.tape
        c = work.compute_bytes
        scores_elements = work.batch * shape.heads * work.sequence * work.sequence
        scores_size = scores_elements * c
        scaled = tape.op(f"{name}.scale", [q], q_size, frees=[q])
        operands = [self._contiguous(f"{name}.q", scaled, q_size), self._contiguous(f"{name}.k", k, q_size)]
        scores = tape.op(f"{name}.scores", operands, scores_size, saves=operands, frees=operands)
        masked = tape.op(f"{name}.mask", [scores], scores_size, saves=[shared["mask"]], frees=[scores])
        # Autocast runs softmax in fp32 on a GPU, in 16 bits on a CPU (torch/amp: the lists of each device).
        widened = work.dtype == "amp" and work.device == "cuda"
        if widened:
            masked = tape.op(f"{name}.wide", [masked], scores_elements * 4, frees=[masked])
        p = tape.op(f"{name}.softmax", [masked], masked.grad_bytes, saves_output=True, frees=[masked])
        if work.dropout:
            p = tape.op(f"{name}.dropout", [p], p.grad_bytes, saves_new=[("mask", scores_elements)], frees=[p])
        if widened:
            p = tape.op(f"{name}.narrow", [p], scores_size, frees=[p])
        v = self._contiguous(f"{name}.v", v, q_size)
        context = tape.op(f"{name}.context", [p, v], q_size, saves=[p, v], frees=[p, v])
        return tape.op(f"{name}.join", [context], q_size, frees=[context])

    def _contiguous(self, name: str, value: Value, size_bytes: int) -> Value:
        """A copy as [batch, heads, sequence, head_dim], which repeated keys and values are already; ends the name."""
        if self.shape.kv_heads != self.shape.heads and not name.endswith(".q"):
            return value
        return self.tape.op(f"{name}.copy", [value], size_bytes, frees=[value])

    def _mlp(self, name: str, h: Value) -> Value:
        """Ends ``h``'s local name."""
        shape, work, tape = self.shape, self.work, self.tape
        linears = {linear[0]: linear for linear in shape.block_linears}
        inner_size = work.tokens * shape.inner * work.compute_bytes
        _, n_out, n_in, bias = linears["mlp.up"]
        if shape.family == "gpt":
            up = self._linear(f"{name}.mlp.up", h, n_out, n_in, bias=bias)
            tape.free(h)
            a = tape.op(f"{name}.mlp.gelu", [up], inner_size, saves=[up], frees=[up])
        else:
            gate = self._linear(f"{name}.mlp.gate", h, n_out, n_in, bias=bias)
            opened = tape.op(f"{name}.mlp.silu", [gate], inner_size, saves=[gate], frees=[gate])
            up = self._linear(f"{name}.mlp.up", h, n_out, n_in, bias=bias)
            tape.free(h)
            a = tape.op(f"{name}.mlp.product", [opened, up], inner_size, saves=[opened, up], frees=[opened, up])
        _, n_out, n_in, bias = linears["mlp.down"]
        out = self._linear(f"{name}.mlp.down", a, n_out, n_in, bias=bias)
        tape.free(a)
        return out

    def _loss(self, logits: Value) -> Value:
        """Cross entropy in fp32 over all tokens; ends ``logits``'s local name, which the caller held until the end."""
        work, tape = self.work, self.tape
        wide_size = work.tokens * self.shape.vocabulary * 4
        wide = logits if work.compute_bytes == 4 else tape.op("loss.wide", [logits], wide_size)
        log_p = tape.op("loss.log_softmax", [wide], wide_size, saves_output=True)
        if wide is not logits:
            tape.free(wide)
        loss = tape.op("loss.nll", [log_p], 4, saves=[log_p], saves_new=[("weight", 4)])
        tape.free(log_p, logits)
        return loss
