#include "core/ray_search.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

namespace fastvol {
namespace {

constexpr double nan = std::numeric_limits<double>::quiet_NaN();

// log excess over log gap: a straight line in x for a homogeneous excess loss.
double log_scale(const SearchOptions& options, double loss) {
    return std::log(loss - options.loss0) - std::log(options.threshold - options.loss0);
}

bool on_log_scale(const SearchOptions& options, double loss) {
    return loss > options.loss0 && options.threshold > options.loss0;
}

double linear_scale(const SearchOptions& options, double loss) {
    return loss - options.threshold;
}

}  // namespace

void RaySearch::begin(const SearchOptions& options, SearchMode mode, double start) {
    *this = RaySearch{};
    if (mode == SearchMode::scan) {
        phase_ = Phase::scan;
        known_x_ = start;
        x_ = start - options.scan_span;
    } else {
        phase_ = Phase::bracket;
        x_ = std::min(start, options.log_cap);
    }
}

void RaySearch::advance(const SearchOptions& options, double loss, bool outside) {
    ++evaluations_;
    const bool interpolable = std::isfinite(loss) && !outside;
    const bool inside = interpolable && loss <= options.threshold;
    newest_is_inside_ = inside;
    Point& side = inside ? inside_ : outside_;
    if (phase_ != Phase::scan) third_ = side;
    side = {x_, loss, interpolable, true};

    if (phase_ == Phase::scan && inside) {
        advance_scan(options);
    } else if (phase_ == Phase::refine) {
        ++guard_steps_;
        refine(options);
    } else {
        if (phase_ == Phase::scan) reentrant_ = true;
        phase_ = Phase::bracket;
        if (inside_.known && outside_.known) {
            enter_refine();
            refine(options);
        } else {
            bracket(options, inside);
        }
    }
    if (!settled() && evaluations_ >= options.max_evaluations) {
        settle(inside_.known ? inside_.x : side.x, Status::failed);
    }
}

void RaySearch::advance_scan(const SearchOptions& options) {
    ++scan_index_;
    if (scan_index_ >= options.scan_points) {
        settle(known_x_, Status::converged);
        return;
    }
    x_ = known_x_ - options.scan_span +
         static_cast<double>(scan_index_) / options.scan_points * options.scan_span;
}

void RaySearch::bracket(const SearchOptions& options, bool outward) {
    if (outward && x_ >= options.log_cap) {
        settle(options.log_cap, Status::unbounded);
        return;
    }
    const Point& point = outward ? inside_ : outside_;
    const auto log_excess = [&](const Point& p) {
        return p.known && p.interpolable && on_log_scale(options, p.loss)
                   ? log_scale(options, p.loss)
                   : nan;
    };
    const double f = log_excess(point);
    double step = std::numbers::ln2;
    if (std::isfinite(f)) {
        // A little too far is better than a little too near: it ends the bracketing.
        const double delta = std::max(2.0 * options.xtol, 0.01);
        const double secant = (f - log_excess(third_)) / (point.x - third_.x);
        const double slope = std::isfinite(secant) && secant > 0.0
                                 ? std::clamp(secant, options.slope / 4.0, options.slope * 4.0)
                                 : options.slope;
        step = 1.25 * std::abs(f) / slope + delta;
    }
    step = std::min(std::max(step, 2.0 * last_step_), std::numbers::ln2);
    last_step_ = step;
    x_ = outward ? std::min(x_ + step, options.log_cap) : x_ - step;
}

void RaySearch::enter_refine() {
    phase_ = Phase::refine;
    third_ = Point{};
    guard_width_ = outside_.x - inside_.x;
    guard_steps_ = 0;
}

void RaySearch::refine(const SearchOptions& options) {
    const double width = outside_.x - inside_.x;
    const double middle = inside_.x + 0.5 * width;

    double root = middle;
    if (outside_.interpolable) {
        const bool log =
            on_log_scale(options, inside_.loss) && on_log_scale(options, outside_.loss);
        const auto scale = log ? log_scale : linear_scale;
        const double f_inside = scale(options, inside_.loss);
        const double f_outside = scale(options, outside_.loss);
        const double secant = inside_.x + width * (f_inside / (f_inside - f_outside));
        if (std::isfinite(secant)) root = std::clamp(secant, inside_.x, outside_.x);
    }

    double next = trial(options, root, middle);
    if (guard_steps_ >= 3) {
        if (width > 0.5 * guard_width_) next = middle;
        guard_width_ = width;
        guard_steps_ = 0;
    }
    const double margin = std::min(0.9 * options.xtol, 0.5 * width);
    next = std::min(std::max(next, inside_.x + margin), outside_.x - margin);

    const bool stuck = next <= inside_.x || next >= outside_.x;
    if (width <= options.xtol || stuck) {
        settle(root, std::isfinite(outside_.loss) ? Status::converged : Status::nonfinite);
        return;
    }
    x_ = next;
}

double RaySearch::trial(const SearchOptions& options, double root, double middle) const {
    if (!outside_.interpolable) return middle;
    if (!third_.known) return root;
    if (!third_.interpolable) return middle;
    const Point& newest = newest_is_inside_ ? inside_ : outside_;
    const Point& other = newest_is_inside_ ? outside_ : inside_;
    const bool log = on_log_scale(options, newest.loss) && on_log_scale(options, other.loss) &&
                     on_log_scale(options, third_.loss);
    const auto scale = log ? log_scale : linear_scale;
    const double a = newest.x;
    const double b = other.x;
    const double c = third_.x;
    const double fa = scale(options, newest.loss);
    const double fb = scale(options, other.loss);
    const double fc = scale(options, third_.loss);
    const double xi = (a - b) / (c - b);
    const double phi = (fa - fb) / (fc - fb);
    const bool monotone = phi * phi < xi && (1.0 - phi) * (1.0 - phi) < 1.0 - xi;
    if (!monotone) return middle;
    const double t =
        fa / (fb - fa) * (fc / (fb - fc)) + (c - a) / (b - a) * (fa / (fc - fa)) * (fb / (fc - fb));
    const double x = a + t * (b - a);
    return std::isfinite(x) ? x : middle;
}

void RaySearch::settle(double x, Status status) {
    phase_ = Phase::settled;
    x_ = x;
    status_ = status;
}

}  // namespace fastvol
