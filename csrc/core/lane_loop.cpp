#include "core/lane_loop.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

namespace fastvol {

void run_lanes(Engine& engine, std::span<const double> start, std::int64_t lanes, SearchMode mode,
               const SearchOptions& options, const SearchResults& results) {
    const auto n = static_cast<std::int64_t>(start.size());
    const auto width = static_cast<std::size_t>(std::min(lanes, n));
    constexpr std::int64_t idle = -1;
    std::vector<RaySearch> searches(width);
    std::vector<std::int64_t> item_of_lane(width, idle);

    std::vector<std::int64_t> loaded_lanes;
    std::vector<std::int64_t> loaded_items;
    std::vector<std::int64_t> active;
    std::vector<double> radii;
    loaded_lanes.reserve(width);
    loaded_items.reserve(width);
    active.reserve(width);
    radii.reserve(width);
    std::vector<double> losses(width);
    std::vector<std::uint8_t> outside(width);

    std::int64_t next_item = 0;
    for (;;) {
        loaded_lanes.clear();
        loaded_items.clear();
        active.clear();
        radii.clear();
        for (std::size_t lane = 0; lane < width; ++lane) {
            if (item_of_lane[lane] == idle && next_item < n) {
                item_of_lane[lane] = next_item;
                searches[lane].begin(options, mode, start[static_cast<std::size_t>(next_item)]);
                loaded_lanes.push_back(static_cast<std::int64_t>(lane));
                loaded_items.push_back(next_item);
                ++next_item;
            }
            if (item_of_lane[lane] != idle) {
                active.push_back(static_cast<std::int64_t>(lane));
                radii.push_back(std::exp(searches[lane].x()));
            }
        }
        if (active.empty()) return;
        if (!loaded_lanes.empty()) engine.load(loaded_lanes, loaded_items);

        std::fill(outside.begin(), outside.end(), std::uint8_t{0});
        engine.loss(active, radii, std::span(losses).first(active.size()),
                    std::span(outside).first(active.size()));

        for (std::size_t j = 0; j < active.size(); ++j) {
            const auto lane = static_cast<std::size_t>(active[j]);
            RaySearch& search = searches[lane];
            search.advance(options, losses[j], outside[j] != 0);
            if (!search.settled()) continue;
            const auto item = static_cast<std::size_t>(item_of_lane[lane]);
            results.log_radius[item] = search.x();
            results.status[item] = search.status();
            results.evaluations[item] = search.evaluations();
            results.reentrant[item] = search.reentrant() ? 1 : 0;
            item_of_lane[lane] = idle;
        }
    }
}

}  // namespace fastvol
