#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "arguments.hpp"
#include "core/rounds.hpp"

namespace fastvol::python {
namespace {

constexpr std::int64_t most = std::numeric_limits<std::int64_t>::max();

// A Python object with refill(first), begin() and settled(). Called without the lock.
class PythonGroup : public LaneGroup {
  public:
    explicit PythonGroup(py::handle group)
        : refill_(group.attr("refill")),
          begin_(group.attr("begin")),
          settled_(group.attr("settled")) {}

    std::int64_t refill(std::int64_t first) override {
        const py::gil_scoped_acquire acquired;
        return integer_argument(refill_(first), "what refill returns", 0, most);
    }

    void begin() override {
        const py::gil_scoped_acquire acquired;
        begin_();
    }

    std::int64_t settled() override {
        const py::gil_scoped_acquire acquired;
        if (PyErr_CheckSignals() != 0) throw py::error_already_set();
        return integer_argument(settled_(), "what settled returns", 0, most);
    }

  private:
    py::object refill_;
    py::object begin_;
    py::object settled_;
};

void run_rounds_binding(const py::sequence& groups, py::handle items_value, double refill_share) {
    const std::int64_t items = integer_argument(items_value, "items", 0, most);
    if (!(refill_share > 0.0 && refill_share <= 1.0)) {
        throw py::value_error("refill_share must be above 0 and at most 1, got " +
                              py::repr(py::float_(refill_share)).cast<std::string>());
    }
    std::vector<std::unique_ptr<PythonGroup>> adapters;
    std::vector<LaneGroup*> pointers;
    for (const py::handle group : groups) {
        adapters.push_back(std::make_unique<PythonGroup>(group));
        pointers.push_back(adapters.back().get());
    }
    const py::gil_scoped_release released;
    run_rounds(pointers, items, refill_share);
}

}  // namespace

void register_rounds(py::module_& m) {
    m.def("run_rounds", &run_rounds_binding, py::arg("groups"), py::kw_only(), py::arg("items"),
          py::arg("refill_share"),
          R"(Settles items 0 ... items - 1 on groups of a device's lanes, whose searches live there.

While the host waits for the round of one group those of the others run.

Args:
    groups: have refill(first: int) -> int: keeps what settled lanes found and puts items from first
        on, in order, on free lanes, and says on how many; begin() -> None: issues a round, without
        waiting; settled() -> int: waits for the last round, and says how many lanes have settled and
        not been refilled.
    items: how many, at least 0.
    refill_share: a group is refilled when this share of its searches has settled, above 0 and at
        most 1.

Raises: TypeError, ValueError naming the argument; RuntimeError where a group's numbers cannot be;
whatever a group raises; KeyboardInterrupt, looked for once a round.)");
}

}  // namespace fastvol::python
