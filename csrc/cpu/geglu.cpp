// geglu: parallel over rows.
#include "geglu.h"

#include <algorithm>

#include "exports.h"

namespace dalle_fast {
namespace {

constexpr int64_t kGrain = 16384;  // elements that are worth waking another thread

int64_t grain(const Geglu& op) { return std::max<int64_t>(1, kGrain / std::max<int64_t>(1, op.width)); }

}  // namespace
}  // namespace dalle_fast

int32_t dalle_fast_geglu_forward(const dalle_fast::Geglu* op) {
  using namespace dalle_fast;
  return parallel_for(op->rows, grain(*op), [&](int64_t first, int64_t last) { geglu_forward(*op, first, last); });
}

int32_t dalle_fast_geglu_backward(const dalle_fast::Geglu* op) {
  using namespace dalle_fast;
  return parallel_for(op->rows, grain(*op), [&](int64_t first, int64_t last) { geglu_backward(*op, first, last); });
}
