#include "core/parallel.hpp"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#include <pthread.h>
#define FASTVOL_HAS_DLSYM 1
#endif

namespace fastvol {
namespace {

// Parts of a range that threads take until none is left.
struct Parts {
    const std::function<void(std::size_t, std::size_t)>& body;
    std::size_t tasks;
    std::size_t count;
    std::atomic<std::size_t> next{0};

    void work() {
        for (std::size_t part = next++; part < count; part = next++) {
            body(tasks * part / count, tasks * (part + 1) / count);
        }
    }
};

void work_on(void* parts) {
    static_cast<Parts*>(parts)->work();
}

// The entry of a parallel region: of GNU's runtime, and for its sake of LLVM's and Intel's.
using ParallelRegion = void (*)(void (*)(void*), void*, unsigned, unsigned);

#ifdef FASTVOL_HAS_DLSYM
std::atomic<bool> is_forked{false};

ParallelRegion find_region() {
    // The runtime's threads do not follow into a child, which would wait for them forever.
    pthread_atfork(nullptr, nullptr, [] { is_forked = true; });
    return reinterpret_cast<ParallelRegion>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
}

ParallelRegion parallel_region() {
    static const ParallelRegion region = find_region();
    return is_forked ? nullptr : region;
}
#else
ParallelRegion parallel_region() {
    return nullptr;
}
#endif

void start_threads(Parts& parts) {
    std::vector<std::thread> workers;
    workers.reserve(parts.count - 1);
    try {
        while (workers.size() + 1 < parts.count) workers.emplace_back(work_on, &parts);
    } catch (const std::system_error&) {
        // Those that there are take all.
    }
    parts.work();
    for (std::thread& worker : workers) worker.join();
}

}  // namespace

void for_ranges(std::size_t tasks, unsigned threads,
                const std::function<void(std::size_t, std::size_t)>& body) {
    if (tasks == 0) return;
    Parts parts{body, tasks, std::min<std::size_t>(std::max(threads, 1u), tasks)};
    if (parts.count == 1) {
        parts.work();
    } else if (const ParallelRegion region = parallel_region()) {
        region(work_on, &parts, static_cast<unsigned>(parts.count), 0);
    } else {
        start_threads(parts);
    }
}

}  // namespace fastvol
