// Turns Python arguments into spans and numbers, or into an error that names the argument.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>
#include <span>
#include <string>

namespace fastvol::python {

namespace py = pybind11;

// A dimension of an expected shape: its size, or any_size.
inline constexpr py::ssize_t any_size = -1;

// An integer with low <= value <= high; anything with __index__ but a bool is read.
std::int64_t integer_argument(py::handle value, const char* name, std::int64_t low,
                              std::int64_t high);
std::uint64_t unsigned_argument(py::handle value, const char* name, std::uint64_t high);

// Checks that value is a C-contiguous array of this shape, and writable where that is asked for.
// shape_text is the shape in words, for the message.
py::array array_argument(py::handle value, const char* name,
                         std::initializer_list<py::ssize_t> shape, const char* shape_text,
                         bool writable = false);

[[noreturn]] void wrong_dtype(const py::array& array, const char* name, const char* wanted);

template <typename T>
constexpr const char* dtype_name();
template <>
constexpr const char* dtype_name<float>() {
    return "float32";
}
template <>
constexpr const char* dtype_name<double>() {
    return "float64";
}
template <>
constexpr const char* dtype_name<std::int64_t>() {
    return "int64";
}

// True where the array holds exactly this type, in native byte order.
template <typename T>
bool holds(const py::array& array) {
    return py::isinstance<py::array_t<T>>(array);
}

template <typename T>
std::span<const T> input_span(py::handle value, const char* name,
                              std::initializer_list<py::ssize_t> shape, const char* shape_text) {
    const py::array array = array_argument(value, name, shape, shape_text);
    if (!holds<T>(array)) wrong_dtype(array, name, dtype_name<T>());
    return {static_cast<const T*>(array.data()), static_cast<std::size_t>(array.size())};
}

// None gives an empty span.
template <typename T>
std::span<const T> optional_span(py::handle value, const char* name,
                                 std::initializer_list<py::ssize_t> shape, const char* shape_text) {
    if (value.is_none()) return {};
    return input_span<T>(value, name, shape, shape_text);
}

template <typename T>
std::span<T> output_span(py::array& array) {
    return {static_cast<T*>(array.mutable_data()), static_cast<std::size_t>(array.size())};
}

}  // namespace fastvol::python
