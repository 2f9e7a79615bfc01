"""The training loop: a byte-level language model, resumable bit by bit.

After any kill, ``--resume`` takes the newest checkpoint and gives the losses of an unbroken run bitwise, on the same
machine with as many threads: parameters, optimizer states, random generators and the position in the data are restored,
and everything else follows from the settings in ``run.json``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vbench.errors import DataError, Unsupported
from vbench.kernels.tiers.budget import Budget
from vbench.kernels.tiers.tiered import Tiered, tier
from vbench.kernels.virtual import checkpoint as files
from vbench.kernels.virtual.checkpoint import Checkpoint
from vbench.kernels.virtual.corpus import Corpus, Source
from vbench.kernels.virtual.errors import CheckpointError, TrainingError
from vbench.kernels.virtual.folder import DATA_FILE, LOG_FILE, Log, TrainingFolder
from vbench.kernels.virtual.fp4_training import TrainedFP4Linear, install, masters_aside
from vbench.kernels.virtual.modules import LanguageModel
from vbench.kernels.virtual.settings import Settings
from vbench.kernels.virtual.shapes import PRESETS
from vbench.kernels.virtual.units import show_bytes

#: Checkpoints kept: the newest, and the one before in case a disk loses bytes.
KEPT_CHECKPOINTS = 2
#: Floor of the cosine schedule, as a share of the peak rate, and share of the steps that warm up.
LOWEST_RATE, WARMUP = 0.1, 0.05


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a training ended.

    Args:
        steps: done in all; ``validation_loss``: nats a byte at the end; ``sample``: text the model wrote.
    """

    steps: int
    validation_loss: float
    sample: str


class Trainer:
    """One training in its folder.

    Args:
        folder: held.
        settings: what to do.
        source: what the data was made from.
        resume: go on from the newest checkpoint, or from the start where there is none.
        tiering: stream weights within this, or ``None`` to keep everything on the device. Losses are the same bits
            either way on a CPU; on a GPU the optimizer of streamed weights runs on the host.
        gives_back: return the allocator's free segments after each step and evaluation (``placement.py``).
        say: takes lines of progress.
        scalars: takes (name, value, step); for TensorBoard.

    Raises:
        DataError: a sequence longer than the data; a checkpoint that is torn, altered or of another model.
        Unsupported: flash attention where it cannot be forced.
        BudgetError: ``tiering`` is too small for the largest unit and the activations.
    """

    def __init__(
        self,
        folder: TrainingFolder,
        settings: Settings,
        source: Source,
        *,
        resume: bool,
        tiering: Budget | None,
        gives_back: bool = False,
        say: Callable[[str], None],
        scalars: Callable[[str, float, int], None] = lambda name, value, step: None,
    ) -> None:
        self._folder, self._settings, self._source, self._say = folder, settings, source, say
        self._scalars = scalars
        self._device = torch.device(settings.device)
        self._gives_back = gives_back and self._device.type == "cuda"
        self._kernel = attention_kernel(settings)
        self._corpus = Corpus(folder.path / DATA_FILE, settings.seq, settings.seed)
        torch.manual_seed(settings.seed)
        shape = PRESETS[settings.model]
        # Drawn on the host wherever it will be: a GPU draws other numbers, and tiers must not change the model.
        self._model = LanguageModel(shape, checkpointing=settings.gradient_checkpointing)
        if tiering is None:
            self._model.to(self._device)
        computes_in = torch.bfloat16 if settings.mixed_precision else torch.float32
        self._fp4 = install(self._model, self._device, computes_in) if settings.use_fp4 else []
        self._tiered: Tiered | None = None
        if tiering is not None:
            # Nobody computes with a master: it stays on the host, and only its codes are on the device.
            with masters_aside(self._fp4):
                self._tiered = tier(self._model, budget=tiering, device=self._device)
            say(tier_line(self._tiered))
        if self._fp4:
            say(fp4_line(self._fp4, tiering is not None))
        self._optimizer = _optimizer(self._model, settings)
        self._allocate_what_stays()
        self.total_steps = settings.total_steps(self._corpus.windows)
        self.step = 0
        files.clean(folder.path)
        if resume:
            self._restore()
        elif files.checkpoints(folder.path):
            raise DataError(f"--out {folder.path}: holds checkpoints of another training; give another folder")
        self._log = Log(folder.path / LOG_FILE, self.step)

    def run(self) -> Outcome:
        """Train to the end. Raises TrainingError: a loss or gradient that is no number, or a checkpoint not written."""
        settings = self._settings
        self._model.train()
        last_said = 0.0
        validation: float | None = None
        try:
            while self.step < self.total_steps:
                start = time.perf_counter()
                rate = learning_rate(self.step, self.total_steps, settings.lr)
                for group in self._optimizer.param_groups:
                    group["lr"] = rate
                loss, norm = self._one_step()
                self.step += 1
                seconds = time.perf_counter() - start
                tokens_s = settings.batch * settings.accumulation * settings.seq / seconds
                self._log.write({
                    "step": self.step, "loss": loss, "lr": rate, "grad_norm": norm, "tokens_s": tokens_s,
                    "memory_bytes": self._memory_bytes(),
                    **({} if self._tiered is None else {"tiers": self._tiered.stats()}),
                    **({"fp4": fp4_bytes(self._fp4, self._tiered is not None)} if self._fp4 else {}),
                })  # fmt: skip
                self._scalars("loss", loss, self.step)
                self._scalars("learning rate", rate, self.step)
                last = self.step == self.total_steps
                if last or time.monotonic() - last_said > 5:
                    last_said = time.monotonic()
                    self._say(
                        f"step {self.step}/{self.total_steps}  loss {loss:.4f} nats/byte  {tokens_s:,.0f} tokens/s  "
                        + self._memory_line()
                    )
                if last or (settings.eval_every and self.step % settings.eval_every == 0):
                    validation = self._evaluate()
                    self._log.write({"step": self.step, "validation_loss": validation})
                    self._scalars("validation loss", validation, self.step)
                    self._say(f"step {self.step}/{self.total_steps}  validation loss {validation:.4f} nats/byte")
                if last or (settings.checkpoint_every and self.step % settings.checkpoint_every == 0):
                    self._save()
            if validation is None:  # resumed when nothing was left to do
                validation = self._evaluate()
            return Outcome(self.step, validation, self._sample())
        finally:
            self._log.close()
            if self._tiered is not None:
                self._tiered.close()

    # --- a step -----------------------------------------------------------------------------------------------------

    def _allocate_what_stays(self) -> None:
        """Optimizer states and cuBLAS's workspaces, which would otherwise come to lie among the first step's tensors
        and break up the room that the next step's largest ones need (``placement.py``)."""
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                self._optimizer.state[parameter] = {
                    # What AdamW makes at its first step; where a fused one looks for the count.
                    "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
                    "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                    "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
                }
        if self._device.type == "cuda":
            a = torch.zeros(16, 16, device=self._device, requires_grad=True)
            torch.autograd.backward((a @ a).sum())  # one workspace for this thread, one for autograd's

    def _one_step(self) -> tuple[float, float]:
        """Loss before the update, and the gradient's norm before clipping. No gradient is left."""
        settings = self._settings
        total = 0.0
        first = self.step * settings.batch * settings.accumulation
        for part in range(settings.accumulation):
            ids, targets = self._batch(first + part * settings.batch)
            loss = self._loss(ids, targets)
            value = loss.item()
            if not math.isfinite(value):
                raise TrainingError(self._blame(value, ids, targets))
            (loss / settings.accumulation).backward()  # type: ignore[no-untyped-call]
            total += value / settings.accumulation
        norm = float(nn.utils.clip_grad_norm_(self._model.parameters(), settings.clip))
        if not math.isfinite(norm):
            bad = [n for n, p in self._model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
            raise TrainingError(
                f"step {self.step + 1}: the loss is {total:.4f} but the gradient is not finite, from {bad[-1]} on "
                f"({len(bad)} parameters). {_NAN_ADVICE}"
            )
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._encode()
        self._give_back()
        return total, norm

    def _encode(self) -> None:
        for layer in self._fp4:
            layer.encode()

    def _give_back(self) -> None:
        if self._gives_back:
            torch.cuda.empty_cache()

    def _batch(self, position: int) -> tuple[Tensor, Tensor]:
        ids, targets = self._corpus.batch(position, self._settings.batch)
        return ids.to(self._device), targets.to(self._device)

    def _context(self) -> AbstractContextManager[Any]:
        if not self._settings.mixed_precision:
            return nullcontext()
        return torch.autocast(self._device.type, dtype=torch.bfloat16)

    def _loss(self, ids: Tensor, targets: Tensor) -> Tensor:
        with self._kernel(), self._context():
            loss = self._model(ids, targets)
        assert isinstance(loss, Tensor)
        return loss

    def _blame(self, value: float, ids: Tensor, targets: Tensor) -> str:
        """Which layer is the first whose parameters or output are not finite: the same batch again, with hooks."""
        where = first_bad_layer(self._model, lambda: self._loss(ids, targets))
        return f"step {self.step + 1}: the loss is {value}: {where}. {_NAN_ADVICE}"

    @torch.no_grad()
    def _evaluate(self) -> float:
        """Mean validation loss, in nats a byte."""
        self._model.eval()
        losses, weights = [], []
        for ids, targets in self._corpus.validation_batches(self._settings.batch, self._settings.eval_batches):
            losses.append(self._loss(ids.to(self._device), targets.to(self._device)).item())
            weights.append(len(ids))
        self._model.train()
        self._give_back()
        return sum(x * w for x, w in zip(losses, weights, strict=True)) / sum(weights)

    @torch.no_grad()
    def _sample(self) -> str:
        """Bytes the model writes after a line break, drawn at temperature 0.8, always from the same draws."""
        self._model.eval()
        generator = torch.Generator().manual_seed(self._settings.seed)
        ids = [ord("\n")]
        context = min(PRESETS[self._settings.model].context, self._settings.seq)
        for _ in range(self._settings.sample):
            window = torch.tensor([ids[-context:]], device=self._device)
            with self._context():
                logits = self._model(window)[0, -1, :256].float().cpu()
            ids.append(int(torch.multinomial(torch.softmax(logits / 0.8, -1), 1, generator=generator)))
        self._model.train()
        return bytes(ids[1:]).decode("utf-8", errors="replace")

    # --- state ------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        path = files.path_of(self._folder.path, self.step)
        if path.exists():  # made before a kill; the same bytes
            return
        tensors: dict[str, Tensor] = {f"model.{name}": tensor for name, tensor in _named(self._model)}
        for name, parameter in _named(self._model):
            for key, value in self._optimizer.state[parameter].items():
                tensors[f"optimizer.{key}.{name}"] = value
        tensors["rng.cpu"] = torch.get_rng_state()
        if self._device.type == "cuda":
            tensors["rng.cuda"] = torch.cuda.get_rng_state()
        state = {
            "step": self.step,
            "samples": self.step * self._settings.batch * self._settings.accumulation,
            "data": asdict(self._source),
            "settings": asdict(self._settings),
        }
        files.save(path, Checkpoint(tensors, state))
        for old in files.checkpoints(self._folder.path)[:-KEPT_CHECKPOINTS]:
            old.unlink()

    def _restore(self) -> None:
        found = files.checkpoints(self._folder.path)
        if not found:
            self._say("no checkpoint yet: from the start")
            return
        path = found[-1]
        held = files.load(path)
        state = held.state
        _refuse_another(path, state, self._settings, self._source)
        expected = {f"model.{name}": tensor for name, tensor in _named(self._model)}
        given = {name for name in held.tensors if name.startswith("model.")}
        if given != set(expected) or any(held.tensors[n].shape != t.shape for n, t in expected.items()):
            raise CheckpointError(path, "another_model", "its parameters are not this model's; give its own --out")
        with torch.no_grad():
            for name, parameter in _named(self._model):
                parameter.copy_(held.tensors[f"model.{name}"])
                for key, kept in self._optimizer.state[parameter].items():
                    kept.copy_(held.tensors[f"optimizer.{key}.{name}"])
        self._encode()
        torch.set_rng_state(held.tensors["rng.cpu"])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(held.tensors["rng.cuda"])
        self.step = int(state["step"])
        self._say(f"resumed after step {self.step} from {path.name}")

    def _memory_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _memory_line(self) -> str:
        where = "GPU" if self._device.type == "cuda" else "process"
        line = f"{where} peak {show_bytes(self._memory_bytes())}"
        if self._tiered is not None:
            now, stats = self._tiered.plan(), self._tiered.stats()
            host = now["pinned_weight_bytes"] + now["pinned_gradient_bytes"]
            line += (
                f", on the device {show_bytes(now['device_bytes'])} of weights, on the host {show_bytes(host)}; moved "
                f"{show_bytes(stats['to_device_bytes'])} in, {show_bytes(stats['to_host_bytes'])} out"
            )
        return line


_NAN_ADVICE = "The last checkpoint is from before; resume it with a smaller --lr in a new folder, or check the data"


def tier_line(tiered: Tiered) -> str:
    """Where a tiered model's weights lie."""
    where = tiered.plan()
    resident = sum(unit["bytes"] for unit in where["units"] if unit["resident"])
    return (
        f"tiers: {show_bytes(where['streamed_bytes_per_pass'])} of weights streamed each pass through "
        f"{where['slots']} slots of {show_bytes(where['slot_bytes'])}, {show_bytes(resident)} resident, "
        f"{show_bytes(where['pinned_weight_bytes'])} on the host"
    )


def fp4_bytes(layers: Sequence[TrainedFP4Linear], on_host: bool) -> dict[str, int]:
    """What FP4 codes take on the device, what their masters take, and whether these are on the host (0 or 1)."""
    return {
        "codes_bytes": sum(layer.codes.nbytes for layer in layers),
        "masters_bytes": sum(layer.weight.nbytes for layer in layers),
        "masters_on_host": int(on_host),
    }


def fp4_line(layers: Sequence[TrainedFP4Linear], on_host: bool) -> str:
    """What ``--use-fp4`` does to memory, in words."""
    found = fp4_bytes(layers, on_host)
    where = "on the host" if on_host else "beside them"
    return (
        f"fp4: {len(layers)} linear layers compute with nvfp4 codes, {show_bytes(found['codes_bytes'])}; their float32 "
        f"masters, {show_bytes(found['masters_bytes'])}, with gradients and moments are kept {where}: training with "
        "FP4 adds the codes and saves nothing"
    )


def learning_rate(step: int, total: int, peak: float) -> float:
    """Linear warm-up, then a cosine down to a tenth of ``peak``; ``step`` counts from 0."""
    warm = max(1, int(total * WARMUP))
    if step < warm:
        return peak * (step + 1) / warm
    done = (step - warm) / max(1, total - warm)
    return peak * (LOWEST_RATE + (1 - LOWEST_RATE) * 0.5 * (1 + math.cos(math.pi * done)))


def first_bad_layer(model: nn.Module, forward: Callable[[], object]) -> str:
    """Run ``forward`` and name the first module, in order of running, that made something not finite."""
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"parameter {name} is not finite"
    found: list[str] = []

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not output.isfinite().all():
                found.append(name or "the loss")

        return look

    handles = [module.register_forward_hook(hook(name)) for name, module in model.named_modules()]
    try:
        with torch.no_grad():
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return f"first not finite in the output of {found[0]}" if found else "no layer's output is; it came from the loss"


def _named(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters by name, tied ones once."""
    yield from model.named_parameters()


def _optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """Fused AdamW; weight decay on matrices only, as GPT-3 has it (Brown et al. 2020, appendix B: 0.1)."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(0.9, 0.95), fused=True)


def attention_kernel(settings: Settings) -> Callable[[], AbstractContextManager[Any]]:
    """A context that lets F.scaled_dot_product_attention take one kernel only, where that was asked for.

    Raises:
        Unsupported: ``flash_needs_cuda``.
    """
    if not settings.use_flash_attn:
        return nullcontext
    if settings.device != "cuda":
        raise Unsupported("flash_needs_cuda", "--use-flash-attn: there is no GPU here; leave it out, or add one")
    from torch.nn.attention import SDPBackend, sdpa_kernel

    # The flash kernel takes 16 bits only; in fp32 the memory-efficient one is the fused kernel there is.
    kernel = SDPBackend.FLASH_ATTENTION if settings.mixed_precision else SDPBackend.EFFICIENT_ATTENTION
    return lambda: sdpa_kernel([kernel])


def _refuse_another(path: Path, state: Mapping[str, Any], settings: Settings, source: Source) -> None:
    """A checkpoint of other settings or data would go on as something else. Raises CheckpointError."""
    theirs, ours = state["settings"], asdict(settings)
    different = [f.name for f in fields(settings) if theirs.get(f.name) != ours[f.name]]
    if different:
        name = different[0]
        raise CheckpointError(
            path, "another_training", f"it was made with {name}={theirs.get(name)!r}, this training has {ours[name]!r}"
        )
    if state["data"]["sha256"] != source.sha256:
        raise CheckpointError(path, "other_data", "it was trained on other data than the folder holds now")
