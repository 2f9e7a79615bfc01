"""``vbench selftest [--json]``: runs the corpus and prints what came of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from vbench import attack, commands


def selftest_command(wanted: Sequence[str], device: str, out: Path, *, as_json: bool) -> int:
    """Exit code 1 for a control that survived or an honest twin that was accused or died, 3 if nothing ran.

    Raises:
        UsageError, DataError: a name that is none, or a results folder that cannot be written.
    """
    controls, infos = attack.chosen(wanted)
    has_gpu = commands.device_of(device) == "cuda"
    records, folder = attack.run(controls, infos, has_gpu=has_gpu, out=out)
    findings = attack.judge(controls, records)
    body = attack.summary(findings)
    if as_json:
        print(json.dumps(body, indent=1))
    else:
        print("\n".join([*attack.lines(findings, body), f"records   {folder}"]))
    return attack.exit_code(body)
