import math
from collections import Counter
from fractions import Fraction

from hypothesis import example, given
from hypothesis import strategies as st

from nemotron.data.mixture import Blend
from nemotron.data.source import permute

KEYS = st.integers(0, 2**64 - 1)
WEIGHT = st.one_of(
    st.floats(1e-3, 1e3), st.integers(1, 50).map(float), st.sampled_from([0.1, 0.3, 1e-6, 1e6])
)


def deviations(weights: list[float], rows: int) -> list[Fraction]:
    """Distance of each source's rows from its share of the decimal weights, exactly."""
    exact = [Fraction(repr(weight)) for weight in weights]
    counts = Blend(weights).counts(rows)
    return [abs(counts[i] - rows * w / sum(exact)) for i, w in enumerate(exact)]


@given(st.lists(WEIGHT, min_size=1, max_size=3), st.integers(0, 10**12))
def test_up_to_three_sources_stay_within_one_row_of_their_share(weights: list[float], rows: int):
    assert max(deviations(weights, rows)) < 1


@given(st.lists(WEIGHT, min_size=4, max_size=40), st.integers(0, 10**12))
@example([1.0, 1.0, 2.0, 3.0, 5.0, 8.0, 13.0, 21.0, 34.0], 87)
def test_many_sources_stay_within_two_rows_of_their_share(weights: list[float], rows: int):
    assert max(deviations(weights, rows)) < 2


@given(st.lists(WEIGHT, min_size=1, max_size=6), st.integers(0, 10**9))
def test_a_row_is_the_next_of_its_source(weights: list[float], start: int):
    blend = Blend(weights)
    counts = blend.counts(start)
    assert sum(counts.values()) == start
    for row in range(start, start + 30):
        source, index = blend.locate(row)
        assert index == counts[source]
        counts[source] += 1
    assert counts == blend.counts(start + 30)


def test_a_period_has_the_exact_shares_and_mixes_the_sources():
    blend = Blend([0.5, 0.3, 0.2])
    order = [blend.locate(row)[0] for row in range(20)]
    assert order[:10] == order[10:]
    assert [order[:10].count(source) for source in range(3)] == [5, 3, 2]
    assert all(order[i : i + 4].count(0) in (1, 2, 3) for i in range(17))


@given(st.integers(1, 400), KEYS)
def test_every_index_is_hit_once(size: int, key: int):
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


@given(st.integers(1, 2**62), KEYS, st.data())
def test_huge_ranges_stay_in_range(size: int, key: int, data: st.DataObject):
    index = data.draw(st.integers(0, size - 1))
    assert 0 <= permute(index, size, key) < size


def test_every_place_is_equally_likely():
    size, keys = 7, 7000
    for index in (0, 3, 6):
        images = [permute(index, size, key) for key in range(keys)]
        counts = [images.count(place) for place in range(size)]
        chi_squared = sum((count - keys / size) ** 2 / (keys / size) for count in counts)
        # Six degrees of freedom: 27.9 is passed by chance once in 10,000 times.
        assert chi_squared < 27.9, counts


def test_neighbors_do_not_stay_together():
    size = 10_000
    apart = [abs(permute(i, size, 5) - permute(i + 1, size, 5)) for i in range(size - 1)]
    # Two random places are size / 3 apart on average, with standard deviation size / sqrt(18).
    assert abs(sum(apart) / len(apart) - size / 3) < 4 * size / math.sqrt(18 * size)


def test_a_million_rows_realise_any_blend_to_a_ten_thousandth():
    weights = [14.0, 0.05, 6.5, 1.8, 22.4, 1 / 3, 1e-3, *(0.1 * i for i in range(1, 30))]
    blend, rows = Blend(weights), 10**6
    counted = Counter(blend.locate(row)[0] for row in range(0, rows, 997))
    assert sum(counted.values()) == 1004
    counts = blend.counts(rows)
    assert sum(counts.values()) == rows
    for number, weight in enumerate(weights):
        assert abs(counts[number] / rows - weight / sum(weights)) < 1e-4
        # every 997th row alone is a sample of about 1,000: five standard deviations
        share = weight / sum(weights)
        assert abs(counted[number] / 1004 - share) < 5 * math.sqrt(share / 1004) + 2 / 1004
