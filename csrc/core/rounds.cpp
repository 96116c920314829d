#include "core/rounds.hpp"

#include <algorithm>
#include <stdexcept>
#include <vector>

namespace fastvol {
namespace {

struct UnderWay {
    LaneGroup* group;
    std::int64_t carried;
};

}  // namespace

void run_rounds(std::span<LaneGroup* const> groups, std::int64_t items, double refill_share) {
    std::int64_t next = 0;
    const auto refill = [&](LaneGroup& group) {
        const std::int64_t taken = group.refill(next);
        if (taken < 0 || taken > items - next) {
            throw std::logic_error("a group of lanes took items that there are not");
        }
        next += taken;
        return taken;
    };

    std::vector<UnderWay> under_way;
    for (LaneGroup* group : groups) {
        const std::int64_t carried = refill(*group);
        if (carried == 0) continue;
        group->begin();
        under_way.push_back({group, carried});
    }
    if (under_way.empty() && items > 0) throw std::logic_error("no group of lanes took an item");

    while (!under_way.empty()) {
        for (auto& [group, carried] : under_way) {
            const std::int64_t settled = group->settled();
            if (settled < 0 || settled > carried) {
                throw std::logic_error("more lanes have settled than there are searches");
            }
            const double enough = std::max(1.0, refill_share * static_cast<double>(carried));
            const bool fresh = next < items && static_cast<double>(settled) >= enough;
            if (fresh || settled == carried) carried += refill(*group) - settled;
            if (carried > 0) group->begin();
        }
        std::erase_if(under_way, [](const UnderWay& entry) { return entry.carried == 0; });
    }
}

}  // namespace fastvol
