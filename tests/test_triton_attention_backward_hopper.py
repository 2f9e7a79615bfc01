"""What of the Hopper attention backward can be judged without a GPU: dQ's last step (interpreted), and what the gate
must not let through. Its meaning is checked on a Hopper GPU (``vbench run``, docs/tuning/tune_attention_backward.py).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec

import pytest
import torch

from vbench.kernels.triton.attention_backward_gluon_host import DETERMINISTIC_TILES, TILES
from vbench.kernels.triton.attention_backward_tiles import ROW_PADDING
from vbench.kernels.triton.attention_gluon_host import HEAD_DIMS

# --- in the interpreting child ---------------------------------------------------------------------------------------


def panel_address(row: int, column: int, d: int) -> int:
    """Where the accumulator of a warp group's product keeps an element: PTX ISA, wgmma, figure of D's fragment.

    Thread 32 w + 4 g + t holds rows 16 w + g and 16 w + g + 8 and, of each 8 columns, 2 t and 2 t + 1. Thread after
    thread, four values of 8 columns at once.
    """
    panel = row // 64 * (d // 64) + column // 64
    r, c = row % 64, column % 64
    thread = r // 16 * 32 + r % 8 * 4 + c % 8 // 2
    return panel * 4096 + c // 8 * 512 + thread * 4 + r % 16 // 8 * 2 + c % 2


def finished(d: int, sq: int) -> bool:
    """Each sum, scaled and rounded once, is where it belongs, and nothing else was written."""
    from vbench.kernels.triton.attention_backward_finish import finish_dq

    b, hq, padded, scale = 2, 3, 128, 0.375
    sums = torch.randn(b * hq, padded, d, generator=torch.Generator().manual_seed(d + sq))
    order = torch.tensor([[panel_address(row, column, d) for column in range(d)] for row in range(padded)])
    stored = torch.empty(b * hq, padded * d)
    stored[:, order.flatten()] = sums.flatten(1)
    memory = torch.full((b, sq + 2, hq, d), float("nan"), dtype=torch.float16)
    dq = memory[:, 1:-1].transpose(1, 2)
    finish_dq[(b * hq * padded // 64,)](stored, dq, scale, hq, sq, padded, *dq.stride()[:3], D=d)
    right = torch.equal(dq, (sums * scale).half().view(b, hq, padded, d)[:, :, :sq])
    return right and bool(memory[:, [0, -1]].isnan().all())


# --- here ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sq", [1, 65, 128])
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_finish(interpreter: ProcessPoolExecutor, d: int, sq: int) -> None:
    assert interpreter.submit(finished, d, sq).result(timeout=60)


def test_steps_end_inside_the_padding() -> None:
    assert set(TILES) == set(DETERMINISTIC_TILES) == set(HEAD_DIMS)
    for tiles in (*TILES.values(), *DETERMINISTIC_TILES.values()):
        assert all(ROW_PADDING % tile.block_m == 0 and tile.q_stages >= 3 for tile in tiles)


SERIAL = """
    import json
    from vbench import gate, machine_code
    from vbench.kernels.triton.attention_backward_gluon_aot import products
    from vbench.kernels.triton.attention_backward_gluon_host import GluonBackwardTile

    configuration = products("bf16", 64, GluonBackwardTile(128, 3, 2), causal=False, deterministic=True)
    cubin = configuration.compile()
    judged = gate.judge(configuration, cubin, machine_code.read(cubin.code, 90))
    print(json.dumps([judged.outcome.value, judged.reason, judged.detail]))
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton to compile")
def test_products_that_run_one_by_one_are_caught() -> None:
    """Control of the bound on waits: ptxas finds no registers for two consumers without dQ at head dim 64."""
    command = [sys.executable, "-c", textwrap.dedent(SERIAL)]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    outcome, reason, detail = json.loads(done.stdout.splitlines()[-1])
    assert (outcome, reason) == ("INVALID", "bound") and "WARPGROUP.DEPBAR" in detail
