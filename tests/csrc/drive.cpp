// Drives every exported op over exact-sized heap buffers and a pool of its own, under a sanitizer (tests/test_house.py): it
// needs neither Python nor torch. Prints "ok", or fails.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "decode_case.h"
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

// Two heads of 70 causal positions, 64 + 6: a full run, a masked one, keys with gaps; as [B, N, H, D] with bytes of one type.
struct Attention {
  static constexpr int64_t kN = 70;
  std::vector<int32_t> queries, run_start, keys;
  std::vector<dalle_fast::Run> runs;
  std::vector<uint64_t> masks;
  std::vector<std::vector<char>> tensors;
  std::vector<float> stats, turns;
  std::vector<uint8_t> key_mask;
  dalle_fast::SparseAttention op{};

  Attention(int64_t width, dalle_fast::Element element, bool turned, bool masked) {
    for (int i = 0; i < 128; ++i) queries.push_back(i < kN ? i : -1);
    for (int i = 0; i < kN; ++i) keys.push_back(i);
    for (int i = 0; i < 64; ++i) masks.push_back(~uint64_t{0} << i);
    for (int i = 0; i < 64; i += 2) keys.push_back(i);
    for (int i = 64; i < kN; ++i) masks.push_back(~uint64_t{0} << (i - 64));
    runs = {{0, 64, 0, 4, 0}, {static_cast<int32_t>(kN), 32, 0, 1, -1}, {64, 6, 0, 1, 64}};
    run_start = {0, 1, 3};
    const int64_t heads = 2, size = element == dalle_fast::Element::float32 ? 4 : 2;
    op.batch = 1, op.heads = heads, op.n = kN, op.width = width, op.element = element, op.scale = 0.5f;
    for (dalle_fast::Heads* to : {&op.q, &op.k, &op.v, &op.out, &op.dout, &op.dq, &op.dk, &op.dv}) {
      tensors.emplace_back(kN * heads * width * size);
      // bytes of 0x30 .. 0x3F are numbers around 1 in all three types
      for (size_t i = 0; i < tensors.back().size(); ++i) tensors.back()[i] = static_cast<char>(0x30 + i * 7 % 16);
      *to = {tensors.back().data(), kN * heads * width, width, heads * width};
    }
    stats.resize(heads * kN * 2);
    op.stats = stats.data();
    const int64_t padded = (width + 15) / 16 * 16;
    turns.assign(2 * kN * padded, 0.6f);
    if (turned) op.cosines = turns.data(), op.sines = turns.data() + kN * padded;
    key_mask.assign(kN, 0);
    if (masked) op.key_mask = key_mask.data(), op.mask_len = kN, op.mask_text_queries = 1;
    op.lists = {2, 2, queries.data(), run_start.data(), runs.data(), keys.data(), masks.data()};
    op.threads = 2;
  }
};

void drive_sparse_attention(int64_t width, dalle_fast::Element element, bool turned, bool masked) {
  Attention call(width, element, turned, masked);
  expect(dalle_fast_sparse_attention_forward(&call.op) == 0, "sparse_attention_forward");
  expect(dalle_fast_sparse_attention_backward(&call.op) == 0, "sparse_attention_backward");
  const std::vector<std::vector<char>> once = call.tensors;
  expect(dalle_fast_sparse_attention_forward(&call.op) == 0, "sparse_attention_forward");
  expect(dalle_fast_sparse_attention_backward(&call.op) == 0, "sparse_attention_backward");
  expect(call.tensors == once, "a second run gives the same bits");
}

void drive_nearest_code(int64_t rows, int64_t codes, int64_t width) {
  std::vector<float> x(rows * width), codebook(codes * width);
  for (size_t i = 0; i < codebook.size(); ++i) codebook[i] = static_cast<float>(i * 7 % 31);
  for (int64_t i = 0; i < rows; ++i) std::copy_n(&codebook[i % codes * width], width, &x[i * width]);
  std::vector<int64_t> nearest(rows, -1);
  expect(dalle_fast_nearest_code(x.data(), rows, width, codebook.data(), codes, nearest.data()) == 0, "nearest_code");
  for (int64_t i = 0; i < rows; ++i) {
    expect(std::equal(&x[i * width], &x[i * width] + width, &codebook[nearest[i] * width]), "a code is nearest to itself");
  }
}

// Multiples of 1/4 between -3/4 and 3/4 in the bytes of one type.
std::vector<char> quarters(int64_t count, dalle_fast::Element element) {
  std::vector<char> bytes;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t step = i * 5 % 7 - 3;
    const float value = 0.25f * static_cast<float>(step);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    constexpr uint16_t kHalves[4] = {0, 0x3400, 0x3800, 0x3A00};
    if (element == dalle_fast::Element::bfloat16) bits >>= 16;
    if (element == dalle_fast::Element::float16) bits = kHalves[std::abs(step)] | (step < 0 ? 0x8000 : 0);
    const char* first = reinterpret_cast<const char*>(&bits);
    bytes.insert(bytes.end(), first, first + (element == dalle_fast::Element::float32 ? 4 : 2));
  }
  return bytes;
}

// Two samples of 5 x 7 rows, a tile of 64 and one of 6; with the channels of rows side by side or apart.
void drive_gumbel_codebook(int64_t features, int64_t codes, int64_t dim, dalle_fast::Element element,
                           dalle_fast::Choice choice, bool apart, bool given) {
  constexpr int64_t kHeight = 5, kWidth = 7, kPixels = kHeight * kWidth, kRows = 2 * kPixels;
  std::vector<std::vector<char>> tensors;
  const auto maps = [&](int64_t channels, dalle_fast::Element of) -> dalle_fast::Maps {
    tensors.push_back(quarters(kRows * channels, of));
    const int64_t step_c = apart ? kPixels : 1, step_x = apart ? 1 : channels;
    return {tensors.back().data(), kPixels * channels, step_c, kWidth * step_x, step_x};
  };
  const auto matrix = [&](int64_t count) {
    tensors.push_back(quarters(count, element));
    return tensors.back().data();
  };
  std::vector<int64_t> nearest(kRows, -1), noisy(kRows, -1), again(kRows, -1);
  std::vector<float> statistics(dalle_fast::kStatistics * kRows);
  dalle_fast::GumbelCodebook op{};
  op.batch = 2, op.height = kHeight, op.width = kWidth, op.features = features, op.codes = codes, op.dim = dim;
  op.element = element, op.choice = choice, op.with_kl = 1, op.temperature = 0.5, op.threads = kThreads;
  op.x = maps(features, element), op.weight = matrix(codes * features), op.codebook = matrix(codes * dim);
  if (given) op.noise = maps(codes, dalle_fast::Element::float32), op.bias = matrix(codes);
  op.seed = ~uint64_t{0}, op.first_row = (int64_t{1} << 32) - kRows, op.stream = 2;
  op.embeds = maps(dim, element), op.nearest = nearest.data(), op.noisy = noisy.data(), op.statistics = statistics.data();
  op.dembeds = maps(dim, element), op.dx = maps(features, element), op.dkl = 0.5f;
  op.dweight.data = matrix(codes * features), op.dbias.data = matrix(codes), op.dcodebook.data = matrix(codes * dim);
  expect(dalle_fast_gumbel_codebook_forward(&op) == 0, "gumbel_codebook forward");
  expect(dalle_fast_gumbel_codebook_backward(&op) == 0, "gumbel_codebook backward");
  op.nearest = again.data();
  expect(dalle_fast_gumbel_codebook_nearest(&op) == 0, "gumbel_codebook nearest");
  expect(nearest == again, "the codes without noise are the same in both ways");
  if (element == dalle_fast::Element::float32) {
    float sum = 0, size = 0;
    for (int64_t i = 0; i < codes; ++i) {
      const float value = static_cast<const float*>(op.dbias.data)[i];
      sum += value, size += std::fabs(value);
    }
    expect(std::isfinite(size) && std::fabs(sum) <= 1e-3f * (size + 1), "the gradient of a softmax sums to zero");
  }
  for (int64_t code : noisy) expect(code >= 0 && code < codes, "chosen codes exist");
}

// Two samples of 70 positions, of which 40 predict text; some labels do not count. A width of 8200 takes the rows in chunks.
void drive_vocab_cross_entropy(int64_t width, int64_t text_codes, int64_t image_codes, dalle_fast::Element element,
                               dalle_fast::Element product, bool plain) {
  constexpr int64_t kN = 70, kText = 40, kRows = 2 * kN;
  const int64_t codes = text_codes + image_codes;
  std::vector<std::vector<char>> tensors;
  const auto tensor = [&](int64_t count, dalle_fast::Element of) -> dalle_fast::Elements {
    tensors.push_back(quarters(count, of));
    return {tensors.back().data(), of};
  };
  std::vector<int64_t> labels;
  for (int64_t i = 0; i < kRows; ++i) {
    labels.push_back(i % 5 == 3 ? -100 : i * 7 % (i % kN < kText ? text_codes : image_codes));
  }
  std::vector<float> statistics(dalle_fast::kVocabStatistics * kRows);
  float losses[2];
  dalle_fast::VocabCrossEntropy op{};
  op.batch = 2, op.n = kN, op.width = width, op.n_text = kText, op.text_codes = text_codes, op.codes = codes;
  op.product = product, op.divide_max = !plain && width > 1, op.eps = 1e-5f, op.threads = kThreads;
  op.hidden = tensor(kRows * width, element), op.stride_b = kN * width, op.stride_n = width;
  op.norm_weight = tensor(width, element), op.norm_bias = tensor(width, dalle_fast::Element::float32);
  op.weight = tensor(codes * width, element);
  if (!plain) op.bias = tensor(codes, element);
  op.labels = labels.data(), op.statistics = statistics.data(), op.losses = losses;
  op.dlosses[0] = 0.5f, op.dlosses[1] = 2.0f;
  op.dhidden = tensor(kRows * width, element).data;
  op.dnorm_weight = tensor(width, element).data, op.dnorm_bias = tensor(width, dalle_fast::Element::float32).data;
  op.dweight.data = tensor(codes * width, element).data;
  if (!plain) op.dbias.data = tensor(codes, element).data;
  expect(dalle_fast_vocab_cross_entropy_forward(&op) == 0, "vocab_cross_entropy forward");
  expect(losses[0] >= 0 && losses[1] >= 0 && losses[0] + losses[1] < INFINITY, "losses are finite and not negative");
  expect(dalle_fast_vocab_cross_entropy_backward(&op) == 0, "vocab_cross_entropy backward");
  if (!plain && element == dalle_fast::Element::float32) {
    const float* const dbias = static_cast<const float*>(op.dbias.data);
    for (int half : {0, 1}) {
      float sum = 0;
      for (int64_t i = half == 0 ? 0 : text_codes; i < (half == 0 ? text_codes : codes); ++i) sum += dbias[i];
      expect(std::fabs(sum) <= 1e-4f, "the gradient of a softmax sums to zero");
    }
  }
  const std::vector<std::vector<char>> once = tensors;
  op.threads = 1;
  expect(dalle_fast_vocab_cross_entropy_backward(&op) == 0, "vocab_cross_entropy backward");
  expect(tensors == once, "a second run gives the same bits");
}

// Widths off the vectors, of every element; a gate of zero closes.
void drive_geglu(int64_t rows, int64_t width, dalle_fast::Element element) {
  std::vector<char> x = quarters(rows * 2 * width, element), dout = quarters(rows * width, element);
  std::vector<char> out(dout.size()), dx(x.size());
  dalle_fast::Geglu op{rows, width, element, x.data(), out.data(), dout.data(), dx.data()};
  expect(dalle_fast_geglu_forward(&op) == 0 && dalle_fast_geglu_backward(&op) == 0, "geglu");
  if (element != dalle_fast::Element::float32) return;
  const auto at = [](const std::vector<char>& of, int64_t i) { return reinterpret_cast<const float*>(of.data())[i]; };
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < width; ++i) {
      const float value = at(x, row * 2 * width + i), gate = at(x, row * 2 * width + width + i);
      const float gelu = gate * 0.5f * (1 + std::erf(gate * 0.70710678f));
      expect(std::fabs(at(out, row * width + i) - value * gelu) <= 1e-6f * (1 + std::fabs(value * gate)), "geglu's value");
      expect(std::isfinite(at(dx, row * 2 * width + i) + at(dx, row * 2 * width + width + i)), "geglu's gradient");
    }
  }
}

void drive_choose_tokens(int64_t rows, int64_t codes) {
  std::vector<float> logits(rows * codes);
  const std::vector<uint64_t> seeds(rows, ~uint64_t{0});
  const std::vector<int64_t> positions(rows, -1);
  for (int kind = 0; kind < 4; ++kind) {
    for (size_t i = 0; i < logits.size(); ++i) {
      const float spread = static_cast<float>(i * 7919 % 1009) * 0.01f;
      logits[i] = kind == 0 ? 1.0f : kind == 1 ? spread : kind == 2 ? -INFINITY : i % 3 ? NAN : 3e38f;
    }
    for (int64_t top_k : {int64_t{0}, int64_t{1}, int64_t{5}, codes}) {
      for (float temperature : {0.0f, 1e-39f, 1.0f}) {
        for (double top_p : {0.5, 1.0}) {
          const dalle_fast::TokenChoice choice{codes, top_k, temperature, top_p, 2};
          std::vector<int64_t> tokens(rows, -7);
          const int32_t status =
              dalle_fast_choose_tokens(&choice, logits.data(), rows, seeds.data(), positions.data(), tokens.data());
          expect(status == 0, "choose_tokens");
          for (int64_t token : tokens) expect(token >= 0 && token < codes, "a token is one of the codes");
        }
      }
    }
  }
}

void drive_decode(dalle_fast::PackedElement weights, int options) {
  DecodeCase one(weights, options);
  const std::vector<int64_t> alone = one.draw(1, 1), beside = one.draw(13, 3);
  expect(!alone.empty() && !beside.empty(), "decode");
  for (size_t i = 0; i < beside.size(); ++i) {
    expect(beside[i] >= 0 && beside[i] < DecodeCase::kCodes, "drawn codes exist");
    expect(beside[i] == alone[i % alone.size()], "a sample beside others is what it is alone");
  }
}

void drive_packed_product(int64_t rows, int64_t depth, int64_t width, dalle_fast::Epilogue epilogue) {
  using namespace dalle_fast;
  const int64_t stride = (depth + 15) / 16 * 16, columns = epilogue == Epilogue::gate ? width / 2 : width;
  std::vector<float> panels(panels_of(width) * depth * kPanel, 0.5f), bias(panels_of(width) * kPanel, 1.0f), scale(width, 1.0f);
  std::vector<float> x(rows * stride, 1.0f), out(rows * columns, 1.0f);
  const PackedMatrix matrix{panels.data(), nullptr, bias.data(), depth, width};
  const PackedProduct op{&matrix, PackedElement::float32, epilogue, rows, x.data(), stride, out.data(), columns, scale.data()};
  expect(dalle_fast_packed_product(&op) == 0, "packed_product");
  const float y = 0.5f * static_cast<float>(depth) + 1.0f;
  const float wanted = epilogue == Epilogue::store ? y : epilogue == Epilogue::residual ? y + 1.0f : y * y;  // gelu(y) = y from 6 on
  for (float got : out) expect(std::fabs(got - wanted) <= 1e-5f * wanted, "packed_product");
}

void drive_digest() {
  std::vector<char> data(200001, 3);
  uint64_t before = 0, after = 0;
  expect(dalle_fast_digest(data.data(), static_cast<int64_t>(data.size()), &before) == 0, "digest");
  for (size_t at : {size_t{0}, size_t{65536}, data.size() - 1}) {
    data[at] ^= 1;
    expect(dalle_fast_digest(data.data(), static_cast<int64_t>(data.size()), &after) == 0 && after != before, "a digest sees a bit");
    data[at] ^= 1;
  }
}

}  // namespace

int main() {
  drive_digest();
  for (dalle_fast::ParallelFor parallel_for : {dalle_fast::ParallelFor{nullptr}, dalle_fast::ParallelFor{pool}}) {
    dalle_fast_set_parallel_for(parallel_for);
    for (int32_t isa = 0; dalle_fast_isa_supported(isa); ++isa) {
      dalle_fast_set_isa(isa);
      expect(dalle_fast_isa() == isa, "the instruction set is the one that was set");
      for (int64_t codes : {0, 1, 3, 4, 31, 32, 33, 2049, 8192}) {
        for (int64_t rows : {0, 1, 3, 17}) drive_gumbel_noise(rows, codes);
      }
      for (int64_t codes : {1, 2, 15, 17, 513, 8192}) {
        for (int64_t rows : {0, 1, 5}) drive_choose_tokens(rows, codes);
      }
      for (int64_t codes : {1, 48, 101}) {
        for (int64_t width : {1, 16, 37}) drive_nearest_code(130, codes, width);
      }
      for (int32_t element : {0, 1, 2}) {
        for (int64_t width : {1, 16, 37, 300, 8200}) {
          const int64_t codes = width > 1000 ? 3 : width % 2 ? 97 : 48;
          for (int32_t product : {0, element}) {
            drive_vocab_cross_entropy(width, codes, 5, static_cast<dalle_fast::Element>(element),
                                      static_cast<dalle_fast::Element>(product), width == 300);
          }
        }
      }
      for (int64_t sizes : {0, 1, 2}) {
        const int64_t features[] = {1, 16, 37}, codes[] = {1, 96, 101}, dims[] = {33, 1, 64};
        for (int32_t element : {0, 1, 2}) {
          for (int32_t choice : {0, 1, 2}) {
            drive_gumbel_codebook(features[sizes], codes[sizes], dims[sizes], static_cast<dalle_fast::Element>(element),
                                  static_cast<dalle_fast::Choice>(choice), sizes == 1, choice == sizes);
          }
        }
      }
      for (int32_t element : {0, 1, 2}) {
        for (int64_t width : {1, 15, 16, 37}) drive_geglu(5, width, static_cast<dalle_fast::Element>(element));
      }
      for (int32_t element : {0, 1, 2}) {
        for (int options : {5, 10, 15}) drive_decode(static_cast<dalle_fast::PackedElement>(element), options);
      }
      for (int32_t epilogue : {0, 1, 2}) {
        for (int64_t rows : {1, 7, 50}) drive_packed_product(rows, 129, 70, static_cast<dalle_fast::Epilogue>(epilogue));
      }
      for (int64_t width : {1, 6, 16, 33, 64}) {
        for (int32_t element : {0, 1, 2}) {
          drive_sparse_attention(width, static_cast<dalle_fast::Element>(element), width % 2 == 0, false);
          drive_sparse_attention(width, static_cast<dalle_fast::Element>(element), false, true);
        }
      }
    }
  }
  std::printf("ok\n");
}
