"""The suites: valid, distinct, sourced, and small where small is promised. No torch is needed to list them."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from vbench.reference.ops import OPS
from vbench.reference.ops.attention import LAYOUTS
from vbench.reference.ops.block import layers
from vbench.reference.ops.fp4 import ENCODINGS, FORMATS, packed_bytes
from vbench.reference.ops.types import DTYPES
from vbench.spec import Case, Op, Suite, resolve
from vbench.suites import attention, fp4, model, rivals, strategies, tier
from vbench.suites.models import ATTENTIONS, BLOCKS, LINEARS, distinct_linears

SUITES = (fp4.SUITE, attention.SUITE, tier.SUITE, model.SUITE, rivals.SUITE)
OPS_BY_NAME = {op.name: op for op in OPS}
by_suite = pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.name)

STRATEGIES: dict[str, Callable[[], SearchStrategy[Case]]] = {
    "fp4_quantize": strategies.fp4_quantize_cases,
    "fp4_dequantize": strategies.fp4_dequantize_cases,
    "fp4_linear": strategies.fp4_linear_cases,
    "attention": strategies.attention_cases,
    "attention_backward": strategies.attention_backward_cases,
    "attention_extended": strategies.extended_attention_cases,
    "attention_extended_backward": strategies.extended_attention_backward_cases,
    "tier_stack": strategies.tier_cases,
    "tier_fetch": strategies.tier_fetch_cases,
    "int8_linear": strategies.int8_linear_cases,
}


def op_of(case: Case) -> Op:
    return OPS_BY_NAME[case.op]


def elements(case: Case) -> int:
    """The work of a check case, roughly: what an interpreter pays for."""
    if case.op.startswith("attention"):
        heads = case.axis("h" if case.op == "attention_masked_backward" else "hq")
        return case.axis("b") * heads * case.axis("sq") * case.axis("sk") * case.axis("d")
    if case.op == "tier_stack":
        return case.axis("steps") * case.axis("item_bytes")
    if case.op == "offload_pass":
        return case.axis("layers") * case.axis("width") ** 2
    if case.op in ("train_step", "generate"):
        tokens = case.axis("batch") * case.axis("seq") * (case.axis("new") if case.op == "generate" else 3)
        return tokens * case.axis("layers") * case.axis("width") * case.axis("inner")
    if case.op == "decoder_block":
        return 4 * case.axis("b") * case.axis("s") * case.axis("hidden") * max(case.axis("hidden"), case.axis("inner"))
    if case.op == "svd":
        return case.axis("m") * case.axis("n") * min(case.axis("m"), case.axis("n"))
    if case.op == "elementwise_chain":
        return case.axis("n") * case.axis("steps")
    return case.axis("n") * case.axis("k") * (case.axis("m") if case.op.endswith("linear") else 1)


def repeated(cases: list[Case]) -> list[str]:
    return [case_id for case_id, count in Counter(case.id for case in cases).items() if count > 1]


def test_listing_the_suites_imports_neither_torch_nor_hypothesis() -> None:
    code = (
        "import sys\n"
        "from vbench.suites import attention, fp4, model, tier\n"
        "assert fp4.SUITE.benches and model.SUITE.benches and attention.SUITE.checks and tier.SUITE.checks\n"
        "print(sorted({'torch', 'hypothesis', 'numpy', 'triton', 'numba'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@by_suite
def test_ids_are_unique_and_read_back(suite: Suite) -> None:
    for cases in (list(suite.checks), [bench.case for bench in suite.benches]):
        assert repeated(cases) == []
        for case in cases:
            assert op_of(case).parse(case.id) == case


def test_a_repeated_id_would_be_noticed() -> None:
    assert repeated([fp4.SUITE.checks[0], fp4.SUITE.checks[0]]) == [fp4.SUITE.checks[0].id]


def test_short_hashes_do_not_collide_over_all_suites() -> None:
    ids = {case.id: case.hash for suite in SUITES for case in (*suite.checks, *(b.case for b in suite.benches))}
    assert len(set(ids.values())) == len(ids)


@by_suite
def test_every_timed_shape_has_a_meaning_and_a_source(suite: Suite) -> None:
    assert suite.benches
    for bench in suite.benches:
        assert op_of(bench.case).reject(bench.case) is None, bench.case.id
        assert len(bench.source) > 20, bench.case.id


@by_suite
def test_quick_is_small_and_standard_adds(suite: Suite) -> None:
    counts = Counter(bench.effort for bench in suite.benches)
    assert 1 <= counts["quick"] <= 6
    assert counts["standard"] >= 3


def test_model_quick_is_one_layer() -> None:
    quick = [bench for bench in model.SUITE.benches if bench.effort == "quick"]
    layers = [b.case for b in quick if b.case.op not in ("train_step", "generate")]
    assert [(c.axis("n"), c.axis("k"), c.axis("m")) for c in layers] == [(14336, 4096, 1)]
    assert {b.case.op for b in quick} == {"fp4_linear", "train_step", "generate"}


def test_check_cases_cover_formats_epilogues_alignments_and_masked_rows() -> None:
    checks = [case for suite in SUITES for case in suite.checks if op_of(case).reject(case) is None]
    of = {name: [case for case in checks if case.op == name] for name in OPS_BY_NAME}
    assert {c.text("fmt") for c in of["fp4_quantize"]} == set(ENCODINGS)
    assert {(c.text("fmt"), c.text("y")) for c in of["fp4_dequantize"]} >= {(f, y) for f in FORMATS for y in DTYPES}
    epilogues = {(c.text("fmt"), c.text("act"), c.axis("bias")) for c in of["fp4_linear"]}
    assert len(epilogues) == len(FORMATS) * 4 * 2
    assert {c.text("x") for c in of["fp4_linear"] if c.text("dist") == "grid"} == set(DTYPES)
    for name in ("attention", "attention_backward"):
        for causal in ("none", "top_left", "bottom_right"):
            signs = {c.axis("sq") - c.axis("sk") > 0 for c in of[name] if c.text("causal") == causal}
            assert signs == {False, True}
        assert any(c.text("causal") == "bottom_right" and c.axis("sq") > c.axis("sk") for c in of[name])
        assert any(c.axis("hq") > c.axis("hk") > 1 for c in of[name])
        assert {c.text("layout") for c in of[name]} == set(LAYOUTS)
    assert {(c.axis("dlse"), c.text("dtype")) for c in of["attention_backward"]} == set(product((0, 1), DTYPES))
    assert {c.text("trace") for c in of["tier_stack"]} == {"mixed", "cyclic", "palindrome", "resident"}


def test_each_op_has_a_case_that_must_be_refused_where_it_can_be() -> None:
    refused = {case.op for suite in SUITES for case in suite.checks if op_of(case).reject(case) is not None}
    assert refused == set(OPS_BY_NAME) - {"tier_stack"}


def test_check_cases_are_small_but_for_the_metric_ones() -> None:
    blocks = [case for case in model.SUITE.checks if case.op == "decoder_block"]
    assert len(blocks) <= 30 and all(elements(case) < 1_000_000 for case in blocks)
    # Head dims that only kernels for matrix units take, with lengths past one tile.
    wide = [case for case in attention.SUITE.checks if case.axis("d") >= 64]
    # The lengths at which a fused backward of another's was wrong, and those beside them.
    masked = [case for case in wide if case.op == "attention_masked_backward"]
    assert len(masked) == 4 and all(case.text("mask") == "shift" for case in masked)
    shifted = [case for case in wide if case.op == "attention_extended_backward"]
    assert len(shifted) == 3 and all(case.text("mask") == "shifted" for case in shifted)
    units = [case for case in wide if case not in masked + shifted and case.axis("sq") < 256]
    assert len(units) == 2 * len(attention.MATRIX_UNIT_SHAPES) <= 8
    assert all(elements(case) < 1_100_000 for case in units)
    # No interpreter runs these: torch's own matrix products do.
    whole = [case for case in model.SUITE.checks if case.op in ("train_step", "generate")]
    assert len(whole) <= 40 and all(elements(case) < 200_000 for case in whole)
    small = {*blocks, *units, *whole, *masked, *shifted}
    large = [case for suite in SUITES for case in suite.checks if case not in small and elements(case) > 70_000]
    assert len(large) == len(ENCODINGS) * (len(fp4.METRIC_DISTRIBUTIONS) + 1) + 2 + 4 + 2
    metric_sizes = ("n=512,k=512", "n=512,k=2048", "sq=256,sk=256", "item_bytes=4096")
    assert all(any(size in case.id for size in metric_sizes) for case in large)


def test_every_kind_of_case_that_is_not_interpreted_has_one_that_is() -> None:
    """Encoding and dtype of each; the control is a suite whose small cases lack one."""

    def kinds(cases: Iterable[Case]) -> set[tuple[object, ...]]:
        return {(c.op, c.text("fmt"), c.text("w")) for c in cases if c.op == "fp4_quantize"}

    for suite in SUITES:
        assert suite.native <= set(suite.checks)
    small = [case for case in fp4.SUITE.checks if case not in fp4.SUITE.native]
    assert fp4.SUITE.native and kinds(fp4.SUITE.native) <= kinds(small)
    assert not kinds(fp4.SUITE.native) <= kinds(case for case in small if case["fmt"] != "nf4")


@by_suite
def test_generated_strategies_resolve_and_counts_grow(suite: Suite) -> None:
    for generated in suite.generated:
        assert isinstance(resolve(generated.strategy)(), SearchStrategy)
        quick, standard, full = generated.count
        assert 0 < quick < standard < full


@pytest.mark.parametrize("name", STRATEGIES)
@settings(max_examples=150)
@given(data=st.data())
def test_drawn_cases_are_valid_and_small(name: str, data: st.DataObject) -> None:
    case = data.draw(STRATEGIES[name]())
    assert case.op == name
    assert op_of(case).parse(case.id) == case
    assert elements(case) <= 400_000
    rejected = op_of(case).reject(case)
    if rejected is not None:
        assert all(rejected)
    elif name == "fp4_linear":
        assert case.axis("m") * case.axis("n") >= strategies.MANY
    elif name.startswith("attention"):
        assert case.axis("b") * case.axis("hq") * case.axis("sq") * case.axis("d") > 1
    if name == "tier_stack":
        assert case.axis("file_bytes") >= case.axis("keys") * case.axis("item_bytes")


@pytest.mark.parametrize("name", STRATEGIES)
def test_strategies_draw_bad_cases_but_few(name: str) -> None:
    seen: list[bool] = []

    @settings(max_examples=200, database=None)
    @given(STRATEGIES[name]())
    def draw(case: Case) -> None:
        seen.append(OPS_BY_NAME[name].reject(case) is not None)

    draw()
    share = sum(seen) / len(seen)
    assert share == 0 if name == "tier_stack" else 0 < share < 0.4


def test_model_shapes_follow_from_their_configs() -> None:
    assert {shape.model for shape in LINEARS} == {shape.model for shape in ATTENTIONS}
    for shape in LINEARS:
        assert "config.json" in shape.source
        assert shape.k % 16 == 0, "nvfp4 must fit every layer the suite times in it"
    widths = {shape.model: shape.hq * shape.d for shape in ATTENTIONS}
    # A block's layers are the model's.
    for block in BLOCKS:
        case = next(
            b.case for b in model.SUITE.benches if b.source.startswith(f"{block.model} ") and "family" in b.case.id
        )
        own = {(layer.n, layer.k, layer.bias) for layer in layers(case)}
        assert own == {(s.n, s.k, s.bias) for s in LINEARS if s.model == block.model}
    for shape in LINEARS:
        assert widths[shape.model] in (shape.n, shape.k), shape
    # All blocks' linear weights, as the published totals have them less embeddings, norms and biases: GPT-2 XL 1.56e9
    # with 8.2e7 of embeddings, LLaMA-7B 6.738e9 with 2.62e8, Llama-3-8B 8.03e9 with 1.051e9.
    weights = Counter[str]()
    for shape in LINEARS:
        weights[shape.model] += shape.n * shape.k
    assert weights["GPT-2 XL"] * 48 == 1_474_560_000
    assert weights["LLaMA-7B"] * 32 == 6_476_005_376
    assert weights["Llama-3-8B"] * 32 == 6_979_321_856


def test_equal_layers_are_timed_once_and_name_every_owner() -> None:
    shapes = distinct_linears()
    assert sum(len(owners) for owners in shapes.values()) == len(LINEARS)
    square = shapes[4096, 4096, False]
    assert {shape.model for shape in square} == {"LLaMA-7B", "Llama-3-8B"}
    bench = next(b for b in model.SUITE.benches if b.case.op == "fp4_linear" and "n=4096,k=4096" in b.case.id)
    assert "LLaMA-7B" in bench.source and "Llama-3-8B" in bench.source


def test_bench_weights_are_larger_than_an_l2_where_speed_is_claimed() -> None:
    """29 MB at 14336 x 4096 and more: the size from which the speed claims hold."""
    assert packed_bytes("absmax7_row", 14336, 4096) > 29e6
