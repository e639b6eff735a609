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
  const int64_t width = filled(model.dim_head, 16);
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

  int64_t width() const { return filled(model.dim_head, 16); }
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

// Rows of the cache are read a vector at a time, where that is cheapest: of 16-bit numbers two vectors lie in one, even channels
// in the lower halves of its lanes, odd ones in the upper. A query, and what values add up to, is arranged alike.
template <class Number>
constexpr int64_t in_pairs(int64_t width) {
  return sizeof(Number) == 2 ? width / (2 * kWidth) * (2 * kWidth) : 0;
}

static inline Vec load_arranged(const float* row, int64_t, int64_t at) { return load(row + at); }
static inline Vec load_arranged(const BFloat16* row, int64_t pairs, int64_t at) {
  if (at >= pairs) return load_row_vector(row + at);
  VecU both;
  memcpy(&both, row + at / (2 * kWidth) * (2 * kWidth), sizeof(both));
  return reinterpret_cast<Vec>(at % (2 * kWidth) == 0 ? both << 16 : both & 0xFFFF0000u);
}

// The place of channel d in an arranged row.
static inline int64_t arranged(int64_t pairs, int64_t d) {
  if (d >= pairs) return d;
  const int64_t block = d / (2 * kWidth) * (2 * kWidth);
  return block + (d - block) / 2 + d % 2 * kWidth;
}

// scores [keys of the window, and up to 3 more] of a row's own image keys, for an arranged query; returns how many.
template <class Number>
int64_t score_window(const DecodeWindows& windows, int64_t place, const Number* keys, int64_t width, const float* query,
                     float* scores) {
  const int64_t pairs = in_pairs<Number>(width);
  Vec sum[4];
  int64_t count = 0;
  for (int64_t run = windows.run_start[place]; run < windows.run_start[place + 1]; ++run) {
    const Number* key = keys + windows.runs[2 * run] * width;
    for (int64_t i = 0; i < windows.runs[2 * run + 1]; ++i, key += width) {
      Vec products{};
      for (int64_t d = 0; d < width; d += kWidth) products = multiply_add(load(query + d), load_arranged(key, pairs, d), products);
      sum[count % 4] = products;
      if (++count % 4 == 0) sums_of_lanes(sum, scores + count - 4);
    }
  }
  if (count % 4 != 0) {
    for (int64_t i = count % 4; i < 4; ++i) sum[i] = Vec{};
    sums_of_lanes(sum, scores + count / 4 * 4);
  }
  return count;
}

// out [kVectors * kWidth] += the weighted values of the window, in chains of kChunk, for arranged channels from `column` on.
template <int kVectors, class Number>
void add_columns_of_window(const DecodeWindows& windows, int64_t place, const Number* values, int64_t width, int64_t column,
                           const float* weights, float* out) {
  const int64_t pairs = in_pairs<Number>(width);
  Vec chain[kVectors] = {}, total[kVectors] = {};
  int64_t count = 0;
  for (int64_t run = windows.run_start[place]; run < windows.run_start[place + 1]; ++run) {
    const Number* value = values + windows.runs[2 * run] * width;
    for (int64_t i = 0; i < windows.runs[2 * run + 1]; ++i, value += width) {
      const Vec weight = broadcast(weights[count]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        chain[v] = multiply_add(weight, load_arranged(value, pairs, column + v * kWidth), chain[v]);
      }
      if (++count % kChunk == 0) {
        for (int v = 0; v < kVectors; ++v) total[v] += chain[v], chain[v] = Vec{};
      }
    }
  }
  float sums[kVectors * kWidth];
  for (int v = 0; v < kVectors; ++v) store(sums + v * kWidth, total[v] + chain[v]);
  for (int64_t d = column; d < column + kVectors * kWidth; ++d) out[d] += sums[arranged(pairs, d) - column];
}

template <class Number>
void add_window(const DecodeWindows& windows, int64_t place, const Number* values, int64_t width, const float* weights, float* out) {
  constexpr int kMany = kWidth == 16 ? 4 : 2;  // vectors: chains that hide the latency of a sum; a pair stays together
  int64_t column = 0;
  for (; column + kMany * kWidth <= width; column += kMany * kWidth) {
    add_columns_of_window<kMany>(windows, place, values, width, column, weights, out);
  }
  for (; column + 2 * kWidth <= width; column += 2 * kWidth) {
    add_columns_of_window<2>(windows, place, values, width, column, weights, out);
  }
  for (; column < width; column += kWidth) add_columns_of_window<1>(windows, place, values, width, column, weights, out);
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
  float *totals, *queries, *query, *out, *scores;

  Bench(const DecodeModel& model, float* scratch)
      : width(filled(model.dim_head, 16)), score_stride(filled(model.text_len, 16) + filled(model.n_image(), 16)) {
    Arena arena{scratch};
    totals = arena.take(kAttendRows * kPanel);
    queries = arena.take(kAttendRows * width);
    query = arena.take(width);
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

// One head's attention of one block of rows.
template <class Cache>
struct BlockAttention {
  using Panel = typename Cache::Panel;
  const Memory<Cache>& memory;
  const DecodeModel& model;
  const Bench& bench;
  const int64_t count, *position, *sequence;
  const bool text;
  const int64_t prompt, n_text, n_padded;  // n_text: how many of the text's keys some row of the block sees
  float sums[kAttendRows];                 // of a row's weights

  BlockAttention(const Decode& call, const Memory<Cache>& of_head, const DecodeBlock& block, const Bench& in)
      : memory(of_head),
        model(*call.model),
        bench(in),
        count(block.count),
        position(call.rows.position + block.first),
        sequence(call.rows.sequence + block.first),
        text(position[0] < model.text_len),
        prompt(text ? sequence[0] : call.caches->prompt_of[sequence[0]]),
        n_text(text ? last_position() + 1 : model.text_len),
        n_padded(filled(n_text, 16)) {}

  // first_row: of the block, in both.
  void run(const DecodeRowsOf& qkv, const DecodeRowsOf& attended, int64_t first_row) {
    read_queries(qkv, first_row);
    for (int64_t panel = 0; panel < panels_of(n_text); ++panel) {
      const int64_t first = panel * kPanel, columns = n_padded - first < kPanel ? n_padded - first : kPanel;
      bench.multiply<Panel>(bench.queries, bench.width, memory.text_keys(prompt, panel), model.dim_head, first, columns, count,
                            bench.scores, bench.score_stride);
    }
    for (int64_t i = 0; i < count; ++i) weigh_row(i);
    for (int64_t panel = 0; panel < panels_of(model.dim_head); ++panel) {
      const int64_t first = panel * kPanel, columns = bench.width - first < kPanel ? bench.width - first : kPanel;
      bench.multiply<Panel>(bench.scores, bench.score_stride, memory.text_values(prompt, panel), n_text, first, columns, count,
                            bench.out, bench.width);
    }
    for (int64_t i = 0; i < count; ++i) finish_row(i, attended[first_row + i] + memory.head * model.dim_head);
  }

 private:
  int64_t last_position() const {
    int64_t last = 0;
    for (int64_t i = 0; i < count; ++i) last = position[i] > last ? position[i] : last;
    return last;
  }

  void read_queries(const DecodeRowsOf& qkv, int64_t first_row) {
    const float scale = kLog2E / __builtin_sqrtf(static_cast<float>(model.dim_head));
    for (int64_t i = 0; i < count; ++i) {
      float* query = bench.queries + i * bench.width;
      read_turned(model, qkv[first_row + i] + memory.head * model.dim_head, position[i], query);
      for (int64_t d = 0; d < bench.width; d += kWidth) store(query + d, load(query + d) * scale);
    }
  }

  // A row's scores of its image keys beside those of the text, and the weights of all.
  void weigh_row(int64_t i) {
    float *scores = bench.scores + i * bench.score_stride, *own = scores + n_padded;
    fill(scores + (text ? position[i] + 1 : n_text), own, -kInfinity);
    int64_t seen = 0;
    if (!text) {
      const int64_t pairs = in_pairs<typename Cache::Number>(bench.width);
      for (int64_t d = 0; d < bench.width; ++d) bench.query[arranged(pairs, d)] = bench.queries[i * bench.width + d];
      seen = score_window(memory.windows, position[i] - model.text_len, memory.image_keys(sequence[i]), bench.width, bench.query, own);
    }
    fill(own + seen, own + filled(seen, 16), -kInfinity);
    sums[i] = weigh(scores, n_padded + filled(seen, 16));
  }

  void finish_row(int64_t i, float* attended) {
    float* out = bench.out + i * bench.width;
    if (!text) {
      add_window(memory.windows, position[i] - model.text_len, memory.image_values(sequence[i]), bench.width,
                 bench.scores + i * bench.score_stride + n_padded, out);
    }
    const float inverse = 1.0f / sums[i];
    for (int64_t d = 0; d < bench.width; d += kWidth) store(out + d, load(out + d) * inverse);
    memcpy(attended, out, sizeof(float) * model.dim_head);
  }
};

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
    using Cache = decltype(kind);
    const Memory<Cache> memory(call, layer, head);
    BlockAttention<Cache>(call, memory, block, Bench(*call.model, scratch)).run(qkv, attended, block.first);
  });
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
