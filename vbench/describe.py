"""``python -m vbench.describe NAME DISTRIBUTION [configurations]``: prints one JSON line about a backend, or about what
it compiles to. Run in a child process."""

from __future__ import annotations

import sys

from vbench.gate import in_order, to_json
from vbench.registry import describe_to_json, find_entry, load_backend
from vbench.spec import resolve


def main(argv: list[str]) -> None:
    # File descriptor 1 is left as it is: what the import prints there, even from C, is seen by the parent.
    info, backend = load_backend(find_entry(argv[0], argv[1]))
    if argv[2:] == ["configurations"]:
        line = to_json(in_order(list(resolve(backend.configurations)())))
    else:
        line = describe_to_json(info)
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
