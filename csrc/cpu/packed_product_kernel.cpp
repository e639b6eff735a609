// Products with packed matrices for one instruction set. Floor: a step with few rows reads every weight once (memory bounds it),
// one with many does 2 operations a weight and row.
#include "gelu.h"
#include "packed_int8.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {

namespace {

void add_bias(const PackedMatrix& matrix, int64_t panel, int64_t rows, float* totals) {
  if (matrix.bias == nullptr) return;
  const float* bias = matrix.bias + panel * kPanel;
  for (int64_t row = 0; row < rows; ++row) {
    for (int column = 0; column < kPanel; column += kWidth) {
      float* to = totals + row * kPanel + column;
      store(to, load(to) + load(bias + column));
    }
  }
}

// How many of `width` columns stand from `first` on in a panel of `most`.
int64_t columns_from(int64_t first, int64_t width, int64_t most) { return width - first < most ? width - first : most; }

void store_columns(const PackedProduct& op, int64_t panel, const float* totals) {
  const int64_t first = panel * kPanel, count = columns_from(first, op.matrix->width, kPanel);
  for (int64_t row = 0; row < op.rows; ++row) {
    memcpy(op.out + row * op.out_stride + first, totals + row * kPanel, sizeof(float) * count);
  }
}

void gate_columns(const PackedProduct& op, int64_t panel, const float* totals) {
  constexpr int kHalf = kPanel / 2;
  const int64_t first = panel * kHalf, count = columns_from(first, op.matrix->width / 2, kHalf);
  for (int64_t row = 0; row < op.rows; ++row) {
    float gated[kHalf];
    for (int column = 0; column < kHalf; column += kWidth) {
      const float* at = totals + row * kPanel + column;
      store(gated + column, load(at) * gelu(load(at + kHalf)));
    }
    memcpy(op.out + row * op.out_stride + first, gated, sizeof(float) * count);
  }
}

void add_columns(const PackedProduct& op, int64_t panel, const float* totals) {
  const int64_t first = panel * kPanel, count = columns_from(first, op.matrix->width, kPanel);
  for (int64_t row = 0; row < op.rows; ++row) {
    const float *from = totals + row * kPanel, *scale = op.scale + first;
    float* to = op.out + row * op.out_stride + first;
    int64_t i = 0;
    for (; i + kWidth <= count; i += kWidth) store(to + i, multiply_add(load(from + i), load(scale + i), load(to + i)));
    for (; i < count; ++i) to[i] += from[i] * scale[i];
  }
}

}  // namespace

void packed_product_begin(const PackedProduct& op, float* scratch) {
  if (op.element != PackedElement::int8) return;
  const RoundedRows rounded(op, scratch);
  for (int64_t row = 0; row < op.rows; ++row) {
    round_row(op.x + row * op.x_stride, op.matrix->depth, rounded.numbers + row * rounded.stride,
              rounded.factors + row * rounded.chunks);
  }
}

void packed_product_panel(const PackedProduct& op, int64_t panel, float* scratch) {
  const PackedMatrix& matrix = *op.matrix;
  float* const totals = scratch;
  const auto weights = [&](auto kind) {
    using Panel = decltype(kind);
    return static_cast<const char*>(matrix.panels) + panel * panel_rows<Panel>(matrix.depth) * kPanel * Panel::kBytes;
  };
  switch (op.element) {
    case PackedElement::float32:
      multiply_panel<Float32Panel>(op.x, op.x_stride, weights(Float32Panel{}), matrix.depth, kPanel, op.rows, totals);
      break;
    case PackedElement::bfloat16:
      multiply_panel<BFloat16Panel>(op.x, op.x_stride, weights(BFloat16Panel{}), matrix.depth, kPanel, op.rows, totals);
      break;
    case PackedElement::int8: {
      const int8_t* integers = static_cast<const int8_t*>(matrix.panels) + panel * ((matrix.depth + 1) / 2 * 2) * kPanel;
      const float* scales = matrix.scales + panel * chunks_of(matrix.depth) * kPanel;
      const RoundedRows rounded(op, scratch);
      if (fuses_pairs()) {
        multiply_int8_panel<true>(rounded, integers, scales, matrix.depth, op.rows, totals);
      } else {
        multiply_int8_panel<false>(rounded, integers, scales, matrix.depth, op.rows, totals);
      }
    }
  }
  add_bias(matrix, panel, op.rows, totals);
  switch (op.epilogue) {
    case Epilogue::store:
      return store_columns(op, panel, totals);
    case Epilogue::gate:
      return gate_columns(op, panel, totals);
    case Epilogue::residual:
      return add_columns(op, panel, totals);
  }
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
