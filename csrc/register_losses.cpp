#include <limits>
#include <vector>

#include "arguments.hpp"
#include "core/losses.hpp"

namespace fastvol::python {
namespace {

constexpr std::int64_t max_threads = 1024;

enum class Kind { cross_entropy, mse, bce_with_logits };

Kind kind_argument(py::handle value) {
    if (py::isinstance<py::str>(value)) {
        const auto name = value.cast<std::string>();
        if (name == "cross_entropy") return Kind::cross_entropy;
        if (name == "mse") return Kind::mse;
        if (name == "bce_with_logits") return Kind::bce_with_logits;
    }
    throw py::value_error("kind must be 'cross_entropy', 'mse' or 'bce_with_logits', got " +
                          py::repr(value).cast<std::string>());
}

// An array of any shape with the axes from the given one on as a single axis, of the given size
// where there is one.
py::array flat_argument(py::handle value, const char* name, py::ssize_t axis, py::ssize_t size,
                        const char* shape_text) {
    if (py::isinstance<py::array>(value)) {
        const auto array = py::reinterpret_borrow<py::array>(value);
        if (array.ndim() >= axis && (array.flags() & py::array::c_style) != 0) {
            std::vector<py::ssize_t> shape(array.shape(), array.shape() + axis);
            py::ssize_t rest = 1;
            for (py::ssize_t i = axis; i < array.ndim(); ++i) rest *= array.shape(i);
            shape.push_back(rest);
            const py::array flat = py::reinterpret_borrow<py::array>(array).reshape(shape);
            if (size == any_size || rest == size) return flat;
        }
    }
    // One of these says what is wrong.
    if (axis == 0) return array_argument(value, name, {size}, shape_text);
    return array_argument(value, name, {any_size, size}, shape_text);
}

template <typename Real>
std::span<const Real> values_of(const py::array& array, const char* name) {
    if (!holds<Real>(array)) wrong_dtype(array, name, dtype_name<Real>());
    return {static_cast<const Real*>(array.data()), static_cast<std::size_t>(array.size())};
}

void check_classes(std::span<const std::int64_t> target, std::int64_t c,
                   std::int64_t ignore_index) {
    for (const std::int64_t t : target) {
        if ((t < 0 || t >= c) && t != ignore_index) {
            throw py::value_error("target must hold classes in [0, " + std::to_string(c) +
                                  ") or ignore_index = " + std::to_string(ignore_index) + ", got " +
                                  std::to_string(t));
        }
    }
}

template <typename Real>
void check_probabilities(std::span<const Real> target) {
    for (const Real t : target) {
        if (!(t >= Real{0} && t <= Real{1})) {
            throw py::value_error(
                "target must hold probabilities in [0, 1] for bce_with_logits, "
                "got " +
                std::to_string(t));
        }
    }
}

template <typename Real>
void run_cross_entropy(const py::array& outputs, py::handle target_value, std::int64_t ignore_index,
                       const RaySums& result) {
    const std::int64_t c = outputs.shape(2);
    if (c < 1) throw py::value_error("outputs must have at least one class, got [k, n, 0]");
    const auto target = input_span<std::int64_t>(target_value, "target", {outputs.shape(1)}, "[n]");
    check_classes(target, c, ignore_index);
    const auto values = values_of<Real>(outputs, "outputs");
    const py::gil_scoped_release released;
    cross_entropy<Real>(values, c, target, ignore_index, result);
}

template <typename Real>
void run_by_element(Kind kind, const py::array& outputs, py::handle target_value,
                    const RaySums& result) {
    const py::array flat = flat_argument(target_value, "target", 0, outputs.shape(1), "[m]");
    const auto target = values_of<Real>(flat, "target");
    if (kind == Kind::bce_with_logits) check_probabilities(target);
    const auto values = values_of<Real>(outputs, "outputs");
    const py::gil_scoped_release released;
    if (kind == Kind::mse) {
        squared_error<Real>(values, target, result);
    } else {
        binary_cross_entropy<Real>(values, target, result);
    }
}

py::tuple ray_losses_binding(py::handle outputs_value, py::handle target, py::handle kind_value,
                             py::handle limit_value, py::handle ignore_value,
                             py::handle threads_value) {
    const Kind kind = kind_argument(kind_value);
    const py::array outputs =
        kind == Kind::cross_entropy
            ? array_argument(outputs_value, "outputs", {any_size, any_size, any_size}, "[k, n, c]")
            : flat_argument(outputs_value, "outputs", 1, any_size, "[k, m]");
    const bool is_float = holds<float>(outputs);
    if (!is_float && !holds<double>(outputs)) {
        wrong_dtype(outputs, "outputs", "float32 or float64");
    }
    const py::ssize_t k = outputs.shape(0);
    const auto limit = optional_span<double>(limit_value, "limit", {k}, "[k]");
    const auto threads =
        static_cast<unsigned>(integer_argument(threads_value, "threads", 1, max_threads));
    const std::int64_t ignore_index =
        integer_argument(ignore_value, "ignore_index", std::numeric_limits<std::int64_t>::min(),
                         std::numeric_limits<std::int64_t>::max());
    py::array_t<double> sums(k);
    py::array_t<bool> outside(k);
    const RaySums result{output_span<double>(sums), output_span<bool>(outside), limit, threads};
    if (kind == Kind::cross_entropy) {
        const auto run = is_float ? run_cross_entropy<float> : run_cross_entropy<double>;
        run(outputs, target, ignore_index, result);
    } else {
        const auto run = is_float ? run_by_element<float> : run_by_element<double>;
        run(kind, outputs, target, result);
    }
    return py::make_tuple(std::move(sums), std::move(outside));
}

}  // namespace

void register_losses(py::module_& m) {
    m.def("ray_losses", &ray_losses_binding, py::arg("outputs"), py::arg("target"), py::kw_only(),
          py::arg("kind"), py::arg("limit") = py::none(), py::arg("ignore_index") = -100,
          py::arg("threads") = 1,
          R"(Sum of a loss over the examples, for each ray, up to a limit.

By kind, per example:
    cross_entropy: log(sum_j exp(x_j)) - x_target, 0 where the target is ignore_index;
    mse: (x - t)^2;
    bce_with_logits: log(1 + exp(-x)) + (1 - t) x.
All are >= 0, so a partial sum bounds a ray's loss from below. Values are accurate to the dtype of
the outputs, also where they are tiny, and summed in float64 in an order that does not depend on
threads.

Args:
    outputs: [k, n, c] logits for cross_entropy, else [k, ...], read as [k, m]; C-contiguous,
        float32 or float64.
    target: int64 [n] classes for cross_entropy; else m values in any shape, in the dtype of the
        outputs, for bce_with_logits in [0, 1].
    limit: float64 [k]; once the partial sum of a ray exceeds its limit the rest of its examples is
        left out. None: no limit.
    ignore_index: the class that does not count.
    threads: at most so many are used, over the rays.

Returns: sums, float64 [k]; outside, bool [k]: the limit was exceeded, and the sum is a lower bound
above it. Where nan is met before that, the sum is nan and outside false.
Raises: TypeError or ValueError for an array of another shape or dtype, a class or probability out
of range, or an unknown kind.)");
}

}  // namespace fastvol::python
