// sparse_attention: what the op hands to its kernels. dalle_fast/native/sparse_attention.py repeats these structures.
#pragma once

#include "isa.h"
#include "tile.h"

namespace dalle_fast {

// [B, H, N, D] of one Element, strides in elements, unit stride on D.
struct Heads {
  void* data;
  int64_t stride_b, stride_h, stride_n;
};

// Keys that lanes 16 * first_group .. 16 * (first_group + groups) - 1 of a tile meet.
struct Run {
  int32_t key;    // index of the first in TileLists::keys
  int32_t count;
  int32_t first_group, groups;
  int32_t mask;   // index of the first key's lane mask in TileLists::masks; -1: every pair is allowed
};

// The pattern: which keys each tile of queries walks over, in this order.
struct TileLists {
  int64_t tiles, text_tiles;  // the first text_tiles hold text
  const int32_t* queries;     // [tiles, kTile], -1 = padding
  const int32_t* run_start;   // [tiles + 1]
  const Run* runs;
  const int32_t* keys;
  const uint64_t* masks;      // bit i: lane i may attend to this key
};

struct SparseAttention {
  int64_t batch, heads, n, width;
  Element element;
  float scale;
  Heads q, k, v, out;
  Heads dout, dq, dk, dv;  // backward
  float* stats;            // [B, H, N, 2]: of scores log2(e) scale q.k the maximum m, and the sum of 2^(score - m); no legal key: -inf, 0
  const float* cosines;    // [N, padded(width)], or null: no rotation; 1 where a channel is not turned
  const float* sines;      // [N, padded(width)]: -sin for the even channel of a pair, sin for the odd; 0 where not turned
  const uint8_t* key_mask;  // [B, mask_len], 1 = may attend, or null
  int64_t mask_len;         // keys from here on are not masked
  int32_t mask_text_queries;  // 0: the mask holds for image queries only
  TileLists lists;
  int64_t threads;  // heads prepared at once, so that memory does not grow with the batch
};

constexpr int kKeyBlock = 48;   // keys at once: their rows, the queries and the scores stay in the first-level cache

}  // namespace dalle_fast

// Keys and values of one (batch, head) in float32, turned: positions begin .. end - 1 of [N, padded(width)] each.
DALLE_FAST_KERNEL(sparse_attention_prepare,
                  (const SparseAttention& op, int64_t batch, int64_t head, int64_t begin, int64_t end, float* k, float* v),
                  (op, batch, head, begin, end, k, v))
// One tile of queries, over all prepared keys and values of its (batch, head).
DALLE_FAST_KERNEL(sparse_attention_forward,
                  (const SparseAttention& op, int64_t batch, int64_t head, int64_t tile, const float* k, const float* v,
                   float* scratch),
                  (op, batch, head, tile, k, v, scratch))
// One (batch, head) with all its tiles.
DALLE_FAST_KERNEL(sparse_attention_backward, (const SparseAttention& op, int64_t batch, int64_t head, float* scratch),
                  (op, batch, head, scratch))

namespace dalle_fast {

// Floats that one (batch, head) of prepared keys, or of values, takes: the rows that products compute too many lie behind.
constexpr int64_t sparse_attention_prepared(int64_t padded_width, int64_t n) { return padded_width * (n + kSpareRows); }

constexpr int64_t sparse_attention_forward_scratch(int64_t padded_width) {
  return padded_width * (2 * kTile + 2 * (kKeyBlock + kSpareRows)) + kTile * (padded_width + kSpareRows) +
         kTile * (kKeyBlock + kSpareRows);
}

constexpr int64_t sparse_attention_backward_scratch(int64_t padded_width, int64_t n) {
  return sparse_attention_forward_scratch(padded_width) + padded_width * (2 * kTile + 2 * (n + 1)) +
         kTile * (kKeyBlock + kSpareRows) + 2 * sparse_attention_prepared(padded_width, n);
}

#if defined(DALLE_FAST_HAS_AMX)
// The same three for bfloat16 with products on matrix tiles. The keys and values they prepare have a layout of their own.
namespace amx {
void sparse_attention_prepare(const SparseAttention& op, int64_t batch, int64_t head, int64_t begin, int64_t end, float* k,
                              float* v);
void sparse_attention_forward(const SparseAttention& op, int64_t batch, int64_t head, int64_t tile, const float* k,
                              const float* v, float* scratch);
void sparse_attention_backward(const SparseAttention& op, int64_t batch, int64_t head, float* scratch);
}  // namespace amx
#endif

// Their sizes in floats; channels and positions are filled up to 32s.
constexpr int64_t sparse_attention_amx_prepared(int64_t width, int64_t n) {
  return (width + 31) / 32 * 32 * ((n + 31) / 32 * 32);
}

constexpr int64_t sparse_attention_amx_forward_scratch(int64_t width) {
  return (width + 31) / 32 * 32 * 5 * kTile + 3 * kTile * kTile / 2;
}

constexpr int64_t sparse_attention_amx_backward_scratch(int64_t width, int64_t n) {
  return (width + 31) / 32 * 32 * (19 * kTile / 2 + 2 * n + 1) + 3 * kTile * kTile +
         2 * sparse_attention_amx_prepared(width, n);
}

}  // namespace dalle_fast
