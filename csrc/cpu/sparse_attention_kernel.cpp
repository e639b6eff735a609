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

#include "attention_softmax.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {

namespace {

// Keys of one run and their rows.
struct Block : Keys {
  const float* k;  // [count + kSpareRows, padded width]
  const float* v;
};

// Keys and values of a head by position, and room for those of a block that do not follow each other.
struct Prepared {
  using Block = DALLE_FAST_ISA::Block;
  static constexpr int kKeys = kKeyBlock;
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

// scores[key][lane] = sum over channels of rows[key] * columns[.][lane], for the lanes of the block.
void products_with_columns(const Block& block, const float* rows, const float* columns, int64_t width, float* scores) {
  const int64_t lane = block.first_group * kGroup;
  multiply(rows, padded(width), 1, columns + lane, kTile, width, Replace{}, EvenRows{scores + lane, kTile}, block.count,
           block.groups);
}

// columns[.][lane] += sum over keys of rows[key] * weights[key][lane].
template <class Put>
void add_weighted_rows(const Block& block, const float* rows, const float* weights, int64_t width, const Put& put,
                       float* columns) {
  const int64_t lane = block.first_group * kGroup;
  multiply(rows, 1, padded(width), weights + lane, kTile, block.count, put, EvenRows{columns + lane, kTile}, width,
           block.groups);
}

// sums[key] += sum over lanes of weights[key][lane] * rows[lane].
void add_to_keys(const Block& block, const float* weights, const float* rows, int64_t width, float* sums, float* spare) {
  float* targets[kKeyBlock + kSpareRows];
  for (int i = 0; i < block.count; ++i) targets[i] = sums + block.key[i] * width;
  for (int i = block.count; i < block.count + kSpareRows; ++i) targets[i] = spare;
  const int64_t lane = block.first_group * kGroup;
  multiply(weights + lane, kTile, 1, rows + lane * width, width, block.groups * kGroup, Add{}, ScatteredRows{targets},
           block.count, width / kGroup);
}

// ------------------------------------------------------------------------------------------------ forward

void prepare(const Head& head, int64_t begin, int64_t end, float* k, float* v) {
  const int64_t width = head.width;
  for (int64_t position = begin; position < end; ++position) {
    head.read_turned(head.op.k, position, k + position * width);
    head.read_turned(head.op.v, position, v + position * width);
  }
}

}  // namespace

void sparse_attention_prepare(const SparseAttention& op, int64_t batch, int64_t head, int64_t begin, int64_t end, float* k,
                              float* v) {
  prepare(Head{op, batch, head, padded(op.width)}, begin, end, k, v);
}

void sparse_attention_forward(const SparseAttention& op, int64_t batch, int64_t head_index, int64_t tile_index,
                              const float* k, const float* v, float* scratch) {
  const Tile tile(op, tile_index);
  if (tile.lanes == 0) return;
  const Head head{op, batch, head_index, padded(op.width)};
  const int64_t width = padded(op.width);
  Arena arena{scratch};
  float* rows = arena.take(kTile * width);
  float* queries = arena.take(kTile * width);
  float* out = arena.take(kTile * (width + kSpareRows));
  float* scores = arena.take(kTile * (kKeyBlock + kSpareRows));
  Prepared prepared{k, v, nullptr, nullptr};
  prepared.block_k = arena.take((kKeyBlock + kSpareRows) * width);
  prepared.block_v = arena.take((kKeyBlock + kSpareRows) * width);

  read_queries(head, tile, rows, queries);
  clear(out, kTile * width);
  Softmax softmax(head.scale());
  walk(head, tile_index, prepared, [&](const Block& block) {
    products_with_columns(block, block.k, queries, op.width, scores);
    weigh(block, scores, softmax);
    const AddToScaled before{softmax.shrink + block.first_group * kGroup};
    add_weighted_rows(block, block.v, scores, op.width, before, out);
  });

  write_results(head, tile, softmax, v, out, rows);
}

// ------------------------------------------------------------------------------------------------ backward

void sparse_attention_backward(const SparseAttention& op, int64_t batch, int64_t head_index, float* scratch) {
  const Head head{op, batch, head_index, padded(op.width)};
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
    read_tile(head, tile, at, unseen);
    walk(head, tile_index, prepared, [&](const Block& block) {
      products_with_columns(block, block.k, at.q_columns, op.width, scores);
      products_with_columns(block, block.v, at.dout_columns, op.width, dp);
      weigh_gradients(block, at, head, scores, dp);
      add_to_keys(block, scores, at.dout_rows, width, dv, spare);
      add_to_keys(block, dp, at.q_rows, width, dk, spare);
      add_weighted_rows(block, block.k, dp, op.width, Add{}, at.dq);
    });
    write_query_gradients(head, tile, at);
  }
  write_key_gradients(head, unseen, dk, dv);
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
