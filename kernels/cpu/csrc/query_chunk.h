// What selection, forward and backward share: the arguments of a call, register-tiled products over packed panels, and
// chunks of adjacent queries with the blocks that each visits.

#ifndef INFLLM_QUERY_CHUNK_H
#define INFLLM_QUERY_CHUNK_H

#include <limits>
#include <memory>

#include "score_terms.h"

namespace infllm {
namespace {

#if defined(__AVX512F__)
constexpr int TILE_VECTORS = 4;
#else
constexpr int TILE_VECTORS = 2;
#endif

constexpr int TILE_ROWS = 6;         // with TILE_VECTORS vectors each: what the registers hold
constexpr int64_t CHUNK_ROWS = 768;  // query rows (tokens x group) of a task: queries and sums fit the L2 cache

template <typename R>
constexpr int PANEL = LANES<R> * TILE_VECTORS;  // columns of a packed matrix that are stored together

// Order and names: kernels/cpu/native.py, CALL_FIELDS.
struct Call {
  int64_t batch, heads_q, heads, length_q, length_k, dim, dim_v;
  int64_t stride_q[3], stride_k[3], stride_v[3];  // of batch, head and token; features are adjacent
  int64_t offset, window, dense_len;              // window: keys, more than length_k if there is none
  int64_t kernel_size, kernel_stride, block_size, init_blocks, local_blocks, selected_blocks, exact, query_block;
  int64_t index_dims, index_kind;  // channels that token scores read, 0 for pooled scores; see IndexKind
  double scale, softcap;           // softcap: 0 if there is none

  int64_t group() const {
    return heads_q / heads;
  }
};

// The valid stretch of a batch row. Positions count from its first key.
struct Sequence {
  int64_t first, length;  // keys
  int64_t start;          // position of query 0, negative if it stands before the sequence
  int64_t begin, end;     // positions of the queries that exist
};

// Adds TILE_ROWS rows of `depth` numbers times one panel to sums.
template <typename R>
inline __attribute__((always_inline)) void add_products(
    const R* const* rows, int64_t depth, const R* panel, Vector<R> (&sums)[TILE_ROWS][TILE_VECTORS]) {
  const R *row0 = rows[0], *row1 = rows[1], *row2 = rows[2], *row3 = rows[3], *row4 = rows[4], *row5 = rows[5];
  static_assert(TILE_ROWS == 6, "the rows are written out");
  for (int64_t step = 0; step < depth; step++) {
    Vector<R> factors[TILE_VECTORS];
    for (int column = 0; column < TILE_VECTORS; column++)
      factors[column] = load(panel + step * PANEL<R> + column * LANES<R>);
    const R values[TILE_ROWS] = {row0[step], row1[step], row2[step], row3[step], row4[step], row5[step]};
    for (int row = 0; row < TILE_ROWS; row++)
      for (int column = 0; column < TILE_VECTORS; column++)
        sums[row][column] = multiply_add(broadcast(values[row]), factors[column], sums[row][column]);
  }
}

// Rows times one panel: to[i] = product, or with `accumulate` to[i] * decay[i] + product.
template <bool accumulate, typename R>
inline void multiply(const R* const* rows, int64_t depth, const R* panel, R* const* to, const R* decay) {
  Vector<R> sums[TILE_ROWS][TILE_VECTORS];
  for (int row = 0; row < TILE_ROWS; row++)
    for (int column = 0; column < TILE_VECTORS; column++)
      sums[row][column] = accumulate ? load(to[row] + column * LANES<R>) * decay[row] : Vector<R>{};
  add_products<R>(rows, depth, panel, sums);
  for (int row = 0; row < TILE_ROWS; row++)
    for (int column = 0; column < TILE_VECTORS; column++)
      store(to[row] + column * LANES<R>, sums[row][column]);
}

// The largest products of each row with the columns of one panel, lane by lane: one vector a row.
template <typename R>
inline void multiply_max(const R* const* rows, int64_t depth, const R* panel, R* const* to) {
  Vector<R> sums[TILE_ROWS][TILE_VECTORS] = {};
  add_products<R>(rows, depth, panel, sums);
  for (int row = 0; row < TILE_ROWS; row++) {
    Vector<R> top = sums[row][0];
    for (int column = 1; column < TILE_VECTORS; column++)
      top = maximum(top, sums[row][column]);
    store(to[row], top);
  }
}

// Vectors of `dim` numbers as columns of panels: [ceil(count / PANEL)][dim][PANEL], zeros after the last one.
template <typename R>
class PackedColumns {
 public:
  PackedColumns(int64_t count, int64_t dim) : dim_(dim), numbers_(round_up(count, PANEL<R>) * dim) {}

  R& at(int64_t column, int64_t feature) {
    return numbers_[(column / PANEL<R> * dim_ + feature) * PANEL<R> + column % PANEL<R>];
  }

  const R* panel(int64_t number) const {
    return numbers_.data() + number * dim_ * PANEL<R>;
  }

  void clear() {
    std::fill(numbers_.begin(), numbers_.end(), R{0});
  }

 private:
  int64_t dim_;
  std::vector<R> numbers_;
};

// Index keys as columns of panels: those of a block are adjacent and padded to whole vectors. What is no key, or no
// valid one, is hidden by one number more, which queries multiply by 1.
template <typename R>
class IndexColumns {
 public:
  IndexColumns(const Call& call, int64_t length)
      : apart(round_up(call.block_size, LANES<R>)), size_(call.block_size), dims_(call.index_dims),
        columns_(ceil_div(length, size_) * apart, dims_ + 1) {
    for (int64_t column = 0; column < round_up(ceil_div(length, size_) * apart, PANEL<R>); column++)
      columns_.at(column, dims_) = static_cast<R>(HIDDEN);
  }

  // Sets a key that may be seen; `from` has index_dims numbers.
  void set(int64_t key, const R* from) {
    const int64_t column = key / size_ * apart + key % size_;
    for (int64_t place = 0; place < dims_; place++)
      columns_.at(column, place) = from[place];
    columns_.at(column, dims_) = R{0};
  }

  const R* panel(int64_t number) const {
    return columns_.panel(number);
  }

  const int64_t apart;  // columns of a block

 private:
  const int64_t size_, dims_;
  PackedColumns<R> columns_;
};

// What all chunks of one key/value head read.
template <typename T>
struct Head {
  const T *q, *k, *v;  // query 0 of the group's first head, and the sequence's first key
  const bool* valid;   // of the sequence's keys, or null
  const Real<T>* key_bias = nullptr;  // the same
  const Real<T>* sinks = nullptr;     // of the group's heads, or null
  Sequence sequence;
  bool sparse;
  std::unique_ptr<PackedColumns<Real<T>>> k1, k2;  // where blocks are scored; k2 unless the normaliser is exact
  std::unique_ptr<IndexColumns<Real<T>>> index;    // the same, by tokens
  const int32_t* channels;                         // that index keys have
};

// Adjacent queries of one key/value head, as rows (token x group + member), and which blocks each token visits.
template <typename T>
struct QueryChunk {
  using R = Real<T>;

  explicit QueryChunk(const Call& call)
      : call(call), group(call.group()), row_size(round_up(call.dim, PANEL<R>)),
        queries(max_tokens(call) * group * row_size) {}

  // Tokens of a chunk: whole tiles of queries that share a selection.
  static int64_t max_tokens(const Call& call) {
    const int64_t tokens =
        std::min(std::max<int64_t>(1, CHUNK_ROWS / call.group()), call.length_q + call.query_block - 1);
    return round_up(tokens, call.query_block);
  }

  // Loads the queries at positions [from, to) of a head; they visit no block yet.
  void open(const Head<T>& of, int64_t from, int64_t to) {
    head = &of, begin = from, tokens = to - from;
    // What is selected for the last query of a shared tile may lie ahead of the chunk.
    blocks = (std::min(round_up(to, call.query_block), head->sequence.length) - 1) / call.block_size + 1;
    visits.assign(blocks * tokens, 0);
    const R scale = static_cast<R>(call.scale * LOG2E);
    for (int64_t row = 0; row < tokens * group; row++) {
      const int64_t query = begin + row / group - head->sequence.start;
      const T* from = head->q + query * call.stride_q[2] + row % group * call.stride_q[1];
      R* to = queries.data() + row * row_size;
      for (int64_t feature = 0; feature < call.dim; feature++)
        to[feature] = static_cast<R>(from[feature]) * scale;
    }
  }

  // The first block with a key in the window of a query.
  int64_t first_block(int64_t position) const {
    return std::max<int64_t>(0, position - call.window + 1) / call.block_size;
  }

  void visit(int64_t token, int64_t count, int64_t from, int64_t to) {
    for (int64_t block = from; block < std::min(to, blocks); block++)
      std::fill_n(visits.begin() + block * tokens + token, count, 1);
  }

  // Blocks from a list, `slots` numbers for each token, -1 in unused places; null: all blocks that a token sees.
  void visit_listed(const int32_t* list, int64_t slots) {
    if (list == nullptr)
      for (int64_t token = 0; token < tokens; token++)
        visit(token, 1, first_block(begin + token), (begin + token) / call.block_size + 1);
    else
      for (int64_t place = 0; place < tokens * slots; place++)
        if (list[place] >= 0)
          visit(place / slots, 1, list[place], list[place] + 1);
  }

  // The rows that visit a block, ascending, without those that stand before it.
  void rows_visiting(int64_t block, std::vector<int64_t>& rows) const {
    rows.clear();
    for (int64_t token = std::max<int64_t>(0, block * call.block_size - begin); token < tokens; token++)
      if (visits[block * tokens + token])
        for (int64_t member = 0; member < group; member++)
          rows.push_back(token * group + member);
  }

  const R* query(int64_t row) const {
    return queries.data() + row * row_size;
  }

  int64_t position(int64_t row) const {
    return begin + row / group;
  }

  const Call& call;
  const int64_t group, row_size;
  std::vector<R> queries;       // [row][row_size], times scale and log2(e); zeros after dim
  std::vector<uint8_t> visits;  // [block][token]
  const Head<T>* head = nullptr;
  int64_t begin = 0, tokens = 0, blocks = 0;
};

// Which keys of one block a row may see.
class BlockMask {
 public:
  explicit BlockMask(const Call& call) : call_(call) {}

  // Reads which keys of a block exist and are valid. Returns how many exist.
  template <typename T>
  int64_t open(const Head<T>& head, int64_t block) {
    base_ = block * call_.block_size;
    const int64_t count = std::min(call_.block_size, head.sequence.length - base_);
    valid_.assign(call_.block_size, 0);
    for (int64_t key = 0; key < count; key++)
      valid_[key] = head.valid == nullptr || head.valid[base_ + key];
    if (head.key_bias != nullptr)
      for (int64_t key = 0; key < count; key++)
        valid_[key] &= head.key_bias[base_ + key] >= static_cast<Real<T>>(LEAST_BIAS);
    all_valid_ = std::all_of(valid_.begin(), valid_.end(), [](uint8_t valid) { return valid; });
    return count;
  }

  bool valid(int64_t key) const {
    return valid_[key];
  }

  // Whether queries at all positions from `first` to `last` see the whole block.
  bool seen_by_all(int64_t first, int64_t last) const {
    return all_valid_ && base_ + call_.block_size - 1 <= first && base_ > last - call_.window;
  }

  template <typename R>
  void hide(R* logits, int64_t padded_size, int64_t position) const {
    for (int64_t key = 0; key < padded_size; key++) {
      const bool seen = key < call_.block_size && valid_[key] && base_ + key <= position &&
          base_ + key > position - call_.window;
      logits[key] = seen ? logits[key] : static_cast<R>(HIDDEN);
    }
  }

 private:
  const Call& call_;
  int64_t base_ = 0;
  bool all_valid_ = false;
  std::vector<uint8_t> valid_;
};

// Runs a function for all chunks of all heads, those that visit most first: chunk to work in, number of the head, first
// position, and one past the last.
template <typename T, typename Scratch, typename Function>
void each_chunk(const Call& call, const std::vector<Head<T>>& all_heads, Function run) {
  const int64_t heads = all_heads.size(), tokens = QueryChunk<T>::max_tokens(call);
  const int64_t chunks = ceil_div(call.length_q + call.query_block - 1, tokens);
#pragma omp parallel
  {
    QueryChunk<T> chunk(call);
    Scratch scratch(call);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < heads * chunks; task++) {
      const Head<T>& head = all_heads[task % heads];
      const Sequence& sequence = head.sequence;
      const int64_t number = chunks - 1 - task / heads;
      const int64_t base = sequence.begin / call.query_block * call.query_block + number * tokens;
      const int64_t begin = std::max(base, sequence.begin), end = std::min(base + tokens, sequence.end);
      if (begin < end) {
        chunk.open(head, begin, end);
        run(chunk, scratch, task % heads);
      }
    }
  }
}

// The heads of a call of one batch row, all of whose keys and queries are one sequence.
template <typename T>
std::vector<Head<T>> heads_of_sequence(
    const Call& call, const T* q, const T* k, const T* v, const bool* valid, const TermTensors<Real<T>>& terms) {
  std::vector<Head<T>> all_heads(call.heads);
  for (int64_t number = 0; number < call.heads; number++) {
    Head<T>& head = all_heads[number];
    head.sequence = {0, call.length_k, call.offset, call.offset, call.offset + call.length_q};
    head.q = q + number * call.group() * call.stride_q[1];
    head.k = k == nullptr ? nullptr : k + number * call.stride_k[1];
    head.v = v == nullptr ? nullptr : v + number * call.stride_v[1];
    head.valid = valid;
    head.key_bias = terms.bias_of(0, number, 0), head.sinks = terms.sinks_of(number * call.group());
  }
  return all_heads;
}

}  // namespace
}  // namespace infllm

#endif  // INFLLM_QUERY_CHUNK_H
