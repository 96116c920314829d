// Philox4x32-10, the counter-based generator of Salmon, Moraes, Dror and Shaw, "Parallel random
// numbers: as easy as 1, 2, 3" (SC 2011).
#pragma once

#include <array>
#include <cstdint>
#include <span>

namespace fastvol {

inline constexpr int philox_rounds = 10;
inline constexpr std::uint32_t philox_multiplier_0 = 0xD2511F53u;
inline constexpr std::uint32_t philox_multiplier_1 = 0xCD9E8D57u;
inline constexpr std::uint32_t philox_weyl_0 = 0x9E3779B9u;
inline constexpr std::uint32_t philox_weyl_1 = 0xBB67AE85u;

// Which vector: everything of key and counter but the coordinate block.
struct VectorKey {
    std::uint64_t seed;
    std::uint32_t stream;
    std::uint64_t vector;
};

using PhiloxWords = std::array<std::uint32_t, 4>;

// The four words of one coordinate block: coordinates 4 * block ... 4 * block + 3.
inline PhiloxWords philox(const VectorKey& key, std::uint32_t block) {
    PhiloxWords c{block, key.stream, static_cast<std::uint32_t>(key.vector),
                  static_cast<std::uint32_t>(key.vector >> 32)};
    auto k0 = static_cast<std::uint32_t>(key.seed);
    auto k1 = static_cast<std::uint32_t>(key.seed >> 32);
    for (int round = 0; round < philox_rounds; ++round) {
        const std::uint64_t p0 = std::uint64_t{philox_multiplier_0} * c[0];
        const std::uint64_t p1 = std::uint64_t{philox_multiplier_1} * c[2];
        c = {static_cast<std::uint32_t>(p1 >> 32) ^ c[1] ^ k0, static_cast<std::uint32_t>(p1),
             static_cast<std::uint32_t>(p0 >> 32) ^ c[3] ^ k1, static_cast<std::uint32_t>(p0)};
        k0 += philox_weyl_0;
        k1 += philox_weyl_1;
    }
    return c;
}

// words holds 4 entries a block, for the blocks first_block, first_block + 1, ...
void philox_blocks(const VectorKey& key, std::uint32_t first_block, std::span<std::uint32_t> words);

}  // namespace fastvol
