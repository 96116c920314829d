#include <algorithm>
#include <cmath>
#include <limits>
#include <string_view>

#include "arguments.hpp"
#include "core/lane_loop.hpp"

namespace fastvol::python {
namespace {

template <typename T>
py::array_t<T> copy_of(std::span<const T> values) {
    return py::array_t<T>(static_cast<py::ssize_t>(values.size()), values.data());
}

std::string described(py::handle value) {
    const auto type = py::str(py::type::of(value).attr("__qualname__")).cast<std::string>();
    if (!py::isinstance<py::array>(value)) return type;
    return type + " of shape " + py::str(value.attr("shape")).cast<std::string>() + " and dtype " +
           py::str(value.attr("dtype")).cast<std::string>();
}

// value as an array whose dtype is of one of the kinds, NumPy's letters.
py::array as_array(py::handle value, const std::string& wanted, std::string_view kinds) {
    const std::string message = "engine.loss must return " + wanted + ", got " + described(value);
    py::array array;
    try {
        array = py::module_::import("numpy").attr("asarray")(value);
    } catch (py::error_already_set& error) {
        py::raise_from(error, PyExc_TypeError, message.c_str());
        throw py::error_already_set();
    }
    if (kinds.find(array.dtype().kind()) == std::string_view::npos) throw py::type_error(message);
    return array;
}

// Reads one array that the engine returned.
template <typename T>
void read_returned(py::handle value, const char* dtype, std::string_view kinds, std::span<T> into) {
    const std::string wanted =
        std::string(dtype) + " [" + std::to_string(into.size()) + "], one entry a lane";
    const py::array array = as_array(value, wanted, kinds);
    if (array.ndim() != 1 || array.shape(0) != static_cast<py::ssize_t>(into.size())) {
        throw py::value_error("engine.loss must return " + wanted + ", got " + described(array));
    }
    const py::array_t<T, py::array::c_style | py::array::forcecast> converted(array);
    std::copy(converted.data(), converted.data() + into.size(), into.begin());
}

// A Python object with load(lanes, items) and loss(lanes, radii). Called without the lock.
class PythonEngine : public Engine {
  public:
    explicit PythonEngine(py::handle engine)
        : load_(engine.attr("load")), loss_(engine.attr("loss")) {}

    void load(std::span<const std::int64_t> lanes, std::span<const std::int64_t> items) override {
        const py::gil_scoped_acquire acquired;
        load_(copy_of(lanes), copy_of(items));
    }

    void loss(std::span<const std::int64_t> lanes, std::span<const double> radii,
              std::span<double> losses, std::span<std::uint8_t> outside) override {
        const py::gil_scoped_acquire acquired;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        const py::object answer = loss_(copy_of(lanes), copy_of(radii));
        if (!py::isinstance<py::tuple>(answer)) {
            read_returned(answer, "float64", "fiu", losses);
            return;
        }
        const auto pair = py::reinterpret_borrow<py::tuple>(answer);
        if (pair.size() != 2) {
            throw py::value_error(
                "engine.loss must return the losses or the tuple (losses, outside), got a tuple "
                "of " +
                std::to_string(pair.size()));
        }
        read_returned(pair[0], "float64", "fiu", losses);
        read_returned(pair[1], "bool", "b", outside);
    }

  private:
    py::object load_;
    py::object loss_;
};

SearchMode mode_argument(const std::string& mode) {
    if (mode == "search") return SearchMode::search;
    if (mode == "scan") return SearchMode::scan;
    throw py::value_error("mode must be 'search' or 'scan', got '" + mode + "'");
}

[[noreturn]] void wrong_value(const char* name, const char* wanted, double value) {
    throw py::value_error(std::string(name) + " must be " + wanted + ", got " +
                          py::repr(py::float_(value)).cast<std::string>());
}

double positive_argument(double value, const char* name) {
    if (!std::isfinite(value) || value <= 0.0) wrong_value(name, "positive and finite", value);
    return value;
}

SearchOptions options_argument(double loss0, double threshold, double xtol, double log_cap,
                               double slope, py::handle max_evaluations, double scan_span,
                               py::handle scan_points) {
    if (!std::isfinite(loss0)) wrong_value("loss0", "finite", loss0);
    if (!std::isfinite(threshold) || threshold < loss0) {
        const auto text = py::repr(py::float_(loss0)).cast<std::string>();
        wrong_value("threshold", ("finite and at least loss0 = " + text).c_str(), threshold);
    }
    if (std::isnan(log_cap) || log_cap == -std::numeric_limits<double>::infinity()) {
        wrong_value("log_cap", "a number or inf", log_cap);
    }
    constexpr std::int64_t max_int = std::numeric_limits<int>::max();
    return {loss0,
            threshold,
            positive_argument(xtol, "xtol"),
            log_cap,
            positive_argument(slope, "slope"),
            static_cast<int>(integer_argument(max_evaluations, "max_evaluations", 1, max_int)),
            positive_argument(scan_span, "scan_span"),
            static_cast<int>(integer_argument(scan_points, "scan_points", 1, max_int))};
}

py::tuple search_binding(const py::object& engine, py::handle start_value, py::handle lanes_value,
                         const std::string& mode_name, double loss0, double threshold, double xtol,
                         double log_cap, double slope, py::handle max_evaluations, double scan_span,
                         py::handle scan_points) {
    const auto start = input_span<double>(start_value, "start", {any_size}, "[n]");
    for (const double x : start) {
        if (!std::isfinite(x)) wrong_value("start", "finite (log radii)", x);
    }
    const std::int64_t lanes =
        integer_argument(lanes_value, "lanes", 1, std::numeric_limits<std::int64_t>::max());
    const SearchMode mode = mode_argument(mode_name);
    const SearchOptions options = options_argument(loss0, threshold, xtol, log_cap, slope,
                                                   max_evaluations, scan_span, scan_points);
    const auto n = static_cast<py::ssize_t>(start.size());
    py::array_t<double> log_radius(n);
    py::array_t<std::uint8_t> status(n);
    py::array_t<std::int32_t> evaluations(n);
    py::array_t<std::uint8_t> reentrant(n);
    static_assert(sizeof(Status) == sizeof(std::uint8_t));
    const SearchResults results{output_span<double>(log_radius),
                                {reinterpret_cast<Status*>(status.mutable_data()), start.size()},
                                output_span<std::int32_t>(evaluations),
                                output_span<std::uint8_t>(reentrant)};
    PythonEngine adapter(engine);
    {
        const py::gil_scoped_release released;
        run_lanes(adapter, start, lanes, mode, options, results);
    }
    return py::make_tuple(std::move(log_radius), std::move(status), std::move(evaluations),
                          std::move(reentrant));
}

}  // namespace

void register_search(py::module_& m) {
    const SearchOptions defaults{};
    m.def("search", &search_binding, py::arg("engine"), py::arg("start"), py::kw_only(),
          py::arg("lanes"), py::arg("mode"), py::arg("loss0"), py::arg("threshold"),
          py::arg("xtol"), py::arg("log_cap"), py::arg("slope"),
          py::arg("max_evaluations") = defaults.max_evaluations,
          py::arg("scan_span") = defaults.scan_span, py::arg("scan_points") = defaults.scan_points,
          R"(Finds the log radius at which the loss first exceeds the threshold, on many rays.

Items 0 ... n - 1 are put on lanes; a lane whose item is settled takes the next one. A round is one
call of engine.loss for all lanes. Brackets by factors of at most 2, then Chandrupatla (1997) on
log(loss - loss0) - log(threshold - loss0), or on loss - threshold where an excess is not positive.

Args:
    engine: has load(lanes: int64 [k], items: int64 [k]) -> None and loss(lanes: int64 [m],
        radii: float64 [m]) -> float64 [m], or the tuple of that and outside, bool [m]: the loss is
        only a lower bound, already above the threshold. A loss that is not finite is outside.
    start: float64 [n], log radius to start from; in mode "scan" the known log radius.
    lanes: items under way at once, at least 1.
    mode: "search", or "scan": look for an earlier crossing on scan_points points that go
        geometrically from exp(start - scan_span) to exp(start).
    loss0, threshold: the loss at the centre and the loss that bounds the basin, >= loss0.
    xtol: width of the last bracket in log radius, > 0.
    log_cap: a ray that is inside up to here is unbounded; may be inf.
    slope: typical d log(loss - loss0) / d log(radius), > 0, for the first steps.
    max_evaluations: a ray that has spent them fails.

Returns: log_radius float64 [n]; status uint8 [n]: 0 converged, 1 unbounded (log_cap is returned),
2 bounded by a loss that is not finite, 3 failed (the largest log radius known to be inside);
evaluations int32 [n]; reentrant uint8 [n]: 1 where a scan found an earlier crossing, which is then
the result.
Raises: TypeError, ValueError naming the argument or saying what the engine returned; whatever the
engine raises; KeyboardInterrupt, looked for once a round.)");
}

}  // namespace fastvol::python
