// Checks that count their failures and go on.
#pragma once

#include <cmath>
#include <cstdio>

namespace fastvol::tests {

inline int failures = 0;

inline void check(bool passed, const char* text, const char* file, int line) {
    if (passed) return;
    ++failures;
    std::fprintf(stderr, "%s:%d: %s\n", file, line, text);
}

inline void check_near(double got, double wanted, double tolerance, const char* text,
                       const char* file, int line) {
    if (got == wanted || std::abs(got - wanted) <= tolerance) return;
    ++failures;
    std::fprintf(stderr, "%s:%d: %s is %.17g, not %.17g within %g\n", file, line, text, got, wanted,
                 tolerance);
}

}  // namespace fastvol::tests

#define CHECK(condition) ::fastvol::tests::check((condition), #condition, __FILE__, __LINE__)
#define CHECK_NEAR(got, wanted, tolerance) \
    ::fastvol::tests::check_near((got), (wanted), (tolerance), #got, __FILE__, __LINE__)
