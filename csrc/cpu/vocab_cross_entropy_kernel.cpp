// vocab_cross_entropy forward for one instruction set, and the precision and the cost of the whole:
//
//     x = hidden, or hidden / m, m the row's signed maximum, a constant    y = (x - mean(x)) rstd w + b
//     text rows: l = W_text y + b_text    image rows: l = W_image y + b_image    loss of a row = log sum exp l - l_label
//
// 64 rows lie across the lanes, 96 codes pass by at a time: a row's maximum and sum are lanes and run along, and of the logits one
// [96, 64] block exists. All arithmetic is float32; where products are of 16 bits, their operands y and W are rounded first.
// Saved are six numbers a row. With N rows of C channels in all, K codes in all, and P = N_text K_text + N_image K_image:
//
//     forward    2 C P operations in products, a dozen instructions for a vector of exponentials
//     backward   6 C P: logits once more, gradients of y and of W
//     bytes      hidden, W once forward; hidden, W, and their gradients backward: 4 C (N + K) and 8 C (N + K) in float32
//
// A sum over rows or codes has one order, whatever the threads.
#include "vocab_tile.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {

namespace {

constexpr float kLowest = -0x1.fffffep127f;

// The largest of `count` numbers. What is not a number may be passed over: its row becomes none in any case.
float largest(const float* x, int64_t count) {
  float most = -kInfinity;
  int64_t i = 0;
  if (count >= kWidth) {
    Vec lanes = load(x);
    for (; i + kWidth <= count; i += kWidth) lanes = larger(load(x + i), lanes);
    most = max_of_lanes(lanes);
  }
  for (; i < count; ++i) most = x[i] > most ? x[i] : most;
  return most;
}

void measure(const VocabCrossEntropy& op, int64_t row, float* x) {
  read_hidden(op, row, x);
  const float divisor = op.divide_max ? largest(x, op.width) : 1.0f, mean = mean_of(op, x);
  center(op, mean, divisor, x);
  const float squares = sum_of(padded(op.width), [&](int64_t i) { return load(x + i) * load(x + i); });
  op.statistic(kDivisor)[row] = divisor;
  op.statistic(kMean)[row] = mean;
  op.statistic(kDeviation)[row] = 1.0f / __builtin_sqrtf(squares / static_cast<float>(op.width) + op.eps);
}

// What is known of the rows of a tile after some of a slice's codes.
struct Running {
  alignas(64) float max[kTile], sum[kTile], label_logit[kTile];
  int64_t label[kTile];

  void begin(const VocabCrossEntropy& op, const VocabRows& rows) {
    for (int lane = 0; lane < kTile; ++lane) {
      max[lane] = kLowest;  // not -infinity, from which nothing can be subtracted
      sum[lane] = label_logit[lane] = 0.0f;
      label[lane] = op.labels[rows.row[lane]];
    }
  }
};

struct Block {
  int64_t first, count;  // codes
  const float* bias;
  float* logits;  // [count, kTile]: products, then logits
};

void add_block(const Block& block, Running& rows) {
  const Exponential exponential(1.0);
  for (int lane = 0; lane < kTile; lane += kWidth) {
    const Vec before = load(rows.max + lane);
    Vec max = before;
    for (int64_t i = 0; i < block.count; ++i) {
      float* const logit = block.logits + i * kTile + lane;
      const Vec l = load(logit) + block.bias[i];
      store(logit, l);
      max = larger(l, max);
    }
    Vec sum{};
    for (int64_t i = 0; i < block.count; ++i) sum += exponential(load(block.logits + i * kTile + lane) - max);
    store(rows.sum + lane, multiply_add(load(rows.sum + lane), exponential(before - max), sum));
    store(rows.max + lane, max);
  }
  for (int lane = 0; lane < kTile; ++lane) {
    const int64_t i = rows.label[lane] - block.first;
    if (i >= 0 && i < block.count) rows.label_logit[lane] = block.logits[i * kTile + lane];
  }
}

}  // namespace

void vocab_cross_entropy_norm(const VocabCrossEntropy& op, const VocabHalf& half, int64_t tile, float* columns,
                              float* scratch) {
  const VocabRows rows(half, tile);
  for (int lane = 0; lane < rows.count; ++lane) measure(op, rows.row[lane], scratch);
  norm_columns(op, rows, columns, scratch);
}

void vocab_cross_entropy_logits(const VocabCrossEntropy& op, const VocabHalf& half, const VocabSlice& slice, float* scratch) {
  Arena arena{scratch};
  const int64_t block_size = vocab_block(op.width);
  float* const weight = arena.take(vocab_weights(op.width));
  float* const bias = arena.take(block_size);
  float* const logits = arena.take(vocab_scores(op.width));

  Running rows[kVocabMostTiles];
  for (int64_t t = 0; t < slice.tiles; ++t) rows[t].begin(op, VocabRows(half, slice.tile + t));
  for (int64_t code = slice.first_code; code < slice.last_code; code += block_size) {
    const Block block{code, codes_in_block(op, code, slice.last_code), bias, logits};
    read_block(op, half.first_code + code, block.count, weight, bias);
    for (int64_t t = 0; t < slice.tiles; ++t) {
      multiply_long(weight, vocab_stride(op.width), slice.columns + t * tile_columns(op.width), kTile, op.width,
                    EvenRows{logits, kTile}, block.count);
      add_block(block, rows[t]);
    }
  }
  for (int64_t t = 0; t < slice.tiles; ++t) {
    float* const parts = slice.parts + t * slice.parts_stride;
    memcpy(parts + kPartMax * kTile, rows[t].max, sizeof(rows[t].max));
    memcpy(parts + kPartSum * kTile, rows[t].sum, sizeof(rows[t].sum));
    memcpy(parts + kPartLabel * kTile, rows[t].label_logit, sizeof(rows[t].label_logit));
  }
}

void vocab_cross_entropy_loss(const VocabCrossEntropy& op, const VocabHalf& half, int64_t tile, const float* parts,
                              int64_t slices) {
  const Exponential exponential(1.0);
  alignas(64) float maxima[kTile], log_sums[kTile], losses[kTile];
  for (int lane = 0; lane < kTile; lane += kWidth) {
    const auto part = [&](int64_t slice, VocabPart which) {
      return load(parts + (slice * kVocabParts + which) * kTile + lane);
    };
    Vec max = part(0, kPartMax), sum{}, label_logit{};
    for (int64_t s = 1; s < slices; ++s) max = larger(part(s, kPartMax), max);
    for (int64_t s = 0; s < slices; ++s) {
      sum = multiply_add(part(s, kPartSum), exponential(part(s, kPartMax) - max), sum);
      label_logit += part(s, kPartLabel);  // 0 but in the label's slice
    }
    // 0 or not a number where no logit is finite, or one is not a number: what torch makes of these is no number.
    const Vec log_sum = sum > 0.0f ? log_float(sum) : broadcast(__builtin_nanf(""));
    store(maxima + lane, max);
    store(log_sums + lane, log_sum);
    store(losses + lane, max - label_logit + log_sum);
  }
  const VocabRows rows(half, tile);
  for (int lane = 0; lane < rows.count; ++lane) {
    op.statistic(kLogitMax)[rows.row[lane]] = maxima[lane];
    op.statistic(kLogitLogSum)[rows.row[lane]] = log_sums[lane];
    op.statistic(kRowLoss)[rows.row[lane]] = losses[lane];
  }
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
