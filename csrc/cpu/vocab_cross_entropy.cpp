// vocab_cross_entropy: text rows by text codes, then image rows by image codes, in both cases only rows whose labels count; chunk of
// rows after chunk, so that memory does not grow with the batch. Chunks depend on shapes alone, and with them the order of sums;
// what else is cut up for the threads has no part in it.
#include "vocab_cross_entropy.h"

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "exports.h"
#include "parallel.h"
#include "scratch.h"

namespace dalle_fast {
namespace {

// Floats: 12 MB, of which the forward takes half. Freed by the one it may still be held when the other takes its own.
constexpr int64_t kWorkspace = int64_t{12} << 18;

constexpr int64_t shares(int64_t count, int64_t most) { return (count + most - 1) / most; }

// The two halves of the head and the rows that count in them.
class Halves {
 public:
  explicit Halves(const VocabCrossEntropy& op) {
    rows_.reserve(op.rows());  // they stay where they are
    const int64_t n_text = std::min(op.n_text, op.n);
    of[0] = take(op, 0, n_text, 0, op.text_codes);
    of[1] = take(op, n_text, op.n, op.text_codes, op.codes);
  }

  VocabHalf of[2];

 private:
  VocabHalf take(const VocabCrossEntropy& op, int64_t first, int64_t last, int64_t first_code, int64_t last_code) {
    const int64_t* const begin = rows_.data() + rows_.size();
    for (int64_t b = 0; b < op.batch; ++b) {
      for (int64_t row = b * op.n + first; row < b * op.n + last; ++row) {
        if (op.labels[row] >= 0) rows_.push_back(row);
      }
    }
    return {begin, rows_.data() + rows_.size() - begin, first_code, last_code - first_code, 0.0f};
  }

  std::vector<int64_t> rows_;
};

// Calls task(tile, scratch) for tiles 0 .. tiles - 1 in parallel.
template <class Task>
int32_t for_tiles(int64_t tiles, int64_t scratch, const Task& task) {
  return parallel_for(tiles, 1, [&](int64_t begin, int64_t end) {
    float* const memory = of_tasks.take(scratch);
    for (int64_t t = begin; t < end; ++t) task(t, memory);
  });
}

// Calls task(number, scratch) for numbers 0 .. count - 1, each as soon as a thread is free.
template <class Task>
int32_t for_tasks(int64_t count, int64_t scratch, const Task& task) {
  return parallel_tasks(count, [&](auto next) {
    float* const memory = of_tasks.take(scratch);
    for (int64_t number; (number = next()) >= 0;) task(number, memory);
  });
}

// Tiles of a chunk: as even shares as `floats` a tile allow within a part of the workspace.
int64_t chunk_tiles(const VocabHalf& half, int64_t floats, int64_t within) {
  const int64_t chunks = shares(half.tiles(), std::max<int64_t>(1, within / floats));
  return shares(half.tiles(), std::max<int64_t>(1, chunks));
}

// ------------------------------------------------------------------------------------------------ forward

class Forward {
 public:
  Forward(const VocabCrossEntropy& op, const VocabHalf& half)
      : op_(op), half_(half), slice_(vocab_slice(op.width)), slices_(shares(half.codes, slice_)) {
    columns_ = tile_columns(op.width);
    parts_ = slices_ * kVocabParts * kTile;
    tiles_ = chunk_tiles(half, columns_ + parts_, kWorkspace / 2);
  }

  int64_t floats() const { return tiles_ * (columns_ + parts_); }

  int32_t run(float* memory) const {
    int32_t status = 0;
    for (int64_t first = 0; status == 0 && first < half_.tiles(); first += tiles_) {
      status = chunk(first, std::min(tiles_, half_.tiles() - first), memory);
    }
    return status;
  }

 private:
  int32_t chunk(int64_t first, int64_t tiles, float* columns) const {
    float* const parts = columns + tiles * columns_;
    int32_t status = for_tiles(tiles, vocab_norm_scratch(op_.width), [&](int64_t t, float* scratch) {
      vocab_cross_entropy_norm(op_, half_, first + t, columns + t * columns_, scratch);
    });
    if (status != 0) return status;
    const int64_t size = std::clamp<int64_t>(tiles * slices_ / (4 * op_.threads), 1, vocab_group(op_.width));
    const int64_t groups = shares(tiles, size);
    // One slice after the other: what all threads read of the weight at a time is small.
    status = for_tasks(groups * slices_, vocab_logits_scratch(op_.width), [&](int64_t task, float* scratch) {
      const int64_t t = task % groups * size, s = task / groups, code = s * slice_;
      const VocabSlice slice{first + t,
                             std::min(size, tiles - t),
                             code,
                             std::min(code + slice_, half_.codes),
                             columns + t * columns_,
                             parts + t * parts_ + s * kVocabParts * kTile,
                             parts_};
      vocab_cross_entropy_logits(op_, half_, slice, scratch);
    });
    if (status != 0) return status;
    return for_tiles(tiles, 0, [&](int64_t t, float*) {
      vocab_cross_entropy_loss(op_, half_, first + t, parts + t * parts_, slices_);
    });
  }

  const VocabCrossEntropy& op_;
  const VocabHalf& half_;
  int64_t slice_, slices_;   // codes, their number
  int64_t columns_, parts_;  // floats of a tile
  int64_t tiles_;            // of a chunk
};

float mean_loss(const VocabCrossEntropy& op, const VocabHalf& half) {
  double sum = 0;
  for (int64_t i = 0; i < half.count; ++i) sum += op.statistic(kRowLoss)[half.rows[i]];
  return static_cast<float>(sum / static_cast<double>(std::max<int64_t>(half.count, 1)));
}

// ------------------------------------------------------------------------------------------------ backward

class Backward {
 public:
  Backward(const VocabCrossEntropy& op, const VocabHalf& half)
      : op_(op), half_(half), block_(vocab_block(op.width)), columns_(tile_columns(op.width)), sums_(2 * filled(op.width, 16)) {
    const int64_t floats = 2 * columns_ + sums_, blocks = std::max<int64_t>(1, shares(half.codes, block_));
    tiles_ = chunk_tiles(half, floats, kWorkspace / 2);
    const int64_t scores = std::max<int64_t>(1, tiles_) * block_ * kTile;
    const int64_t fit = std::clamp<int64_t>((kWorkspace - tiles_ * floats) / scores, 1, blocks);
    // Even shares, and of those a share for every thread.
    range_ = std::min(filled(shares(blocks, shares(blocks, fit)), op.threads), fit) * block_;
  }

  int64_t floats() const { return tiles_ * (2 * columns_ + sums_ + range_ * kTile); }
  bool in_chunks() const { return tiles_ < half_.tiles(); }

  // Adds what the half's rows give to the sums of the norm's gradients.
  int32_t run(float* memory, std::vector<double>& norm) const {
    if (half_.count == 0) clear_codes();
    int32_t status = 0;
    for (int64_t first = 0; status == 0 && first < half_.tiles(); first += tiles_) {
      status = chunk(first, std::min(tiles_, half_.tiles() - first), memory, norm);
    }
    return status;
  }

 private:
  int32_t chunk(int64_t first, int64_t tiles, float* columns, std::vector<double>& norm) const {
    float* const gradient = columns + tiles * columns_;
    float* const sums = gradient + tiles * columns_;
    const ChunkEnds ends{first == 0, first + tiles == half_.tiles()};
    VocabChunk work{first, tiles, columns, gradient, 0, 0, sums + tiles * sums_, ends};
    int32_t status = for_tiles(tiles, vocab_norm_scratch(op_.width), [&](int64_t t, float* scratch) {
      vocab_cross_entropy_norm_again(op_, half_, first + t, columns + t * columns_, scratch);
      std::fill_n(gradient + t * columns_, columns_, 0.0f);
    });
    for (int64_t code = 0; status == 0 && code < half_.codes; code += range_) {
      work.first_code = code, work.last_code = std::min(code + range_, half_.codes);
      status = range(work);
    }
    if (status != 0) return status;
    status = for_tiles(tiles, vocab_norm_scratch(op_.width), [&](int64_t t, float* scratch) {
      vocab_cross_entropy_rows(op_, half_, first + t, gradient + t * columns_, sums + t * sums_, scratch);
    });
    for (int64_t i = 0; i < tiles * sums_; ++i) norm[i % sums_] += sums[i];
    return status;
  }

  int32_t range(const VocabChunk& chunk) const {
    const int64_t blocks = shares(chunk.last_code - chunk.first_code, block_);
    const int32_t status = for_tasks(blocks, vocab_codes_scratch(op_.width), [&](int64_t block, float* scratch) {
      vocab_cross_entropy_codes(op_, half_, chunk, chunk.first_code + block * block_, scratch);
    });
    if (status != 0) return status;
    const int64_t part = vocab_part(op_.width), parts = shares(op_.width, part);
    const int64_t size = std::clamp<int64_t>(chunk.tiles * parts / (2 * op_.threads), 1, kVocabPartTiles);
    return for_tasks(shares(chunk.tiles, size) * parts, vocab_part_scratch(op_.width), [&](int64_t task, float* scratch) {
      const int64_t t = task / parts * size;
      vocab_cross_entropy_part(op_, half_, chunk, t, std::min(size, chunk.tiles - t), task % parts * part, scratch);
    });
  }

  // No row: no gradient of these codes.
  void clear_codes() const {
    const int64_t bytes = bytes_of(op_.weight.element) * op_.width, bias_bytes = bytes_of(op_.bias.element);
    std::memset(static_cast<char*>(op_.dweight.data) + half_.first_code * bytes, 0, half_.codes * bytes);
    if (op_.dbias.data == nullptr) return;
    std::memset(static_cast<char*>(op_.dbias.data) + half_.first_code * bias_bytes, 0, half_.codes * bias_bytes);
  }

  const VocabCrossEntropy& op_;
  const VocabHalf& half_;
  int64_t block_;           // codes
  int64_t columns_, sums_;  // floats of a tile
  int64_t tiles_, range_;   // of a chunk; codes whose scores are held
};

// Memory for the lower halves of sums of 16-bit elements.
std::unique_ptr<uint16_t[]> take_lower_halves(VocabCrossEntropy& op) {
  if (op.weight.element == Element::float32 && op.bias.element == Element::float32) return nullptr;
  std::unique_ptr<uint16_t[]> lower(new uint16_t[op.codes * (op.width + 1)]);
  op.dweight.lower = lower.get();
  op.dbias.lower = lower.get() + op.codes * op.width;
  return lower;
}

}  // namespace
}  // namespace dalle_fast

int32_t dalle_fast_vocab_cross_entropy_forward(const dalle_fast::VocabCrossEntropy* given) {
  using namespace dalle_fast;
  const VocabCrossEntropy& op = *given;
  const Halves halves(op);
  std::fill_n(op.statistics, kVocabStatistics * op.rows(), 0.0f);
  const Forward text(op, halves.of[0]), image(op, halves.of[1]);
  Scratch workspace;
  float* const memory = workspace.take(std::max(text.floats(), image.floats()));
  int32_t status = text.run(memory);
  if (status == 0) status = image.run(memory);
  for (int half : {0, 1}) op.losses[half] = mean_loss(op, halves.of[half]);
  return status;
}

int32_t dalle_fast_vocab_cross_entropy_backward(const dalle_fast::VocabCrossEntropy* given) {
  using namespace dalle_fast;
  VocabCrossEntropy op = *given;
  Halves halves(op);
  for (int i : {0, 1}) {
    VocabHalf& half = halves.of[i];
    half.rate = op.dlosses[i] / static_cast<float>(half.count);
    if (op.dlosses[i] == 0) half.count = 0;  // its rows count no more
  }
  const Backward text(op, halves.of[0]), image(op, halves.of[1]);
  std::unique_ptr<uint16_t[]> lower;
  if (text.in_chunks() || image.in_chunks()) lower = take_lower_halves(op);
  if (halves.of[0].count + halves.of[1].count < op.rows()) {
    std::memset(op.dhidden, 0, op.rows() * op.width * bytes_of(op.hidden.element));
  }
  std::vector<double> norm(2 * filled(op.width, 16), 0.0);
  Scratch workspace;
  float* const memory = workspace.take(std::max(text.floats(), image.floats()));
  int32_t status = text.run(memory, norm);
  if (status == 0) status = image.run(memory, norm);
  vocab_cross_entropy_norm_gradients(op, std::vector<float>(norm.begin(), norm.end()).data());
  return status;
}
