// The decoding engine: the phases of reading rows and of drawing tokens, all in one parallel region.
#include "decode.h"

#include <algorithm>
#include <vector>

#include "decode_kernels.h"
#include "exports.h"
#include "parallel.h"
#include "scratch.h"
#include "tickets.h"

namespace dalle_fast {

namespace {

enum Branch { kAttention, kFeedForward };

// Hands out rows of the workspace; the columns behind a row's numbers stay zero. One line more a row: rows a power of two apart
// would share the few places of a cache that are theirs.
struct Workspace {
  float* next;
  DecodeRowsOf rows(int64_t count, int64_t width) {
    const DecodeRowsOf piece{next, filled(width, 16) + 16};
    next += count * piece.stride;
    return piece;
  }
};

struct Buffers {
  DecodeRowsOf streams[2];  // of the residual; one and the same, unless the model is reversible
  DecodeRowsOf wanted[2];   // of the rows whose logits are wanted
  DecodeRowsOf normed, shifted, qkv, attended, gated, branch;
  int64_t floats;

  Buffers(const DecodeModel& model, int64_t rows, float* workspace) {
    Workspace space{workspace};
    streams[0] = space.rows(rows, model.dim);
    wanted[0] = space.rows(rows, model.dim);
    streams[1] = model.reversible ? space.rows(rows, model.dim) : streams[0];
    wanted[1] = model.reversible ? space.rows(rows, model.dim) : wanted[0];
    normed = space.rows(rows, model.dim);
    shifted = model.shift ? space.rows(rows, model.dim) : normed;
    qkv = space.rows(rows, 3 * model.inner());
    attended = space.rows(rows, model.inner());
    gated = space.rows(rows, model.inner_ff);
    branch = space.rows(rows, model.dim);
    floats = space.next - workspace;
  }
};

// Rows in blocks of one prompt.
std::vector<DecodeBlock> blocks_of(const Decode& call) {
  const auto prompt_of = [&](int64_t row) {
    const int64_t sequence = call.rows.sequence[row];
    return call.rows.position[row] < call.model->text_len ? sequence : call.caches->prompt_of[sequence];
  };
  std::vector<DecodeBlock> blocks;
  for (int64_t row = 0; row < call.rows.count; ++row) {
    if (!blocks.empty() && blocks.back().count < kAttendRows && prompt_of(row) == prompt_of(row - 1)) {
      ++blocks.back().count;
    } else {
      blocks.push_back({row, 1});
    }
  }
  return blocks;
}

// What all threads share.
struct Job {
  const Decode& call;
  const DecodeModel& model;
  const Buffers buffers;
  const std::vector<DecodeBlock> blocks;
  const bool alone;  // no two rows of one sequence: none waits for another's keys and activations
  Tickets tickets;

  explicit Job(const Decode& of)
      : call(of),
        model(*of.model),
        buffers(model, of.rows.count, of.workspace),
        blocks(blocks_of(of)),
        alone(std::all_of(of.rows.back, of.rows.back + of.rows.count, [](int64_t back) { return back == 0; })) {}
};

// One thread's part of a call.
class Decoding {
 public:
  explicit Decoding(Job& job) : job_(job), call_(job.call), model_(job.model), walk_(job.tickets) {
    const int64_t choosing = choose_token_scratch(call_.draw.choice.n_codes) + filled(call_.draw.choice.n_codes, 16);
    const int64_t deepest = std::max({model_.dim, model_.inner(), model_.inner_ff});
    const int64_t multiplying = packed_product_scratch(model_.weights, call_.rows.count, deepest);
    scratch_ = of_tasks.take(std::max({multiplying, decode_attend_scratch(model_), choosing}));
  }

  void run() {
    if (call_.draw.steps == 0) return read();
    for (int64_t step = 0; step < call_.draw.steps; ++step) {
      const int64_t place = call_.draw.first + step;
      choose(place);
      if (place + 1 < model_.n_image()) read();
    }
  }

 private:
  void choose(int64_t place) {
    const DecodeDraw& draw = call_.draw;
    const DecodeRows& rows = call_.rows;
    const int64_t n_codes = draw.choice.n_codes;
    walk_.phase(draw.samples, [&](int64_t sample) {
      int64_t& code = draw.codes[sample * model_.n_image() + place];
      if (code < 0) {
        const float* logits = call_.logits + sample * n_codes;
        if (draw.guided) {
          float* const guided = scratch_ + choose_token_scratch(n_codes);
          decode_guide(n_codes, logits, logits + draw.samples * n_codes, draw.cond_scale, guided);
          logits = guided;
        }
        choose_token(draw.choice, logits, draw.seeds[sample], place, scratch_, &code);
      }
      for (int64_t row = sample; row < rows.count; row += draw.samples) {
        rows.token[row] = code;
        rows.position[row] = model_.text_len + place;
      }
    });
  }

  void read() {
    const Buffers& at = job_.buffers;
    walk_.phase(call_.rows.count, [&](int64_t row) {
      decode_embed(model_, call_.rows, row, at.streams[0][row]);
      if (model_.reversible) std::copy_n(at.streams[0][row], model_.dim, at.streams[1][row]);
    });
    for (int64_t layer = 0; layer < model_.depth; ++layer) {
      attend(layer);
      feed_forward(layer);
    }
    head();
  }

  void attend(int64_t layer) {
    const DecodeLayer& weights = model_.layers[layer];
    const Buffers& at = job_.buffers;
    norm_and_shift(layer, kAttention, weights.attention, at.streams[1]);
    product(weights.qkv, Epilogue::store, call_.rows.count, at.shifted, at.qkv);
    const auto remember = [&](int64_t row, int64_t head) { decode_remember(call_, layer, row, head, at.qkv[row]); };
    if (!job_.alone) {
      walk_.phase(call_.rows.count * model_.heads, [&](int64_t task) { remember(task / model_.heads, task % model_.heads); });
    }
    const int64_t blocks = static_cast<int64_t>(job_.blocks.size());
    walk_.phase(blocks * model_.heads, [&](int64_t task) {
      const DecodeBlock& block = job_.blocks[task % blocks];  // one after the other: they share a head's keys of the text
      const int64_t head = task / blocks;
      if (job_.alone) {
        for (int64_t i = 0; i < block.count; ++i) remember(block.first + i, head);
      }
      decode_attend(call_, layer, block, head, at.qkv, at.attended, scratch_);
    });
    add_to_stream(weights.out, weights.attention, call_.rows.count, at.attended, at.streams[0]);
  }

  void feed_forward(int64_t layer) {
    const DecodeLayer& weights = model_.layers[layer];
    const Buffers& at = job_.buffers;
    norm_and_shift(layer, kFeedForward, weights.feed_forward, at.streams[0]);
    const DecodeRowsOf *x = &at.shifted, *streams = at.streams;
    int64_t count = call_.rows.count;
    // In the last layer only the rows whose logits are wanted go on: all that must be remembered is.
    if (layer + 1 == model_.depth && call_.rows.wanted < count) {
      x = &at.branch, streams = at.wanted, count = call_.rows.wanted;
      walk_.phase(count, [&](int64_t i) {
        const int64_t row = call_.rows.wanted_rows[i];
        std::copy_n(at.shifted[row], model_.dim, at.branch[i]);
        for (int stream = 0; stream <= model_.reversible; ++stream) {
          std::copy_n(at.streams[stream][row], model_.dim, at.wanted[stream][i]);
        }
      });
    }
    product(weights.widen, Epilogue::gate, count, *x, at.gated);
    add_to_stream(weights.narrow, weights.feed_forward, count, at.gated, streams[1]);
  }

  void head() {
    const DecodeRows& rows = call_.rows;
    const Buffers& at = job_.buffers;
    const DecodeRowsOf* x = rows.wanted < rows.count ? at.wanted : at.streams;
    walk_.phase(rows.wanted, [&](int64_t row) {
      if (model_.reversible) decode_mean(model_.dim, x[0][row], x[1][row], x[0][row]);
      decode_norm(model_, model_.head_norm_weight, model_.head_norm_bias, model_.stable, x[0][row], at.normed[row]);
    });
    const PackedMatrix& matrix = rows.text_logits ? model_.text_head : model_.image_head;
    product(matrix, Epilogue::store, rows.wanted, at.normed, {call_.logits, matrix.width});
  }

  void norm_and_shift(int64_t layer, Branch branch, const DecodeBranch& weights, const DecodeRowsOf& x) {
    const Buffers& at = job_.buffers;
    const bool together = job_.alone && model_.shift;
    walk_.phase(call_.rows.count, [&](int64_t row) {
      decode_norm(model_, weights.norm_weight, weights.norm_bias, false, x[row], at.normed[row]);
      if (together) decode_shift(call_, layer, branch, row, at.normed, at.shifted[row]);
    });
    if (model_.shift && !together) {
      walk_.phase(call_.rows.count, [&](int64_t row) { decode_shift(call_, layer, branch, row, at.normed, at.shifted[row]); });
    }
  }

  // x += norm_out(y W + bias) * scale
  void add_to_stream(const PackedMatrix& matrix, const DecodeBranch& weights, int64_t count, const DecodeRowsOf& y,
                     const DecodeRowsOf& x) {
    const Buffers& at = job_.buffers;
    if (weights.norm_out_weight == nullptr) return product(matrix, Epilogue::residual, count, y, x, weights.scale);
    product(matrix, Epilogue::store, count, y, at.branch);
    walk_.phase(count, [&](int64_t row) {
      decode_norm(model_, weights.norm_out_weight, weights.norm_out_bias, false, at.branch[row], at.normed[row]);
      decode_add_scaled(model_.dim, at.normed[row], weights.scale, x[row]);
    });
  }

  void product(const PackedMatrix& matrix, Epilogue epilogue, int64_t count, const DecodeRowsOf& x, const DecodeRowsOf& out,
               const float* scale = nullptr) {
    const PackedProduct op{&matrix, model_.weights, epilogue, count, x.data, x.stride, out.data, out.stride, scale};
    bool begun = false;
    walk_.phase(count == 0 ? 0 : panels_of(matrix.width), [&](int64_t panel) {
      if (!begun) packed_product_begin(op, scratch_), begun = true;
      packed_product_panel(op, panel, scratch_);
    });
  }

  Job& job_;
  const Decode& call_;
  const DecodeModel& model_;
  Walk walk_;
  float* scratch_;
};

}  // namespace

int64_t decode_workspace(const DecodeModel& model, int64_t rows) { return Buffers(model, rows, nullptr).floats; }

}  // namespace dalle_fast

int64_t dalle_fast_decode_workspace(const dalle_fast::DecodeModel* model, int64_t rows) {
  return dalle_fast::decode_workspace(*model, rows);
}

int32_t dalle_fast_decode(const dalle_fast::Decode* call) {
  using namespace dalle_fast;
  Job job(*call);
  return parallel_for(call->threads, 1, [&](int64_t, int64_t) { Decoding(job).run(); });
}

int32_t dalle_fast_packed_product(const dalle_fast::PackedProduct* op) {
  using namespace dalle_fast;
  return parallel_tasks(panels_of(op->matrix->width), [&](auto next) {
    float* const scratch = of_tasks.take(packed_product_scratch(op->element, op->rows, op->matrix->depth));
    packed_product_begin(*op, scratch);
    for (int64_t panel; (panel = next()) >= 0;) packed_product_panel(*op, panel, scratch);
  });
}
