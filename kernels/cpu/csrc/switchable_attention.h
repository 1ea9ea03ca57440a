// Switchable attention in one call, which packages compile in: dense for sequences shorter than dense_len, block-sparse
// from there on. Plain C++17 with vector extensions and OpenMP; depends on nothing but PyTorch's headers of 16-bit types.

#ifndef INFLLM_SWITCHABLE_ATTENTION_H
#define INFLLM_SWITCHABLE_ATTENTION_H

#include "attention.h"
#include "select_blocks.h"

namespace infllm {
namespace {

// The sequence of a batch row.
template <typename I>
Sequence sequence_of(const Call& call, int64_t row, const bool* key_mask, const I* offsets, int64_t offsets_count) {
  int64_t first = 0, end = call.length_k;
  if (key_mask != nullptr) {
    const bool* valid = key_mask + row * call.length_k;
    while (end > 0 && !valid[end - 1])
      end--;
    while (first < end && !valid[first])
      first++;
  }
  int64_t shift = call.offset;
  if (offsets != nullptr) {  // what follows the last query are free slots of a cache
    shift += static_cast<int64_t>(offsets[offsets_count == 1 ? 0 : row]);
    end = std::max(first, std::min(end, shift + call.length_q));
  }
  const int64_t start = shift - first, length = end - first;
  const int64_t begin = std::max<int64_t>(0, start);
  return {first, length, start, begin, std::max(begin, std::min(length, start + call.length_q))};
}

// Makes a head ready for selection.
template <typename T>
void compress(const Call& call, Head<T>& head) {
  const int64_t length = head.sequence.length;
  if (call.index_dims > 0) {
    std::vector<Real<T>> index(length * call.index_dims);
    for (int64_t key = 0; key < length; key++)
      store_index(call, head.k + key * call.stride_k[2], head.channels, index.data() + key * call.index_dims);
    take_index(call, head, index.data(), call.index_dims);
    return;
  }
  std::vector<T> k1(length / call.kernel_stride * call.dim), k2(k1.size() / COARSE_FACTOR + call.dim);
  const CompressedKeys<T> fine{k1.data(), call.dim}, coarse{k2.data(), call.dim};
  compress_keys(call, head.k, call.stride_k[2], length, fine, coarse);
  take_compressed(call, head, fine, coarse);
}

template <typename T>
struct SelectAndAttend {
  explicit SelectAndAttend(const Call& call) : selector(call), attention(call) {}

  BlockSelector<T> selector;
  ChunkAttention<T> attention;
};

// Attention of a call; `out` is [batch, length_q, heads_q, dim_v].
//
// key_mask: [batch, length_k], or null if all keys are valid. offsets: [offsets_count], 1 or one for each row of the
// batch, added to call.offset, which is the key index of the first query; or null. channels: those that token scores
// read, [heads][index_dims]; null for pooled scores. terms: a bias of keys, a row for each of the batch and of the heads,
// and sinks.
template <typename T, typename I>
void switchable_attention(
    const Call& call, const T* q, const T* k, const T* v, const bool* key_mask, const I* offsets,
    int64_t offsets_count, const int32_t* channels, const TermTensors<Real<T>>& terms, T* out) {
  const int64_t group = call.heads_q / std::max<int64_t>(1, call.heads), heads = call.batch * call.heads;
  const int64_t row_size = call.heads_q * call.dim_v;
  if (heads == 0 || call.length_q == 0)
    return;
  const auto rows_of = [&](int64_t number) {
    return out + number / call.heads * call.length_q * row_size + number % call.heads * group * call.dim_v;
  };
  std::vector<Head<T>> all_heads(heads);
#pragma omp parallel for schedule(dynamic)
  for (int64_t number = 0; number < heads; number++) {
    const int64_t row = number / call.heads, which = number % call.heads;
    Head<T>& head = all_heads[number];
    head.sequence = sequence_of(call, row, key_mask, offsets, offsets_count);
    const Sequence& sequence = head.sequence;
    head.q = q + row * call.stride_q[0] + which * group * call.stride_q[1];
    head.k = k + row * call.stride_k[0] + which * call.stride_k[1] + sequence.first * call.stride_k[2];
    head.v = v + row * call.stride_v[0] + which * call.stride_v[1] + sequence.first * call.stride_v[2];
    head.valid = key_mask == nullptr ? nullptr : key_mask + row * call.length_k + sequence.first;
    head.key_bias = terms.bias_of(row, which, sequence.first), head.sinks = terms.sinks_of(which * group);
    head.sparse = sequence.length >= call.dense_len;
    head.channels = channels == nullptr ? nullptr : channels + which * call.index_dims;
    for (int64_t query = 0; query < call.length_q; query++)
      if (query + sequence.start < sequence.begin || query + sequence.start >= sequence.end)
        std::fill_n(rows_of(number) + query * row_size, group * call.dim_v, static_cast<T>(0.0f));
    if (sequence.begin < sequence.end && head.sparse && needs_scores(call, sequence.length))
      compress(call, head);
  }
  each_chunk<T, SelectAndAttend<T>>(call, all_heads, [&](QueryChunk<T>& chunk, SelectAndAttend<T>& scratch, int64_t number) {
    if (chunk.head->sparse)
      scratch.selector.run(chunk);
    else
      chunk.visit_listed(nullptr, 0);
    T* to = rows_of(number) + (chunk.begin - chunk.head->sequence.start) * row_size;
    scratch.attention.run(chunk, {to, row_size, nullptr, 0});
  });
}

}  // namespace
}  // namespace infllm

#endif  // INFLLM_SWITCHABLE_ATTENTION_H
