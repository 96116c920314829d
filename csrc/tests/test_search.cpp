#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <stdexcept>
#include <vector>

#include "core/lane_loop.hpp"
#include "tests/check.hpp"

namespace fastvol::tests {
namespace {

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();

// The loss of item i at a radius is loss_(i, radius).
class FunctionEngine : public Engine {
  public:
    using Loss = std::function<double(std::int64_t, double)>;

    explicit FunctionEngine(Loss loss) : loss_(std::move(loss)) {}

    void load(std::span<const std::int64_t> lanes, std::span<const std::int64_t> items) override {
        for (std::size_t j = 0; j < lanes.size(); ++j) {
            CHECK(items[j] == next_item_++);
            CHECK(j == 0 || lanes[j] > lanes[j - 1]);
            const auto lane = static_cast<std::size_t>(lanes[j]);
            if (lane >= item_of_lane_.size()) item_of_lane_.resize(lane + 1);
            item_of_lane_[lane] = items[j];
        }
    }

    void loss(std::span<const std::int64_t> lanes, std::span<const double> radii,
              std::span<double> losses, std::span<std::uint8_t> outside) override {
        ++rounds;
        for (std::size_t j = 0; j < lanes.size(); ++j) {
            CHECK(j == 0 || lanes[j] > lanes[j - 1]);
            const std::int64_t item = item_of_lane_[static_cast<std::size_t>(lanes[j])];
            losses[j] = loss_(item, radii[j]);
            if (losses[j] > flag_above) {
                losses[j] = flag_above;
                outside[j] = 1;
            }
        }
    }

    int rounds = 0;
    double flag_above = inf;

  private:
    Loss loss_;
    std::int64_t next_item_ = 0;
    std::vector<std::int64_t> item_of_lane_;
};

struct Found {
    std::vector<double> log_radius;
    std::vector<Status> status;
    std::vector<std::int32_t> evaluations;
    std::vector<std::uint8_t> reentrant;
};

Found run(Engine& engine, const std::vector<double>& start, const SearchOptions& options,
          std::int64_t lanes = 3, SearchMode mode = SearchMode::search) {
    const std::size_t n = start.size();
    Found found{std::vector<double>(n, nan), std::vector<Status>(n), std::vector<std::int32_t>(n),
                std::vector<std::uint8_t>(n)};
    run_lanes(engine, start, lanes, mode, options,
              {found.log_radius, found.status, found.evaluations, found.reentrant});
    return found;
}

SearchOptions options_with(double threshold = 1.0) {
    SearchOptions options{};
    options.loss0 = 0.0;
    options.threshold = threshold;
    options.xtol = 1e-3;
    options.log_cap = 10.0;
    options.slope = 2.0;
    return options;
}

void powers() {
    FunctionEngine engine([](std::int64_t item, double r) {
        return std::pow(r / 3.0, 1.0 + static_cast<double>(item % 5));
    });
    std::vector<double> start;
    for (int i = 0; i < 40; ++i) start.push_back(-4.0 + 0.3 * i);
    const Found found = run(engine, start, options_with());
    for (std::size_t i = 0; i < start.size(); ++i) {
        CHECK_NEAR(found.log_radius[i], std::log(3.0), 1e-6);
        CHECK(found.status[i] == Status::converged);
        CHECK(found.evaluations[i] <= 20);
        CHECK(found.reentrant[i] == 0);
    }
}

void unbounded() {
    FunctionEngine engine([](std::int64_t, double r) { return 1.0 - 1.0 / (1.0 + r); });
    const Found found = run(engine, {0.0, 11.0}, options_with());
    for (std::size_t i = 0; i < 2; ++i) {
        CHECK(found.log_radius[i] == 10.0);
        CHECK(found.status[i] == Status::unbounded);
    }
    CHECK(found.evaluations[1] == 1);
}

void not_finite_beyond() {
    for (const double wall : {nan, inf, -inf}) {
        FunctionEngine engine([wall](std::int64_t, double r) { return r < 2.0 ? 0.01 * r : wall; });
        const Found found = run(engine, {0.0, 3.0}, options_with());
        for (std::size_t i = 0; i < 2; ++i) {
            CHECK_NEAR(found.log_radius[i], std::log(2.0), 1e-3);
            CHECK(found.status[i] == Status::nonfinite);
        }
    }
}

void step_loss() {
    FunctionEngine engine([](std::int64_t, double r) { return r < 2.0 ? 0.0 : 1e300; });
    const Found found = run(engine, {-1.0, 2.0}, options_with());
    for (std::size_t i = 0; i < 2; ++i) {
        CHECK_NEAR(found.log_radius[i], std::log(2.0), 1e-3);
        CHECK(found.status[i] == Status::converged);
        CHECK(found.evaluations[i] < 60);
    }
}

void flagged_outside() {
    FunctionEngine engine([](std::int64_t, double r) { return r * r; });
    engine.flag_above = 1.5;
    const Found found = run(engine, {3.0, -1.0, 0.0}, options_with());
    for (const double x : found.log_radius) CHECK_NEAR(x, 0.0, 1e-3);
    // A flag wins over a loss that is below the threshold.
    FunctionEngine low([](std::int64_t, double r) { return r * r; });
    low.flag_above = 0.25;
    CHECK_NEAR(run(low, {0.0}, options_with()).log_radius[0], std::log(0.5), 1e-3);
}

void flat_then_steep() {
    FunctionEngine engine([](std::int64_t, double r) { return 1e-12 + std::pow(r / 5.0, 40.0); });
    const Found found = run(engine, {-3.0, 0.0, 1.7, 4.0}, options_with());
    for (std::size_t i = 0; i < 4; ++i) {
        CHECK_NEAR(found.log_radius[i], std::log(5.0), 1e-4);
        CHECK(found.evaluations[i] < 40);
    }
}

void negative_excess_and_no_gap() {
    FunctionEngine dip([](std::int64_t, double r) { return r * (r - 2.0); });
    CHECK_NEAR(run(dip, {0.0}, options_with()).log_radius[0], std::log(1.0 + std::sqrt(2.0)), 1e-3);
    FunctionEngine gap([](std::int64_t, double r) { return r - 2.0; });
    CHECK_NEAR(run(gap, {0.0}, options_with(0.0)).log_radius[0], std::log(2.0), 1e-3);
}

void never_inside() {
    FunctionEngine engine([](std::int64_t, double) { return nan; });
    SearchOptions options = options_with();
    options.max_evaluations = 7;
    const Found found = run(engine, {0.5}, options);
    CHECK(found.status[0] == Status::failed);
    CHECK(found.evaluations[0] == 7);
    CHECK_NEAR(found.log_radius[0], 0.5 - 6.0 * std::log(2.0), 1e-12);
}

void out_of_evaluations() {
    FunctionEngine engine([](std::int64_t, double r) { return r * r; });
    SearchOptions options = options_with();
    options.xtol = 1e-12;
    options.max_evaluations = 3;
    const Found found = run(engine, {-1.0}, options);
    CHECK(found.status[0] == Status::failed);
    CHECK(found.log_radius[0] <= 0.0 && found.log_radius[0] >= -1.0);
}

void tolerance_below_rounding() {
    FunctionEngine engine([](std::int64_t, double r) { return r < 3e5 ? 0.5 : 2.0; });
    SearchOptions options = options_with();
    options.log_cap = 100.0;
    options.xtol = 1e-18;
    const Found found = run(engine, {0.0}, options);
    CHECK(found.status[0] == Status::converged);
    CHECK_NEAR(found.log_radius[0], std::log(3e5), 1e-14);
}

void scans() {
    // Inside up to 1, outside to 1.5, inside again to 4.
    FunctionEngine engine([](std::int64_t item, double r) {
        return item == 0 && r > 1.0 && r < 1.5 ? 2.0 : 0.3 * r * r / 4.8;
    });
    const double known = std::log(4.0);
    Found found = run(engine, {known, known}, options_with(), 2, SearchMode::scan);
    CHECK(found.reentrant[0] == 1 && found.reentrant[1] == 0);
    CHECK_NEAR(found.log_radius[0], 0.0, 1e-3);
    CHECK(found.log_radius[1] == known);
    CHECK(found.status[1] == Status::converged && found.evaluations[1] == 32);

    FunctionEngine early([](std::int64_t, double r) { return r > 0.01 ? 2.0 : 0.5; });
    found = run(early, {known}, options_with(), 1, SearchMode::scan);
    CHECK(found.reentrant[0] == 1);
    CHECK_NEAR(found.log_radius[0], std::log(0.01), 1e-3);
}

void lanes_change_nothing() {
    const auto loss = [](std::int64_t item, double r) {
        return std::pow(r, 1.0 + static_cast<double>(item % 7)) * (1.0 + 0.1 * std::sin(9.0 * r));
    };
    std::vector<double> start(100);
    for (std::size_t i = 0; i < start.size(); ++i) start[i] = 0.07 * static_cast<double>(i) - 3.0;
    FunctionEngine one(loss);
    const Found reference = run(one, start, options_with(), 1);
    for (const std::int64_t lanes : {2, 17, 100, 1000}) {
        FunctionEngine engine(loss);
        const Found found = run(engine, start, options_with(), lanes);
        CHECK(found.log_radius == reference.log_radius);
        CHECK(found.evaluations == reference.evaluations);
        CHECK(engine.rounds < one.rounds);
    }
    FunctionEngine nothing(loss);
    run(nothing, {}, options_with());
    CHECK(nothing.rounds == 0);
}

void engine_errors_pass() {
    FunctionEngine engine(
        [](std::int64_t, double) -> double { throw std::runtime_error("no loss"); });
    bool thrown = false;
    try {
        run(engine, {0.0}, options_with());
    } catch (const std::runtime_error&) {
        thrown = true;
    }
    CHECK(thrown);
}

}  // namespace

void test_search() {
    powers();
    unbounded();
    not_finite_beyond();
    step_loss();
    flagged_outside();
    flat_then_steep();
    negative_excess_and_no_gap();
    never_inside();
    out_of_evaluations();
    tolerance_below_rounding();
    scans();
    lanes_change_nothing();
    engine_errors_pass();
}

}  // namespace fastvol::tests
