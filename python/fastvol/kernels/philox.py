"""Normals made in registers: the device functions that every kernel with noise is built of.

Philox4x32-10 (Salmon et al. 2011), whose words are those of :mod:`fastvol._reference.noise` bit for
bit, and Box–Muller with a logarithm, a sine and a cosine of its own. Triton's functions are made
for every argument; these know that u is an odd multiple of 2⁻²⁴ and that an angle is a whole number
of 2⁻²⁴ turns, so that nothing has to be reduced, and they need no function of any one vendor.

The polynomials of float32 are the best ones in the error of the normal itself: 3e-7 from the
logarithm, 6e-7·radius from the sine and 5e-8·radius from the cosine, where the radius is below
5.77; with all roundings |Δz| stays below 5e-6. Those of float64 are the ones of the C++ core.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiply_wide(a: tl.tensor, multiplier: tl.constexpr) -> tl.tensor:
    """High and low words of a 32 × 32 bit product."""
    # One instruction where a high and a low product would be two.
    product = a.to(tl.uint64) * multiplier
    return (product >> 32).to(tl.uint32), product.to(tl.uint32)


@triton.jit
def philox(
    c0: tl.tensor, c1: tl.tensor, c2: tl.tensor, c3: tl.tensor, k0: tl.tensor, k1: tl.tensor
) -> tl.tensor:
    """The four words of some counters; all are uint32, and may be scalars or tensors.

    Only the coordinate block is a tensor as a rule: then the products that all blocks share, one in
    each of the first two rounds, are made once.
    """
    weyl_0 = tl.full([], 0x9E3779B9, tl.uint32)
    weyl_1 = tl.full([], 0xBB67AE85, tl.uint32)
    for _ in tl.static_range(10):
        high_0, low_0 = multiply_wide(c0, 0xD2511F53)
        high_1, low_1 = multiply_wide(c2, 0xCD9E8D57)
        c0 = high_1 ^ c1 ^ k0
        c2 = high_0 ^ c3 ^ k1
        c1 = low_1
        c3 = low_0
        k0 = k0 + weyl_0
        k1 = k1 + weyl_1
    return c0, c1, c2, c3


@triton.jit
def box_muller(length_word: tl.tensor, angle_word: tl.tensor) -> tl.tensor:
    """√(−2 ln u₀)·(cos 2πu₁, sin 2πu₁) in float32."""
    # u in [1, 2) less the number just below 1: exact.
    u = ((length_word >> 9) + 0x3F800000).to(tl.float32, bitcast=True) - 0.999999940395355224609375
    # u = 2^e·(1 + f), 1 + f in [√½, √2): no cancellation near u = 1, where e is 0.
    bits = u.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) & -0x800000
    f = (bits - exponent).to(tl.float32, bitcast=True) - 1.0
    p = f * -0.24240410343339364 + 0.3786395744462611
    p = p * f - 0.41031839267022524
    p = p * f + 0.4974836228943304
    p = p * f - 0.6662205683260156
    p = p * f + 1.000045882113094
    p = p * f - 2.000002709491369
    # −2 ln 2·e, with e still 2²³ times too large.
    length = tl.sqrt(p * f + exponent.to(tl.float32) * -1.6525916589735634e-07)
    # The word as a signed fraction of a turn, t in [-½, ½): then cos 2πt = -sin(½π·y) and
    # sin 2πt = ± cos(½π·y) with y = 4|t| - 1 and the sign of t.
    turn = ((angle_word & 0xFFFFFE00) | 0x100).to(tl.int32, bitcast=True)
    y = tl.abs(turn.to(tl.float32)) * 9.31322574615478515625e-10 - 1.0
    square = y * y
    s = square * 0.0043330953068827435 - 0.07943434465718967
    s = s * square + 0.645892849574615
    s = s * square - 1.5707910110772565
    c = square * 0.0008581906334132057 - 0.02081062754608389
    c = c * square + 0.2536507446507876
    c = c * square - 1.2336982146715672
    c = c * square + 0.9999999534667401
    sign = turn & -0x80000000
    sine = ((length * c).to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    return (length * y) * s, sine


@triton.jit
def box_muller_double(length_word: tl.tensor, angle_word: tl.tensor) -> tl.tensor:
    """The same in float64, |Δz| ≤ 1e-14."""
    # The word beside the exponent of 2⁵² is that much more than 2⁵².
    odd = ((length_word >> 8) | 1).to(tl.uint64) | 0x4330000000000000
    u = (odd.to(tl.float64, bitcast=True) - 4503599627370496.0) * 5.9604644775390625e-08
    bits = u.to(tl.int64, bitcast=True)
    exponent = (bits - 0x3FE6A09E667F3BCD) & -0x10000000000000
    f = (bits - exponent).to(tl.float64, bitcast=True) - 1.0
    e = (exponent >> 52).to(tl.float64)
    s = f / (f + 2.0)
    z = s * s
    q = tl.full([], 0.1461644968504340586, tl.float64)
    q = q * z + tl.full([], 0.15331721600556041269, tl.float64)
    q = q * z + tl.full([], 0.1818288912526172208, tl.float64)
    q = q * z + tl.full([], 0.22222211134795079855, tl.float64)
    q = q * z + tl.full([], 0.28571428625975484921, tl.float64)
    q = q * z + tl.full([], 0.3999999999989950449, tl.float64)
    q = q * z + tl.full([], 0.66666666666666696862, tl.float64)
    # log(1 + f) = f - s·(f - z·q)
    low = s * (f - z * q) - e * tl.full([], 1.2996506893889888371e-8, tl.float64)
    minus_log = (low - f) - e * tl.full([], 0.6931471675634384, tl.float64)
    length = tl.sqrt(2.0 * minus_log)
    turn = ((angle_word & 0xFFFFFE00) | 0x100).to(tl.int32, bitcast=True)
    # The nearest quarter turn, and what is left, |r| ≤ ⅛ of a turn.
    quarter = (turn + 0x20000000) >> 30
    r = (turn - (quarter << 30)).to(tl.float64) * 2.3283064365386962890625e-10
    z = r * r
    s = z * tl.full([], 3.7864333494655501419, tl.float64)
    s = (s - tl.full([], 15.09405418207999884, tl.float64)) * z
    s = (s + tl.full([], 42.058689180885119912, tl.float64)) * z
    s = (s - tl.full([], 76.705859735620939111, tl.float64)) * z
    s = (s + tl.full([], 81.605249276051700272, tl.float64)) * z
    s = (s - tl.full([], 41.341702240399755166, tl.float64)) * z
    sine = r * tl.full([], 6.28318530717958647692, tl.float64) + r * s
    c = z * tl.full([], -1.6990343940660636356, tl.float64)
    c = (c + tl.full([], 7.9032069115696784291, tl.float64)) * z
    c = (c - tl.full([], 26.426253275854721364, tl.float64)) * z
    c = (c + tl.full([], 60.244641352702008933, tl.float64)) * z
    c = (c - tl.full([], 85.456817206643804246, tl.float64)) * z
    c = (c + tl.full([], 64.939394022668242743, tl.float64)) * z
    c = (c - tl.full([], 19.73920880217871723, tl.float64)) * z
    cosine = c + 1.0
    odd_quarter = (quarter & 1) != 0
    one = tl.where(odd_quarter, sine, cosine)
    other = tl.where(odd_quarter, cosine, sine)
    one = tl.where(((quarter + 1) & 2) != 0, -one, one)
    other = tl.where((quarter & 2) != 0, -other, other)
    return length * one, length * other


@triton.jit
def vector_of(direction: tl.tensor, ANTITHETIC: tl.constexpr) -> tl.tensor:
    """The vector of a direction, int64, and the direction's sign, float32."""
    if ANTITHETIC:
        return direction >> 1, 1.0 - 2.0 * (direction & 1).to(tl.float32)
    else:
        return direction, 1.0


@triton.jit
def normals_of_blocks(
    blocks: tl.tensor,
    seed_low: tl.tensor,
    seed_high: tl.tensor,
    stream: tl.tensor,
    vector: tl.tensor,
    DOUBLE: tl.constexpr,
) -> tl.tensor:
    """Coordinates 4b … 4b+3 of a vector, for a tensor of blocks b of any shape.

    Args:
        blocks: uint32.
        seed_low, seed_high, stream: int32 with the bits of a word.
        vector: int64.
        DOUBLE: float64 instead of float32.
    """
    w0, w1, w2, w3 = philox(
        blocks,
        stream.to(tl.uint32, bitcast=True),
        vector.to(tl.uint32),
        (vector >> 32).to(tl.uint32),
        seed_low.to(tl.uint32, bitcast=True),
        seed_high.to(tl.uint32, bitcast=True),
    )
    if DOUBLE:
        z0, z1 = box_muller_double(w0, w1)
        z2, z3 = box_muller_double(w2, w3)
    else:
        z0, z1 = box_muller(w0, w1)
        z2, z3 = box_muller(w2, w3)
    return z0, z1, z2, z3


@triton.jit
def to_bfloat16_and_back(x: tl.tensor) -> tl.tensor:
    """float32 rounded to the nearest bfloat16, ties to even; no NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return bits.to(tl.float32, bitcast=True)
