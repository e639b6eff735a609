// sparse_attention: forward in parallel over (batch, head, tile), backward over (batch, head), so that the sums of dk and dv
// have one order whatever the number of threads.
#include "sparse_attention.h"

#include <memory>

#include "exports.h"
#include "parallel.h"

namespace dalle_fast {
namespace {

std::unique_ptr<float[]> scratch_memory(int64_t floats) { return std::unique_ptr<float[]>(new float[floats]); }

int64_t padded_width(const SparseAttention& op) { return (op.width + 15) / 16 * 16; }

}  // namespace
}  // namespace dalle_fast

int32_t dalle_fast_sparse_attention_forward(const dalle_fast::SparseAttention* op) {
  using namespace dalle_fast;
  const int64_t tiles = op->lists.tiles;
  return parallel_tasks(op->batch * op->heads * tiles, [&](auto next) {
    const auto scratch = scratch_memory(sparse_attention_forward_scratch(padded_width(*op)));
    for (int64_t task; (task = next()) >= 0;) {
      const int64_t head = task / tiles;
      // Late tiles of the full pattern have the most keys: they go first, so that no thread waits for one at the end.
      const int64_t tile = tiles - 1 - task % tiles;
      sparse_attention_forward(*op, head / op->heads, head % op->heads, tile, scratch.get());
    }
  });
}

int32_t dalle_fast_sparse_attention_backward(const dalle_fast::SparseAttention* op) {
  using namespace dalle_fast;
  return parallel_tasks(op->batch * op->heads, [&](auto next) {
    const auto scratch = scratch_memory(sparse_attention_backward_scratch(padded_width(*op), op->n));
    for (int64_t head; (head = next()) >= 0;) {
      sparse_attention_backward(*op, head / op->heads, head % op->heads, scratch.get());
    }
  });
}
