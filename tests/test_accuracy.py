"""The trained weights, and that docs/accuracy.md says what the reference gives."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vbench.documents import quantity_text
from vbench.errors import DataError
from vbench.reference import trained
from vbench.reference.fp4 import quantize, quantize_inputs, quantize_metrics
from vbench.reference.ops.fp4 import FP4_QUANTIZE, TRAINED_SHAPES

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "accuracy.md"
#: A table of one metric of the encoder: its selector, then its lines.
_TABLE = re.compile(r"<!-- vbench:table (value quantity=metrics\.[^>]*?) -->(.*?)<!-- /vbench -->", re.DOTALL)


def figures(text: str) -> Iterator[tuple[str, dict[str, str], str]]:
    """(metric, case parameters, printed value) of each cell that holds a number, where one case stands for the cell."""
    for selector, body in _TABLE.findall(text):
        words = dict(word.split("=", 1) for word in selector.split()[1:])
        metric = words.pop("quantity").removeprefix("metrics.")
        rows, cols = words.pop("rows"), words.pop("cols")
        fixed = {name: value for name, value in words.items() if name in ("w", "dist", "n", "k") and "," not in value}
        lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in body.split("\n") if line[:1] == "|"]
        for row in lines[2:]:
            for head, cell in zip(lines[0][1:], row[1:], strict=True):
                if re.fullmatch(r"[0-9.e-]+", cell):
                    yield metric, {**fixed, rows: row[0], cols: head.partition("=")[2]}, cell


def differing(text: str) -> list[str]:
    """Cells that are not what the reference computes now."""
    found: dict[str, dict[str, float]] = {}
    wrong = []
    for metric, values, cell in figures(text):
        if values["dist"] == "trained":
            values["k"] = next(str(k) for n, k in TRAINED_SHAPES if str(n) == values["n"])
        case = FP4_QUANTIZE.parse(f"fp4_quantize[{','.join(f'{k}={v}' for k, v in values.items())}]")
        if case.id not in found:
            inputs = quantize_inputs(case, "cpu")
            found[case.id] = quantize_metrics(case, inputs, quantize(case.text("fmt"), inputs["w"]), {})
        if quantity_text(found[case.id][metric], "") != cell:
            wrong.append(f"{case.id} {metric}: {cell}")
    return wrong


def test_the_document_says_what_the_reference_gives() -> None:
    assert differing(DOCUMENT.read_text(encoding="utf-8")) == []


def test_control_a_wrong_figure_is_seen_and_a_right_one_is_not_accused() -> None:
    text = (
        "<!-- vbench:table value quantity=metrics.rel_frobenius backend=torch op=fp4_quantize w=fp32 dist=trained "
        "k=128,512 rows=fmt cols=n hardware=cpu -->\n\n| fmt | n=128 | n=512 |\n|---|---|---|\n"
        "| nf4 | 0.0942 | 0.0924 |\n| nvfp4 | STALE | 0.0954 |\n\n<!-- /vbench -->"
    )
    assert len(list(figures(text))) == 3
    assert differing(text) == ["fp4_quantize[fmt=nf4,w=fp32,dist=trained,n=512,k=128] rel_frobenius: 0.0924"]


@pytest.mark.parametrize("shape", TRAINED_SHAPES)
def test_trained_weights_are_no_draw_and_another_seed_is_another_weight(shape: tuple[int, int]) -> None:
    weight = trained.trained_weight(*shape, 0)
    assert tuple(weight.shape) == shape and bool(torch.isfinite(weight).all())
    moved = trained.trained_weight(*shape, 3)
    assert not torch.equal(weight, moved) and torch.equal(moved[3:], weight[:-3])
    # Trained from N(0, 0.02) (the second matrix from less): wider, and with heavier tails than normal.
    excess = float(((weight - weight.mean()) / weight.std()).pow(4).mean()) - 3
    assert 0.2 < excess < 2 and float(weight.std()) > 0.02


def test_an_altered_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = bytearray((Path(trained.__file__).parent / "data" / "trained_512x128.f16").read_bytes())
    data[77] ^= 1
    (tmp_path / "trained_512x128.f16").write_bytes(data)
    monkeypatch.setattr(trained, "_FOLDER", tmp_path)
    with pytest.raises(DataError, match="altered"):
        trained.trained_weight(512, 128, 0)
