// Sparse attention for one instruction set, forward and backward.
//
//   s_ij = scale q_i . k_j     p_i = softmax_j(s_i) over the keys of the pattern     o_i = sum_j p_ij v_j
//   dv_j = sum_i p_ij do_i     dp_ij = do_i . v_j     ds_ij = p_ij (dp_ij - do_i . o_i) scale
//   dq_i = sum_j ds_ij k_j     dk_j = sum_i ds_ij q_i
//
// A tile of 64 queries lies across the lanes: its channels are rows, scores are [key, query], and so are softmax weights. Keys
// and values are used row by row as they lie, one number against four vectors of queries, so that any list of keys is as good
// as a dense block and nothing is transposed but the tile itself. Keys and values of a head are made float32 and turned once,
// before its tiles. Softmax goes from block to block of keys (running maximum and sum); the backward recomputes the weights
// from (maximum, sum). Saved: q, k, v, out, maxima and sums. Inside all is float32.
//
// Floor, for P allowed pairs: 4 D P FLOPs forward, 10 D P backward; q, k, v and out once.
#include "sparse_attention.h"

#include "product.h"
#include "rows.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {

namespace {

constexpr float kLog2E = 0x1.715476p0f;
constexpr float kInfinity = __builtin_inff();

// Calls function(const T*) or function(T*) with the elements' own type.
template <class Function>
inline void with_elements(Element element, void* data, const Function& function) {
  switch (element) {
    case Element::float32:
      return function(static_cast<float*>(data));
    case Element::bfloat16:
      return function(static_cast<BFloat16*>(data));
    case Element::float16:
      return function(static_cast<Float16*>(data));
  }
}

// One (batch, head) of an op: rows of tensors by position.
struct Head {
  const SparseAttention& op;
  int64_t batch, head;

  int64_t offset(const Heads& heads, int64_t position) const {
    return batch * heads.stride_b + head * heads.stride_h + position * heads.stride_n;
  }

  void read(const Heads& heads, int64_t position, float* to) const {
    with_elements(op.element, heads.data, [&](auto* data) { load_row(data + offset(heads, position), op.width, to); });
  }

  void write(const Heads& heads, int64_t position, const float* from) const {
    with_elements(op.element, heads.data, [&](auto* data) { store_row(data + offset(heads, position), op.width, from); });
  }

  template <bool kBack>
  void turn(int64_t position, float* row) const {
    if (op.cosines == nullptr) return;
    const int64_t width = padded(op.width), at = position * width;
    turn_row<kBack>(row, width, op.cosines + at, op.sines + at);
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

// Hands out pieces of the scratch memory.
struct Arena {
  float* next;
  float* take(int64_t floats) {
    float* piece = next;
    next += floats;
    return piece;
  }
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
void to_columns(const float* rows, int64_t width, float* columns) { transpose(rows, width, kTile, width, columns, kTile); }
void to_rows(const float* columns, int64_t width, float* rows) { transpose(columns, kTile, width, kTile, rows, width); }

void scale_all(float* values, int64_t count, float factor) {
  for (int64_t i = 0; i < count; i += kWidth) store(values + i, load(values + i) * factor);
}

void clear(float* values, int64_t count) { memset(values, 0, sizeof(float) * count); }

// Keys of one run, and the lanes that meet them.
struct Block {
  int count;
  int64_t key[kKeyBlock];
  uint64_t mask[kKeyBlock];
  bool masked;
  int first_group, groups;
  const float* k;  // [count + kSpareRows, padded width]
  const float* v;
};

// Keys and values of a head by position, and room for those of a block that do not follow each other.
struct Prepared {
  const float* k;  // [N + kSpareRows, padded width]
  const float* v;
  float* block_k;  // [kKeyBlock + kSpareRows, padded width]
  float* block_v;

  void fill(Block& block, int64_t width) const {
    const int64_t first = block.key[0];
    block.k = k + first * width;
    block.v = v + first * width;
    if (block.key[block.count - 1] - first == block.count - 1) return;  // ascending: without gaps
    for (int i = 0; i < block.count; ++i) {
      memcpy(block_k + i * width, k + block.key[i] * width, sizeof(float) * width);
      memcpy(block_v + i * width, v + block.key[i] * width, sizeof(float) * width);
    }
    block.k = block_k;
    block.v = block_v;
  }
};

// Walks the keys of a tile in blocks: calls visit(block). Keys that the key mask forbids are left out.
template <class Visit>
void walk(const Head& head, int64_t tile, const Prepared& prepared, const Visit& visit) {
  const SparseAttention& op = head.op;
  const TileLists& lists = op.lists;
  const bool filtered = op.key_mask != nullptr && (op.mask_text_queries || tile >= lists.text_tiles);
  const uint8_t* allowed = filtered ? op.key_mask + head.batch * op.mask_len : nullptr;
  Block block;
  for (int64_t r = lists.run_start[tile]; r < lists.run_start[tile + 1]; ++r) {
    const Run& run = lists.runs[r];
    block.masked = run.mask >= 0;
    block.first_group = run.first_group;
    block.groups = run.groups;
    for (int i = 0; i < run.count;) {
      for (block.count = 0; i < run.count && block.count < kKeyBlock; ++i) {
        const int64_t key = lists.keys[run.key + i];
        if (key >= op.n || (filtered && key < op.mask_len && !allowed[key])) continue;
        block.key[block.count] = key;
        if (block.masked) block.mask[block.count] = lists.masks[run.mask + i];
        ++block.count;
      }
      if (block.count == 0) continue;
      prepared.fill(block, padded(op.width));
      visit(block);
    }
  }
}

// scores[key][lane] = sum over channels of rows[key] * columns[.][lane], for the lanes of the block.
void products_with_columns(const Block& block, const float* rows, const float* columns, int64_t width, float* scores) {
  const int64_t lane = block.first_group * kGroup;
  multiply(rows, padded(width), 1, columns + lane, kTile, width, Nothing{}, EvenRows{scores + lane, kTile}, block.count,
           block.groups);
}

// columns[.][lane] = start + sum over keys of rows[key] * weights[key][lane].
template <class Start>
void add_weighted_rows(const Block& block, const float* rows, const float* weights, int64_t width, const Start& start,
                       float* columns) {
  const int64_t lane = block.first_group * kGroup;
  multiply(rows, 1, padded(width), weights + lane, kTile, block.count, start, EvenRows{columns + lane, kTile}, width,
           block.groups);
}

// sums[key] += sum over lanes of weights[key][lane] * rows[lane].
void add_to_keys(const Block& block, const float* weights, const float* rows, int64_t width, float* sums, float* spare) {
  float* targets[kKeyBlock + kSpareRows];
  for (int i = 0; i < block.count; ++i) targets[i] = sums + block.key[i] * width;
  for (int i = block.count; i < block.count + kSpareRows; ++i) targets[i] = spare;
  const int64_t lane = block.first_group * kGroup;
  multiply(weights + lane, kTile, 1, rows + lane * width, width, block.groups * kGroup, Result{}, ScatteredRows{targets},
           block.count, width / kGroup);
}

// ------------------------------------------------------------------------------------------------ forward

struct Softmax {
  float scale;
  float max[kTile];     // of scores in base 2; -inf before the first key
  float sum[kTile];
  float shrink[kTile];  // what a block makes of the sums before it
};

// scores -> weights relative to the running maximum, for kVectors vectors of lanes. Weights below 2^-126 count as that.
template <int kVectors, bool kMasked>
void weigh_vectors(const Block& block, int lane, float* scores, Softmax& softmax) {
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
    sum[v] = load(softmax.sum + at) * shrink;
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
  for (int v = 0; v < kVectors; ++v) store(softmax.sum + lane + v * kWidth, sum[v]);
}

void weigh(const Block& block, float* scores, Softmax& softmax) {
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

void mean_of_rows(const float* rows, int64_t n, int64_t width, float* mean) {
  clear(mean, width);
  for (int64_t row = 0; row < n; ++row) {
    for (int64_t d = 0; d < width; d += kWidth) store(mean + d, load(mean + d) + load(rows + row * width + d));
  }
  scale_all(mean, width, 1.0f / static_cast<float>(n));
}

void prepare(const Head& head, int64_t begin, int64_t end, float* k, float* v) {
  const int64_t width = padded(head.op.width);
  for (int64_t position = begin; position < end; ++position) {
    head.read_turned(head.op.k, position, k + position * width);
    head.read_turned(head.op.v, position, v + position * width);
  }
}

}  // namespace

void sparse_attention_prepare(const SparseAttention& op, int64_t batch, int64_t head, int64_t begin, int64_t end, float* k,
                              float* v) {
  prepare(Head{op, batch, head}, begin, end, k, v);
}

void sparse_attention_forward(const SparseAttention& op, int64_t batch, int64_t head_index, int64_t tile_index,
                              const float* k, const float* v, float* scratch) {
  const Tile tile(op, tile_index);
  if (tile.lanes == 0) return;
  const Head head{op, batch, head_index};
  const int64_t width = padded(op.width);
  Arena arena{scratch};
  float* rows = arena.take(kTile * width);
  float* queries = arena.take(kTile * width);
  float* out = arena.take(kTile * (width + kSpareRows));
  float* scores = arena.take(kTile * (kKeyBlock + kSpareRows));
  Prepared prepared{k, v, nullptr, nullptr};
  prepared.block_k = arena.take((kKeyBlock + kSpareRows) * width);
  prepared.block_v = arena.take((kKeyBlock + kSpareRows) * width);

  for (int lane = 0; lane < kTile; ++lane) {
    if (tile.position[lane] >= 0) {
      head.read_turned(op.q, tile.position[lane], rows + lane * width);
    } else {
      clear(rows + lane * width, width);
    }
  }
  scale_all(rows, kTile * width, head.sign());
  to_columns(rows, width, queries);
  clear(out, kTile * width);
  Softmax softmax;
  softmax.scale = head.scale();
  for (int lane = 0; lane < kTile; ++lane) softmax.max[lane] = -kInfinity, softmax.sum[lane] = 0.0f;

  walk(head, tile_index, prepared, [&](const Block& block) {
    products_with_columns(block, block.k, queries, op.width, scores);
    weigh(block, scores, softmax);
    const ScaledResult before{softmax.shrink + block.first_group * kGroup};
    add_weighted_rows(block, block.v, scores, op.width, before, out);
  });

  for (int lane = 0; lane < kTile; lane += kWidth) {
    const Vec inverse = 1.0f / load(softmax.sum + lane);
    for (int64_t d = 0; d < width; ++d) store(out + d * kTile + lane, load(out + d * kTile + lane) * inverse);
  }
  to_rows(out, width, rows);
  for (int lane = 0; lane < tile.lanes; ++lane) {
    const int64_t position = tile.position[lane];
    if (position < 0) continue;
    float* row = rows + lane * width;
    if (softmax.sum[lane] == 0.0f) mean_of_rows(v, op.n, width, row);  // no legal key
    head.stats(position)[0] = softmax.max[lane];
    head.stats(position)[1] = softmax.sum[lane];
    head.write(op.out, position, row);
  }
}

// ------------------------------------------------------------------------------------------------ backward

namespace {

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

// `unseen` gathers dout of the queries without a legal key.
void read_tile(const Head& head, const Tile& tile, float* scratch_row, TileGradients& at, float* unseen) {
  const int64_t width = padded(head.op.width);
  for (int lane = 0; lane < kTile; ++lane) {
    const int64_t position = tile.position[lane];
    float* q = at.q_rows + lane * width;
    float* dout = at.dout_rows + lane * width;
    at.max[lane] = at.inverse[lane] = at.delta[lane] = 0.0f;
    if (position < 0) {
      clear(q, width);
      clear(dout, width);
      continue;
    }
    head.read_turned(head.op.q, position, q);
    head.read(head.op.dout, position, dout);
    head.read(head.op.out, position, scratch_row);
    Vec delta{};
    for (int64_t d = 0; d < width; d += kWidth) delta = multiply_add(load(dout + d), load(scratch_row + d), delta);
    for (int i = 0; i < kWidth; ++i) at.delta[lane] += delta[i];
    const float* stats = head.stats(position);
    if (stats[1] == 0.0f) {
      for (int64_t d = 0; d < width; ++d) unseen[d] += dout[d];
    } else {
      at.max[lane] = stats[0];
      at.inverse[lane] = 1.0f / stats[1];
    }
  }
  to_columns(at.q_rows, width, at.q_columns);
  scale_all(at.q_columns, kTile * width, head.sign());
  to_columns(at.dout_rows, width, at.dout_columns);
  clear(at.dq, kTile * width);
}

// scores -> weights p; dp -> ds.
void weigh_gradients(const Block& block, const TileGradients& at, const Head& head, float* scores, float* dp) {
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

}  // namespace

void sparse_attention_backward(const SparseAttention& op, int64_t batch, int64_t head_index, float* scratch) {
  const Head head{op, batch, head_index};
  const int64_t width = padded(op.width);
  Arena arena{scratch};
  TileGradients at;
  at.q_rows = arena.take(kTile * width);
  at.q_columns = arena.take(kTile * width);
  at.dout_rows = arena.take(kTile * width);
  at.dout_columns = arena.take(kTile * width);
  at.dq = arena.take(kTile * (width + kSpareRows));
  float* scores = arena.take(kTile * (kKeyBlock + kSpareRows));
  float* dp = arena.take(kTile * (kKeyBlock + kSpareRows));
  Prepared prepared;
  prepared.block_k = arena.take((kKeyBlock + kSpareRows) * width);
  prepared.block_v = arena.take((kKeyBlock + kSpareRows) * width);
  float* k = arena.take(sparse_attention_prepared(width, op.n));
  float* v = arena.take(sparse_attention_prepared(width, op.n));
  prepared.k = k;
  prepared.v = v;
  prepare(head, 0, op.n, k, v);
  float* dk = arena.take(op.n * width);
  float* dv = arena.take(op.n * width);
  float* spare = arena.take(width);
  float* unseen = arena.take(width);
  clear(dk, 2 * op.n * width + 2 * width);

  for (int64_t tile_index = 0; tile_index < op.lists.tiles; ++tile_index) {
    const Tile tile(op, tile_index);
    if (tile.lanes == 0) continue;
    read_tile(head, tile, spare, at, unseen);
    walk(head, tile_index, prepared, [&](const Block& block) {
      products_with_columns(block, block.k, at.q_columns, op.width, scores);
      products_with_columns(block, block.v, at.dout_columns, op.width, dp);
      weigh_gradients(block, at, head, scores, dp);
      add_to_keys(block, scores, at.dout_rows, width, dv, spare);
      add_to_keys(block, dp, at.q_rows, width, dk, spare);
      add_weighted_rows(block, block.k, dp, op.width, Result{}, at.dq);
    });
    to_rows(at.dq, width, at.q_rows);
    for (int lane = 0; lane < tile.lanes; ++lane) {
      if (tile.position[lane] >= 0) head.write_turned_back(op.dq, tile.position[lane], at.q_rows + lane * width);
    }
  }
  for (int64_t key = 0; key < op.n; ++key) {
    for (int64_t d = 0; d < width; ++d) dv[key * width + d] += unseen[d] / static_cast<float>(op.n);
    head.write_turned_back(op.dv, key, dv + key * width);
    head.write_turned_back(op.dk, key, dk + key * width);
  }
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
