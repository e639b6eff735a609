// Products of small float32 matrices with every sum in registers: the one micro-kernel of the attention kernels.
#pragma once

#include "floats.h"
#include "tile.h"

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

// What is summed over k: products, or squared differences.
struct Products {
  static Vec join(Vec left, Vec right, Vec sum) { return multiply_add(left, right, sum); }
};
struct SquaredDifferences {
  static Vec join(Vec left, Vec right, Vec sum) { return multiply_add(left - right, left - right, sum); }
};

// What becomes of a product: it replaces the result, is added to it, or to it with every column j times factors[j]. Added at
// the end: a sum of few sums is more exact than one long sum.
struct Replace {
  Vec operator()(Vec product, const float*, int64_t) const { return product; }
};
struct Add {
  Vec operator()(Vec product, const float* c, int64_t) const { return load(c) + product; }
};
struct AddToScaled {
  const float* factors;
  Vec operator()(Vec product, const float* c, int64_t column) const {
    return multiply_add(load(c), load(factors + column), product);
  }
};

// c[i][j] = sum over k of a[i * a_row + k * a_step] joined with b[k * b_step + j], or what `put` makes of it, for kRows rows i and
// kGroups groups of columns j from `column` on.
template <class Terms, int kRows, int kGroups, class Put, class C>
static inline void multiply_tile(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step,
                                 int64_t steps, const Put& put, const C& c, int64_t row, int64_t column) {
  constexpr int kVectors = kGroups * kVectorsInGroup;
  Vec sum[kRows][kVectors] = {};
#pragma GCC unroll 2
  for (int64_t k = 0; k < steps; ++k) {
    Vec right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + k * b_step + column + v * kWidth);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vec left = broadcast(a[i * a_row + k * a_step]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[i][v] = Terms::join(left, right[v], sum[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* to = c(row + i) + column + v * kWidth;
      store(to, put(sum[i][v], to, column + v * kWidth));
    }
  }
}

template <class Terms, int kRows, int kGroups, class Put, class C>
static inline void multiply_rows(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step,
                                 int64_t steps, const Put& put, const C& c, int64_t rows, int64_t column) {
  for (int64_t row = 0; row < rows; row += kRows) {
    multiply_tile<Terms, kRows, kGroups>(a + row * a_row, a_row, a_step, b, b_step, steps, put, c, row, column);
  }
}

// The same for any number of rows and groups. Rows are computed in twos, sixes or eights: up to 7 rows of `a` and `c` behind
// the last are read and written.
template <class Terms = Products, class Put, class C>
static inline void multiply(const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_step, int64_t steps,
                            const Put& put, const C& c, int64_t rows, int64_t groups) {
  for (int64_t group = 0; group < groups; group += kMaxGroups) {
    const int64_t column = group * kGroup;
#if defined(__AVX512F__)
    switch (groups - group) {
      case 1:
        multiply_rows<Terms, 8, 1>(a, a_row, a_step, b, b_step, steps, put, c, rows, column);
        break;
      case 2:
        multiply_rows<Terms, 8, 2>(a, a_row, a_step, b, b_step, steps, put, c, rows, column);
        break;
      case 3:
        multiply_rows<Terms, 8, 3>(a, a_row, a_step, b, b_step, steps, put, c, rows, column);
        break;
      default:
        multiply_rows<Terms, 6, 4>(a, a_row, a_step, b, b_step, steps, put, c, rows, column);
    }
#else
    constexpr int kRows = kWidth == 8 ? 6 : 2;
    multiply_rows<Terms, kRows, 1>(a, a_row, a_step, b, b_step, steps, put, c, rows, column);
#endif
  }
}

// c = a . b over `steps` for kTile columns, in sums of at most 128 that are then added: as exact as a library's product.
template <class C>
static inline void multiply_long(const float* a, int64_t a_row, const float* b, int64_t b_step, int64_t steps, const C& c,
                                 int64_t rows) {
  constexpr int64_t kSteps = 128;
  constexpr int64_t kGroups = kTile / kGroup;
  multiply(a, a_row, 1, b, b_step, steps < kSteps ? steps : kSteps, Replace{}, c, rows, kGroups);
  for (int64_t k = kSteps; k < steps; k += kSteps) {
    multiply(a + k, a_row, 1, b + k * b_step, b_step, steps - k < kSteps ? steps - k : kSteps, Add{}, c, rows, kGroups);
  }
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
