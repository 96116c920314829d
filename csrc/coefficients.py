"""Prints the polynomial coefficients of core/elementary.hpp, lowest degree first (needs mpmath)."""

from collections.abc import Callable

from mpmath import atanh, chebyfit, cos, exp, log, log1p, mp, mpf, nstr, pi, sin, sqrt

mp.dps = 60
ROOT = sqrt(mpf(2))


def show(name: str, function: Callable[[mpf], mpf], low: mpf, high: mpf, terms: int) -> None:
    """Interpolates at Chebyshev points, which is within a small factor of the best polynomial."""
    coefficients, error = chebyfit(function, [low, high], terms, error=True)
    print(f"{name}  (error {nstr(error, 2)})")
    for coefficient in reversed(coefficients):
        print("   ", nstr(coefficient, 20))


def without_limit(function: Callable[[mpf], mpf], at_zero: mpf) -> Callable[[mpf], mpf]:
    """The function with its value at 0, where its formula is 0/0."""
    return lambda x: at_zero if abs(x) < mpf(10) ** -15 else function(x)


show(
    "float log: (log(1 + f) - f + f^2/2) / f^3",
    without_limit(lambda f: (log1p(f) - f + f * f / 2) / f**3, mpf(1) / 3),
    1 / ROOT - 1,
    ROOT - 1,
    9,
)
show(
    "double log: 2 (atanh(s) - s) / s^3 in s^2",
    without_limit(lambda z: 2 * (atanh(sqrt(z)) - sqrt(z)) / sqrt(z) ** 3, mpf(2) / 3),
    mpf(0),
    ((ROOT - 1) / (ROOT + 1)) ** 2,
    7,
)
for dtype, sine_terms, cosine_terms in (("float", 4, 4), ("double", 6, 7)):
    show(
        f"{dtype} sin: (sin(2 pi r) / r - 2 pi) / r^2 in r^2",
        without_limit(
            lambda z: (sin(2 * pi * sqrt(z)) / sqrt(z) - 2 * pi) / z, -((2 * pi) ** 3) / 6
        ),
        mpf(0),
        mpf(1) / 64,
        sine_terms,
    )
    show(
        f"{dtype} cos: (cos(2 pi r) - 1) / r^2 in r^2",
        without_limit(lambda z: (cos(2 * pi * sqrt(z)) - 1) / z, -((2 * pi) ** 2) / 2),
        mpf(0),
        mpf(1) / 64,
        cosine_terms,
    )
show(
    "double exp: (exp(r) - 1 - r) / r^2",
    without_limit(lambda r: (exp(r) - 1 - r) / r**2, mpf(1) / 2),
    -log(mpf(2)) / 2 * mpf("1.0001"),
    log(mpf(2)) / 2 * mpf("1.0001"),
    10,
)
show(
    "float exp: (exp(r) - 1 - r) / r^2",
    without_limit(lambda r: (exp(r) - 1 - r) / r**2, mpf(1) / 2),
    -log(mpf(2)) / 2 * mpf("1.001"),
    log(mpf(2)) / 2 * mpf("1.001"),
    5,
)
