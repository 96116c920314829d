#include <cmath>
#include <limits>

#include "arguments.hpp"
#include "core/log_mean_exp.hpp"

namespace fastvol::python {
namespace {

std::span<const double> log_weights_argument(py::handle value) {
    const auto log_weights = input_span<double>(value, "log_weights", {any_size}, "[n]");
    for (const double w : log_weights) {
        if (!(w < std::numeric_limits<double>::infinity())) {
            throw py::value_error("log_weights must be below inf and not nan, got " +
                                  std::to_string(w));
        }
    }
    return log_weights;
}

py::tuple state_of(const LogMeanExp& self) {
    const LogMeanExpState& s = self.state();
    return py::make_tuple(s.count, s.log_max, s.mean, s.m2);
}

LogMeanExp from_state(const py::tuple& state) {
    if (state.size() != 4) {
        throw py::value_error(
            "state must be the tuple (count, log_max, mean, m2), got a tuple of " +
            std::to_string(state.size()));
    }
    const std::int64_t count =
        integer_argument(state[0], "state[0]", 0, std::numeric_limits<std::int64_t>::max());
    const LogMeanExpState s{count, state[1].cast<double>(), state[2].cast<double>(),
                            state[3].cast<double>()};
    const bool valid = s.log_max < std::numeric_limits<double>::infinity() && s.mean >= 0.0 &&
                       s.mean <= 1.0 && s.m2 >= 0.0 && std::isfinite(s.m2);
    if (!valid) {
        throw py::value_error("state must hold log_max < inf, 0 <= mean <= 1 and m2 >= 0, got " +
                              py::repr(state).cast<std::string>());
    }
    return LogMeanExp(s);
}

}  // namespace

void register_accumulators(py::module_& m) {
    py::class_<LogMeanExp>(m, "LogMeanExp",
                           R"(Mean of weights known by their logs, as a stream.

Weights are held relative to the largest, with a mean and a sum of squared deviations, merged after
Chan, Golub and LeVeque (1979); any order of updates and merges agrees to rounding.)")
        .def(py::init<>())
        .def(
            "update",
            [](LogMeanExp& self, py::handle value) {
                const auto log_weights = log_weights_argument(value);
                const py::gil_scoped_release released;
                self.update(log_weights);
            },
            py::arg("log_weights"),
            "Adds weights exp(log_weights), float64 [n]; -inf is a weight of zero, nan and inf "
            "raise ValueError.")
        .def("merge", &LogMeanExp::merge, py::arg("other"), "Adds the weights of another stream.")
        .def_property_readonly("count", &LogMeanExp::count, "Number of weights.")
        .def_property_readonly("log_mean", &LogMeanExp::log_mean,
                               "log of the mean weight; -inf where all weights are zero, nan "
                               "without weights.")
        .def_property_readonly("stderr", &LogMeanExp::stderr_log_mean,
                               "Standard error of log_mean (delta method), in nats; inf below two "
                               "weights or where all are zero.")
        .def_property_readonly("ess", &LogMeanExp::ess,
                               "Effective sample size (sum w)^2 / sum w^2; 0 where all weights "
                               "are zero.")
        .def_property_readonly("max_share", &LogMeanExp::max_share,
                               "Largest weight over the sum of the weights; nan where all are "
                               "zero.")
        .def("state", &state_of, "(count, log_max, mean, m2), for from_state().")
        .def_static("from_state", &from_state, py::arg("state"),
                    "The stream that state() described.")
        .def(py::pickle(&state_of, &from_state));
}

}  // namespace fastvol::python
