#include "core/noise_kernels.hpp"

#include <bit>
#include <cmath>

#include "core/elementary.hpp"
#include "core/function_versions.hpp"

namespace fastvol::kernels {
namespace {

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

// sqrt(-2 ln u)
FASTVOL_INLINE float radius(std::int32_t odd, float) {
    const auto [f, exponent] = split(odd);
    const auto e = static_cast<float>(exponent);
    const float log_u = e * ln2_high_float + (f + (e * ln2_low_float - minus_log1p(f)));
    return std::sqrt(-2.0f * log_u);
}

FASTVOL_INLINE double radius(std::int32_t odd, double) {
    const auto [short_f, exponent] = split(odd);
    const auto f = static_cast<double>(short_f);
    const auto e = static_cast<double>(exponent);
    const double log_u = e * ln2_high + (f + (e * ln2_low - minus_log1p(f)));
    return std::sqrt(-2.0 * log_u);
}

// (cos, sin) of an angle and of as many right angles more.
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
template <typename Real>
FASTVOL_INLINE CosSin<Real> cos_sin(std::int32_t odd, Real) {
    const auto [remainder, quadrant] = reduce(odd);
    const auto [cosine, sine] =
        cos_sin_turns(static_cast<Real>(remainder) * static_cast<Real>(0x1p-24));
    return turn(cosine, sine, quadrant);
}

// The words of up to tile_blocks blocks, word by word. The loop over rounds is the outer one: a
// compiler vectorises the plain inner loop over blocks, but not ten rounds at a time.
FASTVOL_INLINE void philox_tile(const VectorKey& key, std::uint32_t first_block, int blocks,
                                std::uint32_t (&words)[4][tile_blocks]) {
    auto k0 = static_cast<std::uint32_t>(key.seed);
    auto k1 = static_cast<std::uint32_t>(key.seed >> 32);
    for (int i = 0; i < blocks; ++i) {
        words[0][i] = first_block + static_cast<std::uint32_t>(i);
        words[1][i] = key.stream;
        words[2][i] = static_cast<std::uint32_t>(key.vector);
        words[3][i] = static_cast<std::uint32_t>(key.vector >> 32);
    }
    for (int round = 0; round < philox_rounds; ++round) {
        for (int i = 0; i < blocks; ++i) {
            const std::uint64_t p0 = std::uint64_t{philox_multiplier_0} * words[0][i];
            const std::uint64_t p1 = std::uint64_t{philox_multiplier_1} * words[2][i];
            words[0][i] = static_cast<std::uint32_t>(p1 >> 32) ^ words[1][i] ^ k0;
            words[2][i] = static_cast<std::uint32_t>(p0 >> 32) ^ words[3][i] ^ k1;
            words[1][i] = static_cast<std::uint32_t>(p1);
            words[3][i] = static_cast<std::uint32_t>(p0);
        }
        k0 += philox_weyl_0;
        k1 += philox_weyl_1;
    }
}

template <typename Real>
FASTVOL_INLINE void fill(const VectorKey& key, std::uint32_t first_block, int blocks,
                         Real* __restrict z) {
    alignas(64) std::uint32_t words[4][tile_blocks];
    philox_tile(key, first_block, blocks, words);
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

FASTVOL_VERSIONS void fill_tile_plain(const VectorKey& key, std::uint32_t first_block, int blocks,
                                      float* z) {
    fill(key, first_block, blocks, z);
}

FASTVOL_VERSIONS void add_squares_plain(const float* z, double* sums) {
    fold(z, z, sums);
}

namespace {

constexpr FloatVersion versions[] = {
#ifdef FASTVOL_X86_KERNELS
    // Conversion to float64 is no faster in longer vectors.
    {"avx512", fill_tile_avx512, add_squares_avx2},
    {"avx2", fill_tile_avx2, add_squares_avx2},
#endif
    {"plain", fill_tile_plain, add_squares_plain},
};

std::size_t first_supported() {
#ifdef FASTVOL_X86_KERNELS
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512vl");
    return avx512 ? 0 : (avx2 ? 1 : 2);
#else
    return 0;
#endif
}

}  // namespace

std::span<const FloatVersion> float_versions() {
    static const std::span<const FloatVersion> supported =
        std::span<const FloatVersion>(versions).subspan(first_supported());
    return supported;
}

void fill_tile(const VectorKey& key, std::uint32_t first_block, int blocks, float* z) {
    float_versions().front().fill_tile(key, first_block, blocks, z);
}

FASTVOL_VERSIONS void fill_tile(const VectorKey& key, std::uint32_t first_block, int blocks,
                                double* z) {
    fill(key, first_block, blocks, z);
}

void add_squares(const float* z, double* sums) {
    float_versions().front().add_squares(z, sums);
}

FASTVOL_VERSIONS void add_squares(const double* z, double* sums) {
    fold(z, z, sums);
}

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
