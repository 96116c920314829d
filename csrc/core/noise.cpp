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

// Rows that share one vector: a row alone, or an antithetic pair on neighbouring rows.
struct Unit {
    std::size_t row;
    bool pair;
};

std::vector<Unit> units_of(const Directions& directions) {
    const auto ids = directions.ids;
    std::vector<Unit> units;
    units.reserve(ids.size());
    for (std::size_t row = 0; row < ids.size(); ++row) {
        const bool pair =
            directions.antithetic && row + 1 < ids.size() && (ids[row] ^ ids[row + 1]) == 1;
        units.push_back({row, pair});
        if (pair) ++row;
    }
    return units;
}

VectorKey vector_of(const Directions& directions, std::size_t row) {
    const std::uint64_t id = directions.ids[row];
    return {directions.seed, directions.stream, directions.antithetic ? id >> 1 : id};
}

double sign_of(const Directions& directions, std::size_t row) {
    return directions.antithetic && (directions.ids[row] & 1u) != 0 ? -1.0 : 1.0;
}

struct Chunk {
    std::int64_t begin;
    std::int64_t end;
};

std::size_t chunks_per_row(std::int64_t dimension) {
    return static_cast<std::size_t>((dimension + chunk_size - 1) / chunk_size);
}

// Calls body(unit, chunk, index) for all chunks of all units, index counting them row by row.
template <typename Body>
void for_chunks(const std::vector<Unit>& units, std::int64_t dimension, unsigned threads,
                const Body& body) {
    const std::size_t per_row = chunks_per_row(dimension);
    const auto normals = static_cast<std::int64_t>(units.size()) * dimension;
    const std::int64_t useful = std::max<std::int64_t>(normals / normals_per_thread, 1);
    for_ranges(units.size() * per_row,
               static_cast<unsigned>(std::min<std::int64_t>(threads, useful)),
               [&](std::size_t first, std::size_t last) {
                   for (std::size_t index = first; index < last; ++index) {
                       const auto begin = static_cast<std::int64_t>(index % per_row) * chunk_size;
                       body(units[index / per_row],
                            Chunk{begin, std::min(begin + chunk_size, dimension)}, index);
                   }
               });
}

// Coordinates by blocks of four: a span that begins within a block is worked on from the block's
// start, as if it had so many columns more.
int lead_of(const Directions& directions) {
    return static_cast<int>(directions.first % 4);
}

// Entries skip ... n - 1 of a tile stand at column begin + skip of a row with `lead` columns more.
struct Tile {
    std::int64_t begin;
    int n;
    int skip;
    int lead;
    int size() const { return n - skip; }
    std::int64_t column() const { return begin + skip - lead; }
};

std::uint32_t block_of(const Directions& directions, const Tile& tile) {
    return static_cast<std::uint32_t>((directions.first - tile.lead + tile.begin) / 4);
}

// Fills z with the coordinates of a tile; its other entries are zero.
template <typename Real>
void fill_part(const VectorKey& key, std::uint32_t first_block, const Tile& tile,
               std::array<Real, tile_size>& z) {
    constexpr int step = 4 * kernels::block_step;
    const int blocks = (tile.n + step - 1) / step * kernels::block_step;
    kernels::fill_tile(key, first_block, blocks, z.data());
    std::fill(z.begin(), z.begin() + tile.skip, Real{0});
    std::fill(z.begin() + tile.n, z.end(), Real{0});
}

// Calls body(tile) for each tile of a chunk.
template <typename Body>
void for_tiles(const Chunk& chunk, int lead, Body&& body) {
    for (std::int64_t begin = chunk.begin; begin < chunk.end; begin += tile_size) {
        const auto n = static_cast<int>(std::min<std::int64_t>(tile_size, chunk.end - begin));
        body(Tile{begin, n, begin == 0 ? lead : 0, lead});
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

// weight[size] belongs to the entries of the tile that count.
void add_products_of_part(const auto* z, const double* weight, const Tile& tile, Sums& sums) {
    if (tile.size() == tile_size) {
        kernels::add_products(z, weight, sums.data());
        return;
    }
    std::array<double, tile_size> padded{};
    std::copy(weight, weight + tile.size(), padded.begin() + tile.skip);
    kernels::add_products(z, padded.data(), sums.data());
}

}  // namespace

template <typename Real>
void normals(const Directions& directions, std::span<const Real> scale,
             std::span<const double> project, unsigned threads, std::span<Real> out,
             std::span<double> norm, std::span<double> dot) {
    const std::int64_t d = directions.dimension;
    const int lead = lead_of(directions);
    const std::vector<Unit> units = units_of(directions);
    const std::size_t per_row = chunks_per_row(d + lead);
    std::vector<double> squares(units.size() * per_row);
    std::vector<double> products(project.empty() ? 0 : units.size() * per_row);
    for_chunks(
        units, d + lead, threads, [&](const Unit& unit, const Chunk& chunk, std::size_t index) {
            const double sign = sign_of(directions, unit.row);
            Real* row = out.data() + static_cast<std::int64_t>(unit.row) * d;
            const auto factor = static_cast<Real>(sign);
            const VectorKey key = vector_of(directions, unit.row);
            const bool plain = scale.empty() && sign > 0.0;
            alignas(64) std::array<Real, tile_size> buffer;
            Sums square_sums{};
            Sums product_sums{};
            for_tiles(chunk, lead, [&](const Tile& tile) {
                const std::uint32_t block = block_of(directions, tile);
                const std::int64_t column = tile.column();
                const Real* z = buffer.data();
                if (plain && tile.size() == tile_size) {
                    // Nothing is to be done to z: it is made where it belongs.
                    z = row + column;
                    kernels::fill_tile(key, block, kernels::tile_blocks, row + column);
                } else {
                    fill_part(key, block, tile, buffer);
                }
                kernels::add_squares(z, square_sums.data());
                if (!project.empty()) {
                    add_products_of_part(z, project.data() + column, tile, product_sums);
                }
                const Real* tile_scale = scale.empty() ? nullptr : scale.data() + column;
                const int n = tile.size();
                if (z == buffer.data()) {
                    kernels::write_scaled(z + tile.skip, factor, tile_scale, n, row + column);
                }
                if (unit.pair) {
                    kernels::write_scaled(z + tile.skip, -factor, tile_scale, n, row + d + column);
                }
            });
            squares[index] = total(square_sums);
            if (!project.empty()) products[index] = sign * total(product_sums);
        });
    for (std::size_t u = 0; u < units.size(); ++u) {
        double square = 0.0;
        double product = 0.0;
        for (std::size_t index = u * per_row; index < (u + 1) * per_row; ++index) {
            square += squares[index];
            if (!project.empty()) product += products[index];
        }
        const std::size_t row = units[u].row;
        norm[row] = std::sqrt(square);
        dot[row] = product;
        if (units[u].pair) {
            norm[row + 1] = norm[row];
            dot[row + 1] = project.empty() ? 0.0 : -product;
        }
    }
}

template <typename Real>
void perturb(const Directions& directions, std::span<const Real> theta0,
             std::span<const double> coefficient, std::span<const Real> scale, unsigned threads,
             std::span<Real> out) {
    const std::int64_t d = directions.dimension;
    const int lead = lead_of(directions);
    for_chunks(units_of(directions), d + lead, threads,
               [&](const Unit& unit, const Chunk& chunk, std::size_t) {
                   const VectorKey key = vector_of(directions, unit.row);
                   alignas(64) std::array<Real, tile_size> z;
                   for_tiles(chunk, lead, [&](const Tile& tile) {
                       fill_part(key, block_of(directions, tile), tile, z);
                       const std::int64_t column = tile.column();
                       const Real* tile_scale = scale.empty() ? nullptr : scale.data() + column;
                       const std::size_t rows = unit.pair ? 2 : 1;
                       for (std::size_t row = unit.row; row < unit.row + rows; ++row) {
                           const auto factor =
                               static_cast<Real>(sign_of(directions, row) * coefficient[row]);
                           kernels::write_perturbed(
                               z.data() + tile.skip, factor, tile_scale, theta0.data() + column,
                               tile.size(),
                               out.data() + static_cast<std::int64_t>(row) * d + column);
                       }
                   });
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
