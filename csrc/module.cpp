// The Python module fastvol._core: one register function a topic.
#include <pybind11/pybind11.h>

namespace fastvol::python {

void register_losses(pybind11::module_& m);
void register_noise(pybind11::module_& m);
void register_rounds(pybind11::module_& m);
void register_search(pybind11::module_& m);
void register_radial(pybind11::module_& m);
void register_accumulators(pybind11::module_& m);

}  // namespace fastvol::python

PYBIND11_MODULE(_core, m) {
    m.doc() = "Noise, ray search, losses, radial integrals and accumulators of fastvol, in C++.";
    fastvol::python::register_losses(m);
    fastvol::python::register_noise(m);
    fastvol::python::register_rounds(m);
    fastvol::python::register_search(m);
    fastvol::python::register_radial(m);
    fastvol::python::register_accumulators(m);
}
