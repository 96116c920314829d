#include <limits>

#include "arguments.hpp"
#include "core/noise.hpp"
#include "core/philox.hpp"

namespace fastvol::python {
namespace {

constexpr std::uint64_t max_uint32 = std::numeric_limits<std::uint32_t>::max();
constexpr std::uint64_t max_uint64 = std::numeric_limits<std::uint64_t>::max();
constexpr std::int64_t max_threads = 1024;

std::span<const std::uint64_t> ids_argument(py::handle value, py::ssize_t k) {
    const py::array ids = array_argument(value, "ids", {k}, "[k]");
    const auto n = static_cast<std::size_t>(ids.size());
    if (holds<std::uint64_t>(ids)) return {static_cast<const std::uint64_t*>(ids.data()), n};
    if (!holds<std::int64_t>(ids)) wrong_dtype(ids, "ids", "int64 or uint64");
    const std::span<const std::int64_t> values(static_cast<const std::int64_t*>(ids.data()), n);
    for (const std::int64_t id : values) {
        if (id < 0) throw py::value_error("ids must not be negative, got " + std::to_string(id));
    }
    // The signed and the unsigned type of one integer may alias.
    return {static_cast<const std::uint64_t*>(ids.data()), n};
}

py::array out_argument(py::handle value) {
    py::array out = array_argument(value, "out", {any_size, any_size}, "[k, d]", true);
    if (!holds<float>(out) && !holds<double>(out)) wrong_dtype(out, "out", "float32 or float64");
    if (out.shape(1) < 1 || out.shape(1) > max_dimension) {
        throw py::value_error("out must have between 1 and 2**34 columns, got " +
                              std::to_string(out.shape(1)));
    }
    return out;
}

Directions directions_argument(const py::array& out, py::handle seed, py::handle stream,
                               py::handle ids, bool antithetic, py::handle first) {
    return {unsigned_argument(seed, "seed", max_uint64),
            static_cast<std::uint32_t>(unsigned_argument(stream, "stream", max_uint32)),
            ids_argument(ids, out.shape(0)),
            antithetic,
            out.shape(1),
            integer_argument(first, "first", 0, max_dimension - out.shape(1))};
}

unsigned threads_argument(py::handle threads) {
    return static_cast<unsigned>(integer_argument(threads, "threads", 1, max_threads));
}

py::array_t<std::uint32_t> philox_binding(py::handle seed, py::handle stream, py::handle vector,
                                          py::handle first_block, py::handle n_blocks) {
    const VectorKey key{unsigned_argument(seed, "seed", max_uint64),
                        static_cast<std::uint32_t>(unsigned_argument(stream, "stream", max_uint32)),
                        unsigned_argument(vector, "vector", max_uint64)};
    const std::uint64_t first = unsigned_argument(first_block, "first_block", max_uint32);
    const std::uint64_t n = unsigned_argument(n_blocks, "n_blocks", max_uint32 + 1 - first);
    py::array_t<std::uint32_t> words({static_cast<py::ssize_t>(n), py::ssize_t{4}});
    const std::span<std::uint32_t> span = output_span<std::uint32_t>(words);
    {
        const py::gil_scoped_release released;
        philox_blocks(key, static_cast<std::uint32_t>(first), span);
    }
    return words;
}

template <typename Real>
void run_normals(const Directions& directions, py::array& out, py::handle scale, py::handle project,
                 unsigned threads, std::span<double> norm, std::span<double> dot) {
    const auto d = static_cast<py::ssize_t>(directions.dimension);
    const std::span<Real> out_span = output_span<Real>(out);
    const auto scale_span = optional_span<Real>(scale, "scale", {d}, "[d]");
    const auto project_span = optional_span<double>(project, "project", {d}, "[d]");
    // The caller's references keep all arrays alive while the lock is released.
    const py::gil_scoped_release released;
    normals<Real>(directions, scale_span, project_span, threads, out_span, norm, dot);
}

py::tuple normals_binding(py::handle out_value, py::handle seed, py::handle stream, py::handle ids,
                          bool antithetic, py::handle scale, py::handle project,
                          py::handle threads_value, py::handle first) {
    py::array out = out_argument(out_value);
    const Directions directions = directions_argument(out, seed, stream, ids, antithetic, first);
    const unsigned threads = threads_argument(threads_value);
    py::array_t<double> norm(out.shape(0));
    py::array_t<double> dot(out.shape(0));
    const auto run = holds<float>(out) ? run_normals<float> : run_normals<double>;
    run(directions, out, scale, project, threads, output_span<double>(norm),
        output_span<double>(dot));
    return py::make_tuple(std::move(norm), std::move(dot));
}

template <typename Real>
void run_perturb(const Directions& directions, py::array& out, py::handle theta0,
                 std::span<const double> coefficient, py::handle scale, unsigned threads) {
    const auto d = static_cast<py::ssize_t>(directions.dimension);
    const std::span<Real> out_span = output_span<Real>(out);
    const auto theta0_span = input_span<Real>(theta0, "theta0", {d}, "[d]");
    const auto scale_span = optional_span<Real>(scale, "scale", {d}, "[d]");
    const py::gil_scoped_release released;
    perturb<Real>(directions, theta0_span, coefficient, scale_span, threads, out_span);
}

void perturb_binding(py::handle out_value, py::handle theta0, py::handle coefficient,
                     py::handle seed, py::handle stream, py::handle ids, bool antithetic,
                     py::handle scale, py::handle threads_value, py::handle first) {
    py::array out = out_argument(out_value);
    const Directions directions = directions_argument(out, seed, stream, ids, antithetic, first);
    const unsigned threads = threads_argument(threads_value);
    const auto coefficients = input_span<double>(coefficient, "coefficient", {out.shape(0)}, "[k]");
    const auto run = holds<float>(out) ? run_perturb<float> : run_perturb<double>;
    run(directions, out, theta0, coefficients, scale, threads);
}

}  // namespace

void register_noise(py::module_& m) {
    m.def("philox", &philox_binding, py::arg("seed"), py::arg("stream"), py::arg("vector"),
          py::arg("first_block"), py::arg("n_blocks"),
          R"(The words of Philox4x32-10 for consecutive coordinate blocks of one vector.

Key (seed low, seed high), counter (block, stream, vector low, vector high), in 32-bit words.
Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".

Returns: uint32 [n_blocks, 4].
Raises: TypeError or ValueError for an argument that is no integer or out of range; first_block +
n_blocks is at most 2**32.)");
    m.def("normals", &normals_binding, py::arg("out"), py::arg("seed"), py::arg("stream"),
          py::arg("ids"), py::kw_only(), py::arg("antithetic") = false,
          py::arg("scale") = py::none(), py::arg("project") = py::none(), py::arg("threads") = 1,
          py::arg("first") = 0,
          R"(Writes scale * z of each direction into out.

Word j of a coordinate block gives u_j = ((word >> 9) + 1/2) * 2**-23; coordinates 4b and 4b + 1 are
sqrt(-2 ln u_0) times cosine and sine of 2 pi u_1, the next two come from u_2 and u_3. |dz| <= 1e-14
of that definition in float64, <= 1e-6 in float32.

Args:
    out: float32 or float64 [k, d], C-contiguous, overwritten; 1 <= d <= 2**34.
    seed, stream: key of the family of directions, 64 and 32 bits.
    ids: int64 or uint64 [k], direction indices, not negative.
    antithetic: directions 2i and 2i + 1 are plus and minus vector i.
    scale: [d] in the dtype of out, or None for ones.
    project: float64 [d], or None.
    threads: at least 1; the result does not depend on it. The interpreter's lock is released.
    first: the coordinate that column 0 is: columns first ... first + d - 1 of the whole vector,
        with its bits; first + d is at most 2**34.

Returns: norm, float64 [k]: the length of z as rounded to the dtype of out, before the scale; dot,
float64 [k]: <z, project>, zeros without project.
Raises: TypeError, ValueError naming the argument.)");
    m.def("perturb", &perturb_binding, py::arg("out"), py::arg("theta0"), py::arg("coefficient"),
          py::arg("seed"), py::arg("stream"), py::arg("ids"), py::kw_only(),
          py::arg("antithetic") = false, py::arg("scale") = py::none(), py::arg("threads") = 1,
          py::arg("first") = 0,
          R"(Writes theta0 + (coefficient * scale) * z of each direction into out.

The noise of normals() with the same arguments, never stored.

Args:
    out: float32 or float64 [k, d], C-contiguous, overwritten.
    theta0: [d] in the dtype of out.
    coefficient: float64 [k], rounded to the dtype of out.
    seed, stream, ids, antithetic, scale, threads, first: as for normals().

Raises: TypeError, ValueError naming the argument.)");
}

}  // namespace fastvol::python
