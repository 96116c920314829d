// Gaussian directions made from (seed, stream, vector, coordinate), and points on their rays.
//
// Word j of a block gives u_j = ((word >> 9) + 1/2) 2^-23; coordinates 4b and 4b + 1 are
// sqrt(-2 ln u_0) times the cosine and the sine of 2 pi u_1, the next two come from u_2 and u_3.
// In float64 |dz| <= 1e-14 of that definition, in float32 <= 1e-6. Only basic IEEE operations are
// used, so that a build without contraction makes the same bits on every processor.
#pragma once

#include <cstdint>
#include <span>

namespace fastvol {

// Coordinates are indexed by 32-bit blocks of four.
inline constexpr std::int64_t max_dimension = std::int64_t{1} << 34;

struct Directions {
    std::uint64_t seed;
    std::uint32_t stream;
    std::span<const std::uint64_t> ids;  // [k]
    bool antithetic;                     // ids 2i and 2i + 1 are plus and minus vector i
    std::int64_t dimension;              // d
    std::int64_t first = 0;              // the coordinate that the first column is
};

// Columns are coordinates first ... first + d - 1: any span of a vector, made with the bits of the
// whole.
//
// out[k, d] = scale * z. norm[k] = ||z||, dot[k] = <z, project>, both of the z that was rounded to
// Real, summed in float64 in an order that depends on d and first alone. Empty scale: ones; empty
// project: dot is zero.
template <typename Real>
void normals(const Directions& directions, std::span<const Real> scale,
             std::span<const double> project, unsigned threads, std::span<Real> out,
             std::span<double> norm, std::span<double> dot);

// out[k, d] = theta0 + (coefficient[k] * scale) * z, in the arithmetic of Real.
template <typename Real>
void perturb(const Directions& directions, std::span<const Real> theta0,
             std::span<const double> coefficient, std::span<const Real> scale, unsigned threads,
             std::span<Real> out);

}  // namespace fastvol
