// Vectors of float32, as wide as the instruction set in force. Arithmetic is the compiler's vector extension, written once;
// only what it cannot say well is an intrinsic. Include from *_kernel.cpp alone (isa.h).
//
// Here products are fused with sums where the processor can: the sums of attention are bit-equal for any thread count, not
// across instruction sets.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace dalle_fast {
namespace DALLE_FAST_ISA {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

constexpr float kLog2E = 0x1.715476p0f;
constexpr float kInfinity = __builtin_inff();

typedef float Vec __attribute__((vector_size(4 * kWidth)));
typedef int32_t VecI __attribute__((vector_size(4 * kWidth)));
typedef uint32_t VecU __attribute__((vector_size(4 * kWidth)));

// Minus zero, not plus: the compiler may leave it out, -0 included.
static inline Vec broadcast(float value) { return value - Vec{}; }

static inline Vec load(const float* from) {
  Vec value;
  memcpy(&value, from, sizeof(Vec));
  return value;
}

static inline VecI load(const int32_t* from) {
  VecI value;
  memcpy(&value, from, sizeof(VecI));
  return value;
}

static inline void store(float* to, Vec value) { memcpy(to, &value, sizeof(Vec)); }
static inline void store(int32_t* to, VecI value) { memcpy(to, &value, sizeof(VecI)); }

static inline void clear(float* values, int64_t count) { memset(values, 0, sizeof(float) * count); }

// Hands out pieces of the scratch memory.
struct Arena {
  float* next;
  float* take(int64_t floats) {
    float* piece = next;
    next += floats;
    return piece;
  }
};

// a * b + c
static inline Vec multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
  return reinterpret_cast<Vec>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}

// The larger; b where either is not a number.
static inline Vec larger(Vec a, Vec b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}

// Lanes of `value` whose bit is set, `otherwise` in the rest. Bits above kWidth are ignored.
static inline Vec where_bits(uint64_t bits, Vec value, Vec otherwise) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_mask_blend_ps(static_cast<__mmask16>(bits), reinterpret_cast<__m512>(otherwise),
                                                    reinterpret_cast<__m512>(value)));
#else
  VecI lane_bit;
  for (int i = 0; i < kWidth; ++i) lane_bit[i] = 1 << i;
  return ((VecI{} + static_cast<int32_t>(bits & 0xFFFF)) & lane_bit) != 0 ? value : otherwise;
#endif
}

// The sums of lanes i, i + 4, i + 8, ..., by halves.
typedef float Vec4 __attribute__((vector_size(16)));
static inline Vec4 sums_of_fours(Vec x) {
#if defined(__AVX512F__)
  const __m512 whole = reinterpret_cast<__m512>(x);
  const __m256 half = _mm512_castps512_ps256(whole) + _mm512_extractf32x8_ps(whole, 1);
  return reinterpret_cast<Vec4>(_mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
#elif defined(__AVX2__)
  const __m256 half = reinterpret_cast<__m256>(x);
  return reinterpret_cast<Vec4>(_mm256_castps256_ps128(half) + _mm256_extractf128_ps(half, 1));
#else
  return x;
#endif
}

static inline float sum_of_lanes(Vec x) {
  const Vec4 sums = sums_of_fours(x);
  return (sums[0] + sums[2]) + (sums[1] + sums[3]);
}

// Of every four lanes a0 a1 a2 a3 and b0 b1 b2 b3: a[first] b[first] a[first + 1] b[first + 1], for first 0 or 2.
template <int kFirst>
static inline Vec interleave(Vec a, Vec b) {
  VecI from;
  for (int i = 0; i < kWidth; ++i) from[i] = i / 4 * 4 + kFirst + i % 4 / 2 + i % 2 * kWidth;
  return __builtin_shuffle(a, b, from);
}

// a[first] a[first + 1] b[first] b[first + 1], likewise.
template <int kFirst>
static inline Vec join_pairs(Vec a, Vec b) {
  VecI from;
  for (int i = 0; i < kWidth; ++i) from[i] = i / 4 * 4 + kFirst + i % 2 + i % 4 / 2 * kWidth;
  return __builtin_shuffle(a, b, from);
}

// to[i] = the sum of all lanes of x[i], in one order for every i; a third of the instructions of four sums apart.
static inline void sums_of_lanes(const Vec x[4], float* to) {
  const Vec first = interleave<0>(x[0], x[1]) + interleave<2>(x[0], x[1]);
  const Vec second = interleave<0>(x[2], x[3]) + interleave<2>(x[2], x[3]);
  const Vec4 sums = sums_of_fours(join_pairs<0>(first, second) + join_pairs<2>(first, second));
  memcpy(to, &sums, sizeof(sums));
}

static inline float max_of_lanes(Vec x) {
  float lane[kWidth];
  store(lane, x);
  for (int i = 1; i < kWidth; ++i) lane[0] = lane[i] > lane[0] ? lane[i] : lane[0];
  return lane[0];
}

// Neighbours exchanged: (x1, x0, x3, x2, ...).
static inline Vec swap_pairs(Vec x) {
#if defined(__AVX512F__)
  return reinterpret_cast<Vec>(_mm512_permute_ps(reinterpret_cast<__m512>(x), 0xB1));
#elif defined(__AVX2__)
  return reinterpret_cast<Vec>(_mm256_permute_ps(reinterpret_cast<__m256>(x), 0xB1));
#else
  return __builtin_shuffle(x, VecI{1, 0, 3, 2});
#endif
}

// 2^(k + f) for an integer k and f in [-0.5, 0.5], where shifted = k + kRound. Error below 1 ulp.
constexpr float kRound = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
static inline Vec exp2_of_parts(Vec shifted, Vec f) {
  // 2^f, interpolated at Chebyshev nodes of the interval: error below 2^-26.7.
  Vec p = broadcast(0x1.44138ap-13f);
  p = multiply_add(p, f, broadcast(0x1.5f0890p-10f));
  p = multiply_add(p, f, broadcast(0x1.3b2a54p-7f));
  p = multiply_add(p, f, broadcast(0x1.c6af6cp-5f));
  p = multiply_add(p, f, broadcast(0x1.ebfbe0p-3f));
  p = multiply_add(p, f, broadcast(0x1.62e430p-1f));
  p = multiply_add(p, f, broadcast(1.0f));
  return reinterpret_cast<Vec>(reinterpret_cast<VecI>(p) + (reinterpret_cast<VecI>(shifted) << 23));
}

// 0 where x is below -126, `power` elsewhere and where x is not a number.
static inline Vec zero_below_normal(Vec x, Vec power) {
#if defined(__AVX512F__)
  const __m512 lowest = _mm512_set1_ps(-126.0f);
  const __mmask16 below = _mm512_cmp_ps_mask(reinterpret_cast<__m512>(x), lowest, _CMP_LT_OQ);
  return reinterpret_cast<Vec>(_mm512_mask_mov_ps(reinterpret_cast<__m512>(power), below, _mm512_setzero_ps()));
#else
  return x < -126.0f ? Vec{} : power;
#endif
}

// 2^x for x <= 127, and 2^-126 for all x below -126; not a number stays so.
static inline Vec exp2_normal(Vec x) {
  const Vec clamped = larger(broadcast(-126.0f), x);
  const Vec shifted = clamped + kRound;
  return exp2_of_parts(shifted, clamped - (shifted - kRound));  // exact
}

// The same, but 0 below -126.
static inline Vec exp2(Vec x) { return zero_below_normal(x, exp2_normal(x)); }

// e^(rate * x) for what does not overflow, 0 below 2^-126. Where products are fused its error does not grow with x, as that of
// exp2(x * rounded) does.
struct Exponential {
  float high, low;  // of rate * log2(e)
  explicit Exponential(double rate)
      : high(static_cast<float>(rate * 0x1.71547652b82fep0)), low(static_cast<float>(rate * 0x1.71547652b82fep0 - high)) {}
  Vec operator()(Vec x) const {
    const Vec power = x * high, shifted = larger(broadcast(-126.0f), power) + kRound;
    const Vec f = multiply_add(x, broadcast(high), kRound - shifted);
    return zero_below_normal(power, exp2_of_parts(shifted, multiply_add(x, broadcast(low), f)));
  }
};

// Of positive, normal, finite x; relative error below 2^-23 near 1 too.
static inline Vec log_float(Vec x) {
  constexpr int32_t kTwoThirds = 0x3F2AAAAB;
  const VecI from = reinterpret_cast<VecI>(x) - kTwoThirds;
  // x = 2^k (1 + r) with r in [-1/3, 1/3)
  const Vec k = __builtin_convertvector(from >> 23, Vec);
  const Vec r = reinterpret_cast<Vec>(reinterpret_cast<VecI>(x) - (from & ~0x7FFFFF)) - 1.0f;
  // (log1p(r) - r) / r^2, fitted to the least largest error times |r|: 2^-25.
  Vec p = broadcast(0x1.26535ep-3f);
  p = multiply_add(p, r, broadcast(-0x1.3aca84p-3f));
  p = multiply_add(p, r, broadcast(0x1.1d1d32p-3f));
  p = multiply_add(p, r, broadcast(-0x1.5046f4p-3f));
  p = multiply_add(p, r, broadcast(0x1.99ed88p-3f));
  p = multiply_add(p, r, broadcast(-0x1.0013dap-2f));
  p = multiply_add(p, r, broadcast(0x1.5554bep-2f));
  p = multiply_add(p, r, broadcast(-0x1.ffffd8p-2f));
  return multiply_add(k, broadcast(0x1.62e43p-1f), multiply_add(r * r, p, r));
}

// to[j][i] = from[i][j] for a square of 4; strides in floats.
static inline void transpose4(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
  typedef float V4 __attribute__((vector_size(16)));
  typedef int32_t I4 __attribute__((vector_size(16)));
  V4 row[4];
  for (int i = 0; i < 4; ++i) memcpy(&row[i], from + i * from_stride, 16);
  const V4 a = __builtin_shuffle(row[0], row[1], I4{0, 4, 1, 5}), b = __builtin_shuffle(row[2], row[3], I4{0, 4, 1, 5});
  const V4 c = __builtin_shuffle(row[0], row[1], I4{2, 6, 3, 7}), d = __builtin_shuffle(row[2], row[3], I4{2, 6, 3, 7});
  const V4 col[4] = {__builtin_shuffle(a, b, I4{0, 1, 4, 5}), __builtin_shuffle(a, b, I4{2, 3, 6, 7}),
                     __builtin_shuffle(c, d, I4{0, 1, 4, 5}), __builtin_shuffle(c, d, I4{2, 3, 6, 7})};
  for (int i = 0; i < 4; ++i) memcpy(to + i * to_stride, &col[i], 16);
}

// to[j][i] = from[i][j] for i < rows, j < cols, both multiples of 4.
static inline void transpose(const float* from, int64_t from_stride, int64_t rows, int64_t cols, float* to,
                             int64_t to_stride) {
  for (int64_t j = 0; j < cols; j += 4) {
    for (int64_t i = 0; i < rows; i += 4) transpose4(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
  }
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
