// A panel of int8 weights times rows rounded to int16: integer products, whose sums are exact in any order. Include from
// *_kernel.cpp alone (isa.h).
//
//     y = sum over chunks of (sum over the chunk's k of w_k n_k) * (w's scale * x's factor)        x_k = n_k factor, |n_k| <= 32767
//
// A chunk of 128 products stays below 127 * 32767 * 128 < 2^30. Rounding x costs 2^-16 of the chunk's largest number, far less than
// rounding weights did; sums of integers take half the instructions of float32 ones, where they would be widened first.
#pragma once

#include "packed_panel.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {

typedef int16_t VecS __attribute__((vector_size(4 * kWidth)));  // pairs of rows k and k + 1, kWidth columns

// Rows as integers; a row's factors, one a chunk.
struct RoundedRows {
  int16_t* numbers;
  int64_t stride;
  float* factors;
  int64_t chunks;

  // Behind the totals in a product's scratch.
  RoundedRows(const PackedProduct& op, float* scratch)
      : stride(rounded_stride(op.matrix->depth)), chunks(chunks_of(op.matrix->depth)) {
    factors = scratch + op.rows * kPanel;
    numbers = reinterpret_cast<int16_t*>(factors + (op.rows * chunks + 15) / 16 * 16);
  }
};

static inline VecS widen_pairs(const int8_t* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecS>(_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
#elif defined(__AVX2__)
  return reinterpret_cast<VecS>(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#else
  typedef int8_t Bytes __attribute__((vector_size(2 * kWidth)));
  Bytes bytes;
  memcpy(&bytes, from, sizeof(bytes));
  return __builtin_convertvector(bytes, VecS);
#endif
}

// sum + the products of a pair, added up.
template <bool kFused>
static inline VecI add_pairs(VecS a, VecS b, VecI sum) {
#if defined(__AVX512F__)
  if (kFused) {
    // The processor has it (the caller asked), the instruction set of this file need not.
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
  return sum + reinterpret_cast<VecI>(_mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return sum + reinterpret_cast<VecI>(_mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return sum + reinterpret_cast<VecI>(_mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  for (int i = 0; i < kWidth; ++i) sum[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
  return sum;
#endif
}

static inline bool fuses_pairs() {
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

// x is padded with zeros to a multiple of 16, and so are the numbers.
static inline void round_row(const float* x, int64_t depth, int16_t* numbers, float* factors) {
  constexpr float kMost = 32767.0f;
  typedef int16_t Shorts __attribute__((vector_size(2 * kWidth)));
  for (int64_t first = 0; first < depth; first += kChunk) {
    const int64_t last = depth - first < kChunk ? (depth + 15) / 16 * 16 : first + kChunk;
    Vec sizes{};
    for (int64_t k = first; k < last; k += kWidth) {
      sizes = larger(sizes, reinterpret_cast<Vec>(reinterpret_cast<VecI>(load(x + k)) & 0x7FFFFFFF));
    }
    const float largest = max_of_lanes(sizes), inverse = largest > 0.0f ? kMost / largest : 0.0f;
    factors[first / kChunk] = largest / kMost;
    for (int64_t k = first; k < last; k += kWidth) {
      const VecI shifted = reinterpret_cast<VecI>(load(x + k) * inverse + kRound);
      const Shorts rounded = __builtin_convertvector(shifted - static_cast<int32_t>(to_bits(kRound)), Shorts);
      memcpy(numbers + k, &rounded, sizeof(rounded));
    }
  }
}

// totals [kRows, kPanel] += a chunk's sums for kVectors vectors of columns from `column` on.
template <bool kFused, int kRows, int kVectors>
static inline void add_integers(const RoundedRows& x, int64_t row, const int8_t* panel, const float* scales, int64_t first,
                                int64_t steps, int column, float* totals) {
  VecI sum[kRows][kVectors] = {};
  const int16_t* numbers = x.numbers + row * x.stride + first;
  const int8_t* weights = panel + first * kPanel + 2 * column;
  for (int64_t k = 0; k < steps; k += 2) {
    if (kRows < kMostRows) fetch_bytes(weights + k * kPanel + kAhead, 2 * kVectors * kWidth);
    VecS right[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) right[v] = widen_pairs(weights + k * kPanel + 2 * v * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      int32_t pair;
      memcpy(&pair, numbers + i * x.stride + k, sizeof(pair));
      const VecS left = reinterpret_cast<VecS>(VecI{} + pair);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[i][v] = add_pairs<kFused>(right[v], left, sum[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    const float factor = x.factors[(row + i) * x.chunks + first / kChunk];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* to = totals + i * kPanel + column + v * kWidth;
      const Vec scale = load(scales + column + v * kWidth) * factor;
      store(to, multiply_add(__builtin_convertvector(sum[i][v], Vec), scale, load(to)));
    }
  }
}

template <bool kFused, int kRows = kMostRows>
static inline void add_integers_of_rows(int64_t rows, const RoundedRows& x, int64_t row, const int8_t* panel, const float* scales,
                                        int64_t first, int64_t steps, float* totals) {
  if (rows == kRows) {
    constexpr int kVectors = vectors_beside(kRows);
    for (int column = 0; column < kPanel; column += kVectors * kWidth) {
      add_integers<kFused, kRows, kVectors>(x, row, panel, scales, first, steps, column, totals);
    }
  } else if constexpr (kRows > 1) {
    add_integers_of_rows<kFused, kRows - 1>(rows, x, row, panel, scales, first, steps, totals);
  }
}

// totals [rows, kPanel]
template <bool kFused>
static inline void multiply_int8_panel(const RoundedRows& x, const int8_t* panel, const float* scales, int64_t depth, int64_t rows,
                                       float* totals) {
  clear(totals, rows * kPanel);
  for (int64_t first = 0; first < depth; first += kChunk) {
    const int64_t steps = depth - first < kChunk ? depth - first : kChunk;
    for (int64_t row = 0; row < rows; row += kMostRows) {
      add_integers_of_rows<kFused>(rows - row < kMostRows ? rows - row : kMostRows, x, row, panel, scales + first / kChunk * kPanel,
                                   first, steps, totals + row * kPanel);
    }
  }
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
