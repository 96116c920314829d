#include "arguments.hpp"

#include <limits>

namespace fastvol::python {
namespace {

std::string type_name(py::handle value) {
    return py::str(py::type::of(value).attr("__qualname__")).cast<std::string>();
}

py::int_ as_integer(py::handle value, const char* name) {
    PyObject* index = PyBool_Check(value.ptr()) ? nullptr : PyNumber_Index(value.ptr());
    if (index == nullptr) {
        PyErr_Clear();
        throw py::type_error(std::string(name) + " must be an integer, got " + type_name(value));
    }
    return py::reinterpret_steal<py::int_>(index);
}

[[noreturn]] void out_of_range(const char* name, const std::string& low, const std::string& high,
                               const py::int_& value) {
    throw py::value_error(std::string(name) + " must lie in [" + low + ", " + high + "], got " +
                          py::str(value).cast<std::string>());
}

std::string shape_of(const py::array& array) {
    return py::str(array.attr("shape")).cast<std::string>();
}

}  // namespace

std::int64_t integer_argument(py::handle value, const char* name, std::int64_t low,
                              std::int64_t high) {
    const py::int_ integer = as_integer(value, name);
    int overflow = 0;
    const long long result = PyLong_AsLongLongAndOverflow(integer.ptr(), &overflow);
    if (overflow != 0 || result < low || result > high) {
        out_of_range(name, std::to_string(low), std::to_string(high), integer);
    }
    return result;
}

std::uint64_t unsigned_argument(py::handle value, const char* name, std::uint64_t high) {
    const py::int_ integer = as_integer(value, name);
    const unsigned long long result = PyLong_AsUnsignedLongLong(integer.ptr());
    const bool failed = PyErr_Occurred() != nullptr;
    PyErr_Clear();
    if (failed || result > high) out_of_range(name, "0", std::to_string(high), integer);
    return result;
}

py::array array_argument(py::handle value, const char* name,
                         std::initializer_list<py::ssize_t> shape, const char* shape_text,
                         bool writable) {
    if (!py::isinstance<py::array>(value)) {
        throw py::type_error(std::string(name) + " must be a NumPy array, got " + type_name(value));
    }
    auto array = py::reinterpret_borrow<py::array>(value);
    bool fits = array.ndim() == static_cast<py::ssize_t>(shape.size());
    py::ssize_t axis = 0;
    for (const py::ssize_t size : shape) {
        fits = fits && (size == any_size || array.shape(axis) == size);
        ++axis;
    }
    if (!fits) {
        std::string wanted;
        for (const py::ssize_t size : shape) {
            if (!wanted.empty()) wanted += ", ";
            wanted += size == any_size ? "any" : std::to_string(size);
        }
        throw py::value_error(std::string(name) + " must have the shape " + shape_text + " = [" +
                              wanted + "], got " + shape_of(array));
    }
    if ((array.flags() & py::array::c_style) == 0) {
        throw py::value_error(std::string(name) +
                              " must be C-contiguous: pass numpy.ascontiguousarray(" + name + ")");
    }
    if (writable && !array.writeable()) {
        throw py::value_error(std::string(name) + " must be writable, got a read-only array");
    }
    return array;
}

void wrong_dtype(const py::array& array, const char* name, const char* wanted) {
    throw py::type_error(std::string(name) + " must have dtype " + wanted + ", got " +
                         py::str(array.dtype()).cast<std::string>());
}

}  // namespace fastvol::python
