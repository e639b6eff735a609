// Sparse attention of bfloat16 with products on matrix tiles (amx.h); formulas, order of keys and softmax are those of
// sparse_attention_kernel.cpp.
//
// Operands are bfloat16: q, k, v after they were turned, dout, softmax weights (as the oracle rounds them) and gradients of
// scores. Scores, softmax and every sum are float32. A product wants its left side by rows and its right side in pairs of
// rows, so a block of keys has its weights as rows (for dk, dv) or as pairs (for out, dq), and its values (its keys, in the
// backward) by columns: those are prepared once a head, and made again for keys that do not follow each other. Keys, lanes and
// channels count in 32s; what fills them up is zero, never somebody else's.
//
// Compiled, and emulated in the tests; it has not run on a processor with tiles yet: docs/decisions/0003.
#include "amx.h"
#include "attention_softmax.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {

namespace {

constexpr int64_t whole_squares(int64_t count) { return (count + kSquare - 1) / kSquare * kSquare; }

BFloat16* take_rows(Arena& arena, int64_t count) { return reinterpret_cast<BFloat16*>(arena.take(count / 2)); }
uint32_t* take_pairs(Arena& arena, int64_t count) { return reinterpret_cast<uint32_t*>(arena.take(count)); }

// Keys of one run, their lanes and their rows, all filled up to squares.
struct Block : Keys {
  int64_t rows, first_lane, lanes;
  const BFloat16* k;  // [rows, width]
  const BFloat16* v;
  const BFloat16* columns;  // [width, rows]
  int64_t columns_stride;
};

// Keys and values of a head in bfloat16, turned: rows [whole_squares(N), width] and columns [width, whole_squares(N)].
struct Prepared {
  using Block = DALLE_FAST_ISA::Block;
  static constexpr int kKeys = kMostKeys;
  const BFloat16* k;
  const BFloat16* v;
  const BFloat16* columns;
  bool columns_of_v;  // forward; else they are those of k
  int64_t n;          // filled up
  BFloat16* block_k;  // room for a block
  BFloat16* block_v;
  BFloat16* block_columns;

  void fill(Block& block, int64_t width) const {
    block.rows = whole_squares(block.count);
    block.first_lane = block.first_group * kGroup / kSquare * kSquare;
    block.lanes = whole_squares((block.first_group + block.groups) * kGroup) - block.first_lane;
    const int64_t first = block.key[0];
    if (block.count == block.rows && block.key[block.count - 1] - first == block.count - 1) {  // ascending: without gaps
      block.k = k + first * width;
      block.v = v + first * width;
      block.columns = columns + first;
      block.columns_stride = n;
      return;
    }
    gather(block, k, width, block_k);
    gather(block, v, width, block_v);
    transpose_rows(columns_of_v ? block_v : block_k, block.rows, width, block_columns, kKeys);
    block.k = block_k;
    block.v = block_v;
    block.columns = block_columns;
    block.columns_stride = kKeys;
  }

  static void gather(const Block& block, const BFloat16* rows, int64_t width, BFloat16* to) {
    for (int i = 0; i < block.count; ++i) memcpy(to + i * width, rows + block.key[i] * width, sizeof(BFloat16) * width);
    memset(to + block.count * width, 0, sizeof(BFloat16) * (block.rows - block.count) * width);
  }
};

// The rows of k or v at positions begin .. end - 1.
void prepare_rows(const Head& head, const Heads& heads, int64_t begin, int64_t end, BFloat16* rows) {
  const SparseAttention& op = head.op;
  for (int64_t position = begin; position < end; ++position) {
    const BFloat16* from = static_cast<const BFloat16*>(heads.data) + head.offset(heads, position);
    for (int64_t d = 0; d < head.width; d += kWidth) {
      float piece[kWidth];
      load_row(from + d, op.width - d < kWidth ? op.width - d : kWidth, kWidth, piece);
      const int64_t at = position * padded(op.width) + d;
      if (op.cosines != nullptr && d < padded(op.width)) turn_row<false>(piece, kWidth, op.cosines + at, op.sines + at);
      store_row_vector(rows + position * head.width + d, load(piece));
    }
  }
}

// A product makes sums for keys and lanes that a block was filled up with: they weigh nothing.
void clear_outside(const Block& block, float* scores) {
  const int64_t first = block.first_group * kGroup, last = first + block.groups * kGroup;
  const int64_t end = block.first_lane + block.lanes;
  for (int64_t i = 0; i < block.rows; ++i) {
    float* row = scores + i * kTile;
    const bool filler = i >= block.count;
    clear(row + block.first_lane, filler ? block.lanes : first - block.first_lane);
    if (!filler) clear(row + last, end - last);
  }
}

// scores[key][lane] = rows[key] . columns[.][lane]; columns: pairs [width / 2, kTile].
void products_with_columns(const Block& block, const BFloat16* rows, const uint32_t* columns, int64_t width,
                           float* scores) {
  const int64_t lane = block.first_lane;
  multiply_on_tiles<false>(rows, width, columns + lane, kTile, width, scores + lane, kTile, block.rows, block.lanes);
}

// sums[.][lane] += sum over keys of the block's columns * weights[key][lane]; weights: pairs [rows / 2, kTile].
void add_weighted_columns(const Block& block, const uint32_t* weights, int64_t width, float* sums) {
  const int64_t lane = block.first_lane;
  multiply_on_tiles<true>(block.columns, block.columns_stride, weights + lane, kTile, block.rows, sums + lane, kTile, width,
                          block.lanes);
}

// sums[key] += sum over lanes of weights[key][lane] * rows[lane]; rows: pairs [kTile / 2, width]; scratch [kMostKeys, width].
void add_to_keys(const Block& block, const BFloat16* weights, const uint32_t* rows, int64_t width, float* sums,
                 float* scratch) {
  const int64_t lane = block.first_lane;
  multiply_on_tiles<false>(weights + lane, kTile, rows + lane / 2 * width, width, block.lanes, scratch, width, block.rows,
                           width);
  for (int i = 0; i < block.count; ++i) {
    float* sum = sums + block.key[i] * width;
    for (int64_t d = 0; d < width; d += kWidth) store(sum + d, load(sum + d) + load(scratch + i * width + d));
  }
}

// The sums so far of the lanes that a block meets, relative to their new maximum.
void shrink(const Block& block, const Softmax& softmax, int64_t width, float* out) {
  const int first = block.first_group * kGroup, last = first + block.groups * kGroup;
  for (int64_t d = 0; d < width; ++d) {
    for (int lane = first; lane < last; lane += kWidth) {
      float* at = out + d * kTile + lane;
      store(at, load(at) * load(softmax.shrink + lane));
    }
  }
}

// Both of a head, from memory that sparse_attention_prepare or the backward filled.
Prepared read_prepared(const SparseAttention& op, const float* k, const float* v, bool columns_of_v, Arena& arena) {
  const int64_t width = whole_squares(op.width), n = whole_squares(op.n);
  Prepared prepared{};
  prepared.k = reinterpret_cast<const BFloat16*>(k);
  prepared.v = reinterpret_cast<const BFloat16*>(v);
  prepared.columns = (columns_of_v ? prepared.v : prepared.k) + n * width;
  prepared.columns_of_v = columns_of_v;
  prepared.n = n;
  prepared.block_k = take_rows(arena, kMostKeys * width);
  prepared.block_v = take_rows(arena, kMostKeys * width);
  prepared.block_columns = take_rows(arena, kMostKeys * width);
  return prepared;
}

// Positions begin .. end - 1 of k and v, by rows both, by columns the one that the pass multiplies from that side. Whatever
// lies behind the last position is transposed with it and never used.
void prepare(const Head& head, int64_t begin, int64_t end, bool columns_of_v, float* k, float* v) {
  BFloat16* keys = reinterpret_cast<BFloat16*>(k);
  BFloat16* values = reinterpret_cast<BFloat16*>(v);
  prepare_rows(head, head.op.k, begin, end, keys);
  prepare_rows(head, head.op.v, begin, end, values);
  const int64_t n = whole_squares(head.op.n), count = whole_squares(end) - begin;
  BFloat16* rows = columns_of_v ? values : keys;
  transpose_rows(rows + begin * head.width, count, head.width, rows + n * head.width + begin, n);
}

}  // namespace

void sparse_attention_prepare(const SparseAttention& op, int64_t batch, int64_t head, int64_t begin, int64_t end, float* k,
                              float* v) {
  prepare(Head{op, batch, head, whole_squares(op.width)}, begin, end, true, k, v);
}

void sparse_attention_forward(const SparseAttention& op, int64_t batch, int64_t head_index, int64_t tile_index,
                              const float* k, const float* v, float* scratch) {
  const Tile tile(op, tile_index);
  if (tile.lanes == 0) return;
  const HeldTiles held;
  const int64_t width = whole_squares(op.width);
  const Head head{op, batch, head_index, width};
  Arena arena{scratch};
  float* rows = arena.take(kTile * width);
  float* columns = arena.take(kTile * width);
  float* out = arena.take(kTile * width);
  float* scores = arena.take(kMostKeys * kTile);
  uint32_t* queries = take_pairs(arena, kTile * width / 2);
  uint32_t* weights = take_pairs(arena, kMostKeys * kTile / 2);
  const Prepared prepared = read_prepared(op, k, v, true, arena);

  read_queries(head, tile, rows, columns);
  pack_pairs(columns, kTile, width, kTile, queries);
  clear(out, kTile * width);
  Softmax softmax(head.scale());
  walk(head, tile_index, prepared, [&](const Block& block) {
    products_with_columns(block, block.k, queries, width, scores);
    weigh(block, scores, softmax);
    clear_outside(block, scores);
    pack_pairs(scores + block.first_lane, kTile, block.rows, block.lanes, weights + block.first_lane);
    shrink(block, softmax, width, out);
    add_weighted_columns(block, weights, width, out);
  });
  write_results(head, tile, softmax, prepared.v, out, rows);
}

void sparse_attention_backward(const SparseAttention& op, int64_t batch, int64_t head_index, float* scratch) {
  const HeldTiles held;
  const int64_t width = whole_squares(op.width);
  const Head head{op, batch, head_index, width};
  Arena arena{scratch};
  TileGradients at;
  at.q_rows = arena.take(kTile * width);
  at.q_columns = arena.take(kTile * width);
  at.dout_rows = arena.take(kTile * width);
  at.dout_columns = arena.take(kTile * width);
  at.dq = arena.take(kTile * width);
  uint32_t* q_rows = take_pairs(arena, kTile * width / 2);
  uint32_t* q_columns = take_pairs(arena, kTile * width / 2);
  uint32_t* dout_rows = take_pairs(arena, kTile * width / 2);
  uint32_t* dout_columns = take_pairs(arena, kTile * width / 2);
  float* scores = arena.take(kMostKeys * kTile);
  float* dp = arena.take(kMostKeys * kTile);
  BFloat16* weight_rows = take_rows(arena, kMostKeys * kTile);
  uint32_t* weight_pairs = take_pairs(arena, kMostKeys * kTile / 2);
  float* products = arena.take(kMostKeys * width);
  float* k = arena.take(sparse_attention_amx_prepared(op.width, op.n));
  float* v = arena.take(sparse_attention_amx_prepared(op.width, op.n));
  prepare(head, 0, op.n, false, k, v);
  const Prepared prepared = read_prepared(op, k, v, false, arena);
  float* dk = arena.take(op.n * width);
  float* dv = arena.take(op.n * width);
  float* unseen = arena.take(width);
  clear(dk, (2 * op.n + 1) * width);

  for (int64_t tile_index = 0; tile_index < op.lists.tiles; ++tile_index) {
    const Tile tile(op, tile_index);
    if (tile.lanes == 0) continue;
    read_tile<2>(head, tile, at, unseen, 2 * kTileRows);
    pack_pairs(at.q_rows, width, kTile, width, q_rows);
    pack_pairs(at.q_columns, kTile, width, kTile, q_columns);
    pack_pairs(at.dout_rows, width, kTile, width, dout_rows);
    pack_pairs(at.dout_columns, kTile, width, kTile, dout_columns);
    walk(head, tile_index, prepared, [&](const Block& block) {
      const int64_t lane = block.first_lane;
      products_with_columns(block, block.k, q_columns, width, scores);
      products_with_columns(block, block.v, dout_columns, width, dp);
      weigh_gradients(block, at, head, scores, dp);
      clear_outside(block, scores);
      clear_outside(block, dp);
      pack_rows(scores + lane, kTile, block.rows, block.lanes, weight_rows + lane);
      add_to_keys(block, weight_rows, dout_rows, width, dv, products);
      pack_rows(dp + lane, kTile, block.rows, block.lanes, weight_rows + lane);
      add_to_keys(block, weight_rows, q_rows, width, dk, products);
      pack_pairs(dp + lane, kTile, block.rows, block.lanes, weight_pairs + lane);
      add_weighted_columns(block, weight_pairs, width, at.dq);
    });
    write_query_gradients(head, tile, at);
  }
  write_key_gradients(head, unseen, dk, dv);
}

bool tiles_multiply() {
  BFloat16 a[kSquare * kSquare];
  uint32_t b[kSquare / 2 * kSquare];
  float c[kSquare * kSquare];
  // Small integers: exact in any order. By rows of a, and of b, which has two in a pair.
  const auto left = [](int64_t i, int64_t k) { return static_cast<float>((3 * i + 5 * k) % 17 - 8); };
  const auto right = [](int64_t k, int64_t j) { return static_cast<float>((7 * k + 2 * j) % 13 - 6); };
  for (int64_t i = 0; i < kSquare; ++i) {
    for (int64_t k = 0; k < kSquare; ++k) a[i * kSquare + k].bits = static_cast<uint16_t>(to_bits(left(i, k)) >> 16);
  }
  for (int64_t k = 0; k < kSquare; k += 2) {
    for (int64_t j = 0; j < kSquare; ++j) {
      b[k / 2 * kSquare + j] = to_bits(right(k, j)) >> 16 | (to_bits(right(k + 1, j)) & 0xFFFF0000);
    }
  }
  const HeldTiles held;
  multiply_on_tiles<false>(a, kSquare, b, kSquare, kSquare, c, kSquare, kSquare, kSquare);
  multiply_on_tiles<true>(a, kSquare, b, kSquare, kSquare, c, kSquare, kSquare, kSquare);
  for (int64_t i = 0; i < kSquare; ++i) {
    for (int64_t j = 0; j < kSquare; ++j) {
      float sum = 0.0f;
      for (int64_t k = 0; k < kSquare; ++k) sum += left(i, k) * right(k, j);
      if (c[i * kSquare + j] != 2 * sum) return false;
    }
  }
  return true;
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
