// gumbel_codebook backward for one instruction set. Scores, noise and weights are made again, one [96, 64] block at a time:
//
//     g = C dO - c    dl = p (g - delta) / tau + w q (l - E)    (soft, straight-through; w: gradient of the divergence)
//     dl = 2 pi1 (g - delta) - pi0 (g - delta') / 2 + ...       (reinmax; pi1 = (onehot_j + softmax(l / tau)) / 2, pi0 = q)
//     dx = W^T dl    dW = dl x^T    db = sum dl    dC = p dO^T, or dO added to the chosen row
//
// c = dO . embeds: the mean of C dO under p where embeds are the mixture, C dO at the chosen code where they are its row; g is
// small, or 0, where the weight is, and nothing cancels. delta = sum of p g is 0 for a mixture in float32; otherwise it takes a
// sweep of its own. A task has a slice
// of the codes and goes over all tiles of a chunk for each of its blocks: gradients of codes are summed where they are, those of
// x by slices, in this one order whatever the threads. 2 (3 F + 2 D) K operations a row.
#include "codebook_tile.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {

namespace {

// A tile as the backward pass keeps it.
struct Prepared {
  float *x, *x_rows, *dout, *dout_panels, *numbers;

  Prepared(const GumbelCodebook& op, float* memory) {
    Arena arena{memory};
    x = arena.take(tile_columns(op.features));
    x_rows = arena.take(tile_columns(op.features));
    dout = arena.take(tile_columns(op.dim));
    dout_panels = arena.take(filled(op.dim, 64) * kTile);
    numbers = arena.take(int64_t{kRowNumbers} * kTile);
  }

  float* row(int number) const { return numbers + number * kTile; }
  Vec number(int which, int lane) const { return load(row(which) + lane); }
};

struct Codes {
  int64_t first, count;
  float *weight, *codebook, *bias;

  void read(const GumbelCodebook& op, int64_t first_code) {
    first = first_code, count = codes_in_block(op, first_code);
    read_codes(op, op.weight, op.features, first, count, weight);
    read_codes(op, op.codebook, op.dim, first, count, codebook);
    read_bias(op, first, count, bias);
  }
};

// C dO of a code, less that of the centre: of a chosen code exactly 0, where rounding would leave a little.
template <Choice kChoice>
Vec centred(Vec product, Vec centre, VecI chosen, int64_t i) {
  if (kChoice == Choice::soft) return product - centre;
  return chosen == static_cast<int32_t>(i) ? Vec{} : product - centre;
}

// [kBlock, kTile] each: logits, of which the gradient takes the place; noise, and then weights of the mixture; products with
// dembeds.
struct Scores {
  float *logits, *weights, *products;
};

void make_scores(const GumbelCodebook& op, const Prepared& tile, const Lanes& lanes, const Codes& codes, const Scores& scores) {
  multiply_long(codes.weight, padded(op.features), tile.x, kTile, op.features, EvenRows{scores.logits, kTile}, codes.count);
  multiply_long(codes.codebook, padded(op.dim), tile.dout, kTile, op.dim, EvenRows{scores.products, kTile}, codes.count);
  // Reinmax forgets its noise: it knows the choice.
  if (op.choice != Choice::reinmax) read_noise(op, lanes, codes.first, codes.count, scores.weights);
}

// Softmaxes of one row in each lane, relative to the maxima of the forward pass.
struct Weights {
  Vec noisy_max, noisy_factor, max, factor, tempered_factor;
  Exponential once, tempered_once;

  Weights(const GumbelCodebook& op, const Prepared& tile, int lane)
      : noisy_max(tile.number(kNoisyMax, lane)),
        noisy_factor(1.0f / tile.number(kNoisySum, lane)),
        max(tile.number(kMax, lane)),
        factor(1.0f / tile.number(kSum, lane)),
        tempered_factor(1.0f / tile.number(kTemperedSum, lane)),
        once(1.0),
        tempered_once(1.0 / op.temperature) {}

  Vec noisy(Vec l_and_noise) const { return tempered_once(l_and_noise - noisy_max) * noisy_factor; }
  Vec plain(Vec l) const { return once(l - max) * factor; }
  Vec tempered(Vec l) const { return tempered_once(l - max) * tempered_factor; }
};

// The gradient of the logits in place of the logits, the mixture's weights, and sums of the gradient over rows.
template <Choice kChoice, bool kDivergence>
void differentiate(const GumbelCodebook& op, const Prepared& tile, const int32_t* chosen_codes, const Codes& codes,
                   const Scores& scores, float* dbias) {
  for (int lane = 0; lane < kTile; lane += kWidth) {
    const Weights weights(op, tile, lane);
    const Vec centre = tile.number(kCentre, lane);
    const Vec delta = tile.number(kDelta, lane), second_delta = tile.number(kSecondDelta, lane);
    const Vec divergence = tile.number(kDivergenceWeight, lane), expected = tile.number(kExpected, lane);
    const VecI chosen = load(chosen_codes + lane) - static_cast<int32_t>(codes.first);
    const float rate = static_cast<float>(1.0 / op.temperature);
    for (int64_t i = 0; i < codes.count; ++i) {
      const int64_t at = i * kTile + lane;
      const Vec l = load(scores.logits + at) + codes.bias[i];
      const Vec g = centred<kChoice>(load(scores.products + at), centre, chosen, i);
      Vec gradient, plain{};
      if (kDivergence || kChoice == Choice::reinmax) plain = weights.plain(l);
      if (kChoice == Choice::reinmax) {
        const Vec hard = chosen == static_cast<int32_t>(i) ? broadcast(1.0f) : Vec{};
        gradient = (hard + weights.tempered(l)) * (g - delta) - plain * 0.5f * (g - second_delta);
      } else {
        const Vec weight = weights.noisy(l + load(scores.weights + at));
        if (kChoice == Choice::soft) store(scores.weights + at, weight);
        gradient = weight * (g - delta) * rate;
      }
      if (kDivergence) gradient += divergence * plain * (l - weights.max - expected);
      store(scores.logits + at, gradient);
      store(dbias + i * kWidth, load(dbias + i * kWidth) + gradient);
    }
  }
}

// Sums over a block's codes of the weights times the products, added to the deltas.
template <Choice kChoice>
void add_deltas(const GumbelCodebook& op, const Prepared& tile, const int32_t* chosen_codes, const Codes& codes,
                const Scores& scores) {
  for (int lane = 0; lane < kTile; lane += kWidth) {
    const Weights weights(op, tile, lane);
    const VecI chosen = load(chosen_codes + lane) - static_cast<int32_t>(codes.first);
    const Vec centre = tile.number(kCentre, lane);
    Vec delta{}, second_delta{};
    for (int64_t i = 0; i < codes.count; ++i) {
      const int64_t at = i * kTile + lane;
      const Vec l = load(scores.logits + at) + codes.bias[i];
      const Vec g = centred<kChoice>(load(scores.products + at), centre, chosen, i);
      if (kChoice == Choice::reinmax) {
        delta = multiply_add(weights.tempered(l) * 0.5f, g, delta);  // the one-hot half of pi1 adds 0
        second_delta = multiply_add(weights.plain(l), g, second_delta);
      } else {
        delta = multiply_add(weights.noisy(l + load(scores.weights + at)), g, delta);
      }
    }
    store(tile.row(kDelta) + lane, tile.number(kDelta, lane) + delta);
    store(tile.row(kSecondDelta) + lane, tile.number(kSecondDelta, lane) + second_delta);
  }
}

struct ChosenCodes {
  alignas(64) int32_t code[kTile];
  ChosenCodes(const GumbelCodebook& op, const Lanes& lanes) {
    for (int lane = 0; lane < kTile; ++lane) {
      code[lane] = lane < lanes.count ? static_cast<int32_t>(op.noisy[lanes.first + lane]) : -1;
    }
  }
};

// Gradients of a block of codes, [kBlock, channels] each; of the bias as many numbers as lanes for each code.
struct CodeGradients {
  float *weight, *codebook, *bias;
};

// dO of rows that chose a code of this block, row after row.
void add_chosen(const GumbelCodebook& op, const Prepared& tile, const ChosenCodes& chosen, const Codes& codes, float* dcodebook) {
  const int64_t width = padded(op.dim);
  for (int lane = 0; lane < kTile; ++lane) {
    const int64_t i = chosen.code[lane] - codes.first;
    if (i < 0 || i >= codes.count) continue;
    for (int64_t d = 0; d < width; d += kWidth) {
      float* const to = dcodebook + i * width + d;
      store(to, load(to) + load(tile.dout_panels + (d / 64 * kTile + lane) * 64 + d % 64));
    }
  }
}

void add_gradients(const GumbelCodebook& op, const Prepared& tile, const Codes& codes, const Scores& scores,
                   const CodeGradients& gradients, float* dx, bool first_block) {
  const int64_t width = padded(op.features), dim = padded(op.dim);
  if (first_block) clear(dx, tile_columns(op.features));
  multiply(codes.weight, 1, width, scores.logits, kTile, codes.count, Add{}, EvenRows{dx, kTile}, op.features, kTile / kGroup);
  multiply(scores.logits, kTile, 1, tile.x_rows, width, kTile, Add{}, EvenRows{gradients.weight, width}, codes.count,
           width / kGroup);
  if (op.choice != Choice::soft) return;
  for (int64_t d = 0; d < dim; d += 64) {
    multiply(scores.weights, kTile, 1, tile.dout_panels + d * kTile, 64, kTile, Add{}, EvenRows{gradients.codebook + d, dim},
             codes.count, (dim - d < 64 ? dim - d : 64) / kGroup);
  }
}

using Differentiate = decltype(&differentiate<Choice::soft, false>);

Differentiate how_to_differentiate(const GumbelCodebook& op) {
  const bool divergence = op.dkl != 0;
  switch (op.choice) {
    case Choice::straight_through:
      return divergence ? differentiate<Choice::straight_through, true> : differentiate<Choice::straight_through, false>;
    case Choice::reinmax:
      return divergence ? differentiate<Choice::reinmax, true> : differentiate<Choice::reinmax, false>;
    default:
      return divergence ? differentiate<Choice::soft, true> : differentiate<Choice::soft, false>;
  }
}

// c = dO . embeds, in sums of 64 products.
void find_centre(const GumbelCodebook& op, const Lanes& lanes, const Prepared& tile) {
  constexpr int64_t kChannels = 64;
  alignas(64) float embeds[kChannels * kTile];
  const Places places(op.embeds, lanes);
  for (int64_t d = 0; d < op.dim; d += kChannels) {
    const int64_t count = op.dim - d < kChannels ? op.dim - d : kChannels;
    with_elements(op.element, op.embeds.data, [&](auto* data) { places.read(data + d * places.stride, count, embeds); });
    for (int lane = 0; lane < kTile; lane += kWidth) {
      Vec sum{};
      for (int64_t i = 0; i < count; ++i) {
        sum = multiply_add(load(embeds + i * kTile + lane), load(tile.dout + (d + i) * kTile + lane), sum);
      }
      store(tile.row(kCentre) + lane, tile.number(kCentre, lane) + sum);
    }
  }
}

}  // namespace

void gumbel_codebook_prepare(const GumbelCodebook& op, int64_t tile, float* memory) {
  const Prepared prepared(op, memory);
  const Lanes lanes(op, tile);
  const int64_t width = padded(op.features), dim = padded(op.dim);
  read_columns(op, op.x, lanes, op.features, prepared.x);
  transpose(prepared.x, kTile, width, kTile, prepared.x_rows, width);
  read_columns(op, op.dembeds, lanes, op.dim, prepared.dout);
  // Idle lanes have no gradient, and through it no effect.
  for (int lane = lanes.count; lane < kTile; ++lane) {
    for (int64_t d = 0; d < op.dim; ++d) prepared.dout[d * kTile + lane] = 0.0f;
  }
  for (int64_t d = 0; d < dim; d += 64) {
    transpose(prepared.dout + d * kTile, kTile, dim - d < 64 ? dim - d : 64, kTile, prepared.dout_panels + d * kTile, 64);
  }
  for (int lane = 0; lane < kTile; ++lane) {
    const int64_t row = lanes.row(lane);
    for (int s = 0; s < kStatistics; ++s) prepared.row(s)[lane] = op.statistics[s * op.rows() + row];
    prepared.row(kDivergenceWeight)[lane] = lane < lanes.count ? op.dkl : 0.0f;
  }
  clear(prepared.row(kCentre), 3 * kTile);  // and the deltas
  find_centre(op, lanes, prepared);
}

void gumbel_codebook_deltas(const GumbelCodebook& op, int64_t first, int64_t count, float* prepared, float* scratch) {
  Arena arena{scratch};
  Codes codes{};
  codes.weight = arena.take(block_rows(op.features));
  codes.codebook = arena.take(block_rows(op.dim));
  codes.bias = arena.take(kBlock);
  const Scores scores{arena.take(kScores), arena.take(kScores), arena.take(kScores)};
  for (int64_t code = 0; code < op.codes; code += kBlock) {
    codes.read(op, code);
    for (int64_t t = 0; t < count; ++t) {
      const Prepared tile(op, prepared + t * gumbel_codebook_prepared(op.features, op.dim));
      const Lanes lanes(op, first + t);
      const ChosenCodes chosen(op, lanes);
      make_scores(op, tile, lanes, codes, scores);
      switch (op.choice) {
        case Choice::soft:
          add_deltas<Choice::soft>(op, tile, chosen.code, codes, scores);
          break;
        case Choice::straight_through:
          add_deltas<Choice::straight_through>(op, tile, chosen.code, codes, scores);
          break;
        case Choice::reinmax:
          add_deltas<Choice::reinmax>(op, tile, chosen.code, codes, scores);
      }
    }
  }
}

void gumbel_codebook_slice(const GumbelCodebook& op, int64_t first, const CodeSlice& slice, float* scratch) {
  Arena arena{scratch};
  const int64_t width = padded(op.features), dim = padded(op.dim);
  Codes codes{};
  codes.weight = arena.take(block_rows(op.features));
  codes.codebook = arena.take(block_rows(op.dim));
  codes.bias = arena.take(kBlock);
  const CodeGradients gradients{arena.take(block_rows(op.features)), arena.take(block_rows(op.dim)),
                                arena.take(kBlock * kWidth)};
  const Scores scores{arena.take(kScores), arena.take(kScores), arena.take(kScores)};
  const Differentiate differentiate = how_to_differentiate(op);
  for (int64_t code = slice.first_code; code < slice.last_code; code += kBlock) {
    codes.read(op, code);
    clear(gradients.weight, block_rows(op.features));
    clear(gradients.codebook, block_rows(op.dim));
    clear(gradients.bias, kBlock * kWidth);
    for (int64_t t = 0; t < slice.tiles; ++t) {
      const Prepared tile(op, const_cast<float*>(slice.prepared) + t * gumbel_codebook_prepared(op.features, op.dim));
      const Lanes lanes(op, first + t);
      const ChosenCodes chosen(op, lanes);
      make_scores(op, tile, lanes, codes, scores);
      differentiate(op, tile, chosen.code, codes, scores, gradients.bias);
      add_gradients(op, tile, codes, scores, gradients, slice.dx + t * tile_columns(op.features), code == slice.first_code);
      if (op.choice != Choice::soft) add_chosen(op, tile, chosen, codes, gradients.codebook);
    }
    add_rows(gradients.weight, width, codes.count, op.dweight, op.element, op.features, code, slice.chunk);
    add_rows(gradients.codebook, dim, codes.count, op.dcodebook, op.element, op.dim, code, slice.chunk);
    for (int64_t i = 0; i < codes.count; ++i) {
      float sum = 0.0f;
      for (int lane = 0; lane < kWidth; ++lane) sum += gradients.bias[i * kWidth + lane];
      gradients.bias[i] = sum;  // code i lies behind: nothing that is still to be read
    }
    add_rows(gradients.bias, 1, codes.count, op.dbias, op.element, 1, code, slice.chunk);
  }
}

void gumbel_codebook_sum(const GumbelCodebook& op, int64_t tile, float* parts, int64_t count, int64_t stride) {
  for (int64_t part = 1; part < count; ++part) {
    for (int64_t i = 0; i < op.features * kTile; i += kWidth) {
      store(parts + i, load(parts + i) + load(parts + part * stride + i));
    }
  }
  write_columns(op, op.dx, Lanes(op, tile), op.features, parts);
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
