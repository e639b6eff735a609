// Drives every exported op over exact-sized heap buffers and a pool of its own, under a sanitizer (tests/test_house.py): it
// needs neither Python nor torch. Prints "ok", or fails.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "exports.h"

namespace {

constexpr int64_t kThreads = 3;

int32_t pool(int64_t begin, int64_t end, int64_t grain, dalle_fast::RangeFunction function, void* context) {
  const int64_t step = std::max(grain, (end - begin + kThreads - 1) / kThreads);
  std::vector<std::thread> threads;
  for (int64_t first = begin; first < end; first += step) {
    threads.emplace_back(function, first, std::min(first + step, end), context);
  }
  for (std::thread& thread : threads) thread.join();
  return 0;
}

void expect(bool truth, const char* what) {
  if (truth) return;
  std::printf("failed: %s\n", what);
  std::exit(1);
}

void drive_gumbel_noise(int64_t rows, int64_t codes) {
  std::vector<uint64_t> seeds(rows, ~uint64_t{0});
  std::vector<int64_t> positions(rows, -1);
  std::vector<float> out(rows * codes);
  std::vector<uint32_t> words(rows * codes);
  expect(dalle_fast_gumbel_noise(seeds.data(), rows, positions.data(), rows, 2, codes, out.data()) == 0, "gumbel_noise");
  expect(dalle_fast_philox_words(seeds.data(), rows, positions.data(), rows, 2, codes, words.data()) == 0, "philox_words");
  std::vector<float> again(rows * codes);
  dalle_fast_gumbel_of_words(words.data(), rows * codes, again.data());
  expect(out == again, "the noise is that of its words");
  expect(std::all_of(out.begin(), out.end(), [](float x) { return std::isfinite(x); }), "the noise is finite");
}

}  // namespace

int main() {
  for (dalle_fast::ParallelFor parallel_for : {dalle_fast::ParallelFor{nullptr}, dalle_fast::ParallelFor{pool}}) {
    dalle_fast_set_parallel_for(parallel_for);
    for (int32_t isa = 0; dalle_fast_isa_supported(isa); ++isa) {
      dalle_fast_set_isa(isa);
      expect(dalle_fast_isa() == isa, "the instruction set is the one that was set");
      for (int64_t codes : {0, 1, 3, 4, 31, 32, 33, 2049, 8192}) {
        for (int64_t rows : {0, 1, 3, 17}) drive_gumbel_noise(rows, codes);
      }
    }
  }
  std::printf("ok\n");
}
