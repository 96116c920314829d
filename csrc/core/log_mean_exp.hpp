// Mean of weights that are known by their logarithms, as a stream.
#pragma once

#include <cstdint>
#include <span>

namespace fastvol {

// Everything is relative to exp(log_max), the largest weight so far.
struct LogMeanExpState {
    std::int64_t count;
    double log_max;  // -inf as long as all weights are zero
    double mean;     // of exp(log_weight - log_max)
    double m2;       // sum of squared deviations of exp(log_weight - log_max) from mean
};

class LogMeanExp {
  public:
    LogMeanExp();
    explicit LogMeanExp(const LogMeanExpState& state) : state_(state) {}

    // log_weights: each < inf, -inf for a weight of zero; not nan.
    void update(std::span<const double> log_weights);
    void merge(const LogMeanExp& other);

    const LogMeanExpState& state() const { return state_; }
    std::int64_t count() const { return state_.count; }
    // nan without weights, -inf where all are zero.
    double log_mean() const;
    // Standard error of log_mean, by the delta method; inf below two weights or where all are zero.
    double stderr_log_mean() const;
    // (sum w)^2 / sum w^2; 0 where all weights are zero.
    double ess() const;
    // max w / sum w; nan where all weights are zero.
    double max_share() const;

  private:
    LogMeanExpState state_;
};

}  // namespace fastvol
