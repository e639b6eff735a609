// geglu for one instruction set, in float32 whatever the elements:
//
//     out = v gelu(g)    dv = do gelu(g)    dg = do v (Phi(g) + g phi(g))    gelu(g) = g Phi(g)
//
// Phi and phi are the normal distribution and its density. Nothing but x is saved; forward reads it once and writes half as much,
// backward reads x and do and writes dx once: 3 and 5 numbers an output.
#include "geglu.h"
#include "gelu.h"
#include "rows.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {

namespace {

template <class T>
struct Row {
  const T *value, *gate;
};

template <class T>
Row<T> row_of(const Geglu& op, const T* x, int64_t row) {
  const T* const value = x + row * 2 * op.width;
  return {value, value + op.width};
}

// Calls step(i, count) for whole vectors, then for what is left.
template <class Step>
void for_vectors(int64_t width, const Step& step) {
  int64_t i = 0;
  for (; i + kWidth <= width; i += kWidth) step(i, kWidth);
  if (i < width) step(i, width - i);
}

template <class T>
Vec read(const T* from, int64_t count) {
  if (count == kWidth) return load_row_vector(from);
  float some[kWidth];
  load_row(from, count, kWidth, some);
  return load(some);
}

template <class T>
void write(T* to, int64_t count, Vec x) {
  if (count == kWidth) return store_row_vector(to, x);
  float some[kWidth];
  store(some, x);
  for (int64_t i = 0; i < count; ++i) narrow(some[i], to[i]);
}

}  // namespace

void geglu_forward(const Geglu& op, int64_t first, int64_t last) {
  with_elements(op.element, op.out, [&](auto* out) {
    const auto* const x = static_cast<decltype(out)>(const_cast<void*>(op.x));
    for (int64_t row = first; row < last; ++row) {
      const auto from = row_of(op, x, row);
      for_vectors(op.width, [&](int64_t i, int64_t count) {
        write(out + row * op.width + i, count, read(from.value + i, count) * gelu(read(from.gate + i, count)));
      });
    }
  });
}

void geglu_backward(const Geglu& op, int64_t first, int64_t last) {
  with_elements(op.element, op.dx, [&](auto* dx) {
    const auto* const x = static_cast<decltype(dx)>(const_cast<void*>(op.x));
    const auto* const dout = static_cast<decltype(dx)>(const_cast<void*>(op.dout));
    for (int64_t row = first; row < last; ++row) {
      const auto from = row_of(op, x, row);
      auto* const dvalue = dx + row * 2 * op.width;
      for_vectors(op.width, [&](int64_t i, int64_t count) {
        const Vec gate = read(from.gate + i, count), gradient = read(dout + row * op.width + i, count);
        const Normal normal(gate);
        write(dvalue + i, count, gradient * (gate * normal.distribution));
        const Vec slope = multiply_add(gate, normal.density, normal.distribution);
        write(dvalue + op.width + i, count, gradient * read(from.value + i, count) * slope);
      });
    }
  });
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
