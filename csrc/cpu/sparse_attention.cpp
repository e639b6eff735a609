// sparse_attention: forward in parallel over (batch, head, tile), backward over (batch, head), so that the sums of dk and dv
// have one order whatever the number of threads.
#include "sparse_attention.h"

#include <algorithm>
#include <memory>
#include <new>

#include "exports.h"
#include "parallel.h"

namespace dalle_fast {
namespace {

// On a cache line's bounds: a vector that crosses them costs two accesses.
struct Free {
  void operator()(float* memory) const { operator delete[](memory, std::align_val_t{64}); }
};
std::unique_ptr<float[], Free> scratch_memory(int64_t floats) {
  return std::unique_ptr<float[], Free>(new (std::align_val_t{64}) float[floats]);
}

constexpr int64_t kSpan = 128;  // positions prepared by one work item

int64_t padded_width(const SparseAttention& op) { return (op.width + 15) / 16 * 16; }

}  // namespace
}  // namespace dalle_fast

int32_t dalle_fast_sparse_attention_forward(const dalle_fast::SparseAttention* op) {
  using namespace dalle_fast;
  const int64_t heads = op->batch * op->heads, tiles = op->lists.tiles, width = padded_width(*op);
  const int64_t at_once = std::min(heads, op->threads), prepared = sparse_attention_prepared(width, op->n);
  const auto keys = scratch_memory(at_once * prepared), values = scratch_memory(at_once * prepared);
  const int64_t spans = (op->n + kSpan - 1) / kSpan;
  for (int64_t first = 0; first < heads; first += at_once) {
    const int64_t count = std::min(at_once, heads - first);
    int32_t status = parallel_for(count * spans, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t slot = item / spans, head = first + slot, start = item % spans * kSpan;
        sparse_attention_prepare(*op, head / op->heads, head % op->heads, start, std::min(start + kSpan, op->n),
                                 keys.get() + slot * prepared, values.get() + slot * prepared);
      }
    });
    if (status != 0) return status;
    status = parallel_tasks(count * tiles, [&](auto next) {
      const auto scratch = scratch_memory(sparse_attention_forward_scratch(width));
      for (int64_t task; (task = next()) >= 0;) {
        const int64_t slot = task % count, head = first + slot;
        // Late tiles of the full pattern have the most keys: they go first, so that no thread waits for one at the end.
        const int64_t tile = tiles - 1 - task / count;
        sparse_attention_forward(*op, head / op->heads, head % op->heads, tile, keys.get() + slot * prepared,
                                 values.get() + slot * prepared, scratch.get());
      }
    });
    if (status != 0) return status;
  }
  return 0;
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
