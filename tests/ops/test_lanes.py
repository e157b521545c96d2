"""Vectors of sixteen numbers: powers of e, and numbers that fill no whole vector."""

import numpy as np
import pytest

numba = pytest.importorskip("numba")


@pytest.fixture(scope="module")
def functions():
    """Compile what the tests call, with the kernels' own building blocks."""
    from nemotron.ops.jit.lanes import exp, load, read_some, sigmoid, store, write_some

    @numba.njit
    def powers(source, exps, sigmoids, count):
        for at in range(0, 4 * count, 64):
            store(exps + at, exp(load(source + at)))
            store(sigmoids + at, sigmoid(load(source + at)))

    @numba.njit
    def copy(source, target, count, kind):
        write_some(target, read_some(source, count, kind), count, kind)

    @numba.njit
    def widen(source, target, count, kind):
        store(target, read_some(source, count, kind))

    return powers, copy, widen


def powers_of(functions, x):
    exps, sigmoids = np.empty_like(x), np.empty_like(x)
    functions[0](x.ctypes.data, exps.ctypes.data, sigmoids.ctypes.data, len(x))
    return exps, sigmoids


def test_powers_of_e_are_right_to_a_unit_in_the_last_place(functions):
    x = np.linspace(-87, 88, 1 << 16, dtype=np.float32)
    x[: 1 << 14] = np.linspace(-1, 1, 1 << 14, dtype=np.float32)
    exps, sigmoids = powers_of(functions, x)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(exps / exact - 1).max() <= 2e-7  # a unit of float32 is 1.2e-7 at most
    assert np.abs(sigmoids * (1 + 1 / exact) - 1).max() <= 4e-7  # three roundings more


def test_powers_beyond_the_range_have_a_limit_and_no_number_stays_none(functions):
    x = np.array([-np.inf, -1e30, -90, 90, 1e30, np.inf, np.nan, 0] * 2, dtype=np.float32)
    exps, sigmoids = powers_of(functions, x)
    np.testing.assert_allclose(exps[:3], np.exp(-87.0), rtol=2e-7)
    assert np.isfinite(exps[3:6]).all()
    assert (exps[3:6] >= 1.6e38).all()
    assert np.isnan(exps[6])
    assert np.isnan(sigmoids[6])
    assert (sigmoids[:2] <= 1e-37).all()
    assert (sigmoids[4:6] == 1).all()
    assert sigmoids[7] == 0.5


@pytest.mark.parametrize("kind", [np.float32, np.uint16])
def test_some_numbers_are_read_and_written_and_no_others(functions, kind):
    _, copy, widen = functions
    for count in (0, 1, 7, 15, 16, 21):
        source = np.arange(1, 33).astype(kind)
        target, wide = np.zeros(32, kind), np.full(16, -1.0, np.float32)
        copy(source.ctypes.data, target.ctypes.data, count, kind)
        whole = min(count, 16)
        assert (target[:whole] == source[:whole]).all()
        assert not target[whole:].any()
        widen(source.ctypes.data, wide.ctypes.data, count, kind)
        bits = source[:whole].astype(np.uint32) << 16
        expected = source[:whole] if kind is np.float32 else bits.view(np.float32)
        assert (wide[:whole] == expected).all()
        assert not wide[whole:].any()
