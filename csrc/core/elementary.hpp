// Elementary functions in plain operations that a compiler can vectorise, without branches or
// tables. The coefficients are Chebyshev interpolants, printed by csrc/coefficients.py.
#pragma once

#include <bit>
#include <cstdint>

// These end up inside functions that are compiled for several instruction sets.
#define FASTVOL_INLINE inline __attribute__((always_inline))

namespace fastvol {

// log 2 in two parts; the high part times an exponent is exact.
inline constexpr double ln2_high = 0.6931471675634384;
inline constexpr double ln2_low = 1.2996506893889888371e-8;
inline constexpr float ln2_high_float = 0.693115234375f;
inline constexpr float ln2_low_float = 3.19461849453094e-5f;

// f - log(1 + f) for 1 + f in [sqrt(1/2), sqrt(2)], to 1 part in 1e16 of f.
FASTVOL_INLINE double minus_log1p(double f) {
    // With s = f / (2 + f): log(1 + f) = f - s (f - s^2 q(s^2)), q(s^2) = 2 (atanh(s) - s) / s^3.
    const double s = f / (2.0 + f);
    const double z = s * s;
    double q = 0.1461644968504340586;
    q = q * z + 0.15331721600556041269;
    q = q * z + 0.1818288912526172208;
    q = q * z + 0.22222211134795079855;
    q = q * z + 0.28571428625975484921;
    q = q * z + 0.3999999999989950449;
    q = q * z + 0.66666666666666696862;
    return s * (f - z * q);
}

// (log(1 + f) - f + f^2 / 2) / f^3, highest degree first
inline constexpr float log1p_float[] = {0.0697161147145f, -0.114797338466f, 0.116854199235f,
                                        -0.124256873315f, 0.142490576457f,  -0.166678023195f,
                                        0.200007157489f,  -0.24999996958f,  0.3333333118f};

FASTVOL_INLINE float minus_log1p(float f) {
    float p = log1p_float[0];
    for (int i = 1; i < 9; ++i) p = p * f + log1p_float[i];
    const float square = f * f;
    return 0.5f * square - square * (f * p);
}

// sin(2 pi r) and cos(2 pi r) for |r| <= 1/8.
template <typename Real>
struct CosSin {
    Real cosine;
    Real sine;
};

// (sin(2 pi r) / r - 2 pi) / r^2 and (cos(2 pi r) - 1) / r^2 in r^2, highest degree first
inline constexpr float sine_float[] = {41.589542148733f, -76.701285894895f, 81.605234992318f,
                                       -41.341702233426f};
inline constexpr float cosine_float[] = {59.424105981756f, -85.448820089651f, 64.939369051419f,
                                         -19.739208789987f};
// 2 pi in two parts: its rounding alone would cost as much as all other errors.
inline constexpr float two_pi_high_float = 6.2831855f;
inline constexpr float two_pi_low_float = 1.7484556e-7f;  // to be subtracted

FASTVOL_INLINE CosSin<float> cos_sin_turns(float r) {
    const float z = r * r;
    float s = sine_float[0];
    float c = cosine_float[0];
    for (int i = 1; i < 4; ++i) {
        s = s * z + sine_float[i];
        c = c * z + cosine_float[i];
    }
    return {1.0f + z * c, r * two_pi_high_float + r * (z * s - two_pi_low_float)};
}

FASTVOL_INLINE CosSin<double> cos_sin_turns(double r) {
    const double z = r * r;
    double s = 3.7864333494655501419;
    s = s * z - 15.09405418207999884;
    s = s * z + 42.058689180885119912;
    s = s * z - 76.705859735620939111;
    s = s * z + 81.605249276051700272;
    s = s * z - 41.341702240399755166;
    double c = -1.6990343940660636356;
    c = c * z + 7.9032069115696784291;
    c = c * z - 26.426253275854721364;
    c = c * z + 60.244641352702008933;
    c = c * z - 85.456817206643804246;
    c = c * z + 64.939394022668242743;
    c = c * z - 19.73920880217871723;
    return {1.0 + z * c, r * 6.28318530717958647692 + r * (z * s)};
}

// exp(x) for |x| <= 700.
FASTVOL_INLINE double exponential(double x) {
    // Adding 1.5 * 2^52 leaves the nearest integer in the low bits.
    constexpr double shifter = 0x1.8p52;
    const double shifted = x * 1.442695040888963407 + shifter;
    const double n = shifted - shifter;
    const double r = (x - n * ln2_high) - n * ln2_low;
    // (exp(r) - 1 - r) / r^2
    double p = 2.5100385495510319078e-8;
    p = p * r + 2.7620088445409748161e-7;
    p = p * r + 2.7557268459997064772e-6;
    p = p * r + 2.4801521295954375131e-5;
    p = p * r + 1.9841269863053616878e-4;
    p = p * r + 1.3888888917213716901e-3;
    p = p * r + 8.3333333333006183250e-3;
    p = p * r + 4.1666666666624127873e-2;
    p = p * r + 0.16666666666666667453;
    p = p * r + 0.50000000000000010221;
    const std::uint64_t power = (std::bit_cast<std::uint64_t>(shifted) + 1023u) << 52;
    return ((r * r) * p + r + 1.0) * std::bit_cast<double>(power);
}

// exp(x) for |x| <= 87, to 2 parts in 1e7; nan gives nan.
FASTVOL_INLINE float exponential(float x) {
    constexpr float shifter = 0x1.8p23f;
    const float shifted = x * 1.44269504f + shifter;
    const float n = shifted - shifter;
    const float r = (x - n * ln2_high_float) - n * ln2_low_float;
    // (exp(r) - 1 - r) / r^2
    float p = 0.00139262507515f;
    p = p * r + 0.00836323288368f;
    p = p * r + 0.041666554213f;
    p = p * r + 0.166665765761f;
    p = p * r + 0.5f;
    const std::uint32_t power = (std::bit_cast<std::uint32_t>(shifted) + 127u) << 23;
    return ((r * r) * p + r + 1.0f) * std::bit_cast<float>(power);
}

// log(1 + x) for finite x >= 0, to a few parts in 1e7 of itself, however small; nan gives nan.
FASTVOL_INLINE float log_1p(float x) {
    const float u = 1.0f + x;
    // What the rounding of u lost, exactly; it is small beside u.
    const float large = x > 1.0f ? x : 1.0f;
    const float small = x > 1.0f ? 1.0f : x;
    const float lost = small - (u - large);
    constexpr std::uint32_t sqrt_half = 0x3f3504f3u;
    const std::uint32_t bits = std::bit_cast<std::uint32_t>(u) - sqrt_half;
    const auto e = static_cast<float>(static_cast<std::int32_t>(bits >> 23));
    const float f = std::bit_cast<float>((bits & 0x007fffffu) + sqrt_half) - 1.0f;
    const float rest = (e * ln2_low_float - minus_log1p(f)) + lost / u;
    const float value = e * ln2_high_float + (f + rest);
    return x == x ? value : x;
}

// The same in float64, to a few parts in 1e16.
FASTVOL_INLINE double log_1p(double x) {
    const double u = 1.0 + x;
    const double large = x > 1.0 ? x : 1.0;
    const double small = x > 1.0 ? 1.0 : x;
    const double lost = small - (u - large);
    constexpr std::uint64_t sqrt_half = 0x3fe6a09e667f3bcdu;
    const std::uint64_t bits = std::bit_cast<std::uint64_t>(u) - sqrt_half;
    // A small integer in the low bits of 2^52 is that much more than 2^52.
    const double e = std::bit_cast<double>((bits >> 52) | 0x4330000000000000u) - 0x1p52;
    const double f = std::bit_cast<double>((bits & 0x000fffffffffffffu) + sqrt_half) - 1.0;
    const double rest = (e * ln2_low - minus_log1p(f)) + lost / u;
    const double value = e * ln2_high + (f + rest);
    return x == x ? value : x;
}

}  // namespace fastvol
