"""Data files of the suites, as ``package:file``."""

from __future__ import annotations

#: Cases that once failed; ``vbench fuzz`` appends.
REGRESSIONS = "vbench.suites:regressions.jsonl"
#: Known failures of others, each with its issue.
WAIVERS = "vbench.suites:waivers.toml"
