#include "core/philox.hpp"

#include <algorithm>

namespace fastvol {

void philox_blocks(const VectorKey& key, std::uint32_t first_block,
                   std::span<std::uint32_t> words) {
    for (std::size_t i = 0; i + 4 <= words.size(); i += 4) {
        const PhiloxWords block = philox(key, first_block + static_cast<std::uint32_t>(i / 4));
        std::copy(block.begin(), block.end(), words.begin() + static_cast<std::ptrdiff_t>(i));
    }
}

}  // namespace fastvol
