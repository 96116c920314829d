#include "core/losses.hpp"

#include <algorithm>
#include <limits>

#include "core/loss_kernels.hpp"
#include "core/parallel.hpp"

namespace fastvol {
namespace {

using kernels::loss_rows;

// Starting a thread costs about as much as this many outputs.
constexpr std::int64_t outputs_per_thread = 200'000;
// The limit is looked at after so many examples of a loss by element, and after so many outputs in
// rows of many classes.
constexpr std::size_t elements_at_once = 1024;
constexpr std::size_t outputs_at_once = 16'384;

// Calls ray(r) for every ray, on as many threads as are worth it.
template <typename Body>
void for_rays(std::size_t outputs, const RaySums& result, const Body& ray) {
    const auto useful =
        std::max<std::int64_t>(static_cast<std::int64_t>(outputs) / outputs_per_thread, 1);
    for_ranges(result.sums.size(),
               static_cast<unsigned>(std::min<std::int64_t>(result.threads, useful)),
               [&](std::size_t first, std::size_t last) {
                   for (std::size_t r = first; r < last; ++r) ray(r);
               });
}

// Calls next(i) for i = 0, step, 2 step, ... below n and adds up what it returns.
template <typename Body>
void add_up(const RaySums& result, std::size_t r, std::size_t n, std::size_t step,
            const Body& next) {
    const double limit =
        result.limit.empty() ? std::numeric_limits<double>::infinity() : result.limit[r];
    double sum = 0.0;
    bool outside = false;
    for (std::size_t i = 0; i < n && !outside; i += step) {
        sum += next(i);
        outside = sum > limit;
    }
    result.sums[r] = sum;
    result.outside[r] = outside;
}

// Rows of few classes: class by class, the rows side by side.
template <typename Real>
double rows_of_few(const Real* outputs, std::size_t c, const std::int64_t* target, std::size_t n,
                   std::int64_t ignore_index) {
    alignas(64) Real columns[kernels::few_classes<Real> * loss_rows];
    alignas(64) Real chosen[loss_rows];
    bool counts[loss_rows];
    if (n < loss_rows) std::fill(columns, columns + c * loss_rows, Real{0});
    bool all = true;
    for (std::size_t i = 0; i < n; ++i) {
        counts[i] = target[i] != ignore_index;
        if (!counts[i]) {
            all = false;
            chosen[i] = Real{0};
            for (std::size_t j = 0; j < c; ++j) columns[j * loss_rows + i] = Real{0};
            continue;
        }
        const Real* row = outputs + i * c;
        for (std::size_t j = 0; j < c; ++j) columns[j * loss_rows + i] = row[j];
        const auto t = static_cast<std::size_t>(target[i]);
        chosen[i] = row[t];
        columns[t * loss_rows + i] = -std::numeric_limits<Real>::infinity();
    }
    for (std::size_t i = n; i < loss_rows; ++i) chosen[i] = Real{0};
    alignas(64) Real losses[loss_rows];
    kernels::cross_entropy_of_columns(columns, chosen, static_cast<int>(c), losses);
    if (!all || n < loss_rows) {
        for (std::size_t i = 0; i < loss_rows; ++i) {
            if (i >= n || !counts[i]) losses[i] = Real{0};
        }
    }
    return kernels::sum_of_rows(losses);
}

// Rows of many classes: each along its length.
template <typename Real>
double rows_of_many(const Real* outputs, std::size_t c, const std::int64_t* target, std::size_t n,
                    std::int64_t ignore_index) {
    alignas(64) Real losses[loss_rows];
    kernels::cross_entropy_of_rows(outputs, c, target, n, ignore_index, losses);
    return kernels::sum_of_rows(losses);
}

}  // namespace

template <typename Real>
void cross_entropy(std::span<const Real> outputs, std::int64_t c,
                   std::span<const std::int64_t> target, std::int64_t ignore_index,
                   const RaySums& result) {
    const std::size_t n = target.size();
    const auto classes = static_cast<std::size_t>(c);
    const bool few = classes <= kernels::few_classes<Real>;
    const auto sum = few ? rows_of_few<Real> : rows_of_many<Real>;
    const std::size_t rows =
        few ? loss_rows : std::clamp(outputs_at_once / classes, std::size_t{1}, loss_rows);
    for_rays(outputs.size(), result, [&](std::size_t r) {
        const Real* ray = outputs.data() + r * n * classes;
        add_up(result, r, n, rows, [&](std::size_t i) {
            return sum(ray + i * classes, classes, target.data() + i, std::min(rows, n - i),
                       ignore_index);
        });
    });
}

template <typename Real>
void squared_error(std::span<const Real> outputs, std::span<const Real> target,
                   const RaySums& result) {
    const std::size_t m = target.size();
    for_rays(outputs.size(), result, [&](std::size_t r) {
        add_up(result, r, m, elements_at_once, [&](std::size_t i) {
            return kernels::sum_squared_error(outputs.data() + r * m + i, target.data() + i,
                                              std::min(elements_at_once, m - i));
        });
    });
}

template <typename Real>
void binary_cross_entropy(std::span<const Real> outputs, std::span<const Real> target,
                          const RaySums& result) {
    const std::size_t m = target.size();
    for_rays(outputs.size(), result, [&](std::size_t r) {
        add_up(result, r, m, elements_at_once, [&](std::size_t i) {
            return kernels::sum_binary_cross_entropy(outputs.data() + r * m + i, target.data() + i,
                                                     std::min(elements_at_once, m - i));
        });
    });
}

template void cross_entropy<float>(std::span<const float>, std::int64_t,
                                   std::span<const std::int64_t>, std::int64_t, const RaySums&);
template void cross_entropy<double>(std::span<const double>, std::int64_t,
                                    std::span<const std::int64_t>, std::int64_t, const RaySums&);
template void squared_error<float>(std::span<const float>, std::span<const float>, const RaySums&);
template void squared_error<double>(std::span<const double>, std::span<const double>,
                                    const RaySums&);
template void binary_cross_entropy<float>(std::span<const float>, std::span<const float>,
                                          const RaySums&);
template void binary_cross_entropy<double>(std::span<const double>, std::span<const double>,
                                           const RaySums&);

}  // namespace fastvol
