// Splits a range of independent tasks over threads.
#pragma once

#include <cstddef>
#include <functional>

namespace fastvol {

// Calls body(begin, end) on contiguous parts of [0, tasks), one part a thread, the last one on the
// calling thread. body must not throw. Where no further thread can be started, fewer are used.
void for_ranges(std::size_t tasks, unsigned threads,
                const std::function<void(std::size_t, std::size_t)>& body);

}  // namespace fastvol
