// A decode step of switchable attention on the CPU: a few new queries over a cache whose compressed or index keys are
// given (InfLLM-V2, arXiv 2509.24663, sections 3.1 and 3.2). Plain C++17 with vector extensions and OpenMP.
//
// A step is bound by memory: it reads its compressed or index keys and the keys and values that it visits, once and in place. A
// tile is what shares a selection: adjacent queries of a batch row, for one key/value head. Scores are computed by tile
// and range of windows, attention by query and range of visited keys (split-K), so that all threads have work at any batch
// size; a query's partial softmaxes are reduced at the end. Logits are in units of log 2.

#ifndef INFLLM_DECODE_ATTENTION_H
#define INFLLM_DECODE_ATTENTION_H

#include <limits>

#include "decode_products.h"

namespace infllm {
namespace {

constexpr int64_t SCORED_WINDOWS = 512;  // compressed keys of one task
constexpr int64_t SCORED_TOKENS = 1024;  // index keys of one task, about
constexpr int64_t RANGE_KEYS = 128;      // adjacent keys whose logits are held at once
constexpr int64_t PARTIAL_KEYS = 512;    // visited keys of one task, about

// Order and names: kernels/cpu/native.py, DECODE_FIELDS.
struct DecodeCall {
  int64_t batch, heads, group, length_q, dim, dim_v;
  int64_t stride_q[3], stride_k[3], stride_v[3];   // of batch, head and token; features are adjacent
  int64_t stride_k1[3], stride_k2[3];              // of batch, head and window; index keys and their scales: and slot
  int64_t stride_mask[2], window, dense_len;       // window: keys, more than there are if there is none
  int64_t kernel_size, kernel_stride, block_size, init_blocks, local_blocks, selected_blocks, exact, query_block;
  int64_t index_dims, index_kind;  // channels that token scores read, 0 for pooled scores; see IndexKind
  int64_t threads;
  double scale, softcap;           // softcap: 0 if there is none
};

// Adjacent keys, numbered from the first of the sequence.
struct Range {
  int64_t begin, end;
};

template <typename R>
struct SharedTile {
  int64_t row, head, token, tokens;  // queries `token` on
  int64_t length, last;              // keys of the sequence, and the position that decides what is selected
  bool chooses;                      // whether the best `taken` of the blocks from `low` to `high` are visited
  int64_t low, high, taken;
  int64_t fine_begin, fine_end, coarse_end;  // windows that count; where tokens are scored, blocks
  std::vector<R> queries;                // [tokens * group][padded dim], times scale and log2(e)
  std::vector<R> index_queries;          // their channels, [tokens * group][padded index_dims]
  std::vector<R> fine, coarse;           // logits of windows, or maxima of blocks, [tokens * group][padded count]
  std::vector<int64_t> chosen;               // ascending
};

// Logits of a stretch of compressed keys, or of blocks of index keys.
struct ScoreTask {
  int64_t tile;
  bool coarse;
  Range windows;
};

// Attention of one query's heads to a stretch of what it visits.
template <typename R>
struct Partial {
  int64_t tile, token;
  std::vector<Range> visits;
  std::vector<R> tops, totals, sums;  // [group], [group], [group][padded dim_v]
};

template <typename R>
inline int64_t padded(int64_t count) {
  return round_up(count, LANES<R>);
}

// `count` vectors in the type of the arithmetic, each padded with zeros to whole vectors: where they lie, or copied to `scratch`.
template <typename T, typename R>
const R* as_reals(
    const T* from, int64_t stride, int64_t count, int64_t dim, std::vector<R>& scratch, int64_t* apart) {
  if constexpr (std::is_same_v<T, R>)
    if (dim % LANES<R> == 0) {
      *apart = stride;
      return from;
    }
  *apart = padded<R>(dim);
  scratch.assign(count * *apart, R{0});
  for (int64_t number = 0; number < count; number++)
    for (int64_t feature = 0; feature < dim; feature++)
      scratch[number * *apart + feature] = static_cast<R>(from[number * stride + feature]);
  return scratch.data();
}

template <typename T>
class DecodeStep {
 public:
  using R = Real<T>;

  DecodeStep(
      const DecodeCall& call,
      const T* q,
      const T* k,
      const T* v,
      const void* fine,
      const void* coarse,
      const int32_t* channels,
      const int64_t* begins,
      const int64_t* ends,
      const bool* key_mask,
      const TermTensors<R>& terms)
      : call_(call), q_(q), k_(k), v_(v), fine_(fine), coarse_(coarse), channels_(channels), begins_(begins),
        key_mask_(key_mask), terms_(terms), cap_(call.softcap) {
    for (int64_t row = 0; row < call.batch; row++)
      for (int64_t head = 0; head < call.heads; head++)
        add_tiles(row, head, ends[row] - begins[row]);
    for (size_t number = 0; number < tiles_.size(); number++)
      if (tiles_[number].chooses) {
        add_score_tasks(number, true, {0, tiles_[number].coarse_end});
        add_score_tasks(number, false, {tiles_[number].fine_begin, tiles_[number].fine_end});
      }
  }

  // `out` is [batch, length_q, heads * group, dim_v], `lse` [batch, heads * group, length_q]; rows of queries that stand
  // before the first key are left as they are.
  void run(T* out, R* lse) {
#pragma omp parallel num_threads(static_cast<int>(call_.threads))
    {
      std::vector<R> scratch, more;
#pragma omp for schedule(dynamic)
      for (size_t number = 0; number < tiles_.size(); number++)
        load_queries(tiles_[number]);
#pragma omp for schedule(dynamic)
      for (size_t number = 0; number < score_tasks_.size(); number++)
        if (call_.index_dims > 0)
          score_stored(score_tasks_[number], scratch);
        else
          score(score_tasks_[number], scratch);
#pragma omp for schedule(dynamic)
      for (size_t number = 0; number < tiles_.size(); number++)
        if (tiles_[number].chooses)
          choose_best(tiles_[number]);
#pragma omp single
      for (size_t number = 0; number < tiles_.size(); number++)
        for (int64_t token = 0; token < tiles_[number].tokens; token++)
          add_partials(number, token);
#pragma omp for schedule(dynamic)
      for (size_t number = 0; number < partials_.size(); number++)
        attend(partials_[number], scratch, more);
#pragma omp for
      for (size_t number = 0; number < partials_.size(); number++)
        if (number == 0 || !same_query(partials_[number - 1], partials_[number]))
          reduce_partials(number, out, lse);
    }
  }

 private:
  void add_tiles(int64_t row, int64_t head, int64_t length) {
    const int64_t share = length >= call_.dense_len ? call_.query_block : 1, base = length - call_.length_q;
    for (int64_t token = std::max<int64_t>(0, -base); token < call_.length_q;) {
      const int64_t end = ((base + token) / share + 1) * share;  // one past the last position of the tile
      SharedTile<R> tile{};
      tile.row = row, tile.head = head, tile.token = token, tile.length = length;
      tile.tokens = std::min(end - base, call_.length_q) - token;
      tile.last = std::min(end, length) - 1;
      if (length >= call_.dense_len)
        plan_choice(tile);
      tiles_.push_back(tile);
      token += tile.tokens;
    }
  }

  // Section 3.2: candidates are the blocks that no query of the tile visits by rule.
  void plan_choice(SharedTile<R>& tile) const {
    const int64_t size = call_.kernel_size, step = call_.kernel_stride, factor = call_.exact ? 1 : COARSE_FACTOR;
    const int64_t reach = first_key(tile.last) / call_.block_size, per_block = call_.block_size / step;
    tile.low = std::max(reach, call_.init_blocks), tile.high = tile.last / call_.block_size - call_.local_blocks;
    tile.taken =
        call_.selected_blocks - call_.local_blocks - 1 - std::max<int64_t>(0, call_.init_blocks - reach);
    tile.chooses = tile.high - tile.low > tile.taken;
    if (call_.index_dims > 0) {
      tile.coarse_end = 0, tile.fine_begin = reach, tile.fine_end = tile.last / call_.block_size + 1;
      return;
    }
    tile.coarse_end = windows_up_to(tile.last, factor * size, factor * step);
    tile.fine_begin = std::max<int64_t>(0, tile.low * per_block - (size / step - 1));
    tile.fine_end = std::max(tile.fine_begin, std::min(tile.high * per_block, windows_up_to(tile.last, size, step)));
  }

  // The first key in the window of a query.
  int64_t first_key(int64_t position) const {
    return std::max<int64_t>(0, position - call_.window + 1);
  }

  void add_score_tasks(int64_t tile, bool coarse, Range windows) {
    const int64_t step =
        call_.index_dims > 0 ? std::max<int64_t>(1, SCORED_TOKENS / call_.block_size) : SCORED_WINDOWS;
    for (int64_t begin = windows.begin; begin < windows.end; begin += step)
      score_tasks_.push_back({tile, coarse, {begin, std::min(begin + step, windows.end)}});
  }

  void load_queries(SharedTile<R>& tile) const {
    const int64_t wide = padded<R>(call_.dim);
    const R scale = static_cast<R>(call_.scale * LOG2E);
    tile.queries.assign(tile.tokens * call_.group * wide, R{0});
    for (int64_t row = 0; row < tile.tokens * call_.group; row++) {
      const int64_t token = tile.token + row / call_.group, head = tile.head * call_.group + row % call_.group;
      const T* from = q_ + tile.row * call_.stride_q[0] + head * call_.stride_q[1] + token * call_.stride_q[2];
      for (int64_t feature = 0; feature < call_.dim; feature++)
        tile.queries[row * wide + feature] = static_cast<R>(from[feature]) * scale;
    }
    if (!tile.chooses)
      return;
    const int64_t width = padded<R>(call_.index_dims), rows = tile.tokens * call_.group;
    tile.index_queries.assign(rows * width, R{0});
    for (int64_t row = 0; row < rows; row++)
      for (int64_t place = 0; place < call_.index_dims; place++)
        tile.index_queries[row * width + place] =
            tile.queries[row * wide + channels_[tile.head * call_.index_dims + place]];
    tile.coarse.assign(tile.tokens * call_.group * padded<R>(tile.coarse_end), static_cast<R>(HIDDEN));
    tile.fine.assign(tile.tokens * call_.group * padded<R>(tile.fine_end - tile.fine_begin), static_cast<R>(HIDDEN));
  }

  void score(const ScoreTask& task, std::vector<R>& scratch) {
    SharedTile<R>& tile = tiles_[task.tile];
    const bool of_fine = !task.coarse || call_.exact;
    const T* from = static_cast<const T*>(of_fine ? fine_ : coarse_);
    const int64_t* stride = of_fine ? call_.stride_k1 : call_.stride_k2;
    from += tile.row * stride[0] + tile.head * stride[1] + task.windows.begin * stride[2];
    const int64_t count = task.windows.end - task.windows.begin, first = task.coarse ? 0 : tile.fine_begin;
    const int64_t width = padded<R>(task.coarse ? tile.coarse_end : tile.fine_end - tile.fine_begin);
    int64_t apart;
    const R* keys = as_reals(from, stride[2], count, call_.dim, scratch, &apart);
    R* to = (task.coarse ? tile.coarse : tile.fine).data() + task.windows.begin - first;
    multiply_all(
        tile.queries.data(), tile.tokens * call_.group, padded<R>(call_.dim), keys, apart, count, to, width);
  }

  void score_stored(const ScoreTask& task, std::vector<R>& scratch) {
    if (call_.index_kind == INDEX_INT8)
      score_tokens(task, static_cast<const int8_t*>(fine_), scratch);
    else if (call_.index_kind == INDEX_FP8)
      score_tokens(task, static_cast<const Fp8*>(fine_), scratch);
    else
      score_tokens(task, static_cast<const T*>(fine_), scratch);
  }

  // The largest logits of blocks' visible tokens.
  template <typename I>
  void score_tokens(const ScoreTask& task, const I* from, std::vector<R>& scratch) {
    SharedTile<R>& tile = tiles_[task.tile];
    const int64_t size = call_.block_size, dims = call_.index_dims, wide = padded<R>(dims), first = begins_[tile.row];
    const int64_t rows = tile.tokens * call_.group, width = padded<R>(tile.fine_end - tile.fine_begin);
    const int64_t stride = call_.stride_k1[2], seen_from = first_key(tile.last);
    from += tile.row * call_.stride_k1[0] + tile.head * call_.stride_k1[1] + first * stride;
    const float* scales = call_.index_kind == INDEX_AS_KEYS ? nullptr
        : static_cast<const float*>(coarse_) + tile.row * call_.stride_k2[0] + tile.head * call_.stride_k2[1] +
            first * call_.stride_k2[2];
    const bool* mask = key_mask_ == nullptr
        ? nullptr
        : key_mask_ + tile.row * call_.stride_mask[0] + first * call_.stride_mask[1];
    scratch.assign(LANES<R> * wide + rows * LANES<R>, R{0});
    R* maxima = scratch.data() + LANES<R> * wide;  // [rows][LANES]
    for (int64_t block = task.windows.begin; block < task.windows.end; block++) {
      std::fill_n(maxima, rows * LANES<R>, static_cast<R>(HIDDEN));
      const int64_t end = std::min((block + 1) * size, tile.last + 1);
      for (int64_t key = std::max(block * size, seen_from); key < end; key += LANES<R>) {
        const int64_t count = std::min<int64_t>(LANES<R>, end - key);
        const R* keys[LANES<R>];
        R factors[LANES<R>], terms[LANES<R>] = {};  // of a logit; a hidden key's are 0 and HIDDEN
        for (int64_t lane = 0; lane < LANES<R>; lane++) {
          const int64_t place = key + std::min(lane, count - 1);
          keys[lane] = index_key(from + place * stride, dims, scratch.data() + lane * wide);
          factors[lane] = scales == nullptr ? R{1} : R{scales[place * call_.stride_k2[2]]};
        }
        if (count < LANES<R> || mask != nullptr)
          for (int64_t lane = 0; lane < LANES<R>; lane++)
            if (lane >= count || (mask != nullptr && !mask[(key + lane) * call_.stride_mask[1]]))
              factors[lane] = R{0}, terms[lane] = static_cast<R>(HIDDEN);
        for (int64_t row = 0; row < rows; row++) {
          const R* query = tile.index_queries.data() + row * wide;
          Vector<R> sums[LANES<R>] = {};
          for (int64_t place = 0; place < wide; place += LANES<R>) {
            const Vector<R> numbers = load(query + place);
            for (int lane = 0; lane < LANES<R>; lane++)
              sums[lane] = multiply_add(numbers, load(keys[lane] + place), sums[lane]);
          }
          R* top = maxima + row * LANES<R>;
          store(top, maximum(load(top), multiply_add(sums_of<R>(sums), load(factors), load(terms))));
        }
      }
      for (int64_t row = 0; row < rows; row++)
        tile.fine[row * width + block - tile.fine_begin] = reduce_max(load(maxima + row * LANES<R>));
    }
  }

  // An index key as whole vectors: where it lies, or copied.
  template <typename I>
  static const R* index_key(const I* from, int64_t dims, R* to) {
    if constexpr (std::is_same_v<I, R>)
      if (dims % LANES<R> == 0)
        return from;
    int64_t place = 0;
    for (; place + LANES<R> <= dims; place += LANES<R>)
      store(to + place, widen<R>(from + place));
    if (place < dims) {
      I rest[LANES<R>] = {};
      std::copy(from + place, from + dims, rest);
      store(to + place, widen<R>(rest));
    }
    return to;
  }

  void choose_best(SharedTile<R>& tile) const {
    if (cap_.given) {  // it keeps the order of logits: the largest one capped is that of capped ones
      cap_.cap_visible(tile.coarse.data(), tile.coarse.size());
      cap_.cap_visible(tile.fine.data(), tile.fine.size());
    }
    if (call_.index_dims > 0)
      weigh_blocks(tile);
    else
      weigh_windows(tile);
  }

  // Takes the best blocks by the maxima of all.
  void weigh_blocks(SharedTile<R>& tile) const {
    const int64_t width = padded<R>(tile.fine_end - tile.fine_begin);
    std::vector<R> scores(width, R{0});
    for (int64_t row = 0; row < tile.tokens * call_.group; row++)
      add_block_weights(tile.fine.data() + row * width, width, scores.data());
    for (int64_t block = 0; block < width; block++)  // the same blocks for all rows
      if (tile.fine[block] <= static_cast<R>(0.5 * HIDDEN))
        scores[block] = R{-1};
    take(tile, scores);
  }

  void weigh_windows(SharedTile<R>& tile) const {
    const int64_t rows = tile.tokens * call_.group;
    const int64_t wide = padded<R>(tile.coarse_end), width = padded<R>(tile.fine_end - tile.fine_begin);
    std::vector<R> scores(width, R{0});
    for (int64_t row = 0; row < rows && tile.coarse_end > 0; row++) {  // where no key is seen all scores are 0
      const R* coarse = tile.coarse.data() + row * wide;
      Vector<R> tops = load(coarse), total{};
      for (int64_t window = LANES<R>; window < wide; window += LANES<R>)
        tops = maximum(tops, load(coarse + window));
      const R top = reduce_max(tops);
      for (int64_t window = 0; window < wide; window += LANES<R>)
        total += exp2(load(coarse + window) - top);
      const R norm = top + std::log2(reduce_sum(total));
      const R* fine = tile.fine.data() + row * width;
      for (int64_t window = 0; window < width; window += LANES<R>)
        store(scores.data() + window, load(scores.data() + window) + exp2(load(fine + window) - norm));
    }
    take(tile, scores);
  }

  void take(SharedTile<R>& tile, const std::vector<R>& scores) const {
    BlockRanking<R>(call_).each_best(
        scores.data(), tile.fine_begin, tile.fine_end, tile.low, tile.high, tile.taken,
        [&](int64_t block) { tile.chosen.push_back(block); });
    std::sort(tile.chosen.begin(), tile.chosen.end());
  }

  // Cuts what a query visits into parts of about as many keys.
  void add_partials(int64_t number, int64_t token) {
    const SharedTile<R>& tile = tiles_[number];
    const int64_t position = tile.length - call_.length_q + tile.token + token, size = call_.block_size;
    const Range seen{first_key(position), position + 1};
    std::vector<Range> visits;
    const auto visit = [&](int64_t begin, int64_t end) {
      begin = std::max(begin, seen.begin), end = std::min(end, seen.end);
      for (; begin < end; begin += RANGE_KEYS)
        visits.push_back({begin, std::min(begin + RANGE_KEYS, end)});
    };
    if (tile.chooses) {
      visit(0, call_.init_blocks * size);
      for (const int64_t block : tile.chosen)
        visit(block * size, (block + 1) * size);
      visit((tile.last / size - call_.local_blocks) * size, position + 1);
    } else {
      visit(0, position + 1);
    }
    int64_t keys = PARTIAL_KEYS;
    for (const Range& each : visits) {
      if (keys >= PARTIAL_KEYS) {
        partials_.push_back({number, token, {}, {}, {}, {}});
        keys = 0;
      }
      partials_.back().visits.push_back(each);
      keys += each.end - each.begin;
    }
  }

  void attend(Partial<R>& partial, std::vector<R>& scratch, std::vector<R>& more) {
    const SharedTile<R>& tile = tiles_[partial.tile];
    const int64_t group = call_.group, wide = padded<R>(call_.dim), wide_v = padded<R>(call_.dim_v);
    const R* queries = tile.queries.data() + partial.token * group * wide;
    const int64_t first = begins_[tile.row];
    const T* k = k_ + tile.row * call_.stride_k[0] + tile.head * call_.stride_k[1] + first * call_.stride_k[2];
    const T* v = v_ + tile.row * call_.stride_v[0] + tile.head * call_.stride_v[1] + first * call_.stride_v[2];
    const bool* mask = key_mask_ == nullptr
        ? nullptr
        : key_mask_ + tile.row * call_.stride_mask[0] + first * call_.stride_mask[1];
    const R* bias = terms_.bias_of(tile.row, tile.head, first);
    partial.tops.assign(group, static_cast<R>(HIDDEN)), partial.totals.assign(group, R{0}), partial.sums.assign(group * wide_v, R{0});
    more.resize(group * RANGE_KEYS);
    for (const Range& range : partial.visits) {
      const int64_t count = range.end - range.begin, stretch = padded<R>(count);
      int64_t apart;
      const R* keys = as_reals(k + range.begin * call_.stride_k[2], call_.stride_k[2], count, call_.dim, scratch, &apart);
      multiply_all(queries, group, wide, keys, apart, count, more.data(), RANGE_KEYS);
      for (int64_t row = 0; row < group; row++) {
        R* logits = more.data() + row * RANGE_KEYS;
        if (cap_.given || bias != nullptr)
          add_terms(logits, count, bias == nullptr ? nullptr : bias + range.begin);
        std::fill(logits + count, logits + stretch, static_cast<R>(HIDDEN));
        if (mask != nullptr)
          for (int64_t key = 0; key < count; key++)
            logits[key] = mask[(range.begin + key) * call_.stride_mask[1]] ? logits[key] : static_cast<R>(HIDDEN);
        softmax(logits, stretch, partial.tops[row], partial.totals[row], partial.sums.data() + row * wide_v, wide_v);
      }
      const R* values =
          as_reals(v + range.begin * call_.stride_v[2], call_.stride_v[2], count, call_.dim_v, scratch, &apart);
      add_all(more.data(), RANGE_KEYS, group, values, apart, count, partial.sums.data(), wide_v);
    }
  }

  // Caps `count` logits of a row and adds the biases of their keys, or null.
  __attribute__((noinline)) void add_terms(R* logits, int64_t count, const R* bias) const {
    if (cap_.given)
      for (int64_t key = 0; key < count; key += LANES<R>)
        store(logits + key, cap_(load(logits + key)));
    if (bias == nullptr)
      return;
    const Vector<R> least = broadcast(static_cast<R>(LEAST_BIAS)), hidden = broadcast(static_cast<R>(HIDDEN));
    int64_t key = 0;
    for (; key + LANES<R> <= count; key += LANES<R>) {
      const Vector<R> added = load(bias + key);
      store(logits + key, added >= least ? multiply_add(added, broadcast(static_cast<R>(LOG2E)), load(logits + key))
                                         : hidden);
    }
    for (; key < count; key++)  // what follows the last key is not the bias's
      logits[key] = bias[key] >= static_cast<R>(LEAST_BIAS) ? logits[key] + bias[key] * static_cast<R>(LOG2E)
                                                           : static_cast<R>(HIDDEN);
  }

  // Turns the logits of a range into weights; what was summed before fades.
  static void softmax(R* logits, int64_t count, R& top, R& total, R* sums, int64_t wide) {
    Vector<R> tops = load(logits), added{};
    for (int64_t key = LANES<R>; key < count; key += LANES<R>)
      tops = maximum(tops, load(logits + key));
    const R raised = std::max(top, reduce_max(tops));
    if (raised <= static_cast<R>(0.5 * HIDDEN)) {  // no key was seen yet
      std::fill_n(logits, count, R{0});
      return;
    }
    if (raised > top) {
      const R decay = exp2(top - raised);
      for (int64_t column = 0; column < wide; column += LANES<R>)
        store(sums + column, load(sums + column) * decay);
      total *= decay, top = raised;
    }
    for (int64_t key = 0; key < count; key += LANES<R>) {
      const Vector<R> weights = exp2(load(logits + key) - top);
      store(logits + key, weights);
      added += weights;
    }
    total += reduce_sum(added);
  }

  static bool same_query(const Partial<R>& one, const Partial<R>& other) {
    return one.tile == other.tile && one.token == other.token;
  }

  // The result of a query from its parts, of which `number` is the first, and its sinks, which no part has counted.
  void reduce_partials(size_t number, T* out, R* lse) const {
    const SharedTile<R>& tile = tiles_[partials_[number].tile];
    const int64_t group = call_.group, wide = padded<R>(call_.dim_v), heads = call_.heads * group;
    const int64_t token = tile.token + partials_[number].token;
    const R* sinks = terms_.sinks_of(tile.head * group);
    size_t end = number;
    while (end < partials_.size() && same_query(partials_[number], partials_[end]))
      end++;
    std::vector<R> sums(call_.dim_v);
    for (int64_t row = 0; row < group; row++) {
      const R sink = sink_logit(sinks, row);
      R top = sink;
      for (size_t partial = number; partial < end; partial++)
        top = std::max(top, partials_[partial].tops[row]);
      R total = sink > static_cast<R>(HIDDEN) ? exp2(sink - top) : R{0};
      std::fill(sums.begin(), sums.end(), R{0});
      for (size_t partial = number; partial < end; partial++) {
        const R share = exp2(partials_[partial].tops[row] - top);
        total += share * partials_[partial].totals[row];
        for (int64_t feature = 0; feature < call_.dim_v; feature++)
          sums[feature] += share * partials_[partial].sums[row * wide + feature];
      }
      const int64_t head = tile.head * group + row;
      T* to = out + ((tile.row * call_.length_q + token) * heads + head) * call_.dim_v;
      for (int64_t feature = 0; feature < call_.dim_v; feature++)
        to[feature] = static_cast<T>(total > R{0} ? sums[feature] / total : R{0});
      lse[(tile.row * heads + head) * call_.length_q + token] =
          total > R{0} ? (top + std::log2(total)) / static_cast<R>(LOG2E) : -std::numeric_limits<R>::infinity();
    }
  }

  const DecodeCall& call_;
  const T *q_, *k_, *v_;
  const void *fine_, *coarse_;  // K1 and K2, or index keys and their scales
  const int32_t* channels_;     // that index keys have, [heads][index_dims]
  const int64_t* begins_;
  const bool* key_mask_;
  const TermTensors<R> terms_;
  const SoftCap<R> cap_;
  std::vector<SharedTile<R>> tiles_;
  std::vector<ScoreTask> score_tasks_;
  std::vector<Partial<R>> partials_;
};

}  // namespace
}  // namespace infllm

#endif  // INFLLM_DECODE_ATTENTION_H
