import math

from hypothesis import given
from hypothesis import strategies as st

from nemotron.data.permutation import permute

KEYS = st.integers(0, 2**64 - 1)


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


def test_neighbours_do_not_stay_together():
    size = 10_000
    apart = [abs(permute(i, size, 5) - permute(i + 1, size, 5)) for i in range(size - 1)]
    # Two random places are size / 3 apart on average, with standard deviation size / sqrt(18).
    assert abs(sum(apart) / len(apart) - size / 3) < 4 * size / math.sqrt(18 * size)
