#include "core/loss_kernels.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "core/elementary.hpp"
#include "core/function_versions.hpp"

namespace fastvol::kernels {
namespace {

// Independent sums along a row, which is no shorter than that.
constexpr std::size_t lanes = 32;
// So many terms are added in the dtype of the terms before they join a sum in float64.
constexpr std::size_t terms_at_once = 16;

// exp(x) for x <= 0; 0 below 1e-37 (float64: 1e-304). nan stays.
FASTVOL_INLINE float exp_below_zero(float x) {
    const float value = exponential(x < -87.0f ? -87.0f : x);
    return x < -87.0f ? 0.0f : value;
}

FASTVOL_INLINE double exp_below_zero(double x) {
    const double value = exponential(x < -700.0 ? -700.0 : x);
    return x < -700.0 ? 0.0 : value;
}

// The loss from the target's logit, the highest logit, and the sum of exp(logit - highest) over the
// other classes.
template <typename Real>
FASTVOL_INLINE void loss_of_parts(const Real* __restrict chosen, const Real* __restrict top,
                                  const Real* __restrict others, Real* __restrict losses) {
    for (std::size_t i = 0; i < loss_rows; ++i) {
        // The target's own term is exactly 1 where it is the highest: the others keep their digits.
        const Real own = exp_below_zero(chosen[i] - top[i]);
        losses[i] = log_1p(others[i] + (own - Real{1})) + (top[i] - chosen[i]);
    }
}

template <typename Real>
FASTVOL_INLINE void columns_loss(const Real* __restrict columns, const Real* __restrict chosen,
                                 int c, Real* __restrict losses) {
    alignas(64) Real top[loss_rows];
    alignas(64) Real sum[loss_rows];
    for (std::size_t i = 0; i < loss_rows; ++i) top[i] = chosen[i];
    for (int j = 0; j < c; ++j) {
        const Real* column = columns + static_cast<std::size_t>(j) * loss_rows;
        for (std::size_t i = 0; i < loss_rows; ++i)
            top[i] = column[i] > top[i] ? column[i] : top[i];
    }
    for (std::size_t i = 0; i < loss_rows; ++i) sum[i] = Real{0};
    for (int j = 0; j < c; ++j) {
        const Real* column = columns + static_cast<std::size_t>(j) * loss_rows;
        for (std::size_t i = 0; i < loss_rows; ++i) sum[i] += exp_below_zero(column[i] - top[i]);
    }
    loss_of_parts(chosen, top, sum, losses);
}

// Halves of constant length, which a compiler turns into vectors: the sum, and the largest.
template <std::size_t width, std::size_t size>
FASTVOL_INLINE double folded(double (&sums)[size]) {
    if constexpr (width > 1) {
        for (std::size_t l = 0; l < width / 2; ++l) sums[l] += sums[l + width / 2];
        return folded<width / 2>(sums);
    } else {
        return sums[0];
    }
}

template <std::size_t width, typename Real, std::size_t size>
FASTVOL_INLINE Real highest(Real (&top)[size]) {
    if constexpr (width > 1) {
        for (std::size_t l = 0; l < width / 2; ++l) {
            const Real other = top[l + width / 2];
            top[l] = other > top[l] ? other : top[l];
        }
        return highest<width / 2>(top);
    } else {
        return top[0];
    }
}

template <typename Real>
FASTVOL_INLINE double rows_sum(const Real* losses) {
    double sums[loss_rows];
    for (std::size_t i = 0; i < loss_rows; ++i) sums[i] = static_cast<double>(losses[i]);
    return folded<loss_rows>(sums);
}

template <typename Real>
FASTVOL_INLINE Real largest(const Real* x, std::size_t n) {
    Real top[lanes];
    // The last lanes first: the rest comes in whole groups.
    for (std::size_t l = 0; l < lanes; ++l) top[l] = x[n - lanes + l];
    for (std::size_t i = 0; i + lanes <= n; i += lanes) {
        for (std::size_t l = 0; l < lanes; ++l) top[l] = x[i + l] > top[l] ? x[i + l] : top[l];
    }
    return highest<lanes>(top);
}

template <typename Real>
FASTVOL_INLINE double exp_sum(const Real* x, std::size_t n, std::size_t skip, Real shift) {
    constexpr int width = static_cast<int>(lanes);
    double sums[lanes] = {};
    std::size_t i = 0;
    while (i + lanes <= n) {
        Real part[lanes] = {};
        const std::size_t end = std::min(n, i + terms_at_once * lanes);
        for (; i + lanes <= end; i += lanes) {
            const int skipped = static_cast<int>(skip - i);
            for (int l = 0; l < width; ++l) {
                const Real value = exp_below_zero(x[i + static_cast<std::size_t>(l)] - shift);
                part[l] += l == skipped ? Real{0} : value;
            }
        }
        for (std::size_t l = 0; l < lanes; ++l) sums[l] += static_cast<double>(part[l]);
    }
    if (i < n) {
        // The last lanes, without those that have been added.
        const Real* last = x + (n - lanes);
        const int skipped = static_cast<int>(skip - (n - lanes));
        const int first = static_cast<int>(i - (n - lanes));
        Real part[lanes];
        for (int l = 0; l < width; ++l) {
            const Real value = exp_below_zero(last[l] - shift);
            part[l] = l == skipped || l < first ? Real{0} : value;
        }
        for (std::size_t l = 0; l < lanes; ++l) sums[l] += static_cast<double>(part[l]);
    }
    return folded<lanes>(sums);
}

template <typename Real>
FASTVOL_INLINE void rows_loss(const Real* outputs, std::size_t c, const std::int64_t* target,
                              std::size_t n, std::int64_t ignore_index, Real* losses) {
    alignas(64) Real chosen[loss_rows] = {};
    alignas(64) Real top[loss_rows] = {};
    alignas(64) Real others[loss_rows] = {};
    for (std::size_t i = 0; i < n; ++i) {
        if (target[i] == ignore_index) continue;
        const Real* row = outputs + i * c;
        const auto t = static_cast<std::size_t>(target[i]);
        chosen[i] = row[t];
        top[i] = largest(row, c);
        others[i] = static_cast<Real>(exp_sum(row, c, t, top[i]));
    }
    loss_of_parts(chosen, top, others, losses);
}

template <typename Real>
FASTVOL_INLINE double squared_error_sum(const Real* x, const Real* t, std::size_t n) {
    double sums[lanes] = {};
    const auto add = [&](std::size_t i, std::size_t l) __attribute__((always_inline)) {
        // The square of a float32 is exact in float64, and does not overflow.
        const auto difference = static_cast<double>(x[i + l] - t[i + l]);
        sums[l] += difference * difference;
    };
    std::size_t i = 0;
    for (; i + lanes <= n; i += lanes) {
        for (std::size_t l = 0; l < lanes; ++l) add(i, l);
    }
    for (std::size_t l = 0; i + l < n; ++l) add(i, l);
    return folded<lanes>(sums);
}

template <typename Real>
FASTVOL_INLINE double binary_cross_entropy_sum(const Real* x, const Real* t, std::size_t n) {
    double sum = 0.0;
    for (std::size_t begin = 0; begin < n; begin += loss_rows) {
        // One short loop after the other keeps more of them in flight than a long chain does.
        alignas(64) Real losses[loss_rows];
        alignas(64) Real small[loss_rows];
        const std::size_t count = std::min(loss_rows, n - begin);
        for (std::size_t i = 0; i < count; ++i) small[i] = -std::abs(x[begin + i]);
        for (std::size_t i = count; i < loss_rows; ++i) small[i] = Real{0};
        for (std::size_t i = 0; i < loss_rows; ++i) small[i] = exp_below_zero(small[i]);
        for (std::size_t i = 0; i < loss_rows; ++i) losses[i] = log_1p(small[i]);
        for (std::size_t i = 0; i < count; ++i) {
            // PyTorch's form, which has its values at infinite logits too.
            const Real logit = x[begin + i];
            const Real negative = logit < Real{0} ? -logit : Real{0};
            losses[i] = ((Real{1} - t[begin + i]) * logit + negative) + losses[i];
        }
        for (std::size_t i = count; i < loss_rows; ++i) losses[i] = Real{0};
        sum += rows_sum(losses);
    }
    return sum;
}

}  // namespace

FASTVOL_VERSIONS void cross_entropy_of_columns(const float* columns, const float* chosen, int c,
                                               float* losses) {
    columns_loss(columns, chosen, c, losses);
}

FASTVOL_VERSIONS void cross_entropy_of_columns(const double* columns, const double* chosen, int c,
                                               double* losses) {
    columns_loss(columns, chosen, c, losses);
}

FASTVOL_VERSIONS double sum_of_rows(const float* losses) {
    return rows_sum(losses);
}

FASTVOL_VERSIONS double sum_of_rows(const double* losses) {
    return rows_sum(losses);
}

FASTVOL_VERSIONS void cross_entropy_of_rows(const float* outputs, std::size_t c,
                                            const std::int64_t* target, std::size_t n,
                                            std::int64_t ignore_index, float* losses) {
    rows_loss(outputs, c, target, n, ignore_index, losses);
}

FASTVOL_VERSIONS void cross_entropy_of_rows(const double* outputs, std::size_t c,
                                            const std::int64_t* target, std::size_t n,
                                            std::int64_t ignore_index, double* losses) {
    rows_loss(outputs, c, target, n, ignore_index, losses);
}

FASTVOL_VERSIONS double sum_squared_error(const float* x, const float* t, std::size_t n) {
    return squared_error_sum(x, t, n);
}

FASTVOL_VERSIONS double sum_squared_error(const double* x, const double* t, std::size_t n) {
    return squared_error_sum(x, t, n);
}

FASTVOL_VERSIONS double sum_binary_cross_entropy(const float* x, const float* t, std::size_t n) {
    return binary_cross_entropy_sum(x, t, n);
}

FASTVOL_VERSIONS double sum_binary_cross_entropy(const double* x, const double* t, std::size_t n) {
    return binary_cross_entropy_sum(x, t, n);
}

}  // namespace fastvol::kernels
