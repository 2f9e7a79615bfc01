"""How much memory a training step takes, what of it could be saved, and how large a batch fits. Standard library only.

The step is eager PyTorch over ``modules.py``: forward, backward, a fused optimizer, gradients set to None after each
step. Its memory is followed operation by operation (``program.py``, ``tape.py``), so that the peak is the largest sum
of what lives at one time, not the sum of maxima.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from vbench.errors import UsageError
from vbench.kernels.virtual.hardware import Card
from vbench.kernels.virtual.program import Program, Workload
from vbench.kernels.virtual.shapes import ModelShape
from vbench.kernels.virtual.tape import GRANULE_BYTES, Tape

#: optimizer -> (states as wide as a parameter, what they are); ``adamw8bit`` has its own width
OPTIMIZERS: Mapping[str, tuple[float, str]] = {
    "adamw": (2.0, "two moments in the parameters' type"),
    "momentum": (1.0, "one moment in the parameters' type"),
    "sgd": (0.0, "no state"),
    "adamw8bit": (0.0, "two moments of 1 byte and one fp32 scale for 256 values each (bitsandbytes' block size)"),
}
_ADAMW_8BIT_BYTES = 2 + 2 * 4 / 256

#: 4 bits a weight and one byte of scale for 16 of them
NVFP4_BYTES = 0.5 + 1 / 16


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes at the moment of the largest need. ``total`` is their sum.

    Args:
        parameters, gradients, optimizer: of the model; gradients: those that exist at that moment.
        activations: what forward operations made and that lives on for the backward.
        logits: made by output layer and loss, gradients of these included.
        workspace: gradients of activations, memory inside kernels, cuBLAS's workspaces.
        context: the CUDA context, outside PyTorch's allocator.
        peak_at: operation at which the peak is reached.
        working: what must be on the GPU whatever is tiered: the most that lives at one time (not always the peak's)
            beside parameters, gradients and optimizer states, context included.
        codes: of weights that compute in FP4, beside their masters, with the places they are decoded to.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    workspace: int
    context: int
    peak_at: str
    working: int
    codes: int = 0

    @property
    def allocated(self) -> int:
        """What ``torch.cuda.max_memory_allocated`` should read."""
        return self.total - self.context

    @property
    def total(self) -> int:
        return (
            self.parameters + self.gradients + self.optimizer + self.activations
            + self.logits + self.workspace + self.context + self.codes
        )  # fmt: skip


#: (workload, optimizer) -> memory of one step
Estimator = Callable[[Workload, str], Memory]


@dataclass(frozen=True, slots=True)
class Advice:
    """One change, what it would save at this batch, and what it costs.

    Args:
        change: the option to give.
        saves_bytes: of the total; negative where it would cost memory.
        total_bytes: after it.
        fits: whether that fits the card.
        cost: what is given up.
    """

    change: str
    saves_bytes: int
    total_bytes: int
    fits: bool
    cost: str


def estimate(shape: ModelShape, work: Workload, optimizer: str, card: Card) -> Memory:
    """The memory of one training step on ``card``.

    Raises:
        UsageError: a sequence longer than the model's context, batch or sequence below 1, dropout outside the gpt
            family, or an unknown optimizer.
    """
    check(shape, work, optimizer)
    states = optimizer_bytes(shape.parameters, work, optimizer)
    parameters = shape.parameters * work.parameter_bytes
    tape = Tape()
    loss = Program(shape, work, tape).forward()
    tape.backward(loss)
    blas = card.matrix_workspace_bytes if work.device == "cuda" else 0
    codes = sum(map(sum, fp4_blocks(shape, work)))
    working = tape.working_peak_bytes + blas + card.context_bytes + codes
    kinds = tape.peak.by_kind
    running = Memory(
        parameters, kinds["parameter_gradients"], states, kinds["activations"], kinds["logits"],
        kinds["activation_gradients"] + kinds["workspace"] + blas, card.context_bytes, tape.peak.when, working, codes,
    )  # fmt: skip
    # A fused optimizer makes no copies: in its step parameters, gradients and states are all there is.
    stepping = Memory(parameters, parameters, states, 0, 0, blas, card.context_bytes, "optimizer step", working, codes)
    return max(running, stepping, key=lambda m: m.total)


def fp4_blocks(shape: ModelShape, work: Workload) -> tuple[list[int], list[int]]:
    """Bytes of each piece of memory that ``work.fp4`` adds: codes by layer, and a place for each shape of weight."""
    if not work.fp4:
        return [], []
    matrices = [(n, k) for _, n, k, _ in shape.block_linears]
    # Codes, scales and the global scale each begin on a boundary of their own.
    codes = [
        sum(-(-size // GRANULE_BYTES) * GRANULE_BYTES for size in (n * k // 2, n * k // 16, 4)) for n, k in matrices
    ]
    return codes * shape.layers, [n * k * work.compute_bytes for n, k in dict.fromkeys(matrices)]


def check(shape: ModelShape, work: Workload, optimizer: str) -> None:
    """Refuse what has no meaning. Raises UsageError."""
    if work.batch < 1 or work.sequence < 1:
        raise UsageError(f"--batch {work.batch} --seq {work.sequence}: both must be at least 1")
    if shape.family == "gpt" and work.sequence > shape.context:
        raise UsageError(f"--seq {work.sequence}: {shape.name} has positions for {shape.context} tokens")
    if work.dropout and shape.family != "gpt":
        raise UsageError(f"--dropout: {shape.name} has none; leave it out")
    if optimizer not in OPTIMIZERS:
        raise UsageError(f"unknown --optimizer {optimizer!r}: one of {', '.join(OPTIMIZERS)}")


def optimizer_bytes(parameters: int, work: Workload, optimizer: str) -> int:
    """Bytes of optimizer state for ``parameters`` elements."""
    return state_bytes(parameters, work.parameter_bytes, optimizer)


def state_bytes(elements: int, element_bytes: int, optimizer: str) -> int:
    """Bytes of optimizer state for parameters of ``element_bytes`` each."""
    if optimizer == "adamw8bit":
        return int(elements * _ADAMW_8BIT_BYTES)
    return int(elements * OPTIMIZERS[optimizer][0] * element_bytes)


def estimator(shape: ModelShape, card: Card) -> Estimator:
    """``estimate`` for one model and card."""
    return lambda work, optimizer: estimate(shape, work, optimizer, card)


def largest_batch(of: Estimator, work: Workload, optimizer: str, card: Card, most: int = 1 << 16) -> int:
    """Most sequences whose step fits the card, at most ``most``; 0 where not even one does.

    Memory grows with the batch, nearly in a line: the line through two batches gives a guess, and the answer is
    bracketed from there, so that few steps are estimated.
    """

    def total(batch: int) -> int:
        return of(replace(work, batch=batch), optimizer).total

    one, two = total(1), total(2)
    if one > card.memory_bytes:
        return 0
    slope = max(1, two - one)
    low = 1
    high = min(most, max(2, 1 + (card.memory_bytes - one) // slope))
    width = 1
    while total(high) <= card.memory_bytes:
        if high == most:
            return most
        low, high, width = high, min(most, high + width), 2 * width
    width = 1
    while high - low > 1:
        # Near the guess on either side first; then halves.
        middle = max(low + 1, high - width) if high - width > low else (low + high) // 2
        if total(middle) <= card.memory_bytes:
            low = middle
        else:
            high, width = middle, 4 * width
    return low


def advise(of: Estimator, work: Workload, optimizer: str, card: Card) -> list[Advice]:
    """Every change not made yet, the most saving first."""
    now = of(work, optimizer)
    changes: list[tuple[str, Workload, str, str]] = []
    if work.dtype == "fp32":
        changes.append((
            "--dtype amp", replace(work, dtype="amp"), optimizer,
            "matrix products in bf16 (8 significant bits), a 16-bit copy of each weight; usually faster, not slower",
        ))  # fmt: skip
    if work.dtype != "bf16":
        changes.append((
            "--dtype bf16", replace(work, dtype="bf16"), optimizer,
            "weights and optimizer states in bf16: small updates round away, the loss may stall",
        ))  # fmt: skip
    if not work.checkpointing:
        changes.append((
            "--checkpointing", replace(work, checkpointing=True), optimizer,
            "each block's forward runs twice: 4/3 of the arithmetic",
        ))  # fmt: skip
    if work.attention == "eager":
        changes.append((
            "--attention sdpa", replace(work, attention="sdpa"), optimizer,
            "none: the same mathematics in one kernel, faster at length",
        ))  # fmt: skip
    if optimizer == "adamw":
        changes.append((
            "--optimizer adamw8bit", work, "adamw8bit", "moments rounded to 8 bits; needs a package that has it",
        ))  # fmt: skip
    if work.batch > 1:
        changes.append((
            f"--batch {work.batch // 2}", replace(work, batch=work.batch // 2), optimizer,
            "half the sequences at a time; accumulate two steps for the same batch, at lower GPU efficiency",
        ))  # fmt: skip
    out = []
    for change, changed, with_optimizer, cost in changes:
        then = of(changed, with_optimizer).total
        out.append(Advice(change, now.total - then, then, then <= card.memory_bytes, cost))
    return by_saving(out)


def by_saving(advice: list[Advice]) -> list[Advice]:
    """The most saving first."""
    return sorted(advice, key=lambda a: -a.saves_bytes)


def fp4_advice(shape: ModelShape, work: Workload, optimizer: str, card: Card) -> Advice:
    """What FP4 would save: only where the blocks' weight matrices are frozen."""
    saved = frozen_fp4_saving(shape, work, optimizer)
    total = estimate(shape, work, optimizer, card).total - saved
    return Advice(
        "FP4 for frozen weights", saved, total, total <= card.memory_bytes,
        "the blocks' weight matrices no longer train (nvfp4, 4.5 bits a weight): only for fine-tuning the rest",
    )  # fmt: skip


def frozen_fp4_saving(shape: ModelShape, work: Workload, optimizer: str) -> int:
    """Bytes saved if the blocks' weight matrices are nvfp4 and neither trained nor given optimizer states.

    Their gradients are left out where the peak comes before they exist, so that this is a lower bound.
    """
    weights = shape.linear_weights
    states = optimizer_bytes(weights, work, optimizer)
    return int(weights * (work.parameter_bytes - NVFP4_BYTES)) + states


def assumptions(shape: ModelShape, work: Workload, optimizer: str, card: Card) -> list[str]:
    """Every choice an estimate rests on, in words."""
    heads = "tied to the embedding (counted once)" if shape.tied else "with weights of its own"
    return [
        f"model: {shape.parameters:,} parameters; output layer {heads}; shapes from {shape.source}",
        "this package's modules: another implementation saves other tensors (--implementation transformers)",
        *step_assumptions(work, optimizer, card),
    ]


def step_assumptions(work: Workload, optimizer: str, card: Card) -> list[str]:
    """The choices that concern the step and the card."""
    kinds = {
        "fp32": "fp32 throughout, TF32 or not",
        "bf16": "parameters, gradients, optimizer states and arithmetic in bf16, no fp32 master copy",
        "amp": "fp32 parameters, gradients and states; bf16 autocast, whose copies of the weights are counted",
    }
    kernels = {
        "eager": "the score matrix exists and softmax's output is saved",
        "sdpa": "PyTorch's fused kernel: scores are not kept",
    }
    return [
        f"batch {work.batch}, sequence {work.sequence}",
        f"numbers: {kinds[work.dtype]}",
        f"attention: {work.attention}: {kernels[work.attention]}",
        "checkpointing: " + ("each block" if work.checkpointing else "none"),
        "dropout: " + ("on, masks of one byte an element" if work.dropout else "none"),
        f"optimizer: {optimizer}: {OPTIMIZERS[optimizer][1]}; fused, no temporaries",
        *(
            ["fp4: nvfp4 codes of the blocks' matrices beside float32 masters, all of which is kept"]
            if work.fp4
            else []
        ),
        "eager execution; gradients set to None after each step; loss in fp32 over all positions at once",
        f"cuBLAS workspaces: {card.matrix_workspace_bytes:,} bytes from the allocator",
        "the allocator's fragmentation is not in the total",
        f"card: {card.memory_bytes:,} bytes; {card.source}",
    ]


def memory_json(memory: Memory) -> dict[str, Any]:
    """Bytes by part, with the sums."""
    return {**asdict(memory), "allocated": memory.allocated, "total": memory.total}
