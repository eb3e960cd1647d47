// What the attention kernels share: how queries, keys and values lie in memory, and how heads are shared out.
//
// T=queries S=keys, of which query t sees those up to S - T + t, D=width of a head, a multiple of the tile.

#pragma once

#include <algorithm>
#include <cstdint>

#include "threads.h"

template <typename Number>
struct Strided {  // (B, H, T, D), strides in elements, D contiguous
  const Number* data;
  int64_t strides[3];
  const Number* head(int64_t b, int64_t h) const { return data + b * strides[0] + h * strides[1]; }
  int64_t row() const { return strides[2]; }
};

template <typename Number, int64_t kTile>
struct AttentionOf {
  Strided<Number> q, k, v;
  int64_t batch, heads, key_heads, queries, keys, width;
  float scale;

  // sizes: batch, heads, key heads, queries, keys, width; strides: of q, k and v, three each (batch, head, token)
  AttentionOf(const Number* q, const Number* k, const Number* v, const int64_t* sizes, const int64_t* strides, float scale)
      : q{q, {strides[0], strides[1], strides[2]}},
        k{k, {strides[3], strides[4], strides[5]}},
        v{v, {strides[6], strides[7], strides[8]}},
        batch(sizes[0]),
        heads(sizes[1]),
        key_heads(sizes[2]),
        queries(sizes[3]),
        keys(sizes[4]),
        width(sizes[5]),
        scale(scale) {}

  int64_t padded() const { return (keys + kTile - 1) / kTile * kTile; }
  int64_t seen(int64_t query) const { return keys - queries + query + 1; }
  int64_t group() const { return heads / key_heads; }
};

// work.head(b, h) for every head of every sequence, by objects that make() makes, one for each part of neighbours, which
// share keys; returns 1 if memory ran out, else 0
template <typename Make>
int over_heads(int64_t threads, int64_t batch, int64_t heads, const Make& make) {
  const int64_t all = batch * heads, parts = std::min(threads, all);
  return in_parallel(threads, parts, [&](int64_t part) {
    auto work = make();
    for (int64_t i = all * part / parts; i < all * (part + 1) / parts; ++i) work.head(i / heads, i % heads);
  });
}
