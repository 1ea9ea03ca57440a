// A decode step of switchable attention on the CPU: a few new queries over a cache whose compressed keys are given
// (InfLLM-V2, arXiv 2509.24663, sections 3.1 and 3.2). Plain C++17 with vector extensions and OpenMP.
//
// A step reads its compressed keys and the keys and values that it visits, once and where they lie; little else takes
// time. A line is what shares a selection: adjacent queries of a batch row, for one key/value head. Scores are computed
// by line and stretch of windows, attention by query and stretch of visited keys, so that all threads have work at any
// batch size; parts of a query's softmax are put together at the end. Arithmetic is float32, logits in units of log 2.

#ifndef INFLLM_DECODE_ATTENTION_H
#define INFLLM_DECODE_ATTENTION_H

#include <limits>
#include <type_traits>

#include "vectors.h"

namespace infllm {
namespace {

constexpr int64_t SCORED_WINDOWS = 512;  // compressed keys of one task
constexpr int64_t PIECE_KEYS = 128;      // adjacent keys whose logits are held at once
constexpr int64_t PART_KEYS = 512;       // visited keys of one task, about
constexpr int ROWS = 4, VECTORS = 4;     // of one product: what the registers hold

struct DecodeCall {
  int64_t batch, heads, group, length_q, dim, dim_v;
  int64_t stride_q[3], stride_k[3], stride_v[3];   // of batch, head and token; features are adjacent
  int64_t stride_fine[3], stride_coarse[3];        // of K1 and K2: of batch, head and window
  int64_t stride_mask[2], window, dense_len;       // window: keys, more than there are if there is none
  int64_t kernel_size, kernel_stride, block_size, init_blocks, local_blocks, selected_blocks, exact, query_block;
  int64_t threads;
  float scale;
};

// Adjacent keys, numbered from the first of the sequence.
struct Range {
  int64_t begin, end;
};

struct Line {
  int64_t row, head, token, tokens;  // queries `token` on
  int64_t length, last;              // keys of the sequence, and the position that decides what is selected
  bool chooses;                      // whether the best `taken` of the blocks from `low` to `high` are visited
  int64_t low, high, taken;
  int64_t fine_begin, fine_end, coarse_end;  // windows that count
  std::vector<float> queries;                // [tokens * group][padded dim], times scale and log2(e)
  std::vector<float> fine, coarse;           // logits of windows, [tokens * group][padded count]
  std::vector<int64_t> chosen;               // ascending
};

// Logits of a stretch of compressed keys.
struct Scoring {
  int64_t line;
  bool coarse;
  Range windows;
};

// Attention of one query's heads to a stretch of what it visits.
struct Part {
  int64_t line, token;
  std::vector<Range> visits;
  std::vector<float> tops, totals, sums;  // [group], [group], [group][padded dim_v]
};

inline int64_t padded(int64_t count) {
  return ceil_div(count, LANES) * LANES;
}

// `count` vectors as float32, each padded with zeros to vectors of LANES: where they lie, or copied to `scratch`.
template <typename T>
const float* as_floats(
    const T* from, int64_t stride, int64_t count, int64_t dim, std::vector<float>& scratch, int64_t* apart) {
  if constexpr (std::is_same_v<T, float>)
    if (dim % LANES == 0) {
      *apart = stride;
      return from;
    }
  *apart = padded(dim);
  scratch.assign(count * *apart, 0.0f);
  for (int64_t number = 0; number < count; number++)
    for (int64_t feature = 0; feature < dim; feature++)
      scratch[number * *apart + feature] = static_cast<float>(from[number * stride + feature]);
  return scratch.data();
}

template <int rows>
inline void multiply_rows(
    const float* queries, int64_t wide, const float* keys, int64_t apart, int64_t count, float* to, int64_t width) {
  for (int64_t key = 0; key < count; key += VECTORS) {
    Vector sums[rows][VECTORS] = {};
    const float* at[VECTORS];
    for (int place = 0; place < VECTORS; place++)
      at[place] = keys + std::min(key + place, count - 1) * apart;
    for (int64_t feature = 0; feature < wide; feature += LANES)
      for (int place = 0; place < VECTORS; place++) {
        const Vector numbers = load(at[place] + feature);
        for (int row = 0; row < rows; row++)
          sums[row][place] = multiply_add(load(queries + row * wide + feature), numbers, sums[row][place]);
      }
    for (int row = 0; row < rows; row++)
      for (int place = 0; place < VECTORS && key + place < count; place++)
        to[row * width + key + place] = sum(sums[row][place]);
  }
}

// Runs a function for ROWS rows at a time, and for the rest: with their number as a type, and the first of them.
template <typename Function>
inline void by_rows(int64_t rows, Function run) {
  for (int64_t row = 0; row < rows; row += ROWS)
    switch (std::min<int64_t>(ROWS, rows - row)) {
      case 1: run(std::integral_constant<int, 1>(), row); break;
      case 2: run(std::integral_constant<int, 2>(), row); break;
      case 3: run(std::integral_constant<int, 3>(), row); break;
      default: run(std::integral_constant<int, ROWS>(), row);
    }
}

// Products of `rows` queries of `wide` numbers with `count` keys: to[row * width + key].
inline void multiply_all(
    const float* queries,
    int64_t rows,
    int64_t wide,
    const float* keys,
    int64_t apart,
    int64_t count,
    float* to,
    int64_t width) {
  by_rows(rows, [&](auto some, int64_t row) {
    multiply_rows<decltype(some)::value>(queries + row * wide, wide, keys, apart, count, to + row * width, width);
  });
}

template <int rows, int vectors>
inline void add_values(
    const float* weights, int64_t width, const float* values, int64_t apart, int64_t count, float* sums, int64_t wide) {
  Vector total[rows][vectors];
  for (int row = 0; row < rows; row++)
    for (int place = 0; place < vectors; place++)
      total[row][place] = load(sums + row * wide + place * LANES);
  for (int64_t key = 0; key < count; key++)
    for (int place = 0; place < vectors; place++) {
      const Vector numbers = load(values + key * apart + place * LANES);
      for (int row = 0; row < rows; row++)
        total[row][place] = multiply_add(all(weights[row * width + key]), numbers, total[row][place]);
    }
  for (int row = 0; row < rows; row++)
    for (int place = 0; place < vectors; place++)
      store(sums + row * wide + place * LANES, total[row][place]);
}

template <int rows>
inline void add_values(
    const float* weights, int64_t width, const float* values, int64_t apart, int64_t count, float* sums, int64_t wide) {
  int64_t column = 0;
  for (; column + VECTORS * LANES <= wide; column += VECTORS * LANES)
    add_values<rows, VECTORS>(weights, width, values + column, apart, count, sums + column, wide);
  for (; column < wide; column += LANES)
    add_values<rows, 1>(weights, width, values + column, apart, count, sums + column, wide);
}

// Adds `count` values of `wide` numbers, weighted by weights[row * width + key], to the sums of `rows` rows.
inline void add_all(
    const float* weights,
    int64_t width,
    int64_t rows,
    const float* values,
    int64_t apart,
    int64_t count,
    float* sums,
    int64_t wide) {
  by_rows(rows, [&](auto some, int64_t row) {
    add_values<decltype(some)::value>(weights + row * width, width, values, apart, count, sums + row * wide, wide);
  });
}

template <typename T>
class DecodeStep {
 public:
  DecodeStep(
      const DecodeCall& call,
      const T* q,
      const T* k,
      const T* v,
      const T* fine,
      const T* coarse,
      const int64_t* begins,
      const int64_t* ends,
      const bool* key_mask)
      : call_(call), q_(q), k_(k), v_(v), fine_(fine), coarse_(coarse), begins_(begins), key_mask_(key_mask) {
    for (int64_t row = 0; row < call.batch; row++)
      for (int64_t head = 0; head < call.heads; head++)
        add_lines(row, head, ends[row] - begins[row]);
    for (size_t number = 0; number < lines_.size(); number++)
      if (lines_[number].chooses) {
        add_scorings(number, true, {0, lines_[number].coarse_end});
        add_scorings(number, false, {lines_[number].fine_begin, lines_[number].fine_end});
      }
  }

  // `out` is [batch, length_q, heads * group, dim_v], `lse` [batch, heads * group, length_q]; rows of queries that stand
  // before the first key are left as they are.
  void run(T* out, float* lse) {
#pragma omp parallel num_threads(static_cast<int>(call_.threads))
    {
      std::vector<float> scratch, more;
#pragma omp for schedule(dynamic)
      for (size_t number = 0; number < lines_.size(); number++)
        load_queries(lines_[number]);
#pragma omp for schedule(dynamic)
      for (size_t number = 0; number < scorings_.size(); number++)
        score(scorings_[number], scratch);
#pragma omp for schedule(dynamic)
      for (size_t number = 0; number < lines_.size(); number++)
        if (lines_[number].chooses)
          choose_best(lines_[number]);
#pragma omp single
      for (size_t number = 0; number < lines_.size(); number++)
        for (int64_t token = 0; token < lines_[number].tokens; token++)
          add_parts(number, token);
#pragma omp for schedule(dynamic)
      for (size_t number = 0; number < parts_.size(); number++)
        attend(parts_[number], scratch, more);
#pragma omp for
      for (size_t number = 0; number < parts_.size(); number++)
        if (number == 0 || !same_query(parts_[number - 1], parts_[number]))
          put_together(number, out, lse);
    }
  }

 private:
  void add_lines(int64_t row, int64_t head, int64_t length) {
    const int64_t share = length >= call_.dense_len ? call_.query_block : 1, base = length - call_.length_q;
    for (int64_t token = std::max<int64_t>(0, -base); token < call_.length_q;) {
      const int64_t end = ((base + token) / share + 1) * share;  // one past the last position of the line
      Line line{};
      line.row = row, line.head = head, line.token = token, line.length = length;
      line.tokens = std::min(end - base, call_.length_q) - token;
      line.last = std::min(end, length) - 1;
      if (length >= call_.dense_len)
        plan_choice(line);
      lines_.push_back(line);
      token += line.tokens;
    }
  }

  // Section 3.2: candidates are the blocks that no query of the line visits by rule.
  void plan_choice(Line& line) const {
    const int64_t size = call_.kernel_size, step = call_.kernel_stride, factor = call_.exact ? 1 : COARSE_FACTOR;
    const int64_t reach = first_key(line.last) / call_.block_size, per_block = call_.block_size / step;
    line.low = std::max(reach, call_.init_blocks), line.high = line.last / call_.block_size - call_.local_blocks;
    line.taken =
        call_.selected_blocks - call_.local_blocks - 1 - std::max<int64_t>(0, call_.init_blocks - reach);
    line.chooses = line.high - line.low > line.taken;
    line.coarse_end = windows_up_to(line.last, factor * size, factor * step);
    line.fine_begin = std::max<int64_t>(0, line.low * per_block - (size / step - 1));
    line.fine_end = std::max(line.fine_begin, std::min(line.high * per_block, windows_up_to(line.last, size, step)));
  }

  // The first key in the window of a query.
  int64_t first_key(int64_t position) const {
    return std::max<int64_t>(0, position - call_.window + 1);
  }

  void add_scorings(int64_t line, bool coarse, Range windows) {
    for (int64_t begin = windows.begin; begin < windows.end; begin += SCORED_WINDOWS)
      scorings_.push_back({line, coarse, {begin, std::min(begin + SCORED_WINDOWS, windows.end)}});
  }

  void load_queries(Line& line) const {
    const int64_t wide = padded(call_.dim);
    const float scale = call_.scale * LOG2E;
    line.queries.assign(line.tokens * call_.group * wide, 0.0f);
    for (int64_t row = 0; row < line.tokens * call_.group; row++) {
      const int64_t token = line.token + row / call_.group, head = line.head * call_.group + row % call_.group;
      const T* from = q_ + line.row * call_.stride_q[0] + head * call_.stride_q[1] + token * call_.stride_q[2];
      for (int64_t feature = 0; feature < call_.dim; feature++)
        line.queries[row * wide + feature] = static_cast<float>(from[feature]) * scale;
    }
    if (!line.chooses)
      return;
    line.coarse.assign(line.tokens * call_.group * padded(line.coarse_end), HIDDEN);
    line.fine.assign(line.tokens * call_.group * padded(line.fine_end - line.fine_begin), HIDDEN);
  }

  void score(const Scoring& task, std::vector<float>& scratch) {
    Line& line = lines_[task.line];
    const bool of_fine = !task.coarse || call_.exact;
    const T* from = of_fine ? fine_ : coarse_;
    const int64_t* stride = of_fine ? call_.stride_fine : call_.stride_coarse;
    from += line.row * stride[0] + line.head * stride[1] + task.windows.begin * stride[2];
    const int64_t count = task.windows.end - task.windows.begin, first = task.coarse ? 0 : line.fine_begin;
    const int64_t width = padded(task.coarse ? line.coarse_end : line.fine_end - line.fine_begin);
    int64_t apart;
    const float* keys = as_floats(from, stride[2], count, call_.dim, scratch, &apart);
    float* to = (task.coarse ? line.coarse : line.fine).data() + task.windows.begin - first;
    multiply_all(
        line.queries.data(), line.tokens * call_.group, padded(call_.dim), keys, apart, count, to, width);
  }

  void choose_best(Line& line) const {
    const int64_t rows = line.tokens * call_.group;
    const int64_t wide = padded(line.coarse_end), width = padded(line.fine_end - line.fine_begin);
    std::vector<float> scores(width, 0.0f);
    for (int64_t row = 0; row < rows && line.coarse_end > 0; row++) {  // where no key is seen all scores are 0
      const float* coarse = line.coarse.data() + row * wide;
      Vector tops = load(coarse), total{};
      for (int64_t window = LANES; window < wide; window += LANES)
        tops = higher(tops, load(coarse + window));
      const float top = highest(tops);
      for (int64_t window = 0; window < wide; window += LANES)
        total += exp2(load(coarse + window) - top);
      const float norm = top + std::log2(sum(total));
      const float* fine = line.fine.data() + row * width;
      for (int64_t window = 0; window < width; window += LANES)
        store(scores.data() + window, load(scores.data() + window) + exp2(load(fine + window) - norm));
    }
    ranking_of(call_).each_best(
        scores.data(), line.fine_begin, line.fine_end, line.low, line.high, line.taken,
        [&](int64_t block) { line.chosen.push_back(block); });
    std::sort(line.chosen.begin(), line.chosen.end());
  }

  // Cuts what a query visits into parts of about as many keys.
  void add_parts(int64_t number, int64_t token) {
    const Line& line = lines_[number];
    const int64_t position = line.length - call_.length_q + line.token + token, size = call_.block_size;
    const Range seen{first_key(position), position + 1};
    std::vector<Range> visits;
    const auto visit = [&](int64_t begin, int64_t end) {
      begin = std::max(begin, seen.begin), end = std::min(end, seen.end);
      for (; begin < end; begin += PIECE_KEYS)
        visits.push_back({begin, std::min(begin + PIECE_KEYS, end)});
    };
    if (line.chooses) {
      visit(0, call_.init_blocks * size);
      for (const int64_t block : line.chosen)
        visit(block * size, (block + 1) * size);
      visit((line.last / size - call_.local_blocks) * size, position + 1);
    } else {
      visit(0, position + 1);
    }
    int64_t keys = PART_KEYS;
    for (const Range& each : visits) {
      if (keys >= PART_KEYS) {
        parts_.push_back({number, token, {}, {}, {}, {}});
        keys = 0;
      }
      parts_.back().visits.push_back(each);
      keys += each.end - each.begin;
    }
  }

  void attend(Part& part, std::vector<float>& scratch, std::vector<float>& more) {
    const Line& line = lines_[part.line];
    const int64_t group = call_.group, wide = padded(call_.dim), wide_v = padded(call_.dim_v);
    const float* queries = line.queries.data() + part.token * group * wide;
    const int64_t first = begins_[line.row];
    const T* k = k_ + line.row * call_.stride_k[0] + line.head * call_.stride_k[1] + first * call_.stride_k[2];
    const T* v = v_ + line.row * call_.stride_v[0] + line.head * call_.stride_v[1] + first * call_.stride_v[2];
    const bool* mask = key_mask_ == nullptr
        ? nullptr
        : key_mask_ + line.row * call_.stride_mask[0] + first * call_.stride_mask[1];
    part.tops.assign(group, HIDDEN), part.totals.assign(group, 0.0f), part.sums.assign(group * wide_v, 0.0f);
    more.resize(group * PIECE_KEYS);
    for (const Range& piece : part.visits) {
      const int64_t count = piece.end - piece.begin, stretch = padded(count);
      int64_t apart;
      const float* keys = as_floats(k + piece.begin * call_.stride_k[2], call_.stride_k[2], count, call_.dim, scratch, &apart);
      multiply_all(queries, group, wide, keys, apart, count, more.data(), PIECE_KEYS);
      for (int64_t row = 0; row < group; row++) {
        float* logits = more.data() + row * PIECE_KEYS;
        std::fill(logits + count, logits + stretch, HIDDEN);
        if (mask != nullptr)
          for (int64_t key = 0; key < count; key++)
            logits[key] = mask[(piece.begin + key) * call_.stride_mask[1]] ? logits[key] : HIDDEN;
        weigh(logits, stretch, part.tops[row], part.totals[row], part.sums.data() + row * wide_v, wide_v);
      }
      const float* values =
          as_floats(v + piece.begin * call_.stride_v[2], call_.stride_v[2], count, call_.dim_v, scratch, &apart);
      add_all(more.data(), PIECE_KEYS, group, values, apart, count, part.sums.data(), wide_v);
    }
  }

  // Turns the logits of a piece into weights; what was summed before fades.
  static void weigh(float* logits, int64_t count, float& top, float& total, float* sums, int64_t wide) {
    Vector tops = load(logits), added{};
    for (int64_t key = LANES; key < count; key += LANES)
      tops = higher(tops, load(logits + key));
    const float raised = std::max(top, highest(tops));
    if (raised <= 0.5f * HIDDEN) {  // no key was seen yet
      std::fill_n(logits, count, 0.0f);
      return;
    }
    if (raised > top) {
      const float fading = exp2(top - raised);
      for (int64_t column = 0; column < wide; column += LANES)
        store(sums + column, load(sums + column) * fading);
      total *= fading, top = raised;
    }
    for (int64_t key = 0; key < count; key += LANES) {
      const Vector weights = exp2(load(logits + key) - top);
      store(logits + key, weights);
      added += weights;
    }
    total += sum(added);
  }

  static bool same_query(const Part& one, const Part& other) {
    return one.line == other.line && one.token == other.token;
  }

  // The result of a query from its parts, of which `number` is the first.
  void put_together(size_t number, T* out, float* lse) const {
    const Line& line = lines_[parts_[number].line];
    const int64_t group = call_.group, wide = padded(call_.dim_v), heads = call_.heads * group;
    const int64_t token = line.token + parts_[number].token;
    size_t end = number;
    while (end < parts_.size() && same_query(parts_[number], parts_[end]))
      end++;
    std::vector<float> sums(call_.dim_v);
    for (int64_t row = 0; row < group; row++) {
      float top = HIDDEN, total = 0.0f;
      for (size_t part = number; part < end; part++)
        top = std::max(top, parts_[part].tops[row]);
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (size_t part = number; part < end; part++) {
        const float share = exp2(parts_[part].tops[row] - top);
        total += share * parts_[part].totals[row];
        for (int64_t feature = 0; feature < call_.dim_v; feature++)
          sums[feature] += share * parts_[part].sums[row * wide + feature];
      }
      const int64_t head = line.head * group + row;
      T* to = out + ((line.row * call_.length_q + token) * heads + head) * call_.dim_v;
      for (int64_t feature = 0; feature < call_.dim_v; feature++)
        to[feature] = static_cast<T>(total > 0.0f ? sums[feature] / total : 0.0f);
      lse[(line.row * heads + head) * call_.length_q + token] =
          total > 0.0f ? (top + std::log2(total)) / LOG2E : -std::numeric_limits<float>::infinity();
    }
  }

  const DecodeCall& call_;
  const T *q_, *k_, *v_, *fine_, *coarse_;
  const int64_t* begins_;
  const bool* key_mask_;
  std::vector<Line> lines_;
  std::vector<Scoring> scorings_;
  std::vector<Part> parts_;
};

}  // namespace
}  // namespace infllm

#endif  // INFLLM_DECODE_ATTENTION_H
