// Vectors of 64-bit lanes, as wide as the instruction set in force: arithmetic is the compiler's vector extension, written
// once; only what it cannot say well is an intrinsic. Include from *_kernel.cpp alone (isa.h).
//
// No fused multiply-add here: a product and a sum round the same on every instruction set, so results are bit-equal.
#pragma once

#include "floats.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {

constexpr int kLanes = kWidth / 2;

typedef uint64_t U64 __attribute__((vector_size(8 * kLanes)));
typedef double F64 __attribute__((vector_size(8 * kLanes)));
typedef float F32 __attribute__((vector_size(4 * kLanes)));  // as many lanes, half as wide

static inline U64 splat(uint64_t value) { return U64{} + value; }
static inline F64 splat(double value) { return F64{} + value; }

static inline U64 lane_numbers() {
  U64 lanes;
  for (int i = 0; i < kLanes; ++i) lanes[i] = i;
  return lanes;
}

// The 64-bit product of the low halves of each lane; the high halves may hold anything.
static inline U64 multiply_low_words(U64 a, U64 b) {
#if defined(__AVX512F__)
  return reinterpret_cast<U64>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<U64>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#elif defined(__SSE2__)
  return reinterpret_cast<U64>(_mm_mul_epu32(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
#else
  return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu);
#endif
}

// The high half of each lane in its low half; the high halves may hold anything. A shuffle: shifts share a port with products.
static inline U64 high_words(U64 a) {
#if defined(__AVX512F__)
  return reinterpret_cast<U64>(_mm512_shuffle_epi32(reinterpret_cast<__m512i>(a), _MM_PERM_DDBB));
#elif defined(__AVX2__)
  return reinterpret_cast<U64>(_mm256_shuffle_epi32(reinterpret_cast<__m256i>(a), 0xF5));
#elif defined(__SSE2__)
  return reinterpret_cast<U64>(_mm_shuffle_epi32(reinterpret_cast<__m128i>(a), 0xF5));
#else
  return a >> 32;
#endif
}

// a ^ b ^ c
static inline U64 exclusive_or(U64 a, U64 b, U64 c) {
#if defined(__AVX512F__)
  return reinterpret_cast<U64>(_mm512_ternarylogic_epi64(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b),
                                                         reinterpret_cast<__m512i>(c), 0x96));
#else
  return a ^ b ^ c;
#endif
}

// Two tables of 16, looked up by one index in 0 .. 15; kept both apart and in pairs, the instruction sets differ in taste.
struct TwoTables16 {
  alignas(64) double first[16];
  alignas(64) double second[16];
  alignas(64) double pairs[16][2];
};

constexpr TwoTables16 two_tables(const double (&first)[16], const double (&second)[16]) {
  TwoTables16 tables{};
  for (int i = 0; i < 16; ++i) {
    tables.first[i] = tables.pairs[i][0] = first[i];
    tables.second[i] = tables.pairs[i][1] = second[i];
  }
  return tables;
}

static inline void lookup16(const TwoTables16& tables, U64 index, F64& first, F64& second) {
#if defined(__AVX512F__)
  const __m512i i = reinterpret_cast<__m512i>(index);
  first = reinterpret_cast<F64>(
      _mm512_permutex2var_pd(_mm512_load_pd(tables.first), i, _mm512_load_pd(tables.first + 8)));
  second = reinterpret_cast<F64>(
      _mm512_permutex2var_pd(_mm512_load_pd(tables.second), i, _mm512_load_pd(tables.second + 8)));
#elif defined(__AVX2__)
  // Not a gather: processors mended against data sampling take it one lane at a time, and slowly.
  const __m128d p0 = _mm_load_pd(tables.pairs[index[0]]), p1 = _mm_load_pd(tables.pairs[index[1]]);
  const __m128d p2 = _mm_load_pd(tables.pairs[index[2]]), p3 = _mm_load_pd(tables.pairs[index[3]]);
  const __m256d even = _mm256_insertf128_pd(_mm256_castpd128_pd256(p0), p2, 1);
  const __m256d odd = _mm256_insertf128_pd(_mm256_castpd128_pd256(p1), p3, 1);
  first = reinterpret_cast<F64>(_mm256_unpacklo_pd(even, odd));
  second = reinterpret_cast<F64>(_mm256_unpackhi_pd(even, odd));
#else
  for (int i = 0; i < kLanes; ++i) {
    first[i] = tables.pairs[index[i]][0];
    second[i] = tables.pairs[index[i]][1];
  }
#endif
}

// out[4 * lane + i] = v[i][lane]: 4 * kLanes floats, no alignment asked.
static inline void store_interleaved(float* out, const F32 v[4]) {
#if defined(__AVX512F__)
  const __m512i first = _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27);
  const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(4));
  const __m512 v01 =
      _mm512_insertf32x8(_mm512_castps256_ps512(reinterpret_cast<__m256>(v[0])), reinterpret_cast<__m256>(v[1]), 1);
  const __m512 v23 =
      _mm512_insertf32x8(_mm512_castps256_ps512(reinterpret_cast<__m256>(v[2])), reinterpret_cast<__m256>(v[3]), 1);
  _mm512_storeu_ps(out, _mm512_permutex2var_ps(v01, first, v23));
  _mm512_storeu_ps(out + 16, _mm512_permutex2var_ps(v01, second, v23));
#elif defined(__AVX2__)
  __m128 r0 = reinterpret_cast<__m128>(v[0]), r1 = reinterpret_cast<__m128>(v[1]);
  __m128 r2 = reinterpret_cast<__m128>(v[2]), r3 = reinterpret_cast<__m128>(v[3]);
  _MM_TRANSPOSE4_PS(r0, r1, r2, r3);
  _mm_storeu_ps(out, r0);
  _mm_storeu_ps(out + 4, r1);
  _mm_storeu_ps(out + 8, r2);
  _mm_storeu_ps(out + 12, r3);
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    for (int i = 0; i < 4; ++i) out[4 * lane + i] = v[i][lane];
  }
#endif
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
