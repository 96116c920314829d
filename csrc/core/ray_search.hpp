// The search along one ray for the radius where the loss first exceeds the threshold.
//
// x is the logarithm of a radius. A point is inside where the loss is finite and at most the
// threshold and the engine did not flag it as outside. The search brackets by steps of at most a
// factor of 2, then closes the bracket by the method of Chandrupatla, "A new hybrid
// quadratic/bisection algorithm for finding the zero of a nonlinear function without using
// derivatives" (Adv. Eng. Softw. 28, 1997), started with a secant step instead of a bisection.
#pragma once

#include <cstdint>

namespace fastvol {

enum class Status : std::uint8_t {
    converged = 0,
    unbounded = 1,  // inside up to the cap
    nonfinite = 2,  // bounded by a loss that is not finite
    failed = 3,     // out of evaluations: the largest radius known to be inside
};

enum class SearchMode {
    search,  // from a start radius to the crossing
    scan,    // from inside to a known radius, in search of an earlier crossing
};

struct SearchOptions {
    double loss0;                           // loss at the centre of the ray
    double threshold;                       // >= loss0
    double xtol;                            // width of the final bracket in log radius, > 0
    double log_cap;                         // inside up to here is unbounded
    double slope;                           // typical d log(excess loss) / d log(radius), > 0
    int max_evaluations = 200;              // a search that has spent them fails
    double scan_span = 2.0794415416798357;  // a scan starts this far below the known log radius
    int scan_points = 32;
};

class RaySearch {
  public:
    void begin(const SearchOptions& options, SearchMode mode, double start);

    // The log radius whose loss is wanted next; once settled, the result.
    double x() const { return x_; }
    bool settled() const { return phase_ == Phase::settled; }
    Status status() const { return status_; }
    std::int32_t evaluations() const { return evaluations_; }
    bool reentrant() const { return reentrant_; }

    // Takes the loss at x(). outside: the loss is only a lower bound, already above the threshold.
    void advance(const SearchOptions& options, double loss, bool outside);

  private:
    enum class Phase : std::uint8_t { scan, bracket, refine, settled };

    struct Point {
        double x = 0.0;
        double loss = 0.0;
        bool interpolable = false;
        bool known = false;
    };

    void advance_scan(const SearchOptions& options);
    void bracket(const SearchOptions& options, bool outward);
    void enter_refine();
    void refine(const SearchOptions& options);
    double trial(const SearchOptions& options, double root, double middle) const;
    void settle(double x, Status status);

    Point inside_;
    Point outside_;
    // While bracketing the previous point on the same side, while refining the displaced end.
    Point third_;
    bool newest_is_inside_ = false;
    double x_ = 0.0;
    double last_step_ = 0.0;
    double guard_width_ = 0.0;
    int guard_steps_ = 0;
    double known_x_ = 0.0;
    int scan_index_ = 0;
    Phase phase_ = Phase::settled;
    Status status_ = Status::failed;
    std::int32_t evaluations_ = 0;
    bool reentrant_ = false;
};

}  // namespace fastvol
