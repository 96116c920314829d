#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <vector>

#include "core/elementary.hpp"
#include "core/losses.hpp"
#include "core/philox.hpp"
#include "tests/check.hpp"

namespace fastvol::tests {
namespace {

constexpr double inf = std::numeric_limits<double>::infinity();

struct Summed {
    std::vector<double> sums;
    std::unique_ptr<bool[]> outside;
};

template <typename Call>
Summed summed(std::size_t k, const std::vector<double>& limit, unsigned threads, const Call& call) {
    Summed result{std::vector<double>(k), std::make_unique<bool[]>(k)};
    call(RaySums{result.sums, {result.outside.get(), k}, limit, threads});
    return result;
}

double uniform(std::size_t i) {
    return static_cast<double>(philox({1, 2, 3}, static_cast<std::uint32_t>(i))[0]) * 0x1p-32;
}

template <typename Real>
std::vector<Real> logits(std::size_t size) {
    std::vector<Real> x(size);
    for (std::size_t i = 0; i < size; ++i) x[i] = static_cast<Real>(16.0 * uniform(i) - 8.0);
    return x;
}

double row_loss(const auto* row, std::size_t c, std::size_t t) {
    double sum = 0.0;
    for (std::size_t j = 0; j < c; ++j) sum += std::exp(static_cast<double>(row[j]));
    return std::log(sum) - static_cast<double>(row[t]);
}

template <typename Real>
void matches_definition(double tolerance) {
    constexpr std::size_t k = 3;
    for (const std::size_t c : {1u, 2u, 10u, 56u, 57u, 112u, 113u, 257u, 700u}) {
        for (const std::size_t n : {1u, 3u, 63u, 64u, 65u, 150u}) {
            const std::vector<Real> x = logits<Real>(k * n * c);
            std::vector<std::int64_t> target(n);
            for (std::size_t i = 0; i < n; ++i) {
                target[i] = i % 7 == 2 ? -1 : static_cast<std::int64_t>((31 * i) % c);
            }
            const auto call = [&](const RaySums& result) {
                cross_entropy<Real>(x, static_cast<std::int64_t>(c), target, -1, result);
            };
            const Summed whole = summed(k, {}, 1, call);
            for (std::size_t r = 0; r < k; ++r) {
                double wanted = 0.0;
                for (std::size_t i = 0; i < n; ++i) {
                    if (target[i] < 0) continue;
                    const auto t = static_cast<std::size_t>(target[i]);
                    wanted += row_loss(x.data() + (r * n + i) * c, c, t);
                }
                // With one class the loss is 0, which the formula misses by its rounding.
                CHECK_NEAR(whole.sums[r], c == 1 ? 0.0 : wanted, tolerance * wanted);
                CHECK(!whole.outside[r]);
            }
            const Summed cut = summed(k, {0.3 * whole.sums[0], inf, -1.0}, 2, call);
            CHECK(cut.outside[0] == (whole.sums[0] > 0.0) && cut.sums[0] <= whole.sums[0]);
            CHECK(!cut.outside[1] && cut.sums[1] == whole.sums[1]);
            CHECK(cut.outside[2] && cut.sums[2] <= whole.sums[2]);
        }
    }
    for (const std::size_t m : {1u, 31u, 63u, 64u, 65u, 1023u, 1024u, 1025u, 3001u}) {
        const std::vector<Real> x = logits<Real>(k * m);
        std::vector<Real> target(m);
        for (std::size_t i = 0; i < m; ++i) target[i] = static_cast<Real>(uniform(i + 77));
        const Summed squares = summed(
            k, {}, 1, [&](const RaySums& result) { squared_error<Real>(x, target, result); });
        const Summed entropies = summed(k, {}, 1, [&](const RaySums& result) {
            binary_cross_entropy<Real>(x, target, result);
        });
        for (std::size_t r = 0; r < k; ++r) {
            double square = 0.0;
            double entropy = 0.0;
            for (std::size_t i = 0; i < m; ++i) {
                const auto logit = static_cast<double>(x[r * m + i]);
                const auto t = static_cast<double>(target[i]);
                square += (logit - t) * (logit - t);
                entropy += (1.0 - t) * logit + std::log1p(std::exp(-logit));
            }
            CHECK_NEAR(squares.sums[r], square, tolerance * square);
            CHECK_NEAR(entropies.sums[r], entropy, tolerance * entropy);
        }
    }
}

template <typename Real>
void nan_and_infinity() {
    constexpr auto infinite = std::numeric_limits<Real>::infinity();
    constexpr auto nan = std::numeric_limits<Real>::quiet_NaN();
    for (const std::size_t c : {3u, 100u}) {
        const auto loss = [&](Real chosen, Real other, double limit) {
            std::vector<Real> x(70 * c, Real{0});
            x[c] = chosen;
            x[c + 1] = other;
            const std::vector<std::int64_t> target(70, 0);
            return summed(1, {limit}, 1, [&](const RaySums& result) {
                cross_entropy<Real>(x, static_cast<std::int64_t>(c), target, -1, result);
            });
        };
        CHECK(std::isnan(loss(nan, 0, inf).sums[0]) && std::isnan(loss(0, nan, inf).sums[0]));
        CHECK(std::isnan(loss(infinite, 0, inf).sums[0]));
        CHECK(std::isnan(loss(0, infinite, inf).sums[0]));
        CHECK(loss(-infinite, 0, inf).sums[0] == inf && !loss(-infinite, 0, inf).outside[0]);
        CHECK(loss(-infinite, 0, 1e30).outside[0]);
        CHECK(std::isfinite(loss(0, -infinite, inf).sums[0]));
        CHECK(!loss(nan, 0, 1e4).outside[0]);
    }
}

// Largest error of the float32 functions, in parts of the result.
void elementary_functions() {
    double exponential_error = 0.0;
    double log_error = 0.0;
    for (std::size_t i = 0; i < 200'000; ++i) {
        const auto x = static_cast<float>(174.0 * uniform(i) - 87.0);
        const double wanted = std::exp(static_cast<double>(x));
        exponential_error = std::max(exponential_error,
                                     std::abs(static_cast<double>(exponential(x)) / wanted - 1.0));
        const float y = exponential(x);
        const double log_wanted = std::log1p(static_cast<double>(y));
        log_error =
            std::max(log_error, std::abs(static_cast<double>(log_1p(y)) / log_wanted - 1.0));
    }
    CHECK(exponential_error < 2e-7);
    CHECK(log_error < 3e-7);
}

}  // namespace

void test_losses() {
    matches_definition<float>(1e-6);
    matches_definition<double>(1e-14);
    nan_and_infinity<float>();
    nan_and_infinity<double>();
    elementary_functions();
}

}  // namespace fastvol::tests
