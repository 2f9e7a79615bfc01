"""Out-of-tree plug-ins for tests: a module and its dist-info, on the path of this process and its children."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest


def install(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: str, *, entry: str | None = None, dist: str = ""
) -> None:
    """Make ``code`` importable as ``plugin_NAME`` and register its BACKEND as backend ``entry`` (default: ``name``)."""
    module = f"plugin_{name}"
    (folder / f"{module}.py").write_text(textwrap.dedent(code), encoding="utf-8")
    info = folder / f"{dist or module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist or module}\nVersion: 1.0\n", encoding="utf-8")
    (info / "entry_points.txt").write_text(f"[vbench.backends]\n{entry or name} = {module}:BACKEND\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder), prepend=":")


HONEST = """
    import torch
    from vbench.backend import Availability, DeclaredBackend
    from vbench.errors import Unsupported
    from vbench.spec import Numerics

    BACKEND = DeclaredBackend(
        name="honest", role="own", summary="an honest stranger",
        ops={"fp4_dequantize": "plugin_honest:make"}, probe_function="plugin_honest:probe",
    )

    def probe(device):
        return Availability(usable=device == "cpu", reason="cpu only")

    class Dequantize:
        numerics = Numerics("fp32")
        produces = ("weight",)
        deterministic = True

        def __init__(self, case):
            self.case = case

        def bind(self, inputs, out):
            e2m1 = [0, .5, 1, 1.5, 2, 3, 4, 6]
            table = torch.tensor(
                e2m1 + [-v for v in e2m1] if self.case.text("fmt") == "nvfp4" else [c - 8.0 for c in range(16)])

            def launch():
                codes = torch.stack((inputs["codes"] & 15, inputs["codes"] >> 4), -1).flatten(1).long()
                n, k = codes.shape
                scale = inputs["scale"].float()
                scale = scale.reshape(n, -1) if scale.numel() > 1 else scale.reshape(1, 1).expand(n, 1)
                value = table[codes] * scale.repeat_interleave(k // scale.shape[1], 1)
                out["weight"].copy_((value * inputs["global_scale"]).to(out["weight"].dtype))
            return launch

    def make(case, variant, device):
        if case.text("fmt") not in ("absmax7_tensor", "absmax7_row", "absmax7_g128", "nvfp4"):
            raise Unsupported("format", "the stranger knows four formats")
        return Dequantize(case)
"""

#: One variant a fault; each must leave exactly one record with the outcome named here.
FAULTS = {
    "segfault": "CRASHED",
    "hang": "TIMEOUT",
    "exit0": "CRASHED",
    "system_exit": "CRASHED",
    "zeros": "WRONG_VALUE",
    "nan": "NONFINITE",
    "raises": "RUNTIME_ERROR",
    "unwritten": "NONFINITE",
    "shape": "WRONG_SHAPE",
    "dtype": "WRONG_DTYPE",
    "mutates": "MUTATED_INPUT",
    "flaky": "NONDETERMINISTIC",
    "memory": "OUT_OF_MEMORY",
    "refuses": "UNSUPPORTED",
    "stdout": "WRONG_VALUE",
    "right_once": "WRONG_VALUE",
}

FAULTY = """
    import ctypes, os, sys, time
    import torch
    from vbench.backend import Availability, DeclaredBackend
    from vbench.errors import Unsupported
    from vbench.spec import Numerics

    VARIANTS = @VARIANTS@
    BACKEND = DeclaredBackend(
        name="faulty", role="own", summary="wrong on purpose",
        ops={"fp4_linear": "plugin_faulty:make"}, variants={"fp4_linear": VARIANTS},
        probe_function="plugin_faulty:probe",
    )

    def probe(device):
        return Availability(usable=True)

    class Kernel:
        numerics = Numerics("fp32")
        produces = ("y",)
        deterministic = True

        def __init__(self, case, variant):
            self.case, self.variant, self.calls = case, variant, 0

        def bind(self, inputs, out):
            from vbench.reference.linear import linear_oracle
            right = linear_oracle(self.case, inputs, self.numerics, None)["y"].value.to(out["y"].dtype)
            y, variant = out["y"], self.variant

            def launch():
                self.calls += 1
                if variant == "segfault":
                    ctypes.string_at(0)
                elif variant == "hang":
                    time.sleep(3600)
                elif variant == "exit0":
                    os._exit(0)
                elif variant == "system_exit":
                    sys.exit(0)
                elif variant in ("zeros", "stdout"):
                    print('{"outcome": "PASSED"}', flush=True)
                    y.zero_()
                elif variant == "nan":
                    y.copy_(right)
                    y[0, 0] = float("nan")
                elif variant == "raises":
                    raise RuntimeError("unsupported")  # a word in a message must not decide anything
                elif variant == "unwritten":
                    y[:, 1:] = right[:, 1:]
                elif variant == "shape":
                    return {"y": right[:, :-1]}
                elif variant == "dtype":
                    return {"y": right.double()}
                elif variant == "mutates":
                    y.copy_(right)
                    inputs["x"].add_(1)
                elif variant == "flaky":
                    y.copy_(right)
                    y[0, 0] = torch.nextafter(right[0, 0].float(), torch.tensor(9e9)) if self.calls % 2 else right[0, 0]
                elif variant == "memory":
                    raise MemoryError
                elif variant == "right_once":
                    y.copy_(right if self.calls == 1 else right * 2)

            return launch

    def make(case, variant, device):
        if variant == "refuses":
            raise Unsupported("because", "this kernel takes nothing")
        return Kernel(case, variant)
""".replace("@VARIANTS@", repr(tuple(FAULTS)))
