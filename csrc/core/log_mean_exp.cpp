#include "core/log_mean_exp.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

namespace fastvol {
namespace {

constexpr double inf = std::numeric_limits<double>::infinity();
constexpr double nan = std::numeric_limits<double>::quiet_NaN();
// Weights are folded in batches: one division a batch, and exact enough sums within it.
constexpr std::size_t batch = 4096;

LogMeanExpState summarise(std::span<const double> log_weights) {
    const auto n = static_cast<double>(log_weights.size());
    const double log_max = *std::max_element(log_weights.begin(), log_weights.end());
    const auto count = static_cast<std::int64_t>(log_weights.size());
    if (log_max == -inf) return {count, -inf, 0.0, 0.0};
    double sum = 0.0;
    for (const double w : log_weights) sum += std::exp(w - log_max);
    const double mean = sum / n;
    double m2 = 0.0;
    for (const double w : log_weights) {
        const double deviation = std::exp(w - log_max) - mean;
        m2 += deviation * deviation;
    }
    return {count, log_max, mean, m2};
}

LogMeanExpState rescaled(const LogMeanExpState& s, double log_max) {
    if (s.log_max == log_max || s.log_max == -inf) return {s.count, log_max, s.mean, s.m2};
    const double factor = std::exp(s.log_max - log_max);
    return {s.count, log_max, s.mean * factor, s.m2 * factor * factor};
}

// Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample
// variances" (1979).
LogMeanExpState merged(const LogMeanExpState& left, const LogMeanExpState& right) {
    if (left.count == 0) return right;
    if (right.count == 0) return left;
    const double log_max = std::max(left.log_max, right.log_max);
    const LogMeanExpState a = rescaled(left, log_max);
    const LogMeanExpState b = rescaled(right, log_max);
    const auto na = static_cast<double>(a.count);
    const auto nb = static_cast<double>(b.count);
    const double n = na + nb;
    const double difference = b.mean - a.mean;
    return {a.count + b.count, log_max, (na * a.mean + nb * b.mean) / n,
            a.m2 + b.m2 + difference * difference * (na * nb / n)};
}

}  // namespace

LogMeanExp::LogMeanExp() : state_{0, -inf, 0.0, 0.0} {}

void LogMeanExp::update(std::span<const double> log_weights) {
    while (!log_weights.empty()) {
        const std::size_t n = std::min(batch, log_weights.size());
        state_ = merged(state_, summarise(log_weights.first(n)));
        log_weights = log_weights.subspan(n);
    }
}

void LogMeanExp::merge(const LogMeanExp& other) {
    state_ = merged(state_, other.state_);
}

double LogMeanExp::log_mean() const {
    if (state_.count == 0) return nan;
    return state_.log_max == -inf ? -inf : state_.log_max + std::log(state_.mean);
}

double LogMeanExp::stderr_log_mean() const {
    if (state_.count < 2 || state_.log_max == -inf) return inf;
    const auto n = static_cast<double>(state_.count);
    return std::sqrt(state_.m2 / (n * (n - 1.0))) / state_.mean;
}

double LogMeanExp::ess() const {
    if (state_.log_max == -inf) return 0.0;
    const auto n = static_cast<double>(state_.count);
    return n / (1.0 + state_.m2 / (n * state_.mean * state_.mean));
}

double LogMeanExp::max_share() const {
    if (state_.log_max == -inf) return nan;
    return 1.0 / (static_cast<double>(state_.count) * state_.mean);
}

}  // namespace fastvol
