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
  static constexpr int kBytes = 4;
  static Vec load(const void* panel, int64_t k, int, int column) {
    return dalle_fast::DALLE_FAST_ISA::load(static_cast<const float*>(panel) + k * kPanel + column);
  }
};

struct BFloat16Panel {
  static constexpr int kSteps = 2;
  static constexpr int kBytes = 2;
  // A lane holds the numbers of rows k and k + 1.
  static Vec load(const void* panel, int64_t k, int step, int column) {
    VecU pair;
    memcpy(&pair, static_cast<const uint32_t*>(panel) + k / 2 * kPanel + column, sizeof(pair));
    return reinterpret_cast<Vec>(step == 0 ? pair << 16 : pair & 0xFFFF0000u);
  }
};

// Rows that a panel of this depth takes in memory.
template <class Panel>
constexpr int64_t panel_rows(int64_t depth) {
  return (depth + Panel::kSteps - 1) / Panel::kSteps * Panel::kSteps;
}

constexpr int kLeastColumns = 16;
constexpr int kLine = 64;  // bytes of a cache line

// As many rows at a time as the registers hold, and vectors of columns beside so many rows; one row takes more columns, whose
// chains hide the latency of sums.
constexpr int kMostRows = kWidth >= 8 ? 6 : 2;
constexpr int vectors_beside(int rows) { return kWidth == 8 ? (rows == 1 ? 8 : 2) : 4; }

// What a product is made of: chains of a chunk of a panel, for some rows and columns.
struct PanelChunk {
  const float* x;  // of the first row, at the chunk's first step
  int64_t stride;
  const void* panel;
  int64_t first, steps;
  const char* ahead;  // memory that is wanted next
};

// Few rows are bound by memory: weights are fetched that many bytes before they are needed, further than the processor does.
constexpr int kAhead = 2048;

static inline void fetch_bytes(const void* from, int count) {
  for (int i = 0; i < count; i += kLine) __builtin_prefetch(static_cast<const char*>(from) + i, 0, 3);
}

// totals [kRows, kPanel] += the chain of a chunk's terms, for kVectors vectors of columns from `column` on.
template <class Panel, int kRows, int kVectors>
static inline void add_chain(const PanelChunk& chunk, int column, float* totals) {
  Vec sum[kRows][kVectors] = {};
  const char* ahead = chunk.ahead;
  for (int64_t k = 0; k < chunk.steps; k += Panel::kSteps) {
    if (kRows == kMostRows) {
      __builtin_prefetch(ahead += kLine, 0, 2);  // into the second-level cache
    } else {
      constexpr int kStep = Panel::kSteps * kVectors * kWidth * Panel::kBytes;
      fetch_bytes(static_cast<const char*>(chunk.panel) + ((chunk.first + k) * kPanel + column) * Panel::kBytes + kAhead, kStep);
    }
#pragma GCC unroll 2
    for (int step = 0; step < Panel::kSteps; ++step) {
      Vec right[kVectors];
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) right[v] = Panel::load(chunk.panel, chunk.first + k, step, column + v * kWidth);
#pragma GCC unroll 16
      for (int i = 0; i < kRows; ++i) {
        const Vec left = broadcast(chunk.x[i * chunk.stride + k + step]);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) sum[i][v] = multiply_add(left, right[v], sum[i][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      float* to = totals + i * kPanel + column + v * kWidth;
      store(to, load(to) + sum[i][v]);
    }
  }
}

// The same for `columns` columns, a multiple of 16.
template <class Panel, int kRows>
static inline void add_chains(PanelChunk& chunk, int columns, float* totals) {
  constexpr int kVectors = vectors_beside(kRows);
  int column = 0;
  for (; column + kVectors * kWidth <= columns; column += kVectors * kWidth) {
    add_chain<Panel, kRows, kVectors>(chunk, column, totals);
    chunk.ahead += chunk.steps / Panel::kSteps * kLine;
  }
  for (; column < columns; column += kLeastColumns) add_chain<Panel, kRows, kLeastColumns / kWidth>(chunk, column, totals);
}

template <class Panel, int kRows = kMostRows>
static inline void add_chains_of_rows(int64_t rows, PanelChunk& chunk, int columns, float* totals) {
  if (rows == kRows) return add_chains<Panel, kRows>(chunk, columns, totals);
  if constexpr (kRows > 1) add_chains_of_rows<Panel, kRows - 1>(rows, chunk, columns, totals);
}

// totals [rows, kPanel] += a chunk's chains, of any number of rows.
template <class Panel>
static inline void add_chunk(PanelChunk chunk, int columns, int64_t rows, float* totals) {
  for (int64_t row = 0; row < rows; row += kMostRows) {
    add_chains_of_rows<Panel>(rows - row < kMostRows ? rows - row : kMostRows, chunk, columns, totals + row * kPanel);
    chunk.x += kMostRows * chunk.stride;
  }
}

// totals [rows, kPanel] = x [rows, depth] times the first `columns` (a multiple of 16) of a panel. x holds a zero behind an odd
// depth. Rows pass over a chunk while it lies in the nearest caches, and fetch the next one; many rows over its float32 copy.
template <class Panel>
static inline void multiply_panel(const float* x, int64_t stride, const void* panel, int64_t depth, int columns, int64_t rows,
                                  float* totals) {
  constexpr int64_t kManyRows = 48;  // with 32 the copy costs what it saves
  const bool copies = Panel::kSteps > 1 && rows >= kManyRows;
  alignas(64) float copy[Panel::kSteps > 1 ? kChunk * kPanel : kPanel];
  clear(totals, rows * kPanel);
  for (int64_t first = 0; first < depth; first += kChunk) {
    PanelChunk chunk{x + first, stride, panel, first, depth - first < kChunk ? depth - first : kChunk,
                     static_cast<const char*>(panel) + (first + kChunk) * kPanel * Panel::kBytes};
    if (!copies) {
      add_chunk<Panel>(chunk, columns, rows, totals);
      continue;
    }
    for (int64_t k = 0; k < chunk.steps; k += Panel::kSteps) {
      for (int step = 0; step < Panel::kSteps; ++step) {
        for (int column = 0; column < kPanel; column += kWidth) {
          store(copy + (k + step) * kPanel + column, Panel::load(panel, first + k, step, column));
        }
      }
    }
    chunk.panel = copy, chunk.first = 0;
    add_chunk<Float32Panel>(chunk, columns, rows, totals);
  }
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
