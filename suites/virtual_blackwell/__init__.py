"""The first document under test: its claims, in our words, beside what would decide them."""

from pathlib import Path

#: The claims ledger (TOML); its schema is described in ``vbench.claims``.
LEDGER = Path(__file__).with_name("claims.toml")
