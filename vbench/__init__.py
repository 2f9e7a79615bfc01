"""vbench: turns a document's performance claims into tests."""
