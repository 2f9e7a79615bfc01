"""``python -m vbench.describe NAME DISTRIBUTION``: prints one JSON line about a backend. Run in a child process."""

from __future__ import annotations

import sys

from vbench.registry import describe_to_json, find_entry, load_backend

if __name__ == "__main__":
    # File descriptor 1 is left as it is: what the import prints there, even from C, is seen by the parent.
    info, _ = load_backend(find_entry(sys.argv[1], sys.argv[2]))
    sys.stdout.write(describe_to_json(info) + "\n")
