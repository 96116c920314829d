// The inner loops of the noise, on tiles that stay in the first-level cache.
#pragma once

#include <cstdint>
#include <span>

#include "core/philox.hpp"

// Kernels in vector instructions, of which one is chosen at the first call.
#if defined(__x86_64__) && defined(__GNUC__)
#define FASTVOL_X86_KERNELS
#endif

namespace fastvol::kernels {

inline constexpr int tile_blocks = 64;
inline constexpr int tile_size = 4 * tile_blocks;
// Tiles are filled in multiples of this many blocks, so that short vectors do not pay for a tile.
inline constexpr int block_step = 32;
// Independent sums a tile is folded into.
inline constexpr int sum_lanes = 64;

// z[4 * blocks]; blocks is a multiple of block_step, at most tile_blocks.
void fill_tile(const VectorKey& key, std::uint32_t first_block, int blocks, float* z);
void fill_tile(const VectorKey& key, std::uint32_t first_block, int blocks, double* z);

// sums[l] += z[l]^2 + z[l + 64]^2 + ... over a whole tile, and the same with z * weight.
void add_squares(const float* z, double* sums);
void add_squares(const double* z, double* sums);
void add_products(const float* z, const double* weight, double* sums);
void add_products(const double* z, const double* weight, double* sums);

// out = factor * z, out = (factor * scale) * z
void write_scaled(const float* z, float factor, const float* scale, int n, float* out);
void write_scaled(const double* z, double factor, const double* scale, int n, double* out);

// out = theta0 + (factor * scale) * z; scale may be null for ones
void write_perturbed(const float* z, float factor, const float* scale, const float* theta0, int n,
                     float* out);
void write_perturbed(const double* z, double factor, const double* scale, const double* theta0,
                     int n, double* out);

// The versions of the float32 kernels that this processor can run, the fastest first; all give the
// same bits.
struct FloatVersion {
    const char* name;
    void (*fill_tile)(const VectorKey& key, std::uint32_t first_block, int blocks, float* z);
    void (*add_squares)(const float* z, double* sums);
};
std::span<const FloatVersion> float_versions();

#ifdef FASTVOL_X86_KERNELS
void fill_tile_avx512(const VectorKey& key, std::uint32_t first_block, int blocks, float* z);
void fill_tile_avx2(const VectorKey& key, std::uint32_t first_block, int blocks, float* z);
void add_squares_avx2(const float* z, double* sums);
#endif

}  // namespace fastvol::kernels
