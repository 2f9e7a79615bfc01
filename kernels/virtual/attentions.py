"""Our attention kernels in the place of a model's own: in ``modules.LanguageModel`` and in transformers' models.

transformers is told of them by its own registry (``AttentionInterface``, ``AttentionMaskInterface``), so no file and no
class of its is changed. What the kernels do not compute is refused at the call, never handed to another kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from vbench.errors import Unsupported
from vbench.kernels.virtual.modules import SelfAttention

Choice = Literal["keep", "triton", "gluon"]

#: (q [b, hq, sq, d], k, v [b, hk, sk, d], rule of the mask) -> out like q.
Attention = Callable[[Tensor, Tensor, Tensor, str], Tensor]


def kernel(choice: Choice) -> Attention:
    """Op ``attention`` of backend ``triton``, with gradients.

    Raises:
        Unsupported: ``no_triton``: the package is missing.
    """
    try:
        from vbench.kernels.triton.attention_autograd import attention
    except ImportError as error:
        raise Unsupported("no_triton", f"attention={choice}: install Triton: pip install triton ({error})") from error
    variant = "" if choice == "triton" else choice

    def run(q: Tensor, k: Tensor, v: Tensor, causal: str) -> Tensor:
        return attention(q, k, v, causal=causal, variant=variant)[0]

    return run


def replace_attention(model: nn.Module, choice: Choice) -> Callable[[], None]:
    """Let every attention of ``model`` run our kernels.

    Returns:
        what undoes it.

    Raises:
        Unsupported: ``no_triton``; ``no_known_attention``: the model has none that we know how to replace.
    """
    run = kernel(choice)
    own = [module for module in model.modules() if isinstance(module, SelfAttention)]
    if own:
        for module in own:
            module.kernel = run
        return partial(_take_off, own)
    if callable(getattr(model, "set_attn_implementation", None)):
        return _replace_in_transformers(model, choice, run)
    raise Unsupported(
        "no_known_attention",
        f"{type(model).__name__} is neither this package's LanguageModel nor a transformers model; attention='keep'",
    )


def _take_off(modules: list[SelfAttention]) -> None:
    for module in modules:
        module.kernel = None


def _replace_in_transformers(model: Any, choice: Choice, run: Attention) -> Callable[[], None]:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = f"vbench_{choice}"
    ALL_ATTENTION_FUNCTIONS.register(name, partial(_transformers_attention, run))
    # Its mask is None where causality alone, or nothing, is to be masked, and a tensor otherwise.
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, sdpa_mask)
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    if model.config._attn_implementation != name:
        raise Unsupported(
            "no_known_attention",
            f"{type(model).__name__} does not ask transformers' registry for its attention; attention='keep'",
        )

    def undo() -> None:
        model.set_attn_implementation(before)

    return undo


def _transformers_attention(
    run: Attention,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The signature of transformers' AttentionInterface: q, k, v [b, heads, length, d]; returns [b, sq, heads, d].

    Raises:
        Unsupported: ``mask``, ``dropout``, ``scaling``, and ``attention_option``: what our kernels do not compute.
    """
    if attention_mask is not None:
        raise Unsupported(
            "mask", "padded, packed or windowed batches and prompts against a cache need a mask of their own, which "
            "these kernels do not take: equal lengths, or attention='keep'"
        )  # fmt: skip
    if dropout:
        raise Unsupported("dropout", f"these kernels have no dropout and the model asks for {dropout}: set it to 0")
    if scaling is not None and abs(scaling * query.shape[-1] ** 0.5 - 1) > 1e-6:
        raise Unsupported("scaling", f"these kernels scale by 1/sqrt({query.shape[-1]}), the model by {scaling}")
    for name in ("softcap", "position_bias", "s_aux", "sliding_window"):
        if others.get(name) is not None:
            raise Unsupported("attention_option", f"the model's attention has {name}: take attention='keep'")
    wants = getattr(module, "is_causal", True) if is_causal is None else is_causal
    # One query sees every key of the cache; more than one without a mask are as many as the keys.
    causal = "top_left" if wants and query.shape[2] > 1 else "none"
    return run(query, key, value, causal).transpose(1, 2), None
