"""Divisors of sizes, for rules that name the nearest legal value."""

from math import isqrt

MAX_TRIED = 10**6
"""Largest candidate, so that a number of any size is answered at once."""


def divisors(number: int) -> list[int]:
    """Return the divisors of a number above 0, smallest first.

    Above 10^12 those are left out that lie between 10^6 and the number over 10^6.
    """
    small = [d for d in range(1, min(isqrt(number), MAX_TRIED) + 1) if number % d == 0]
    large = [number // d for d in reversed(small) if d * d != number]
    return small + large


def nearest(value: int, legal: list[int]) -> int:
    """Return the legal value that is nearest; of two, the smaller."""
    return min(legal, key=lambda n: (abs(n - value), n))
