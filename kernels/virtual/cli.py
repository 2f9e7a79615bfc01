"""The command ``virtual-blackwell``. Parses, calls, prints; each subcommand imports what it needs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

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
    est.add_argument("--use-fp4", action="store_true", help="as train --use-fp4: FP4 codes beside float32 masters")
    est.add_argument("--dropout", action="store_true", help="dropout as GPT-2 has it")
    est.add_argument(
        "--tied", action=argparse.BooleanOptionalAction, help="output layer tied to the embedding (as the model has it)"
    )
    est.add_argument(
        "--implementation", choices=("own", "transformers"), default="own",
        help="whose code is estimated: this package's, or that of a config.json's model in transformers (own)",
    )  # fmt: skip
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
    tr.add_argument(
        "--use-fp4", action="store_true", default=None,
        help="compute with FP4 codes of the blocks' weights; masters are kept, so that it costs memory, and saves none",
    )  # fmt: skip
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
    from vbench.kernels.virtual.report import report

    body = report(arguments)
    print(json.dumps(body.json(), indent=1, ensure_ascii=False) if arguments.json else body.text())
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from vbench.kernels.virtual.train import train

    return train(arguments)


_COMMANDS = {"estimate": _estimate, "train": _train}

if __name__ == "__main__":
    sys.exit(main())
