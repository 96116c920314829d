// Normals in float32 by vector instructions, for one instruction set. No ordinary header: it is
// included after the definition of
//
//     FASTVOL_LANES   the attributes of a function for that set: always inlined, with its target
//     Lanes           the vectors of that set, by the names used below
//
// The bits are those of the plain code in noise_kernels.cpp, in fewer operations: constants are
// multiplied by powers of two, which changes no rounding, so that the vectors hold -f / 2, the
// angle in right angles, half the radius, and twice the cosine and the sine. Fused multiply-adds
// stand only where the product is exact.
#pragma once

#include <bit>
#include <cstdint>

#include "core/elementary.hpp"
#include "core/noise_kernels.hpp"
#include "core/philox.hpp"

namespace fastvol::kernels {
namespace {

// The key of each round, and what the first two rounds have in common for all blocks.
struct RoundKeys {
    std::uint32_t k0[philox_rounds];
    std::uint32_t k1[philox_rounds];
    std::uint64_t first_c0;
    std::uint64_t first_c1;
    std::uint64_t first_c2;  // but for the block's own part
    std::uint64_t second_c2;
    std::uint64_t second_c3;

    explicit RoundKeys(const VectorKey& key) {
        auto key0 = static_cast<std::uint32_t>(key.seed);
        auto key1 = static_cast<std::uint32_t>(key.seed >> 32);
        for (int round = 0; round < philox_rounds; ++round) {
            k0[round] = key0;
            k1[round] = key1;
            key0 += philox_weyl_0;
            key1 += philox_weyl_1;
        }
        const std::uint64_t p1 =
            std::uint64_t{philox_multiplier_1} * static_cast<std::uint32_t>(key.vector);
        first_c0 = (p1 >> 32) ^ key.stream ^ k0[0];
        first_c1 = p1 & 0xffffffffu;
        first_c2 = (key.vector >> 32) ^ k1[0];
        const std::uint64_t p0 = std::uint64_t{philox_multiplier_0} * first_c0;
        second_c2 = (p0 >> 32) ^ k1[1];
        second_c3 = p0;
    }
};

// So many vectors of blocks are made side by side: one chain of dependent steps would leave the
// processor half idle.
constexpr int groups = 4;

// Words 0 and 2 of a block in the two halves of a 64-bit lane, and words 1 and 3.
struct Words {
    Lanes::Int even[groups];
    Lanes::Int odd[groups];
};

// Only the low half of a 64-bit lane counts until the last round: the products leave the next
// low word where it is needed, with a high word that nobody reads.
FASTVOL_LANES void philox_lanes(const RoundKeys& keys, std::uint32_t first_block, Words& words) {
    using L = Lanes;
    const L::Int m0 = L::all64(philox_multiplier_0);
    const L::Int m1 = L::all64(philox_multiplier_1);
    L::Int c0[groups];
    L::Int c1[groups];
    L::Int c2[groups];
    L::Int c3[groups];
#pragma GCC unroll 8
    for (int g = 0; g < groups; ++g) {
        const auto block = first_block + static_cast<std::uint32_t>(g * L::blocks);
        const L::Int p0 = L::multiply(m0, L::counter(block));
        c1[g] = L::multiply(m1, L::exclusive_or(L::high(p0), L::all64(keys.first_c2)));
        c0[g] = L::exclusive_or(L::high(c1[g]), L::all64(keys.first_c1 ^ keys.k0[1]));
        c2[g] = L::exclusive_or(p0, L::all64(keys.second_c2));
        c3[g] = L::all64(keys.second_c3);
    }
#pragma GCC unroll 16
    for (int round = 2; round < philox_rounds - 1; ++round) {
#pragma GCC unroll 8
        for (int g = 0; g < groups; ++g) {
            const L::Int p0 = L::multiply(m0, c0[g]);
            const L::Int p1 = L::multiply(m1, c2[g]);
            c0[g] = L::exclusive_or(L::high(p1), c1[g], L::all32(keys.k0[round]));
            c2[g] = L::exclusive_or(L::high(p0), c3[g], L::all32(keys.k1[round]));
            c1[g] = p1;
            c3[g] = p0;
        }
    }
    constexpr int last = philox_rounds - 1;
    const std::uint64_t key = keys.k0[last] | std::uint64_t{keys.k1[last]} << 32;
#pragma GCC unroll 8
    for (int g = 0; g < groups; ++g) {
        const L::Int p0 = L::multiply(m0, c0[g]);
        const L::Int p1 = L::multiply(m1, c2[g]);
        words.even[g] =
            L::exclusive_or(L::join_high(p1, p0), L::join_low(c1[g], c3[g]), L::all64(key));
        words.odd[g] = L::join_low(p1, p0);
    }
}

// sqrt(-2 ln u) / 2
FASTVOL_LANES void half_radius(const Lanes::Int (&words)[groups], Lanes::Float (&radius)[groups]) {
    using L = Lanes;
    constexpr std::int32_t sqrt_half = 0x3f3504f3;
    constexpr std::int32_t exponent_step = 0x00800000;
    L::Float e[groups];
    L::Float f[groups];
    L::Float p[groups];
#pragma GCC unroll 8
    for (int g = 0; g < groups; ++g) {
        const L::Float odd = L::to_float(L::either(L::shift_right<8>(words[g]), L::all32(1)));
        const L::Int bits = L::subtract(L::bits_of(odd), L::all32(sqrt_half + 24 * exponent_step));
        // e * 2^23, (1 + f) / 2 and -f / 2
        e[g] = L::to_float(L::both(bits, L::all32(~(exponent_step - 1))));
        const L::Int mantissa =
            L::add(L::both(bits, L::all32(exponent_step - 1)), L::all32(sqrt_half - exponent_step));
        f[g] = L::subtract(L::all(0.5f), L::float_of(mantissa));
        p[g] = L::all(-0x1p10f * log1p_float[0]);
    }
    float power = 0x1p9f;
#pragma GCC unroll 16
    for (int i = 1; i < 9; ++i) {
#pragma GCC unroll 8
        for (int g = 0; g < groups; ++g) {
            p[g] = L::add(L::multiply(p[g], f[g]), L::all(power * log1p_float[i]));
        }
        power *= -0.5f;
    }
#pragma GCC unroll 8
    for (int g = 0; g < groups; ++g) {
        const L::Float square = L::multiply(f[g], f[g]);
        const L::Float half_minus_log1p =
            L::subtract(square, L::multiply(square, L::multiply(f[g], p[g])));
        const L::Float low = L::multiply(e[g], L::all(0x1p-24f * ln2_low_float));
        const L::Float rest = L::add(f[g], L::subtract(half_minus_log1p, low));
        radius[g] =
            L::square_root(L::multiply_add_exact(e[g], L::all(-0x1p-24f * ln2_high_float), rest));
    }
}

// 2 cos and 2 sin of 2 pi u
FASTVOL_LANES void twice_cos_sin(const Lanes::Int (&words)[groups], Lanes::Float (&cosine)[groups],
                                 Lanes::Float (&sine)[groups]) {
    using L = Lanes;
    L::Float x[groups];
    L::Float z[groups];
    L::Float s[groups];
    L::Float c[groups];
#pragma GCC unroll 8
    for (int g = 0; g < groups; ++g) {
        // The bits below the quadrant, with an odd last bit, as a float in [1, 2); 3/2 is the
        // multiple of a right angle.
        const L::Int bits = L::both_then_flip(L::shift_right<7>(words[g]), 0x007ffffc, 0x3fc00002);
        x[g] = L::subtract(L::float_of(bits), L::all(1.5f));
        z[g] = L::multiply(x[g], x[g]);
        s[g] = L::all(0x1p-17f * sine_float[0]);
        c[g] = L::all(0x1p-15f * cosine_float[0]);
    }
    float power = 0x1p-13f;
#pragma GCC unroll 4
    for (int i = 1; i < 4; ++i) {
#pragma GCC unroll 8
        for (int g = 0; g < groups; ++g) {
            s[g] = L::add(L::multiply(s[g], z[g]), L::all(power * sine_float[i]));
            c[g] = L::add(L::multiply(c[g], z[g]), L::all(4.0f * power * cosine_float[i]));
        }
        power *= 16.0f;
    }
#pragma GCC unroll 8
    for (int g = 0; g < groups; ++g) {
        const L::Float even_cosine = L::add(L::all(2.0f), L::multiply(z[g], c[g]));
        const L::Float low = L::subtract(L::multiply(z[g], s[g]), L::all(0.5f * two_pi_low_float));
        const L::Float even_sine =
            L::add(L::multiply(x[g], L::all(0.5f * two_pi_high_float)), L::multiply(x[g], low));
        // The quadrant is in the two highest bits.
        const L::Int quadrant = L::add(words[g], L::all32(0x20000000));
        const L::Int next = L::add(quadrant, L::all32(0x40000000));
        const auto odd = L::second_highest(quadrant);
        cosine[g] = L::flip_sign(L::choose(odd, even_sine, even_cosine), next);
        sine[g] = L::flip_sign(L::choose(odd, even_cosine, even_sine), quadrant);
    }
}

FASTVOL_LANES void fill_lanes(const VectorKey& key, std::uint32_t first_block, int blocks,
                              float* z) {
    using L = Lanes;
    static_assert(block_step % (groups * L::blocks) == 0);
    const RoundKeys keys(key);
    for (int i = 0; i < blocks; i += groups * L::blocks) {
        Words words;
        L::Float radius[groups];
        L::Float cosine[groups];
        L::Float sine[groups];
        philox_lanes(keys, first_block + static_cast<std::uint32_t>(i), words);
        half_radius(words.even, radius);
        twice_cos_sin(words.odd, cosine, sine);
#pragma GCC unroll 8
        for (int g = 0; g < groups; ++g) {
            L::store_interleaved(L::multiply(radius[g], cosine[g]), L::multiply(radius[g], sine[g]),
                                 z + 4 * (i + g * L::blocks));
        }
    }
}

}  // namespace
}  // namespace fastvol::kernels
