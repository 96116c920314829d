#include <cstdint>
#include <stdexcept>
#include <vector>

#include "core/rounds.hpp"
#include "tests/check.hpp"

namespace fastvol::tests {
namespace {

// Each search takes a number of rounds that only its item decides.
class CountedGroup : public LaneGroup {
  public:
    CountedGroup(std::size_t lanes, std::int64_t items, std::vector<int>& settled_items)
        : items_(items), left_(lanes, 0), item_(lanes, -1), done_(settled_items) {}

    std::int64_t refill(std::int64_t first) override {
        CHECK(!in_flight_);
        std::int64_t taken = 0;
        for (std::size_t lane = 0; lane < left_.size(); ++lane) {
            if (left_[lane] > 0) continue;
            if (item_[lane] >= 0) ++done_[static_cast<std::size_t>(item_[lane])];
            item_[lane] = -1;
            if (first + taken == items_) continue;
            item_[lane] = first + taken++;
            left_[lane] = 1 + static_cast<int>(item_[lane] * 7919 % 13);
        }
        return taken;
    }

    void begin() override {
        CHECK(!in_flight_);
        in_flight_ = true;
        ++rounds;
        for (int& left : left_) left -= left > 0 ? 1 : 0;
    }

    std::int64_t settled() override {
        CHECK(in_flight_);
        in_flight_ = false;
        std::int64_t count = 0;
        for (std::size_t lane = 0; lane < left_.size(); ++lane) {
            count += item_[lane] >= 0 && left_[lane] == 0 ? 1 : 0;
        }
        return count + lie;
    }

    int rounds = 0;
    std::int64_t lie = 0;

  private:
    std::int64_t items_;
    std::vector<int> left_;
    std::vector<std::int64_t> item_;
    std::vector<int>& done_;
    bool in_flight_ = false;
};

void settles_every_item_once() {
    for (const std::int64_t items : {0, 1, 5, 63, 1000}) {
        for (const double share : {1.0 / 16.0, 0.5, 1.0}) {
            std::vector<int> done(static_cast<std::size_t>(items), 0);
            CountedGroup first(8, items, done);
            CountedGroup second(7, items, done);
            LaneGroup* const groups[] = {&first, &second};
            run_rounds(groups, items, share);
            for (const int times : done) CHECK(times == 1);
            CHECK((first.rounds > 0) == (items > 0));
            CHECK((second.rounds > 0) == (items > 8));
        }
    }
}

template <typename Spoil>
bool refuses(Spoil spoil) {
    std::vector<int> done(40, 0);
    CountedGroup group(4, 40, done);
    spoil(group);
    LaneGroup* const groups[] = {&group};
    try {
        run_rounds(groups, 30, 0.5);
    } catch (const std::logic_error&) {
        return true;
    }
    return false;
}

}  // namespace

void test_rounds() {
    settles_every_item_once();
    CHECK(refuses([](CountedGroup& group) { group.lie = 9; }));
    CHECK(refuses([](CountedGroup& group) { group.lie = -9; }));
    // It has more items than the loop was told of.
    CHECK(refuses([](CountedGroup&) {}));
}

}  // namespace fastvol::tests
