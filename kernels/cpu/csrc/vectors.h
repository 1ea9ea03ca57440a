// Vectors of float32 for the CPU's kernels, with GCC's and Clang's vector extensions, and what the kernels share.

#ifndef INFLLM_VECTORS_H
#define INFLLM_VECTORS_H

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>

#if defined(__FMA__)
#include <immintrin.h>
#endif

namespace infllm {
namespace {  // of the library that it is compiled into: another in the process may be for another processor

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

constexpr int COARSE_FACTOR = 4;  // K2 pools windows this many times longer, and further apart, than K1
constexpr float HIDDEN = -1e30f;  // logit of a key that is not seen; finite, so that no difference is a NaN
constexpr float LOG2E = 1.4426950408889634f;

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef int32_t Integers __attribute__((vector_size(4 * LANES)));

// A call, all of whose fields are numbers of 64 bits, in their order, but the last, the scale.
template <typename C>
C call_of(const int64_t* numbers, double scale) {
  C call;
  std::memcpy(&call, numbers, offsetof(C, scale));
  call.scale = static_cast<float>(scale);
  return call;
}

inline int64_t ceil_div(int64_t value, int64_t by) {
  return (value + by - 1) / by;
}

inline Vector load(const float* from) {
  Vector value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline void store(float* to, Vector value) {
  std::memcpy(to, &value, sizeof value);
}

inline Vector all(float value) {
  return value - Vector{};
}

// Inductor compiles with -ffp-contract=off.
inline Vector multiply_add(Vector a, Vector b, Vector c) {
#if defined(__AVX512F__)
  return (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

inline Vector higher(Vector a, Vector b) {
  return a > b ? a : b;
}

inline float highest(Vector value) {
  float lanes[LANES];
  store(lanes, value);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; lane++)
      lanes[lane] = std::max(lanes[lane], lanes[lane + width]);
  return lanes[0];
}

inline float sum(Vector value) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)value);
#endif
  float lanes[LANES];
  store(lanes, value);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; lane++)
      lanes[lane] += lanes[lane + width];
  return lanes[0];
}

// 2 ** x to 8e-8, relative; 0 below -126, and no more than 2 ** 110, so that sums of many are finite.
inline Vector exp2(Vector x) {
  const Integers normal = x >= all(-126.0f);
  x = higher(x, all(-126.0f));
  x = x < all(110.0f) ? x : all(110.0f);
  // Truncated after being made positive: floor(x + 0.5).
  const Integers whole = __builtin_convertvector(x + all(128.5f), Integers) - 128;
  const Vector part = x - __builtin_convertvector(whole, Vector);  // within 0.5 of 0
  Vector power = all(1.327647152e-3f);
  power = multiply_add(power, part, all(9.675541331e-3f));
  power = multiply_add(power, part, all(5.550713275e-2f));
  power = multiply_add(power, part, all(2.402211972e-1f));
  power = multiply_add(power, part, all(6.931469671e-1f));
  power = multiply_add(power, part, all(1.000000072f));
  return (Vector)((((Integers)power) + (whole << 23)) & normal);
}

inline float exp2(float x) {
  return exp2(all(x))[0];
}

// Windows of `size` keys, `step` apart, that end at or before a position.
inline int64_t windows_up_to(int64_t position, int64_t size, int64_t step) {
  return position + 1 < size ? 0 : (position + 1 - size) / step + 1;
}

// The best `count` of the blocks from `low` to `high`, in no order, by the scores of their windows: those of the windows
// from `begin` to `end` are given, and none is negative. A block has `per_block` windows, and `before` of the block ahead of
// it reach into it. Of equal scores the lower block wins.
struct Ranking {
  int64_t per_block, before;

  template <typename Function>
  void each_best(
      const float* scores, int64_t begin, int64_t end, int64_t low, int64_t high, int64_t count, Function take) {
    ranks_.clear();
    for (int64_t block = low; block < high; block++) {
      const int64_t from = std::max(begin, block * per_block - before), to = std::min(end, (block + 1) * per_block);
      uint64_t rank = 0;  // of a block without a score
      if (from < to) {
        const float best = *std::max_element(scores + (from - begin), scores + (to - begin));
        uint32_t bits;  // of numbers that are not negative: ordered as they are
        std::memcpy(&bits, &best, sizeof bits);
        rank = bits + uint64_t{1};
      }
      ranks_.push_back(rank << 31 | (0x7fffffff - block));
    }
    std::nth_element(ranks_.begin(), ranks_.begin() + count, ranks_.end(), std::greater<uint64_t>());
    for (int64_t place = 0; place < count; place++)
      take(0x7fffffff - static_cast<int64_t>(ranks_[place] & 0x7fffffff));
  }

  std::vector<uint64_t> ranks_;
};

template <typename C>
Ranking ranking_of(const C& call) {
  return {call.block_size / call.kernel_stride, call.kernel_size / call.kernel_stride - 1, {}};
}

}  // namespace
}  // namespace infllm

#endif  // INFLLM_VECTORS_H
