// The loop over a device's lanes: the searches live there, and the host only keeps them supplied.
#pragma once

#include <cstdint>
#include <span>

namespace fastvol {

// Some lanes of a device, which are evaluated together.
class LaneGroup {
  public:
    virtual ~LaneGroup() = default;

    // Keeps what settled lanes found, and puts items from first on, in order, on free lanes;
    // returns how many, which is 0 only where no item is left or no lane is free.
    virtual std::int64_t refill(std::int64_t first) = 0;

    // Issues a round, without waiting for it.
    virtual void begin() = 0;

    // Waits for the last round: how many lanes have settled and not been refilled. The one number
    // that the device tells in a round.
    virtual std::int64_t settled() = 0;
};

// Settles items 0 ... items - 1 on the groups. A group is refilled when refill_share of its
// searches have settled; while one waits for its round those of the others run. What a group throws
// is passed on; std::logic_error where its numbers cannot be.
void run_rounds(std::span<LaneGroup* const> groups, std::int64_t items, double refill_share);

}  // namespace fastvol
