#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <numbers>
#include <vector>

#include "core/noise.hpp"
#include "core/noise_kernels.hpp"
#include "core/philox.hpp"
#include "tests/check.hpp"

namespace fastvol::tests {
namespace {

// The published known answers of Random123's philox4x32_10.
void known_answers() {
    CHECK(
        (philox({0, 0, 0}, 0) == PhiloxWords{0x6627e8d5u, 0xe169c58du, 0xbc57ac4cu, 0x9b00dbd8u}));
    constexpr std::uint64_t ones = std::numeric_limits<std::uint64_t>::max();
    CHECK((philox({ones, 0xffffffffu, ones}, 0xffffffffu) ==
           PhiloxWords{0x408f276du, 0x41c83b0eu, 0xa20bc7c6u, 0x6d5451fdu}));
    CHECK((philox({0x299f31d0a4093822u, 0x85a308d3u, 0x0370734413198a2eu}, 0x243f6a88u) ==
           PhiloxWords{0xd16cfe09u, 0x94fdccebu, 0x5001e420u, 0x24126ea1u}));
}

double definition(const VectorKey& key, std::int64_t coordinate) {
    const PhiloxWords words = philox(key, static_cast<std::uint32_t>(coordinate / 4));
    const auto uniform = [&](std::size_t j) {
        return (static_cast<double>(words[j] >> 9) + 0.5) * 0x1p-23;
    };
    const std::size_t pair = coordinate % 4 < 2 ? 0 : 2;
    const double radius = std::sqrt(-2.0 * std::log(uniform(pair)));
    const double angle = 2.0 * std::numbers::pi * uniform(pair + 1);
    return radius * (coordinate % 2 == 0 ? std::cos(angle) : std::sin(angle));
}

template <typename Real>
void matches_definition(double tolerance) {
    const std::vector<std::uint64_t> ids{7, std::uint64_t{1} << 40, 0};
    for (const std::int64_t d : {1, 2, 3, 5, 63, 64, 65, 255, 256, 257, 1000, 16384, 16385}) {
        // Odd lengths are spans from the middle of a block of a longer vector.
        const std::int64_t first = d % 2 == 0 ? 0 : 3 * d + 2;
        const Directions directions{42, 1, ids, false, d, first};
        const auto size = ids.size() * static_cast<std::size_t>(d);
        std::vector<Real> out(size, std::numeric_limits<Real>::quiet_NaN());
        std::vector<double> norm(ids.size());
        std::vector<double> dot(ids.size());
        std::vector<double> project(static_cast<std::size_t>(d), 0.5);
        normals<Real>(directions, {}, project, 1, out, norm, dot);
        for (std::size_t row = 0; row < ids.size(); ++row) {
            double square = 0.0;
            double sum = 0.0;
            for (std::int64_t i = 0; i < d; ++i) {
                const auto z = static_cast<double>(
                    out[row * static_cast<std::size_t>(d) + static_cast<std::size_t>(i)]);
                CHECK_NEAR(z, definition({42, 1, ids[row]}, first + i), tolerance);
                square += z * z;
                sum += z;
            }
            CHECK_NEAR(norm[row], std::sqrt(square), 1e-12 * std::sqrt(square));
            CHECK_NEAR(dot[row], 0.5 * sum, 1e-11);
        }
    }
}

template <typename Real>
void threads_change_nothing() {
    constexpr std::int64_t d = 150'001;
    const std::vector<std::uint64_t> ids{0, 1, 2, 5, 4, 9, 8};
    const Directions directions{3, 0, ids, true, d};
    const std::vector<Real> scale(d, Real{0.3f});
    const std::vector<Real> theta0(d, Real{1.5f});
    const std::vector<double> coefficient{1.0, 1.0, 0.0, -2.0, 3.0, 0.1, 0.1};
    const std::vector<double> project(d, 1.0);
    std::vector<std::vector<Real>> outs;
    std::vector<std::vector<double>> sums;
    for (const unsigned threads : {1u, 2u, 5u}) {
        std::vector<Real> out(ids.size() * d);
        std::vector<Real> moved(ids.size() * d);
        std::vector<double> norm(ids.size());
        std::vector<double> dot(ids.size());
        normals<Real>(directions, scale, project, threads, out, norm, dot);
        perturb<Real>(directions, theta0, coefficient, scale, threads, moved);
        CHECK(out[0] == -out[d]);
        CHECK(norm[0] == norm[1] && dot[0] == -dot[1]);
        CHECK(moved[0] == theta0[0] + out[0]);
        CHECK(moved[2 * d] == theta0[0]);
        norm.insert(norm.end(), dot.begin(), dot.end());
        out.insert(out.end(), moved.begin(), moved.end());
        outs.push_back(out);
        sums.push_back(norm);
    }
    CHECK(outs[0] == outs[1] && outs[0] == outs[2]);
    CHECK(sums[0] == sums[1] && sums[0] == sums[2]);
}

// Bit for bit, so that a direction does not depend on the processor.
void versions_agree() {
    using namespace kernels;
    const auto versions = float_versions();
    const FloatVersion& plain = versions.back();
    for (const VectorKey& key :
         {VectorKey{0, 0, 0}, VectorKey{~std::uint64_t{0}, 7, 1},
          VectorKey{0x299f31d0a4093822u, 0x85a308d3u, 0x0370734413198a2eu}}) {
        for (std::uint32_t tile = 0; tile < 500; ++tile) {
            // The last tiles run over the end of the counter.
            const std::uint32_t first = 0u - 32u - static_cast<std::uint32_t>(tile_blocks) * tile;
            const int blocks = tile % 2 == 0 ? tile_blocks : block_step;
            float wanted[tile_size] = {};
            double wanted_sums[sum_lanes] = {0.25, 1e-9};
            plain.fill_tile(key, first, blocks, wanted);
            plain.add_squares(wanted, wanted_sums);
            for (const FloatVersion& version : versions) {
                float z[tile_size] = {};
                double sums[sum_lanes] = {0.25, 1e-9};
                version.fill_tile(key, first, blocks, z);
                version.add_squares(z, sums);
                int differing = 0;
                for (int i = 0; i < tile_size; ++i) {
                    differing += std::bit_cast<std::uint32_t>(z[i]) !=
                                 std::bit_cast<std::uint32_t>(wanted[i]);
                }
                for (int l = 0; l < sum_lanes; ++l) differing += sums[l] != wanted_sums[l];
                CHECK(differing == 0);
            }
        }
    }
}

}  // namespace

void test_noise() {
    known_answers();
    matches_definition<float>(1e-6);
    matches_definition<double>(1e-14);
    versions_agree();
    threads_change_nothing<float>();
    threads_change_nothing<double>();
}

}  // namespace fastvol::tests
