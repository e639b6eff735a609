// What the decoding engine does to rows alone, for one instruction set: embedding, norms, token shift. A few numbers a channel
// beside the hundreds of the products: bound by nothing.
#include "decode_kernels.h"
#include "rows.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {

namespace {

void add_row(const float* from, int64_t width, float* to) {
  for (int64_t i = 0; i < width; ++i) to[i] += from[i];
}

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

// A row some distance before another: in this call, or in the ring.
struct Earlier {
  const DecodeRowsOf& normed;
  int64_t row, back;     // of the call
  const float* ring;     // of the row's sequence
  int64_t slots, width;  // the ring holds the first `width` channels
  int64_t place;         // of the row among the positions of its kind

  // Null before the first position of its kind.
  const float* at(int64_t distance) const {
    if (place < distance) return nullptr;
    return distance <= back ? normed[row - distance] : ring + (place - distance) % slots * width;
  }
};

void copy_or_clear(const float* from, int64_t first, int64_t last, float* to) {
  if (from == nullptr) {
    clear(to + first, last - first);
  } else {
    memcpy(to + first, from + first, sizeof(float) * (last - first));
  }
}

}  // namespace

void decode_embed(const DecodeModel& model, const DecodeRows& rows, int64_t row, float* x) {
  const int64_t position = rows.position[row], place = position - model.text_len, dim = model.dim;
  const DecodeTable& table = place < 0 ? model.text_table : model.image_table;
  with_elements(table.element, const_cast<void*>(table.data), [&](auto* data) {
    load_row(data + rows.token[row] * dim, dim, padded(dim), x);
  });
  if (model.row_places != nullptr && place < 0) add_row(model.text_places + position * dim, dim, x);
  if (model.row_places != nullptr && place >= 0) {
    const float* by_row = model.row_places + place / model.grid_cols * dim;
    const float* by_col = model.col_places + place % model.grid_cols * dim;
    for (int64_t i = 0; i < dim; ++i) x[i] += by_row[i] + by_col[i];
  }
  if (model.stable) {
    for (int64_t i = 0; i < dim; ++i) x[i] = x[i] * 0.1f + x[i] * 0.9f;
  }
}

void decode_norm(const DecodeModel& model, const float* weight, const float* bias, bool divided, const float* x, float* out) {
  const int64_t dim = model.dim, whole = dim / kWidth * kWidth;
  if (divided) {
    float largest = x[0];
    for (int64_t i = 1; i < dim; ++i) largest = x[i] > largest ? x[i] : largest;
    for (int64_t i = 0; i < dim; ++i) out[i] = x[i] / largest;
    x = out;
  }
  Vec sum{};
  for (int64_t i = 0; i < whole; i += kWidth) sum += load(x + i);
  float total = sum_of_lanes(sum);
  for (int64_t i = whole; i < dim; ++i) total += x[i];
  const float mean = total / static_cast<float>(dim);
  Vec squares{};
  for (int64_t i = 0; i < whole; i += kWidth) {
    const Vec apart = load(x + i) - mean;
    squares = multiply_add(apart, apart, squares);
  }
  float spread = sum_of_lanes(squares);
  for (int64_t i = whole; i < dim; ++i) spread += (x[i] - mean) * (x[i] - mean);
  const float rstd = 1.0f / __builtin_sqrtf(spread / static_cast<float>(dim) + model.epsilon);
  for (int64_t i = 0; i < whole; i += kWidth) {
    store(out + i, multiply_add((load(x + i) - mean) * rstd, load(weight + i), load(bias + i)));
  }
  for (int64_t i = whole; i < dim; ++i) out[i] = (x[i] - mean) * rstd * weight[i] + bias[i];
}

void decode_shift(const Decode& call, int64_t layer, int branch, int64_t row, const DecodeRowsOf& normed, float* out) {
  const DecodeModel& model = *call.model;
  const DecodeCaches& caches = *call.caches;
  const DecodeLayerCache& cache = caches.layers[layer];
  const int64_t dim = model.dim, sequence = call.rows.sequence[row], position = call.rows.position[row];
  const bool text = position < model.text_len;
  const int64_t half = (dim + 1) / 2, quarter = (dim + 3) / 4;
  const int64_t slots = text ? caches.shift_text_slots : caches.shift_image_slots;
  const int64_t width = text ? half : least(2 * quarter, dim);
  const int64_t place = text ? position : position - model.text_len;
  float* const ring = (text ? cache.text_shift : cache.image_shift)[branch] + sequence * slots * width;
  const Earlier earlier{normed, row, call.rows.back[row], ring, slots, width, place};
  if (text) {
    copy_or_clear(earlier.at(1), 0, half, out);
  } else {
    const int64_t above = least(quarter, dim);
    copy_or_clear(earlier.at(model.grid_cols), 0, above, out);
    copy_or_clear(place % model.grid_cols == 0 ? nullptr : earlier.at(1), above, width, out);
  }
  memcpy(out + width, normed[row] + width, sizeof(float) * (dim - width));
  // A call may hold more rows than the ring: the last ones stay.
  const int64_t over = row + slots;
  if (over < call.rows.count && call.rows.back[over] >= slots) return;
  memcpy(ring + place % slots * width, normed[row], sizeof(float) * width);
}

void decode_add_scaled(int64_t dim, const float* y, const float* scale, float* x) {
  for (int64_t i = 0; i < dim; ++i) x[i] += y[i] * scale[i];
}

void decode_mean(int64_t dim, const float* x1, const float* x2, float* out) {
  for (int64_t i = 0; i < dim; ++i) out[i] = (x1[i] + x2[i]) / 2;
}

void decode_guide(int64_t count, const float* logits, const float* null, float scale, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = null[i] + (logits[i] - null[i]) * scale;
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
