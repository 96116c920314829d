#include "core/parallel.hpp"

#include <algorithm>
#include <system_error>
#include <thread>
#include <vector>

namespace fastvol {

void for_ranges(std::size_t tasks, unsigned threads,
                const std::function<void(std::size_t, std::size_t)>& body) {
    const std::size_t parts = std::min<std::size_t>(std::max(threads, 1u), tasks);
    if (parts <= 1) {
        if (tasks > 0) body(0, tasks);
        return;
    }
    std::vector<std::thread> workers;
    workers.reserve(parts - 1);
    std::size_t begin = 0;
    for (std::size_t part = 0; part + 1 < parts; ++part) {
        const std::size_t end = begin + (tasks - begin) / (parts - part);
        try {
            workers.emplace_back([&body, begin, end] { body(begin, end); });
        } catch (const std::system_error&) {
            break;
        }
        begin = end;
    }
    body(begin, tasks);
    for (std::thread& worker : workers) worker.join();
}

}  // namespace fastvol
