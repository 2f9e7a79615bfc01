"""The subcommand ``train``: from options to a running ``Trainer``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from vbench.errors import DataError, Unsupported, UsageError
from vbench.kernels.tiers.budget import Budget, BudgetError
from vbench.kernels.tiers.units import ALIGN_BYTES
from vbench.kernels.virtual.corpus import Corpus, Source, digest_of, join
from vbench.kernels.virtual.errors import TrainingError
from vbench.kernels.virtual.estimate import advise, estimate, estimator
from vbench.kernels.virtual.folder import DATA_FILE, SETTINGS_FILE, TrainingFolder
from vbench.kernels.virtual.hardware import Card, find_card
from vbench.kernels.virtual.placement import least_bytes, place
from vbench.kernels.virtual.program import Workload
from vbench.kernels.virtual.settings import Settings, make_settings, stored_settings
from vbench.kernels.virtual.shapes import PRESETS
from vbench.kernels.virtual.units import show_bytes

#: Options of the command line that are settings, by name.
SETTING_OPTIONS = (
    "steps", "epochs", "batch", "seq", "accumulation", "lr", "weight_decay", "clip", "seed", "eval_every",
    "eval_batches", "checkpoint_every", "sample", "mixed_precision", "gradient_checkpointing", "use_flash_attn",
    "use_fp4",
)  # fmt: skip


def train(arguments: argparse.Namespace) -> int:
    """Run it.

    Raises:
        UsageError, DataError, Unsupported: bad input (exit code 2).
        TrainingError: it could not go on (exit code 1).
    """
    import torch

    if arguments.threads is not None:
        if arguments.threads < 1:
            raise UsageError(f"--threads {arguments.threads}: must be at least 1")
        torch.set_num_threads(arguments.threads)
    device = _device(arguments.device)
    scalars, close_scalars = _tensorboard(arguments.out) if arguments.tensorboard else ((lambda n, v, s: None), None)
    folder = TrainingFolder(arguments.out)
    try:
        if arguments.resume:
            settings, source, room = _resumed(folder, arguments, device)
        else:
            settings, source, room = _begun(folder, arguments, device)
        return _run(folder, settings, source, room, arguments.resume, scalars)
    except BrokenPipeError:
        raise  # the reader of our output, not the folder
    except OSError as error:
        raise TrainingError(
            f"{error.filename or folder.path}: {error.strerror or error}; checkpoints are as they were: "
            "go on with --resume"
        ) from error
    finally:
        folder.close()
        if close_scalars is not None:
            close_scalars()


@dataclass(frozen=True, slots=True)
class Room:
    """What a training may use.

    Args:
        tiering: what tiers may use, ``None`` where nothing streams.
        gives_back: see ``placement.Placement``.
    """

    tiering: Budget | None = None
    gives_back: bool = False


def _run(
    folder: TrainingFolder,
    settings: Settings,
    source: Source,
    room: Room,
    resume: bool,
    scalars: Callable[[str, float, int], None],
) -> int:
    import torch

    from vbench.kernels.virtual.training import Trainer

    shape = PRESETS[settings.model]
    print(
        f"{shape.name}: {shape.parameters / 1e6:.2f} M parameters; {source.size_bytes:,} bytes, {source.files} files"
        + (f", {source.skipped} binary ones left out" if source.skipped else "")
    )
    try:
        trainer = Trainer(
            folder,
            settings,
            source,
            resume=resume,
            tiering=room.tiering,
            gives_back=room.gives_back,
            say=_say,
            scalars=scalars,
        )
        outcome = trainer.run()
    except BudgetError as error:
        if not resume:
            folder.forget()  # nothing was trained: the same command with a larger budget must not meet its remains
        raise UsageError(
            f"--vgpu-auto: {error} (gpu is the budget less the context, activations are estimated: raise --budget, "
            "lower --batch or --seq, or add --gradient-checkpointing)"
        ) from error
    except torch.cuda.OutOfMemoryError as error:
        raise TrainingError(
            "the GPU's memory is full: lower --batch, or add --gradient-checkpointing or --mixed-precision; "
            "virtual-blackwell estimate says what each saves"
        ) from error
    print(f"{outcome.steps} steps, validation loss {outcome.validation_loss:.4f} nats/byte, in {folder.path}")
    if outcome.sample:
        print(f"sample:\n{outcome.sample}")
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


def _begun(folder: TrainingFolder, arguments: argparse.Namespace, device: str) -> tuple[Settings, Source, Room]:
    from vbench.kernels.virtual.training import attention_kernel

    if folder.holds_training:
        raise UsageError(f"--out {folder.path}: holds a training already: go on with --resume, or give another folder")
    if arguments.preset is None:
        raise UsageError("--preset is missing: tiny, small, medium or large")
    settings = make_settings(arguments.preset, device, {n: getattr(arguments, n) for n in SETTING_OPTIONS})
    if settings.seq > PRESETS[settings.model].context:
        raise UsageError(f"--seq {settings.seq}: {settings.model} has positions for {PRESETS[settings.model].context}")
    room = _within_budget(settings, arguments)
    attention_kernel(settings)  # refused before anything is written
    data = folder.path / DATA_FILE
    source = join(arguments.data or [], data)
    try:
        Corpus(data, settings.seq, settings.seed)
    except DataError:
        data.unlink()
        raise
    folder.write_settings({"settings": asdict(settings), "data": asdict(source)})
    return settings, source, room


def _resumed(folder: TrainingFolder, arguments: argparse.Namespace, device: str) -> tuple[Settings, Source, Room]:
    where = str(folder.path / SETTINGS_FILE)
    if not folder.holds_training:
        raise UsageError(f"--resume: {folder.path} holds no training; leave --resume out to begin one")
    body = folder.read_settings()
    try:
        settings = stored_settings(body["settings"], where)
        source = Source(**body["data"])
    except (KeyError, TypeError) as error:
        raise DataError(f"{where}: holds no settings of a training ({error})") from error
    if settings.model not in PRESETS:
        raise DataError(f"{where}: unknown model {settings.model!r}")
    for name in SETTING_OPTIONS:
        given = getattr(arguments, name)
        if given is not None and given != getattr(settings, name):
            raise UsageError(
                f"--resume: --{name.replace('_', '-')} {given} differs from the training's {getattr(settings, name)}; "
                "leave it out"
            )
    if arguments.preset is not None:
        asked = make_settings(arguments.preset, settings.device, {}).model
        if asked != settings.model:
            raise UsageError(f"--resume: --preset {arguments.preset} is {asked}, the training's is {settings.model}")
    if arguments.data:
        raise UsageError("--resume: the training has its data; leave --data out")
    if arguments.device != "auto" and device != settings.device:
        raise UsageError(f"--resume: --device {device} differs from the training's {settings.device}")
    if settings.device == "cuda" and device != "cuda":
        raise UsageError("--resume: the training runs on a GPU, and torch sees none here")
    data = folder.path / DATA_FILE
    if not data.is_file() or digest_of(data) != source.sha256:
        raise DataError(f"{data}: not the data this training began with")
    return settings, source, _within_budget(settings, arguments)


def _device(asked: str) -> str:
    import torch

    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: torch sees no GPU here; use --device cpu")
    return asked


def _within_budget(settings: Settings, arguments: argparse.Namespace) -> Room:
    """Hold the training against ``--budget`` (or, with ``--vgpu-auto``, the card), and limit the allocator to it.

    Raises:
        UsageError: it does not fit; by how much, and what would make it fit.
    """
    if arguments.budget is None and not arguments.vgpu_auto:
        return Room()
    if arguments.budget is None and settings.device != "cuda":
        raise UsageError("--vgpu-auto: there is no GPU here to plan for; say how much memory it may use with --budget")
    card = find_card(arguments.budget, "--budget") if arguments.budget is not None else find_card("auto")
    if arguments.budget is not None and settings.device == "cuda":  # as large as asked, otherwise the card at hand
        here = find_card("auto")
        card = replace(card, context_bytes=here.context_bytes, matrix_workspace_bytes=here.matrix_workspace_bytes)
    if card.memory_bytes <= card.context_bytes:
        raise UsageError(
            f"--budget {arguments.budget}: the CUDA context alone takes {show_bytes(card.context_bytes)}; raise it"
        )
    shape = PRESETS[settings.model]
    work = Workload(
        settings.batch, settings.seq, "amp" if settings.mixed_precision else "fp32", "sdpa",
        settings.gradient_checkpointing, device="cuda", fp4=settings.use_fp4,
    )  # fmt: skip
    needed = estimate(shape, work, "adamw", card)
    _say(f"estimate: {show_bytes(needed.total)} of {show_bytes(card.memory_bytes)}, context included")
    if settings.device == "cuda":
        _limit_allocator(card)
    placed = place(shape, work, card, tiers=arguments.vgpu_auto, accumulation=settings.accumulation)
    if placed is None:
        least = least_bytes(shape, work, card, accumulation=settings.accumulation)
        helps = [a for a in advise(estimator(shape, card), work, "adamw", card) if a.fits and a.change in _KNOBS]
        hint = "".join(f"{_KNOBS[a.change]} takes {show_bytes(a.total_bytes)}; " for a in helps)
        raise UsageError(
            f"--budget {arguments.budget}: the training takes an estimated {show_bytes(least)} with the allocator's "
            f"holes, {show_bytes(least - card.memory_bytes)} more; {hint}--vgpu-auto streams weights from the host"
        )
    if placed.residency is None:
        _say("it fits: nothing is tiered")
        return Room(gives_back=placed.gives_back)
    # Weights and their gradients lie on the host, each storage and unit on a boundary of its own.
    host = 2 * shape.parameters * work.parameter_bytes + 2 * ALIGN_BYTES * 32 * (shape.layers + 2)
    budget = Budget(gpu=card.memory_bytes - card.context_bytes, pinned=host, activations=placed.activation_bytes)
    return Room(budget, placed.gives_back)


#: Advice of the estimator -> the option of ``train`` that does it.
_KNOBS = {"--checkpointing": "--gradient-checkpointing", "--dtype amp": "--mixed-precision"}


def _limit_allocator(card: Card) -> None:
    """An allocator budget: PyTorch may not allocate more than the card less its context (not a limit of the driver)."""
    import torch

    there = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (card.memory_bytes - card.context_bytes) / there))


def _tensorboard(out: Path) -> tuple[Callable[[str, float, int], None], Callable[[], None]]:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise Unsupported(
            "needs_tensorboard",
            "--tensorboard: the package tensorboard is missing: pip install 'vbench-kernels[train]'",
        ) from error
    writer: Any = SummaryWriter(str(out / "tensorboard"))

    def scalar(name: str, value: float, step: int) -> None:
        writer.add_scalar(name, value, step)

    return scalar, writer.close
