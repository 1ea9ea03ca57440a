// Block-sparse attention, forward (InfLLM-V2, arXiv 2509.24663, section 3.1).
//
// A task is one key/value head and a chunk of adjacent queries. It goes through the blocks in ascending order: keys and
// values of a block are packed once, and all query rows that visit it meet them in tiles of TILE_ROWS x PANEL, with an
// online softmax from block to block. The work is what was selected, however scattered the choices are. Logits are in
// units of log 2.

#ifndef INFLLM_ATTENTION_H
#define INFLLM_ATTENTION_H

#include "query_chunk.h"

namespace infllm {
namespace {

// The output of a chunk: [token][head][dim_v], and the log-sum-exp or null, with the stride of its heads.
template <typename T>
struct Output {
  T* out;
  int64_t token_stride;
  Real<T>* lse;
  int64_t lse_stride;
};

// Attention of a chunk of queries; a thread keeps its scratch from one chunk to the next.
template <typename T>
class ChunkAttention {
 public:
  using R = Real<T>;

  explicit ChunkAttention(const Call& call)
      : call_(call),
        padded_v_(round_up(call.dim_v, PANEL<R>)),
        padded_size_(round_up(call.block_size, PANEL<R>)),
        rows_(QueryChunk<T>::max_tokens(call) * call.group()),
        sums_((rows_ + 1) * padded_v_),  // the last row belongs to no query
        totals_(rows_ * LANES<R>),
        tops_(rows_),
        keys_(call.block_size, call.dim),
        values_(call.dim_v, call.block_size),
        weights_(TILE_ROWS * padded_size_),
        terms_(call.softcap, padded_size_),
        mask_(call) {}

  void run(const QueryChunk<T>& chunk, const Output<T>& output) {
    chunk_ = &chunk;
    const int64_t rows = chunk.tokens * chunk.group;
    std::fill_n(sums_.begin(), rows * padded_v_, R{0});
    std::fill_n(totals_.begin(), rows * LANES<R>, R{0});
    std::fill_n(tops_.begin(), rows, static_cast<R>(HIDDEN));
    if (chunk.head->sinks != nullptr)
      begin_with_sinks(rows);
    for (int64_t block = 0; block < chunk.blocks; block++) {
      chunk.rows_visiting(block, visiting_);
      if (visiting_.empty())
        continue;
      pack(block);
      const int64_t total = visiting_.size();
      const bool whole = call_.block_size == padded_size_ &&
          mask_.seen_by_all(chunk.position(visiting_.front()), chunk.position(visiting_.back()));
      for (int64_t from = 0; from < total; from += TILE_ROWS)
        add_tile(visiting_.data() + from, std::min<int64_t>(TILE_ROWS, total - from), whole);
    }
    write(output);
  }

 private:
  // A sink is what a row has summed before its first block: a weight of 1, without a value.
  void begin_with_sinks(int64_t rows) {
    for (int64_t row = 0; row < rows; row++) {
      const R logit = sink_logit(chunk_->head->sinks, row % chunk_->group);
      if (logit > static_cast<R>(HIDDEN))
        tops_[row] = logit, totals_[row * LANES<R>] = R{1};
    }
  }

  // Lays out the keys and values of a block, zeros for what no query sees.
  void pack(int64_t block) {
    const Head<T>& head = *chunk_->head;
    const int64_t count = mask_.open(head, block), base = block * call_.block_size;
    terms_.open(head.key_bias == nullptr ? nullptr : head.key_bias + base, count);
    if (count < call_.block_size)
      keys_.clear(), values_.clear();
    for (int64_t key = 0; key < count; key++) {
      const T* k = head.k + (base + key) * call_.stride_k[2];
      const T* v = head.v + (base + key) * call_.stride_v[2];
      for (int64_t feature = 0; feature < call_.dim; feature++)
        keys_.at(key, feature) = mask_.valid(key) ? static_cast<R>(k[feature]) : R{0};
      for (int64_t feature = 0; feature < call_.dim_v; feature++)
        values_.at(feature, key) = mask_.valid(key) ? static_cast<R>(v[feature]) : R{0};
    }
  }

  // Adds the packed block to the sums of up to TILE_ROWS rows. `whole`: they see all of it.
  void add_tile(const int64_t* rows, int64_t real, bool whole) {
    const R* tile[TILE_ROWS];
    R* to[TILE_ROWS];
    R decay[TILE_ROWS];
    for (int64_t place = 0; place < TILE_ROWS; place++)
      tile[place] = chunk_->query(rows[std::min(place, real - 1)]);
    for (int64_t column = 0; column < padded_size_; column += PANEL<R>) {
      for (int64_t place = 0; place < TILE_ROWS; place++)
        to[place] = weights_.data() + place * padded_size_ + column;
      multiply<false, R>(tile, call_.dim, keys_.panel(column / PANEL<R>), to, nullptr);
    }
    for (int64_t place = 0; place < TILE_ROWS; place++) {
      tile[place] = weights_.data() + place * padded_size_;
      decay[place] = place < real ? softmax(weights_.data() + place * padded_size_, rows[place], whole) : R{1};
    }
    for (int64_t column = 0; column < padded_v_; column += PANEL<R>) {
      for (int64_t place = 0; place < TILE_ROWS; place++)
        to[place] = sums_.data() + (place < real ? rows[place] : rows_) * padded_v_ + column;
      multiply<true, R>(tile, call_.block_size, values_.panel(column / PANEL<R>), to, decay);
    }
  }

  // Turns the logits of a row into weights and adds these to its total. Returns the factor of what was summed before.
  R softmax(R* logits, int64_t row, bool whole) {
    if (terms_.any())
      terms_.apply(logits, nullptr);
    if (!whole)
      mask_.hide(logits, padded_size_, chunk_->position(row));
    Vector<R> maxima = load(logits);
    for (int64_t lane = LANES<R>; lane < padded_size_; lane += LANES<R>)
      maxima = maximum(maxima, load(logits + lane));
    const R old = tops_[row], top = std::max(old, reduce_max(maxima));
    if (top <= static_cast<R>(0.5 * HIDDEN)) {  // no key was seen yet
      std::fill_n(logits, padded_size_, R{0});
      return R{1};
    }
    const R decay = old == top ? R{1} : exp2(old - top);
    Vector<R> total = load(totals_.data() + row * LANES<R>) * decay;
    for (int64_t lane = 0; lane < padded_size_; lane += LANES<R>) {
      const Vector<R> weights = exp2(load(logits + lane) - top);
      store(logits + lane, weights);
      total += weights;
    }
    store(totals_.data() + row * LANES<R>, total);
    tops_[row] = top;
    return decay;
  }

  // Stores the results; a query that saw no key gives 0 and -inf, or its sink.
  void write(const Output<T>& output) const {
    for (int64_t row = 0; row < chunk_->tokens * chunk_->group; row++) {
      const int64_t token = row / chunk_->group, member = row % chunk_->group;
      const R total = reduce_sum(load(totals_.data() + row * LANES<R>));
      const R share = total > R{0} ? R{1} / total : R{0};
      T* to = output.out + token * output.token_stride + member * call_.dim_v;
      for (int64_t feature = 0; feature < call_.dim_v; feature++)
        to[feature] = static_cast<T>(sums_[row * padded_v_ + feature] * share);
      if (output.lse != nullptr)
        output.lse[member * output.lse_stride + token] = total > R{0}
            ? (tops_[row] + std::log2(total)) / static_cast<R>(LOG2E)
            : -std::numeric_limits<R>::infinity();
    }
  }

  const Call& call_;
  const int64_t padded_v_, padded_size_, rows_;
  std::vector<R> sums_, totals_, tops_;  // [row][padded_v_], [row][LANES], [row]
  PackedColumns<R> keys_, values_;       // of the current block
  std::vector<R> weights_;               // [TILE_ROWS][padded_size_]
  BlockTerms<R> terms_;                  // the same
  BlockMask mask_;
  std::vector<int64_t> visiting_;
  const QueryChunk<T>* chunk_ = nullptr;
};

// Block numbers of each query of one sequence, `slots` for each, -1 in unused places; null: all blocks that it sees.
struct BlockLists {
  const int32_t* data;
  int64_t head_stride, slots;

  const int32_t* at(int64_t head, int64_t query) const {
    return data == nullptr ? nullptr : data + head * head_stride + query * slots;
  }
};

// Attention of one sequence; `out` is [length_q][heads_q][dim_v].
template <typename T>
void attend_blocks(
    const Call& call, const T* q, const T* k, const T* v, const bool* valid, const TermTensors<Real<T>>& terms,
    const BlockLists& lists, T* out, Real<T>* lse, int64_t lse_stride) {
  const std::vector<Head<T>> all_heads = heads_of_sequence(call, q, k, v, valid, terms);
  each_chunk<T, ChunkAttention<T>>(call, all_heads, [&](QueryChunk<T>& chunk, ChunkAttention<T>& attention, int64_t head) {
    const int64_t query = chunk.begin - call.offset, row_size = call.heads_q * call.dim_v;
    chunk.visit_listed(lists.at(head, query), lists.slots);
    attention.run(
        chunk, {out + query * row_size + head * chunk.group * call.dim_v, row_size,
                lse + head * chunk.group * lse_stride + query, lse_stride});
  });
}

}  // namespace
}  // namespace infllm

#endif  // INFLLM_ATTENTION_H
