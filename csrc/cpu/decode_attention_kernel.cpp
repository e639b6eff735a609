// Attention of the decoding engine for one instruction set: a block of rows of one prompt and one head.
//
//     s_j = scale log2(e) q . k_j        over the text, in panels all rows share, and over the row's own window of image keys
//     out = sum_j 2^(s_j - max) v_j / sum_j 2^(s_j - max)
//
// q, k, v are turned first; scores and sums are float32. A row's numbers do not depend on the rows beside it: weights of keys
// behind it are 0, and adding 0 v changes no sum. Bound by reading keys and values, the text's once a block.
#include "decode_kernels.h"
#include "packed_panel.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {

namespace {

// How a panel of text keys or values is written.
struct Float32Cache {
  using Panel = Float32Panel;
  using Number = float;
  static void put(float* panel, int64_t k, int64_t column, float x) { panel[k * kPanel + column] = x; }
};

struct BFloat16Cache {
  using Panel = BFloat16Panel;
  using Number = BFloat16;
  static void put(BFloat16* panel, int64_t k, int64_t column, float x) { narrow(x, panel[(k / 2 * kPanel + column) * 2 + k % 2]); }
};

template <class Function>
void with_cache(Element element, const Function& function) {
  if (element == Element::float32) return function(Float32Cache{});
  return function(BFloat16Cache{});
}

// A head's query, key or value as a padded row, turned.
void read_turned(const DecodeModel& model, const float* from, int64_t position, float* to) {
  const int64_t width = padded16(model.dim_head);
  load_row(from, model.dim_head, width, to);
  if (model.cosines == nullptr) return;
  turn_row<false>(to, width, model.cosines + position * width, model.sines + position * width);
}

// One head's keys and values in one layer.
template <class Cache>
struct Memory {
  using Number = typename Cache::Number;
  using Panel = typename Cache::Panel;
  const DecodeModel& model;
  const DecodeWindows& windows;
  const DecodeLayerCache& cache;
  int64_t head;

  Memory(const Decode& call, int64_t layer, int64_t of_head)
      : model(*call.model), windows(model.layers[layer].windows), cache(call.caches->layers[layer]), head(of_head) {}

  int64_t width() const { return padded16(model.dim_head); }
  Number* text_keys(int64_t prompt, int64_t panel) const {
    const int64_t size = panel_rows<Panel>(model.dim_head) * kPanel;
    return static_cast<Number*>(cache.text_keys) + ((prompt * model.heads + head) * panels_of(model.text_len) + panel) * size;
  }
  Number* text_values(int64_t prompt, int64_t panel) const {
    const int64_t size = panel_rows<Panel>(model.text_len) * kPanel;
    return static_cast<Number*>(cache.text_values) + ((prompt * model.heads + head) * panels_of(model.dim_head) + panel) * size;
  }
  Number* image_keys(int64_t sample) const { return image(cache.image_keys, sample); }
  Number* image_values(int64_t sample) const { return image(cache.image_values, sample); }

 private:
  Number* image(void* rows, int64_t sample) const {
    return static_cast<Number*>(rows) + (sample * model.heads + head) * windows.slots * width();
  }
};

// scores [keys of the window] of a row's own image keys; returns how many.
template <class Number>
int64_t score_window(const DecodeWindows& windows, int64_t place, const Number* keys, int64_t width, const float* query,
                     float* scores) {
  int64_t count = 0;
  for (int64_t run = windows.run_start[place]; run < windows.run_start[place + 1]; ++run) {
    const Number* key = keys + windows.runs[2 * run] * width;
    for (int64_t i = 0; i < windows.runs[2 * run + 1]; ++i, key += width) {
      Vec sum{};
      for (int64_t d = 0; d < width; d += kWidth) sum = multiply_add(load(query + d), load_row_vector(key + d), sum);
      scores[count++] = sum_of_lanes(sum);
    }
  }
  return count;
}

// out [kVectors * kWidth] += the weighted values of the window, in chains of kChunk; `values` are at the first of those columns.
template <int kVectors, class Number>
void add_columns_of_window(const DecodeWindows& windows, int64_t place, const Number* values, int64_t width, const float* weights,
                           float* out) {
  Vec chain[kVectors] = {};
  const auto add_chain = [&] {
    for (int v = 0; v < kVectors; ++v) store(out + v * kWidth, load(out + v * kWidth) + chain[v]), chain[v] = Vec{};
  };
  int64_t count = 0;
  for (int64_t run = windows.run_start[place]; run < windows.run_start[place + 1]; ++run) {
    const Number* value = values + windows.runs[2 * run] * width;
    for (int64_t i = 0; i < windows.runs[2 * run + 1]; ++i, value += width) {
      const Vec weight = broadcast(weights[count]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) chain[v] = multiply_add(weight, load_row_vector(value + v * kWidth), chain[v]);
      if (++count % kChunk == 0) add_chain();
    }
  }
  add_chain();
}

template <class Number>
void add_window(const DecodeWindows& windows, int64_t place, const Number* values, int64_t width, const float* weights, float* out) {
  constexpr int kWide = 64 / kWidth < 8 ? 64 / kWidth : 8;  // vectors: as many chains as hide the latency of a sum
  int64_t column = 0;
  for (; column + kWide * kWidth <= width; column += kWide * kWidth) {
    add_columns_of_window<kWide>(windows, place, values + column, width, weights, out + column);
  }
  for (; column < width; column += kLeastColumns) {
    add_columns_of_window<kLeastColumns / kWidth>(windows, place, values + column, width, weights, out + column);
  }
}

void fill(float* from, float* to, float value) {
  for (; from < to; ++from) *from = value;
}

// scores -> weights; returns their sum. count is a multiple of 16.
float weigh(float* scores, int64_t count) {
  Vec largest = broadcast(-kInfinity);
  for (int64_t i = 0; i < count; i += kWidth) largest = larger(load(scores + i), largest);
  const float max = max_of_lanes(largest);
  Vec sum{};
  for (int64_t i = 0; i < count; i += kWidth) {
    const Vec weight = exp2(load(scores + i) - max);
    store(scores + i, weight);
    sum += weight;
  }
  return sum_of_lanes(sum);
}

// The scratch of one block.
struct Bench {
  int64_t width, score_stride;
  float *totals, *queries, *out, *scores;

  Bench(const DecodeModel& model, float* scratch)
      : width(padded16(model.dim_head)), score_stride(padded16(model.text_len) + padded16(model.n_image())) {
    Arena arena{scratch};
    totals = arena.take(kAttendRows * kPanel);
    queries = arena.take(kAttendRows * width);
    out = arena.take(kAttendRows * width);
    scores = arena.take(kAttendRows * score_stride);
  }

  // to [count, ...] = x times one panel, `columns` of it from `first` on.
  template <class Panel>
  void multiply(const float* x, int64_t stride, const void* panel, int64_t depth, int64_t first, int64_t columns, int64_t count,
                float* to, int64_t to_stride) const {
    multiply_panel<Panel>(x, stride, panel, depth, static_cast<int>(columns), count, totals);
    for (int64_t i = 0; i < count; ++i) memcpy(to + i * to_stride + first, totals + i * kPanel, sizeof(float) * columns);
  }
};

template <class Cache>
void attend(const Decode& call, const Memory<Cache>& memory, const DecodeBlock& block, const DecodeRowsOf& qkv,
            const DecodeRowsOf& attended, const Bench& bench) {
  using Panel = typename Cache::Panel;
  const DecodeModel& model = memory.model;
  const int64_t width = bench.width, count = block.count;
  const int64_t *position = call.rows.position + block.first, *sequence = call.rows.sequence + block.first;
  const bool text = position[0] < model.text_len;
  const int64_t prompt = text ? sequence[0] : call.caches->prompt_of[sequence[0]];
  int64_t n_text = text ? 0 : model.text_len;
  for (int64_t i = 0; i < count && text; ++i) n_text = position[i] < n_text ? n_text : position[i] + 1;
  const int64_t n_padded = padded16(n_text);

  const float scale = kLog2E / __builtin_sqrtf(static_cast<float>(model.dim_head));
  for (int64_t i = 0; i < count; ++i) {
    float* query = bench.queries + i * width;
    read_turned(model, qkv[block.first + i] + memory.head * model.dim_head, position[i], query);
    for (int64_t d = 0; d < width; d += kWidth) store(query + d, load(query + d) * scale);
  }
  for (int64_t panel = 0; panel < panels_of(n_text); ++panel) {
    const int64_t first = panel * kPanel, columns = n_padded - first < kPanel ? n_padded - first : kPanel;
    bench.multiply<Panel>(bench.queries, width, memory.text_keys(prompt, panel), model.dim_head, first, columns, count, bench.scores,
                          bench.score_stride);
  }
  float sums[kAttendRows];
  for (int64_t i = 0; i < count; ++i) {
    float *scores = bench.scores + i * bench.score_stride, *own = scores + n_padded;
    fill(scores + (text ? position[i] + 1 : n_text), own, -kInfinity);
    const int64_t seen = text ? 0
                              : score_window(memory.windows, position[i] - model.text_len, memory.image_keys(sequence[i]), width,
                                             bench.queries + i * width, own);
    fill(own + seen, own + padded16(seen), -kInfinity);
    sums[i] = weigh(scores, n_padded + padded16(seen));
  }
  for (int64_t panel = 0; panel < panels_of(model.dim_head); ++panel) {
    const int64_t first = panel * kPanel, columns = width - first < kPanel ? width - first : kPanel;
    bench.multiply<Panel>(bench.scores, bench.score_stride, memory.text_values(prompt, panel), n_text, first, columns, count,
                          bench.out, width);
  }
  for (int64_t i = 0; i < count; ++i) {
    float* out = bench.out + i * width;
    if (!text) {
      add_window(memory.windows, position[i] - model.text_len, memory.image_values(sequence[i]), width,
                 bench.scores + i * bench.score_stride + n_padded, out);
    }
    const float inverse = 1.0f / sums[i];
    for (int64_t d = 0; d < width; d += kWidth) store(out + d, load(out + d) * inverse);
    memcpy(attended[block.first + i] + memory.head * model.dim_head, out, sizeof(float) * model.dim_head);
  }
}

template <class Cache>
void remember(const Decode& call, const Memory<Cache>& memory, int64_t row, const float* qkv) {
  const DecodeModel& model = memory.model;
  const int64_t position = call.rows.position[row], sequence = call.rows.sequence[row], width = memory.width();
  const float* const key = qkv + model.inner() + memory.head * model.dim_head;
  float turned_key[kMostHeadWidth], turned_value[kMostHeadWidth];
  read_turned(model, key, position, turned_key);
  read_turned(model, key + model.inner(), position, turned_value);
  if (position >= model.text_len) {
    const int64_t slot = memory.windows.slot_of[position - model.text_len];
    store_row(memory.image_keys(sequence) + slot * width, width, turned_key);
    store_row(memory.image_values(sequence) + slot * width, width, turned_value);
    return;
  }
  auto* keys = memory.text_keys(sequence, position / kPanel);
  for (int64_t d = 0; d < model.dim_head; ++d) {
    Cache::put(keys, d, position % kPanel, turned_key[d]);
    Cache::put(memory.text_values(sequence, d / kPanel), position, d % kPanel, turned_value[d]);
  }
}

}  // namespace

void decode_remember(const Decode& call, int64_t layer, int64_t row, int64_t head, const float* qkv) {
  with_cache(call.model->cache, [&](auto kind) { remember(call, Memory<decltype(kind)>(call, layer, head), row, qkv); });
}

void decode_attend(const Decode& call, int64_t layer, const DecodeBlock& block, int64_t head, const DecodeRowsOf& qkv,
                   const DecodeRowsOf& attended, float* scratch) {
  with_cache(call.model->cache, [&](auto kind) {
    attend(call, Memory<decltype(kind)>(call, layer, head), block, qkv, attended, Bench(*call.model, scratch));
  });
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
