// Normals in float32 by AVX-512.
#include "core/noise_kernels.hpp"

#ifdef FASTVOL_X86_KERNELS

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns of what its own header leaves undefined on purpose.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>

#define FASTVOL_TARGET __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")))
#define FASTVOL_LANES inline __attribute__((always_inline)) FASTVOL_TARGET

namespace fastvol::kernels {
namespace {

struct Lanes {
    using Int = __m512i;
    using Float = __m512;
    static constexpr int blocks = 8;

    FASTVOL_LANES static Int all64(std::uint64_t x) {
        return _mm512_set1_epi64(static_cast<long long>(x));
    }
    FASTVOL_LANES static Int all32(std::int32_t x) { return _mm512_set1_epi32(x); }
    FASTVOL_LANES static Int all32(std::uint32_t x) { return all32(static_cast<std::int32_t>(x)); }
    FASTVOL_LANES static Float all(float x) { return _mm512_set1_ps(x); }
    // The order in which store_interleaved() gives the blocks back.
    FASTVOL_LANES static Int counter(std::uint32_t first) {
        return _mm512_add_epi64(all64(first), _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7));
    }

    FASTVOL_LANES static Int multiply(Int a, Int b) { return _mm512_mul_epu32(a, b); }
    FASTVOL_LANES static Int high(Int a) { return _mm512_srli_epi64(a, 32); }
    FASTVOL_LANES static Int exclusive_or(Int a, Int b) { return _mm512_xor_si512(a, b); }
    FASTVOL_LANES static Int exclusive_or(Int a, Int b, Int c) {
        return _mm512_ternarylogic_epi64(a, b, c, 0x96);
    }
    // The low halves of a and b, and the high ones.
    FASTVOL_LANES static Int join_low(Int a, Int b) {
        return _mm512_mask_shuffle_epi32(a, 0xaaaa, b, _MM_PERM_CCAA);
    }
    FASTVOL_LANES static Int join_high(Int a, Int b) {
        return _mm512_mask_shuffle_epi32(b, 0x5555, a, _MM_PERM_DDBB);
    }

    FASTVOL_LANES static Int add(Int a, Int b) { return _mm512_add_epi32(a, b); }
    FASTVOL_LANES static Int subtract(Int a, Int b) { return _mm512_sub_epi32(a, b); }
    FASTVOL_LANES static Int both(Int a, Int b) { return _mm512_and_si512(a, b); }
    FASTVOL_LANES static Int either(Int a, Int b) { return _mm512_or_si512(a, b); }
    FASTVOL_LANES static Int both_then_flip(Int a, std::int32_t mask, std::int32_t flip) {
        return _mm512_ternarylogic_epi32(a, all32(mask), all32(flip), 0x6a);
    }
    template <int n>
    FASTVOL_LANES static Int shift_right(Int a) {
        return _mm512_srli_epi32(a, n);
    }
    FASTVOL_LANES static __mmask16 second_highest(Int a) {
        return _mm512_test_epi32_mask(a, all32(0x40000000));
    }

    FASTVOL_LANES static Int bits_of(Float a) { return _mm512_castps_si512(a); }
    FASTVOL_LANES static Float float_of(Int a) { return _mm512_castsi512_ps(a); }
    FASTVOL_LANES static Float to_float(Int a) { return _mm512_cvtepi32_ps(a); }
    FASTVOL_LANES static Float add(Float a, Float b) { return _mm512_add_ps(a, b); }
    FASTVOL_LANES static Float subtract(Float a, Float b) { return _mm512_sub_ps(a, b); }
    FASTVOL_LANES static Float multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
    FASTVOL_LANES static Float multiply_add_exact(Float a, Float b, Float c) {
        return _mm512_fmadd_ps(a, b, c);
    }
    FASTVOL_LANES static Float square_root(Float a) { return _mm512_sqrt_ps(a); }
    FASTVOL_LANES static Float choose(__mmask16 which, Float a, Float b) {
        return _mm512_mask_blend_ps(which, b, a);
    }
    FASTVOL_LANES static Float flip_sign(Float a, Int sign) {
        return float_of(_mm512_ternarylogic_epi32(bits_of(a), sign, all32(INT32_MIN), 0x78));
    }
    FASTVOL_LANES static void store_interleaved(Float a, Float b, float* out) {
        _mm512_storeu_ps(out, _mm512_unpacklo_ps(a, b));
        _mm512_storeu_ps(out + 16, _mm512_unpackhi_ps(a, b));
    }
};

}  // namespace
}  // namespace fastvol::kernels

#include "core/noise_lanes.hpp"

namespace fastvol::kernels {

FASTVOL_TARGET void fill_tile_avx512(const VectorKey& key, std::uint32_t first_block, int blocks,
                                     float* z) {
    fill_lanes(key, first_block, blocks, z);
}

}  // namespace fastvol::kernels

#endif
