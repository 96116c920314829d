// Sums of a loss over the examples, for many rays at once, each up to a limit.
//
// A sum is made in float64 of values per example that are accurate to the outputs' dtype, in an
// order that depends on the shape alone. Every value is >= 0, so a partial sum is a lower bound:
// where it exceeds the ray's limit, the rest is not computed, the partial sum is kept, and
// outside is true. A sum with nan among its values is nan, with outside false, unless the limit
// was exceeded before.
#pragma once

#include <cstdint>
#include <span>

namespace fastvol {

struct RaySums {
    std::span<double> sums;         // [k]
    std::span<bool> outside;        // [k]
    std::span<const double> limit;  // [k], or empty for none
    unsigned threads;
};

// log(sum_j exp(outputs[r, i, j])) - outputs[r, i, target[i]], summed over i. outputs[k, n, c] with
// c >= 1, target[n] in [0, c) or ignore_index, which counts as zero.
template <typename Real>
void cross_entropy(std::span<const Real> outputs, std::int64_t c,
                   std::span<const std::int64_t> target, std::int64_t ignore_index,
                   const RaySums& result);

// (outputs[r, i] - target[i])^2, summed over i. outputs[k, m], target[m].
template <typename Real>
void squared_error(std::span<const Real> outputs, std::span<const Real> target,
                   const RaySums& result);

// (1 - target[i]) x + log(1 + exp(-x)) with x = outputs[r, i], summed over i; target in [0, 1].
template <typename Real>
void binary_cross_entropy(std::span<const Real> outputs, std::span<const Real> target,
                          const RaySums& result);

}  // namespace fastvol
