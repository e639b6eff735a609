// geglu: what the op hands to its kernels. dalle_fast/native/geglu.py repeats Geglu.
#pragma once

#include "isa.h"
#include "tile.h"

namespace dalle_fast {

struct Geglu {
  int64_t rows, width;
  Element element;
  const void* x;     // [rows, 2 width]: values, then their gates
  void* out;         // [rows, width]
  const void* dout;  // [rows, width]
  void* dx;          // [rows, 2 width]
};

}  // namespace dalle_fast

// Rows first .. last - 1.
DALLE_FAST_KERNEL(geglu_forward, (const Geglu& op, int64_t first, int64_t last), (op, first, last))
DALLE_FAST_KERNEL(geglu_backward, (const Geglu& op, int64_t first, int64_t last), (op, first, last))
