// What scores have beside a mask: a soft cap, a bias of each key, and sinks, logits of heads that have no value. Logits
// are in units of log 2.

#ifndef INFLLM_SCORE_TERMS_H
#define INFLLM_SCORE_TERMS_H

#include "vectors.h"

namespace infllm {
namespace {

constexpr double LEAST_BIAS = -1e29;  // what is below hides its key: kernels/params.py

// The tensors of a call's terms, null where it has none. Keys of the bias are adjacent.
template <typename R>
struct TermTensors {
  const R* key_bias = nullptr;         // of batch row, head and key
  int64_t bias_stride[2] = {0, 0};     // of batch row and head, 0 where one bias serves all
  const R* sinks = nullptr;            // [heads_q]

  TermTensors() = default;

  TermTensors(const R* bias, const int64_t* strides, const R* of_heads) : key_bias(bias), sinks(of_heads) {
    if (bias != nullptr)
      bias_stride[0] = strides[0], bias_stride[1] = strides[1];
  }

  // The bias of a row's and head's keys from key `first` on, or null.
  const R* bias_of(int64_t row, int64_t head, int64_t first) const {
    return key_bias == nullptr ? nullptr : key_bias + row * bias_stride[0] + head * bias_stride[1] + first;
  }

  // The sinks of the query heads from `head` on, or null.
  const R* sinks_of(int64_t head) const {
    return sinks == nullptr ? nullptr : sinks + head;
  }
};

// A sink as a logit; HIDDEN where there is none to count.
template <typename R>
inline R sink_logit(const R* sinks, int64_t head) {
  return sinks != nullptr && sinks[head] >= static_cast<R>(LEAST_BIAS) ? sinks[head] * static_cast<R>(LOG2E)
                                                                       : static_cast<R>(HIDDEN);
}

// x -> cap * tanh(x / cap).
template <typename R>
class SoftCap {
 public:
  // `softcap` is that of natural logits; 0: none.
  explicit SoftCap(double softcap)
      : given(softcap != 0.0), cap_(static_cast<R>(softcap * LOG2E)),
        inverse_(given ? static_cast<R>(1.0 / (softcap * LOG2E)) : R{0}),
        power_(given ? static_cast<R>(2.0 / softcap) : R{0}) {}

  // With u = exp(2 y) - 1, tanh(y) = u / (u + 2), which is exact to rounding near 0 too.
  Vector<R> operator()(Vector<R> x) const {
    using Integers = typename VectorTypes<R>::Integers;
    const Vector<R> highest = broadcast<R>(FLAT);
    const Vector<R> power = minimum(maximum(x * power_, -highest), highest);  // of 2 in exp(2 y)
    // Truncated after being made positive: floor(power + 0.5).
    const Integers whole = __builtin_convertvector(power + broadcast<R>(FLAT + 1.5), Integers) - (FLAT + 1);
    const Vector<R> part = power - __builtin_convertvector(whole, Vector<R>);  // within 0.5 of 0
    Vector<R> sum = broadcast<R>(static_cast<R>(Exp2<double>::POLYNOMIAL[FIRST]));
#pragma GCC unroll 16
    for (size_t term = FIRST + 1; term + 1 < std::size(Exp2<double>::POLYNOMIAL); term++)
      sum = multiply_add(sum, part, broadcast<R>(static_cast<R>(Exp2<double>::POLYNOMIAL[term])));
    const Vector<R> scale = (Vector<R>)((whole + (Exp2<R>::BIAS - 1)) << Exp2<R>::MANTISSA_BITS);
    const Vector<R> u = multiply_add(scale, sum * part, scale - R{1});
    return u / (u + R{2}) * cap_;
  }

  // The derivative where the result is `capped`.
  Vector<R> slope(Vector<R> capped) const {
    const Vector<R> tanh = capped * inverse_;
    return R{1} - tanh * tanh;
  }

  // Caps logits, whole vectors of them, but for those that are hidden.
  void cap_visible(R* logits, int64_t count) const {
    const Vector<R> hidden = broadcast<R>(static_cast<R>(0.5 * HIDDEN));
    for (int64_t lane = 0; lane < count; lane += LANES<R>) {
      const Vector<R> x = load(logits + lane);
      store(logits + lane, x <= hidden ? x : (*this)(x));
    }
  }

  const bool given;

 private:
  static constexpr int FLAT = std::is_same_v<R, float> ? 30 : 60;  // 2^-FLAT is lost beside 1
  static constexpr size_t FIRST = std::is_same_v<R, float> ? 5 : 0;  // powers of `part` that count: 7 or 12, from the highest
  const R cap_, inverse_, power_;
};

// The cap, and the biases of the block at hand, padded to whole panels.
template <typename R>
class BlockTerms {
 public:
  BlockTerms(double softcap, int64_t padded_size) : cap(softcap), biases_(padded_size) {}

  // Takes the biases of a block's first `count` keys, or null for none.
  void open(const R* key_bias, int64_t count) {
    biased_ = key_bias != nullptr;
    if (!biased_)
      return;
    std::fill(biases_.begin(), biases_.end(), R{0});
    for (int64_t key = 0; key < count; key++)
      biases_[key] = key_bias[key] >= static_cast<R>(LEAST_BIAS) ? key_bias[key] * static_cast<R>(LOG2E) : R{0};
  }

  bool biased() const {
    return biased_;
  }

  // Whether logits change.
  bool any() const {
    return cap.given || biased_;
  }

  // Changes the logits of one row; `slopes`, if not null, gets the derivatives of the cap. Not inlined, so that what has
  // no terms keeps its registers.
  __attribute__((noinline)) void apply(R* logits, R* slopes) const {
    const SoftCap<R> own = cap;
    const int64_t count = biases_.size();
    if (own.given)
      for (int64_t lane = 0; lane < count; lane += LANES<R>) {
        const Vector<R> x = own(load(logits + lane));
        store(logits + lane, x);
        if (slopes != nullptr)
          store(slopes + lane, own.slope(x));
      }
    if (biased_)
      for (int64_t lane = 0; lane < count; lane += LANES<R>)
        store(logits + lane, load(logits + lane) + load(biases_.data() + lane));
  }

  const SoftCap<R> cap;

 private:
  bool biased_ = false;
  std::vector<R> biases_;  // [padded_size]
};

}  // namespace
}  // namespace infllm

#endif  // INFLLM_SCORE_TERMS_H
