// A panel of a packed matrix times rows: the micro-kernel. Include from *_kernel.cpp alone (isa.h).
#pragma once

#include "packed_product.h"
#include "rows.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {

// How weights of a panel become vectors: kSteps rows of the panel lie together; load(panel, k, step, column) gives the weights of
// row k + step (k a multiple of kSteps).
struct Float32Panel {
  static constexpr int kSteps = 1;
  static constexpr bool kWidens = false;
  static constexpr int kBytes = 4;
  static Vec load(const void* panel, int64_t k, int, int column) {
    return dalle_fast::DALLE_FAST_ISA::load(static_cast<const float*>(panel) + k * kPanel + column);
  }
};

struct BFloat16Panel {
  static constexpr int kSteps = 2;
  static constexpr bool kWidens = true;
  static constexpr int kBytes = 2;
  // A lane holds the numbers of rows k and k + 1.
  static Vec load(const void* panel, int64_t k, int step, int column) {
    VecU pair;
    memcpy(&pair, static_cast<const uint32_t*>(panel) + k / 2 * kPanel + column, sizeof(pair));
    return reinterpret_cast<Vec>(step == 0 ? pair << 16 : pair & 0xFFFF0000u);
  }
};

struct Int8Panel {
  static constexpr int kSteps = 1;
  static constexpr bool kWidens = true;
  static constexpr int kBytes = 1;
  static Vec load(const void* panel, int64_t k, int, int column) {
    const int8_t* from = static_cast<const int8_t*>(panel) + k * kPanel + column;
#if defined(__AVX512F__)
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return reinterpret_cast<Vec>(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes)));
#elif defined(__AVX2__)
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
    return reinterpret_cast<Vec>(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes)));
#else
    Vec x;
    for (int i = 0; i < kWidth; ++i) x[i] = from[i];
    return x;
#endif
  }
};

// Rows that a panel of this depth takes in memory.
template <class Panel>
constexpr int64_t panel_rows(int64_t depth) {
  return (depth + Panel::kSteps - 1) / Panel::kSteps * Panel::kSteps;
}

constexpr int kLeastColumns = 16;
// As many rows and vectors of columns at a time as the registers hold; a row alone takes more columns, to hide the latency of sums.
constexpr int kMostRows = kWidth >= 8 ? 6 : 2;
constexpr int kPassVectors = kWidth == 8 ? 2 : 4;
constexpr int kRowVectors = kWidth == 8 ? 8 : 4;

// totals [kRows, kPanel] += (the chain of `steps` terms) * scales, for kVectors vectors of columns from `column` on.
template <class Panel, int kRows, int kVectors>
static inline void add_chain(const float* x, int64_t stride, const void* panel, const float* scales, int64_t first, int64_t steps,
                             int column, float* totals) {
  Vec sum[kRows][kVectors] = {};
  for (int64_t k = 0; k < steps; k += Panel::kSteps) {
#pragma GCC unroll 2
    for (int step = 0; step < Panel::kSteps; ++step) {
      Vec right[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) right[v] = Panel::load(panel, first + k, step, column + v * kWidth);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const Vec left = broadcast(x[i * stride + k + step]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[i][v] = multiply_add(left, right[v], sum[i][v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* to = totals + i * kPanel + column + v * kWidth;
      const Vec factor = scales == nullptr ? broadcast(1.0f) : load(scales + column + v * kWidth);
      store(to, multiply_add(sum[i][v], factor, load(to)));
    }
  }
}

template <class Panel, int kRows>
static inline void add_chains_of_rows(const float* x, int64_t stride, const void* panel, const float* scales, int64_t first,
                                      int64_t steps, int columns, float* totals) {
  constexpr int kVectors = kRows == 1 ? kRowVectors : kPassVectors;
  int column = 0;
  for (; column + kVectors * kWidth <= columns; column += kVectors * kWidth) {
    add_chain<Panel, kRows, kVectors>(x, stride, panel, scales, first, steps, column, totals);
  }
  for (; column < columns; column += kLeastColumns) {
    add_chain<Panel, kRows, kLeastColumns / kWidth>(x, stride, panel, scales, first, steps, column, totals);
  }
}

template <class Panel>
static inline void add_chains(const float* x, int64_t stride, const void* panel, const float* scales, int64_t first, int64_t steps,
                              int columns, int64_t rows, float* totals) {
  int64_t row = 0;
  for (; row + kMostRows <= rows; row += kMostRows) {
    add_chains_of_rows<Panel, kMostRows>(x + row * stride, stride, panel, scales, first, steps, columns, totals + row * kPanel);
  }
  x += row * stride, totals += row * kPanel;
  switch (rows - row) {
    case 5:
      return add_chains_of_rows<Panel, 5>(x, stride, panel, scales, first, steps, columns, totals);
    case 4:
      return add_chains_of_rows<Panel, 4>(x, stride, panel, scales, first, steps, columns, totals);
    case 3:
      return add_chains_of_rows<Panel, 3>(x, stride, panel, scales, first, steps, columns, totals);
    case 2:
      return add_chains_of_rows<Panel, 2>(x, stride, panel, scales, first, steps, columns, totals);
    case 1:
      return add_chains_of_rows<Panel, 1>(x, stride, panel, scales, first, steps, columns, totals);
  }
}

// widened [steps, kPanel]: rows first .. first + steps - 1 of the panel as float32.
template <class Panel>
static inline void widen_panel(const void* panel, int64_t first, int64_t steps, float* widened) {
  for (int64_t k = 0; k < steps; k += Panel::kSteps) {
    for (int step = 0; step < Panel::kSteps; ++step) {
      for (int column = 0; column < kPanel; column += kWidth) {
        store(widened + (k + step) * kPanel + column, Panel::load(panel, first + k, step, column));
      }
    }
  }
}

// totals [rows, kPanel] = x [rows, depth] times the first `columns` (a multiple of 16) of a panel. widened [kChunk, kPanel] is
// scratch: beyond two passes of rows weights are widened once. x holds a zero behind an odd depth.
template <class Panel>
static inline void multiply_panel(const float* x, int64_t stride, const void* panel, const float* scales, int64_t depth, int columns,
                                  int64_t rows, float* widened, float* totals) {
  clear(totals, rows * kPanel);
  for (int64_t first = 0; first < depth; first += kChunk) {
    const int64_t steps = depth - first < kChunk ? depth - first : kChunk;
    const float* chunk_scales = scales == nullptr ? nullptr : scales + first / kChunk * kPanel;
    if (Panel::kWidens && rows > 2 * kMostRows) {
      widen_panel<Panel>(panel, first, steps, widened);
      add_chains<Float32Panel>(x + first, stride, widened, chunk_scales, 0, steps, columns, rows, totals);
    } else {
      add_chains<Panel>(x + first, stride, panel, chunk_scales, first, steps, columns, rows, totals);
    }
  }
}

template <class Function>
static inline void with_panel(PackedElement element, const Function& function) {
  switch (element) {
    case PackedElement::float32:
      return function(Float32Panel{});
    case PackedElement::bfloat16:
      return function(BFloat16Panel{});
    case PackedElement::int8:
      return function(Int8Panel{});
  }
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
