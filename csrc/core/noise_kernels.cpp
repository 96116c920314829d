#include "core/noise_kernels.hpp"

#include <bit>
#include <cmath>

#include "core/function_versions.hpp"

namespace fastvol::kernels {
namespace {

#define FASTVOL_INLINE inline __attribute__((always_inline))

// All 23-bit uniforms are odd multiples of 2^-24: u = odd * 2^-24, exact as int32 and as float.
FASTVOL_INLINE std::int32_t odd_numerator(std::uint32_t word) {
    return static_cast<std::int32_t>((word >> 9) * 2u + 1u);
}

// u = (1 + f) * 2^e with 1 + f in [sqrt(1/2), sqrt(2)), f exact.
struct Split {
    float f;
    std::int32_t e;
};

FASTVOL_INLINE Split split(std::int32_t odd) {
    constexpr std::int32_t sqrt_half = 0x3f3504f3;
    const auto bits = std::bit_cast<std::int32_t>(static_cast<float>(odd)) - sqrt_half;
    const std::int32_t mantissa = (bits & 0x007fffff) + sqrt_half;
    return {std::bit_cast<float>(mantissa) - 1.0f, (bits >> 23) - 24};
}

// 2 pi u = quadrant * pi / 2 + 2 pi * remainder * 2^-24, |remainder| <= 2^21.
struct Angle {
    std::int32_t remainder;
    std::int32_t quadrant;
};

FASTVOL_INLINE Angle reduce(std::int32_t odd) {
    const std::int32_t quadrant = (odd + (1 << 21)) >> 22;
    return {odd - quadrant * (1 << 22), quadrant};
}

// The coefficients below are Chebyshev interpolants, printed by csrc/coefficients.py.

// sqrt(-2 ln u)
FASTVOL_INLINE float radius(std::int32_t odd, float) {
    const auto [f, exponent] = split(odd);
    const auto e = static_cast<float>(exponent);
    float p = 0.0697161147145f;
    p = p * f - 0.114797338466f;
    p = p * f + 0.116854199235f;
    p = p * f - 0.124256873315f;
    p = p * f + 0.142490576457f;
    p = p * f - 0.166678023195f;
    p = p * f + 0.200007157489f;
    p = p * f - 0.24999996958f;
    p = p * f + 0.3333333118f;
    const float square = f * f;
    const float tail = square * (f * p) - 0.5f * square + e * 3.19461849453094e-5f;
    const float log_u = e * 0.693115234375f + (f + tail);
    return std::sqrt(-2.0f * log_u);
}

FASTVOL_INLINE double radius(std::int32_t odd, double) {
    const auto [short_f, exponent] = split(odd);
    const auto f = static_cast<double>(short_f);
    const auto e = static_cast<double>(exponent);
    // log(1 + f) = f - s (f - s^2 q(s^2)), s = f / (2 + f), q(s^2) = 2 (atanh(s) - s) / s^3
    const double s = f / (2.0 + f);
    const double z = s * s;
    double q = 0.1461644968504340586;
    q = q * z + 0.15331721600556041269;
    q = q * z + 0.1818288912526172208;
    q = q * z + 0.22222211134795079855;
    q = q * z + 0.28571428625975484921;
    q = q * z + 0.3999999999989950449;
    q = q * z + 0.66666666666666696862;
    const double tail = e * 1.2996506893889888371e-8 - s * (f - z * q);
    const double log_u = e * 0.6931471675634384 + (f + tail);
    return std::sqrt(-2.0 * log_u);
}

template <typename Real>
struct CosSin {
    Real cosine;
    Real sine;
};

// Turns (cos, sin) of the remainder by the quadrant.
FASTVOL_INLINE CosSin<float> turn(float cosine, float sine, std::int32_t quadrant) {
    const auto c = std::bit_cast<std::uint32_t>(cosine);
    const auto s = std::bit_cast<std::uint32_t>(sine);
    const auto q = static_cast<std::uint32_t>(quadrant);
    const std::uint32_t difference = (c ^ s) & (0u - (q & 1u));
    return {std::bit_cast<float>((c ^ difference) ^ (((q + 1u) & 2u) << 30)),
            std::bit_cast<float>((s ^ difference) ^ ((q & 2u) << 30))};
}

FASTVOL_INLINE CosSin<double> turn(double cosine, double sine, std::int32_t quadrant) {
    const auto c = std::bit_cast<std::uint64_t>(cosine);
    const auto s = std::bit_cast<std::uint64_t>(sine);
    const auto q = static_cast<std::uint64_t>(static_cast<std::uint32_t>(quadrant));
    const std::uint64_t difference = (c ^ s) & (0u - (q & 1u));
    return {std::bit_cast<double>((c ^ difference) ^ (((q + 1u) & 2u) << 62)),
            std::bit_cast<double>((s ^ difference) ^ ((q & 2u) << 62))};
}

// cos and sin of 2 pi u
FASTVOL_INLINE CosSin<float> cos_sin(std::int32_t odd, float) {
    const auto [remainder, quadrant] = reduce(odd);
    const float r = static_cast<float>(remainder) * 0x1p-24f;
    const float z = r * r;
    float s = 41.589542148733f;
    s = s * z - 76.701285894895f;
    s = s * z + 81.605234992318f;
    s = s * z - 41.341702233426f;
    // 2 pi in two parts: rounding it alone would cost half the error allowed.
    const float sine = r * 6.2831855f + r * (z * s - 1.7484556e-7f);
    float c = 59.424105981756f;
    c = c * z - 85.448820089651f;
    c = c * z + 64.939369051419f;
    c = c * z - 19.739208789987f;
    return turn(1.0f + z * c, sine, quadrant);
}

FASTVOL_INLINE CosSin<double> cos_sin(std::int32_t odd, double) {
    const auto [remainder, quadrant] = reduce(odd);
    const double r = static_cast<double>(remainder) * 0x1p-24;
    const double z = r * r;
    double s = 3.7864333494655501419;
    s = s * z - 15.09405418207999884;
    s = s * z + 42.058689180885119912;
    s = s * z - 76.705859735620939111;
    s = s * z + 81.605249276051700272;
    s = s * z - 41.341702240399755166;
    const double sine = r * 6.28318530717958647692 + r * (z * s);
    double c = -1.6990343940660636356;
    c = c * z + 7.9032069115696784291;
    c = c * z - 26.426253275854721364;
    c = c * z + 60.244641352702008933;
    c = c * z - 85.456817206643804246;
    c = c * z + 64.939394022668242743;
    c = c * z - 19.73920880217871723;
    return turn(1.0 + z * c, sine, quadrant);
}

template <typename Real>
FASTVOL_INLINE void fill(const VectorKey& key, std::uint32_t first_block, int blocks, Real* z) {
    alignas(64) std::uint32_t words[4][tile_blocks];
    for (int i = 0; i < blocks; ++i) {
        const PhiloxWords w = philox(key, first_block + static_cast<std::uint32_t>(i));
        words[0][i] = w[0];
        words[1][i] = w[1];
        words[2][i] = w[2];
        words[3][i] = w[3];
    }
    for (int i = 0; i < blocks; ++i) {
        const Real r0 = radius(odd_numerator(words[0][i]), Real{});
        const auto [c0, s0] = cos_sin(odd_numerator(words[1][i]), Real{});
        const Real r1 = radius(odd_numerator(words[2][i]), Real{});
        const auto [c1, s1] = cos_sin(odd_numerator(words[3][i]), Real{});
        z[4 * i] = r0 * c0;
        z[4 * i + 1] = r0 * s0;
        z[4 * i + 2] = r1 * c1;
        z[4 * i + 3] = r1 * s1;
    }
}

template <typename Real, typename Weight>
FASTVOL_INLINE void fold(const Real* z, const Weight* weight, double* sums) {
    static_assert(tile_size == 4 * sum_lanes);
    for (int l = 0; l < sum_lanes; ++l) {
        double part = 0.0;
        for (int row = 0; row < 4; ++row) {
            const int i = row * sum_lanes + l;
            part += static_cast<double>(z[i]) * static_cast<double>(weight[i]);
        }
        sums[l] += part;
    }
}

template <typename Real>
FASTVOL_INLINE void scaled(const Real* z, Real factor, const Real* scale, int n, Real* out) {
    if (scale == nullptr) {
        for (int i = 0; i < n; ++i) out[i] = factor * z[i];
    } else {
        for (int i = 0; i < n; ++i) out[i] = (factor * scale[i]) * z[i];
    }
}

template <typename Real>
FASTVOL_INLINE void perturbed(const Real* z, Real factor, const Real* scale, const Real* theta0,
                              int n, Real* out) {
    if (scale == nullptr) {
        for (int i = 0; i < n; ++i) out[i] = theta0[i] + factor * z[i];
    } else {
        for (int i = 0; i < n; ++i) out[i] = theta0[i] + (factor * scale[i]) * z[i];
    }
}

}  // namespace

FASTVOL_VERSIONS void fill_tile(const VectorKey& key, std::uint32_t first_block, int blocks,
                                float* z) {
    fill(key, first_block, blocks, z);
}

FASTVOL_VERSIONS void fill_tile(const VectorKey& key, std::uint32_t first_block, int blocks,
                                double* z) {
    fill(key, first_block, blocks, z);
}

FASTVOL_VERSIONS void add_squares(const float* z, double* sums) { fold(z, z, sums); }

FASTVOL_VERSIONS void add_squares(const double* z, double* sums) { fold(z, z, sums); }

FASTVOL_VERSIONS void add_products(const float* z, const double* weight, double* sums) {
    fold(z, weight, sums);
}

FASTVOL_VERSIONS void add_products(const double* z, const double* weight, double* sums) {
    fold(z, weight, sums);
}

FASTVOL_VERSIONS void write_scaled(const float* z, float factor, const float* scale, int n,
                                   float* out) {
    scaled(z, factor, scale, n, out);
}

FASTVOL_VERSIONS void write_scaled(const double* z, double factor, const double* scale, int n,
                                   double* out) {
    scaled(z, factor, scale, n, out);
}

FASTVOL_VERSIONS void write_perturbed(const float* z, float factor, const float* scale,
                                      const float* theta0, int n, float* out) {
    perturbed(z, factor, scale, theta0, n, out);
}

FASTVOL_VERSIONS void write_perturbed(const double* z, double factor, const double* scale,
                                      const double* theta0, int n, double* out) {
    perturbed(z, factor, scale, theta0, n, out);
}

}  // namespace fastvol::kernels
