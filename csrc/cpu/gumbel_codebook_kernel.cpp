// gumbel_codebook forward for one instruction set: attention of rows over codes, 64 rows across the lanes, 96 codes at a time.
//
//     l = W x + b    s = (l + n) / tau    p = softmax(s)    embeds = C^T p, or the row of C at the largest l + n
//
// The softmax runs along (a maximum and a sum that are corrected when the maximum grows); noise is drawn where it is added; of
// logits and weights one [96, 64] block exists. 2 (F + D) K operations a row and about 100 instructions for each vector of
// logits, of which the noise takes half.
#include "codebook_tile.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {

namespace {

constexpr float kLowest = -0x1.fffffep127f;

// What is known of the rows of a tile after some of the codes.
struct Running {
  alignas(64) float noisy_max[kTile], noisy_sum[kTile], max[kTile], sum[kTile], expected[kTile], tempered_sum[kTile];
  alignas(64) int32_t nearest[kTile], noisy[kTile];
  alignas(64) float factor[kTile];  // by which the last block shrank what was summed before

  Running() {
    for (int lane = 0; lane < kTile; ++lane) {
      noisy_max[lane] = max[lane] = -kInfinity;
      noisy_sum[lane] = sum[lane] = expected[lane] = tempered_sum[lane] = 0.0f;
      nearest[lane] = noisy[lane] = 0;
    }
  }
};

// The largest so far and its code.
struct Largest {
  Vec value;
  VecI code;
  Largest(const float* values, const int32_t* codes) : value(load(values)), code(load(codes)) {}
  void take(Vec candidate, int64_t candidate_code) {
    const VecI larger = candidate > value;
    value = larger ? candidate : value;
    code = larger ? VecI{} + static_cast<int32_t>(candidate_code) : code;
  }
  void keep(float* values, int32_t* codes) const {
    store(values, value);
    store(codes, code);
  }
};

struct Block {
  int64_t first, count;  // codes
  const float* bias;
  float *logits, *noisy;  // [kBlock, kTile]: products, then l; noise, then l + n, then the weights
};

// l in place of the products, l + n in place of the noise, and their maxima.
void add_noise(const Block& block, Running& rows) {
  for (int lane = 0; lane < kTile; lane += kWidth) {
    Largest plain(rows.max + lane, rows.nearest + lane), noisy(rows.noisy_max + lane, rows.noisy + lane);
    for (int64_t i = 0; i < block.count; ++i) {
      float *const logit = block.logits + i * kTile + lane, *const noise = block.noisy + i * kTile + lane;
      const Vec l = load(logit) + block.bias[i], with_noise = l + load(noise);
      store(logit, l);
      store(noise, with_noise);
      plain.take(l, block.first + i);
      noisy.take(with_noise, block.first + i);
    }
    plain.keep(rows.max + lane, rows.nearest + lane);
    noisy.keep(rows.noisy_max + lane, rows.noisy + lane);
  }
}

void find_nearest(const Block& block, Running& rows) {
  for (int lane = 0; lane < kTile; lane += kWidth) {
    Largest plain(rows.max + lane, rows.nearest + lane);
    for (int64_t i = 0; i < block.count; ++i) {
      plain.take(load(block.logits + i * kTile + lane) + block.bias[i], block.first + i);
    }
    plain.keep(rows.max + lane, rows.nearest + lane);
  }
}

// The unnormalised softmax of scores, relative to their maximum, written over the scores where `kWrite`, added to `sums`; also
// sets the factor by which earlier sums shrink.
template <bool kWrite>
void soften(const Block& block, float* scores, const float* old_max, const float* new_max, const Exponential& exponential, float* sums,
            float* factors) {
  for (int lane = 0; lane < kTile; lane += kWidth) {
    const Vec max = larger(load(new_max + lane), broadcast(kLowest));
    Vec sum{};
    for (int64_t i = 0; i < block.count; ++i) {
      float* const score = scores + i * kTile + lane;
      const Vec weight = exponential(load(score) - max);
      if (kWrite) store(score, weight);
      sum += weight;
    }
    const Vec factor = exponential(load(old_max + lane) - max);
    store(factors + lane, factor);
    store(sums + lane, multiply_add(load(sums + lane), factor, sum));
  }
}

// Sum and expected logit of the noiseless softmax, relative to its maximum.
void soften_plain(const Block& block, const float* old_max, Running& rows) {
  const Exponential exponential(1.0);
  for (int lane = 0; lane < kTile; lane += kWidth) {
    const Vec max = larger(load(rows.max + lane), broadcast(kLowest));
    Vec sum{}, expected{};
    for (int64_t i = 0; i < block.count; ++i) {
      const Vec l = load(block.logits + i * kTile + lane) - max;
      const Vec weight = exponential(l);
      sum += weight;
      expected = multiply_add(weight, l, expected);
    }
    // The first time there is nothing to move: no infinity times 0.
    const Vec moved = larger(load(old_max + lane) - max, broadcast(-0x1p100f));
    const Vec factor = exponential(moved), before = load(rows.sum + lane);
    store(rows.expected + lane, multiply_add(multiply_add(before, moved, load(rows.expected + lane)), factor, expected));
    store(rows.sum + lane, multiply_add(before, factor, sum));
  }
}

// One block of codes for one tile, up to the weights.
void score(const GumbelCodebook& op, const Lanes& lanes, const Block& block, Running& rows) {
  alignas(64) float noisy_max[kTile], max[kTile], factor[kTile];
  memcpy(noisy_max, rows.noisy_max, sizeof(max));
  memcpy(max, rows.max, sizeof(max));
  read_noise(op, lanes, block.first, block.count, block.noisy);
  add_noise(block, rows);
  const Exponential tempered(1.0 / op.temperature);
  if (op.choice == Choice::soft) {
    soften<true>(block, block.noisy, noisy_max, rows.noisy_max, tempered, rows.noisy_sum, rows.factor);
  } else if (op.choice == Choice::straight_through) {
    soften<false>(block, block.noisy, noisy_max, rows.noisy_max, tempered, rows.noisy_sum, factor);
  } else {
    soften<false>(block, block.logits, max, rows.max, tempered, rows.tempered_sum, factor);
  }
  if (op.with_kl || op.choice == Choice::reinmax) soften_plain(block, max, rows);
}

// The rows of the codebook that were chosen.
void write_chosen(const GumbelCodebook& op, const Lanes& lanes, const int32_t* chosen) {
  const Places places(op.embeds, lanes);
  with_elements(op.element, op.embeds.data, [&](auto* to) {
    const auto* codebook = static_cast<const decltype(to)>(const_cast<void*>(op.codebook));
    for (int64_t d = 0; d < op.dim; ++d) {
      for (int lane = 0; lane < lanes.count; ++lane) {
        to[places.offset[lane] + d * places.stride] = codebook[chosen[lane] * op.dim + d];
      }
    }
  });
}

void write_mixture(const GumbelCodebook& op, const Lanes& lanes, const float* sums, float* columns) {
  for (int lane = 0; lane < kTile; lane += kWidth) {
    const Vec factor = 1.0f / load(sums + lane);
    for (int64_t d = 0; d < op.dim; ++d) store(columns + d * kTile + lane, load(columns + d * kTile + lane) * factor);
  }
  write_columns(op, op.embeds, lanes, op.dim, columns);
}

void write_statistics(const GumbelCodebook& op, const Lanes& lanes, const Running& rows) {
  alignas(64) float expected[kTile], divergence[kTile];
  for (int lane = 0; lane < kTile; lane += kWidth) {
    const Vec sum = load(rows.sum + lane), mean = load(rows.expected + lane) / sum;
    store(expected + lane, mean);
    store(divergence + lane, mean - log_float(sum) + log_float(broadcast(static_cast<float>(op.codes))));
  }
  const float* const from[kStatistics] = {rows.noisy_max, rows.noisy_sum,    rows.max,  rows.sum,
                                          expected,       rows.tempered_sum, divergence};
  for (int s = 0; s < kStatistics; ++s) {
    if (s == kDivergence && !op.with_kl) continue;
    memcpy(op.statistics + s * op.rows() + lanes.first, from[s], sizeof(float) * lanes.count);
  }
  for (int lane = 0; lane < lanes.count; ++lane) {
    op.nearest[lanes.first + lane] = rows.nearest[lane];
    op.noisy[lanes.first + lane] = rows.noisy[lane];
  }
}

// Codes so that a product goes over them: [dim / kPack, kBlock, kPack].
void pack_codes(const GumbelCodebook& op, int64_t first, int64_t count, float* packed) {
  with_elements(op.element, const_cast<void*>(op.codebook), [&](auto* data) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t d = 0; d < op.dim; d += kPack) {
        const int64_t width = op.dim - d < kPack ? op.dim - d : kPack;
        load_row(data + (first + i) * op.dim + d, width, kPack, packed + d * kBlock + i * kPack);
      }
    }
  });
}

// columns [dim, kTile] times the factors of rows, plus the mixture of a block's codes.
void mix(const GumbelCodebook& op, const Block& block, const float* packed, const float* factors, float* columns) {
  for (int64_t d = 0; d < op.dim; d += kPack) {
    multiply(packed + d * kBlock, 1, kPack, block.noisy, kTile, block.count, AddToScaled{factors},
             EvenRows{columns + d * kTile, kTile}, op.dim - d < kPack ? op.dim - d : kPack, kTile / kGroup);
  }
}

}  // namespace

void gumbel_codebook_forward(const GumbelCodebook& op, int64_t first, int64_t count, float* scratch) {
  Arena arena{scratch};
  const int64_t width = padded(op.features);
  float* const x = arena.take(kMostTiles * tile_columns(op.features));
  float* const columns = arena.take(kMostTiles * tile_columns(op.dim));
  float* const weight = arena.take(block_rows(op.features));
  float* const packed = arena.take(packed_codes(op.dim));
  float* const bias = arena.take(kBlock);
  float* const logits = arena.take(kScores);
  float* const noisy = arena.take(kScores);
  const bool soft = op.choice == Choice::soft;

  Running rows[kMostTiles];
  Lanes lanes[kMostTiles];
  for (int64_t t = 0; t < count; ++t) {
    lanes[t] = Lanes(op, first + t);
    read_columns(op, op.x, lanes[t], op.features, x + t * tile_columns(op.features));
    if (soft) clear(columns + t * tile_columns(op.dim), tile_columns(op.dim));
  }
  for (int64_t code = 0; code < op.codes; code += kBlock) {
    const Block block{code, codes_in_block(op, code), bias, logits, noisy};
    read_codes(op, op.weight, op.features, code, block.count, weight);
    read_bias(op, code, block.count, bias);
    if (soft) pack_codes(op, code, block.count, packed);
    for (int64_t t = 0; t < count; ++t) {
      multiply_long(weight, width, x + t * tile_columns(op.features), kTile, op.features, EvenRows{logits, kTile},
                    block.count);
      score(op, lanes[t], block, rows[t]);
      if (soft) mix(op, block, packed, rows[t].factor, columns + t * tile_columns(op.dim));
    }
  }
  for (int64_t t = 0; t < count; ++t) {
    if (soft) {
      write_mixture(op, lanes[t], rows[t].noisy_sum, columns + t * tile_columns(op.dim));
    } else {
      write_chosen(op, lanes[t], rows[t].noisy);
    }
    write_statistics(op, lanes[t], rows[t]);
  }
}

void gumbel_codebook_nearest(const GumbelCodebook& op, int64_t first, int64_t count, float* scratch) {
  Arena arena{scratch};
  const int64_t width = padded(op.features);
  float* const x = arena.take(kMostTiles * tile_columns(op.features));
  float* const weight = arena.take(block_rows(op.features));
  float* const bias = arena.take(kBlock);
  float* const logits = arena.take(kScores);
  Running rows[kMostTiles];
  Lanes lanes[kMostTiles];
  for (int64_t t = 0; t < count; ++t) {
    lanes[t] = Lanes(op, first + t);
    read_columns(op, op.x, lanes[t], op.features, x + t * tile_columns(op.features));
  }
  for (int64_t code = 0; code < op.codes; code += kBlock) {
    const Block block{code, codes_in_block(op, code), bias, logits, nullptr};
    read_codes(op, op.weight, op.features, code, block.count, weight);
    read_bias(op, code, block.count, bias);
    for (int64_t t = 0; t < count; ++t) {
      multiply_long(weight, width, x + t * tile_columns(op.features), kTile, op.features, EvenRows{logits, kTile},
                    block.count);
      find_nearest(block, rows[t]);
    }
  }
  for (int64_t t = 0; t < count; ++t) {
    for (int lane = 0; lane < lanes[t].count; ++lane) op.nearest[lanes[t].first + lane] = rows[t].nearest[lane];
  }
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
