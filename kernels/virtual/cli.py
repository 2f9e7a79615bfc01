"""The command ``virtual-blackwell``. Parses, calls, prints; each subcommand imports what it needs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from vbench.errors import DataError, Unsupported, UsageError
from vbench.kernels.virtual.errors import TrainingError

EXIT_INTERRUPTED = 130


def parser() -> argparse.ArgumentParser:
    """Every subcommand and option."""
    top = argparse.ArgumentParser(
        prog="virtual-blackwell", description="Estimate and train models on a GPU that is too small for them."
    )
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    est = commands.add_parser("estimate", help="memory of a training step, tier plan, largest batch, advice")
    est.add_argument("model", metavar="MODEL", help="preset or path of a Hugging Face config.json")
    est.add_argument("--gpu", required=True, metavar="GPU", help="8GB, rtx3070, rtx3090, h200, or auto")
    est.add_argument("--gpus", type=int, default=1, metavar="N", help="1 or 2 of them (1)")
    est.add_argument("--batch", type=int, default=1, metavar="N", help="sequences a step (1)")
    est.add_argument("--seq", type=int, metavar="N", help="tokens a sequence (the model's context, at most 1024)")
    est.add_argument("--dtype", choices=("fp32", "bf16", "amp"), default="fp32", help="numbers (fp32)")
    est.add_argument("--optimizer", default="adamw", metavar="NAME", help="adamw, adamw8bit, momentum, sgd (adamw)")
    est.add_argument("--attention", choices=("eager", "sdpa"), default="sdpa", help="attention (sdpa)")
    est.add_argument("--checkpointing", action="store_true", help="run each block again in the backward")
    est.add_argument("--dropout", action="store_true", help="dropout as GPT-2 has it")
    est.add_argument(
        "--tied", action=argparse.BooleanOptionalAction, help="output layer tied to the embedding (as the model has it)"
    )
    est.add_argument("--pinned", default="32GiB", metavar="SIZE", help="pinned host memory to plan with (32GiB)")
    est.add_argument("--file", default="256GiB", metavar="SIZE", help="disk space to plan with (256GiB)")
    est.add_argument("--json", action="store_true", help="print JSON")

    tr = commands.add_parser("train", help="train a byte-level language model, resumable after any kill")
    # No defaults here: --resume must be able to tell a given option from an omitted one.
    tr.add_argument("--preset", metavar="NAME", help="tiny, small, medium (163 M parameters) or large (406 M)")
    tr.add_argument("--data", nargs="+", type=Path, metavar="PATH", help="files, folders (Python's standard library)")
    tr.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the training")
    tr.add_argument("--resume", action="store_true", help="go on with the training in --out")
    length = tr.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, metavar="N", help="optimizer steps (the preset's)")
    length.add_argument("--epochs", type=int, metavar="N", help="passes over the data instead")
    tr.add_argument("--batch", type=int, metavar="N", help="sequences a forward (the preset's)")
    tr.add_argument("--seq", type=int, metavar="N", help="bytes a sequence (the preset's)")
    tr.add_argument("--accumulation", type=int, metavar="N", help="forwards a step (1)")
    tr.add_argument("--lr", type=float, metavar="X", help="peak learning rate (the preset's)")
    tr.add_argument("--weight-decay", type=float, metavar="X", help="of matrices (0.1)")
    tr.add_argument("--clip", type=float, metavar="X", help="largest gradient norm (1)")
    tr.add_argument("--seed", type=int, metavar="N", help="of weights and order (0)")
    tr.add_argument("--eval-every", type=int, metavar="N", help="steps between evaluations; 0: only at the end (0)")
    tr.add_argument("--eval-batches", type=int, metavar="N", help="batches of an evaluation (16)")
    tr.add_argument("--checkpoint-every", type=int, metavar="N", help="steps between checkpoints (100)")
    tr.add_argument("--sample", type=int, metavar="N", help="bytes to write at the end (200)")
    tr.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where (auto)")
    tr.add_argument("--threads", type=int, metavar="N", help="CPU threads (torch's choice)")
    tr.add_argument("--budget", metavar="SIZE", help="GPU memory to stay within, such as 8GB")
    tr.add_argument("--vgpu-auto", action="store_true", help="plan for the card or --budget before starting")
    tr.add_argument("--mixed-precision", action="store_true", default=None, help="bf16 autocast")
    tr.add_argument("--gradient-checkpointing", action="store_true", default=None, help="run blocks again in backward")
    tr.add_argument("--use-fp4", action="store_true", help="refused: FP4 weights do not train")
    tr.add_argument("--use-flash-attn", action="store_true", default=None, help="take a fused attention kernel only")
    tr.add_argument("--tensorboard", action="store_true", help="log for TensorBoard too (extra: train)")
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Exit code: 0 done, 1 training failed, 2 bad input, 130 interrupted."""
    arguments = parser().parse_args(argv)
    try:
        return int(_COMMANDS[arguments.command](arguments))
    except (UsageError, DataError, Unsupported) as error:
        print(f"virtual-blackwell: {error}", file=sys.stderr)
        return 2
    except TrainingError as error:
        print(f"virtual-blackwell: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        hint = "; --resume goes on from the last checkpoint" if arguments.command == "train" else ""
        print(f"virtual-blackwell: interrupted{hint}", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away (| head): no error of ours, but Python must not complain at exit.
        sys.stderr.close()
        return 0


def _estimate(arguments: argparse.Namespace) -> int:
    from vbench.kernels.virtual.estimate import advise, assumptions, estimate, largest_batch, memory_json
    from vbench.kernels.virtual.hardware import find_card
    from vbench.kernels.virtual.program import Workload
    from vbench.kernels.virtual.shapes import find_shape
    from vbench.kernels.virtual.tierplan import HOST_OPTIMIZER_BYTES_S, plan_tiers, tier_advice
    from vbench.kernels.virtual.units import parse_bytes, show_bytes

    shape = find_shape(arguments.model)
    if arguments.tied is not None:
        shape = replace(shape, tied=arguments.tied)
    card = find_card(arguments.gpu)
    sequence = arguments.seq if arguments.seq is not None else min(shape.context, 1024)
    work = Workload(
        arguments.batch, sequence, arguments.dtype, arguments.attention, arguments.checkpointing, arguments.dropout
    )
    optimizer = arguments.optimizer
    memory = estimate(shape, work, optimizer, card)
    plan = plan_tiers(
        shape, work, memory, card, gpus=arguments.gpus,
        pinned_bytes=parse_bytes(arguments.pinned, "--pinned"), file_bytes=parse_bytes(arguments.file, "--file"),
    )  # fmt: skip
    batch = largest_batch(shape, work, optimizer, card)
    advice = advise(shape, work, optimizer, card) + tier_advice(plan, memory, card)
    advice.sort(key=lambda a: -a.saves_bytes)
    known = [
        *assumptions(shape, work, optimizer, card),
        f"plan: --pinned {arguments.pinned}, --file {arguments.file}; host optimizer at "
        f"{HOST_OPTIMIZER_BYTES_S / 1e9:g} GB/s assumed; times are lower bounds with all copies overlapped",
    ]
    fits = memory.total <= card.memory_bytes
    if arguments.json:
        body: dict[str, Any] = {
            "model": asdict(shape),
            "parameters": shape.parameters,
            "workload": asdict(work),
            "optimizer": optimizer,
            "card": asdict(card),
            "bytes": memory_json(memory),
            "fits": fits,
            "largest_batch": batch,
            "plan": {
                **asdict(plan), "step_s": plan.step_s, "overhead": plan.overhead, "bound_by": plan.bound_by,
                "gpus": arguments.gpus,
            },
            "advice": [asdict(a) for a in advice],
            "assumptions": known,
        }  # fmt: skip
        print(json.dumps(body, indent=1, ensure_ascii=False))
        return 0
    print(f"{shape.name}: {shape.parameters / 1e6:.2f} M parameters; one training step, largest at: {memory.peak_at}")
    for part in ("parameters", "gradients", "optimizer", "activations", "logits", "workspace", "context"):
        print(f"  {part:<12} {show_bytes(getattr(memory, part)):>12}")
    verdict = "fits" if fits else f"does not fit, by {show_bytes(memory.total - card.memory_bytes)}"
    print(
        f"  {'total':<12} {show_bytes(memory.total):>12}   on {card.name} ({show_bytes(card.memory_bytes)}): {verdict}"
    )
    print(f"largest batch of {sequence} tokens without tiers: {batch}")
    print("tier plan:" if plan.feasible else f"no tier plan: {plan.why} (short by {show_bytes(plan.short_bytes)})")
    for level in plan.levels:
        print(
            f"  {level.name:<12} {show_bytes(level.used_bytes):>12} of {show_bytes(level.capacity_bytes)}: parameters "
            f"{show_bytes(level.parameters)}, gradients {show_bytes(level.gradients)}, optimizer "
            f"{show_bytes(level.optimizer)}, working {show_bytes(level.working)}"
        )
    if plan.feasible:
        print(
            f"  a step takes at least {plan.step_s:.3g} s, bound by {plan.bound_by} "
            f"(arithmetic {plan.compute_s:.3g} s, "
            f"host link {plan.link_s:.3g} s, disk {plan.disk_s:.3g} s, host optimizer {plan.host_s:.3g} s)"
        )
        if plan.hidden_tokens > work.tokens:
            print(
                f"  the link hides behind arithmetic from {plan.hidden_tokens} tokens a step on, not at {work.tokens}"
            )
    print("advice, most saving first:")
    for item in advice:
        end = "fits" if item.fits else "does not fit"
        print(
            f"  {item.change:<24} saves {show_bytes(item.saves_bytes):>10} -> {show_bytes(item.total_bytes)}, {end}; "
            f"cost: {item.cost}"
        )
    print("assumptions:")
    for line in known:
        print(f"  {line}")
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from vbench.kernels.virtual.train import train

    return train(arguments)


_COMMANDS = {"estimate": _estimate, "train": _train}

if __name__ == "__main__":
    sys.exit(main())
