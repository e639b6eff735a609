// Pieces that the forward and backward kernels of vocab_cross_entropy share: the rows of a tile, normed; blocks of the weight.
#pragma once

#include "product.h"
#include "rows.h"
#include "vocab_cross_entropy.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {

// Lanes behind the last row repeat it: their numbers stay finite, and are written nowhere.
struct VocabRows {
  int count;
  int64_t row[kTile];

  VocabRows(const VocabHalf& half, int64_t tile) {
    const int64_t first = tile * kTile, left = half.count - first;
    count = static_cast<int>(left < kTile ? left : kTile);
    for (int lane = 0; lane < kTile; ++lane) row[lane] = half.rows[first + (lane < count ? lane : count - 1)];
  }
};

// Elements first .. first + count - 1 as floats, zeros behind them, and where there is no data.
static inline void read_floats(const Elements& from, int64_t first, int64_t count, int64_t padded_count, float* to) {
  if (from.data == nullptr) return clear(to, padded_count);
  with_elements(from.element, from.data, [&](auto* data) { load_row(data + first, count, padded_count, to); });
}

template <class T>
static inline void round_vectors(T*, float* row, int64_t width) {
  T rounded[kWidth];
  for (int64_t i = 0; i < width; i += kWidth) {
    store_row_vector(rounded, load(row + i));
    store(row + i, load_row_vector(rounded));
  }
}

// A row of whole vectors, rounded to elements that stay floats.
static inline void round_row(Element element, float* row, int64_t width) {
  with_elements(element, nullptr, [&](auto* type) { round_vectors(type, row, width); });
}

static inline int64_t codes_in_block(const VocabCrossEntropy& op, int64_t first, int64_t last) {
  const int64_t block = vocab_block(op.width);
  return last - first < block ? last - first : block;
}

// Some channels of `count` rows of the weight, as floats rounded to op.product, zeros up to `stride`.
static inline void read_weight(const VocabCrossEntropy& op, int64_t first_row, int64_t count, int64_t first_channel,
                               int64_t channels, int64_t stride, float* to) {
  with_elements(op.weight.element, op.weight.data, [&](auto* data) {
    for (int64_t i = 0; i < count; ++i) {
      load_row(data + (first_row + i) * op.width + first_channel, channels, stride, to + i * stride);
    }
  });
  if (op.product != Element::float32 && op.product != op.weight.element) round_row(op.product, to, count * stride);
}

// A block of the weight and its bias, [block + kSpareRows, vocab_stride(width)] and [block].
static inline void read_block(const VocabCrossEntropy& op, int64_t first_row, int64_t count, float* weight, float* bias) {
  const int64_t stride = vocab_stride(op.width), block = vocab_block(op.width);
  read_weight(op, first_row, count, 0, op.width, stride, weight);
  if (count < block) clear(weight + count * stride, kSpareRows * stride);  // products compute rows in sixes
  read_floats(op.bias, first_row, count, block, bias);
}

// The sum of term(i) over whole vectors from i = 0 on: in 16 lanes on every instruction set.
template <class Term>
static inline float sum_of(int64_t width, const Term& term) {
  Vec sums[kVectorsInGroup] = {};
  for (int64_t i = 0; i < width; i += kGroup) {
    for (int v = 0; v < kVectorsInGroup; ++v) sums[v] += term(i + v * kWidth);
  }
  for (int v = 1; v < kVectorsInGroup; ++v) sums[0] += sums[v];
  return sum_of_lanes(sums[0]);
}

// A row of hidden as floats, zeros behind it up to whole vectors.
static inline void read_hidden(const VocabCrossEntropy& op, int64_t row, float* x) {
  const int64_t at = row / op.n * op.stride_b + row % op.n * op.stride_n;
  with_elements(op.hidden.element, op.hidden.data, [&](auto* data) { load_row(data + at, op.width, padded(op.width), x); });
}

// Takes the same off every element; zeros stay behind them.
static inline void shift_row(const VocabCrossEntropy& op, float by, float* x) {
  const int64_t width = padded(op.width);
  for (int64_t i = 0; i < width; i += kWidth) store(x + i, load(x + i) - by);
  clear(x + op.width, width - op.width);
}

static inline float mean_of(const VocabCrossEntropy& op, const float* x) {
  return sum_of(padded(op.width), [&](int64_t i) { return load(x + i); }) / static_cast<float>(op.width);
}

static inline void divide_row(const VocabCrossEntropy& op, float divisor, float* x) {
  if (!op.divide_max) return;
  for (int64_t i = 0; i < op.width; i += kWidth) store(x + i, load(x + i) / divisor);
}

// (hidden - mean) / divisor in place of hidden. Of nearly equal elements the rounding of their mean would show in the differences:
// its error, their own mean, goes too. For the same reason the division comes last.
static inline void center(const VocabCrossEntropy& op, float mean, float divisor, float* x) {
  shift_row(op, mean, x);
  shift_row(op, mean_of(op, x), x);
  divide_row(op, divisor, x);
}

// (hidden - mean) / divisor deviation, of a row that was measured; zeros behind it.
static inline void standardise(const VocabCrossEntropy& op, int64_t row, float* x) {
  read_hidden(op, row, x);
  center(op, op.statistic(kMean)[row], op.statistic(kDivisor)[row], x);
  const float deviation = op.statistic(kDeviation)[row];
  for (int64_t i = 0; i < op.width; i += kWidth) store(x + i, load(x + i) * deviation);
}

// The rows of a tile, which were measured, normed and rounded to op.product, as columns.
static inline void norm_columns(const VocabCrossEntropy& op, const VocabRows& rows, float* columns, float* scratch) {
  Arena arena{scratch};
  const int64_t width = padded(op.width), stride = vocab_stride(op.width);
  float* const normed = arena.take(kTile * stride);
  float* const weight = arena.take(width);
  float* const bias = arena.take(width);
  read_floats(op.norm_weight, 0, op.width, width, weight);
  read_floats(op.norm_bias, 0, op.width, width, bias);
  for (int lane = 0; lane < kTile; ++lane) {
    float* const y = normed + lane * stride;
    if (lane >= rows.count) {
      memcpy(y, y - stride, sizeof(float) * width);
      continue;
    }
    standardise(op, rows.row[lane], y);
    for (int64_t i = 0; i < width; i += kWidth) store(y + i, multiply_add(load(y + i), load(weight + i), load(bias + i)));
    round_row(op.product, y, width);
  }
  transpose(normed, stride, kTile, width, columns, kTile);
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
