// Products of small float32 matrices with every sum in registers: the one micro-kernel of the attention kernels.
#pragma once

#include "floats.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {

// Columns come in groups of 16: one vector of AVX-512, two of AVX2, four of the baseline. As many groups and rows at a time as
// the registers hold: 24 sums of 32 registers with AVX-512, 12 of 16 with AVX2, 8 of 16 otherwise.
constexpr int kGroup = 16;
constexpr int kVectorsInGroup = kGroup / kWidth;
constexpr int kMaxGroups = kWidth == 16 ? 4 : 1;

// Where the rows of a result lie.
struct EvenRows {
  float* first;
  int64_t stride;
  float* operator()(int64_t row) const { return first + row * stride; }
};
struct ScatteredRows {
  float* const* rows;
  float* operator()(int64_t row) const { return rows[row]; }
};

// c[i][j] (+)= sum over k of a[i * a_row + k * a_step] * b[k * b_step + j], for kRows rows i and kGroups groups of columns j.
template <int kRows, int kGroups, bool kAdd, class C>
static inline void multiply_tile(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step,
                                 int64_t steps, const C& c, int64_t row) {
  constexpr int kVectors = kGroups * kVectorsInGroup;
  Vec sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sum[i][v] = kAdd ? load(c(row + i) + v * kWidth) : Vec{};
  }
#pragma GCC unroll 2
  for (int64_t k = 0; k < steps; ++k) {
    Vec right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + k * b_step + v * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec left = broadcast(a[i * a_row + k * a_step]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[i][v] = multiply_add(left, right[v], sum[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(c(row + i) + v * kWidth, sum[i][v]);
  }
}

template <int kRows, int kGroups, bool kAdd, class C>
static inline void multiply_rows(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step,
                                 int64_t steps, const C& c, int64_t rows) {
  for (int64_t row = 0; row < rows; row += kRows) {
    multiply_tile<kRows, kGroups, kAdd>(a + row * a_row, a_row, a_step, b, b_step, steps, c, row);
  }
}

// The same for any number of rows and for groups 1 .. kMaxGroups. Rows are computed in twos, sixes or eights: up to 7 rows of
// `a` and `c` behind the last are read and written.
template <bool kAdd, class C>
static inline void multiply_groups(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step,
                                   int64_t steps, const C& c, int64_t rows, int groups) {
#if defined(__AVX512F__)
  switch (groups) {
    case 1:
      return multiply_rows<8, 1, kAdd>(a, a_row, a_step, b, b_step, steps, c, rows);
    case 2:
      return multiply_rows<8, 2, kAdd>(a, a_row, a_step, b, b_step, steps, c, rows);
    case 3:
      return multiply_rows<8, 3, kAdd>(a, a_row, a_step, b, b_step, steps, c, rows);
    default:
      return multiply_rows<6, 4, kAdd>(a, a_row, a_step, b, b_step, steps, c, rows);
  }
#else
  (void)groups;
  constexpr int kRows = kWidth == 8 ? 6 : 2;
  multiply_rows<kRows, 1, kAdd>(a, a_row, a_step, b, b_step, steps, c, rows);
#endif
}

// The same for any number of groups.
template <bool kAdd, class C>
static inline void multiply(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, int64_t steps,
                            const C& c, int64_t rows, int64_t groups) {
  for (int64_t first = 0; first < groups; first += kMaxGroups) {
    const int64_t shift = first * kGroup;
    const auto shifted = [&](int64_t row) { return c(row) + shift; };
    const int count = static_cast<int>(groups - first < kMaxGroups ? groups - first : kMaxGroups);
    multiply_groups<kAdd>(a, a_row, a_step, b + shift, b_step, steps, shifted, rows, count);
  }
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
