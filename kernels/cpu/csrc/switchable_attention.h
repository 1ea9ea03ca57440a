// Switchable attention on the CPU (InfLLM-V2, arXiv 2509.24663, section 3): dense for sequences shorter than dense_len,
// block-sparse from there on. Plain C++17 with vector extensions and OpenMP: packages compile it in and depend on nothing
// but PyTorch's headers of 16-bit types.
//
// A task is one key/value head and a chunk of adjacent queries. It selects the blocks of every query, then goes through
// the blocks in ascending order: keys and values of a block are packed once, and all query rows that visit it meet them
// in tiles of TILE_ROWS x PANEL, softmax being carried from block to block. The work is what was selected, however
// scattered the choices are. Arithmetic is float32; logits are kept in units of log 2.
//
// Scratch: compressed keys, 5 / 64 of the keys for the default geometry; and in each thread CHUNK_ROWS rows of queries
// and sums, scores of SCORED_ROWS rows, and one byte for each block and token of a chunk.

#ifndef INFLLM_SWITCHABLE_ATTENTION_H
#define INFLLM_SWITCHABLE_ATTENTION_H

#include <limits>
#include <memory>
#include <type_traits>

#include "vectors.h"

namespace infllm {
namespace {  // of the library that it is compiled into: another in the process may be for another processor

#if defined(__AVX512F__)
constexpr int COLUMNS = 4;
#else
constexpr int COLUMNS = 2;
#endif

constexpr int TILE_ROWS = 6;            // with COLUMNS vectors each: what the registers hold
constexpr int PANEL = LANES * COLUMNS;  // columns of a packed matrix that are stored together
constexpr int64_t CHUNK_ROWS = 768;     // query rows (tokens x group) of a task: queries and sums fit the L2 cache
constexpr int64_t SCORED_ROWS = 96;     // query rows whose scores are held at once

struct Call {
  int64_t batch, heads_q, heads, length_q, length_k, dim, dim_v;
  int64_t stride_q[3], stride_k[3], stride_v[3];  // of batch, head and token; features are adjacent
  int64_t offset, window, dense_len;              // window: keys, more than length_k if there is none
  int64_t kernel_size, kernel_stride, block_size, init_blocks, local_blocks, selected_blocks, exact, query_block;
  float scale;
};

// The valid stretch of a batch row. Positions count from its first key.
struct Sequence {
  int64_t first, length;  // keys
  int64_t start;          // position of query 0, negative if it stands before the sequence
  int64_t begin, end;     // positions of the queries that exist
};

// TILE_ROWS rows of `depth` numbers times one panel. With `faded`: to[i] = to[i] * fading[i] + product; else the product.
template <bool faded>
inline void multiply(
    const float* const* rows, int64_t depth, const float* panel, float* const* to, const float* fading) {
  Vector sums[TILE_ROWS][COLUMNS];
  for (int row = 0; row < TILE_ROWS; row++)
    for (int column = 0; column < COLUMNS; column++)
      sums[row][column] = faded ? load(to[row] + column * LANES) * fading[row] : Vector{};
  const float *row0 = rows[0], *row1 = rows[1], *row2 = rows[2], *row3 = rows[3], *row4 = rows[4], *row5 = rows[5];
  static_assert(TILE_ROWS == 6, "the rows are written out");
  for (int64_t step = 0; step < depth; step++) {
    Vector factors[COLUMNS];
    for (int column = 0; column < COLUMNS; column++)
      factors[column] = load(panel + step * PANEL + column * LANES);
    const float values[TILE_ROWS] = {row0[step], row1[step], row2[step], row3[step], row4[step], row5[step]};
    for (int row = 0; row < TILE_ROWS; row++)
      for (int column = 0; column < COLUMNS; column++)
        sums[row][column] = multiply_add(all(values[row]), factors[column], sums[row][column]);
  }
  for (int row = 0; row < TILE_ROWS; row++)
    for (int column = 0; column < COLUMNS; column++)
      store(to[row] + column * LANES, sums[row][column]);
}

// Vectors of `dim` numbers as columns of panels: [ceil(count / PANEL)][dim][PANEL], zeros after the last one.
class Columns {
 public:
  Columns(int64_t count, int64_t dim) : dim_(dim), numbers_(ceil_div(count, PANEL) * PANEL * dim) {}

  float& at(int64_t column, int64_t feature) {
    return numbers_[(column / PANEL * dim_ + feature) * PANEL + column % PANEL];
  }

  const float* panel(int64_t number) const {
    return numbers_.data() + number * dim_ * PANEL;
  }

  void clear() {
    std::fill(numbers_.begin(), numbers_.end(), 0.0f);
  }

 private:
  int64_t dim_;
  std::vector<float> numbers_;
};

// Adds numbers to others. Inductor compiles with -fno-tree-loop-vectorize.
template <typename T>
inline void add(float* to, const T* from, int64_t count) {
  int64_t at = 0;
  if constexpr (std::is_same_v<T, float>)
    for (; at + LANES <= count; at += LANES)
      store(to + at, load(to + at) + load(from + at));
  for (; at < count; at++)
    to[at] += static_cast<float>(from[at]);
}

// Sums of `step` adjacent keys, [length / step][dim].
template <typename T>
std::vector<float> sums_of_steps(const T* keys, int64_t stride, int64_t length, int64_t dim, int64_t step) {
  const int64_t count = length / step;
  std::vector<float> sums(count * dim);
  for (int64_t key = 0; key < count * step; key++)
    add(sums.data() + key / step * dim, keys + key * stride, dim);
  return sums;
}

// Means of `count` windows, rounded to the type T of the keys, from sums of steps: a window is `steps` of them and begins
// `apart` after the one before. Each number goes to `take`: window, feature, number.
template <typename T, typename Function>
void means(
    const std::vector<float>& sums,
    int64_t dim,
    int64_t count,
    int64_t steps,
    int64_t apart,
    int64_t size,
    Function take) {
  std::vector<float> total(dim);
  for (int64_t window = 0; window < count; window++) {
    std::fill(total.begin(), total.end(), 0.0f);
    for (int64_t step = window * apart; step < window * apart + steps; step++)
      add(total.data(), sums.data() + step * dim, dim);
    for (int64_t feature = 0; feature < dim; feature++)
      take(window, feature, static_cast<T>(total[feature] * (1.0f / size)));
  }
}

// Compressed keys as columns.
template <typename T>
std::unique_ptr<Columns> columns_of(const T* rows, int64_t stride, int64_t count, int64_t dim) {
  std::unique_ptr<Columns> columns(new Columns(count, dim));
  for (int64_t row = 0; row < count; row++)
    for (int64_t feature = 0; feature < dim; feature++)
      columns->at(row, feature) = static_cast<float>(rows[row * stride + feature]);
  return columns;
}

// What all chunks of one key/value head read.
template <typename T>
struct Head {
  const T *q, *k, *v;  // query 0 of the group's first head, and the sequence's first key
  const bool* valid;   // of the sequence's keys, or null
  Sequence sequence;
  bool sparse;
  std::unique_ptr<Columns> fine, norm;  // K1 and, unless the normaliser of scores is exact, K2
};

template <typename T>
void compress(const Call& call, Head<T>& head) {
  if (head.sequence.length <= call.selected_blocks * call.block_size)
    return;  // nothing is chosen by score
  const int64_t size = call.kernel_size, step = call.kernel_stride, last = head.sequence.length - 1;
  const std::vector<float> sums = sums_of_steps(head.k, call.stride_k[2], head.sequence.length, call.dim, step);
  const auto pool = [&](int64_t factor) {
    const int64_t count = windows_up_to(last, factor * size, factor * step);
    std::unique_ptr<Columns> columns(new Columns(count, call.dim));
    means<T>(sums, call.dim, count, factor * size / step, factor, factor * size, [&](int64_t window, int64_t feature, T mean) {
      columns->at(window, feature) = static_cast<float>(mean);
    });
    return columns;
  };
  head.fine = pool(1);
  if (!call.exact)
    head.norm = pool(COARSE_FACTOR);
}

// One task: a thread keeps its scratch from one to the next.
template <typename T>
class Chunk {
 public:
  explicit Chunk(const Call& call)
      : call_(call),
        group_(call.heads_q / call.heads),
        tokens_(chunk_tokens(call)),
        padded_v_(ceil_div(call.dim_v, PANEL) * PANEL),
        padded_size_(ceil_div(call.block_size, PANEL) * PANEL),
        queries_(tokens_ * group_ * call.dim),
        sums_((tokens_ * group_ + 1) * padded_v_),  // the last row belongs to no query
        totals_(tokens_ * group_ * LANES),
        tops_(tokens_ * group_),
        keys_(call.block_size, call.dim),
        values_(call.dim_v, call.block_size),
        weights_(TILE_ROWS * padded_size_),
        ranking_(ranking_of(call)) {}

  // Tokens of a chunk: whole tiles of queries that share a selection.
  static int64_t chunk_tokens(const Call& call) {
    const int64_t group = call.heads_q / call.heads;
    const int64_t tokens = std::min(std::max<int64_t>(1, CHUNK_ROWS / group), call.length_q + call.query_block - 1);
    return ceil_div(tokens, call.query_block) * call.query_block;
  }

  // Attention of the queries at `begin` to `end` (positions), whose first row of output is `out`.
  void run(const Head<T>& head, int64_t begin, int64_t end, T* out) {
    open(head, begin, end);
    if (head.sparse)
      select();
    else
      choose_all();
    visit_chosen();
    write(out, nullptr, 0);
  }

  // The blocks of these queries alone: `slots` numbers for each, ascending, then -1.
  void list_blocks(const Head<T>& head, int64_t begin, int64_t end, int64_t slots, int32_t* to) {
    open(head, begin, end);
    select();
    for (int64_t token = 0; token < count_; token++, to += slots) {
      int64_t place = 0;
      for (int64_t block = 0; block < blocks_; block++)
        if (chosen_[block * count_ + token])
          to[place++] = static_cast<int32_t>(block);
      std::fill(to + place, to + slots, -1);
    }
  }

  // Attention over blocks that are given, `slots` numbers for each query, -1 in unused places; null: over all. Each
  // token's row of `lse` is 1 apart from the one before, each head's `apart`.
  void attend(
      const Head<T>& head, int64_t begin, int64_t end, const int32_t* given, int64_t slots, T* out, float* lse, int64_t apart) {
    open(head, begin, end);
    if (given == nullptr)
      choose_all();
    else
      for (int64_t place = 0; place < count_ * slots; place++)
        if (given[place] >= 0)
          choose(place / slots, 1, given[place], given[place] + 1);
    visit_chosen();
    write(out, lse, apart);
  }

 private:
  void open(const Head<T>& head, int64_t begin, int64_t end) {
    head_ = &head, begin_ = begin, count_ = end - begin;
    const int64_t share = call_.query_block;  // what is selected for the last query may lie ahead of it
    blocks_ = (std::min(ceil_div(end, share) * share, head.sequence.length) - 1) / call_.block_size + 1;
    chosen_.assign(blocks_ * count_, 0);
    load_queries();
  }

  void choose_all() {
    for (int64_t token = 0; token < count_; token++)
      choose(token, 1, first_block(begin_ + token), (begin_ + token) / call_.block_size + 1);
  }

  void visit_chosen() {
    for (int64_t block = 0; block < blocks_; block++)
      visit(block);
  }

  void load_queries() {
    const int64_t rows = count_ * group_;
    const float scale = call_.scale * LOG2E;
    for (int64_t token = 0; token < count_; token++)
      for (int64_t member = 0; member < group_; member++) {
        const int64_t query = begin_ + token - head_->sequence.start;
        const T* from = head_->q + query * call_.stride_q[2] + member * call_.stride_q[1];
        float* to = queries_.data() + (token * group_ + member) * call_.dim;
        for (int64_t feature = 0; feature < call_.dim; feature++)
          to[feature] = static_cast<float>(from[feature]) * scale;
      }
    std::fill_n(sums_.begin(), rows * padded_v_, 0.0f);
    std::fill_n(totals_.begin(), rows * LANES, 0.0f);
    std::fill_n(tops_.begin(), rows, HIDDEN);
  }

  // The first block with a key in the window of a query.
  int64_t first_block(int64_t position) const {
    return std::max<int64_t>(0, position - call_.window + 1) / call_.block_size;
  }

  void choose(int64_t token, int64_t tokens, int64_t from, int64_t to) {
    for (int64_t block = from; block < std::min(to, blocks_); block++)
      std::fill_n(chosen_.begin() + block * count_ + token, tokens, 1);
  }

  // Section 3.2: the blocks that every query visits.
  void select() {
    const int64_t share = call_.query_block;
    int64_t token = 0;
    scored_.clear();
    while (token < count_) {
      const int64_t tokens = std::min(share - (begin_ + token) % share, count_ - token);
      const int64_t last = std::min((begin_ + token) / share * share + share - 1, head_->sequence.length - 1);
      const int64_t own = last / call_.block_size, first = first_block(last);
      if (own - first < call_.selected_blocks) {
        if (!scored_.empty())  // windows touch one block more or less
          choose_best();
        choose(token, tokens, first, own + 1);
      } else {
        choose(token, tokens, first, call_.init_blocks);
        choose(token, tokens, std::max(first, own - call_.local_blocks), own + 1);
        scored_.push_back({token, tokens, last, std::max(first, call_.init_blocks), own - call_.local_blocks});
        if (static_cast<int64_t>(scored_.size()) * share * group_ >= SCORED_ROWS)
          choose_best();
      }
      token += tokens;
    }
    if (!scored_.empty())
      choose_best();
  }

  // Adjacent queries that share a selection, and the candidates of which the best are taken.
  struct Tile {
    int64_t token, tokens, last, low, high;
  };

  // Scores the tiles in `scored_`, chooses their blocks, and empties the list.
  void choose_best() {
    const int64_t size = call_.kernel_size, step = call_.kernel_stride;
    const int64_t factor = call_.exact ? 1 : COARSE_FACTOR;
    const int64_t begin = scored_.front().token, end = scored_.back().token + scored_.back().tokens;
    const int64_t rows = (end - begin) * group_;
    const Columns& norm = call_.exact ? *head_->fine : *head_->norm;
    tile_of_.resize(rows), seen_.resize(rows), norms_.assign(rows, HIDDEN), norm_totals_.assign(rows, 0.0f);
    for (size_t tile = 0; tile < scored_.size(); tile++) {
      const Tile& each = scored_[tile];
      const int64_t from = (each.token - begin) * group_;
      std::fill_n(tile_of_.begin() + from, each.tokens * group_, tile);
      std::fill_n(seen_.begin() + from, each.tokens * group_, windows_up_to(each.last, factor * size, factor * step));
    }
    each_panel(norm, begin, rows, 0, seen_.back(), [&](int64_t row, int64_t column, float* logits) {
      for (int64_t lane = std::max<int64_t>(0, seen_[row] - column); lane < PANEL; lane++)
        logits[lane] = HIDDEN;
      const float top = std::max(norms_[row], panel_top(logits));
      Vector total{};
      for (int lane = 0; lane < PANEL; lane += LANES)
        total += exp2(load(logits + lane) - top);
      norm_totals_[row] = norm_totals_[row] * exp2(norms_[row] - top) + sum(total);
      norms_[row] = top;
    });
    for (int64_t row = 0; row < rows; row++)  // where no key is seen all scores are 0
      norms_[row] = seen_[row] > 0 ? norms_[row] + std::log2(norm_totals_[row]) : -HIDDEN;
    const int64_t fine = windows_up_to(scored_.back().last, size, step);
    const int64_t width = ceil_div(fine, PANEL) * PANEL;
    scores_.assign(scored_.size() * width, 0.0f);
    each_panel(*head_->fine, begin, rows, 0, fine, [&](int64_t row, int64_t column, float* logits) {
      float* to = scores_.data() + tile_of_[row] * width + column;
      for (int lane = 0; lane < PANEL; lane += LANES)
        store(to + lane, load(to + lane) + exp2(load(logits + lane) - norms_[row]));
    });
    for (size_t tile = 0; tile < scored_.size(); tile++)
      take_best(scored_[tile], scores_.data() + tile * width);
    scored_.clear();
  }

  // Chooses the best candidates of a tile by its scores of compressed keys.
  void take_best(const Tile& tile, const float* scores) {
    const int64_t seen = windows_up_to(tile.last, call_.kernel_size, call_.kernel_stride);
    const int64_t forced = std::max<int64_t>(0, call_.init_blocks - first_block(tile.last)) + call_.local_blocks + 1;
    const int64_t free = call_.selected_blocks - forced;  // fewer than there are candidates
    ranking_.each_best(scores, 0, seen, tile.low, tile.high, free, [&](int64_t block) {
      choose(tile.token, tile.tokens, block, block + 1);
    });
  }

  static float panel_top(const float* logits) {
    Vector top = load(logits);
    for (int lane = LANES; lane < PANEL; lane += LANES)
      top = higher(top, load(logits + lane));
    return highest(top);
  }

  // Hands products of `rows` query rows, from token `begin` on, with columns `from` to `to` on, a row and panel at a time.
  template <typename Function>
  void each_panel(const Columns& columns, int64_t begin, int64_t rows, int64_t from, int64_t to, Function take) {
    const float* tile[TILE_ROWS];
    float* logits[TILE_ROWS];
    for (int64_t column = from; column < to; column += PANEL)
      for (int64_t row = 0; row < rows; row += TILE_ROWS) {
        const int64_t real = std::min<int64_t>(TILE_ROWS, rows - row);
        for (int64_t place = 0; place < TILE_ROWS; place++) {
          tile[place] = queries_.data() + (begin * group_ + row + std::min(place, real - 1)) * call_.dim;
          logits[place] = weights_.data() + place * PANEL;
        }
        multiply<false>(tile, call_.dim, columns.panel(column / PANEL), logits, nullptr);
        for (int64_t place = 0; place < real; place++)
          take(row + place, column, logits[place]);
      }
  }

  // Section 3.1: adds a block to the sums of all rows that visit it.
  void visit(int64_t block) {
    const int64_t size = call_.block_size, base = block * size;
    rows_.clear();
    for (int64_t token = std::max<int64_t>(0, base - begin_); token < count_; token++)
      if (chosen_[block * count_ + token])
        for (int64_t member = 0; member < group_; member++)
          rows_.push_back(token * group_ + member);
    if (rows_.empty())
      return;
    const bool whole = pack(block);
    const int64_t first = begin_ + rows_.front() / group_, last = begin_ + rows_.back() / group_;
    const bool seen_by_all = whole && base + size - 1 <= first && base > last - call_.window;
    const int64_t total = rows_.size();
    for (int64_t from = 0; from < total; from += TILE_ROWS)
      meet(rows_.data() + from, std::min<int64_t>(TILE_ROWS, total - from), base, seen_by_all);
  }

  // Lays out the keys and values of a block, zeros for what no query sees. Returns whether all are seen.
  bool pack(int64_t block) {
    const int64_t size = call_.block_size, base = block * size;
    const int64_t count = std::min(size, head_->sequence.length - base);
    bool whole = count == size;
    visible_.assign(size, 0);
    if (count < size)
      keys_.clear(), values_.clear();
    for (int64_t key = 0; key < count; key++) {
      const bool valid = head_->valid == nullptr || head_->valid[base + key];
      const T* k = head_->k + (base + key) * call_.stride_k[2];
      const T* v = head_->v + (base + key) * call_.stride_v[2];
      for (int64_t feature = 0; feature < call_.dim; feature++)
        keys_.at(key, feature) = valid ? static_cast<float>(k[feature]) : 0.0f;
      for (int64_t feature = 0; feature < call_.dim_v; feature++)
        values_.at(feature, key) = valid ? static_cast<float>(v[feature]) : 0.0f;
      visible_[key] = valid;
      whole = whole && valid;
    }
    return whole;
  }

  // Attention of up to TILE_ROWS rows over the packed block that begins at `base`.
  void meet(const int64_t* numbers, int64_t real, int64_t base, bool seen_by_all) {
    const float* tile[TILE_ROWS];
    float* to[TILE_ROWS];
    float fading[TILE_ROWS];
    float* const spare = sums_.data() + tokens_ * group_ * padded_v_;
    for (int64_t place = 0; place < TILE_ROWS; place++)
      tile[place] = queries_.data() + numbers[std::min(place, real - 1)] * call_.dim;
    for (int64_t column = 0; column < padded_size_; column += PANEL) {
      for (int64_t place = 0; place < TILE_ROWS; place++)
        to[place] = weights_.data() + place * padded_size_ + column;
      multiply<false>(tile, call_.dim, keys_.panel(column / PANEL), to, nullptr);
    }
    for (int64_t place = 0; place < TILE_ROWS; place++) {
      tile[place] = weights_.data() + place * padded_size_;
      fading[place] = place < real ? weigh(weights_.data() + place * padded_size_, numbers[place], base, seen_by_all) : 1.0f;
    }
    for (int64_t column = 0; column < padded_v_; column += PANEL) {
      for (int64_t place = 0; place < TILE_ROWS; place++)
        to[place] = (place < real ? sums_.data() + numbers[place] * padded_v_ : spare) + column;
      multiply<true>(tile, call_.block_size, values_.panel(column / PANEL), to, fading);
    }
  }

  // Turns the logits of a row into weights and adds these to its total. Returns the factor of what was summed before.
  float weigh(float* logits, int64_t row, int64_t base, bool seen_by_all) {
    const int64_t size = call_.block_size;
    if (!seen_by_all || size < padded_size_) {
      const int64_t position = begin_ + row / group_;
      for (int64_t key = 0; key < padded_size_; key++) {
        const bool seen = key < size && visible_[key] && base + key <= position && base + key > position - call_.window;
        logits[key] = seen ? logits[key] : HIDDEN;
      }
    }
    Vector tops = load(logits);
    for (int64_t lane = LANES; lane < padded_size_; lane += LANES)
      tops = higher(tops, load(logits + lane));
    const float old = tops_[row], top = std::max(old, highest(tops));
    if (top <= 0.5f * HIDDEN) {  // no key was seen yet
      std::fill_n(logits, padded_size_, 0.0f);
      return 1.0f;
    }
    const float fading = old == top ? 1.0f : exp2(old - top);
    Vector total = load(totals_.data() + row * LANES) * fading;
    for (int64_t lane = 0; lane < padded_size_; lane += LANES) {
      const Vector weights = exp2(load(logits + lane) - top);
      store(logits + lane, weights);
      total += weights;
    }
    store(totals_.data() + row * LANES, total);
    tops_[row] = top;
    return fading;
  }

  // Stores the results; a query that saw no key gives 0 and -inf.
  void write(T* out, float* lse, int64_t apart) const {
    const int64_t stride = call_.heads_q * call_.dim_v;
    for (int64_t row = 0; row < count_ * group_; row++) {
      const float total = sum(load(totals_.data() + row * LANES));
      const float share = total > 0.0f ? 1.0f / total : 0.0f;
      const float* from = sums_.data() + row * padded_v_;
      T* to = out + row / group_ * stride + row % group_ * call_.dim_v;
      for (int64_t feature = 0; feature < call_.dim_v; feature++)
        to[feature] = static_cast<T>(from[feature] * share);
      if (lse != nullptr)
        lse[row % group_ * apart + row / group_] =
            total > 0.0f ? (tops_[row] + std::log2(total)) / LOG2E : -std::numeric_limits<float>::infinity();
    }
  }

  const Call& call_;
  const int64_t group_, tokens_, padded_v_, padded_size_;
  std::vector<float> queries_, sums_, totals_, tops_;  // queries times scale, log2(e); [row][feature], [row][LANES]
  Columns keys_, values_;                              // of the block that is visited
  std::vector<float> weights_;                         // [TILE_ROWS][padded_size_]
  std::vector<uint8_t> visible_, chosen_;              // [key], [block][token]
  std::vector<int64_t> rows_, tile_of_, seen_;
  std::vector<float> norms_, norm_totals_, scores_;
  Ranking ranking_;
  std::vector<Tile> scored_;

  const Head<T>* head_ = nullptr;
  int64_t begin_ = 0, count_ = 0, blocks_ = 0;
};

// Hands the chunks of all heads' queries to a function: a chunk to work in, the number of the head, and the first position
// and one past the last.
template <typename T, typename Function>
void each_chunk(const Call& call, const std::vector<Head<T>>& all_heads, Function take) {
  const int64_t heads = all_heads.size(), tokens = Chunk<T>::chunk_tokens(call);
  const int64_t chunks = ceil_div(call.length_q + call.query_block - 1, tokens);
#pragma omp parallel
  {
    Chunk<T> chunk(call);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < heads * chunks; task++) {
      const Sequence& sequence = all_heads[task % heads].sequence;
      const int64_t number = chunks - 1 - task / heads;  // those that visit most come first
      const int64_t base = sequence.begin / call.query_block * call.query_block + number * tokens;
      const int64_t begin = std::max(base, sequence.begin), end = std::min(base + tokens, sequence.end);
      if (begin < end)
        take(chunk, task % heads, begin, end);
    }
  }
}

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

// Attention of a call; `out` is [batch, length_q, heads_q, dim_v].
//
// key_mask: [batch, length_k], or null if all keys are valid. offsets: [offsets_count], 1 or one for each row of the
// batch, added to call.offset, which is the key index of the first query; or null.
template <typename T, typename I>
void switchable_attention(
    const Call& call,
    const T* q,
    const T* k,
    const T* v,
    const bool* key_mask,
    const I* offsets,
    int64_t offsets_count,
    T* out) {
  const int64_t group = call.heads_q / call.heads, heads = call.batch * call.heads;
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
    head.sparse = sequence.length >= call.dense_len;
    for (int64_t query = 0; query < call.length_q; query++)
      if (query + sequence.start < sequence.begin || query + sequence.start >= sequence.end)
        std::fill_n(rows_of(number) + query * row_size, group * call.dim_v, static_cast<T>(0.0f));
    if (sequence.begin < sequence.end && head.sparse)
      compress(call, head);
  }
  each_chunk(call, all_heads, [&](Chunk<T>& chunk, int64_t number, int64_t begin, int64_t end) {
    const Head<T>& head = all_heads[number];
    chunk.run(head, begin, end, rows_of(number) + (begin - head.sequence.start) * row_size);
  });
}

// The heads of a call of one batch row, all of whose keys and queries are one sequence.
template <typename T>
std::vector<Head<T>> heads_of(const Call& call, const T* q, const T* k, const T* v, const bool* valid) {
  const int64_t group = call.heads_q / call.heads;
  std::vector<Head<T>> all_heads(call.heads);
  for (int64_t number = 0; number < call.heads; number++) {
    Head<T>& head = all_heads[number];
    head.sequence = {0, call.length_k, call.offset, call.offset, call.offset + call.length_q};
    head.q = q + number * group * call.stride_q[1], head.valid = valid;
    head.k = k == nullptr ? nullptr : k + number * call.stride_k[1];
    head.v = v == nullptr ? nullptr : v + number * call.stride_v[1];
  }
  return all_heads;
}

// The means of all complete windows of one sequence. Strides of the keys are those of q in the call, of the fine means
// those of k, of the coarse ones those of v.
template <typename T>
void compress_keys(const Call& call, const T* k, T* fine, T* coarse) {
  const int64_t size = call.kernel_size, step = call.kernel_stride, last = call.length_k - 1;
#pragma omp parallel for schedule(dynamic)
  for (int64_t head = 0; head < call.heads; head++) {
    const std::vector<float> sums =
        sums_of_steps(k + head * call.stride_q[1], call.stride_q[2], call.length_k, call.dim, step);
    const auto pool = [&](int64_t factor, T* to, const int64_t* strides) {
      const int64_t count = windows_up_to(last, factor * size, factor * step);
      means<T>(sums, call.dim, count, factor * size / step, factor, factor * size, [&](int64_t window, int64_t feature, T mean) {
        to[head * strides[1] + window * strides[2] + feature] = mean;
      });
    };
    pool(1, fine, call.stride_k);
    pool(COARSE_FACTOR, coarse, call.stride_v);
  }
}

// The blocks that every query of one sequence visits, by its compressed keys: [heads][length_q][selected_blocks]. Strides of
// the fine keys are those of k in the call, of the coarse ones those of v.
template <typename T>
void select_blocks(const Call& call, const T* q, const T* fine, const T* coarse, int32_t* blocks) {
  std::vector<Head<T>> all_heads = heads_of<T>(call, q, nullptr, nullptr, nullptr);
  const int64_t size = call.kernel_size, step = call.kernel_stride, last = call.length_k - 1;
  if (call.length_k > call.selected_blocks * call.block_size) {  // else nothing is chosen by score
#pragma omp parallel for schedule(dynamic)
    for (int64_t number = 0; number < call.heads; number++) {
      Head<T>& head = all_heads[number];
      head.fine = columns_of(
          fine + number * call.stride_k[1], call.stride_k[2], windows_up_to(last, size, step), call.dim);
      if (!call.exact)
        head.norm = columns_of(
            coarse + number * call.stride_v[1], call.stride_v[2],
            windows_up_to(last, COARSE_FACTOR * size, COARSE_FACTOR * step), call.dim);
    }
  }
  each_chunk(call, all_heads, [&](Chunk<T>& chunk, int64_t number, int64_t begin, int64_t end) {
    const int64_t row = number * call.length_q + begin - call.offset;
    chunk.list_blocks(all_heads[number], begin, end, call.selected_blocks, blocks + row * call.selected_blocks);
  });
}

// Where the blocks of a head and the log-sum-exp of a query head begin, in numbers after those of the one before.
struct Places {
  int64_t blocks, slots, lse;
};

// Attention of one sequence over given blocks, or all; `out` is [length_q][heads_q][dim_v].
template <typename T>
void attend_blocks(
    const Call& call,
    const T* q,
    const T* k,
    const T* v,
    const bool* valid,
    const int32_t* blocks,
    const Places& places,
    T* out,
    float* lse) {
  const int64_t group = call.heads_q / call.heads;
  const std::vector<Head<T>> all_heads = heads_of(call, q, k, v, valid);
  each_chunk(call, all_heads, [&](Chunk<T>& chunk, int64_t number, int64_t begin, int64_t end) {
    const int64_t token = begin - call.offset;
    const int32_t* given = blocks == nullptr ? nullptr : blocks + number * places.blocks + token * places.slots;
    chunk.attend(
        all_heads[number], begin, end, given, places.slots, out + (token * call.heads_q + number * group) * call.dim_v,
        lse + number * group * places.lse + token, places.lse);
  });
}

}  // namespace
}  // namespace infllm

#endif  // INFLLM_SWITCHABLE_ATTENTION_H
