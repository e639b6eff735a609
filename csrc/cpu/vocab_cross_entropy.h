// vocab_cross_entropy: what the op hands to its kernels. dalle_fast/native/vocab_cross_entropy.py repeats Elements and
// VocabCrossEntropy.
#pragma once

#include "isa.h"
#include "tile.h"

namespace dalle_fast {

// A tensor of one of the element types; under autocast those of a call differ.
struct Elements {
  void* data;
  Element element;
};

// Rows of VocabCrossEntropy::statistics, float32; 0 where a label does not count. Of the logits a maximum and the logarithm of a
// sum are kept apart: at logits of 1e4 their sum would be off by 1e-3.
enum VocabStatistic {
  kDivisor,         // of hidden: its signed maximum, or 1
  kMean,            // of hidden
  kDeviation,       // 1 / sqrt(variance + eps) of hidden / divisor
  kLogitMax,
  kLogitLogSum,     // log of the sum of exp(l - max)
  kRowLoss,
  kVocabStatistics
};

struct VocabCrossEntropy {
  int64_t batch, n, width;          // rows = batch n
  int64_t n_text;                   // positions before it predict text
  int64_t text_codes, codes;        // rows of the weight: those of text, which come first; all
  Element product;                  // normed rows and weight are rounded to it
  int32_t divide_max;
  float eps;
  Elements hidden;                  // [batch, n, width]
  int64_t stride_b, stride_n;       // of hidden, in elements
  Elements norm_weight, norm_bias;  // [width]
  Elements weight;                  // [codes, width]
  Elements bias;                    // [codes], or null data
  const int64_t* labels;            // [batch, n], from 0 in either half; negative: does not count
  float* statistics;                // [kVocabStatistics, rows]
  float* losses;                    // [2]: text, image

  // backward
  float dlosses[2];
  void* dhidden;                       // [batch, n, width], contiguous; like all gradients of the elements of its tensor
  void *dnorm_weight, *dnorm_bias;     // [width]
  CodeGradient dweight;                // [codes, width]
  CodeGradient dbias;                  // [codes], or null data
  int64_t threads;

  int64_t rows() const { return batch * n; }
  float* statistic(VocabStatistic which) const { return statistics + which * rows(); }
};

// Half of the head: the rows of text or image positions whose labels count, and the codes they are of.
struct VocabHalf {
  const int64_t* rows;  // their numbers, in order
  int64_t count;
  int64_t first_code, codes;
  float rate;  // of the loss's gradient, to each row

  int64_t tiles() const { return (count + kTile - 1) / kTile; }
};

// Tile sizes, for cores with 48 KB and 1.25 MB of cache. In the first lies what a product reads over and over: 128 channels of a
// tile (32 KB), the scores of a block (24 KB). In the second, up to a width of 1024, a block of the weight and its gradient beside
// a tile, or the tiles of a group beside a block.
constexpr int64_t vocab_block(int64_t width) { return width <= 1024 ? 96 : 48; }  // codes: a multiple of a product's 6 rows
constexpr int64_t vocab_slice(int64_t width) { return 8 * vocab_block(width); }   // codes of a forward task
constexpr int64_t vocab_group(int64_t width) { return width <= 512 ? 4 : width <= 1024 ? 2 : 1; }  // tiles of a forward task
constexpr int kVocabMostTiles = 4;  // the largest of vocab_group
constexpr int kVocabPartTiles = 8;  // tiles at once where a part of the channels is computed
// Channels of a part: shares of about 256. A product's rows come in sixes or eights: none reaches into the next part.
constexpr int64_t vocab_part(int64_t width) {
  const int64_t parts = (width + 255) / 256;
  return filled((width + parts - 1) / parts, 24);
}

// Floats from row to row of a matrix whose columns are read: an odd number of cache lines, so that they fall into different sets.
constexpr int64_t vocab_stride(int64_t width) { return ((filled(width, 16) / 16) | 1) * 16; }
// Of a block of the weight, [block, width].
constexpr int64_t vocab_weights(int64_t width) { return (vocab_block(width) + kSpareRows) * vocab_stride(width); }
// Of a block's scores, [block, kTile].
constexpr int64_t vocab_scores(int64_t width) { return (vocab_block(width) + kSpareRows) * kTile; }

// Floats of scratch memory.
constexpr int64_t vocab_norm_scratch(int64_t width) { return kTile * vocab_stride(width) + 5 * filled(width, 16); }
constexpr int64_t vocab_logits_scratch(int64_t width) {
  return vocab_weights(width) + vocab_block(width) + vocab_scores(width);
}
constexpr int64_t vocab_codes_scratch(int64_t width) {
  const int64_t gradient = (filled(width, 16) + kSpareRows) * vocab_block(width);
  return vocab_weights(width) + gradient + 2 * vocab_scores(width) + 34 * vocab_block(width);
}
constexpr int64_t vocab_part_scratch(int64_t width) { return vocab_block(width) * vocab_stride(vocab_part(width)) + kSpareRows; }

// What a slice of codes makes of a tile forward, [kVocabParts, kTile].
enum VocabPart { kPartMax, kPartSum, kPartLabel, kVocabParts };

// A forward task: `tiles` tiles of a half by a slice of its codes.
struct VocabSlice {
  int64_t tile, tiles;
  int64_t first_code, last_code;  // [first, last) of the half
  const float* columns;           // [tiles, tile_columns(width)]: normed rows
  float* parts;                   // of the first tile
  int64_t parts_stride;           // to those of the next
};

// Tiles whose rows the backward pass goes over at once, and codes whose scores it holds meanwhile.
struct VocabChunk {
  int64_t tile, tiles;
  const float* columns;  // [tiles, tile_columns(width)]: normed rows
  float* gradient;       // the same: their gradient
  int64_t first_code, last_code;  // [first, last) of the half
  float* scores;         // [tiles, codes, kTile]: the gradient of the logits
  ChunkEnds ends;        // of the half's tiles

  float* scores_of(int64_t t, int64_t code) const {
    return scores + (t * (last_code - first_code) + code - first_code) * kTile;
  }
};

}  // namespace dalle_fast

// Normed rows of a tile, rounded to op.product, as columns. Forward: also their divisor, mean and deviation.
DALLE_FAST_KERNEL(vocab_cross_entropy_norm,
                  (const VocabCrossEntropy& op, const VocabHalf& half, int64_t tile, float* columns, float* scratch),
                  (op, half, tile, columns, scratch))
DALLE_FAST_KERNEL(vocab_cross_entropy_norm_again,
                  (const VocabCrossEntropy& op, const VocabHalf& half, int64_t tile, float* columns, float* scratch),
                  (op, half, tile, columns, scratch))
DALLE_FAST_KERNEL(vocab_cross_entropy_logits,
                  (const VocabCrossEntropy& op, const VocabHalf& half, const VocabSlice& slice, float* scratch),
                  (op, half, slice, scratch))
// The other statistics of a tile's rows, from its parts [slices, kVocabParts, kTile].
DALLE_FAST_KERNEL(vocab_cross_entropy_loss,
                  (const VocabCrossEntropy& op, const VocabHalf& half, int64_t tile, const float* parts, int64_t slices),
                  (op, half, tile, parts, slices))

// Backward. Of a block of codes: scores, dweight and dbias.
DALLE_FAST_KERNEL(vocab_cross_entropy_codes,
                  (const VocabCrossEntropy& op, const VocabHalf& half, const VocabChunk& chunk, int64_t first_code,
                   float* scratch),
                  (op, half, chunk, first_code, scratch))
// What the chunk's codes add to the gradient of some of its tiles and of one part of their channels.
DALLE_FAST_KERNEL(vocab_cross_entropy_part,
                  (const VocabCrossEntropy& op, const VocabHalf& half, const VocabChunk& chunk, int64_t first, int64_t count,
                   int64_t first_channel, float* scratch),
                  (op, half, chunk, first, count, first_channel, scratch))
// dhidden of a tile's rows from the gradient of their normed rows, and what they add to those of the norm: sums [2, filled(width, 16)].
DALLE_FAST_KERNEL(vocab_cross_entropy_rows,
                  (const VocabCrossEntropy& op, const VocabHalf& half, int64_t tile, float* gradient, float* sums,
                   float* scratch),
                  (op, half, tile, gradient, sums, scratch))
// Gradients of the norm from their sums.
DALLE_FAST_KERNEL(vocab_cross_entropy_norm_gradients, (const VocabCrossEntropy& op, const float* sums), (op, sums))
