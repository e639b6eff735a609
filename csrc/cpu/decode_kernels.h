// The decoding engine's kernels: what is done to a row, or to a block of rows and a head.
#pragma once

#include "decode.h"

namespace dalle_fast {

constexpr int kAttendRows = 12;  // rows of one prompt that share the reading of its keys and values
constexpr int64_t kMostHeadWidth = 1024;  // D, padded

// Rows of what is computed, all padded with zeros to a multiple of 16.
struct DecodeRowsOf {
  float* data;
  int64_t stride;
  float* operator[](int64_t row) const { return data + row * stride; }
};

// Some of a call's rows, all of one prompt: first .. first + count - 1.
struct DecodeBlock {
  int64_t first, count;
};

// Of decode_attend: queries, one arranged, scores, totals of one panel, results.
inline int64_t decode_attend_scratch(const DecodeModel& model) {
  const int64_t head = filled(model.dim_head, 16);
  const int64_t scores = filled(model.text_len, 16) + filled(model.n_image(), 16);
  return kAttendRows * (2 * head + scores + kPanel) + head;
}

}  // namespace dalle_fast

// x [C]: the token's embedding, with its place where there is no rotary.
DALLE_FAST_KERNEL(decode_embed, (const DecodeModel& model, const DecodeRows& rows, int64_t row, float* x), (model, rows, row, x))
// out = norm(x); divided: x is divided by its largest number first.
DALLE_FAST_KERNEL(decode_norm,
                  (const DecodeModel& model, const float* weight, const float* bias, bool divided, const float* x, float* out),
                  (model, weight, bias, divided, x, out))
// Remembers a normed row and gives it shifted; branch 0 attention, 1 feed-forward.
DALLE_FAST_KERNEL(decode_shift,
                  (const Decode& call, int64_t layer, int branch, int64_t row, const DecodeRowsOf& normed, float* out),
                  (call, layer, branch, row, normed, out))
// x += y * scale
DALLE_FAST_KERNEL(decode_add_scaled, (int64_t dim, const float* y, const float* scale, float* x), (dim, y, scale, x))
// out = (x1 + x2) / 2
DALLE_FAST_KERNEL(decode_mean, (int64_t dim, const float* x1, const float* x2, float* out), (dim, x1, x2, out))
// logits = null + (logits - null) * scale
DALLE_FAST_KERNEL(decode_guide, (int64_t count, const float* logits, const float* null, float scale, float* out),
                  (count, logits, null, scale, out))

// Turns a row's key and value of one head and remembers them.
DALLE_FAST_KERNEL(decode_remember, (const Decode& call, int64_t layer, int64_t row, int64_t head, const float* qkv),
                  (call, layer, row, head, qkv))
// One head's attention of a block of rows, whose keys and values are remembered.
DALLE_FAST_KERNEL(decode_attend,
                  (const Decode& call, int64_t layer, const DecodeBlock& block, int64_t head, const DecodeRowsOf& qkv,
                   const DecodeRowsOf& attended, float* scratch),
                  (call, layer, block, head, qkv, attended, scratch))
