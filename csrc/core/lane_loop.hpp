// The lane loop: many ray searches at once, with one call of the engine a round.
#pragma once

#include <cstdint>
#include <span>

#include "core/ray_search.hpp"

namespace fastvol {

// Evaluates the losses of rays that were put on its lanes.
class Engine {
  public:
    virtual ~Engine() = default;

    // Lane lanes[j] carries item items[j] from now on.
    virtual void load(std::span<const std::int64_t> lanes, std::span<const std::int64_t> items) = 0;

    // Writes the loss of lane lanes[j] at radius radii[j]; outside[j] = 1 where that loss is only
    // a lower bound, already above the threshold. outside comes in as zeros.
    virtual void loss(std::span<const std::int64_t> lanes, std::span<const double> radii,
                      std::span<double> losses, std::span<std::uint8_t> outside) = 0;
};

struct SearchResults {
    std::span<double> log_radius;
    std::span<Status> status;
    std::span<std::int32_t> evaluations;
    std::span<std::uint8_t> reentrant;
};

// Settles item i from start[i], a log radius, for all i; at most lanes items are under way at once.
// Idle lanes are refilled in lane order with the next items in item order, then all active lanes
// are evaluated in ascending order. What the engine throws is passed on.
void run_lanes(Engine& engine, std::span<const double> start, std::int64_t lanes, SearchMode mode,
               const SearchOptions& options, const SearchResults& results);

}  // namespace fastvol
