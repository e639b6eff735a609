// One token from its logits: top-k, temperature, top-p, Gumbel-max. dalle_fast/native/choose_token.py repeats the structure.
#pragma once

#include "isa.h"
#include "tile.h"

namespace dalle_fast {

struct TokenChoice {
  int64_t n_codes;    // at least 1
  int64_t top_k;      // 0 or at least n_codes: all stay; 1: the largest logit, the first among equals
  float temperature;  // 0: the largest logit
  double top_p;       // 1: all stay
  uint32_t stream;
};

// Floats: values, their distances (32 bits) and weights (64 bits) in a selection, its 2048 bins and one (64 bits).
constexpr int64_t choose_token_room(int64_t n_codes) { return filled(n_codes, 32); }
constexpr int64_t choose_token_scratch(int64_t n_codes) { return 4 * choose_token_room(n_codes) + 2 * 2048 + 16; }

}  // namespace dalle_fast

// token: of logits [n_codes] by the noise of (seed, position); scratch on the bounds of a cache line. The same bits on every
// instruction set.
DALLE_FAST_KERNEL(choose_token, (const TokenChoice& choice, const float* logits, uint64_t seed, int64_t position, float* scratch,
                                 int64_t* token),
                  (choice, logits, seed, position, scratch, token))
