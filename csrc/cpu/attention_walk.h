// Attention over tile lists, whatever the products are made with: rows of a head, tiles of queries, walking over blocks of
// keys. Include from *_kernel.cpp alone (isa.h).
#pragma once

#include "product.h"
#include "rows.h"
#include "sparse_attention.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {

// One (batch, head) of an op: rows of tensors by position.
struct Head {
  const SparseAttention& op;
  int64_t batch, head;
  int64_t width;  // of a row in floats: op.width rounded up, zeros behind

  int64_t offset(const Heads& heads, int64_t position) const {
    return batch * heads.stride_b + head * heads.stride_h + position * heads.stride_n;
  }

  void read(const Heads& heads, int64_t position, float* to) const {
    with_elements(op.element, heads.data, [&](auto* data) { load_row(data + offset(heads, position), op.width, width, to); });
  }

  void write(const Heads& heads, int64_t position, const float* from) const {
    with_elements(op.element, heads.data, [&](auto* data) { store_row(data + offset(heads, position), op.width, from); });
  }

  template <bool kBack>
  void turn(int64_t position, float* row) const {
    if (op.cosines == nullptr) return;
    const int64_t turned = padded(op.width), at = position * turned;
    turn_row<kBack>(row, turned, op.cosines + at, op.sines + at);
  }

  void read_turned(const Heads& heads, int64_t position, float* to) const {
    read(heads, position, to);
    turn<false>(position, to);
  }

  void write_turned_back(const Heads& heads, int64_t position, float* row) const {
    turn<true>(position, row);
    write(heads, position, row);
  }

  float* stats(int64_t position) const { return op.stats + 2 * ((batch * op.heads + head) * op.n + position); }

  // Scores in base 2 are `scale()` times products with queries that were multiplied by `sign()`: exact, and never negative,
  // so that the largest product gives the largest score.
  float sign() const { return op.scale > 0 ? 1.0f : op.scale < 0 ? -1.0f : 0.0f; }
  float scale() const { return op.scale == 0 ? 1.0f : __builtin_fabsf(op.scale) * kLog2E; }
};

// The positions of a tile that take part.
struct Tile {
  int64_t position[kTile];  // -1: the lane is idle
  int lanes;                // behind the last that takes part

  Tile(const SparseAttention& op, int64_t tile) : lanes(0) {
    for (int lane = 0; lane < kTile; ++lane) {
      const int64_t at = op.lists.queries[tile * kTile + lane];
      position[lane] = at < op.n ? at : -1;
      if (position[lane] >= 0) lanes = lane + 1;
    }
  }
};

// rows [kTile, padded width] -> columns [padded width, kTile].
static inline void to_columns(const float* rows, int64_t width, float* columns) {
  transpose(rows, width, kTile, width, columns, kTile);
}
static inline void to_rows(const float* columns, int64_t width, float* rows) {
  transpose(columns, kTile, width, kTile, rows, width);
}

static inline void scale_all(float* values, int64_t count, float factor) {
  for (int64_t i = 0; i < count; i += kWidth) store(values + i, load(values + i) * factor);
}

constexpr int kMostKeys = 64;  // of a block

// Keys of one run, and the lanes that meet them.
struct Keys {
  int count;
  int64_t key[kMostKeys];
  uint64_t mask[kMostKeys];
  bool masked;
  int first_group, groups;
};

// Walks the keys of a tile in blocks of up to Prepared::kKeys: prepared.fill(block, head.width) finds their rows, visit(block)
// uses them. Keys that the key mask forbids are left out.
template <class Prepared, class Visit>
static inline void walk(const Head& head, int64_t tile, const Prepared& prepared, const Visit& visit) {
  const SparseAttention& op = head.op;
  const TileLists& lists = op.lists;
  const bool filtered = op.key_mask != nullptr && (op.mask_text_queries || tile >= lists.text_tiles);
  const uint8_t* allowed = filtered ? op.key_mask + head.batch * op.mask_len : nullptr;
  typename Prepared::Block block;
  for (int64_t r = lists.run_start[tile]; r < lists.run_start[tile + 1]; ++r) {
    const Run& run = lists.runs[r];
    block.masked = run.mask >= 0;
    block.first_group = run.first_group;
    block.groups = run.groups;
    for (int i = 0; i < run.count;) {
      for (block.count = 0; i < run.count && block.count < Prepared::kKeys; ++i) {
        const int64_t key = lists.keys[run.key + i];
        if (key >= op.n || (filtered && key < op.mask_len && !allowed[key])) continue;
        block.key[block.count] = key;
        if (block.masked) block.mask[block.count] = lists.masks[run.mask + i];
        ++block.count;
      }
      if (block.count == 0) continue;
      prepared.fill(block, head.width);
      visit(block);
    }
  }
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
