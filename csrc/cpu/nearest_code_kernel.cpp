// The nearest code of each row, for one instruction set: argmin over k of |x - c_k|^2, the lowest k among equals.
//
// 64 rows lie across the lanes, codes pass by in blocks of 48. Distances are sums of squared differences in float32, one order
// for every code, so that equal codes tie and the first of them wins; they are compared where they were summed, and no matrix
// of distances exists. Two operations a number: 2 n K D in all, against 1 for the cancelling |x|^2 - 2 x.c + |c|^2.
#include "nearest_code.h"

#include "product.h"
#include "rows.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {

namespace {

struct Best {
  float distance[kTile];
  int32_t code[kTile];
};

// A distance that is not a number is the smallest, as in torch's argmin: the first one stays.
void keep_nearest(const float* distances, int64_t first_code, int64_t count, Best& best) {
  for (int lane = 0; lane < kTile; lane += kWidth) {
    Vec least = load(best.distance + lane);
    VecI code = load(best.code + lane);
    for (int64_t i = 0; i < count; ++i) {
      const Vec distance = load(distances + i * kTile + lane);
      const VecI nearer = (distance < least) | ((distance != distance) & (least == least));
      least = nearer ? distance : least;
      code = nearer ? VecI{} + static_cast<int32_t>(first_code + i) : code;
    }
    store(best.distance + lane, least);
    store(best.code + lane, code);
  }
}

}  // namespace

void nearest_code_tile(const NearestCode& op, int64_t tile, float* scratch) {
  const int64_t width = padded(op.width), first = tile * kTile;
  const int64_t rows = op.n - first < kTile ? op.n - first : kTile;
  float* x_rows = scratch;
  float* x_columns = x_rows + kTile * width;
  float* distances = x_columns + kTile * width;
  float* last_codes = distances + kTile * kCodeRows;
  memset(x_rows, 0, sizeof(float) * kTile * width);
  for (int64_t row = 0; row < rows; ++row) load_row(op.x + (first + row) * op.width, op.width, width, x_rows + row * width);
  transpose(x_rows, width, kTile, width, x_columns, kTile);

  Best best;
  for (int lane = 0; lane < kTile; ++lane) best.distance[lane] = __builtin_inff(), best.code[lane] = 0;
  for (int64_t code = 0; code < op.codes; code += kCodeBlock) {
    const float* codes = op.codebook + code * op.width;
    const int64_t count = op.codes - code < kCodeBlock ? op.codes - code : kCodeBlock;
    if (count < kCodeBlock) {  // the product reads rows behind the last
      memcpy(last_codes, codes, sizeof(float) * count * op.width);
      memset(last_codes + count * op.width, 0, sizeof(float) * (kCodeRows - count) * op.width);
      codes = last_codes;
    }
    multiply<SquaredDifferences>(codes, op.width, 1, x_columns, kTile, op.width, Replace{},
                                 EvenRows{distances, kTile}, count, kTile / kGroup);
    keep_nearest(distances, code, count, best);
  }
  for (int64_t row = 0; row < rows; ++row) op.nearest[first + row] = best.code[row];
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
