// gumbel_codebook: what the op hands to its kernels. dalle_fast/native/gumbel_codebook.py repeats these structures.
#pragma once

#include "isa.h"
#include "tile.h"

namespace dalle_fast {

// [B, channels, h, w], strides in elements.
struct Maps {
  void* data;
  int64_t stride_b, stride_c, stride_y, stride_x;
};

enum class Choice : int32_t { soft = 0, straight_through = 1, reinmax = 2 };

// Rows of GumbelCodebook::statistics. Of the scores a maximum and a sum of exponentials relative to it are kept apart: at
// logits of 1e4 their log-sum-exp would be off by 1e-3 in float32.
enum Statistic {
  kNoisyMax,       // of l + n
  kNoisySum,       // of exp((l + n - max) / tau)
  kMax,            // of l
  kSum,            // of exp(l - max)                    with the KL divergence, and for reinmax
  kExpected,       // sum of q (l - max), q = softmax(l) with the KL divergence
  kTemperedSum,    // of exp((l - max) / tau)            for reinmax
  kDivergence,     // of q from the uniform distribution, 0 without
  kStatistics
};

struct GumbelCodebook {
  int64_t batch, height, width;  // rows = batch height width, in this order
  int64_t features, codes, dim;
  Element element;
  Choice choice;
  int32_t with_kl;
  double temperature;
  Maps x;                // [B, features, h, w] of Element
  const void* weight;    // [codes, features] of Element
  const void* bias;      // [codes] of Element, or null
  const void* codebook;  // [codes, dim] of Element
  Maps noise;            // [B, codes, h, w] of float32; null data: from the seed
  uint64_t seed;
  int64_t first_row;     // position of the first row in the stream
  uint32_t stream;
  Maps embeds;           // [B, dim, h, w] of Element: written forward, read backward
  int64_t* nearest;      // [rows], argmax l
  int64_t* noisy;        // [rows], argmax l + n
  float* statistics;     // [kStatistics, rows]

  // backward
  Maps dembeds, dx;       // of Element
  float dkl;              // 0: no gradient of the divergence
  CodeGradient dweight;    // [codes, features]
  CodeGradient dbias;      // [codes], not read where there is no bias
  CodeGradient dcodebook;  // [codes, dim]
  int64_t threads;

  int64_t rows() const { return batch * height * width; }
  // Whether dO . embeds is the mean of g under the weights: not of hard choices, and 16-bit embeds are too coarse where one code
  // has all the weight.
  bool centre_is_mean() const { return choice == Choice::soft && element == Element::float32; }
};

constexpr int kBlock = 96;      // codes at once: a multiple of the 4 of a random call and of the 6 rows of a product
constexpr int kPack = 48;       // channels that lie side by side where a product goes over codes
constexpr int kMostTiles = 4;   // of a forward task: they share packed codes, their results stay in the second-level cache
constexpr int kMostSlices = 32;  // of codes in the backward pass

// Of [kBlock, channels] and of [kBlock, kTile].
constexpr int64_t block_rows(int64_t channels) { return (kBlock + kSpareRows) * filled(channels, 16); }
// Of [dim / kPack, kBlock, kPack].
constexpr int64_t packed_codes(int64_t dim) { return filled(dim, kPack) * kBlock + 2 * kSpareRows; }
constexpr int64_t kScores = int64_t{kBlock + kSpareRows} * kTile;

// What the backward pass keeps of a tile: x by columns and by rows, dembeds by columns and by panels of 64 columns, numbers of each
// row (Statistic, then RowNumber).
enum RowNumber { kCentre = kStatistics, kDelta, kSecondDelta, kDivergenceWeight, kRowNumbers };
constexpr int64_t gumbel_codebook_prepared(int64_t features, int64_t dim) {
  return 2 * tile_columns(features) + tile_columns(dim) + filled(dim, 64) * kTile + int64_t{kRowNumbers} * kTile;
}

constexpr int64_t gumbel_codebook_forward_scratch(int64_t features, int64_t dim) {
  return kMostTiles * (tile_columns(features) + tile_columns(dim)) + block_rows(features) + packed_codes(dim) + kBlock +
         2 * kScores;
}

constexpr int64_t gumbel_codebook_backward_scratch(int64_t features, int64_t dim) {
  return 2 * (block_rows(features) + block_rows(dim)) + 3 * kScores + 17 * kBlock;
}

// The codes of a task in the backward pass, and the tiles of the chunk it goes over.
struct CodeSlice {
  int64_t first_code, last_code;  // [first, last)
  int64_t tiles;
  const float* prepared;  // of the first tile
  float* dx;              // [tiles, tile_columns(features)]: the part of these codes
  ChunkEnds chunk;        // of the gradients of codes
};

}  // namespace dalle_fast

// Tiles first .. first + count - 1 of kTile rows, count at most kMostTiles.
DALLE_FAST_KERNEL(gumbel_codebook_forward, (const GumbelCodebook& op, int64_t first, int64_t count, float* scratch),
                  (op, first, count, scratch))
// The same, op.nearest alone.
DALLE_FAST_KERNEL(gumbel_codebook_nearest, (const GumbelCodebook& op, int64_t first, int64_t count, float* scratch),
                  (op, first, count, scratch))
// What the backward pass needs of a tile.
DALLE_FAST_KERNEL(gumbel_codebook_prepare, (const GumbelCodebook& op, int64_t tile, float* prepared), (op, tile, prepared))
// The deltas, where the centre is not the mean: a sweep over all codes, for `count` tiles that follow each other.
DALLE_FAST_KERNEL(gumbel_codebook_deltas,
                  (const GumbelCodebook& op, int64_t first, int64_t count, float* prepared, float* scratch),
                  (op, first, count, prepared, scratch))
DALLE_FAST_KERNEL(gumbel_codebook_slice, (const GumbelCodebook& op, int64_t first, const CodeSlice& slice, float* scratch),
                  (op, first, slice, scratch))
// dx of a tile, from its parts: `count` of them, `stride` floats apart.
DALLE_FAST_KERNEL(gumbel_codebook_sum, (const GumbelCodebook& op, int64_t tile, float* parts, int64_t count, int64_t stride),
                  (op, tile, parts, count, stride))
