// vocab_cross_entropy backward for one instruction set (definitions: vocab_cross_entropy_kernel.cpp). Logits are made again, one
// [96, 64] block at a time; r is the gradient of the loss over the number of labels that count:
//
//     dl = r (softmax(l) - onehot_label)    dW = dl^T y    db = sum dl    dy = dl W
//     g = dy w    x' = (x - mean) rstd    dx = rstd (g - mean(g) - x' mean(g x'))    dhidden = dx, or dx / m
//     dw = sum dy x'    d(norm's b) = sum dy
//
// In two steps over a chunk of rows and a range of codes. Tasks of the first have a block of codes each and go over the chunk's
// tiles: dl is kept for all of them, dW and db are summed where they are. Tasks of the second have some tiles and channels each
// and go over the range's codes: dy is summed where it is. So no partial sums of gradients are stored, and whatever the threads,
// each sum has one order: over rows within a chunk and then over chunks, over codes block by block.
#include "vocab_tile.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {

namespace {

// What the gradient of a row's logits is made of; rates of idle lanes are 0.
struct Softmax {
  alignas(64) float max[kTile], log_sum[kTile], rate[kTile];
  alignas(64) int32_t label[kTile];

  Softmax(const VocabCrossEntropy& op, const VocabHalf& half, int64_t tile) {
    const VocabRows rows(half, tile);
    for (int lane = 0; lane < kTile; ++lane) {
      const int64_t row = rows.row[lane];
      rate[lane] = lane < rows.count ? half.rate : 0.0f;
      max[lane] = op.statistic(kLogitMax)[row];
      log_sum[lane] = op.statistic(kLogitLogSum)[row];
      label[lane] = static_cast<int32_t>(op.labels[row]);
    }
  }
};

// The gradient of the logits in place of the products, and once more in `kept`; its sums over rows in as many lanes a code, added
// to those of other tiles: a sum of few sums is more exact than one long sum. In the exponent, log_sum costs large weights less
// than the rounding of a quotient.
void differentiate(const Softmax& rows, int64_t first, int64_t count, const float* bias, float* scores, float* kept, float* dbias,
                   float* sums) {
  const Exponential exponential(1.0);
  clear(sums, count * kWidth);
  for (int lane = 0; lane < kTile; lane += kWidth) {
    const Vec max = load(rows.max + lane), log_sum = load(rows.log_sum + lane), rate = load(rows.rate + lane);
    const VecI label = load(rows.label + lane) - static_cast<int32_t>(first);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = i * kTile + lane;
      const Vec weight = exponential(load(scores + at) + bias[i] - max - log_sum);
      const Vec hit = label == static_cast<int32_t>(i) ? rate : Vec{};
      const Vec gradient = multiply_add(weight, rate, -hit);
      store(scores + at, gradient);
      store(kept + at, gradient);
      store(sums + i * kWidth, load(sums + i * kWidth) + gradient);
    }
  }
  for (int64_t i = 0; i < count * kWidth; i += kWidth) store(dbias + i, load(dbias + i) + load(sums + i));
}

// *sum += term; what rounding takes from the sum is taken from the next term: rows may be alike, and then so are their roundings.
void add_kept(Vec term, float* sum, float* lost) {
  const Vec kept = term - load(lost), result = load(sum) + kept;
  store(lost, (result - load(sum)) - kept);
  store(sum, result);
}

}  // namespace

void vocab_cross_entropy_norm_again(const VocabCrossEntropy& op, const VocabHalf& half, int64_t tile, float* columns,
                                    float* scratch) {
  norm_columns(op, VocabRows(half, tile), columns, scratch);
}

void vocab_cross_entropy_codes(const VocabCrossEntropy& op, const VocabHalf& half, const VocabChunk& chunk, int64_t first_code,
                               float* scratch) {
  Arena arena{scratch};
  const int64_t block = vocab_block(op.width), width = padded(op.width), stride = vocab_stride(op.width);
  const int64_t count = codes_in_block(op, first_code, chunk.last_code), row = half.first_code + first_code;
  float* const weight = arena.take(vocab_weights(op.width));
  float* const dcolumns = arena.take((width + kSpareRows) * block);  // [width, block]: dW by columns
  float* const scores = arena.take(vocab_scores(op.width));
  float* const turned = arena.take(vocab_scores(op.width));  // [kTile, block]
  float* const bias = arena.take(block);
  float* const dbias = arena.take(block * kWidth);
  float* const sums = arena.take(block * kWidth);
  read_block(op, row, count, weight, bias);
  clear(dcolumns, (width + kSpareRows) * block);
  clear(dbias, block * kWidth);
  for (int64_t t = 0; t < chunk.tiles; ++t) {
    const float* const y = chunk.columns + t * tile_columns(op.width);
    multiply_long(weight, stride, y, kTile, op.width, EvenRows{scores, kTile}, count);
    differentiate(Softmax(op, half, chunk.tile + t), first_code, count, bias, scores, chunk.scores_of(t, first_code), dbias,
                  sums);
    transpose(scores, kTile, filled(count, 4), kTile, turned, block);
    multiply(y, kTile, 1, turned, block, kTile, Add{}, EvenRows{dcolumns, block}, op.width, filled(count, kGroup) / kGroup);
  }
  transpose(dcolumns, block, width, filled(count, 4), weight, stride);
  add_rows(weight, stride, count, op.dweight, op.weight.element, op.width, row, chunk.ends);
  if (op.dbias.data == nullptr) return;
  for (int64_t i = 0; i < count; ++i) bias[i] = sum_of_lanes(load(dbias + i * kWidth));
  add_rows(bias, 1, count, op.dbias, op.bias.element, 1, row, chunk.ends);
}

void vocab_cross_entropy_part(const VocabCrossEntropy& op, const VocabHalf& half, const VocabChunk& chunk, int64_t first,
                              int64_t count, int64_t first_channel, float* scratch) {
  const int64_t part = vocab_part(op.width), stride = vocab_stride(part);
  const int64_t channels = op.width - first_channel < part ? op.width - first_channel : part;
  for (int64_t code = chunk.first_code; code < chunk.last_code; code += vocab_block(op.width)) {
    const int64_t codes = codes_in_block(op, code, chunk.last_code);
    read_weight(op, half.first_code + code, codes, first_channel, channels, stride, scratch);
    for (int64_t t = first; t < first + count; ++t) {
      float* const dy = chunk.gradient + t * tile_columns(op.width) + first_channel * kTile;
      multiply(scratch, 1, stride, chunk.scores_of(t, code), kTile, codes, Add{}, EvenRows{dy, kTile}, channels, kTile / kGroup);
    }
  }
}

void vocab_cross_entropy_rows(const VocabCrossEntropy& op, const VocabHalf& half, int64_t tile, float* gradient, float* sums,
                              float* scratch) {
  Arena arena{scratch};
  const int64_t width = padded(op.width), stride = vocab_stride(op.width);
  const float count = static_cast<float>(op.width);
  float* const dys = arena.take(kTile * stride);
  float* const weight = arena.take(width);
  float* const x = arena.take(width);
  float* const dx = arena.take(width);
  float* const lost = arena.take(2 * width);
  clear(gradient + op.width * kTile, (width - op.width) * kTile);  // products wrote behind the last channel
  transpose(gradient, kTile, width, kTile, dys, stride);
  read_floats(op.norm_weight, 0, op.width, width, weight);
  clear(sums, 2 * width);
  clear(lost, 2 * width);
  const VocabRows rows(half, tile);
  for (int lane = 0; lane < rows.count; ++lane) {
    const int64_t row = rows.row[lane];
    const float* const dy = dys + lane * stride;
    standardise(op, row, x);
    for (int64_t i = 0; i < width; i += kWidth) {
      store(dx + i, load(dy + i) * load(weight + i));
      add_kept(load(dy + i) * load(x + i), sums + i, lost + i);
      add_kept(load(dy + i), sums + width + i, lost + width + i);
    }
    const float mean = sum_of(width, [&](int64_t i) { return load(dx + i); }) / count;
    const float slope = sum_of(width, [&](int64_t i) { return load(dx + i) * load(x + i); }) / count;
    const float deviation = op.statistic(kDeviation)[row];
    for (int64_t i = 0; i < width; i += kWidth) {
      store(dx + i, (multiply_add(load(x + i), broadcast(-slope), load(dx + i)) - mean) * deviation);
    }
    divide_row(op, op.statistic(kDivisor)[row], dx);
    with_elements(op.hidden.element, op.dhidden, [&](auto* data) { store_row(data + row * op.width, op.width, dx); });
  }
}

void vocab_cross_entropy_norm_gradients(const VocabCrossEntropy& op, const float* sums) {
  with_elements(op.norm_weight.element, op.dnorm_weight, [&](auto* data) { store_row(data, op.width, sums); });
  with_elements(op.norm_bias.element, op.dnorm_bias, [&](auto* data) { store_row(data, op.width, sums + padded(op.width)); });
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
