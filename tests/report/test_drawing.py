"""Charts and heat maps: what stays of long series, round ticks, colors in proportion."""

import re

import numpy as np
import pytest

from nemotron.drawing.chart import BINS, Line, downsample, line_chart
from nemotron.drawing.heatmap import COLUMNS, LEVELS, fewer_columns, heat_map
from nemotron.drawing.scale import axis, short
from nemotron.drawing.series import Series
from nemotron.report.table import Table


def test_each_stretch_keeps_its_mean_and_its_extremes():
    random = np.random.default_rng(3)
    x, y = np.arange(10_007.0), random.normal(size=10_007)
    y[5003], y[77], y[78] = 50.0, np.nan, np.inf
    points = downsample(Series(x, y))
    assert len(points.x) == BINS
    assert points.high.max() == 50.0
    edges = [
        np.flatnonzero(np.minimum(x / x.max() * BINS, BINS - 1).astype(int) == i)
        for i in range(BINS)
    ]
    for bin_, place in enumerate(edges):
        part = y[place][np.isfinite(y[place])]
        # sums in another order
        np.testing.assert_allclose(points.mean[bin_], part.mean(), rtol=0, atol=1e-12)
        assert (points.low[bin_], points.high[bin_]) == (part.min(), part.max())


def test_few_values_stay_as_they_are():
    series = Series(np.array([1.0, 5.0, 6.0]), np.array([3.0, np.nan, 2.0]))
    points = downsample(series)
    assert points.x.tolist() == [1.0, 6.0]
    assert points.mean.tolist() == points.low.tolist() == points.high.tolist() == [3.0, 2.0]


def test_a_line_is_where_its_values_are():
    series = Series(np.array([0.0, 10.0]), np.array([2.0, 4.0]))
    svg = line_chart([Line("a", series, 0)], title="t", x_label="step")
    # x from 46 to 392; y from 186 up to 8, with a twentieth of the span at each end
    assert re.search(r'class="l c0" d="M46 177.9L392 16.1"', svg)
    assert line_chart([Line("a", Series(np.empty(0), np.empty(0)), 0)], title="t", x_label="") == ""


@pytest.mark.parametrize("scale", ["linear", "auto", "exact"])
@pytest.mark.parametrize("low", [-3.0, 0.0, 1e-9, 5.0, 1e12])
@pytest.mark.parametrize("span", [0.0, 1e-12, 0.37, 12.0, 9e9, 1e300])
def test_ticks_are_round_few_and_on_the_axis(low: float, span: float, scale: str):
    found = axis(np.array([low, low + span]), 100.0, 0.0, scale)
    ticks = found.ticks(3)
    assert 2 <= len(ticks) <= 26
    places = found.place(np.array(ticks))
    assert ((places >= 0) & (places <= 100)).all()
    assert all(len(short(tick)) <= 10 for tick in ticks)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.5, "0.5"),
        (-2.25, "-2.25"),
        (9999, "9999"),
        (12346, "12.35k"),
        (3e6, "3M"),
        (3e-4, "3e-4"),
        (1.25e-7, "1.25e-7"),
        (2e20, "2.00e+20"),
        (float("nan"), "not finite"),
    ],
)
def test_values_are_written_short(value: float, text: str):
    assert short(value) == text


def test_a_cell_has_the_color_of_its_value():
    cells = np.array([[0.0, 0.0, 1.0], [0.5, np.nan, 1.0]])
    found = heat_map(["a", "b"], cells, title="t", left="l", right="r")
    assert found is not None
    assert (found.low, found.high) == ("0", "1")
    levels = dict(re.findall(r'class="h(\d)" d="([^"]+)"', found.svg))
    assert levels.keys() == {"0", str(LEVELS // 2), str(LEVELS - 1)}
    assert levels["0"].count("M") == 1  # neighbors are one rectangle
    assert levels[str(LEVELS - 1)].count("M") == 2
    assert heat_map(["a"], np.full((1, 2), np.nan), title="t", left="", right="") is None


def test_a_middle_is_in_the_middle_of_the_colors():
    found = heat_map(["a"], np.array([[-0.1, 0.0, 0.4]]), title="t", left="", right="", middle=0)
    assert found is not None
    assert (found.low, found.high) == ("-0.4", "0.4")
    assert sorted(re.findall(r'class="v(\d)"', found.svg)) == ["3", "4", "8"]


def test_many_columns_become_means_of_neighbors():
    cells = np.arange(2.0 * 512).reshape(2, 512)
    cells[0, 1] = np.nan
    found = fewer_columns(cells)
    assert found.shape == (2, COLUMNS)
    assert found[1].tolist() == cells[1].reshape(-1, 4).mean(1).tolist()
    assert found[0, 0] == (0 + 2 + 3) / 3


def test_a_table_takes_numbers_alone():
    table = Table()
    table.add({"kind": "train", "step": 1, "data/tokens": 8, "a": 1.5, "b": "text", "c": True})
    table.add({"kind": "train", "step": 2, "data/tokens": 16, "a": None, "d": 10**400})
    table.add({"kind": "train", "step": 3, "data/tokens": 24, "a": 2})
    assert table.keys == ["data/tokens", "a"]
    assert table.series("a").x.tolist() == [1, 2, 3]
    assert table.series("a", by_tokens=True).x.tolist() == [8, 16, 24]
    assert table.series("a").finite.y.tolist() == [1.5, 2.0]
    assert table.last("a") == 2.0
    assert table.last("absent") is None
