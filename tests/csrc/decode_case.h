// A small model for the decoding engine, every buffer of the size the headers say and no larger.
#pragma once

#include <cstring>
#include <vector>

#include "exports.h"

struct DecodeCase {
  static constexpr int64_t kDim = 21, kHeads = 2, kHead = 12, kInner = kHeads * kHead, kFeedForward = 40, kCodes = 70;
  static constexpr int64_t kText = 5, kRows = 2, kCols = 3, kImage = kRows * kCols, kDepth = 2, kPadded = 16;

  dalle_fast::DecodeModel model{};
  std::vector<dalle_fast::DecodeLayer> layers;

  // options: 1 reversible and stable, 2 token shift, 4 sandwich norm, 8 rotary.
  DecodeCase(dalle_fast::PackedElement weights, int options) : weights_(weights) {
    using namespace dalle_fast;
    const bool sandwich = options & 4, rotary = options & 8;
    model.dim = kDim, model.heads = kHeads, model.dim_head = kHead, model.inner_ff = kFeedForward, model.depth = kDepth;
    model.text_len = kText, model.grid_rows = kRows, model.grid_cols = kCols;
    model.weights = weights, model.cache = weights == PackedElement::float32 ? Element::float32 : Element::bfloat16;
    model.reversible = options & 1, model.shift = (options & 2) != 0, model.stable = options & 1, model.epsilon = 1e-5f;
    for (int64_t p = 0; p < kImage; ++p) slot_of_.push_back(p), run_start_.push_back(p), runs_.push_back(0), runs_.push_back(p + 1);
    run_start_.push_back(kImage);
    const auto branch = [&] {
      return DecodeBranch{numbers(kDim), numbers(kDim), sandwich ? numbers(kDim) : nullptr, sandwich ? numbers(kDim) : nullptr,
                          numbers(kDim)};
    };
    for (int64_t i = 0; i < kDepth; ++i) {
      layers.push_back({branch(), branch(), matrix(kDim, 3 * kInner, false), matrix(kInner, kDim, true),
                        matrix(kDim, 2 * kFeedForward, true), matrix(kFeedForward, kDim, true),
                        {kImage, slot_of_.data(), run_start_.data(), runs_.data()}});
    }
    model.layers = layers.data();
    if (rotary) model.cosines = numbers((kText + kImage) * kPadded), model.sines = numbers((kText + kImage) * kPadded);
    if (!rotary) model.text_places = numbers(kText * kDim), model.row_places = numbers(kRows * kDim), model.col_places = numbers(kCols * kDim);
    model.text_table = {numbers(30 * kDim), Element::float32};
    model.image_table = {numbers(kCodes * kDim), Element::float32};
    model.head_norm_weight = numbers(kDim), model.head_norm_bias = numbers(kDim);
    model.image_head = matrix(kDim, kCodes, true);
  }

  // Codes [samples, kImage] drawn after one prompt; every sample has the same seed.
  std::vector<int64_t> draw(int64_t samples, int64_t steps_at_once) {
    using namespace dalle_fast;
    std::vector<DecodeLayerCache> caches;
    for (int64_t i = 0; i < kDepth; ++i) caches.push_back(layer_cache(samples));
    std::vector<int64_t> prompt_of(samples, 0);
    const DecodeCaches kept{caches.data(), prompt_of.data(), 2, kCols + 1};

    std::vector<int64_t> zeros(kText, 0), positions{0, 1, 2, 3, 4}, tokens{0, 7, 8, 29, 3}, back{0, 1, 2, 3, 4}, last{kText - 1};
    std::vector<float> logits(kCodes), space(dalle_fast_decode_workspace(&model, kText));
    Decode text{};
    text.model = &model, text.caches = &kept, text.threads = 3;
    text.rows = {kText, zeros.data(), positions.data(), tokens.data(), back.data(), 1, last.data(), 0};
    text.logits = logits.data(), text.workspace = space.data();
    if (dalle_fast_decode(&text) != 0) return {};

    std::vector<int64_t> sequence, place(samples), token(samples), alone(samples, 0), codes(samples * kImage, -1);
    std::vector<float> every, room(dalle_fast_decode_workspace(&model, samples));
    for (int64_t i = 0; i < samples; ++i) sequence.push_back(i), every.insert(every.end(), logits.begin(), logits.end());
    const std::vector<uint64_t> seeds(samples, 11);
    Decode call{};
    call.model = &model, call.caches = &kept, call.threads = 3;
    call.rows = {samples, sequence.data(), place.data(), token.data(), alone.data(), samples, sequence.data(), 0};
    call.logits = every.data(), call.workspace = room.data();
    for (int64_t first = 0; first < kImage; first += steps_at_once) {
      call.draw = {samples, steps_at_once, first, 0, 1.0f, {kCodes, 9, 0.9f, 0.95, 0}, seeds.data(), codes.data()};
      if (dalle_fast_decode(&call) != 0) return {};
    }
    return codes;
  }

 private:
  // Between -0.5 and 0.5.
  float next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<float>(state_ >> 40) / (1 << 24) - 0.5f;
  }

  float* numbers(int64_t count) {
    floats_.emplace_back(count);
    for (float& x : floats_.back()) x = next();
    return floats_.back().data();
  }

  void* bytes(int64_t count, char value) {
    bytes_.emplace_back(count, value);
    return bytes_.back().data();
  }

  dalle_fast::PackedMatrix matrix(int64_t depth, int64_t width, bool bias) {
    using namespace dalle_fast;
    const int64_t panels = panels_of(width), pairs = (depth + 1) / 2 * 2;
    PackedMatrix made{nullptr, nullptr, bias ? numbers(panels * kPanel) : nullptr, depth, width};
    if (weights_ == PackedElement::float32) {
      made.panels = numbers(panels * depth * kPanel);
      return made;
    }
    char* weights = static_cast<char*>(bytes(panels * pairs * kPanel * (weights_ == PackedElement::int8 ? 1 : 2), 0));
    for (int64_t i = 0; i < panels * pairs * kPanel; ++i) {
      const float x = next();
      if (weights_ == PackedElement::int8) {
        weights[i] = static_cast<char>(x * 254);
      } else {
        std::memcpy(weights + 2 * i, reinterpret_cast<const char*>(&x) + 2, 2);
      }
    }
    made.panels = weights;
    if (weights_ == PackedElement::int8) made.scales = numbers(panels * chunks_of(depth) * kPanel);
    return made;
  }

  dalle_fast::DecodeLayerCache layer_cache(int64_t samples) {
    using namespace dalle_fast;
    const int64_t element = model.cache == Element::float32 ? 4 : 2, pairs = (kText + 1) / 2 * 2;
    const int64_t text = element == 4 ? kText : pairs, image = samples * kHeads * kImage * kPadded * element;
    DecodeLayerCache cache{bytes(kHeads * kHead * kPanel * element, 0), bytes(kHeads * text * kPanel * element, 0), bytes(image, 0),
                           bytes(image, 0), {}, {}};
    for (int branch = 0; branch < 2 && model.shift; ++branch) {
      cache.text_shift[branch] = numbers(2 * ((kDim + 1) / 2));
      cache.image_shift[branch] = numbers(samples * (kCols + 1) * 2 * ((kDim + 3) / 4));
    }
    return cache;
  }

  dalle_fast::PackedElement weights_;
  uint64_t state_ = 1;
  std::vector<std::vector<float>> floats_;
  std::vector<std::vector<char>> bytes_;
  std::vector<int64_t> slot_of_, run_start_, runs_;
};
