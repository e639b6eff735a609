// Products with packed matrices: the one micro-kernel of the decoding engine. dalle_fast/native/packing.py packs.
//
// Columns come in panels of 64. A result is the sum of chunks of 128 steps, each one chain of fused products in ascending order,
// whatever the number of rows, threads or panels: bits depend on the row and the matrix alone.
#pragma once

#include "isa.h"
#include "tile.h"

namespace dalle_fast {

constexpr int kPanel = 64;   // columns
constexpr int kChunk = 128;  // steps that are summed in one chain

enum class PackedElement : int32_t { float32 = 0, bfloat16 = 1, int8 = 2 };

// y = x W + bias, W [depth, width]; columns behind the last are zero.
struct PackedMatrix {
  const void* panels;   // float32: [panels][depth][64]; bfloat16, int8: [panels][ceil(depth / 2)][64][2], a zero behind an odd one
  const float* scales;  // int8: [panels][ceil(depth / kChunk)][64], what a chunk's sum of integers is multiplied by; else null
  const float* bias;    // [panels * 64], in the order of the columns; null: none
  int64_t depth, width;
};

constexpr int64_t panels_of(int64_t width) { return (width + kPanel - 1) / kPanel; }

// What becomes of the product y [rows, width].
enum class Epilogue : int32_t {
  store,     // out = y
  gate,      // out[j] = value_j * gelu(gate_j): a panel holds 32 values, then their 32 gates; out is half as wide
  residual,  // out += y * scale
};

struct PackedProduct {
  const PackedMatrix* matrix;
  PackedElement element;
  Epilogue epilogue;
  int64_t rows;
  const float* x;  // [rows, x_stride]; x_stride at least depth rounded up to 16, zeros behind depth
  int64_t x_stride;
  float* out;  // [rows, out_stride]
  int64_t out_stride;
  const float* scale;  // [width], of `residual`
};

constexpr int64_t chunks_of(int64_t depth) { return (depth + kChunk - 1) / kChunk; }

// Of a row of int16; a line more, so that rows do not lie a power of two apart.
constexpr int64_t rounded_stride(int64_t depth) { return filled(depth, 32) + 32; }

// Floats for totals, and for the rows as integers.
constexpr int64_t packed_product_scratch(PackedElement element, int64_t rows, int64_t depth) {
  if (element != PackedElement::int8) return rows * kPanel;
  return rows * (kPanel + chunks_of(depth) + rounded_stride(depth) / 2) + 16;
}

}  // namespace dalle_fast

// What a thread does once before its panels, and the columns of one panel, all rows; scratch on the bounds of a cache line.
DALLE_FAST_KERNEL(packed_product_begin, (const PackedProduct& op, float* scratch), (op, scratch))
DALLE_FAST_KERNEL(packed_product_panel, (const PackedProduct& op, int64_t panel, float* scratch), (op, panel, scratch))
