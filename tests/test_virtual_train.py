"""Training: resumed after SIGKILL it is bitwise the unbroken run; checkpoints are whole or refused; bad input."""

from __future__ import annotations

import errno
import importlib.util
import itertools
import json
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vbench.errors import DataError, UsageError
from vbench.kernels.tiers.fileio import SystemIO
from vbench.kernels.virtual import checkpoint as files
from vbench.kernels.virtual import cli
from vbench.kernels.virtual.checkpoint import Checkpoint
from vbench.kernels.virtual.corpus import Corpus, join, standard_library
from vbench.kernels.virtual.errors import CheckpointError, TrainingError
from vbench.kernels.virtual.estimate import estimate
from vbench.kernels.virtual.folder import Log, TrainingFolder
from vbench.kernels.virtual.hardware import find_card
from vbench.kernels.virtual.modules import LanguageModel
from vbench.kernels.virtual.program import Workload
from vbench.kernels.virtual.settings import PRESET_DEFAULTS, make_settings
from vbench.kernels.virtual.shapes import PRESETS
from vbench.kernels.virtual.training import first_bad_layer, learning_rate

SHARED_MEMORY = Path("/dev/shm")
FAST = SHARED_MEMORY if SHARED_MEMORY.is_dir() else None


@pytest.fixture
def base() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=FAST) as name:
        yield Path(name)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Bitwise comparisons need as many threads everywhere; one is also the fastest for models this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def text(folder: Path, size_bytes: int = 6000) -> Path:
    """A file of words that can be learned a little."""
    path = folder / "words.txt"
    line = "the quick brown fox jumps over the lazy dog and runs away\n"
    path.write_text((line * (size_bytes // len(line) + 1))[:size_bytes])
    return path


def command(out: Path, *more: str, data: Path | None = None) -> list[str]:
    """A training of seconds: tiny model, short samples."""
    begun = ["--data", str(data)] if data is not None else []
    return ["train", "--device", "cpu", "--threads", "1", "--out", str(out), *begun, *more]


SMALL = ["--preset", "tiny", "--batch", "2", "--seq", "16", "--sample", "8", "--eval-batches", "2"]


def lines(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[tuple[int, str, float]]:
    return [(r["step"], key, r[key]) for r in lines(out) for key in ("loss", "validation_loss") if key in r]


# --- resuming ---------------------------------------------------------------------------------------------------------

#: Runs the command and kills itself the moment a chosen call is made for the n-th time: no signal can be later.
KILLED = """
import os, signal, sys
import vbench.kernels.tiers.fileio as fileio, vbench.kernels.virtual.folder as folder
from vbench.kernels.virtual.cli import main
where, nth, argv = sys.argv[1], int(sys.argv[2]), sys.argv[3:]
owner = folder.Log if where == "log" else fileio.SystemIO
name = "write" if where == "log" else where
real, calls = getattr(owner, name), 0
def deadly(self, *args):
    global calls
    calls += 1
    if calls == nth:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(self, *args)
setattr(owner, name, deadly)
sys.exit(main(argv))
"""


def run_killed(where: str, nth: int, argv: Sequence[str]) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, where, str(nth), *argv], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


def test_killed_at_any_point_and_resumed_gives_the_losses_of_an_unbroken_run_bitwise(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = text(base)
    options = [*SMALL, "--steps", "40", "--checkpoint-every", "5", "--eval-every", "8", "--accumulation", "2"]
    assert cli.main(command(base / "whole", *options, data=data)) == 0
    whole = losses(base / "whole")
    assert [step for step, key, _ in whole if key == "loss"] == list(range(1, 41))
    broken = command(base / "broken", *options, data=data)
    run_killed("log", 14, broken)  # between two checkpoints
    run_killed("write", 9, [*command(base / "broken"), "--resume"])  # in the middle of one
    run_killed("rename", 2, [*command(base / "broken"), "--resume"])  # one written, not published
    assert cli.main([*command(base / "broken"), "--resume"]) == 0
    assert losses(base / "broken") == whole
    assert not list((base / "broken").glob("*.tmp"))
    final = [files.load(files.checkpoints(base / name)[-1]) for name in ("whole", "broken")]
    assert final[0].tensors.keys() == final[1].tensors.keys()
    assert all(torch.equal(t, final[1].tensors[name]) for name, t in final[0].tensors.items())
    # A finished training can be resumed too: nothing is left to do.
    capsys.readouterr()
    assert cli.main([*command(base / "broken"), "--resume"]) == 0
    assert losses(base / "broken") == whole


def test_a_training_that_does_not_fit_streams_its_weights_and_has_the_same_losses(
    base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = text(base)
    options = [*SMALL, "--steps", "6", "--checkpoint-every", "2", "--gradient-checkpointing"]
    assert cli.main(command(base / "whole", *options, data=data)) == 0
    work = Workload(2, 16, checkpointing=True)
    needed = estimate(PRESETS["vb-tiny"], work, "adamw", find_card("8GB"))
    tiers = ["--vgpu-auto", "--budget", f"{needed.total - 4_000_000}B"]
    capsys.readouterr()
    assert cli.main([*command(base / "tiered", *options, data=data), *tiers]) == 0
    printed = capsys.readouterr().out
    assert (
        "of weights streamed each pass" in printed and "of weights, on the host" in printed and "it fits" not in printed
    )
    assert losses(base / "tiered") == losses(base / "whole")
    moved = [r["tiers"]["to_device_bytes"] for r in lines(base / "tiered") if "tiers" in r]
    assert moved == sorted(moved) and moved[0] > 0
    # resumed, and resumed without tiers: still the same bits
    for more in (tiers, []):
        for path in files.checkpoints(base / "tiered")[1:]:
            path.unlink()
        assert cli.main([*command(base / "tiered"), "--resume", *more]) == 0
        assert losses(base / "tiered") == losses(base / "whole")
    assert cli.main([*command(base / "roomy", *options, data=data), "--vgpu-auto", "--budget", "1GB"]) == 0
    assert "it fits: nothing is tiered" in capsys.readouterr().out


def test_control_a_resume_that_forgets_the_optimizer_is_noticed(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = text(base)
    options = [*SMALL, "--steps", "12", "--checkpoint-every", "5"]
    assert cli.main(command(base / "whole", *options, data=data)) == 0
    shutil.copytree(base / "whole", base / "broken")
    files.path_of(base / "broken", 12).unlink()  # as if killed before it
    shutil.copytree(base / "broken", base / "right")
    assert cli.main([*command(base / "right"), "--resume"]) == 0
    assert losses(base / "right") == losses(base / "whole")
    load = files.load

    def forgetful(path: Path) -> Checkpoint:
        held = load(path)
        moments = {n: torch.zeros_like(t) if "exp_avg" in n else t for n, t in held.tensors.items()}
        return Checkpoint(moments, held.state)

    monkeypatch.setattr(files, "load", forgetful)
    assert cli.main([*command(base / "broken"), "--resume"]) == 0
    assert losses(base / "broken") != losses(base / "whole")


def test_the_loss_falls_and_a_sample_is_written(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--preset", "tiny", "--batch", "4", "--seq", "32", "--steps", "40", "--sample", "12"]
    out = base / "out"
    assert cli.main([*command(out, *options, data=text(base)), "--mixed-precision", "--gradient-checkpointing"]) == 0
    by_step = {r["step"]: r["loss"] for r in lines(out) if "loss" in r}
    assert by_step[1] > 5 and by_step[40] < 2.5
    printed = capsys.readouterr().out
    assert "tokens/s" in printed and "process peak" in printed
    assert len(printed.partition("sample:\n")[2].rstrip("\n").encode()) >= 1


# --- checkpoints ------------------------------------------------------------------------------------------------------


def small_checkpoint() -> Checkpoint:
    torch.manual_seed(0)
    tensors = {
        "a": torch.randn(3, 2), "b": torch.randn(5).bfloat16(), "c": torch.tensor(7), "empty": torch.empty(0, 4),
        "flags": torch.tensor([True, False]), "bytes": torch.arange(9, dtype=torch.uint8),
    }  # fmt: skip
    return Checkpoint(tensors, {"step": 3, "note": "ö\n"})


def test_a_checkpoint_is_a_safetensors_file_and_comes_back_bitwise(base: Path) -> None:
    path, made = files.path_of(base, 3), small_checkpoint()
    files.save(path, made)
    got = files.load(path)
    assert got.state == made.state and list(got.tensors) == list(made.tensors)
    for name, tensor in made.tensors.items():
        assert got.tensors[name].dtype == tensor.dtype and torch.equal(got.tensors[name], tensor)
    # the format's own rules: little-endian length, a JSON header, offsets without gaps to the end of the file
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert all(isinstance(v, str) for v in header.pop("__metadata__").values())
    spans = sorted(entry["data_offsets"] for entry in header.values())
    assert spans[0][0] == 0 and all(a[1] == b[0] for a, b in itertools.pairwise(spans))
    assert 8 + length + spans[-1][1] == len(data)
    assert list(base.iterdir()) == [path]


@settings(max_examples=150)
@given(st.data())
def test_every_altered_checkpoint_is_refused(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory(dir=FAST) as name:
        path = files.path_of(Path(name), 3)
        files.save(path, small_checkpoint())
        whole = path.read_bytes()
        kind = data.draw(st.sampled_from(("bit", "cut", "longer", "swap")))
        broken = bytearray(whole)
        if kind == "bit":
            at = data.draw(st.integers(0, len(whole) * 8 - 1))
            broken[at // 8] ^= 1 << at % 8
        elif kind == "cut":
            del broken[data.draw(st.integers(0, len(whole) - 1)) :]
        elif kind == "longer":
            broken += b"\0" * data.draw(st.integers(1, 9))
        else:  # two bytes change places
            i, j = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(0, len(whole) - 1))
            broken[i], broken[j] = broken[j], broken[i]
        path.write_bytes(broken)
        if broken == whole:
            files.load(path)
        else:
            with pytest.raises(CheckpointError, match=path.name):
                files.load(path)


class Full(SystemIO):
    """A disk that is full from the ``nth`` call of one kind on."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def _maybe(self, kind: str) -> None:
        if kind == self.kind:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def reserve(self, descriptor: int, size_bytes: int) -> None:
        self._maybe("reserve")
        super().reserve(descriptor, size_bytes)

    def write(self, descriptor: int, data: memoryview) -> int:
        self._maybe("write")
        return super().write(descriptor, data[:100])  # short writes are legal

    def sync_data(self, descriptor: int) -> None:
        self._maybe("sync")
        super().sync_data(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        self._maybe("rename")
        super().rename(old, new)


@pytest.mark.parametrize("kind", ["reserve", "write", "sync", "rename", ""])
def test_a_full_disk_leaves_the_old_checkpoint(base: Path, kind: str) -> None:
    old = files.path_of(base, 1)
    files.save(old, small_checkpoint())
    before = old.read_bytes()
    if kind:
        with pytest.raises(TrainingError, match="No space left"):
            files.save(files.path_of(base, 2), small_checkpoint(), Full(kind))
        assert list(base.iterdir()) == [old]
    else:
        files.save(files.path_of(base, 2), small_checkpoint(), Full(kind))
        assert files.load(files.path_of(base, 2)).state["step"] == 3
    assert old.read_bytes() == before


def test_a_full_disk_ends_training_with_1_and_the_old_checkpoint(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reserve, calls = SystemIO.reserve, []

    def second_fails(self: SystemIO, descriptor: int, size_bytes: int) -> None:
        calls.append(size_bytes)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        reserve(self, descriptor, size_bytes)

    monkeypatch.setattr(SystemIO, "reserve", second_fails)
    argv = command(base / "out", *SMALL, "--steps", "4", "--checkpoint-every", "1", data=text(base))
    assert cli.main(argv) == 1
    assert "No space left" in capsys.readouterr().err
    assert [p.name for p in files.checkpoints(base / "out")] == ["checkpoint-00000001.safetensors"]
    assert cli.main([*command(base / "out"), "--resume"]) == 0


def test_a_full_disk_under_log_or_data_ends_training_with_1(
    base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    data = text(base)
    with monkeypatch.context() as patch:
        patch.setattr(Log, "write", full)
        assert cli.main(command(base / "log", *SMALL, "--steps", "2", data=data)) == 1
        patch.setattr(os, "fsync", full)
        assert cli.main(command(base / "data", *SMALL, "--steps", "2", data=data)) == 1
    assert capsys.readouterr().err.count("No space left") == 2
    assert cli.main([*command(base / "log"), "--resume"]) == 0
    assert cli.main(command(base / "data", *SMALL, "--steps", "1", data=data)) == 0


# --- a training's folder ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished() -> Iterator[Path]:
    """A training of three steps, to be copied."""
    with tempfile.TemporaryDirectory(dir=FAST) as name:
        out = Path(name) / "out"
        argv = command(out, *SMALL, "--steps", "3", "--checkpoint-every", "1", data=text(Path(name)))
        assert cli.main(argv) == 0
        yield out


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The message of a command that ends with 2."""
    capsys.readouterr()
    assert cli.main(argv) == 2
    return capsys.readouterr().err


def test_two_trainings_in_one_folder_are_refused(
    finished: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = text(base)
    assert "holds a training already" in refused(command(finished, *SMALL, data=data), capsys)
    held = TrainingFolder(base / "out")
    assert "another training is going on" in refused(command(base / "out", *SMALL, data=data), capsys)
    held.close()
    assert cli.main(command(base / "out", *SMALL, "--steps", "1", data=data)) == 0


def test_a_checkpoint_that_is_not_this_trainings_is_refused(
    finished: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def resumed(name: str) -> str:
        return refused([*command(base / name), "--resume"], capsys)

    for name in ("torn", "bit", "model", "data", "settings", "names"):
        shutil.copytree(finished, base / name)
    newest = {name: files.checkpoints(base / name)[-1] for name in ("torn", "bit", "model", "names")}
    newest["torn"].write_bytes(newest["torn"].read_bytes()[:-1])
    assert "torn" in resumed("torn") and newest["torn"].name in resumed("torn")
    data = bytearray(newest["bit"].read_bytes())
    data[-1] ^= 1
    newest["bit"].write_bytes(data)
    assert "tensor_checksum" in resumed("bit")
    held = files.load(newest["model"])
    files.save(
        newest["model"],
        Checkpoint(held.tensors, {**held.state, "settings": {**held.state["settings"], "model": "vb-small"}}),
    )
    assert "another_training" in resumed("model") and "vb-small" in resumed("model")
    wider = {n: torch.zeros(3) if n == "model.norm.weight" else t for n, t in held.tensors.items()}
    files.save(newest["names"], Checkpoint(wider, held.state))
    assert "another_model" in resumed("names")
    with (base / "data" / "data.bin").open("r+b") as file:
        file.write(b"X")
    assert "not the data this training began with" in resumed("data")
    (base / "settings" / "run.json").write_text("{}")
    assert "run.json" in resumed("settings")
    # the untouched one still goes
    assert cli.main([*command(finished), "--resume"]) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "9"], "--steps 9 differs"),
        (["--lr", "0.5"], "--lr 0.5 differs"),
        (["--preset", "small"], "--preset small is vb-small"),
        (["--data", "x"], "leave --data out"),
        (["--mixed-precision"], "--mixed-precision True differs"),
    ],
)
def test_resuming_with_other_options_is_refused(
    finished: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused([*command(finished), "--resume", *more], capsys)


def test_the_same_command_with_resume_is_taken(finished: Path) -> None:
    assert cli.main([*command(finished, *SMALL, "--steps", "3"), "--resume"]) == 0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--preset", "huge"], "unknown --preset 'huge'"),
        ([], "--preset is missing"),
        ([*SMALL, "--steps", "0"], "--steps or --epochs"),
        ([*SMALL, "--seq", "0"], "--seq 0"),
        ([*SMALL, "--seq", "257"], "positions for 256"),
        ([*SMALL, "--lr", "nan"], "--lr nan"),
        ([*SMALL, "--threads", "0"], "--threads 0"),
        ([*SMALL, "--use-flash-attn"], "flash_needs_cuda"),
        ([*SMALL, "--vgpu-auto"], "say how much memory it may use with --budget"),
        ([*SMALL, "--budget", "8"], "--budget '8'"),
        ([*SMALL, "--budget", "400MB", "--vgpu-auto"], "the CUDA context alone takes 450.00 MB"),
        (["--preset", "large", "--budget", "8GB", "--batch", "8"], "--budget 8GB: the training takes an estimated"),
        (["--preset", "large", "--budget", "8GB", "--batch", "32", "--vgpu-auto"], "activations alone take"),
        ([*SMALL, "--budget", "470MB", "--vgpu-auto"], "weights need at least"),
        ([*SMALL, "--resume"], "holds no training"),
    ],
)
def test_bad_options_end_with_2_and_a_name(
    base: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in refused(command(base / "out", *more, data=text(base)), capsys)
    assert not list((base / "out").glob("*.*n"))


def test_tensorboard_is_written_or_its_absence_named(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [*command(base / "out", *SMALL, "--steps", "1", data=text(base)), "--tensorboard"]
    if importlib.util.find_spec("tensorboard") is None:
        assert "needs_tensorboard" in refused(argv, capsys)
    else:
        assert cli.main(argv) == 0
        assert list((base / "out" / "tensorboard").iterdir())


# --- data -------------------------------------------------------------------------------------------------------------


def test_bad_data_is_named(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def of(*paths: Path) -> str:
        return refused([*command(base / "out", *SMALL), "--data", *map(str, paths)], capsys)

    assert "no such file or folder" in of(base / "missing")
    (base / "empty").write_bytes(b"")
    assert "no byte to train on" in of(base / "empty")
    (base / "binary").write_bytes(b"text\0text")
    assert "binary (a zero byte at 4)" in of(base / "binary")
    (base / "folder").mkdir()
    (base / "folder" / "b").write_bytes(b"\0")
    assert "1 binary ones" in of(base / "folder")
    os.mkfifo(base / "pipe")
    assert "not a regular file" in of(base / "pipe")
    (base / "short").write_text("too short")
    assert "longer than the data" in of(base / "short")


def test_an_unreadable_file_is_named(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(self: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    path = text(base)
    monkeypatch.setattr(Path, "read_bytes", denied)  # root may read anything, so that a mode would not do
    with pytest.raises(DataError, match=r"words\.txt: cannot be read: Permission denied"):
        join([path], base / "data.bin")
    assert sorted(p.name for p in base.iterdir()) == ["words.txt"]


def test_folders_are_joined_in_order_without_their_binary_files(base: Path) -> None:
    folder = base / "folder"
    (folder / "sub").mkdir(parents=True)
    (folder / "b").write_bytes(b"B")
    (folder / "a").write_bytes(b"A")
    (folder / "sub" / "c").write_bytes("ü".encode())
    (folder / "x.bin").write_bytes(b"\0")
    (folder / ".hidden").write_bytes(b"H")
    source = join([folder], base / "data.bin")
    assert (base / "data.bin").read_bytes() == "ABü".encode()
    assert (source.files, source.skipped, source.size_bytes) == (3, 1, 4)


def test_the_standard_library_is_there_to_train_on() -> None:
    assert (standard_library() / "os.py").is_file()


@settings(max_examples=40)
@given(st.integers(200, 3000), st.integers(1, 20), st.integers(0, 5))
def test_an_epoch_deals_every_window_once_and_validation_bytes_never(size: int, sequence: int, seed: int) -> None:
    with tempfile.TemporaryDirectory(dir=FAST) as name:
        path = Path(name) / "data.bin"
        path.write_bytes(bytes(1 + i % 255 for i in range(size)))
        if size - int(size * 0.9) <= sequence + 1:
            return
        corpus = Corpus(path, sequence, seed)
        train = size - int(size * 0.1)
        starts = []
        for index in range(corpus.windows):
            ids, targets = corpus.batch(index, 1)
            assert torch.equal(ids[0, 1:], targets[0, :-1])
            starts.append(corpus._offset + int(corpus._order[index]) * sequence)
            assert int(ids[0, 0]) == 1 + starts[-1] % 255
        assert len(set(starts)) == corpus.windows and max(starts) + sequence + 1 <= train
        # a position says everything: asking again, out of order, gives the same
        again = Corpus(path, sequence, seed)
        at = corpus.windows + corpus.windows // 2
        assert torch.equal(again.batch(at, 2)[0], corpus.batch(at, 2)[0])
        first = [ids for ids, _ in corpus.validation_batches(2, 3)]
        assert first and all(
            torch.equal(a, b) for a, (b, _) in zip(first, corpus.validation_batches(2, 3), strict=True)
        )


# --- no numbers -------------------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_is_reported_with_its_layer(base: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = command(base / "out", *SMALL, "--steps", "30", "--lr", "1e30", "--clip", "1e30", data=text(base))
    assert cli.main(argv) == 1
    message = capsys.readouterr().err
    assert "step " in message and ("parameter " in message or "output of " in message or "gradient" in message)
    assert all(math.isfinite(loss) for _, _, loss in losses(base / "out"))


def test_the_first_bad_layer_is_named() -> None:
    model = LanguageModel(PRESETS["vb-tiny"])
    ids = torch.zeros(1, 4, dtype=torch.int64)
    assert "no layer" in first_bad_layer(model, lambda: model(ids, ids))
    block = model.blocks[2]
    handle = block.get_submodule("mlp.up").register_forward_hook(lambda module, inputs, output: output * math.inf)
    assert "blocks.2.mlp.up" in first_bad_layer(model, lambda: model(ids, ids))
    handle.remove()
    with torch.no_grad():
        block.get_parameter("mlp.down.weight")[0, 0] = math.nan
    assert "parameter blocks.2.mlp.down.weight" in first_bad_layer(model, lambda: model(ids, ids))


# --- small parts ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 5000))
def test_the_rate_rises_to_its_peak_and_falls_to_a_tenth(total: int) -> None:
    rates = [learning_rate(step, total, 1.0) for step in range(total)]
    top = rates.index(max(rates))
    assert rates[: top + 1] == sorted(rates[: top + 1]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert max(rates) == 1.0 and min(rates[top:]) >= 0.1


def test_epochs_become_steps() -> None:
    made = make_settings("tiny", "cpu", {"epochs": 2, "batch": 3, "steps": None})
    assert made.total_steps(10) == 7
    with pytest.raises(UsageError, match="one of them"):
        make_settings("tiny", "cpu", {"epochs": 1, "steps": 1})


def test_presets_have_the_documents_sizes() -> None:
    sizes = {name: PRESETS[values["model"]].parameters / 1e6 for name, values in PRESET_DEFAULTS.items()}
    assert round(sizes["medium"]) == 163 and round(sizes["large"]) == 406
    assert sizes["tiny"] < sizes["small"] < sizes["medium"]


def test_a_log_is_cut_where_training_goes_on(base: Path) -> None:
    path = base / "log.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"step": 2, "x": 1}\n{"step": 3}\n{"st')
    log = Log(path, 2)
    log.write({"step": 3})
    log.close()
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 2, 3]
    path.write_bytes(b"rubbish\n")
    with pytest.raises(DataError, match="line 1"):
        Log(path, 2)
