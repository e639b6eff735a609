// gumbel_codebook: forward in parallel over tiles of rows; backward over slices of codes, chunk of rows after chunk, so that
// every sum has one order whatever the number of threads, and memory does not grow with the batch.
#include "gumbel_codebook.h"

#include <algorithm>

#include "exports.h"
#include "parallel.h"
#include "scratch.h"

namespace dalle_fast {
namespace {

constexpr int64_t kWorkspace = int64_t{14} << 18;  // floats of a chunk and of lower halves: 14 MB
constexpr int64_t kLeast = int64_t{4} << 18;        // of a chunk

int64_t tiles_of(const GumbelCodebook& op) { return (op.rows() + kTile - 1) / kTile; }

// Calls task(first tile, tiles) in parallel: as many tiles at once as leave work for all threads.
template <class Task>
int32_t tile_groups(const GumbelCodebook& op, int64_t tiles, int64_t scratch, const Task& task) {
  const int64_t size = std::clamp<int64_t>(tiles / op.threads, 1, kMostTiles);
  return parallel_tasks((tiles + size - 1) / size, [&](auto next) {
    float* const memory = of_tasks.take(scratch);
    for (int64_t group; (group = next()) >= 0;) task(group * size, std::min(size, tiles - group * size), memory);
  });
}

struct Plan {
  int64_t chunk_tiles, slices, slice_codes;
  int64_t prepared, part;  // floats of a tile
  int64_t lower;           // halves of floats beside the gradients of codes

  explicit Plan(const GumbelCodebook& op) {
    const int64_t blocks = (op.codes + kBlock - 1) / kBlock;
    slice_codes = (blocks + kMostSlices - 1) / kMostSlices * kBlock;
    slices = (op.codes + slice_codes - 1) / slice_codes;
    prepared = gumbel_codebook_prepared(op.features, op.dim);
    part = tile_columns(op.features);
    lower = 0;
    chunk_tiles = tiles_within(kWorkspace);
    if (chunk_tiles < tiles_of(op) && op.element != Element::float32) {
      lower = op.codes * (op.features + 1 + op.dim);
      chunk_tiles = tiles_within(std::max(kLeast, kWorkspace - lower / 2));
    }
    chunk_tiles = std::min(chunk_tiles, tiles_of(op));
  }

  int64_t tiles_within(int64_t floats) const { return std::max<int64_t>(1, floats / (prepared + slices * part)); }

  int64_t floats() const { return chunk_tiles * (prepared + slices * part) + (lower + 1) / 2; }

  void give_lower_halves(GumbelCodebook& op, float* memory) const {
    if (lower == 0) return;
    op.dweight.lower = reinterpret_cast<uint16_t*>(memory + chunk_tiles * (prepared + slices * part));
    op.dbias.lower = op.dweight.lower + op.codes * op.features;
    op.dcodebook.lower = op.dbias.lower + op.codes;
  }
};

int32_t backward_chunk(const GumbelCodebook& op, const Plan& plan, int64_t first, int64_t tiles, float* prepared) {
  float* const parts = prepared + tiles * plan.prepared;
  const int64_t scratch = gumbel_codebook_backward_scratch(op.features, op.dim);
  int32_t status = parallel_for(tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) gumbel_codebook_prepare(op, first + t, prepared + t * plan.prepared);
  });
  if (status == 0 && !op.centre_is_mean()) {
    status = tile_groups(op, tiles, scratch, [&](int64_t begin, int64_t count, float* memory) {
      gumbel_codebook_deltas(op, first + begin, count, prepared + begin * plan.prepared, memory);
    });
  }
  if (status != 0) return status;
  status = parallel_tasks(plan.slices, [&](auto next) {
    float* const memory = of_tasks.take(scratch);
    for (int64_t s; (s = next()) >= 0;) {
      const int64_t code = s * plan.slice_codes;
      const int64_t last_code = std::min(code + plan.slice_codes, op.codes);
      const ChunkEnds chunk{first == 0, first + tiles == tiles_of(op)};
      const CodeSlice slice{code, last_code, tiles, prepared, parts + s * tiles * plan.part, chunk};
      gumbel_codebook_slice(op, first, slice, memory);
    }
  });
  if (status != 0) return status;
  return parallel_for(tiles, 1, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      gumbel_codebook_sum(op, first + t, parts + t * plan.part, plan.slices, tiles * plan.part);
    }
  });
}

}  // namespace
}  // namespace dalle_fast

int32_t dalle_fast_gumbel_codebook_forward(const dalle_fast::GumbelCodebook* op) {
  using namespace dalle_fast;
  const int64_t scratch = gumbel_codebook_forward_scratch(op->features, op->dim);
  return tile_groups(*op, tiles_of(*op), scratch, [&](int64_t first, int64_t count, float* memory) {
    gumbel_codebook_forward(*op, first, count, memory);
  });
}

int32_t dalle_fast_gumbel_codebook_nearest(const dalle_fast::GumbelCodebook* op) {
  using namespace dalle_fast;
  const int64_t scratch = gumbel_codebook_forward_scratch(op->features, 0);
  return tile_groups(*op, tiles_of(*op), scratch, [&](int64_t first, int64_t count, float* memory) {
    gumbel_codebook_nearest(*op, first, count, memory);
  });
}

int32_t dalle_fast_gumbel_codebook_backward(const dalle_fast::GumbelCodebook* given) {
  using namespace dalle_fast;
  GumbelCodebook op = *given;
  const Plan plan(op);
  Scratch workspace;
  float* const memory = workspace.take(plan.floats());
  plan.give_lower_halves(op, memory);
  for (int64_t first = 0; first < tiles_of(op); first += plan.chunk_tiles) {
    const int64_t tiles = std::min(plan.chunk_tiles, tiles_of(op) - first);
    const int32_t status = backward_chunk(op, plan, first, tiles, memory);
    if (status != 0) return status;
  }
  return 0;
}
