"""Compiles one kernel ahead of time, without a GPU, for ``vbench.backend.Configuration``.

Needs a process without TRITON_INTERPRET=1: there ``@triton.jit`` makes no compilable function.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from vbench.backend import Cubin

#: dtype as case ids name it -> type of a pointer to it.
POINTERS: Mapping[str, str] = {name: f"*{name}" for name in ("bf16", "fp16", "fp32")}


def compile_kernel(
    kernel: Any,
    arch: int,
    *,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    divisible: Iterable[str] = (),
    gluon: bool = False,
    **options: int,
) -> Any:
    """Triton's compiled kernel (``asm``, ``metadata``).

    Args:
        kernel: the jit function, Triton's or (``gluon``) Gluon's.
        arch: compute capability times ten.
        types: argument -> Triton type (``*bf16``, ``fp32``, ``tensordesc<...>``); those left out are ``i32``.
        constants: compile-time arguments. Give a stride of 1 here too: a launch makes it a constant.
        divisible: integers that are multiples of 16, as a launch would find. Pointers are so without being named.
        options: ``num_warps``, ``num_stages``.

    Raises:
        KeyError: a type, constant or divisible name that is no argument of the kernel.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile
    from triton.experimental.gluon._runtime import GluonASTSource

    names = list(kernel.arg_names)
    divisible = set(divisible)
    strangers = [name for name in (*types, *constants, *divisible) if name not in names]
    if strangers:
        raise KeyError(f"{strangers[0]} is no argument of {kernel.fn.__name__}; it has {', '.join(names)}")
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or (name in divisible and name not in constants)
    }
    source = (GluonASTSource if gluon else ASTSource)(
        fn=kernel, signature=signature, constexprs=dict(constants), attrs=attributes
    )
    return compile(source, target=GPUTarget("cuda", arch, 32), options=options)


def cubin(compiled: Any, **figures: float) -> Cubin:
    """What the gate takes: Triton asks for all its shared memory at the launch."""
    return Cubin(compiled.asm["cubin"], int(compiled.metadata.shared), figures)
