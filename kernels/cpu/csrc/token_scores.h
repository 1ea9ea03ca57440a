// Token scores of key blocks: the largest logit of a block's visible tokens over some channels of the head, normalised
// over all blocks, added up over the heads of a group and the queries that share a selection. Logits are in units of
// log 2.

#ifndef INFLLM_TOKEN_SCORES_H
#define INFLLM_TOKEN_SCORES_H

#include "query_chunk.h"

namespace infllm {
namespace {

// Adjacent queries that share a selection: of the candidates [low, high), more than `free`, the best `free` are taken.
struct SharedTile {
  int64_t token, tokens, last, low, high, free;
};

// A number rounded to three bits of mantissa and an exponent of -6 at least, ties to even, as 8 bits store it (e4m3fn).
inline float round_to_fp8(float value) {
  const int exponent = std::max(std::ilogb(value), -6);
  return std::ldexp(std::nearbyint(std::ldexp(value, 3 - exponent)), exponent - 3);
}

// The channels of a key as they are stored and read again: kernels/cpu/tokens.py, index_keys and read_index.
template <typename T>
void store_index(const Call& call, const T* key, const int32_t* channels, Real<T>* to) {
  float highest = 0.0f;
  for (int64_t place = 0; place < call.index_dims; place++) {
    to[place] = static_cast<Real<T>>(key[channels[place]]);
    highest = std::max(highest, std::fabs(static_cast<float>(to[place])));
  }
  if (call.index_kind == INDEX_AS_KEYS)
    return;
  const float scale = highest / (call.index_kind == INDEX_INT8 ? 127.0f : 448.0f);
  for (int64_t place = 0; place < call.index_dims; place++) {
    const float part = static_cast<float>(to[place]) / (scale == 0.0f ? 1.0f : scale);
    const float rounded = call.index_kind == INDEX_INT8 ? std::nearbyint(part) : round_to_fp8(part);
    to[place] = static_cast<Real<T>>(rounded) * static_cast<Real<T>>(scale);
  }
}

// Scores of a chunk's tiles; a thread keeps its scratch from one chunk to the next.
template <typename T>
class TokenScores {
 public:
  using R = Real<T>;

  explicit TokenScores(const Call& call)
      : call_(call), cap_(call.softcap), depth_(call.index_dims + 1), logits_(TILE_ROWS * PANEL<R>) {}

  // Scores of all blocks up to those of the last tile: [tile][width], negative where no token of a block is visible.
  // Returns the width.
  int64_t run(const QueryChunk<T>& chunk, const std::vector<SharedTile>& tiles, std::vector<R>& scores) {
    const int64_t begin = tiles.front().token, group = chunk.group;
    rows_ = (tiles.back().token + tiles.back().tokens - begin) * group;
    blocks_ = tiles.back().last / call_.block_size + 1;
    width_ = round_up(blocks_, LANES<R>);
    take_queries(chunk, begin * group);
    lasts_.resize(rows_);
    for (const SharedTile& tile : tiles)
      std::fill_n(lasts_.begin() + (tile.token - begin) * group, tile.tokens * group, tile.last);
    find_maxima(*chunk.head->index, chunk.head->valid == nullptr);
    if (cap_.given)  // it keeps the order of logits: the largest one capped is that of capped ones
      cap_.cap_visible(maxima_.data(), rows_ * width_);
    scores.assign(tiles.size() * width_, R{0});
    for (size_t number = 0; number < tiles.size(); number++) {
      const int64_t first = (tiles[number].token - begin) * group;
      R* to = scores.data() + number * width_;
      for (int64_t row = first; row < first + tiles[number].tokens * group; row++)
        add_block_weights(maxima_.data() + row * width_, width_, to);
      for (int64_t block = 0; block < width_; block++)  // the same blocks for all rows
        if (maxima_[first * width_ + block] <= static_cast<R>(0.5 * HIDDEN))
          to[block] = R{-1};
    }
    return width_;
  }

 private:
  // The channels of the chunk's queries from row `first` on, and 1.
  void take_queries(const QueryChunk<T>& chunk, int64_t first) {
    queries_.resize(rows_ * depth_);
    for (int64_t row = 0; row < rows_; row++) {
      const R* from = chunk.query(first + row);
      R* to = queries_.data() + row * depth_;
      for (int64_t place = 0; place + 1 < depth_; place++)
        to[place] = from[chunk.head->channels[place]];
      to[depth_ - 1] = R{1};
    }
  }

  // Largest logits of the visible tokens of each block, [row][width].
  void find_maxima(const IndexColumns<R>& keys, bool all_valid) {
    maxima_.assign(rows_ * width_, static_cast<R>(HIDDEN));
    carried_.assign(rows_ * LANES<R>, static_cast<R>(HIDDEN));
    const int64_t apart = keys.apart, end = blocks_ * apart;
    const R* tile[TILE_ROWS];
    R* to[TILE_ROWS];
    for (int64_t place = 0; place < TILE_ROWS; place++)
      to[place] = logits_.data() + place * PANEL<R>;
    const int64_t seen_from = std::max<int64_t>(0, lasts_.front() - call_.window + 1) / call_.block_size * apart;
    for (int64_t column = seen_from / PANEL<R> * PANEL<R>; column < end; column += PANEL<R>) {
      const int64_t block = column / apart, key = block * call_.block_size + column % apart;
      const bool in_block = column % apart + PANEL<R> <= apart;
      const int64_t last_key = in_block ? std::min(key + PANEL<R>, (block + 1) * call_.block_size) - 1
                                        : (ceil_div(column + PANEL<R>, apart)) * call_.block_size - 1;
      for (int64_t row = 0; row < rows_; row += TILE_ROWS) {
        const int64_t real = std::min<int64_t>(TILE_ROWS, rows_ - row);
        for (int64_t place = 0; place < TILE_ROWS; place++)
          tile[place] = queries_.data() + (row + std::min(place, real - 1)) * depth_;
        const bool whole = last_key <= lasts_[row] && key > lasts_[row + real - 1] - call_.window;
        if (in_block && whole) {
          multiply_max<R>(tile, depth_ - all_valid, keys.panel(column / PANEL<R>), to);
          for (int64_t place = 0; place < real; place++)
            fold(row + place, block, column % apart, PANEL<R>, apart, load(to[place]));
        } else {
          multiply<false, R>(tile, depth_, keys.panel(column / PANEL<R>), to, nullptr);
          for (int64_t place = 0; place < real; place++)
            fold_each(row + place, column, apart, to[place]);
        }
      }
    }
  }

  // Takes `count` logits of a row, from column `at` of a block on, whose maximum is in `top`, lane by lane.
  void fold(int64_t row, int64_t block, int64_t at, int64_t count, int64_t apart, Vector<R> top) {
    if (at > 0)
      top = maximum(top, load(carried_.data() + row * LANES<R>));
    if (at + count < apart)
      store(carried_.data() + row * LANES<R>, top);
    else if (block < blocks_)
      maxima_[row * width_ + block] = reduce_max(top);
  }

  // The same for a panel that lies in several blocks, or of which the row does not see all.
  void fold_each(int64_t row, int64_t column, int64_t apart, R* logits) {
    for (int64_t lane = 0; lane < PANEL<R>; lane++) {
      const int64_t key = (column + lane) / apart * call_.block_size + (column + lane) % apart;
      if (key > lasts_[row] || key <= lasts_[row] - call_.window)
        logits[lane] = static_cast<R>(HIDDEN);
    }
    for (int64_t lane = 0; lane < PANEL<R>; lane += LANES<R>)
      fold(row, (column + lane) / apart, (column + lane) % apart, LANES<R>, apart, load(logits + lane));
  }

  const Call& call_;
  const SoftCap<R> cap_;
  const int64_t depth_;
  int64_t rows_ = 0, blocks_ = 0, width_ = 0;
  std::vector<R> queries_, logits_, maxima_, carried_;  // [row][depth], [TILE_ROWS][PANEL], [row][width], [row][LANES]
  std::vector<int64_t> lasts_;                          // of a row: the last position that its tile sees
};

}  // namespace
}  // namespace infllm

#endif  // INFLLM_TOKEN_SCORES_H
