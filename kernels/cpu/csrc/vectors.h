// SIMD vectors of float and double for the CPU kernels, with GCC's and Clang's vector extensions, and what prefill and
// decode share: a call from its integers, and the ranking of blocks.

#ifndef INFLLM_VECTORS_H
#define INFLLM_VECTORS_H

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__FMA__)
#include <immintrin.h>
#endif

namespace infllm {
namespace {  // internal linkage: another library in the process may be compiled for another processor

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64;
#elif defined(__AVX__)
constexpr int VECTOR_BYTES = 32;
#else
constexpr int VECTOR_BYTES = 16;
#endif

// The type that arithmetic on inputs of type T runs in.
template <typename T>
using Real = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename R>
constexpr int LANES = VECTOR_BYTES / sizeof(R);

template <typename R>
struct VectorTypes;

template <>
struct VectorTypes<float> {
  typedef float Reals __attribute__((vector_size(VECTOR_BYTES)));
  typedef int32_t Integers __attribute__((vector_size(VECTOR_BYTES)));
};

template <>
struct VectorTypes<double> {
  typedef double Reals __attribute__((vector_size(VECTOR_BYTES)));
  typedef int64_t Integers __attribute__((vector_size(VECTOR_BYTES)));
};

template <typename R>
using Vector = typename VectorTypes<R>::Reals;

template <typename V>
using Element = std::remove_cv_t<std::remove_reference_t<decltype(V{}[0])>>;

constexpr int COARSE_FACTOR = 4;   // K2 pools windows this many times longer, and further apart, than K1
constexpr double HIDDEN = -1e30;   // logit of a masked key; finite, so that no difference is a NaN
constexpr double LOG2E = 1.4426950408889634;

// What index keys are stored in: T, or a byte with a scale a token.
enum IndexKind { INDEX_AS_KEYS, INDEX_INT8, INDEX_FP8 };

// A call from its integers, all fields in their order, and the last two, the scale and the cap.
template <typename C>
C call_of(const int64_t* numbers, double scale, double softcap) {
  C call;
  std::memcpy(&call, numbers, offsetof(C, scale));
  call.scale = scale, call.softcap = softcap;
  return call;
}

inline int64_t ceil_div(int64_t value, int64_t by) {
  return (value + by - 1) / by;
}

inline int64_t round_up(int64_t value, int64_t multiple) {
  return ceil_div(value, multiple) * multiple;
}

template <typename R>
inline Vector<R> load(const R* from) {
  Vector<R> value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <typename R>
inline void store(R* to, Vector<R> value) {
  std::memcpy(to, &value, sizeof value);
}

template <typename R>
inline Vector<R> broadcast(R value) {
  return value - Vector<R>{};
}

// Inductor compiles with -ffp-contract=off.
inline Vector<float> multiply_add(Vector<float> a, Vector<float> b, Vector<float> c) {
#if defined(__AVX512F__)
  return (Vector<float>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return (Vector<float>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

inline Vector<double> multiply_add(Vector<double> a, Vector<double> b, Vector<double> c) {
#if defined(__AVX512F__)
  return (Vector<double>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__FMA__)
  return (Vector<double>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

// Of a comparison and a choice compilers make two instructions, as they keep what it gives for NaN.
template <typename V>
inline V maximum(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<Element<V>, float>)
    return (V)_mm512_max_ps((__m512)a, (__m512)b);
#endif
  return a > b ? a : b;
}

template <typename V>
inline V minimum(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<Element<V>, float>)
    return (V)_mm512_min_ps((__m512)a, (__m512)b);
#endif
  return a < b ? a : b;
}

template <typename V, typename Function>
inline Element<V> reduce(V value, Function combine) {
  Element<V> lanes[LANES<Element<V>>];
  store(lanes, value);
  for (int width = LANES<Element<V>> / 2; width > 0; width /= 2)
    for (int lane = 0; lane < width; lane++)
      lanes[lane] = combine(lanes[lane], lanes[lane + width]);
  return lanes[0];
}

template <typename V>
inline Element<V> reduce_max(V value) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<Element<V>, float>)
    return _mm512_reduce_max_ps((__m512)value);
#endif
  return reduce(value, [](auto a, auto b) { return std::max(a, b); });
}

template <typename V>
inline Element<V> reduce_sum(V value) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<Element<V>, float>)
    return _mm512_reduce_add_ps((__m512)value);
#endif
  return reduce(value, [](auto a, auto b) { return a + b; });
}

// Sums of adjacent lanes, `half` apart, of a and b: in each 2 * half lanes those of a, then those of b.
template <typename R, int half, int... lane>
inline Vector<R> add_halves(Vector<R> a, Vector<R> b, std::integer_sequence<int, lane...>) {
  constexpr int count = sizeof...(lane);
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, (lane % (2 * half) < half ? lane : count + lane - half)...) +
      __builtin_shufflevector(a, b, (lane % (2 * half) < half ? lane + half : count + lane)...);
#else
  using Integers = typename VectorTypes<R>::Integers;
  const Integers one = {(lane % (2 * half) < half ? lane : count + lane - half)...};
  return __builtin_shuffle(a, b, one) + __builtin_shuffle(a, b, one + half);
#endif
}

// The sums of LANES vectors, one a lane; the vectors are overwritten.
template <typename R, int half = LANES<R> / 2>
inline Vector<R> sums_of(Vector<R>* x) {
  for (int number = 0; number < half; number++)
    x[number] = add_halves<R, half>(x[number], x[number + half], std::make_integer_sequence<int, LANES<R>>());
  if constexpr (half > 1)
    return sums_of<R, half / 2>(x);
  return x[0];
}

template <typename R>
struct Exp2;

template <>
struct Exp2<float> {
  static constexpr int LOWEST = -126, HIGHEST = 110, BIAS = 128, MANTISSA_BITS = 23;
  // minimax on [-0.5, 0.5]: 8e-8, relative
  static constexpr float POLYNOMIAL[] = {1.327647152e-3f, 9.675541331e-3f, 5.550713275e-2f,
                                         2.402211972e-1f, 6.931469671e-1f, 1.000000072f};
};

template <>
struct Exp2<double> {
  static constexpr int LOWEST = -1022, HIGHEST = 1000, BIAS = 1024, MANTISSA_BITS = 52;
  // log(2)^n / n!: 2e-16, relative, on [-0.5, 0.5]
  static constexpr double POLYNOMIAL[] = {
      2.5678435993488206e-11, 4.4455382718708115e-10, 7.0549116208011232e-09, 1.0178086009239699e-07,
      1.3215486790144307e-06, 1.5252733804059840e-05, 1.5403530393381608e-04, 1.3333558146428443e-03,
      9.6181291076284769e-03, 5.5504108664821576e-02, 2.4022650695910072e-01, 6.9314718055994529e-01,
      1.0};
};

// A number of 8 bits: sign, four bits of exponent and three of mantissa (e4m3fn); NaN does not occur.
struct Fp8 {
  uint8_t bits;
};

// LANES bytes as integers; compilers take conversions of so many steps apart, lane by lane.
template <typename R, typename I>
inline typename VectorTypes<R>::Integers widen_bytes(const void* from) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<R, float>) {
    const __m128i bytes = _mm_loadu_si128(static_cast<const __m128i*>(from));
    return (typename VectorTypes<R>::Integers)(
        std::is_signed_v<I> ? _mm512_cvtepi8_epi32(bytes) : _mm512_cvtepu8_epi32(bytes));
  }
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<R, float>) {
    const __m128i bytes = _mm_loadl_epi64(static_cast<const __m128i*>(from));
    return (typename VectorTypes<R>::Integers)(
        std::is_signed_v<I> ? _mm256_cvtepi8_epi32(bytes) : _mm256_cvtepu8_epi32(bytes));
  }
#endif
  typedef I Bytes __attribute__((vector_size(LANES<R>)));
  Bytes bytes;
  std::memcpy(&bytes, from, sizeof bytes);
  return __builtin_convertvector(bytes, typename VectorTypes<R>::Integers);
}

// LANES numbers in the type of the arithmetic.
template <typename R, typename I>
inline Vector<R> widen(const I* from) {
  using Integers = typename VectorTypes<R>::Integers;
  if constexpr (std::is_same_v<I, R>) {
    return load(from);
  } else if constexpr (std::is_same_v<I, Fp8>) {
    const Integers bits = widen_bytes<R, uint8_t>(from);
    constexpr int mantissa = Exp2<R>::MANTISSA_BITS, bias = Exp2<R>::BIAS - 1;
    const auto value = [&](int exponent) {  // of a number with a point before the mantissa
      return (Vector<R>)(((bits & 0x7f) << (mantissa - 3)) + ((Integers{} + (bias + exponent)) << mantissa));
    };
    // Below 2^-6 the exponent is that of 2^-6, and nothing stands before the point.
    const Vector<R> size = (bits & 0x78) != 0 ? value(-7) : value(-6) - broadcast(R(0.015625));
    return (bits & 0x80) != 0 ? -size : size;
  } else if constexpr (std::is_same_v<I, int8_t>) {
    return __builtin_convertvector(widen_bytes<R, int8_t>(from), Vector<R>);
  } else {
    R value[LANES<R>];
    for (int lane = 0; lane < LANES<R>; lane++)
      value[lane] = static_cast<R>(from[lane]);
    return load(value);
  }
}

// 2 ** x; 0 below Exp2::LOWEST, and no more than 2 ** Exp2::HIGHEST, so that sums of many are finite.
template <typename V>
inline V exp2(V x) {
  using R = Element<V>;
  using Integers = typename VectorTypes<R>::Integers;
  using Constants = Exp2<R>;
  const V lowest = broadcast<R>(Constants::LOWEST), highest = broadcast<R>(Constants::HIGHEST);
  const Integers normal = x >= lowest;
  x = minimum(maximum(x, lowest), highest);
  // Truncated after being made positive: floor(x + 0.5).
  const Integers whole = __builtin_convertvector(x + broadcast<R>(Constants::BIAS + 0.5), Integers) - Constants::BIAS;
  const V part = x - __builtin_convertvector(whole, V);  // within 0.5 of 0
  V power = broadcast<R>(Constants::POLYNOMIAL[0]);
#pragma GCC unroll 16
  for (size_t term = 1; term < std::size(Constants::POLYNOMIAL); term++)
    power = multiply_add(power, part, broadcast<R>(Constants::POLYNOMIAL[term]));
  return (V)((((Integers)power) + (whole << Constants::MANTISSA_BITS)) & normal);
}

inline float exp2(float x) {
  return exp2(broadcast(x))[0];
}

inline double exp2(double x) {
  return exp2(broadcast(x))[0];
}

// Adds the weights of blocks by the largest logits of their tokens, `width` of them, whole vectors.
template <typename R>
void add_block_weights(const R* maxima, int64_t width, R* to) {
  Vector<R> tops = load(maxima), total{};
  for (int64_t block = LANES<R>; block < width; block += LANES<R>)
    tops = maximum(tops, load(maxima + block));
  const R top = reduce_max(tops);
  for (int64_t block = 0; block < width; block += LANES<R>)
    total += exp2(load(maxima + block) - top);
  const R norm = top + std::log2(reduce_sum(total));
  for (int64_t block = 0; block < width; block += LANES<R>)
    store(to + block, load(to + block) + exp2(load(maxima + block) - norm));
}

// Complete windows of `size` keys, `stride` apart, that end at or before a position.
inline int64_t windows_up_to(int64_t position, int64_t size, int64_t stride) {
  return position + 1 < size ? 0 : (position + 1 - size) / stride + 1;
}

// Top-k of the blocks [low, high), in no order: a block's score is the maximum over the windows that overlap it, of which
// [begin, end) have a score, negative where nothing of it is visible; where tokens are scored a block is the window. Ties
// go to the lower block.
template <typename R>
struct BlockRanking {
  int64_t windows_per_block, overhang;  // windows that begin in a block; windows of earlier blocks that reach into it

  template <typename C>
  explicit BlockRanking(const C& call)
      : windows_per_block(call.index_dims > 0 ? 1 : call.block_size / call.kernel_stride),
        overhang(call.index_dims > 0 ? 0 : call.kernel_size / call.kernel_stride - 1) {}

  template <typename Function>
  void each_best(const R* scores, int64_t begin, int64_t end, int64_t low, int64_t high, int64_t count, Function take) {
    keys_.clear();
    for (int64_t block = low; block < high; block++) {
      const int64_t from = std::max(begin, block * windows_per_block - overhang);
      const int64_t to = std::min(end, (block + 1) * windows_per_block);
      Key key = 0;  // of a block without a score
      if (from < to) {
        const R best = *std::max_element(scores + (from - begin), scores + (to - begin));
        Bits bits;  // of numbers that are not negative: ordered as they are
        std::memcpy(&bits, &best, sizeof bits);
        key = best < R{0} ? Key{0} : Key{bits} + 1;
      }
      keys_.push_back(key << 31 | static_cast<Key>(0x7fffffff - block));
    }
    std::nth_element(keys_.begin(), keys_.begin() + count, keys_.end(), std::greater<Key>());
    for (int64_t place = 0; place < count; place++)
      take(0x7fffffff - static_cast<int64_t>(keys_[place] & 0x7fffffff));
  }

 private:
  using Bits = std::conditional_t<std::is_same_v<R, float>, uint32_t, uint64_t>;
  using Key = std::conditional_t<std::is_same_v<R, float>, uint64_t, unsigned __int128>;  // a score, then a block
  std::vector<Key> keys_;
};

}  // namespace
}  // namespace infllm

#endif  // INFLLM_VECTORS_H
