// Pieces that the forward and backward kernels of gumbel_codebook share: rows of maps across lanes, codes by blocks, noise.
#pragma once

#include "gumbel_codebook.h"
#include "noise_rows.h"
#include "product.h"
#include "rows.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {

// The rows of a tile. Lanes behind the last row repeat it: their numbers stay finite, and are written nowhere.
struct Lanes {
  int count;
  int64_t first;
  int64_t sample[kTile], y[kTile], x[kTile];

  Lanes() = default;
  Lanes(const GumbelCodebook& op, int64_t tile) : first(tile * kTile) {
    const int64_t left = op.rows() - first, pixels = op.height * op.width;
    count = static_cast<int>(left < kTile ? left : kTile);
    for (int lane = 0; lane < kTile; ++lane) {
      const int64_t pixel = row(lane) % pixels;
      sample[lane] = row(lane) / pixels, y[lane] = pixel / op.width, x[lane] = pixel % op.width;
    }
  }

  int64_t row(int lane) const { return first + (lane < count ? lane : count - 1); }
};

// Where these rows of a tensor lie: channel c of a lane at offset[lane] + c * stride.
struct Places {
  int64_t offset[kTile], stride;
  bool adjacent;  // whole vectors may be read and written

  Places(const Maps& maps, const Lanes& lanes) : stride(maps.stride_c), adjacent(true) {
    for (int lane = 0; lane < kTile; ++lane) {
      offset[lane] = lanes.sample[lane] * maps.stride_b + lanes.y[lane] * maps.stride_y + lanes.x[lane] * maps.stride_x;
      adjacent = adjacent && offset[lane] == offset[0] + lane;
    }
  }

  // columns [channels, kTile].
  template <class T>
  void read(const T* from, int64_t channels, float* columns) const {
    if (adjacent) {
      for (int64_t c = 0; c < channels; ++c) load_row(from + offset[0] + c * stride, kTile, kTile, columns + c * kTile);
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        for (int lane = 0; lane < kTile; ++lane) columns[c * kTile + lane] = widen(from[offset[lane] + c * stride]);
      }
    }
  }

  template <class T>
  void write(T* to, int count, int64_t channels, const float* columns) const {
    if (adjacent) {
      for (int64_t c = 0; c < channels; ++c) store_row(to + offset[0] + c * stride, kTile, columns + c * kTile);
    } else {
      for (int64_t c = 0; c < channels; ++c) {
        for (int lane = 0; lane < count; ++lane) narrow(columns[c * kTile + lane], to[offset[lane] + c * stride]);
      }
    }
  }
};

// Zeros up to a multiple of 16 channels.
static inline void read_columns(const GumbelCodebook& op, const Maps& maps, const Lanes& lanes, int64_t channels, float* to) {
  const Places places(maps, lanes);
  with_elements(op.element, maps.data, [&](auto* data) { places.read(data, channels, to); });
  clear(to + channels * kTile, (padded(channels) - channels) * kTile);
}

static inline void write_columns(const GumbelCodebook& op, const Maps& maps, const Lanes& lanes, int64_t channels,
                                 const float* from) {
  const Places places(maps, lanes);
  with_elements(op.element, maps.data, [&](auto* data) { places.write(data, lanes.count, channels, from); });
}

static inline int64_t codes_in_block(const GumbelCodebook& op, int64_t first) {
  return op.codes - first < kBlock ? op.codes - first : kBlock;
}

// Rows first .. first + count - 1 of [codes, channels], as floats, zeros up to kBlock rows and to multiples of 16 channels.
static inline void read_codes(const GumbelCodebook& op, const void* matrix, int64_t channels, int64_t first, int64_t count,
                              float* to) {
  const int64_t width = padded(channels);
  with_elements(op.element, const_cast<void*>(matrix), [&](auto* data) {
    for (int64_t i = 0; i < count; ++i) load_row(data + (first + i) * channels, channels, width, to + i * width);
  });
  clear(to + count * width, (kBlock + kSpareRows - count) * width);
}

static inline void read_bias(const GumbelCodebook& op, int64_t first, int64_t count, float* to) {
  clear(to, kBlock);
  if (op.bias == nullptr) return;
  with_elements(op.element, const_cast<void*>(op.bias), [&](auto* data) { load_row(data + first, count, kBlock, to); });
}

// Noise of codes first .. first + count - 1 (first a multiple of 4) for the rows of a tile, drawn or as given: [count, kTile].
static inline void read_noise(const GumbelCodebook& op, const Lanes& lanes, int64_t first, int64_t count, float* noise) {
  if (op.noise.data == nullptr) {
    alignas(64) uint32_t position[kTile];
    for (int lane = 0; lane < kTile; ++lane) position[lane] = static_cast<uint32_t>(op.first_row + lanes.row(lane));
    gumbel_rows(op.seed, op.stream, position, kTile, first, count, noise);
  } else {
    const Places places(op.noise, lanes);
    places.read(static_cast<const float*>(op.noise.data) + first * places.stride, count, noise);
  }
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
