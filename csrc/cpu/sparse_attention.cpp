// sparse_attention: forward in parallel over (batch, head, tile), backward over (batch, head), so that the sums of dk and dv
// have one order whatever the number of threads.
#include "sparse_attention.h"

#include <algorithm>

#include "exports.h"
#include "parallel.h"
#include "scratch.h"

namespace dalle_fast {
namespace {

thread_local Scratch of_heads;  // prepared keys and values, in the thread that calls

constexpr int64_t kSpan = 128;  // positions prepared by one work item

// What computes an op, and the memory it wants in floats. Chosen once a call: forward reads what its own prepare wrote.
struct Kernels {
  decltype(&sparse_attention_prepare) prepare;
  decltype(&sparse_attention_forward) forward;
  decltype(&sparse_attention_backward) backward;
  int64_t prepared, forward_scratch, backward_scratch;
};

Kernels kernels_of(const SparseAttention& op) {
#if defined(DALLE_FAST_HAS_AMX)
  // Tiles take 32 channels at a time: narrow heads would be zeros for the most part.
  if (op.element == Element::bfloat16 && op.width >= 16 && current_isa() == Isa::amx) {
    return {amx::sparse_attention_prepare,
            amx::sparse_attention_forward,
            amx::sparse_attention_backward,
            sparse_attention_amx_prepared(op.width, op.n),
            sparse_attention_amx_forward_scratch(op.width),
            sparse_attention_amx_backward_scratch(op.width, op.n)};
  }
#endif
  const int64_t width = (op.width + 15) / 16 * 16;
  return {sparse_attention_prepare,
          sparse_attention_forward,
          sparse_attention_backward,
          sparse_attention_prepared(width, op.n),
          sparse_attention_forward_scratch(width),
          sparse_attention_backward_scratch(width, op.n)};
}

}  // namespace
}  // namespace dalle_fast

int32_t dalle_fast_sparse_attention_forward(const dalle_fast::SparseAttention* op) {
  using namespace dalle_fast;
  const Kernels kernels = kernels_of(*op);
  const int64_t heads = op->batch * op->heads, tiles = op->lists.tiles;
  const int64_t at_once = std::min(heads, op->threads), prepared = kernels.prepared;
  float* const keys = of_heads.take(2 * at_once * prepared);
  float* const values = keys + at_once * prepared;
  const int64_t spans = (op->n + kSpan - 1) / kSpan;
  for (int64_t first = 0; first < heads; first += at_once) {
    const int64_t count = std::min(at_once, heads - first);
    int32_t status = parallel_for(count * spans, 1, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t slot = item / spans, head = first + slot, start = item % spans * kSpan;
        kernels.prepare(*op, head / op->heads, head % op->heads, start, std::min(start + kSpan, op->n),
                        keys + slot * prepared, values + slot * prepared);
      }
    });
    if (status != 0) return status;
    status = parallel_tasks(count * tiles, [&](auto next) {
      float* const scratch = of_tasks.take(kernels.forward_scratch);
      for (int64_t task; (task = next()) >= 0;) {
        const int64_t slot = task % count, head = first + slot;
        // Late tiles of the full pattern have the most keys: they go first, so that no thread waits for one at the end.
        const int64_t tile = tiles - 1 - task / count;
        kernels.forward(*op, head / op->heads, head % op->heads, tile, keys + slot * prepared,
                        values + slot * prepared, scratch);
      }
    });
    if (status != 0) return status;
  }
  return 0;
}

int32_t dalle_fast_sparse_attention_backward(const dalle_fast::SparseAttention* op) {
  using namespace dalle_fast;
  const Kernels kernels = kernels_of(*op);
  return parallel_tasks(op->batch * op->heads, [&](auto next) {
    float* const scratch = of_tasks.take(kernels.backward_scratch);
    for (int64_t head; (head = next()) >= 0;) {
      kernels.backward(*op, head / op->heads, head % op->heads, scratch);
    }
  });
}
