// choose_token for one instruction set: argmax(logits / temperature + noise) over what the filters keep.
//
// No sort: a filter keeps what has less than so much strictly above it (a count, or a mass), and a radix selection finds the
// lowest value that it keeps. Masses are integers, so that the order of their sum cannot matter. No logarithm for most codes:
// the random word of one shows that it cannot win (Best::may_win), and only the few that may get their noise, in float64, bit
// for bit that of gumbel_noise. About 70 operations of Philox for 32 codes and 20 of the test.
#include "choose_token.h"

#include <string.h>

#include "philox.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {

namespace {

constexpr int kCodes = 4 * kLanes;  // of one call of philox4x32: two vectors of float32
constexpr int kBlock = 512;         // codes whose words are made together, a multiple of kCodes
constexpr int kBins = 2048, kBinBits = 11;

// Bit i: a[i] < b[i].
inline uint32_t bits_below(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), _CMP_LT_OQ);
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(a < b));
#elif defined(__SSE2__)
  return _mm_movemask_ps(reinterpret_cast<__m128>(a < b));
#else
  uint32_t bits = 0;
  for (int i = 0; i < kWidth; ++i) bits |= uint32_t{a[i] < b[i]} << i;
  return bits;
#endif
}

inline bool is_finite(float x) { return x - x == 0.0f; }

// logits into values, -inf behind them up to a multiple of kCodes. Returns the largest, NaN where there is one.
float copy_and_find_largest(const float* logits, int64_t n, float* values) {
  Vec most = broadcast(-kInfinity);
  VecI unordered{};
  const auto take = [&](Vec x, int64_t i) {
    store(values + i, x);
    most = larger(x, most);
    unordered |= x != x;
  };
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) take(load(logits + i), i);
  if (i < n) {
    Vec last = broadcast(-kInfinity);
    memcpy(&last, logits + i, sizeof(float) * (n - i));
    take(last, i);
    i += kWidth;
  }
  if (i % kCodes != 0) store(values + i, broadcast(-kInfinity));
  float largest = -kInfinity;
  for (int lane = 0; lane < kWidth; ++lane) {
    if (unordered[lane]) return __builtin_nanf("");
    if (most[lane] > largest) largest = most[lane];
  }
  return largest;
}

// The lowest index of the largest, which is given.
int64_t first_largest(const float* values, int64_t n, float largest) {
  int64_t i = 0;
  if (largest != largest) {
    while (values[i] == values[i]) ++i;
    return i;
  }
  constexpr uint32_t kAll = (1u << kWidth) - 1;
  while (i < n && bits_below(load(values + i), broadcast(largest)) == kAll) i += kWidth;
  while (values[i] < largest) ++i;
  return i;
}

// Integers in the order of the numbers; both zeros are one.
inline VecI to_keys(Vec x) {
  const VecI bits = reinterpret_cast<VecI>(x + 0.0f);
  return bits ^ ((bits >> 31) & 0x7FFFFFFF);
}

inline float from_key(uint32_t key) {
  const uint32_t bits = key >> 31 ? key ^ 0x7FFFFFFFu : key;
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// What a selection works in: how far each value's key is below that of the largest, its weight, the weight in each bin of
// distances and, last, in none.
struct Selection {
  uint32_t* distances;
  uint64_t* weights;
  uint64_t* bins;  // [kBins + 1]
};

constexpr uint32_t kForbidden = ~0u;  // the distance of -inf; others are at most 0xFEFFFFFF

// Fills the distances of values [n, a multiple of kWidth]. Returns the furthest.
uint32_t measure_distances(const float* values, int64_t n, float largest, uint32_t* distances) {
  const VecU top = reinterpret_cast<VecU>(to_keys(broadcast(largest)));
  VecU furthest{};
  for (int64_t i = 0; i < n; i += kWidth) {
    const Vec x = load(values + i);
    const VecU distance = top - reinterpret_cast<VecU>(to_keys(x));
    const VecU allowed = reinterpret_cast<VecU>(x > -kInfinity);
    const VecU counted = distance & allowed, marked = distance | ~allowed;
    memcpy(distances + i, &marked, sizeof(marked));
    furthest = counted > furthest ? counted : furthest;
  }
  uint32_t result = 0;
  for (int lane = 0; lane < kWidth; ++lane) result = furthest[lane] > result ? furthest[lane] : result;
  return result;
}

// The lowest of the values [n, a multiple of kWidth] that have less than `limit` of weight strictly above them: 1 each, or,
// `kWeighted`, as given (and overwritten). -inf has none. largest is finite.
template <bool kWeighted>
float lowest_kept(const float* values, int64_t n, float largest, uint64_t limit, const Selection& at) {
  const uint32_t furthest = measure_distances(values, n, largest, at.distances);
  // Distances first .. first + span - 1 hold the one sought, with `above` before them; those that are left to look at are
  // among them, or forbidden.
  uint32_t first = 0;
  uint64_t span = uint64_t{furthest} + 1, above = 0;
  int64_t left = n;
  for (int bits = furthest ? 32 - __builtin_clz(furthest) : 0;; bits -= kBinBits) {
    const int shift = bits > kBinBits ? bits - kBinBits : 0;
    const auto bin_of = [&](int64_t i) {
      const uint32_t bin = (at.distances[i] - first) >> shift;
      return bin < kBins ? bin : kBins;
    };
    memset(at.bins, 0, sizeof(uint64_t) * kBins);
    for (int64_t i = 0; i < left; ++i) at.bins[bin_of(i)] += kWeighted ? at.weights[i] : 1;
    const uint32_t last = static_cast<uint32_t>((span - 1) >> shift);
    uint32_t bin = 0;
    while (bin < last && above + at.bins[bin] < limit) above += at.bins[bin++];
    if (shift == 0) return from_key(static_cast<uint32_t>(to_keys(broadcast(largest))[0]) - first - bin);
    int64_t kept = 0;
    for (int64_t i = 0; i < left; ++i) {
      const bool inside = bin_of(i) == bin;
      at.distances[kept] = at.distances[i];
      if (kWeighted) at.weights[kept] = at.weights[i];
      kept += inside;
    }
    left = kept;
    first += bin << shift;
    span = bin < last ? uint64_t{1} << shift : span - (uint64_t{bin} << shift);
  }
}

// e^x for x <= 0, that of -64 below it. Relative error below 2^-42 (the series ends at x^10), the same bits everywhere.
inline F64 exp_below_zero(F64 x) {
  constexpr double kShift = 0x1.8p52;  // adding it leaves the nearest integer in the low bits
  x = x > -64.0 ? x : splat(-64.0);
  const F64 shifted = x * 0x1.71547652b82fep0 + kShift;
  const F64 f = x - (shifted - kShift) * kLog2;
  constexpr double kInverseFactorials[11] = {1.0,      1.0,       1.0 / 2,    1.0 / 6,     1.0 / 24,     1.0 / 120,
                                             1.0 / 720, 1.0 / 5040, 1.0 / 40320, 1.0 / 362880, 1.0 / 3628800};
  F64 p = splat(kInverseFactorials[10]);
  for (int i = 9; i >= 0; --i) p = p * f + kInverseFactorials[i];
  return reinterpret_cast<F64>(reinterpret_cast<U64>(p) + (reinterpret_cast<U64>(shifted) << 52));
}

// weights[i]: e^(values[i] - largest) as an integer, of such a scale that sums of n stay below 2^53. Returns the sum.
uint64_t weigh(const float* values, int64_t n, float largest, uint64_t* weights) {
  double scale = 0x1p51;
  for (int64_t terms = 1; terms < n; terms *= 2) scale *= 0.5;
  U64 sum{};
  for (int64_t i = 0; i < n; i += kLanes) {
    F32 x;
    memcpy(&x, values + i, sizeof(x));
    const F64 weight = exp_below_zero(__builtin_convertvector(x, F64) - static_cast<double>(largest)) * scale;
    // The sum with 2^52 holds the nearest integer in its low bits.
    const U64 whole = reinterpret_cast<U64>(weight + 0x1p52) - 0x4330000000000000;
    memcpy(weights + i, &whole, sizeof(whole));
    sum += whole;
  }
  uint64_t total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
  return total;
}

// The least integer that is not below x, for x in 0 .. 2^53.
uint64_t round_up(double x) {
  const uint64_t whole = static_cast<uint64_t>(x);
  return static_cast<double>(whole) < x ? whole + 1 : whole;
}

// values >= lowest divided, -inf in place of the others; n up to a multiple of kWidth.
void keep_and_divide(float* values, int64_t n, float lowest, float temperature) {
  if (temperature == 1.0f) {
    if (lowest == -kInfinity) return;
    for (int64_t i = 0; i < n; i += kWidth) {
      const Vec x = load(values + i);
      store(values + i, x >= lowest ? x : broadcast(-kInfinity));
    }
    return;
  }
  for (int64_t i = 0; i < n; i += kWidth) {
    const Vec x = load(values + i);
    store(values + i, x >= lowest ? x / temperature : broadcast(-kInfinity));
  }
}

// words[i]: of code `code` + i, for kCodes codes.
inline void words_of(int64_t code, uint64_t position, uint64_t stream, const PhiloxKeys& keys, uint32_t* words) {
  U64 x[4] = {lane_numbers() + static_cast<uint64_t>(code / 4), splat(position), splat(stream), U64{}};
  philox4x32(x, keys);
  const U64 first = (x[0] & 0xFFFFFFFFu) | (x[1] << 32), second = (x[2] & 0xFFFFFFFFu) | (x[3] << 32);
  U64 low, high;
  for (int i = 0; i < kLanes; ++i) {
    low[i] = i / 2 + i % 2 * kLanes;
    high[i] = low[i] + kLanes / 2;
  }
  const U64 ordered[2] = {__builtin_shuffle(first, second, low), __builtin_shuffle(first, second, high)};
  memcpy(words, ordered, sizeof(ordered));
}

// The largest value + noise so far, of codes taken in ascending order.
//
// A code wins only with value + noise > best, and a word shows cheaply that it does not. With e = best - value the noise
// -log(-log(u)) exceeds e only where -log(u) < e^-e; and -log(u) >= 1 - u. So where 1 - u >= W for some W >= e^-e, the code
// loses. W is 2^(-e log2(e)) with the power of the fraction replaced by its chord 1 + f, which lies above it: the number whose
// bits are (127 - e log2(e)) 2^23. What is rounded on the way costs less than 200 of those units for e up to 88 (e itself, the
// noise, the product, the sum of about 2^30), and 2048 are added. best is lowered by 2^-20 of itself before, so that rounding
// it away from large values cannot matter. Beyond e = 16.7 no noise suffices: 1 - u is at least 2^-24.
class Best {
 public:
  int64_t token = 0;

  // Whether a code of these may win, whatever the noise.
  bool may_win(Vec values, Vec more_values) const {
    return bits_below(broadcast(lowered_ - 16.7f), larger(values, more_values)) != 0;
  }

  // codes from `code` on, one a lane.
  void take(int64_t code, const float* values, const uint32_t* words) {
    VecU word;
    memcpy(&word, words, sizeof(word));
    // 1 - u, exact: 1 + (~word >> 9) * 2^-23 before the subtraction
    const Vec distance_to_one = reinterpret_cast<Vec>((word >> 9) ^ 0x3FFFFFFFu) - (1.0f - 0x1p-24f);
    const Vec e = larger(lowered_ - load(values), Vec{});
    const Vec bits = larger(multiply_add(e, broadcast(-0x1.715476p23f), broadcast(127 * 0x1p23f + 2048.0f)), Vec{});
    const Vec bound = reinterpret_cast<Vec>(__builtin_convertvector(bits, VecI));
    const uint32_t candidates = bits_below(distance_to_one, bound);
    if (__builtin_expect(candidates != 0, 0)) compare(code, candidates, values, words);
  }

 private:
  float value_ = -kInfinity, lowered_ = -kInfinity;

  void compare(int64_t code, uint32_t candidates, const float* values, const uint32_t* words) {
    float noise[kWidth];
    for (int half = 0; half < 2; ++half) {
      VecHalf word;
      memcpy(&word, words + half * kLanes, sizeof(word));
      const F32 of_half = gumbel(__builtin_convertvector(word, U64));
      memcpy(noise + half * kLanes, &of_half, sizeof(of_half));
    }
    for (; candidates != 0; candidates &= candidates - 1) {
      const int lane = __builtin_ctz(candidates);
      const float value = values[lane] + noise[lane];
      if (value > value_) value_ = value, token = code + lane;
    }
    lowered_ = value_ - __builtin_fabsf(value_) * 0x1p-20f;
  }

  typedef uint32_t VecHalf __attribute__((vector_size(4 * kLanes)));
};

// values [n up to a multiple of kCodes], at least one of them finite and none above.
int64_t draw(const float* values, int64_t n, uint64_t seed, int64_t position, uint32_t stream) {
  const PhiloxKeys keys(seed);
  alignas(64) uint32_t words[kBlock];
  int64_t starts[kBlock / kCodes];
  Best best;
  // Words in a loop of their own: theirs is a long chain.
  for (int64_t block = 0; block < n; block += kBlock) {
    const int64_t end = block + kBlock < n ? block + kBlock : n;
    int count = 0;
    for (int64_t code = block; code < end; code += kCodes) {
      if (!best.may_win(load(values + code), load(values + code + kWidth))) continue;
      words_of(code, static_cast<uint64_t>(position), stream, keys, words + count * kCodes);
      starts[count++] = code;
    }
    for (int i = 0; i < count; ++i) {
      for (int half = 0; half < kCodes; half += kWidth) {
        best.take(starts[i] + half, values + starts[i] + half, words + i * kCodes + half);
      }
    }
  }
  return best.token;
}

}  // namespace

void choose_token(const TokenChoice& choice, const float* logits, uint64_t seed, int64_t position, float* scratch,
                  int64_t* token) {
  const int64_t n = choice.n_codes, padded = (n + kCodes - 1) / kCodes * kCodes;
  float* const values = scratch;
  const int64_t room = choose_token_room(n);
  const Selection selection{reinterpret_cast<uint32_t*>(scratch + room), reinterpret_cast<uint64_t*>(scratch + 2 * room),
                            reinterpret_cast<uint64_t*>(scratch + 4 * room)};
  const float largest = copy_and_find_largest(logits, n, values);
  const bool greedy = choice.temperature == 0.0f || choice.top_k == 1;
  // What is not finite after the division has no softmax: the limit of ever smaller temperatures, then.
  const float largest_divided = greedy ? 0.0f : largest / choice.temperature;
  if (greedy || !is_finite(largest_divided)) {
    *token = first_largest(values, n, largest);
    return;
  }
  float lowest = -kInfinity;
  if (choice.top_k > 0 && choice.top_k < n) {
    lowest = lowest_kept<false>(values, padded, largest, static_cast<uint64_t>(choice.top_k), selection);
  }
  keep_and_divide(values, padded, lowest, choice.temperature);
  if (choice.top_p < 1.0) {
    const uint64_t total = weigh(values, padded, largest_divided, selection.weights);
    const uint64_t limit = round_up(choice.top_p * static_cast<double>(total));
    lowest = lowest_kept<true>(values, padded, largest_divided, limit, selection);
    keep_and_divide(values, padded, lowest, 1.0f);
  }
  *token = draw(values, n, seed, position, choice.stream);
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
