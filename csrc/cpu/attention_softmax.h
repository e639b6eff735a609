// What attention does between its products: softmax over blocks of keys, forward and backward. Include from *_kernel.cpp
// alone (isa.h).
#pragma once

#include "attention_walk.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {

// ------------------------------------------------------------------------------------------------ forward

struct Softmax {
  const float scale;
  float max[kTile];     // of scores in base 2; -inf before the first key
  float sum[kTile];
  float shrink[kTile];  // what a block makes of the sums before it

  explicit Softmax(float factor) : scale(factor) {
    for (int lane = 0; lane < kTile; ++lane) max[lane] = -kInfinity, sum[lane] = 0.0f;
  }
};

// scores -> weights relative to the running maximum, for kVectors vectors of lanes. Weights below 2^-126 count as that.
template <int kVectors, bool kMasked>
static inline void weigh_vectors(const Keys& block, int lane, float* scores, Softmax& softmax) {
  const Vec nothing = broadcast(-kInfinity), scale = broadcast(softmax.scale);
  Vec max[kVectors], base[kVectors], sum[kVectors];
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) max[v] = nothing;
  for (int i = 0; i < block.count; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int at = lane + v * kWidth;
      Vec score = load(scores + i * kTile + at);
      if (kMasked) score = where_bits(block.mask[i] >> at, score, nothing);
      max[v] = larger(max[v], score);
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const int at = lane + v * kWidth;
    const Vec before = load(softmax.max + at), now = larger(before, max[v] * scale);
    base[v] = now == nothing ? Vec{} : now;  // no key yet: any base will do
    const Vec shrink = exp2(before - base[v]);
    sum[v] = Vec{};
    store(softmax.shrink + at, shrink);
    store(softmax.max + at, now);
  }
  for (int i = 0; i < block.count; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      const int at = lane + v * kWidth;
      Vec weight = exp2_normal(multiply_add(load(scores + i * kTile + at), scale, -base[v]));
      if (kMasked) weight = where_bits(block.mask[i] >> at, weight, Vec{});
      store(scores + i * kTile + at, weight);
      sum[v] += weight;
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const int at = lane + v * kWidth;
    store(softmax.sum + at, multiply_add(load(softmax.sum + at), load(softmax.shrink + at), sum[v]));
  }
}

static inline void weigh(const Keys& block, float* scores, Softmax& softmax) {
  const int end = (block.first_group + block.groups) * kGroup;
  constexpr int kTwo = 2 * kWidth;  // two chains of sums hide the latency of an addition
  int lane = block.first_group * kGroup;
  for (; lane + kTwo <= end; lane += kTwo) {
    block.masked ? weigh_vectors<2, true>(block, lane, scores, softmax) : weigh_vectors<2, false>(block, lane, scores, softmax);
  }
  for (; lane < end; lane += kWidth) {
    block.masked ? weigh_vectors<1, true>(block, lane, scores, softmax) : weigh_vectors<1, false>(block, lane, scores, softmax);
  }
}

// Queries of a tile, times the sign of scale: columns [head.width, kTile]; rows is scratch of that size.
static inline void read_queries(const Head& head, const Tile& tile, float* rows, float* columns) {
  const int64_t width = head.width;
  for (int lane = 0; lane < kTile; ++lane) {
    if (tile.position[lane] >= 0) {
      head.read_turned(head.op.q, tile.position[lane], rows + lane * width);
    } else {
      clear(rows + lane * width, width);
    }
  }
  scale_all(rows, kTile * width, head.sign());
  to_columns(rows, width, columns);
}

template <class T>
static inline void mean_of_rows(const T* rows, int64_t n, int64_t width, float* mean) {
  clear(mean, width);
  for (int64_t row = 0; row < n; ++row) {
    for (int64_t d = 0; d < width; d += kWidth) store(mean + d, load(mean + d) + load_row_vector(rows + row * width + d));
  }
  scale_all(mean, width, 1.0f / static_cast<float>(n));
}

// out [head.width, kTile], not yet divided by the sums, and the stats; values [N, head.width]; rows is scratch like out.
template <class T>
static inline void write_results(const Head& head, const Tile& tile, const Softmax& softmax, const T* values, float* out,
                                 float* rows) {
  const int64_t width = head.width;
  for (int lane = 0; lane < kTile; lane += kWidth) {
    const Vec inverse = 1.0f / load(softmax.sum + lane);
    for (int64_t d = 0; d < width; ++d) store(out + d * kTile + lane, load(out + d * kTile + lane) * inverse);
  }
  to_rows(out, width, rows);
  for (int lane = 0; lane < tile.lanes; ++lane) {
    const int64_t position = tile.position[lane];
    if (position < 0) continue;
    float* row = rows + lane * width;
    if (softmax.sum[lane] == 0.0f) mean_of_rows(values, head.op.n, width, row);  // no legal key
    head.stats(position)[0] = softmax.max[lane];
    head.stats(position)[1] = softmax.sum[lane];
    head.write(head.op.out, position, row);
  }
}

// ------------------------------------------------------------------------------------------------ backward

// Of a tile: what the queries and their gradients are, by rows and by columns.
struct TileGradients {
  float* q_rows;     // [kTile, padded width], turned
  float* q_columns;  // [padded width, kTile], times the sign of scale
  float* dout_rows;
  float* dout_columns;
  float* dq;            // [padded width + kSpareRows, kTile]
  float max[kTile];
  float inverse[kTile];  // of the sum; 0 for idle lanes and for queries without a legal key: every weight is 0
  float delta[kTile];    // dout . out
};

// `unseen` gathers dout of the queries without a legal key. delta is summed in the order of dp, so that where one key has all
// the weight both round alike and their difference is small: sums of `depth` channels, each of kChains sums taken in turn.
template <int kChains = 1>
static inline void read_tile(const Head& head, const Tile& tile, TileGradients& at, float* unseen,
                             int64_t depth = INT64_MAX) {
  const int64_t width = head.width;
  float* out_rows = at.q_columns;  // until the queries need it
  float* out_columns = at.dq;
  for (int lane = 0; lane < kTile; ++lane) {
    const int64_t position = tile.position[lane];
    float* q = at.q_rows + lane * width;
    float* dout = at.dout_rows + lane * width;
    float* out = out_rows + lane * width;
    at.max[lane] = at.inverse[lane] = 0.0f;
    if (position < 0) {
      clear(q, width);
      clear(dout, width);
      clear(out, width);
      continue;
    }
    head.read_turned(head.op.q, position, q);
    head.read(head.op.dout, position, dout);
    head.read(head.op.out, position, out);
    const float* stats = head.stats(position);
    if (stats[1] == 0.0f) {
      for (int64_t d = 0; d < width; ++d) unseen[d] += dout[d];
    } else {
      at.max[lane] = stats[0];
      at.inverse[lane] = 1.0f / stats[1];
    }
  }
  to_columns(at.dout_rows, width, at.dout_columns);
  to_columns(out_rows, width, out_columns);
  for (int lane = 0; lane < kTile; lane += kWidth) {
    Vec delta{};
    for (int64_t d = 0; d < head.op.width;) {
      Vec sums[kChains] = {};
      for (int64_t i = 0; i < depth && d < head.op.width; ++i, ++d) {
        Vec& sum = sums[i % kChains];
        sum = multiply_add(load(at.dout_columns + d * kTile + lane), load(out_columns + d * kTile + lane), sum);
      }
      for (int i = 1; i < kChains; ++i) sums[0] += sums[i];
      delta += sums[0];
    }
    store(at.delta + lane, delta);
  }
  to_columns(at.q_rows, width, at.q_columns);
  scale_all(at.q_columns, kTile * width, head.sign());
  clear(at.dq, kTile * width);
}

// scores -> weights p; dp -> ds.
static inline void weigh_gradients(const Keys& block, const TileGradients& at, const Head& head, float* scores, float* dp) {
  const Vec scale2 = broadcast(head.scale()), scale = broadcast(head.op.scale);
  const int end = (block.first_group + block.groups) * kGroup;
  for (int i = 0; i < block.count; ++i) {
    for (int lane = block.first_group * kGroup; lane < end; lane += kWidth) {
      float* score = scores + i * kTile + lane;
      float* gradient = dp + i * kTile + lane;
      Vec weight = exp2(multiply_add(load(score), scale2, -load(at.max + lane))) * load(at.inverse + lane);
      if (block.masked) weight = where_bits(block.mask[i] >> lane, weight, Vec{});
      store(score, weight);
      store(gradient, weight * (load(gradient) - load(at.delta + lane)) * scale);
    }
  }
}

static inline void write_query_gradients(const Head& head, const Tile& tile, TileGradients& at) {
  float* rows = at.q_rows;  // done with
  to_rows(at.dq, head.width, rows);
  for (int lane = 0; lane < tile.lanes; ++lane) {
    if (tile.position[lane] >= 0) head.write_turned_back(head.op.dq, tile.position[lane], rows + lane * head.width);
  }
}

// dk, dv [N, head.width]: scratch from here on.
static inline void write_key_gradients(const Head& head, const float* unseen, float* dk, float* dv) {
  for (int64_t key = 0; key < head.op.n; ++key) {
    float* row = dv + key * head.width;
    for (int64_t d = 0; d < head.width; ++d) row[d] += unseen[d] / static_cast<float>(head.op.n);
    head.write_turned_back(head.op.dv, key, row);
    head.write_turned_back(head.op.dk, key, dk + key * head.width);
  }
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
