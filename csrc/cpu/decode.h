// The decoding engine: what Python hands over. dalle_fast/native/decode.py repeats these structures.
//
// A call reads rows, tokens at positions behind what their sequences' caches hold; or it draws tokens, one a sample and step,
// and reads them as its rows. Text rows belong to prompts, image rows to samples; many samples share one prompt's text. Whatever
// a row is computed beside, its bits are the same: every sum has one order, given by the layer's sizes and the row's own window.
#pragma once

#include "choose_token.h"
#include "packed_product.h"
#include "tile.h"

namespace dalle_fast {

struct DecodeBranch {
  const float *norm_weight, *norm_bias;          // [C]
  const float *norm_out_weight, *norm_out_bias;  // [C], or null without sandwich norm
  const float* scale;                            // [C]
};

// The image keys each position sees, as runs of cache slots, ascending in position.
struct DecodeWindows {
  int64_t slots;             // of a sample's ring
  const int64_t* slot_of;    // [n_image]
  const int64_t* run_start;  // [n_image + 1]: position p has the runs run_start[p] .. run_start[p + 1] - 1
  const int64_t* runs;       // [...][2]: first slot, count
};

struct DecodeLayer {
  DecodeBranch attention, feed_forward;
  PackedMatrix qkv;      // [C -> 3 H D], no bias
  PackedMatrix out;      // [H D -> C]
  PackedMatrix widen;    // [C -> 2 F], panels of 32 values and their 32 gates (packed_product.h)
  PackedMatrix narrow;   // [F -> C]
  DecodeWindows windows;
};

// Rows of a table of tokens, of the model's own element type.
struct DecodeTable {
  const void* data;  // [tokens, C]
  Element element;
};

struct DecodeModel {
  int64_t dim, heads, dim_head, inner_ff, depth;  // C, H, D, F
  int64_t text_len, grid_rows, grid_cols;
  PackedElement weights;
  Element cache;         // of keys and values: float32 or bfloat16
  int32_t shift, reversible, stable;
  float epsilon;         // of every norm
  const DecodeLayer* layers;
  const float *cosines, *sines;  // [T + R C, D padded to 16] as native/sparse_attention.py makes them; null: no rotary
  DecodeTable text_table, image_table;
  const float *text_places, *row_places, *col_places;  // [T, C], [R, C], [C_grid, C]; null with rotary
  const float *head_norm_weight, *head_norm_bias;
  PackedMatrix text_head, image_head;  // panels null where nobody asked for one

  int64_t n_image() const { return grid_rows * grid_cols; }
  int64_t inner() const { return heads * dim_head; }
};

// What a layer remembers; zeroed once, before the first call. P prompts, S samples. Keys and values are rotated.
struct DecodeLayerCache {
  void* text_keys;     // [P, H, panels of T][D][64], packed as a PackedMatrix of depth D and width T (never int8)
  void* text_values;   // [P, H, panels of D][T][64], packed as a PackedMatrix of depth T and width D
  void* image_keys;    // [S, H, slots, D padded to 16]
  void* image_values;  // the same
  float* text_shift[2];   // attention, feed-forward: [P, shift_text_slots, ceil(C / 2)]; null without shift
  float* image_shift[2];  // [S, shift_image_slots, min(2 ceil(C / 4), C)]
};

struct DecodeCaches {
  const DecodeLayerCache* layers;
  const int64_t* prompt_of;  // [S]
  int64_t shift_text_slots, shift_image_slots;  // at least 2 + slack, C_grid + 1 + slack; slack = longest call - 1 + rollback
};

// Rows to read: those of one sequence lie together, ascending, one position after the other. Either all text or all image.
struct DecodeRows {
  int64_t count;
  int64_t* sequence;  // [count]: prompt of a text row, sample of an image row
  int64_t* position;  // [count]: 0 .. T - 1 for text rows, T .. for image rows
  int64_t* token;     // [count]: text id or image code
  int64_t* back;      // [count]: how many rows before it are of the same sequence
  int64_t wanted;     // rows whose logits are wanted
  int64_t* wanted_rows;  // [wanted], ascending
  int32_t text_logits;   // 1: of the text head, 0: of the image head
};

// `steps` times: choose a token for each of `samples` from the logits and, but for the last image token, read it. The call's rows
// are then one for each sequence, all of them wanted; their tokens and positions are written here.
struct DecodeDraw {
  int64_t samples;        // with guidance, sequences samples .. 2 samples - 1 are the same without their text
  int64_t steps;
  int64_t first;          // image token that is chosen first
  int32_t guided;
  float cond_scale;
  TokenChoice choice;
  const uint64_t* seeds;  // [samples]
  int64_t* codes;         // [samples, n_image]; a code that is not -1 is known and kept
};

struct Decode {
  const DecodeModel* model;
  const DecodeCaches* caches;
  DecodeRows rows;
  DecodeDraw draw;   // steps 0: nothing is drawn
  float* logits;     // [wanted, K] of the rows read; a draw begins with those of its first token
  float* workspace;  // `decode_workspace(model, rows.count)` floats; zero, but for what calls with as many rows left in it
  int64_t threads;
};

int64_t decode_workspace(const DecodeModel& model, int64_t rows);

}  // namespace dalle_fast
