// Matrix tiles of AMX for products of bfloat16: eight tiles of 16 rows of 64 bytes, numbered 0 to 7. Include from
// *_amx_kernel.cpp alone (isa.h).
//
// tile_dpbf16(c, a, b) adds to c [16, 16] of float32 the product of a [16, 32] of bfloat16 and b, 32 rows of 16 given as 16
// rows of pairs: b[k][j] = (row 2k, row 2k + 1) of column j. Numbers of tiles are written out: they are part of instructions.
//
// With DALLE_FAST_EMULATE_AMX the same five operations are computed in plain C++, as Intel's manual defines them, so that what
// is made of them is tested on processors without tiles.
#pragma once

#include "rows.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {

constexpr int64_t kTileRows = 16, kTileBytes = 64;

#if defined(DALLE_FAST_EMULATE_AMX)

struct EmulatedTiles {
  bool configured;
  uint32_t tile[8][kTileRows][kTileBytes / 4];
};
static thread_local EmulatedTiles emulated;

// A tile that an instruction may use; without a configuration the processor refuses it.
static inline uint32_t (*emulated_tile(int tile))[kTileBytes / 4] {
  if (!emulated.configured) __builtin_trap();
  return emulated.tile[tile];
}

static inline void tile_zero(int tile) { memset(emulated_tile(tile), 0, kTileRows * kTileBytes); }

static inline void tile_load(int tile, const void* from, int64_t stride_bytes) {
  for (int64_t row = 0; row < kTileRows; ++row) {
    memcpy(emulated_tile(tile)[row], static_cast<const char*>(from) + row * stride_bytes, kTileBytes);
  }
}

static inline void tile_store(int tile, void* to, int64_t stride_bytes) {
  for (int64_t row = 0; row < kTileRows; ++row) {
    memcpy(static_cast<char*>(to) + row * stride_bytes, emulated_tile(tile)[row], kTileBytes);
  }
}

// TDPBF16PS: sums of even and of odd elements apart, each product fused with its sum, then both together onto c. Denormals
// count as zero going in and coming out, whatever the thread's own mode. The barriers keep the arithmetic in that mode.
static inline void tile_dpbf16(int c, int a, int b) {
  constexpr unsigned kDenormalsAreZero = 0x40, kFlushToZero = 0x8000;
  const unsigned mode = _mm_getcsr();
  _mm_setcsr(mode | kDenormalsAreZero | kFlushToZero);
  asm volatile("" ::: "memory");
  for (int64_t row = 0; row < kTileRows; ++row) {
    Vec even{}, odd{}, sum;
    for (int64_t k = 0; k < kTileRows; ++k) {
      const uint32_t left = emulated_tile(a)[row][k];
      VecU right;
      memcpy(&right, emulated_tile(b)[k], sizeof(right));
      even = multiply_add(broadcast(from_bits(left << 16)), reinterpret_cast<Vec>(right << 16), even);
      odd = multiply_add(broadcast(from_bits(left & 0xFFFF0000)), reinterpret_cast<Vec>(right & 0xFFFF0000), odd);
    }
    memcpy(&sum, emulated_tile(c)[row], sizeof(sum));
    sum = sum + (even + odd);
    memcpy(emulated_tile(c)[row], &sum, sizeof(sum));
  }
  asm volatile("" ::: "memory");
  _mm_setcsr(mode);
}

static inline void configure_tiles() { emulated.configured = true; }
static inline void release_tiles() { emulated.configured = false; }

static inline Halves to_bfloat16(Vec x) {
  Halves halves;
  store_row_vector(reinterpret_cast<BFloat16*>(&halves), x);
  return halves;
}

#else

// GCC's intrinsics read memory without saying so: without this, it may leave out or put off what was written there.
static inline void settle(const void* memory) { asm volatile("" : : "r"(memory) : "memory"); }

#define tile_zero(tile) _tile_zero(tile)
#define tile_load(tile, from, stride_bytes)  \
  do {                                       \
    settle(from);                            \
    _tile_loadd(tile, (from), stride_bytes); \
  } while (0)
#define tile_store(tile, to, stride_bytes) _tile_stored(tile, to, stride_bytes)
#define tile_dpbf16(c, a, b) _tile_dpbf16ps(c, a, b)

static inline void configure_tiles() {
  struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};  // of a row, by tile
    uint8_t rows[16] = {};
  } config;
  static_assert(sizeof(config) == 64, "what LDTILECFG reads");
  for (int tile = 0; tile < 8; ++tile) config.bytes[tile] = kTileBytes, config.rows[tile] = kTileRows;
  settle(&config);
  _tile_loadconfig(&config);
  settle(&config);
}
static inline void release_tiles() { _tile_release(); }

static inline Halves to_bfloat16(Vec x) {
  return reinterpret_cast<Halves>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x)));
}

#endif

static_assert(kWidth == kTileRows, "a vector is a row of a tile");

// Tiles are a thread's for as long as this lives; a thread that holds none is cheaper to switch.
struct HeldTiles {
  HeldTiles() { configure_tiles(); }
  ~HeldTiles() { release_tiles(); }
  HeldTiles(const HeldTiles&) = delete;
};

// Elements of two rows as pairs.
static inline VecU pairs(Halves even, Halves odd) {
  return __builtin_convertvector(even, VecU) | __builtin_convertvector(odd, VecU) << 16;
}

static inline VecU pairs(const BFloat16* even, const BFloat16* odd) {
  Halves rows[2];
  memcpy(&rows[0], even, sizeof(Halves));
  memcpy(&rows[1], odd, sizeof(Halves));
  return pairs(rows[0], rows[1]);
}

constexpr int64_t kSquare = 32;

// c [rows, columns] = a [rows, depth] . b, or that added to c; all three sizes are multiples of kSquare. b is pairs
// [depth / 2, columns]. Strides in elements. Four tiles of sums use each tile of a and of b twice.

template <bool kAdd>
static inline void multiply_on_tiles(const BFloat16* a, int64_t a_stride, const uint32_t* b, int64_t b_stride, int64_t depth,
                                     float* c, int64_t c_stride, int64_t rows, int64_t columns) {
  const int64_t a_bytes = a_stride * 2, b_bytes = b_stride * 4, c_bytes = c_stride * 4;
  for (int64_t column = 0; column < columns; column += kSquare) {
    for (int64_t row = 0; row < rows; row += kSquare) {
      float* c0 = c + row * c_stride + column;
      float* c1 = c0 + kTileRows * c_stride;
      if (kAdd) {
        tile_load(0, c0, c_bytes);
        tile_load(1, c0 + kTileRows, c_bytes);
        tile_load(2, c1, c_bytes);
        tile_load(3, c1 + kTileRows, c_bytes);
      } else {
        tile_zero(0);
        tile_zero(1);
        tile_zero(2);
        tile_zero(3);
      }
      for (int64_t k = 0; k < depth; k += 2 * kTileRows) {
        const BFloat16* left = a + row * a_stride + k;
        const uint32_t* right = b + k / 2 * b_stride + column;
        tile_load(4, left, a_bytes);
        tile_load(6, right, b_bytes);
        tile_load(7, right + kTileRows, b_bytes);
        tile_load(5, left + kTileRows * a_stride, a_bytes);
        tile_dpbf16(0, 4, 6);
        tile_dpbf16(1, 4, 7);
        tile_dpbf16(2, 5, 6);
        tile_dpbf16(3, 5, 7);
      }
      tile_store(0, c0, c_bytes);
      tile_store(1, c0 + kTileRows, c_bytes);
      tile_store(2, c1, c_bytes);
      tile_store(3, c1 + kTileRows, c_bytes);
    }
  }
}

// Operands from float32 [rows, columns] and from rows of bfloat16. Columns are multiples of kWidth.
static inline void pack_rows(const float* from, int64_t stride, int64_t rows, int64_t columns, BFloat16* to) {
  for (int64_t i = 0; i < rows; ++i) {
    for (int64_t j = 0; j < columns; j += kWidth) {
      const Halves halves = to_bfloat16(load(from + i * stride + j));
      memcpy(to + i * stride + j, &halves, sizeof(halves));
    }
  }
}

static inline void pack_pairs(const float* from, int64_t stride, int64_t rows, int64_t columns, uint32_t* to) {
  for (int64_t i = 0; i < rows; i += 2) {
    for (int64_t j = 0; j < columns; j += kWidth) {
      const float* at = from + i * stride + j;
      const VecU both = pairs(to_bfloat16(load(at)), to_bfloat16(load(at + stride)));
      memcpy(to + i / 2 * stride + j, &both, sizeof(both));
    }
  }
}

// to[j][i] = rows[i][j], `count` rows, a multiple of 8. Pairs of rows move as one float.
static inline void transpose_rows(const BFloat16* rows, int64_t count, int64_t columns, BFloat16* to, int64_t to_stride) {
  for (int64_t i = 0; i < count; i += 8) {
    for (int64_t j = 0; j < columns; j += kWidth) {
      float square[4][kWidth];
      for (int64_t pair = 0; pair < 4; ++pair) {
        const BFloat16* row = rows + (i + 2 * pair) * columns + j;
        const VecU both = pairs(row, row + columns);
        memcpy(square[pair], &both, sizeof(both));
      }
      transpose(square[0], kWidth, 4, kWidth, reinterpret_cast<float*>(to + j * to_stride + i), to_stride / 2);
    }
  }
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
