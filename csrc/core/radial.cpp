#include "core/radial.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "core/quadrature.hpp"

namespace fastvol {
namespace {

constexpr double inf = std::numeric_limits<double>::infinity();
// The integrand is followed down to exp(-cut) of its maximum.
constexpr double cut = 38.0;

// log of Gamma(a) / (sqrt(2 pi / a) (a / e)^a), by Stirling's series.
double log_gamma_star(double a) {
    // Below 10 the series is not accurate: Gamma(a) = Gamma(a + k) / (a (a + 1) ... (a + k - 1)).
    if (a < 10.0) {
        double product = 1.0;
        double b = a;
        while (b < 10.0) {
            product *= b;
            b += 1.0;
        }
        return log_gamma_star(b) - std::log(product) + (b - 0.5) * std::log(b) -
               (a - 0.5) * std::log(a) - (b - a);
    }
    const double r = 1.0 / a;
    const double z = r * r;
    double s = -3617.0 / 122400.0;
    s = s * z + 1.0 / 156.0;
    s = s * z - 691.0 / 360360.0;
    s = s * z + 1.0 / 1188.0;
    s = s * z - 1.0 / 1680.0;
    s = s * z + 1.0 / 1260.0;
    s = s * z - 1.0 / 360.0;
    s = s * z + 1.0 / 12.0;
    return r * s;
}

// exp(x) - 1 - x
double exp_minus_linear(double x) {
    if (std::abs(x) > 0.5) return std::expm1(x) - x;
    // Taylor's series from the smallest term up: x^16 / 16! ... x^2 / 2!
    double s = 1.0;
    for (int k = 16; k > 2; --k) s = 1.0 + s * x / k;
    return 0.5 * x * x * s;
}

struct Sum {
    double high;
    double low;
};

Sum two_sum(double a, double b) {
    const double s = a + b;
    const double t = s - a;
    return {s, (a - (s - t)) + (b - t)};
}

Sum two_product(double a, double b) {
    const double p = a * b;
    return {p, std::fma(a, b, -p)};
}

// n - t^2 + b t: t times the slope in t of n log t - t^2/2 + b t. At large n the three terms cancel
// to their last bits near the peak, so that each is held in two parts.
double scaled_slope(double n, double t, double b) {
    const Sum square = two_product(t, t);
    const Sum linear = two_product(b, t);
    const Sum first = two_sum(n, -square.high);
    const Sum second = two_sum(first.high, linear.high);
    return second.high + (first.low + second.low + (linear.low - square.low));
}

// log(t / sqrt(d)); near t = sqrt(d) to the last bits.
double log_ratio(double t, double d) {
    if (t < 1e-290) return std::log(t) - 0.5 * std::log(d);
    const double ratio = t / std::sqrt(d);
    if (ratio < 0.75 || ratio > 1.25) return std::log(ratio);
    const Sum square = two_product(t, t);
    return 0.5 * std::log1p(((square.high - d) + square.low) / d);
}

// Where h has fallen by cut on the way to u = -1, or a little beyond.
double left_end(const Exponent& h) {
    const double curvature = h.power + h.square;
    return -std::min(2.0 * cut / (h.slope + std::sqrt(h.slope * h.slope + 2.0 * cut * curvature)),
                     1.0);
}

// Where h, flat at 0, has fallen by cut at positive u, or a little beyond.
double right_end(const Exponent& h) {
    // log(1 + u) - u <= -u^2 / (2 (1 + u))
    const double p = cut / h.power;
    double u = std::min(p + std::sqrt(p * p + 2.0 * p), std::sqrt(2.0 * cut / h.square));
    // h is concave: Newton's steps stay beyond the root.
    for (int step = 0; step < 2; ++step) {
        const double value = h.power * (std::log1p(u) - u) - 0.5 * h.square * u * u;
        const double derivative = -h.power * u / (1.0 + u) - h.square * u;
        u = std::max(u - (value + cut) / derivative, 0.5 * u);
    }
    return u;
}

// t^(d-1) exp(-t^2/2 + b t) over [0, rho] for d >= 2, in u = t / t0 - 1 about a base point t0: the
// peak, or rho where rho is below the peak. With g(t) = d log t - t^2/2 + b t the integral is
// exp(g(t0)) times that of exp(h(u)), h as in quadrature.hpp.
class GaussianRay {
  public:
    explicit GaussianRay(std::int64_t dim)
        : d_(static_cast<double>(dim)), n_(d_ - 1.0), root_(std::sqrt(n_)) {
        const double a = 0.5 * d_;
        // Of the normaliser, relative to exp(g(sqrt(d))) at b = 0.
        log_normaliser_ = 0.5 * std::log(std::numbers::pi / (2.0 * a)) + log_gamma_star(a);
        set_shift(0.0);
    }

    double operator()(double rho, double b) {
        if (rho == 0.0) return -inf;
        if (b != b_) set_shift(b);
        if (rho < peak_) {
            const Exponent h{std::max(scaled_slope(n_, rho, b), 0.0), n_, rho * rho};
            const double base = b * rho - 0.5 * d_ * exp_minus_linear(2.0 * log_ratio(rho, d_));
            return base + std::log(integrate_panel(h, left_end(h))) - log_normaliser_;
        }
        const double right = std::min(right_end_, (rho - peak_) / peak_);
        const double total = left_integral_ + integrate_panel(at_peak_, right);
        const double value = peak_base_ + std::log(total) - log_normaliser_;
        return b == 0.0 ? std::min(value, 0.0) : value;
    }

  private:
    void set_shift(double b) {
        b_ = b;
        const double root = std::hypot(b, 2.0 * root_);
        peak_ = b >= 0.0 ? 0.5 * (b + root) : 2.0 * n_ / (root - b);
        at_peak_ = {0.0, n_, peak_ * peak_};
        left_integral_ = integrate_panel(at_peak_, left_end(at_peak_));
        right_end_ = right_end(at_peak_);
        // At the peak b t = t^2 - n turns the base value into terms of one sign.
        const double y = 0.5 * std::log1p(-1.0 / d_) + std::asinh(0.5 * b / root_);
        peak_base_ = d_ * (0.5 * std::expm1(2.0 * y) + y) + 1.0;
    }

    double d_;
    double n_;
    double root_;
    double log_normaliser_;
    double b_ = 0.0;
    double peak_ = 0.0;
    Exponent at_peak_{};
    double left_integral_ = 0.0;
    double right_end_ = 0.0;
    double peak_base_ = 0.0;
};

// exp(-t^2/2 + b t) over [0, rho], whose peak may lie at 0: in u = t - t0.
double gaussian_line(double rho, double b) {
    if (rho == 0.0) return -inf;
    const double base = std::clamp(b, 0.0, rho);
    const double slope = b - base;
    const double reach = 2.0 * cut / (std::abs(slope) + std::sqrt(slope * slope + 2.0 * cut));
    double total = 0.0;
    // The panels are scaled to [-1, 0] and [0, 1], where exponents of quadrature.hpp live.
    const auto add = [&](double end) {
        const Exponent unit{slope * std::abs(end), 0.0, end * end};
        total += std::abs(end) * integrate_panel(unit, end < 0.0 ? -1.0 : 1.0);
    };
    if (base > 0.0) add(-std::min(reach, base));
    if (base < rho) add(std::min(reach, rho - base));
    const double value =
        base * (b - 0.5 * base) + 0.5 * std::log(2.0 / std::numbers::pi) + std::log(total);
    return b == 0.0 ? std::min(value, 0.0) : value;
}

}  // namespace

double log_ball_volume(std::int64_t dim) {
    const double a = 0.5 * static_cast<double>(dim);
    // Gamma(a + 1) = a Gamma(a)
    return a * (std::log(std::numbers::pi / a) + 1.0) - 0.5 * std::log(2.0 * std::numbers::pi * a) -
           log_gamma_star(a);
}

void log_radial_lebesgue(std::int64_t dim, std::span<const double> radius, std::span<double> out) {
    const auto d = static_cast<double>(dim);
    const double log_d = std::log(d);
    for (std::size_t i = 0; i < radius.size(); ++i) out[i] = d * std::log(radius[i]) - log_d;
}

void log_radial_gaussian(std::int64_t dim, std::span<const double> radius,
                         std::span<const double> shift, std::span<double> out) {
    const auto shift_of = [&](std::size_t i) { return shift.empty() ? 0.0 : shift[i]; };
    if (dim == 1) {
        for (std::size_t i = 0; i < radius.size(); ++i) {
            out[i] = gaussian_line(radius[i], shift_of(i));
        }
        return;
    }
    GaussianRay ray(dim);
    for (std::size_t i = 0; i < radius.size(); ++i) out[i] = ray(radius[i], shift_of(i));
}

}  // namespace fastvol
