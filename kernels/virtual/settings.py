"""What a training is told, with the presets' defaults. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vbench.errors import DataError, UsageError

_LEAST: Mapping[str, int] = {
    "batch": 1, "seq": 1, "accumulation": 1, "eval_batches": 1, "steps": 0, "epochs": 0, "seed": 0, "eval_every": 0,
    "checkpoint_every": 0, "sample": 0,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Settings:
    """A training. Two with equal settings, data, machine and number of threads have bitwise equal losses.

    Args:
        model: name in ``shapes.PRESETS``.
        steps: optimizer steps; 0 where ``epochs`` says how many times to see the data instead.
        batch, seq, accumulation: sequences a forward, bytes of each, forwards a step.
        lr, weight_decay, clip: peak learning rate, of matrices, largest gradient norm.
        eval_every, eval_batches: steps between evaluations (0: only at the end), batches of each.
        checkpoint_every: steps between checkpoints (0: only at the end).
        sample: bytes to write at the end.
        device: cpu or cuda.
        use_fp4: the blocks' linear layers compute with nvfp4 codes of their float32 masters (``fp4_training.py``).
    """

    model: str
    steps: int
    epochs: int
    batch: int
    seq: int
    accumulation: int
    lr: float
    weight_decay: float
    clip: float
    seed: int
    eval_every: int
    eval_batches: int
    checkpoint_every: int
    sample: int
    device: str
    mixed_precision: bool
    gradient_checkpointing: bool
    use_flash_attn: bool
    use_fp4: bool

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least {least}")
        for name in ("lr", "clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise UsageError(f"--{name} {getattr(self, name)}: must be a number above zero")
        if bool(self.steps) == bool(self.epochs):
            raise UsageError("give --steps or --epochs, one of them, and above zero")

    def total_steps(self, windows: int) -> int:
        """Optimizer steps in all, for an epoch of ``windows`` samples."""
        if self.steps:
            return self.steps
        return math.ceil(self.epochs * windows / (self.batch * self.accumulation))


#: Options a preset sets where the user does not. Sizes fit a 2-core CPU (tiny) and a GPU of 8 GB (the others).
PRESET_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "tiny": {"model": "vb-tiny", "batch": 16, "seq": 128, "lr": 3e-3, "steps": 300},
    "small": {"model": "vb-small", "batch": 16, "seq": 256, "lr": 1e-3, "steps": 2000},
    "medium": {"model": "vb-medium", "batch": 4, "seq": 1024, "lr": 6e-4, "steps": 2000},
    "large": {"model": "vb-large", "batch": 2, "seq": 1024, "lr": 3e-4, "steps": 2000},
}

DEFAULTS: Mapping[str, Any] = {
    "epochs": 0, "accumulation": 1, "weight_decay": 0.1, "clip": 1.0, "seed": 0, "eval_every": 0, "eval_batches": 16,
    "checkpoint_every": 100, "sample": 200, "mixed_precision": False, "gradient_checkpointing": False,
    "use_flash_attn": False, "use_fp4": False,
}  # fmt: skip


def make_settings(preset: str, device: str, given: Mapping[str, Any]) -> Settings:
    """The preset's settings with what was given instead.

    Args:
        given: option -> value; ``None`` where it was left out.

    Raises:
        UsageError: unknown preset, or a value out of range.
    """
    if preset not in PRESET_DEFAULTS:
        raise UsageError(f"unknown --preset {preset!r}: one of {', '.join(PRESET_DEFAULTS)}")
    chosen = {name: value for name, value in given.items() if value is not None}
    values = {**DEFAULTS, **PRESET_DEFAULTS[preset], "device": device, **chosen}
    if chosen.get("epochs"):
        values["steps"] = chosen.get("steps", 0)
    return Settings(**values)


def stored_settings(body: Mapping[str, Any], where: str) -> Settings:
    """Settings as ``run.json`` holds them.

    Raises:
        DataError: fields are missing, unknown or of the wrong kind.
    """
    names = {f.name: f.type for f in fields(Settings)}
    kinds: Mapping[str, Any] = {"str": str, "int": int, "float": (int, float), "bool": bool}
    for name, kind in names.items():
        if name not in body:
            raise DataError(f"{where}: has no {name}")
        value = body[name]
        if not isinstance(value, kinds[str(kind)]) or (kind == "int" and isinstance(value, bool)):
            raise DataError(f"{where}: {name}={value!r} is no {kind}")
    unknown = sorted(set(body) - set(names))
    if unknown:
        raise DataError(f"{where}: {unknown[0]} is no setting")
    return Settings(**dict(body))
