"""Any causal model that transformers can build from a ``config.json``, estimated by tracing its own code."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vbench.errors import DataError, Unsupported, UsageError
from vbench.kernels.virtual.estimate import OPTIMIZERS, Estimator, Memory
from vbench.kernels.virtual.hardware import Card
from vbench.kernels.virtual.program import Attention, Workload
from vbench.kernels.virtual.trace import estimate_module


class HfModel:
    """A configuration; nothing is downloaded and no weight exists.

    Args:
        path: a ``config.json`` or its folder.

    Attributes:
        parameters: elements, tied ones once; context: longest sequence; version: of transformers.

    Raises:
        Unsupported: ``needs_transformers``: the package is missing.
        DataError: the file is unreadable, or transformers cannot build a causal model from it.
        UsageError: there is no such file.
    """

    def __init__(self, path: Path) -> None:
        try:
            import transformers
        except ImportError as error:
            raise Unsupported(
                "needs_transformers", "--implementation transformers: the package is missing: pip install transformers"
            ) from error
        self.path = path / "config.json" if path.is_dir() else path
        if not self.path.is_file():
            raise UsageError(f"{path}: no such file; --implementation transformers takes a config.json or its folder")
        try:
            body = json.loads(self.path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise DataError(f"{self.path}: not a readable JSON file: {error}") from error
        if not isinstance(body, dict) or not isinstance(body.get("model_type"), str):
            raise DataError(f"{self.path}: has no model_type")
        self._body: dict[str, Any] = body
        self._transformers: Any = transformers
        self.version = str(transformers.__version__)
        model = self._build("sdpa", checkpointing=False, dropout=True)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.context = int(getattr(model.config, "max_position_embeddings", 0) or 0) or 1024

    def estimator(self, card: Card) -> Estimator:
        """Memory of a step by workload and optimizer; each is traced once.

        Its result raises UsageError as ``estimate`` does, and DataError where the model's code cannot be traced.
        """

        @cache
        def of(work: Workload, optimizer: str) -> Memory:
            if work.batch < 1 or work.sequence < 1:
                raise UsageError(f"--batch {work.batch} --seq {work.sequence}: both must be at least 1")
            if work.sequence > self.context:
                raise UsageError(f"--seq {work.sequence}: {self.path} has positions for {self.context} tokens")
            if optimizer not in OPTIMIZERS:
                raise UsageError(f"unknown --optimizer {optimizer!r}: one of {', '.join(OPTIMIZERS)}")
            model = self._build(work.attention, checkpointing=work.checkpointing, dropout=work.dropout)
            if work.dtype == "bf16":
                model = model.to(torch.bfloat16)

            def step(module: nn.Module, ids: Tensor) -> Tensor:
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=work.dtype == "amp"):
                    loss = module(input_ids=ids, labels=ids, use_cache=False).loss
                assert isinstance(loss, Tensor)
                return loss

            ids = torch.empty(work.batch, work.sequence, dtype=torch.int64, device="meta")
            try:
                return estimate_module(model, step, [ids], optimizer=optimizer, card=card)
            except Exception as error:  # the model's code may raise anything
                raise DataError(
                    f"{self.path}: transformers' code cannot be traced with fake tensors: {error}"
                ) from error

        return of

    def _build(self, attention: Attention, *, checkpointing: bool, dropout: bool) -> nn.Module:
        body = dict(self._body)
        if not dropout:
            body.update({name: 0.0 for name in body if name.endswith(("dropout", "pdrop"))})
        try:
            config = self._transformers.AutoConfig.for_model(**body)
            if not dropout:
                for name, value in config.to_dict().items():
                    if name.endswith(("dropout", "pdrop")) and isinstance(value, float):
                        setattr(config, name, 0.0)
            with torch.device("meta"):
                model: Any = self._transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
            if checkpointing:
                # transformers renamed it in 5.24 and deprecates the old name.
                renamed = hasattr(model, "activation_checkpointing_enable")
                (model.activation_checkpointing_enable if renamed else model.gradient_checkpointing_enable)()
        except Exception as error:  # a stranger's code, fed with a stranger's file
            raise DataError(f"{self.path}: transformers cannot build a causal model from it: {error}") from error
        model.train()
        assert isinstance(model, nn.Module)
        return model
