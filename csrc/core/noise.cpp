#include "core/noise.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <vector>

#include "core/noise_kernels.hpp"
#include "core/parallel.hpp"

namespace fastvol {
namespace {

using kernels::tile_size;

// A unit of work and of summation: large enough to be worth a thread, the same for any number of
// threads.
constexpr std::int64_t chunk_size = 64 * tile_size;
// Starting a thread costs about as much as this many normals.
constexpr std::int64_t normals_per_thread = 250'000;

struct Chunk {
    std::size_t row;
    std::int64_t begin;
    std::int64_t end;
};

struct Chunks {
    std::size_t rows;
    std::size_t per_row;
    std::int64_t dimension;

    Chunks(std::size_t k, std::int64_t d)
        : rows(k),
          per_row(static_cast<std::size_t>((d + chunk_size - 1) / chunk_size)),
          dimension(d) {}

    std::size_t count() const { return rows * per_row; }

    Chunk operator[](std::size_t index) const {
        const auto begin = static_cast<std::int64_t>(index % per_row) * chunk_size;
        return {index / per_row, begin, std::min(begin + chunk_size, dimension)};
    }

    unsigned threads(unsigned wanted) const {
        const auto total = static_cast<std::int64_t>(rows) * dimension;
        return static_cast<unsigned>(
            std::min<std::int64_t>(wanted, std::max<std::int64_t>(total / normals_per_thread, 1)));
    }
};

VectorKey vector_of(const Directions& directions, std::size_t row) {
    const std::uint64_t id = directions.ids[row];
    return {directions.seed, directions.stream, directions.antithetic ? id >> 1 : id};
}

double sign_of(const Directions& directions, std::size_t row) {
    return directions.antithetic && (directions.ids[row] & 1u) != 0 ? -1.0 : 1.0;
}

// Calls body(z, begin, n) for each tile of a chunk; entries of z from n on are zero.
template <typename Real, typename Body>
void for_tiles(const VectorKey& key, const Chunk& chunk, Body&& body) {
    alignas(64) std::array<Real, tile_size> z;
    for (std::int64_t begin = chunk.begin; begin < chunk.end; begin += tile_size) {
        const auto n = static_cast<int>(std::min<std::int64_t>(tile_size, chunk.end - begin));
        const int blocks = std::min((n + 4 * kernels::block_step - 1) / (4 * kernels::block_step) *
                                        kernels::block_step,
                                    kernels::tile_blocks);
        kernels::fill_tile(key, static_cast<std::uint32_t>(begin / 4), blocks, z.data());
        std::fill(z.begin() + n, z.end(), Real{0});
        body(z.data(), begin, n);
    }
}

using Sums = std::array<double, kernels::sum_lanes>;

double total(const Sums& sums) {
    Sums folded = sums;
    for (std::size_t width = folded.size() / 2; width > 0; width /= 2) {
        for (std::size_t i = 0; i < width; ++i) folded[i] += folded[i + width];
    }
    return folded[0];
}

void add_products_of_part(const auto* z, const double* weight, int n, Sums& sums) {
    if (n == tile_size) {
        kernels::add_products(z, weight, sums.data());
        return;
    }
    std::array<double, tile_size> padded{};
    std::copy(weight, weight + n, padded.begin());
    kernels::add_products(z, padded.data(), sums.data());
}

}  // namespace

template <typename Real>
void normals(const Directions& directions, std::span<const Real> scale,
             std::span<const double> project, unsigned threads, std::span<Real> out,
             std::span<double> norm, std::span<double> dot) {
    const Chunks chunks(directions.ids.size(), directions.dimension);
    std::vector<double> squares(chunks.count());
    std::vector<double> products(project.empty() ? 0 : chunks.count());
    for_ranges(chunks.count(), chunks.threads(threads), [&](std::size_t first, std::size_t last) {
        for (std::size_t index = first; index < last; ++index) {
            const Chunk chunk = chunks[index];
            const double sign = sign_of(directions, chunk.row);
            Real* row = out.data() + static_cast<std::int64_t>(chunk.row) * directions.dimension;
            Sums square_sums{};
            Sums product_sums{};
            for_tiles<Real>(vector_of(directions, chunk.row), chunk,
                            [&](const Real* z, std::int64_t begin, int n) {
                kernels::add_squares(z, square_sums.data());
                if (!project.empty()) {
                    add_products_of_part(z, project.data() + begin, n, product_sums);
                }
                kernels::write_scaled(z, static_cast<Real>(sign),
                                      scale.empty() ? nullptr : scale.data() + begin, n,
                                      row + begin);
            });
            squares[index] = total(square_sums);
            if (!project.empty()) products[index] = sign * total(product_sums);
        }
    });
    for (std::size_t row = 0; row < chunks.rows; ++row) {
        double square = 0.0;
        double product = 0.0;
        for (std::size_t index = row * chunks.per_row; index < (row + 1) * chunks.per_row;
             ++index) {
            square += squares[index];
            if (!project.empty()) product += products[index];
        }
        norm[row] = std::sqrt(square);
        dot[row] = product;
    }
}

template <typename Real>
void perturb(const Directions& directions, std::span<const Real> theta0,
             std::span<const double> coefficient, std::span<const Real> scale, unsigned threads,
             std::span<Real> out) {
    const Chunks chunks(directions.ids.size(), directions.dimension);
    for_ranges(chunks.count(), chunks.threads(threads), [&](std::size_t first, std::size_t last) {
        for (std::size_t index = first; index < last; ++index) {
            const Chunk chunk = chunks[index];
            const auto factor =
                static_cast<Real>(sign_of(directions, chunk.row) * coefficient[chunk.row]);
            Real* row = out.data() + static_cast<std::int64_t>(chunk.row) * directions.dimension;
            for_tiles<Real>(vector_of(directions, chunk.row), chunk,
                            [&](const Real* z, std::int64_t begin, int n) {
                kernels::write_perturbed(z, factor, scale.empty() ? nullptr : scale.data() + begin,
                                         theta0.data() + begin, n, row + begin);
            });
        }
    });
}

template void normals<float>(const Directions&, std::span<const float>, std::span<const double>,
                             unsigned, std::span<float>, std::span<double>, std::span<double>);
template void normals<double>(const Directions&, std::span<const double>, std::span<const double>,
                              unsigned, std::span<double>, std::span<double>, std::span<double>);
template void perturb<float>(const Directions&, std::span<const float>, std::span<const double>,
                             std::span<const float>, unsigned, std::span<float>);
template void perturb<double>(const Directions&, std::span<const double>, std::span<const double>,
                              std::span<const double>, unsigned, std::span<double>);

}  // namespace fastvol
