"""Figures show what there is."""

from __future__ import annotations

import math

import pytest

from megaegpt.report.figures import can_draw, lines

pytestmark = pytest.mark.skipif(not can_draw(), reason="needs matplotlib")


@pytest.mark.parametrize(
    ("values", "is_marked"),
    [
        ([2.0], True),
        ([2.0, math.nan, 1.0, 0.5], True),
        ([2.0, 1.0, math.nan], False),
        ([math.nan, math.nan], False),
        ([], False),
    ],
)
def test_a_point_that_no_line_leads_to_is_marked(values: list[float], is_marked: bool) -> None:
    (axes,) = lines({"a": (range(len(values)), values)}, "step", "loss").axes
    (curve,) = axes.get_lines()
    assert (curve.get_marker() == ".") == is_marked
