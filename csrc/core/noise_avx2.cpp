// Normals in float32 by AVX2.
#include "core/noise_kernels.hpp"

#ifdef FASTVOL_X86_KERNELS

#include <immintrin.h>

#define FASTVOL_TARGET __attribute__((target("avx2,fma")))
#define FASTVOL_LANES inline __attribute__((always_inline)) FASTVOL_TARGET

namespace fastvol::kernels {
namespace {

struct Lanes {
    using Int = __m256i;
    using Float = __m256;
    static constexpr int blocks = 4;

    FASTVOL_LANES static Int all64(std::uint64_t x) {
        return _mm256_set1_epi64x(static_cast<long long>(x));
    }
    FASTVOL_LANES static Int all32(std::int32_t x) { return _mm256_set1_epi32(x); }
    FASTVOL_LANES static Int all32(std::uint32_t x) { return all32(static_cast<std::int32_t>(x)); }
    FASTVOL_LANES static Float all(float x) { return _mm256_set1_ps(x); }
    // The order in which store_interleaved() gives the blocks back.
    FASTVOL_LANES static Int counter(std::uint32_t first) {
        return _mm256_add_epi64(all64(first), _mm256_setr_epi64x(0, 2, 1, 3));
    }

    FASTVOL_LANES static Int multiply(Int a, Int b) { return _mm256_mul_epu32(a, b); }
    FASTVOL_LANES static Int high(Int a) { return _mm256_srli_epi64(a, 32); }
    FASTVOL_LANES static Int exclusive_or(Int a, Int b) { return _mm256_xor_si256(a, b); }
    FASTVOL_LANES static Int exclusive_or(Int a, Int b, Int c) {
        return _mm256_xor_si256(a, _mm256_xor_si256(b, c));
    }
    // The low halves of a and b, and the high ones.
    FASTVOL_LANES static Int join_low(Int a, Int b) {
        return _mm256_blend_epi32(a, _mm256_slli_epi64(b, 32), 0xaa);
    }
    FASTVOL_LANES static Int join_high(Int a, Int b) {
        return _mm256_blend_epi32(high(a), b, 0xaa);
    }

    FASTVOL_LANES static Int add(Int a, Int b) { return _mm256_add_epi32(a, b); }
    FASTVOL_LANES static Int subtract(Int a, Int b) { return _mm256_sub_epi32(a, b); }
    FASTVOL_LANES static Int both(Int a, Int b) { return _mm256_and_si256(a, b); }
    FASTVOL_LANES static Int either(Int a, Int b) { return _mm256_or_si256(a, b); }
    FASTVOL_LANES static Int both_then_flip(Int a, std::int32_t mask, std::int32_t flip) {
        return exclusive_or(both(a, all32(mask)), all32(flip));
    }
    template <int n>
    FASTVOL_LANES static Int shift_right(Int a) {
        return _mm256_srli_epi32(a, n);
    }
    FASTVOL_LANES static Float second_highest(Int a) { return float_of(add(a, a)); }

    FASTVOL_LANES static Int bits_of(Float a) { return _mm256_castps_si256(a); }
    FASTVOL_LANES static Float float_of(Int a) { return _mm256_castsi256_ps(a); }
    FASTVOL_LANES static Float to_float(Int a) { return _mm256_cvtepi32_ps(a); }
    FASTVOL_LANES static Float add(Float a, Float b) { return _mm256_add_ps(a, b); }
    FASTVOL_LANES static Float subtract(Float a, Float b) { return _mm256_sub_ps(a, b); }
    FASTVOL_LANES static Float multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
    FASTVOL_LANES static Float multiply_add_exact(Float a, Float b, Float c) {
        return _mm256_fmadd_ps(a, b, c);
    }
    FASTVOL_LANES static Float square_root(Float a) { return _mm256_sqrt_ps(a); }
    // By the sign of which.
    FASTVOL_LANES static Float choose(Float which, Float a, Float b) {
        return _mm256_blendv_ps(b, a, which);
    }
    FASTVOL_LANES static Float flip_sign(Float a, Int sign) {
        return _mm256_xor_ps(a, float_of(both(sign, all32(INT32_MIN))));
    }
    FASTVOL_LANES static void store_interleaved(Float a, Float b, float* out) {
        _mm256_storeu_ps(out, _mm256_unpacklo_ps(a, b));
        _mm256_storeu_ps(out + 8, _mm256_unpackhi_ps(a, b));
    }
};

}  // namespace
}  // namespace fastvol::kernels

#include "core/noise_lanes.hpp"

namespace fastvol::kernels {

FASTVOL_TARGET void fill_tile_avx2(const VectorKey& key, std::uint32_t first_block, int blocks,
                                   float* z) {
    fill_lanes(key, first_block, blocks, z);
}

// The square of a float32 is exact in float64, so that the fused operation is the plain one.
FASTVOL_TARGET void add_squares_avx2(const float* z, double* sums) {
    for (int l = 0; l < sum_lanes; l += 4) {
        const __m256d first = _mm256_cvtps_pd(_mm_loadu_ps(z + l));
        __m256d part = _mm256_mul_pd(first, first);
        for (int row = 1; row < 4; ++row) {
            const __m256d next = _mm256_cvtps_pd(_mm_loadu_ps(z + row * sum_lanes + l));
            part = _mm256_fmadd_pd(next, next, part);
        }
        _mm256_storeu_pd(sums + l, _mm256_add_pd(_mm256_loadu_pd(sums + l), part));
    }
}

}  // namespace fastvol::kernels

#endif
