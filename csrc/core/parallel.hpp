// Splits a range of independent tasks over threads.
#pragma once

#include <cstddef>
#include <functional>

namespace fastvol {

// Calls body(begin, end) on contiguous parts of [0, tasks), at most one part a thread; the calling
// thread takes its share. body must not throw. Where no further thread can be started, fewer are
// used.
//
// Where the process has an OpenMP runtime already (PyTorch brings one), the threads are that
// runtime's: they wait for work in a loop for a while after each of PyTorch's operations, and
// others would have to share the cores with them. Elsewhere, and in a child of fork(), they are
// started anew.
void for_ranges(std::size_t tasks, unsigned threads,
                const std::function<void(std::size_t, std::size_t)>& body);

}  // namespace fastvol
