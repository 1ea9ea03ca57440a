// Compressed keys, and block selection from them or from index keys (InfLLM-V2, arXiv 2509.24663, section 3.2).

#ifndef INFLLM_SELECT_BLOCKS_H
#define INFLLM_SELECT_BLOCKS_H

#include "token_scores.h"

namespace infllm {
namespace {

constexpr int64_t SCORED_ROWS = 96;  // query rows whose scores are held at once

// Compressed keys of one key/value head, [count][dim], `stride` numbers apart.
template <typename T>
struct CompressedKeys {
  T* data;
  int64_t stride;
};

// Adds numbers to others. Inductor compiles with -fno-tree-loop-vectorize.
template <typename T>
inline void add(Real<T>* to, const T* from, int64_t count) {
  int64_t at = 0;
  if constexpr (std::is_same_v<T, Real<T>>)
    for (; at + LANES<T> <= count; at += LANES<T>)
      store(to + at, load(to + at) + load(from + at));
  for (; at < count; at++)
    to[at] += static_cast<Real<T>>(from[at]);
}

// Means of all complete windows of `size` steps, `apart` steps after one another, from the sums of steps.
template <typename T>
void pool(
    const std::vector<Real<T>>& steps, int64_t step, int64_t dim, int64_t size, int64_t apart, CompressedKeys<T> to) {
  std::vector<Real<T>> total(dim);
  const int64_t count = windows_up_to(static_cast<int64_t>(steps.size()) / dim - 1, size, apart);
  for (int64_t window = 0; window < count; window++) {
    std::fill(total.begin(), total.end(), Real<T>{0});
    for (int64_t number = window * apart; number < window * apart + size; number++)
      add(total.data(), steps.data() + number * dim, dim);
    for (int64_t feature = 0; feature < dim; feature++)
      to.data[window * to.stride + feature] = static_cast<T>(total[feature] * (Real<T>{1} / (size * step)));
  }
}

// Writes K1 and K2 of one head's sequence.
template <typename T>
void compress_keys(
    const Call& call, const T* k, int64_t stride, int64_t length, CompressedKeys<T> k1, CompressedKeys<T> k2) {
  const int64_t step = call.kernel_stride, size = call.kernel_size / step, count = length / step;
  std::vector<Real<T>> steps(count * call.dim);
  for (int64_t key = 0; key < count * step; key++)
    add(steps.data() + key / step * call.dim, k + key * stride, call.dim);
  pool(steps, step, call.dim, size, 1, k1);
  pool(steps, step, call.dim, COARSE_FACTOR * size, COARSE_FACTOR, k2);
}

template <typename T>
std::unique_ptr<PackedColumns<Real<T>>> packed(CompressedKeys<T> keys, int64_t count, int64_t dim) {
  auto columns = std::make_unique<PackedColumns<Real<T>>>(count, dim);
  for (int64_t key = 0; key < count; key++)
    for (int64_t feature = 0; feature < dim; feature++)
      columns->at(key, feature) = static_cast<Real<T>>(keys.data[key * keys.stride + feature]);
  return columns;
}

// Whether some query may have more candidates than it visits.
inline bool needs_scores(const Call& call, int64_t length) {
  return length > call.selected_blocks * call.block_size;
}

// Makes a head ready for selection by tokens; `index` is [length][index_dims], `apart` numbers apart.
template <typename T>
void take_index(const Call& call, Head<T>& head, const Real<T>* index, int64_t apart) {
  head.index = std::make_unique<IndexColumns<Real<T>>>(call, head.sequence.length);
  for (int64_t key = 0; key < head.sequence.length; key++)
    if (head.valid == nullptr || head.valid[key])
      head.index->set(key, index + key * apart);
}

// Makes a head ready for selection by compressed keys.
template <typename T>
void take_compressed(const Call& call, Head<T>& head, CompressedKeys<T> k1, CompressedKeys<T> k2) {
  const int64_t last = head.sequence.length - 1, size = call.kernel_size, step = call.kernel_stride;
  head.k1 = packed(k1, windows_up_to(last, size, step), call.dim);
  if (!call.exact)
    head.k2 = packed(k2, windows_up_to(last, COARSE_FACTOR * size, COARSE_FACTOR * step), call.dim);
}

// Selects the blocks of a chunk's queries; a thread keeps its scratch from one chunk to the next.
template <typename T>
class BlockSelector {
 public:
  using R = Real<T>;

  explicit BlockSelector(const Call& call)
      : call_(call), cap_(call.softcap), logits_(TILE_ROWS * PANEL<R>), ranking_(call), tokens_(call) {}

  void run(QueryChunk<T>& chunk) {
    chunk_ = &chunk;
    const int64_t share = call_.query_block;
    scored_.clear();
    for (int64_t token = 0; token < chunk.tokens;) {
      const int64_t position = chunk.begin + token;
      const int64_t tokens = std::min(share - position % share, chunk.tokens - token);
      const int64_t last = std::min(position / share * share + share, chunk.head->sequence.length) - 1;
      const int64_t own = last / call_.block_size, first = chunk.first_block(last);
      if (own - first < call_.selected_blocks) {
        if (!scored_.empty())  // windows touch one block more or less
          take_best();
        chunk.visit(token, tokens, first, own + 1);
      } else {
        chunk.visit(token, tokens, first, call_.init_blocks);
        chunk.visit(token, tokens, std::max(first, own - call_.local_blocks), own + 1);
        const int64_t forced = std::max<int64_t>(0, call_.init_blocks - first) + call_.local_blocks + 1;
        scored_.push_back({token, tokens, last, std::max(first, call_.init_blocks), own - call_.local_blocks,
                           call_.selected_blocks - forced});
        if (static_cast<int64_t>(scored_.size()) * share * chunk.group >= SCORED_ROWS)
          take_best();
      }
      token += tokens;
    }
    if (!scored_.empty())
      take_best();
  }

 private:
  // Scores the tiles in `scored_`, takes their best blocks, and empties the list.
  void take_best() {
    const int64_t size = call_.kernel_size, step = call_.kernel_stride;
    const bool by_tokens = call_.index_dims > 0;
    const int64_t width = by_tokens ? tokens_.run(*chunk_, scored_, scores_) : score_windows();
    for (size_t number = 0; number < scored_.size(); number++) {
      const SharedTile& tile = scored_[number];
      const int64_t seen = by_tokens ? tile.last / call_.block_size + 1 : windows_up_to(tile.last, size, step);
      ranking_.each_best(
          scores_.data() + number * width, 0, seen, tile.low, tile.high, tile.free,
          [&](int64_t block) { chunk_->visit(tile.token, tile.tokens, block, block + 1); });
    }
    scored_.clear();
  }

  // Scores of all windows up to those of the last tile, [tile][width]; returns the width.
  int64_t score_windows() {
    const int64_t size = call_.kernel_size, step = call_.kernel_stride, group = chunk_->group;
    const int64_t factor = call_.exact ? 1 : COARSE_FACTOR;
    const int64_t begin = scored_.front().token, end = scored_.back().token + scored_.back().tokens;
    const int64_t rows = (end - begin) * group;
    tile_of_.resize(rows), seen_.resize(rows);
    for (size_t tile = 0; tile < scored_.size(); tile++) {
      const SharedTile& each = scored_[tile];
      const int64_t from = (each.token - begin) * group;
      std::fill_n(tile_of_.begin() + from, each.tokens * group, tile);
      std::fill_n(seen_.begin() + from, each.tokens * group, windows_up_to(each.last, factor * size, factor * step));
    }
    normalise(begin * group, rows);
    const int64_t count = windows_up_to(scored_.back().last, size, step), width = round_up(count, PANEL<R>);
    scores_.assign(scored_.size() * width, R{0});
    each_panel(*chunk_->head->k1, begin * group, rows, count, [&](int64_t row, int64_t column, R* logits) {
      R* to = scores_.data() + tile_of_[row] * width + column;
      for (int lane = 0; lane < PANEL<R>; lane += LANES<R>)
        store(to + lane, load(to + lane) + exp2(load(logits + lane) - lse_[row]));
    });
    return width;
  }

  // Log-sum-exp of each row's logits over the visible normalising keys; where none is visible all scores are to be 0.
  void normalise(int64_t first, int64_t rows) {
    lse_.assign(rows, static_cast<R>(HIDDEN)), totals_.assign(rows, R{0});
    const PackedColumns<R>& keys = call_.exact ? *chunk_->head->k1 : *chunk_->head->k2;
    each_panel(keys, first, rows, seen_.back(), [&](int64_t row, int64_t column, R* logits) {
      for (int64_t lane = std::max<int64_t>(0, seen_[row] - column); lane < PANEL<R>; lane++)
        logits[lane] = static_cast<R>(HIDDEN);
      Vector<R> tops = load(logits), total{};
      for (int lane = LANES<R>; lane < PANEL<R>; lane += LANES<R>)
        tops = maximum(tops, load(logits + lane));
      const R top = std::max(lse_[row], reduce_max(tops));
      for (int lane = 0; lane < PANEL<R>; lane += LANES<R>)
        total += exp2(load(logits + lane) - top);
      totals_[row] = totals_[row] * exp2(lse_[row] - top) + reduce_sum(total);
      lse_[row] = top;
    });
    for (int64_t row = 0; row < rows; row++)
      lse_[row] = seen_[row] > 0 ? lse_[row] + std::log2(totals_[row]) : static_cast<R>(-HIDDEN);
  }

  // Hands out the capped products of `rows` rows, from `first` on, with the first `count` columns, a row and a panel at a time.
  template <typename Function>
  void each_panel(const PackedColumns<R>& columns, int64_t first, int64_t rows, int64_t count, Function take) {
    const R* tile[TILE_ROWS];
    R* logits[TILE_ROWS];
    for (int64_t column = 0; column < count; column += PANEL<R>)
      for (int64_t row = 0; row < rows; row += TILE_ROWS) {
        const int64_t real = std::min<int64_t>(TILE_ROWS, rows - row);
        for (int64_t place = 0; place < TILE_ROWS; place++) {
          tile[place] = chunk_->query(first + row + std::min(place, real - 1));
          logits[place] = logits_.data() + place * PANEL<R>;
        }
        multiply<false, R>(tile, call_.dim, columns.panel(column / PANEL<R>), logits, nullptr);
        if (cap_.given)
          cap_.cap_visible(logits_.data(), TILE_ROWS * PANEL<R>);
        for (int64_t place = 0; place < real; place++)
          take(row + place, column, logits[place]);
      }
  }

  const Call& call_;
  const SoftCap<R> cap_;
  QueryChunk<T>* chunk_ = nullptr;
  std::vector<R> logits_;               // [TILE_ROWS][PANEL]
  std::vector<SharedTile> scored_;
  std::vector<int64_t> tile_of_, seen_;  // of a row: its tile, and how many normalising keys it sees
  std::vector<R> lse_, totals_, scores_;
  BlockRanking<R> ranking_;
  TokenScores<T> tokens_;
};

// The blocks that every query visits of heads that are ready, ascending, then -1: [heads][length_q][selected_blocks].
template <typename T>
void select_of_heads(const Call& call, const std::vector<Head<T>>& all_heads, int32_t* blocks) {
  each_chunk<T, BlockSelector<T>>(call, all_heads, [&](QueryChunk<T>& chunk, BlockSelector<T>& selector, int64_t head) {
    selector.run(chunk);
    int32_t* to = blocks + (head * call.length_q + chunk.begin - call.offset) * call.selected_blocks;
    for (int64_t token = 0; token < chunk.tokens; token++, to += call.selected_blocks) {
      int64_t place = 0;
      for (int64_t block = 0; block < chunk.blocks; block++)
        if (chunk.visits[block * chunk.tokens + token])
          to[place++] = static_cast<int32_t>(block);
      std::fill(to + place, to + call.selected_blocks, -1);
    }
  });
}

// The same for one sequence, by K1 and K2, which are read where a query has more candidates than it visits.
template <typename T>
void select_blocks(
    const Call& call, const T* q, CompressedKeys<T> k1, int64_t head_stride1, CompressedKeys<T> k2,
    int64_t head_stride2, int32_t* blocks) {
  std::vector<Head<T>> all_heads = heads_of_sequence<T>(call, q, nullptr, nullptr, nullptr, {});
  if (needs_scores(call, call.length_k)) {
#pragma omp parallel for schedule(dynamic)
    for (int64_t head = 0; head < call.heads; head++)
      take_compressed<T>(
          call, all_heads[head], {k1.data + head * head_stride1, k1.stride}, {k2.data + head * head_stride2, k2.stride});
  }
  select_of_heads(call, all_heads, blocks);
}

// The same by index keys, [heads][length_k][index_dims] with strides of heads and keys; `valid` is of keys, or null.
template <typename T>
void select_by_tokens(
    const Call& call, const T* q, const Real<T>* index, const int64_t* strides, const bool* valid,
    const int32_t* channels, int32_t* blocks) {
  std::vector<Head<T>> all_heads = heads_of_sequence<T>(call, q, nullptr, nullptr, valid, {});
#pragma omp parallel for schedule(dynamic)
  for (int64_t head = 0; head < call.heads; head++) {
    all_heads[head].channels = channels + head * call.index_dims;
    if (needs_scores(call, call.length_k))
      take_index(call, all_heads[head], index + head * strides[0], strides[1]);
  }
  select_of_heads(call, all_heads, blocks);
}

}  // namespace
}  // namespace infllm

#endif  // INFLLM_SELECT_BLOCKS_H
