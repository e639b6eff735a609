// gumbel_noise: parallel over (row, span of codes).
#include "gumbel_noise.h"

#include <algorithm>

#include "exports.h"

namespace dalle_fast {
namespace {

constexpr int64_t kSpan = 2048;  // codes of one work item: a few microseconds
constexpr int64_t kGrain = 4;    // items that are worth waking another thread

template <class T, class Kernel>
int32_t fill(const GumbelNoise& noise, int64_t n, T* out, Kernel kernel) {
  const int64_t spans = (noise.n_codes + kSpan - 1) / kSpan;
  return parallel_for(n * spans, kGrain, [&](int64_t first, int64_t last) {
    for (int64_t item = first; item < last; ++item) {
      const int64_t row = item / spans;
      const int64_t begin = item % spans * kSpan;
      kernel(noise, row, begin, std::min(begin + kSpan, noise.n_codes), out + row * noise.n_codes + begin);
    }
  });
}

}  // namespace
}  // namespace dalle_fast

int32_t dalle_fast_gumbel_noise(const uint64_t* seeds, int64_t n_seeds, const int64_t* positions, int64_t n,
                                uint32_t stream, int64_t n_codes, float* out) {
  return dalle_fast::fill({seeds, n_seeds, positions, stream, n_codes}, n, out, dalle_fast::gumbel_noise_codes);
}

int32_t dalle_fast_philox_words(const uint64_t* seeds, int64_t n_seeds, const int64_t* positions, int64_t n,
                                uint32_t stream, int64_t n_codes, uint32_t* out) {
  return dalle_fast::fill({seeds, n_seeds, positions, stream, n_codes}, n, out, dalle_fast::philox_words_codes);
}

int32_t dalle_fast_gumbel_of_words(const uint32_t* words, int64_t count, float* out) {
  dalle_fast::gumbel_of_words(words, count, out);
  return 0;
}

int32_t dalle_fast_gumbel_float_of_words(const uint32_t* words, int64_t count, float* out) {
  dalle_fast::gumbel_float_of_words(words, count, out);
  return 0;
}
