// Gradient of block-sparse attention with the selected blocks held fixed.
//
// With the weights P rebuilt from the log-sum-exp: dV = P' dO, dS = P * (dO V' - delta) with delta = sum(dO * O),
// dQ = scale * dS K, dK = scale * dS' Q. The bias of a key gets the sums of dS; behind a cap dS is multiplied by its
// derivative. Tasks are those of the forward: a chunk of queries owns its dQ. Chunks of one
// head add to a block's dK and dV one after another, in the same order always: a chunk begins with a block when the one
// before it is done with that block. So chunks run at the same time, a block apart, and equal inputs give equal bits for
// any number of threads; memory is one copy of dK and dV in the type of the arithmetic.

#ifndef INFLLM_ATTENTION_BACKWARD_H
#define INFLLM_ATTENTION_BACKWARD_H

#include <atomic>
#include <thread>

#include "attention.h"

namespace infllm {
namespace {

constexpr int64_t BACKWARD_ROWS = 192;  // query rows whose weights and their gradients are held at once

// Strides of the gradient's tensors, of head and token; features are adjacent. Order: native.py, GRADIENT_FIELDS.
struct GradientStrides {
  int64_t grad_out[2], out[2], lse[1], grad_q[2], grad_k[2], grad_v[2], grad_bias[1];
};

template <typename T>
struct GradientTensors {
  const T *grad_out, *out;
  const Real<T>* lse;
  T *grad_q, *grad_k, *grad_v;
  Real<T>* grad_bias;  // [head][key], or null; added to
};

// to[i] += sum over rows of left[row * left_stride + i] * right[numbers[row] * right_stride ...], TILE_ROWS x PANEL.
template <typename R>
inline void add_transposed(
    const R* left, int64_t left_stride, const int64_t* numbers, int64_t count, const R* right, int64_t right_stride,
    R* const* to) {
  Vector<R> sums[TILE_ROWS][TILE_VECTORS];
  for (int row = 0; row < TILE_ROWS; row++)
    for (int column = 0; column < TILE_VECTORS; column++)
      sums[row][column] = load(to[row] + column * LANES<R>);
  for (int64_t step = 0; step < count; step++) {
    Vector<R> factors[TILE_VECTORS];
    for (int column = 0; column < TILE_VECTORS; column++)
      factors[column] = load(right + numbers[step] * right_stride + column * LANES<R>);
    for (int row = 0; row < TILE_ROWS; row++)
      for (int column = 0; column < TILE_VECTORS; column++)
        sums[row][column] = multiply_add(broadcast(left[step * left_stride + row]), factors[column], sums[row][column]);
  }
  for (int row = 0; row < TILE_ROWS; row++)
    for (int column = 0; column < TILE_VECTORS; column++)
      store(to[row] + column * LANES<R>, sums[row][column]);
}

// dK and dV of one head, [key][padded], the gradient of its biases, and how far each of its chunks has come.
template <typename R>
struct KeyGradients {
  std::vector<R> k, v, bias;
  std::vector<std::atomic<int64_t>> done;  // blocks that a chunk has added, in the order of chunks

  KeyGradients(int64_t keys, int64_t padded, int64_t padded_v, int64_t biases, int64_t chunks)
      : k(keys * padded), v(keys * padded_v), bias(biases), done(chunks) {}

  // Waits until the chunk before this one has added a block.
  void wait(int64_t chunk, int64_t block) const {
    while (chunk > 0 && done[chunk - 1].load(std::memory_order_acquire) <= block)
      std::this_thread::yield();
  }
};

// Gradient of a chunk of queries; a thread keeps its scratch from one chunk to the next.
template <typename T>
class ChunkGradient {
 public:
  using R = Real<T>;

  explicit ChunkGradient(const Call& call)
      : call_(call),
        padded_(round_up(call.dim, PANEL<R>)),
        padded_v_(round_up(call.dim_v, PANEL<R>)),
        padded_size_(round_up(call.block_size, PANEL<R>)),
        rows_(QueryChunk<T>::max_tokens(call) * call.group()),
        grad_out_(rows_ * padded_v_),
        grad_q_((rows_ + 1) * padded_),  // the last row belongs to no query
        lse_(rows_),
        delta_(rows_),
        keys_(call.block_size, call.dim),
        values_(call.block_size, call.dim_v),
        key_rows_(call.dim, call.block_size),
        // One row is spare; a tile of keys may read past the last row.
        weights_((BACKWARD_ROWS + 1) * padded_size_ + TILE_ROWS),
        slopes_((BACKWARD_ROWS + 1) * padded_size_ + TILE_ROWS),
        spare_(std::max(padded_, padded_v_)),
        bias_sums_(padded_size_),
        cap_slopes_(padded_size_),
        terms_(call.softcap, padded_size_),
        mask_(call) {}

  // Adds to the gradients of keys and values as chunk `number` of its head, and writes those of the chunk's queries. The
  // tensors begin at the first query of the group's first head.
  void run(
      const QueryChunk<T>& chunk, const GradientTensors<T>& tensors, const GradientStrides& strides,
      KeyGradients<R>& gradients, int64_t number) {
    chunk_ = &chunk;
    load_rows(tensors, strides);
    for (int64_t block = 0; block < chunk.blocks; block++) {
      chunk.rows_visiting(block, visiting_);
      if (!visiting_.empty())
        pack(block);
      gradients.wait(number, block);
      if (!visiting_.empty())
        add_block(block, gradients);
      gradients.done[number].store(block + 1, std::memory_order_release);
    }
    // The next chunk stands before this one and visits none of the later blocks.
    gradients.done[number].store(std::numeric_limits<int64_t>::max(), std::memory_order_release);
    for (int64_t row = 0; row < chunk.tokens * chunk.group; row++) {
      T* to = tensors.grad_q + row % chunk.group * strides.grad_q[0] + row / chunk.group * strides.grad_q[1];
      for (int64_t feature = 0; feature < call_.dim; feature++)
        to[feature] = static_cast<T>(grad_q_[row * padded_ + feature] * static_cast<R>(call_.scale));
    }
  }

 private:
  void load_rows(const GradientTensors<T>& tensors, const GradientStrides& strides) {
    const int64_t group = chunk_->group, rows = chunk_->tokens * group;
    std::fill_n(grad_q_.begin(), rows * padded_, R{0});
    for (int64_t row = 0; row < rows; row++) {
      const int64_t token = row / group, member = row % group;
      const T* from = tensors.grad_out + member * strides.grad_out[0] + token * strides.grad_out[1];
      const T* out = tensors.out + member * strides.out[0] + token * strides.out[1];
      R delta = 0;
      for (int64_t feature = 0; feature < call_.dim_v; feature++) {
        const R value = static_cast<R>(from[feature]);
        grad_out_[row * padded_v_ + feature] = value;
        delta += value * static_cast<R>(out[feature]);
      }
      const R lse = tensors.lse[member * strides.lse[0] + token];
      delta_[row] = delta;
      lse_[row] = std::isinf(lse) ? static_cast<R>(-HIDDEN) : lse * static_cast<R>(LOG2E);  // saw no key: weights are 0
    }
  }

  // Lays out the keys and values of a block, zeros for what no query sees.
  void pack(int64_t block) {
    const Head<T>& head = *chunk_->head;
    const int64_t count = mask_.open(head, block), base = block * call_.block_size;
    terms_.open(head.key_bias == nullptr ? nullptr : head.key_bias + base, count);
    if (count < call_.block_size)
      keys_.clear(), values_.clear(), key_rows_.clear();
    for (int64_t key = 0; key < count; key++) {
      const T* k = head.k + (base + key) * call_.stride_k[2];
      const T* v = head.v + (base + key) * call_.stride_v[2];
      for (int64_t feature = 0; feature < call_.dim; feature++)
        keys_.at(key, feature) = key_rows_.at(feature, key) = mask_.valid(key) ? static_cast<R>(k[feature]) : R{0};
      for (int64_t feature = 0; feature < call_.dim_v; feature++)
        values_.at(key, feature) = mask_.valid(key) ? static_cast<R>(v[feature]) : R{0};
    }
  }

  void add_block(int64_t block, KeyGradients<R>& gradients) {
    const int64_t total = visiting_.size(), base = block * call_.block_size;
    const bool whole = call_.block_size == padded_size_ &&
        mask_.seen_by_all(chunk_->position(visiting_.front()), chunk_->position(visiting_.back()));
    if (terms_.biased())
      std::fill(bias_sums_.begin(), bias_sums_.end(), R{0});
    for (int64_t from = 0; from < total; from += BACKWARD_ROWS) {
      const int64_t* rows = visiting_.data() + from;
      const int64_t count = std::min(BACKWARD_ROWS, total - from);
      for (int64_t row = 0; row < count; row += TILE_ROWS)
        differentiate_tile(rows + row, std::min<int64_t>(TILE_ROWS, count - row), row, whole);
      const R* queries = chunk_->queries.data();
      add_keys(weights_, rows, count, grad_out_.data(), padded_v_, gradients.v.data() + base * padded_v_);
      add_keys(slopes_, rows, count, queries, padded_, gradients.k.data() + base * padded_);
    }
    if (terms_.biased())
      for (int64_t key = 0; key < call_.block_size; key++)
        gradients.bias[base + key] += bias_sums_[key];
  }

  // Weights and their gradients of up to TILE_ROWS rows over the packed block, as rows `first` on; adds to dQ.
  void differentiate_tile(const int64_t* rows, int64_t real, int64_t first, bool whole) {
    const R *queries[TILE_ROWS], *grads[TILE_ROWS];
    R *weights[TILE_ROWS], *slopes[TILE_ROWS], *to[TILE_ROWS];
    const R ones[TILE_ROWS] = {1, 1, 1, 1, 1, 1};
    for (int64_t place = 0; place < TILE_ROWS; place++) {
      const int64_t row = rows[std::min(place, real - 1)], at = place < real ? first + place : BACKWARD_ROWS;
      queries[place] = chunk_->query(row), grads[place] = grad_out_.data() + row * padded_v_;
      weights[place] = weights_.data() + at * padded_size_, slopes[place] = slopes_.data() + at * padded_size_;
    }
    for (int64_t column = 0; column < padded_size_; column += PANEL<R>) {
      R *logits[TILE_ROWS], *products[TILE_ROWS];
      for (int64_t place = 0; place < TILE_ROWS; place++)
        logits[place] = weights[place] + column, products[place] = slopes[place] + column;
      multiply<false, R>(queries, call_.dim, keys_.panel(column / PANEL<R>), logits, nullptr);
      multiply<false, R>(grads, call_.dim_v, values_.panel(column / PANEL<R>), products, nullptr);
    }
    for (int64_t place = 0; place < real; place++) {
      const int64_t row = rows[place];
      if (terms_.any())
        terms_.apply(weights[place], cap_slopes_.data());
      if (!whole)
        mask_.hide(weights[place], padded_size_, chunk_->position(row));
      for (int64_t lane = 0; lane < padded_size_; lane += LANES<R>) {
        const Vector<R> weight = exp2(load(weights[place] + lane) - lse_[row]);
        store(weights[place] + lane, weight);
        store(slopes[place] + lane, weight * (load(slopes[place] + lane) - delta_[row]));
      }
      if (terms_.any())
        differentiate_terms(slopes[place]);
    }
    for (int64_t column = 0; column < padded_; column += PANEL<R>) {
      for (int64_t place = 0; place < TILE_ROWS; place++)
        to[place] = grad_q_.data() + (place < real ? rows[place] : rows_) * padded_ + column;
      multiply<true, R>(slopes, call_.block_size, key_rows_.panel(column / PANEL<R>), to, ones);
    }
  }

  // Adds the slopes of a row's logits to the sums of the biases, and makes them those of what is capped.
  void differentiate_terms(R* slopes) {
    for (int64_t lane = 0; lane < padded_size_; lane += LANES<R>) {
      const Vector<R> slope = load(slopes + lane);
      if (terms_.biased())
        store(bias_sums_.data() + lane, load(bias_sums_.data() + lane) + slope);
      if (terms_.cap.given)
        store(slopes + lane, slope * load(cap_slopes_.data() + lane));
    }
  }

  // Adds left' right to the gradients of a block's keys, [block_size][width].
  void add_keys(
      const std::vector<R>& left, const int64_t* rows, int64_t count, const R* right, int64_t width, R* gradients) {
    R* to[TILE_ROWS];
    for (int64_t key = 0; key < call_.block_size; key += TILE_ROWS)
      for (int64_t column = 0; column < width; column += PANEL<R>) {
        for (int64_t place = 0; place < TILE_ROWS; place++)
          to[place] = (key + place < call_.block_size ? gradients + (key + place) * width : spare_.data()) + column;
        add_transposed(left.data() + key, padded_size_, rows, count, right + column, width, to);
      }
  }

  const Call& call_;
  const int64_t padded_, padded_v_, padded_size_, rows_;
  std::vector<R> grad_out_, grad_q_, lse_, delta_;    // [row][padded_v_], [row][padded_], [row], [row]
  PackedColumns<R> keys_, values_, key_rows_;         // of the current block
  std::vector<R> weights_, slopes_;                   // P and dS, [BACKWARD_ROWS + 1][padded_size_]
  std::vector<R> spare_;                              // stands for keys after the last of a block
  std::vector<R> bias_sums_, cap_slopes_;             // of the current block, and of a row: [padded_size_]
  BlockTerms<R> terms_;                               // of the current block
  BlockMask mask_;
  std::vector<int64_t> visiting_;
  const QueryChunk<T>* chunk_ = nullptr;
};

// Gradients of one sequence: writes all of its grad_q, grad_k and grad_v.
template <typename T>
void attend_blocks_backward(
    const Call& call, const T* q, const T* k, const T* v, const bool* valid, const TermTensors<Real<T>>& terms,
    const BlockLists& lists, const GradientTensors<T>& tensors, const GradientStrides& strides) {
  using R = Real<T>;
  const std::vector<Head<T>> all_heads = heads_of_sequence(call, q, k, v, valid, terms);
  const int64_t group = call.group(), tokens = QueryChunk<T>::max_tokens(call), end = call.offset + call.length_q;
  const int64_t first = call.offset / call.query_block * call.query_block, chunks = ceil_div(end - first, tokens);
  const int64_t padded = round_up(call.dim, PANEL<R>), padded_v = round_up(call.dim_v, PANEL<R>);
  const int64_t keys = round_up(call.length_k, call.block_size);
  std::vector<std::unique_ptr<KeyGradients<R>>> gradients;
  for (int64_t head = 0; head < call.heads; head++)
    gradients.push_back(std::make_unique<KeyGradients<R>>(
        keys, padded, padded_v, tensors.grad_bias == nullptr ? 0 : keys, chunks));
  std::atomic<int64_t> next{0};  // tasks start in this order, so that what a task waits for has started
#pragma omp parallel
  {
    QueryChunk<T> chunk(call);
    ChunkGradient<T> gradient(call);
    for (int64_t task; (task = next.fetch_add(1)) < call.heads * chunks;) {
      const int64_t head = task % call.heads, number = task / call.heads;
      const int64_t base = first + (chunks - 1 - number) * tokens;  // those that visit most come first
      chunk.open(all_heads[head], std::max(base, call.offset), std::min(base + tokens, end));
      const int64_t query = chunk.begin - call.offset, member = head * group;
      chunk.visit_listed(lists.at(head, query), lists.slots);
      const GradientTensors<T> own = {
          tensors.grad_out + member * strides.grad_out[0] + query * strides.grad_out[1],
          tensors.out + member * strides.out[0] + query * strides.out[1],
          tensors.lse + member * strides.lse[0] + query,
          tensors.grad_q + member * strides.grad_q[0] + query * strides.grad_q[1],
          nullptr,
          nullptr,
          nullptr};
      gradient.run(chunk, own, strides, *gradients[head], number);
    }
#pragma omp barrier
#pragma omp for collapse(2)
    for (int64_t head = 0; head < call.heads; head++)
      for (int64_t key = 0; key < call.length_k; key++) {
        T* grad_k = tensors.grad_k + head * strides.grad_k[0] + key * strides.grad_k[1];
        T* grad_v = tensors.grad_v + head * strides.grad_v[0] + key * strides.grad_v[1];
        const R* from_k = gradients[head]->k.data() + key * padded;
        const R* from_v = gradients[head]->v.data() + key * padded_v;
        for (int64_t feature = 0; feature < call.dim; feature++)  // queries hold scale * log2(e)
          grad_k[feature] = static_cast<T>(from_k[feature] * static_cast<R>(1 / LOG2E));
        for (int64_t feature = 0; feature < call.dim_v; feature++)
          grad_v[feature] = static_cast<T>(from_v[feature]);
        if (tensors.grad_bias != nullptr)
          tensors.grad_bias[head * strides.grad_bias[0] + key] += gradients[head]->bias[key];
      }
  }
}

}  // namespace
}  // namespace infllm

#endif  // INFLLM_ATTENTION_BACKWARD_H
