#include <cstdio>

#include "tests/check.hpp"

namespace fastvol::tests {
void test_noise();
void test_rounds();
void test_search();
void test_radial();
void test_log_mean_exp();
void test_losses();
}  // namespace fastvol::tests

int main() {
    using namespace fastvol::tests;
    test_noise();
    test_rounds();
    test_search();
    test_radial();
    test_log_mean_exp();
    test_losses();
    if (failures > 0) std::fprintf(stderr, "%d checks failed\n", failures);
    return failures > 0 ? 1 : 0;
}
