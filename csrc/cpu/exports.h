// Everything Python may call: a plain C interface, so that the library depends on no version of torch or Python. The argument
// types are written once more in dalle_fast/_extension.py. Functions that can fail return 0 for success; arguments were
// checked by the op.
#pragma once

#include <cstdint>

#include "choose_token.h"
#include "decode.h"
#include "geglu.h"
#include "gumbel_codebook.h"
#include "parallel.h"
#include "sparse_attention.h"
#include "vocab_cross_entropy.h"

#define DALLE_FAST_EXPORT extern "C" __attribute__((visibility("default")))

DALLE_FAST_EXPORT const char* dalle_fast_source_digest();  // of the sources this library was built from
DALLE_FAST_EXPORT void dalle_fast_set_parallel_for(dalle_fast::ParallelFor parallel_for);
DALLE_FAST_EXPORT int32_t dalle_fast_isa();  // dalle_fast::Isa
DALLE_FAST_EXPORT int32_t dalle_fast_isa_supported(int32_t isa);
DALLE_FAST_EXPORT void dalle_fast_set_isa(int32_t isa);

// out [n, n_codes]; seeds [n_seeds] with n_seeds 1 or n. Definitions: gumbel_noise.h.
DALLE_FAST_EXPORT int32_t dalle_fast_gumbel_noise(const uint64_t* seeds, int64_t n_seeds, const int64_t* positions,
                                                  int64_t n, uint32_t stream, int64_t n_codes, float* out);
// Its two halves, for tests: the words, and the noise of given words; that also in float32 arithmetic (noise_rows.h).
DALLE_FAST_EXPORT int32_t dalle_fast_philox_words(const uint64_t* seeds, int64_t n_seeds, const int64_t* positions,
                                                  int64_t n, uint32_t stream, int64_t n_codes, uint32_t* out);
DALLE_FAST_EXPORT int32_t dalle_fast_gumbel_of_words(const uint32_t* words, int64_t count, float* out);
DALLE_FAST_EXPORT int32_t dalle_fast_gumbel_float_of_words(const uint32_t* words, int64_t count, float* out);

// tokens [n] of logits [n, n_codes], each by the noise of its seed and position. Definitions: choose_token.h.
DALLE_FAST_EXPORT int32_t dalle_fast_choose_tokens(const dalle_fast::TokenChoice* choice, const float* logits, int64_t n,
                                                   const uint64_t* seeds, const int64_t* positions, int64_t* tokens);

// All tensors of the call and its tile lists: sparse_attention.h.
DALLE_FAST_EXPORT int32_t dalle_fast_sparse_attention_forward(const dalle_fast::SparseAttention* op);
DALLE_FAST_EXPORT int32_t dalle_fast_sparse_attention_backward(const dalle_fast::SparseAttention* op);

// All tensors of the call: gumbel_codebook.h. The second writes `nearest` alone.
DALLE_FAST_EXPORT int32_t dalle_fast_gumbel_codebook_forward(const dalle_fast::GumbelCodebook* op);
DALLE_FAST_EXPORT int32_t dalle_fast_gumbel_codebook_nearest(const dalle_fast::GumbelCodebook* op);
DALLE_FAST_EXPORT int32_t dalle_fast_gumbel_codebook_backward(const dalle_fast::GumbelCodebook* op);

// All tensors of the call: vocab_cross_entropy.h.
DALLE_FAST_EXPORT int32_t dalle_fast_vocab_cross_entropy_forward(const dalle_fast::VocabCrossEntropy* op);
DALLE_FAST_EXPORT int32_t dalle_fast_vocab_cross_entropy_backward(const dalle_fast::VocabCrossEntropy* op);

// All tensors of the call: geglu.h.
DALLE_FAST_EXPORT int32_t dalle_fast_geglu_forward(const dalle_fast::Geglu* op);
DALLE_FAST_EXPORT int32_t dalle_fast_geglu_backward(const dalle_fast::Geglu* op);

// nearest [n]: for each row of x [n, width] the index of the nearest row of codebook [codes, width].
DALLE_FAST_EXPORT int32_t dalle_fast_nearest_code(const float* x, int64_t n, int64_t width, const float* codebook,
                                                  int64_t codes, int64_t* nearest);

// Reads rows and draws tokens: decode.h. Floats of workspace that calls of at most `rows` rows need.
DALLE_FAST_EXPORT int32_t dalle_fast_decode(const dalle_fast::Decode* call);
DALLE_FAST_EXPORT int64_t dalle_fast_decode_workspace(const dalle_fast::DecodeModel* model, int64_t rows);
// One product, for tests: packed_product.h.
DALLE_FAST_EXPORT int32_t dalle_fast_packed_product(const dalle_fast::PackedProduct* op);

// 64 bits that depend on every one of the bytes: digest.cpp.
DALLE_FAST_EXPORT int32_t dalle_fast_digest(const void* data, int64_t bytes, uint64_t* out);
