// Products of a few queries with many keys, and sums of their values: what a decode step computes of its tensors.

#ifndef INFLLM_DECODE_PRODUCTS_H
#define INFLLM_DECODE_PRODUCTS_H

#include "score_terms.h"

namespace infllm {
namespace {

constexpr int ROWS = 4, VECTORS = 4;  // of one product: what the registers hold

template <int rows, typename R>
inline void multiply_rows(
    const R* queries, int64_t wide, const R* keys, int64_t apart, int64_t count, R* to, int64_t width) {
  for (int64_t key = 0; key < count; key += VECTORS) {
    Vector<R> sums[rows][VECTORS] = {};
    const R* at[VECTORS];
    for (int place = 0; place < VECTORS; place++)
      at[place] = keys + std::min(key + place, count - 1) * apart;
    for (int64_t feature = 0; feature < wide; feature += LANES<R>)
      for (int place = 0; place < VECTORS; place++) {
        const Vector<R> numbers = load(at[place] + feature);
        for (int row = 0; row < rows; row++)
          sums[row][place] = multiply_add(load(queries + row * wide + feature), numbers, sums[row][place]);
      }
    for (int row = 0; row < rows; row++)
      for (int place = 0; place < VECTORS && key + place < count; place++)
        to[row * width + key + place] = reduce_sum(sums[row][place]);
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
template <typename R>
inline void multiply_all(
    const R* queries,
    int64_t rows,
    int64_t wide,
    const R* keys,
    int64_t apart,
    int64_t count,
    R* to,
    int64_t width) {
  by_rows(rows, [&](auto some, int64_t row) {
    multiply_rows<decltype(some)::value>(queries + row * wide, wide, keys, apart, count, to + row * width, width);
  });
}

template <int rows, int vectors, typename R>
inline void add_values(
    const R* weights, int64_t width, const R* values, int64_t apart, int64_t count, R* sums, int64_t wide) {
  Vector<R> total[rows][vectors];
  for (int row = 0; row < rows; row++)
    for (int place = 0; place < vectors; place++)
      total[row][place] = load(sums + row * wide + place * LANES<R>);
  for (int64_t key = 0; key < count; key++)
    for (int place = 0; place < vectors; place++) {
      const Vector<R> numbers = load(values + key * apart + place * LANES<R>);
      for (int row = 0; row < rows; row++)
        total[row][place] = multiply_add(broadcast(weights[row * width + key]), numbers, total[row][place]);
    }
  for (int row = 0; row < rows; row++)
    for (int place = 0; place < vectors; place++)
      store(sums + row * wide + place * LANES<R>, total[row][place]);
}

template <int rows, typename R>
inline void add_values(
    const R* weights, int64_t width, const R* values, int64_t apart, int64_t count, R* sums, int64_t wide) {
  int64_t column = 0;
  for (; column + VECTORS * LANES<R> <= wide; column += VECTORS * LANES<R>)
    add_values<rows, VECTORS>(weights, width, values + column, apart, count, sums + column, wide);
  for (; column < wide; column += LANES<R>)
    add_values<rows, 1>(weights, width, values + column, apart, count, sums + column, wide);
}

// Adds `count` values of `wide` numbers, weighted by weights[row * width + key], to the sums of `rows` rows.
template <typename R>
inline void add_all(
    const R* weights,
    int64_t width,
    int64_t rows,
    const R* values,
    int64_t apart,
    int64_t count,
    R* sums,
    int64_t wide) {
  by_rows(rows, [&](auto some, int64_t row) {
    add_values<decltype(some)::value>(weights + row * width, width, values, apart, count, sums + row * wide, wide);
  });
}

}  // namespace
}  // namespace infllm

#endif  // INFLLM_DECODE_PRODUCTS_H
