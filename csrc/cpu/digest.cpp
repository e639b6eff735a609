// A digest of memory at the speed it is read: which weights a packed copy was made from. Blocks are hashed apart, each 64-bit word
// multiplied and folded in one of six chains, and their hashes in order: every word and its place count, threads do not.
#include <algorithm>
#include <cstring>
#include <vector>

#include "exports.h"
#include "parallel.h"

namespace dalle_fast {
namespace {

constexpr int64_t kBlockBytes = 1 << 16;
constexpr uint64_t kPrime = 0x9E3779B97F4A7C15u;
constexpr int kChains = 6;  // a product takes three cycles, the whole step five

// A product carries bits upwards alone: turned, the highest take part too.
uint64_t fold(uint64_t hash, uint64_t word) {
  hash ^= word;
  return (hash << 29 | hash >> 35) * kPrime;
}

uint64_t digest_of_block(const char* data, int64_t bytes) {
  uint64_t chains[kChains];
  for (int i = 0; i < kChains; ++i) chains[i] = kPrime * static_cast<uint64_t>(i + 1);
  int64_t at = 0;
  for (; at + 8 * kChains <= bytes; at += 8 * kChains) {
    for (int i = 0; i < kChains; ++i) {
      uint64_t word;
      std::memcpy(&word, data + at + 8 * i, sizeof(word));
      chains[i] = fold(chains[i], word);
    }
  }
  uint64_t hash = static_cast<uint64_t>(bytes);
  for (; at < bytes; ++at) hash = fold(hash, static_cast<unsigned char>(data[at]));
  for (const uint64_t chain : chains) hash = fold(hash, chain);
  return hash;
}

}  // namespace
}  // namespace dalle_fast

int32_t dalle_fast_digest(const void* data, int64_t bytes, uint64_t* out) {
  using namespace dalle_fast;
  std::vector<uint64_t> blocks((bytes + kBlockBytes - 1) / kBlockBytes);
  const char* from = static_cast<const char*>(data);
  const int32_t status = parallel_for(static_cast<int64_t>(blocks.size()), 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      blocks[i] = digest_of_block(from + i * kBlockBytes, std::min(kBlockBytes, bytes - i * kBlockBytes));
    }
  });
  *out = fold(static_cast<uint64_t>(bytes), digest_of_block(reinterpret_cast<const char*>(blocks.data()), 8 * blocks.size()));
  return status;
}
