"""Definition of a pass over a stack of layers whose weights lie on the host. Imports no torch."""

from __future__ import annotations

from vbench.reference.ops.fp4 import FORMAT_GROUPS
from vbench.spec import Case, Op, Output, Param

BF16_BYTES = 2
#: Weights as they are.
RAW = "raw"


def weight_bytes(case: Case) -> int:
    """All layers' weights together."""
    return case.axis("layers") * case.axis("width") ** 2 * BF16_BYTES


def _reject(case: Case) -> tuple[str, str] | None:
    if case.text("codec") != RAW and case.text("mode") == "train":
        return "codec_trainable", f"codec={case.text('codec')}: codes have no gradient; mode=forward"
    if case.text("codec") != RAW and case.axis("width") % FORMAT_GROUPS[case.text("codec")]:
        return "k_not_multiple_of_block", f"width={case.axis('width')} is no multiple of the codec's block"
    for name in ("layers", "width", "tokens", "gpu_bytes"):
        if case.axis(name) == 0:
            return "zero_size", f"{name}=0: a pass needs layers, width, tokens and device bytes for weights"
    return None


def _bytes(case: Case) -> int:
    """Each weight read once (forward); read twice, its gradient written once (train); x, y and their gradients once."""
    activations = case.axis("tokens") * case.axis("width") * BF16_BYTES
    train = case.text("mode") == "train"
    return weight_bytes(case) * (3 if train else 1) + activations * (4 if train else 2)


OFFLOAD_PASS = Op(
    name="offload_pass",
    summary=(
        "y = x W1^T, relu, W2^T, relu, ... W_layers^T with bf16 weights of which at most gpu_bytes may lie in device "
        "memory at any time, the rest on the host; mode train also gives dx and the gradients of three layers' weights"
    ),
    params=(
        Param("mode", "choice", "forward alone, or forward and backward", ("forward", "train"), "forward"),
        Param("layers", "axis", "linear layers"),
        Param("width", "axis", "features in and out of every layer"),
        Param("tokens", "axis", "rows of x"),
        Param(
            "gpu_bytes", "axis", "device bytes for weights; activations, their gradients and outputs lie beside them"
        ),
        Param(
            "codec",
            "choice",
            "how weights may lie on the host; nvfp4: the layers are decode(encode(w)), encoded as fp4_quantize does",
            (RAW, "nvfp4"),
            RAW,
            quiet=True,
        ),
    ),
    outputs=(
        Output("y", "bf16", "tokens, width"),
        Output("dx", "bf16", "tokens, width (train; else 0, 0)"),
        Output("dw_first", "bf16", "width, width (train; else 0, 0)"),
        Output("dw_middle", "bf16", "width, width (train; else 0, 0): of layer layers // 2"),
        Output("dw_last", "bf16", "width, width (train; else 0, 0)"),
    ),
    inputs="vbench.reference.offload:offload_inputs",
    oracle="vbench.reference.offload:offload_oracle",
    reject=_reject,
    metrics="vbench.reference.offload:offload_metrics",
    metrics_when_timed=True,
    flops=lambda c: (
        2 * c.axis("tokens") * c.axis("width") ** 2 * c.axis("layers") * (3 if c.text("mode") == "train" else 1)
    ),
    bytes=_bytes,
)

OPS: tuple[Op, ...] = (OFFLOAD_PASS,)
