// Integrals along a ray, in log space.
#pragma once

#include <cstdint>
#include <span>

namespace fastvol {

// log of the volume of the unit ball in R^dim, dim >= 1.
double log_ball_volume(std::int64_t dim);

// out[i] = log of the integral of t^(dim-1) over [0, radius[i]].
void log_radial_lebesgue(std::int64_t dim, std::span<const double> radius, std::span<double> out);

// out[i] = log of the integral of t^(dim-1) exp(-t^2/2 + b t) over [0, radius[i]], b = shift[i] or
// 0, divided by the integral of t^(dim-1) exp(-t^2/2) over [0, inf). radius in [0, inf], b finite.
void log_radial_gaussian(std::int64_t dim, std::span<const double> radius,
                         std::span<const double> shift, std::span<double> out);

}  // namespace fastvol
