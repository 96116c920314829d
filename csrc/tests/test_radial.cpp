#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <vector>

#include "core/radial.hpp"
#include "tests/check.hpp"

namespace fastvol::tests {
namespace {

constexpr double inf = std::numeric_limits<double>::infinity();

double gaussian(std::int64_t dim, double radius, double shift = 0.0) {
    double out = 0.0;
    log_radial_gaussian(dim, {&radius, 1}, {&shift, 1}, {&out, 1});
    return out;
}

void volumes() {
    const double pi = std::numbers::pi;
    CHECK_NEAR(log_ball_volume(1), std::log(2.0), 1e-14);
    CHECK_NEAR(log_ball_volume(2), std::log(pi), 1e-14);
    CHECK_NEAR(log_ball_volume(3), std::log(4.0 * pi / 3.0), 1e-14);
    CHECK_NEAR(log_ball_volume(20), 10.0 * std::log(pi) - std::lgamma(11.0), 1e-13);
    const double radius = 2.0;
    double out = 0.0;
    log_radial_lebesgue(5, {&radius, 1}, {&out, 1});
    CHECK_NEAR(out, std::log(32.0 / 5.0), 1e-15);
}

void closed_forms() {
    for (const double rho : {1e-300, 1e-8, 0.1, 0.5, 1.0, 1.17, 1.18, 2.0, 4.0}) {
        CHECK_NEAR(gaussian(1, rho), std::log(std::erf(rho / std::numbers::sqrt2)), 1e-12);
        CHECK_NEAR(gaussian(2, rho), std::log(-std::expm1(-0.5 * rho * rho)),
                   rho < 1e-200 ? inf : 1e-12);
    }
    CHECK_NEAR(gaussian(2, 1e-300), 2.0 * std::log(1e-300) - std::log(2.0), 1e-9);
    // exp(b^2 / 2) (Phi(rho - b) - Phi(-b)), relative to Phi(inf) - Phi(0) = 1/2
    const auto phi = [](double x) { return 0.5 * std::erfc(-x / std::numbers::sqrt2); };
    for (const double b : {-3.0, -0.5, 0.7, 3.0}) {
        for (const double rho : {0.2, 1.0, 3.0, 6.0}) {
            CHECK_NEAR(gaussian(1, rho, b), 0.5 * b * b + std::log(2.0 * (phi(rho - b) - phi(-b))),
                       1e-12);
        }
    }
}

// d log I / d log rho = rho^d exp(-rho^2/2 + b rho) / integral, so that I itself is a solution of
// an equation of first order: a check at any d that needs no other code for the integral.
void slopes() {
    for (const std::int64_t dim : {2, 10, 1000, 1'000'000}) {
        const auto d = static_cast<double>(dim);
        for (const double b : {-2.0, 0.0, 2.0}) {
            const double peak = 0.5 * (b + std::hypot(b, 2.0 * std::sqrt(d)));
            for (const double rho : {0.5 * peak, 0.99 * peak, peak, peak + 0.5}) {
                const double step = 1e-4 * std::min(1.0, rho / d * std::sqrt(d));
                const double slope =
                    (gaussian(dim, rho + step, b) - gaussian(dim, rho - step, b)) / (2.0 * step);
                const double log_normaliser =
                    (0.5 * d - 1.0) * std::log(2.0) + std::lgamma(0.5 * d);
                const double expected = std::exp((d - 1.0) * std::log(rho) - 0.5 * rho * rho +
                                                 b * rho - log_normaliser - gaussian(dim, rho, b));
                CHECK_NEAR(slope / expected, 1.0, 1e-6);
            }
        }
    }
}

void limits() {
    for (const std::int64_t dim : {1, 2, 3, 100, 1'000'000'000}) {
        CHECK(gaussian(dim, 0.0) == -inf);
        CHECK_NEAR(gaussian(dim, inf), 0.0, 1e-13);
        CHECK(gaussian(dim, inf) <= 0.0);
        double before = -inf;
        for (double rho = 1e-3; rho < 1e6; rho *= 1.7) {
            const double value = gaussian(dim, rho, 0.3);
            CHECK(value >= before - 1e-12 * std::abs(before) || before == -inf);
            before = value;
        }
        for (const double rho : {1e-300, 1e300, inf}) {
            for (const double b : {-1e4, -1e100, 1e4, 1e100}) {
                CHECK(std::isfinite(gaussian(dim, rho, b)));
            }
        }
    }
}

}  // namespace

void test_radial() {
    volumes();
    closed_forms();
    slopes();
    limits();
}

}  // namespace fastvol::tests
