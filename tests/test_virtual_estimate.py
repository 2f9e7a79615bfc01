"""The estimator: saved bytes and peaks against autograd itself, sizes against published ones, bad input."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vbench.errors import DataError, Unsupported, UsageError
from vbench.kernels.virtual import cli
from vbench.kernels.virtual.estimate import Memory, advise, estimate, estimator, largest_batch
from vbench.kernels.virtual.hardware import CARDS, GIB, find_card
from vbench.kernels.virtual.modules import LanguageModel
from vbench.kernels.virtual.program import Program, Workload
from vbench.kernels.virtual.shapes import PRESETS, ModelShape, find_shape
from vbench.kernels.virtual.tape import Tape, WeightGrad
from vbench.kernels.virtual.tierplan import plan_tiers
from vbench.kernels.virtual.trace import Traced, estimate_module, trace_step
from vbench.kernels.virtual.units import parse_bytes

H200 = CARDS["h200"]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small run fastest on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def shapes() -> st.SearchStrategy[ModelShape]:
    """Small models of both families, tied or not, with heads in groups."""

    def build(
        family: str, layers: int, heads: int, group: int, dim: int, inner: int, vocabulary: int, tied: bool, bias: bool
    ) -> ModelShape:
        if family == "gpt":
            return ModelShape("gpt", "gpt", layers, heads * dim, heads, heads, dim, inner, vocabulary, 32, tied)
        width = 4 * inner // 3 + 1
        return ModelShape("llama", "llama", layers, width, heads * group, heads, dim, inner, vocabulary, 32, tied, bias)

    return st.builds(
        build, st.sampled_from(("gpt", "llama")), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3),
        st.sampled_from((8, 16)), st.integers(8, 90), st.integers(7, 300), st.booleans(), st.booleans(),
    )  # fmt: skip


def workloads() -> st.SearchStrategy[Workload]:
    return st.builds(
        Workload, st.integers(1, 3), st.integers(2, 32), st.sampled_from(("fp32", "bf16", "amp")),
        st.sampled_from(("eager", "sdpa")), st.booleans(), st.just(False), st.just("cpu"),
    )  # fmt: skip


def with_dropout(shape: ModelShape, work: Workload) -> Workload:
    """Dropout where it is ours: in a gpt, with eager attention (the CPU's fused attention has none)."""
    return replace(work, dropout=True) if shape.family == "gpt" and work.attention == "eager" else work


def measured(shape: ModelShape, work: Workload, granule_bytes: int = 1) -> Traced:
    """The real step on the CPU, counted."""
    torch.manual_seed(0)
    model = LanguageModel(
        shape, attention=work.attention, checkpointing=work.checkpointing, dropout=0.1 if work.dropout else 0.0
    )
    if work.dtype == "bf16":
        model = model.bfloat16()
    ids, targets = (torch.randint(shape.vocabulary, (work.batch, work.sequence)) for _ in range(2))

    def step(module: nn.Module) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=work.dtype == "amp"):
            loss = module(ids, targets)
        assert isinstance(loss, Tensor)
        return loss

    return trace_step(model, step, [ids, targets], granule_bytes)


def walked(shape: ModelShape, work: Workload, granule_bytes: int = 1) -> tuple[int, Tape]:
    """Bytes saved when the forward ends, and the tape after the backward."""
    tape = Tape(granule_bytes=granule_bytes)
    loss = Program(shape, work, tape).forward()
    saved = tape.saved_bytes
    tape.backward(loss)
    return saved, tape


@settings(max_examples=60)
@given(shapes(), workloads(), st.booleans())
def test_predicted_saved_bytes_are_those_autograd_saves(shape: ModelShape, work: Workload, dropout: bool) -> None:
    work = with_dropout(shape, work) if dropout else work
    got = measured(shape, work)
    assert walked(shape, work)[0] == got.saved
    assert shape.parameters == got.parameter_elements


@settings(max_examples=25)
@given(shapes(), workloads(), st.booleans())
def test_predicted_peak_is_the_peak_the_allocator_sees(shape: ModelShape, work: Workload, dropout: bool) -> None:
    # Not so small that scalars count, and narrow enough to be fast.
    shape = replace(shape, vocabulary=shape.vocabulary * 8)
    work = with_dropout(shape, replace(work, sequence=32)) if dropout else replace(work, sequence=32)
    got = measured(shape, work, 512)
    _, tape = walked(shape, work, 512)
    assert tape.peak.size_bytes == pytest.approx(got.peak, rel=0.04)
    assert sum(tape.peak.by_kind.values()) == tape.peak.size_bytes


def test_nothing_but_gradients_and_the_loss_outlives_the_step() -> None:
    for name, checkpointing in (("vb-tiny", False), ("llama-7b", True)):
        shape = PRESETS[name]
        _, tape = walked(shape, Workload(2, 64, checkpointing=checkpointing, attention="sdpa"))
        shared = 2 * 64 * shape.head_dim * 4 if shape.family == "llama" else 0  # a checkpoint holds its arguments
        assert tape.live_bytes == 4 * shape.parameters + 4 + shared


def test_control_a_tensor_the_program_forgets_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    op = Tape.op

    def forgetful(self: Tape, name: str, *args: Any, **kwargs: Any) -> Any:
        if name.endswith("gelu"):
            kwargs["saves"] = []
        return op(self, name, *args, **kwargs)

    work = Workload(2, 16, device="cpu")
    shape = replace(PRESETS["vb-tiny"], layers=1)
    right = measured(shape, work).saved
    assert walked(shape, work)[0] == right
    monkeypatch.setattr(Tape, "op", forgetful)
    assert walked(shape, work)[0] < right


def test_control_a_tape_that_frees_nothing_in_the_backward_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    shape, work = replace(PRESETS["vb-tiny"], layers=3), Workload(2, 64, device="cpu", checkpointing=True)
    right = measured(shape, work, 512).peak
    assert walked(shape, work, 512)[1].peak.size_bytes == pytest.approx(right, rel=0.001)
    monkeypatch.setattr(Tape, "_drop_saved", lambda self, step: None)
    assert walked(shape, work, 512)[1].peak.size_bytes > 1.04 * right


def test_korthikantis_formula() -> None:
    """Per block, 16 bits, dropout: s b h (34 + 5 a s / h) bytes; norm statistics and the shared mask aside."""
    shape = PRESETS["gpt2-xl"]
    s, b, h, a = 512, 3, shape.width, shape.heads
    work = Workload(b, s, "bf16", "eager", dropout=True)
    saved = walked(shape, work)[0] - walked(replace(shape, layers=shape.layers - 1), work)[0]
    statistics = 4 * s * b * 4
    assert saved - statistics == s * b * (34 * h + 5 * a * s)


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("gpt2", 124.44), ("gpt2-medium", 354.82), ("gpt2-large", 774.03), ("gpt2-xl", 1557.61),
        ("vb-medium", 163.04), ("vb-large", 406.29), ("llama-7b", 6738.42), ("llama-13b", 13015.86),
        ("llama-3-8b", 8030.26), ("llama-3-70b", 70553.71),
    ],
)  # fmt: skip
def test_presets_have_their_published_sizes(name: str, millions: float) -> None:
    assert PRESETS[name].parameters / 1e6 == pytest.approx(millions, abs=0.005)


def test_a_module_is_estimated_as_its_shape_is() -> None:
    shape = PRESETS["gpt2"]
    with torch.device("meta"):
        model = LanguageModel(shape)
    ids = torch.empty(2, 256, dtype=torch.int64, device="meta")
    got = estimate_module(model, lambda module, i: module(i, i), [ids], card=H200)
    # the CPU's flash attention keeps its workspace to itself; here the peak is at the loss
    assert got.total == pytest.approx(estimate(shape, Workload(2, 256), "adamw", H200).total, rel=1e-3)
    assert all(p.device.type == "meta" and p.grad is None for p in model.parameters())


def test_any_module_is_estimated() -> None:
    model = nn.Sequential(nn.Linear(256, 1024), nn.ReLU(), nn.Linear(1024, 256, bias=False))
    model[2].requires_grad_(False)
    got = estimate_module(model, lambda m, x: m(x).sum(), [torch.empty(64, 256)], optimizer="momentum", card=H200)
    trained = 256 * 1024 + 1024
    assert (got.parameters, got.optimizer) == (4 * (trained + 1024 * 256), 4 * trained)
    assert got.total == sum(
        (got.parameters, got.gradients, got.optimizer, got.activations, got.logits, got.workspace, got.context)
    )


@pytest.mark.parametrize("name", ["gpt2", "llama-3-8b"])
def test_memory_grows_with_batch_and_every_saving_saves(name: str) -> None:
    shape = PRESETS[name]
    work = Workload(8, 512, "fp32", "eager")
    totals = [estimate(shape, replace(work, batch=b), "adamw", H200).total for b in (1, 2, 4, 8, 16)]
    assert totals == sorted(totals) and len(set(totals)) == len(totals)
    card = find_card("rtx3090")
    for item in advise(estimator(shape, card), work, "adamw", card):
        # Saving is measured, not assumed: amp's weight copies may cost more than its activations save.
        assert item.saves_bytes > 0 or item.change == "--dtype amp"
        assert item.fits == (item.total_bytes <= card.memory_bytes)


def test_the_largest_batch_fits_and_the_next_does_not() -> None:
    shape, card = PRESETS["gpt2-medium"], CARDS["rtx3090"]
    for work in (Workload(1, 1024, "amp"), Workload(1, 256, "fp32", "eager")):
        most = largest_batch(estimator(shape, card), work, "adamw", card)
        assert most >= 1
        assert estimate(shape, replace(work, batch=most), "adamw", card).total <= card.memory_bytes
        assert estimate(shape, replace(work, batch=most + 1), "adamw", card).total > card.memory_bytes
    assert largest_batch(estimator(PRESETS["llama-7b"], card), Workload(1, 128), "adamw", card) == 0


@settings(max_examples=200)
@given(
    st.integers(1, 10**6), st.integers(1, 10**4), st.lists(st.integers(0, 10**4), max_size=6), st.integers(1, 10**8),
    st.integers(2, 4000),
)  # fmt: skip
def test_the_largest_batch_is_found_for_any_memory_that_grows(
    first: int, slope: int, bumps: list[int], size: int, most: int
) -> None:
    asked: list[int] = []

    def of(work: Workload, optimizer: str) -> Memory:
        asked.append(work.batch)
        extra = sum(b for i, b in enumerate(bumps) if work.batch > 3 ** (i + 1))
        return Memory(first + slope * (work.batch - 1) + extra, 0, 0, 0, 0, 0, 0, "", 0)

    card = replace(H200, memory_bytes=size)
    best = max((b for b in range(1, most + 1) if of(Workload(b, 1), "sgd").total <= size), default=0)
    asked.clear()
    assert largest_batch(of, Workload(1, 1), "sgd", card, most) == best
    assert len(asked) <= 2 + (4 if not bumps else 40)


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(PRESETS)), st.integers(1, 8), st.sampled_from(("fp32", "bf16", "amp")), st.booleans(),
    st.sampled_from(("8GB", "rtx3070", "rtx3090", "h200", "1GB")), st.sampled_from((1, 2)), st.integers(1, 1 << 40),
    st.integers(1, 1 << 41),
)  # fmt: skip
def test_a_plan_places_every_byte_once_and_within_capacity(
    name: str, batch: int, dtype: Any, checkpointing: bool, gpu: str, gpus: int, pinned: int, file: int
) -> None:
    shape, card = PRESETS[name], find_card(gpu)
    work = Workload(batch, 256, dtype, checkpointing=checkpointing)
    memory = estimate(shape, work, "adamw", card)
    plan = plan_tiers(shape, work, memory, card, gpus=gpus, pinned_bytes=pinned, file_bytes=file)
    assert plan.feasible == (plan.short_bytes == 0)
    assert all(level.used_bytes <= level.capacity_bytes for level in plan.levels)
    if plan.feasible:
        p = shape.parameters * work.parameter_bytes
        assert sum(level.parameters for level in plan.levels) == p
        assert sum(level.gradients for level in plan.levels) == p
        assert sum(level.optimizer for level in plan.levels) == memory.optimizer
        assert plan.step_s >= max(plan.compute_s, plan.link_s, plan.disk_s, plan.host_s)
        on_gpu = plan.levels[0].used_bytes == 2 * p + memory.optimizer + plan.levels[0].working
        assert on_gpu == (plan.to_gpu_bytes == plan.from_gpu_bytes == 0)
    if (
        memory.total <= card.memory_bytes
        and memory.working + 2 * p_bytes(shape, work) + memory.optimizer <= card.memory_bytes
    ):
        assert plan.feasible and plan.overhead == 0


def p_bytes(shape: ModelShape, work: Workload) -> int:
    return shape.parameters * work.parameter_bytes


def test_sizes_are_read_with_their_unit() -> None:
    assert (parse_bytes("8GB", "--gpu"), parse_bytes("8GiB", "--gpu"), parse_bytes("1.5kb", "--gpu")) == (
        8 * 10**9,
        8 * GIB,
        1500,
    )
    for bad in ("8", "GB", "-8GB", "0GB", "8G", "8GBB", "eight GB", ""):
        with pytest.raises(UsageError, match="--gpu"):
            parse_bytes(bad, "--gpu")


HF_LLAMA = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
}  # fmt: skip


def test_a_hugging_face_config_gives_the_presets_shape(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(HF_LLAMA))
    for where in (tmp_path, tmp_path / "config.json"):
        got = find_shape(str(where))
        assert replace(got, name="", source="") == replace(PRESETS["llama-3-8b"], name="", source="")
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "gpt2", "n_embd": 1024, "n_layer": 24, "n_head": 16})
    )
    got = find_shape(str(tmp_path))
    assert replace(got, name="", source="") == replace(PRESETS["gpt2-medium"], name="", source="")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"hidden_size": "wide"}, "hidden_size='wide'"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
        ({"num_hidden_layers": True}, "num_hidden_layers=True"),
        ({"num_key_value_heads": 5}, "do not divide"),
        ({"hidden_size": 4097}, "does not divide"),
        ({"model_type": "mamba"}, "another_architecture.*'mamba'"),
        ({"model_type": ["llama"]}, "another_architecture"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings='yes'"),
    ],
)
def test_a_bad_config_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**HF_LLAMA, **change}))
    with pytest.raises((DataError, Unsupported), match=message):
        find_shape(str(path))


@pytest.mark.parametrize("text", ["", "[]", "{", "\x00"])
def test_a_config_that_is_no_object_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"config\.json"):
        find_shape(str(path))


def test_the_command_prints_everything_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate", "gpt2-medium", "--gpu", "rtx3070", "--json"]) == 0
    body = json.loads(capsys.readouterr().out)
    parts = ("parameters", "gradients", "optimizer", "activations", "logits", "workspace", "context")
    assert sum(body["bytes"][p] for p in parts) == body["bytes"]["total"]
    assert body["fits"] == (body["bytes"]["total"] <= 8 * GIB)
    assert body["plan"]["levels"] and body["advice"] and body["largest_batch"] >= 1
    assert any("tied" in line for line in body["assumptions"])
    assert cli.main(["estimate", "gpt2-medium", "--gpu", "rtx3070", "--batch", "4", "--no-tied"]) == 0
    text = capsys.readouterr().out
    assert "406.29 M" in text and "does not fit" in text and "assumptions:" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nosuch", "--gpu", "h200"], "unknown model 'nosuch'"),
        (["gpt2", "--gpu", "rtx9999"], "unknown --gpu 'rtx9999'"),
        (["gpt2", "--gpu", "8"], "--gpu '8'"),
        (["gpt2", "--gpu", "h200", "--seq", "2000"], "positions for 1024"),
        (["gpt2", "--gpu", "h200", "--batch", "0"], "at least 1"),
        (["llama-7b", "--gpu", "h200", "--dropout"], "has none"),
        (["gpt2", "--gpu", "h200", "--optimizer", "lion"], "'lion'"),
        (["gpt2", "--gpu", "h200", "--gpus", "3"], "--gpus 3"),
        (["gpt2", "--gpu", "h200", "--pinned", "much"], "--pinned 'much'"),
    ],
)
def test_bad_input_ends_with_2_and_a_name(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["estimate", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_transformers_own_code_is_traced_or_its_absence_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "config.json"
    small = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    rest = {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 300, "max_position_embeddings": 64}
    path.write_text(json.dumps({"model_type": "qwen3", **small, **rest}))
    argv = ["estimate", str(path), "--gpu", "8GB", "--seq", "32", "--json"]
    assert cli.main(argv) == 2
    assert "another_architecture" in capsys.readouterr().err
    argv += ["--implementation", "transformers"]
    if importlib.util.find_spec("transformers") is None:
        assert cli.main(argv) == 2
        assert "needs_transformers" in capsys.readouterr().err
        return
    assert cli.main(argv) == 0
    body = json.loads(capsys.readouterr().out)
    assert body["parameters"] > 2 * 300 * 64 and body["largest_batch"] > 1 and body["plan"] is None
    for more, message in (
        (["--gpus", "2"], "--gpus"), (["--tied"], "--tied"), (["--seq", "65"], "positions for 64"),
        (["--batch", "0"], "at least 1"),
    ):  # fmt: skip
        assert cli.main([*argv, *more]) == 2
        assert message in capsys.readouterr().err
    path.write_text(json.dumps({"model_type": "no such thing"}))
    assert cli.main(argv) == 2
    assert "cannot build" in capsys.readouterr().err


def test_estimating_needs_no_torch() -> None:
    code = (
        "import sys; from vbench.kernels.virtual.cli import main; main(['estimate', 'gpt2', '--gpu', '8GB']); "
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_the_tape_counts_shared_storages_once_and_adds_a_second_gradient_in_place() -> None:
    tape = Tape(granule_bytes=1)
    a = tape.op("a", [], 100, weight_grads=[WeightGrad("w", 10)])
    b = tape.op("b", [a], 40, saves=[a, a], saves_new=[("mask", 7)], weight_grads=[WeightGrad("w", 10)], frees=[a])
    assert tape.saved_bytes == 107
    tape.backward(b)
    assert tape.live_bytes == 40 + 10
    assert tape.peak.size_bytes == 100 + 40 + 7 + 40 + 100 + 10
