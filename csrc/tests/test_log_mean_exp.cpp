#include <cmath>
#include <limits>
#include <vector>

#include "core/log_mean_exp.hpp"
#include "tests/check.hpp"

namespace fastvol::tests {
namespace {

constexpr double inf = std::numeric_limits<double>::infinity();

void known_sums() {
    LogMeanExp mean;
    CHECK(std::isnan(mean.log_mean()) && mean.ess() == 0.0);
    const std::vector<double> weights{std::log(1.0), std::log(2.0), std::log(6.0), -inf};
    mean.update(weights);
    CHECK(mean.count() == 4);
    CHECK_NEAR(mean.log_mean(), std::log(9.0 / 4.0), 1e-15);
    CHECK_NEAR(mean.ess(), 81.0 / 41.0, 1e-14);
    CHECK_NEAR(mean.max_share(), 6.0 / 9.0, 1e-15);
    // Sample variance (41 - 81/4) / 3.
    CHECK_NEAR(mean.stderr_log_mean(), std::sqrt((41.0 - 20.25) / 3.0 / 4.0) / 2.25, 1e-14);
}

void huge_and_zero() {
    LogMeanExp mean;
    mean.update(std::vector<double>{-inf, -inf});
    CHECK(mean.log_mean() == -inf && mean.ess() == 0.0);
    mean.update(std::vector<double>{-1e6, 1e6});
    CHECK_NEAR(mean.log_mean(), 1e6 - std::log(4.0), 1e-9);
    mean.update(std::vector<double>{-inf});
    CHECK_NEAR(mean.log_mean(), 1e6 - std::log(5.0), 1e-9);
    CHECK_NEAR(mean.ess(), 1.0, 1e-14);
}

void constant_weight() {
    LogMeanExp mean;
    mean.update(std::vector<double>(10'000, -1234.5));
    CHECK(mean.log_mean() == -1234.5);
    CHECK(mean.stderr_log_mean() == 0.0);
    CHECK_NEAR(mean.ess(), 1e4, 1e-9);
}

void any_order() {
    std::vector<double> weights(20'000);
    for (std::size_t i = 0; i < weights.size(); ++i) {
        weights[i] = 30.0 * std::sin(static_cast<double>(i * i));
    }
    LogMeanExp whole;
    whole.update(weights);
    LogMeanExp left;
    LogMeanExp right;
    const std::span<const double> all(weights);
    left.update(all.first(137));
    right.update(all.subspan(137));
    LogMeanExp a = left;
    a.merge(right);
    LogMeanExp b = right;
    b.merge(left);
    b.merge(LogMeanExp{});
    for (const LogMeanExp& merged : {a, b}) {
        CHECK(merged.count() == whole.count());
        CHECK_NEAR(merged.log_mean(), whole.log_mean(), 1e-13);
        CHECK_NEAR(merged.stderr_log_mean(), whole.stderr_log_mean(), 1e-13);
        CHECK_NEAR(merged.ess(), whole.ess(), 1e-9);
    }
    LogMeanExp self = whole;
    self.merge(self);
    CHECK(self.count() == 2 * whole.count());
    CHECK_NEAR(self.log_mean(), whole.log_mean(), 1e-14);
}

}  // namespace

void test_log_mean_exp() {
    known_sums();
    huge_and_zero();
    constant_weight();
    any_order();
}

}  // namespace fastvol::tests
