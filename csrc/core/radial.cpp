#include "core/radial.hpp"

#include <cmath>
#include <numbers>

namespace fastvol {

double log_ball_volume(std::int64_t dim) {
    const double a = 0.5 * static_cast<double>(dim);
    return a * std::log(std::numbers::pi) - std::lgamma(a + 1.0);
}

void log_radial_lebesgue(std::int64_t dim, std::span<const double> radius, std::span<double> out) {
    const auto d = static_cast<double>(dim);
    const double log_d = std::log(d);
    for (std::size_t i = 0; i < radius.size(); ++i) out[i] = d * std::log(radius[i]) - log_d;
}

void log_radial_gaussian(std::int64_t, std::span<const double>, std::span<const double>,
                         std::span<double> out) {
    for (double& value : out) value = std::nan("");
}

}  // namespace fastvol
