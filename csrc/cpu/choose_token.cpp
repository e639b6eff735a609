// choose_token: parallel over rows.
#include "choose_token.h"

#include "exports.h"
#include "parallel.h"
#include "scratch.h"

int32_t dalle_fast_choose_tokens(const dalle_fast::TokenChoice* choice, const float* logits, int64_t n, const uint64_t* seeds,
                                 const int64_t* positions, int64_t* tokens) {
  using namespace dalle_fast;
  constexpr int64_t kGrain = 4;  // rows that are worth waking another thread
  return parallel_for(n, kGrain, [&](int64_t begin, int64_t end) {
    float* const scratch = of_tasks.take(choose_token_scratch(choice->n_codes));
    for (int64_t i = begin; i < end; ++i) {
      choose_token(*choice, logits + i * choice->n_codes, seeds[i], positions[i], scratch, tokens + i);
    }
  });
}
