#include <cmath>
#include <limits>

#include "arguments.hpp"
#include "core/radial.hpp"

namespace fastvol::python {
namespace {

std::int64_t dim_argument(py::handle dim) {
    return integer_argument(dim, "dim", 1, std::int64_t{1} << 53);
}

std::span<const double> radius_argument(py::handle value) {
    const auto radius = input_span<double>(value, "radius", {any_size}, "[n]");
    for (const double r : radius) {
        if (std::isnan(r) || r < 0.0) {
            throw py::value_error("radius must not be negative or nan, got " + std::to_string(r));
        }
    }
    return radius;
}

py::array_t<double> log_radial_lebesgue_binding(py::handle dim_value, py::handle radius_value) {
    const std::int64_t dim = dim_argument(dim_value);
    const auto radius = radius_argument(radius_value);
    py::array_t<double> out(static_cast<py::ssize_t>(radius.size()));
    const auto out_span = output_span<double>(out);
    {
        const py::gil_scoped_release released;
        log_radial_lebesgue(dim, radius, out_span);
    }
    return out;
}

py::array_t<double> log_radial_gaussian_binding(py::handle dim_value, py::handle radius_value,
                                                py::handle shift_value) {
    const std::int64_t dim = dim_argument(dim_value);
    const auto radius = radius_argument(radius_value);
    const auto n = static_cast<py::ssize_t>(radius.size());
    const auto shift = optional_span<double>(shift_value, "shift", {n}, "[n]");
    for (const double b : shift) {
        if (!std::isfinite(b)) {
            throw py::value_error("shift must be finite, got " + std::to_string(b));
        }
    }
    py::array_t<double> out(n);
    const auto out_span = output_span<double>(out);
    {
        const py::gil_scoped_release released;
        log_radial_gaussian(dim, radius, shift, out_span);
    }
    return out;
}

}  // namespace

void register_radial(py::module_& m) {
    m.def(
        "log_ball_volume", [](py::handle dim) { return log_ball_volume(dim_argument(dim)); },
        py::arg("dim"),
        R"(Log volume of the unit ball in R^dim: (dim / 2) log pi - log Gamma(dim / 2 + 1).)");
    m.def("log_radial_lebesgue", &log_radial_lebesgue_binding, py::arg("dim"), py::arg("radius"),
          R"(log of the integral of t^(dim-1) over [0, radius]: dim * log(radius) - log(dim).

Args:
    dim: dimension d >= 1.
    radius: float64 [n], in [0, inf].

Returns: float64 [n].)");
    m.def("log_radial_gaussian", &log_radial_gaussian_binding, py::arg("dim"), py::arg("radius"),
          py::arg("shift") = py::none(),
          R"(Log share of a Gaussian that lies on a ray up to a radius.

log of the integral of t^(dim-1) exp(-t^2/2 + b t) over [0, radius], divided by the integral of
t^(dim-1) exp(-t^2/2) over [0, inf). For b = 0 the log of the regularised lower incomplete gamma
function P(dim / 2, radius^2 / 2).

Args:
    dim: dimension d >= 1.
    radius: float64 [n], in [0, inf], in standard deviations.
    shift: b, float64 [n], finite; None for zeros.

Returns: float64 [n], within 1e-12 * max(1, |value|) + 4 eps |d value / d log radius|.
Raises: TypeError, ValueError naming the argument.)");
}

}  // namespace fastvol::python
