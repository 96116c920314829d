#include "core/quadrature.hpp"

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <numbers>

#include "core/elementary.hpp"
#include "core/function_versions.hpp"

namespace fastvol {
namespace {

constexpr int nodes = 32;

struct Rule {
    alignas(64) std::array<double, nodes> node;  // in (0, 1)
    alignas(64) std::array<double, nodes> weight;

    // Newton's method on the Legendre polynomial of degree 32, from Chebyshev's guess of its roots.
    Rule() {
        for (int i = 0; i < nodes / 2; ++i) {
            double x = std::cos(std::numbers::pi * (i + 0.75) / (nodes + 0.5));
            double derivative = 0.0;
            for (int step = 0; step < 8; ++step) {
                double before = 1.0;
                double value = x;
                for (int k = 2; k <= nodes; ++k) {
                    const double next = ((2 * k - 1) * x * value - (k - 1) * before) / k;
                    before = value;
                    value = next;
                }
                derivative = nodes * (x * value - before) / (x * x - 1.0);
                x -= value / derivative;
            }
            const double w = 1.0 / ((1.0 - x * x) * derivative * derivative);
            const auto low = static_cast<std::size_t>(i);
            const auto high = static_cast<std::size_t>(nodes - 1 - i);
            node[low] = 0.5 * (1.0 - x);
            node[high] = 0.5 * (1.0 + x);
            weight[low] = w;
            weight[high] = w;
        }
    }
};

// log(1 + u) - u without cancellation.
FASTVOL_INLINE double log1p_minus(double u) {
    constexpr std::uint64_t sqrt_half = 0x3fe6a09e667f3bcd;
    const double m = 1.0 + u;
    // 1 + u = (1 + f) 2^e; 1024 + e is read out as the low bits of 2^52 + 1024 + e.
    const std::uint64_t bits = std::bit_cast<std::uint64_t>(m) - sqrt_half;
    const std::uint64_t biased = (bits + (std::uint64_t{1024} << 52)) >> 52;
    const double e = std::bit_cast<double>(biased | 0x4330000000000000) - (0x1p52 + 1024.0);
    const std::uint64_t mantissa = (bits & 0x000fffffffffffff) + sqrt_half;
    // At e = 0 the rounding of 1 + u does not matter: f is u.
    const double f = e == 0.0 ? u : std::bit_cast<double>(mantissa) - 1.0;
    return (e * ln2_high + (f - u)) + (e * ln2_low - minus_log1p(f));
}

FASTVOL_VERSIONS double weighted_sum(const Rule& rule, const Exponent& h, double end) {
    alignas(64) double terms[nodes];
    for (int i = 0; i < nodes; ++i) {
        const double u = end * rule.node[static_cast<std::size_t>(i)];
        const double value = u * h.slope + (h.power * log1p_minus(u) - 0.5 * h.square * (u * u));
        terms[i] =
            rule.weight[static_cast<std::size_t>(i)] * exponential(value < -700.0 ? -700.0 : value);
    }
    double sums[8] = {};
    for (int i = 0; i < nodes; i += 8) {
        for (int l = 0; l < 8; ++l) sums[l] += terms[i + l];
    }
    return ((sums[0] + sums[4]) + (sums[1] + sums[5])) +
           ((sums[2] + sums[6]) + (sums[3] + sums[7]));
}

}  // namespace

double integrate_panel(const Exponent& h, double end) {
    static const Rule rule;
    return std::abs(end) * weighted_sum(rule, h, end);
}

}  // namespace fastvol
