// The inner loops of the losses.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastvol::kernels {

// Rows that are treated side by side, and the most classes for which that is done: their columns
// fill the first-level cache.
inline constexpr std::size_t loss_rows = 64;
template <typename Real>
inline constexpr std::size_t few_classes = 448 / sizeof(Real);

// losses[i] = log(exp(chosen[i]) + sum_j exp(columns[j, i])) - chosen[i], columns[c, loss_rows]:
// the logits of the target and of the other classes, where -inf stands for the target.
void cross_entropy_of_columns(const float* columns, const float* chosen, int c, float* losses);
void cross_entropy_of_columns(const double* columns, const double* chosen, int c, double* losses);

// losses[i] = log(sum_j exp(outputs[i, j])) - outputs[i, target[i]] for the n <= loss_rows rows of
// outputs[n, c], c >= 32; of losses[loss_rows], those of ignored rows and the entries from
// n on are 0.
void cross_entropy_of_rows(const float* outputs, std::size_t c, const std::int64_t* target,
                           std::size_t n, std::int64_t ignore_index, float* losses);
void cross_entropy_of_rows(const double* outputs, std::size_t c, const std::int64_t* target,
                           std::size_t n, std::int64_t ignore_index, double* losses);

// The sum of losses[loss_rows], in float64.
double sum_of_rows(const float* losses);
double sum_of_rows(const double* losses);

// sum_i (x[i] - t[i])^2
double sum_squared_error(const float* x, const float* t, std::size_t n);
double sum_squared_error(const double* x, const double* t, std::size_t n);

// sum_i (1 - t[i]) x[i] + log(1 + exp(-x[i]))
double sum_binary_cross_entropy(const float* x, const float* t, std::size_t n);
double sum_binary_cross_entropy(const double* x, const double* t, std::size_t n);

}  // namespace fastvol::kernels
