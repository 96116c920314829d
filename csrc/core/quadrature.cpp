#include "core/quadrature.hpp"

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <numbers>

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

// log(1 + u) - u without cancellation, in operations that a compiler can vectorise.
inline __attribute__((always_inline)) double log1p_minus(double u) {
    constexpr std::uint64_t sqrt_half = 0x3fe6a09e667f3bcd;
    const double m = 1.0 + u;
    // 1 + u = (1 + f) 2^e; e is read as an unsigned number, kept in the low bits of 2^52 + e.
    const std::uint64_t bits = std::bit_cast<std::uint64_t>(m) - sqrt_half;
    const std::uint64_t biased = (bits + (std::uint64_t{1024} << 52)) >> 52;
    const double e =
        std::bit_cast<double>(biased | 0x4330000000000000) - (4503599627370496.0 + 1024.0);
    const std::uint64_t mantissa = (bits & 0x000fffffffffffff) + sqrt_half;
    // At e = 0 the rounding of 1 + u does not matter: f is u.
    const double f = e == 0.0 ? u : std::bit_cast<double>(mantissa) - 1.0;
    const double s = f / (2.0 + f);
    const double z = s * s;
    double q = 0.1461644968504340586;
    q = q * z + 0.15331721600556041269;
    q = q * z + 0.1818288912526172208;
    q = q * z + 0.22222211134795079855;
    q = q * z + 0.28571428625975484921;
    q = q * z + 0.3999999999989950449;
    q = q * z + 0.66666666666666696862;
    return (e * 0.6931471675634384 + (f - u)) +
           (e * 1.2996506893889888371e-8 - s * (f - z * q));
}

// exp(x) for -700 <= x <= 700, in operations that a compiler can vectorise.
inline __attribute__((always_inline)) double exponential(double x) {
    constexpr double shifter = 0x1.8p52;
    const double shifted = x * 1.442695040888963407 + shifter;
    const double n = shifted - shifter;
    const double r = (x - n * 0.6931471675634384) - n * 1.2996506893889888371e-8;
    double p = 2.5100385495510319078e-8;
    p = p * r + 2.7620088445409748161e-7;
    p = p * r + 2.7557268459997064772e-6;
    p = p * r + 2.4801521295954375131e-5;
    p = p * r + 1.9841269863053616878e-4;
    p = p * r + 1.3888888917213716901e-3;
    p = p * r + 8.3333333333006183250e-3;
    p = p * r + 4.1666666666624127873e-2;
    p = p * r + 0.16666666666666667453;
    p = p * r + 0.5;
    const std::uint64_t power = (std::bit_cast<std::uint64_t>(shifted) + 1023u) << 52;
    return ((r * r) * p + r + 1.0) * std::bit_cast<double>(power);
}

FASTVOL_VERSIONS double weighted_sum(const Rule& rule, const Exponent& h, double end) {
    alignas(64) double terms[nodes];
    for (int i = 0; i < nodes; ++i) {
        const double u = end * rule.node[static_cast<std::size_t>(i)];
        const double value =
            u * h.slope + (h.power * log1p_minus(u) - 0.5 * h.square * (u * u));
        terms[i] = rule.weight[static_cast<std::size_t>(i)] *
                   exponential(value < -700.0 ? -700.0 : value);
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
