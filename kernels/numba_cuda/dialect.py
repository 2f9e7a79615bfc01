"""The one place that imports numba.cuda, and the few things its simulator and real compilation spell differently.

``SIMULATED`` is fixed when numba is first imported (environment variable NUMBA_ENABLE_CUDASIM), so it is a constant of
the process and kernels are built for one of the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy

# numba-cuda's import registers an overload for numpy.row_stack, a deprecated alias of vstack that newer numpy lacks:
# without the name the import fails. Set only where missing.
vars(numpy).setdefault("row_stack", numpy.vstack)

from numba import config, cuda  # noqa: E402

SIMULATED = bool(config.ENABLE_CUDASIM)

_F = TypeVar("_F", bound=Callable[..., Any])


def device_function(function: _F) -> _F:
    """Mark a function that kernels call.

    The simulator calls it as plain Python. Its own wrapper swaps the module global ``cuda`` around every call and so
    races between simulated threads when the function lives in another module than the kernel. Hence the rule: a
    device function that uses ``cuda`` sits in the module of the kernels that call it.
    """
    if SIMULATED:
        return function
    compiled: _F = cuda.jit(device=True)(function)
    return compiled


def _load_words_simulated(words: Any, index: int) -> tuple[Any, Any, Any, Any]:
    return words[index], words[index + 1], words[index + 2], words[index + 3]


def _make_load_words() -> Any:
    """One 16-byte load of four uint32. numba knows arrays only to be aligned to their element, so plain indexing gives
    four 4-byte loads; the pointer must be a multiple of 16 bytes here."""
    from llvmlite import ir
    from numba import types
    from numba.cuda.extending import intrinsic

    def load_words(typing_context: Any, words: Any, index: Any) -> Any:
        if not (isinstance(words, types.Array) and words.ndim == 1 and words.layout == "C"):
            return None
        if words.dtype != types.uint32 or not isinstance(index, types.Integer):
            return None
        signature = types.UniTuple(types.uint32, 4)(words, types.int64)

        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            array = context.make_array(signature.args[0])(context, builder, arguments[0])
            vector = ir.VectorType(ir.IntType(32), 4)
            pointer = builder.bitcast(builder.gep(array.data, [arguments[1]]), vector.as_pointer())
            loaded = builder.load(pointer, align=16)
            parts = [builder.extract_element(loaded, ir.Constant(ir.IntType(32), i)) for i in range(4)]
            return context.make_tuple(builder, signature.return_type, parts)

        return signature, generate

    return intrinsic(load_words)


#: ``load_words(words, index)`` -> four consecutive uint32 from a C-contiguous uint32 array, 16-byte aligned.
load_words: Any = _load_words_simulated if SIMULATED else _make_load_words()


def _make_divide_near_one() -> Any:
    """div.approx.f32: 2 ulp for divisors in [2^-126, 2^126] (CUDA C++ programming guide, __fdividef)."""
    from numba.cuda import libdevice

    return libdevice.fast_fdividef


def _divide_simulated(numerator: Any, denominator: Any) -> Any:
    return numerator / denominator


#: ``divide_near_one(a, b)`` for float32 b near 1: natively without the slow path of IEEE division, whose calls made the
#: unrolled epilogue of the tiled kernel spill. Never for the codec, which must divide exactly.
divide_near_one: Any = _divide_simulated if SIMULATED else _make_divide_near_one()

__all__ = ["SIMULATED", "cuda", "device_function", "divide_near_one", "load_words"]
