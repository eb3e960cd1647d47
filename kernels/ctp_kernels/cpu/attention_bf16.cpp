// Causal attention of bfloat16 queries, keys and values with AVX-512 BF16 dot products, and its gradients: sums and
// softmax in float32.
//
// T=queries S=keys, of which query t sees those up to S - T + t, D=width of a head, a multiple of 64. An instruction
// takes two bfloat16 numbers of each lane, so operands are laid out before, two to a 32-bit lane: "by dimensions" two
// neighbouring dimensions of one token, "by tokens" one dimension of two neighbouring tokens.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "attention.h"

namespace {

constexpr int64_t kRows = 4;
constexpr int64_t kVectors = 4;
constexpr int64_t kTile = 16 * kVectors;  // tokens of a tile of scores; dimensions of a tile of sums
constexpr int64_t kBlock = 16;            // queries whose share of the gradients of keys and values is added at once

using Attention = AttentionOf<uint16_t, kTile>;

using Lanes = std::vector<uint32_t>;

inline __m512bh as_bf16(__m512i bits) { return (__m512bh)bits; }
inline __m512 as_float(__m256i bits) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)); }
inline __m256i rounded(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

inline __m512 exponential(__m512 x) {
  // 2^(x / ln 2): the whole part by scalef, the rest, at most ln 2 / 2 in size, by a polynomial good to 5e-5, which is
  // a fortieth of what rounding to bfloat16 may change
  x = _mm512_max_ps(_mm512_set1_ps(-87.0f), x);  // in this order NaN stays NaN
  const __m512 power = _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f));
  const __m512 whole = _mm512_roundscale_ps(power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 rest = _mm512_fnmadd_ps(whole, _mm512_set1_ps(0.693147181f), x);
  __m512 sum = _mm512_set1_ps(1.0f / 24);
  for (float factor : {1.0f / 6, 0.5f, 1.0f, 1.0f})
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(factor));
  return _mm512_scalef_ps(sum, whole);
}

// tiles of kTile tokens; in a tile, for every pair of dimensions, the tokens' lanes side by side
void by_dimensions(const uint16_t* rows, int64_t stride, int64_t tokens, int64_t D, Lanes& out) {
  for (int64_t t = 0; t < int64_t(out.size()) / (D / 2); ++t) {
    uint32_t* lane = out.data() + t / kTile * (D / 2 * kTile) + t % kTile;
    const uint16_t* row = rows + t * stride;
    for (int64_t d = 0; d < D / 2; ++d) lane[d * kTile] = t < tokens ? row[2 * d] | uint32_t(row[2 * d + 1]) << 16 : 0u;
  }
}

void by_tokens(const uint16_t* rows, int64_t stride, int64_t tokens, int64_t D, Lanes& out) {
  for (int64_t p = 0; p < int64_t(out.size()) / D; ++p) {
    const uint16_t* low = rows + 2 * p * stride;
    const uint16_t* high = low + stride;
    for (int64_t d = 0; d < D; ++d)
      out[p * D + d] = (2 * p < tokens ? low[d] : 0u) | (2 * p + 1 < tokens ? uint32_t(high[d]) << 16 : 0u);
  }
}

// kRows x kTile products of rows with the tokens of a tile laid out by dimensions
inline void products(const uint16_t* const* rows, const uint32_t* tile, int64_t D, float factor, float* out, int64_t stride) {
  __m512 sums[kRows][kVectors];
  for (auto& of_row : sums)
    for (auto& sum : of_row) sum = _mm512_setzero_ps();
  for (int64_t d = 0; d < D / 2; ++d, tile += kTile) {
    __m512bh columns[kVectors];
    for (int c = 0; c < kVectors; ++c) columns[c] = as_bf16(_mm512_loadu_si512(tile + 16 * c));
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      int pair;
      __builtin_memcpy(&pair, rows[r] + 2 * d, 4);
      const __m512bh value = as_bf16(_mm512_set1_epi32(pair));
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], value, columns[c]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int c = 0; c < kVectors; ++c)
      _mm512_storeu_ps(out + r * stride + 16 * c, _mm512_mul_ps(sums[r][c], _mm512_set1_ps(factor)));
}

// kRows x kTile sums over `pairs` of tokens: weights[r * weight_stride + p] times lanes[p * D], added to `sums`
inline void weighted(const uint32_t* weights, int64_t weight_stride, int64_t weight_step, const uint32_t* lanes, int64_t D,
                     int64_t pairs, __m512 (&sums)[kRows][kVectors]) {
  for (int64_t p = 0; p < pairs; ++p, lanes += D) {
    __m512bh columns[kVectors];
    for (int c = 0; c < kVectors; ++c) columns[c] = as_bf16(_mm512_loadu_si512(lanes + 16 * c));
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) {
      const __m512bh value = as_bf16(_mm512_set1_epi32(int(weights[r * weight_stride + p * weight_step])));
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], value, columns[c]);
    }
  }
}

class Forward {
 public:
  Forward(const Attention& a, uint16_t* out, float* logs)
      : a_(a),
        few_(a.queries < kRows && !logs),
        out_(out),
        logs_(logs),
        keys_(few_ ? 0 : a.padded() * a.width / 2),
        values_(few_ ? 0 : a.padded() / 2 * a.width),
        scores_(kRows * a.padded()),
        weights_(kRows * a.padded() / 2) {}

  void head(int64_t b, int64_t h) {
    const uint16_t *k = a_.k.head(b, h / a_.group()), *v = a_.v.head(b, h / a_.group());
    uint16_t* out = out_ + (b * a_.queries * a_.heads + h) * a_.width;
    if (few_) {
      for (int64_t t = 0; t < a_.queries; ++t)
        row(a_.q.head(b, h) + t * a_.q.row(), k, v, out + t * a_.heads * a_.width, a_.seen(t));
      return;
    }
    if (k != laid_out_) {
      by_dimensions(k, a_.k.row(), a_.keys, a_.width, keys_);
      by_tokens(v, a_.v.row(), a_.keys, a_.width, values_);
    }
    laid_out_ = k;
    float* logs = logs_ ? logs_ + (b * a_.heads + h) * a_.queries : nullptr;
    for (int64_t first = 0; first < a_.queries; first += kRows) rows(a_.q.head(b, h), out, logs, first);
  }

 private:
  // one query, with keys and values as they lie: laying them out would take longer
  void row(const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* out, int64_t seen) {
    const int64_t D = a_.width;
    for (int64_t s = 0; s < seen; ++s) {
      const uint16_t* key = k + s * a_.k.row();
      __m512 sum = _mm512_setzero_ps();
      for (int64_t d = 0; d < D; d += 32)
        sum = _mm512_dpbf16_ps(sum, as_bf16(_mm512_loadu_si512(q + d)), as_bf16(_mm512_loadu_si512(key + d)));
      scores_[s] = a_.scale * _mm512_reduce_add_ps(sum);
    }
    const __m512 whole = _mm512_set1_ps(1.0f / softmax(0, seen, (seen + 15) / 16 * 16, nullptr));
    const uint16_t* weights = (const uint16_t*)weights_.data();
    for (int64_t d = 0; d < D; d += 64) {
      __m512 even[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()}, odd[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
      for (int64_t s = 0; s < seen; ++s) {
        const __m512 weight = _mm512_castsi512_ps(_mm512_set1_epi32(int(uint32_t(weights[s]) << 16)));
#pragma GCC unroll 2
        for (int c = 0; c < 2; ++c) {
          const __m512i pairs = _mm512_loadu_si512(v + s * a_.v.row() + d + 32 * c);
          const __m512i high = _mm512_and_si512(pairs, _mm512_set1_epi32(int(0xffff0000)));
          even[c] = _mm512_fmadd_ps(weight, _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)), even[c]);
          odd[c] = _mm512_fmadd_ps(weight, _mm512_castsi512_ps(high), odd[c]);
        }
      }
      for (int c = 0; c < 2; ++c) {
        const __m512i low = _mm512_cvtepu16_epi32(rounded(_mm512_mul_ps(even[c], whole)));
        const __m512i high = _mm512_cvtepu16_epi32(rounded(_mm512_mul_ps(odd[c], whole)));
        _mm512_storeu_si512(out + d + 32 * c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
      }
    }
  }

  void rows(const uint16_t* q, uint16_t* out, float* logs, int64_t first) {
    const int64_t count = std::min(kRows, a_.queries - first), padded = a_.padded(), D = a_.width;
    const int64_t reach = (a_.seen(first + count - 1) + kTile - 1) / kTile * kTile;  // keys, whole tiles
    const uint16_t* from[kRows];
    for (int64_t r = 0; r < kRows; ++r) from[r] = q + (first + std::min(r, count - 1)) * a_.q.row();
    for (int64_t t = 0; t < reach; t += kTile)
      products(from, keys_.data() + t * D / 2, D, a_.scale, scores_.data() + t, padded);
    float totals[kRows];
    for (int64_t r = 0; r < count; ++r) totals[r] = softmax(r, a_.seen(first + r), reach, logs ? logs + first + r : nullptr);
    for (int64_t d = 0; d < D; d += kTile) {
      __m512 sums[kRows][kVectors];
      for (auto& of_row : sums)
        for (auto& sum : of_row) sum = _mm512_setzero_ps();
      weighted(weights_.data(), padded / 2, 1, values_.data() + d, D, reach / 2, sums);
      for (int64_t r = 0; r < count; ++r)
        for (int c = 0; c < kVectors; ++c)
          _mm256_storeu_si256((__m256i*)(out + (first + r) * a_.heads * D + d + 16 * c),
                              rounded(_mm512_mul_ps(sums[r][c], _mm512_set1_ps(1.0f / totals[r]))));
    }
  }

  // scores of `seen` keys -> weights, at most 1 and rounded; zero for keys behind them. Returns the weights' sum.
  float softmax(int64_t row, int64_t seen, int64_t reach, float* log) {
    float* s = scores_.data() + row * a_.padded();
    for (int64_t t = seen; t < reach; ++t) s[t] = -INFINITY;
    __m512 top = _mm512_set1_ps(-INFINITY);
    for (int64_t t = 0; t < reach; t += 16) top = _mm512_max_ps(top, _mm512_loadu_ps(s + t));
    const float peak = _mm512_reduce_max_ps(top);
    const __m512 largest = _mm512_set1_ps(peak);
    __m512 total = _mm512_setzero_ps();
    uint32_t* pairs = weights_.data() + row * a_.padded() / 2;
    for (int64_t t = 0; t < reach; t += 16) {
      const __m512 score = _mm512_loadu_ps(s + t);
      const __mmask16 seen_here = _mm512_cmp_ps_mask(score, _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ);
      const __m256i weight = rounded(_mm512_maskz_mov_ps(seen_here, exponential(_mm512_sub_ps(score, largest))));
      _mm256_storeu_si256((__m256i*)(pairs + t / 2), weight);
      // as rounded, so that rounding does not change what they add up to
      total = _mm512_add_ps(total, as_float(weight));
    }
    const float sum = _mm512_reduce_add_ps(total);
    if (log) *log = peak + std::log(sum);
    return sum;
  }

  const Attention& a_;
  const bool few_;  // of which no gradients are wanted: those take the scores as they are when laid out
  uint16_t* out_;  // (B, T, H, D), contiguous
  float* logs_;    // (B, H, T), contiguous: of the sum of exponentials; or null
  const uint16_t* laid_out_ = nullptr;  // keys that the last head used, with their values
  Lanes keys_, values_;
  std::vector<float> scores_;
  Lanes weights_;
};

struct Gradients {
  const uint16_t* of_out;        // (B, T, H, D), contiguous
  const float* logs;             // (B, H, T), contiguous
  uint16_t *of_q, *of_k, *of_v;  // (B, T, H, D), (B, S, K, D) twice, contiguous
};

// Of one head of keys and the heads of queries that share it. With P the weights and G the gradient of the output:
// dV = P' G, dP = G V', dS = scale P (dP - rowsum(P dP)), dQ = dS K, dK = dS' Q.
class Backward {
 public:
  Backward(const Attention& a, const Gradients& g)
      : a_(a),
        g_(g),
        padded_(a.padded()),
        keys_(padded_ * a.width / 2),
        values_(padded_ * a.width / 2),
        keys_by_tokens_(padded_ / 2 * a.width),
        scores_(kBlock * padded_),
        slopes_(kBlock * padded_),
        weights_(kBlock * padded_),
        changes_(kBlock * padded_),
        pairs_(kBlock / 2 * padded_),
        queries_(kBlock / 2 * a.width),
        outer_(kBlock / 2 * a.width),
        of_k_(padded_ * a.width),
        of_v_(padded_ * a.width) {}

  void head(int64_t b, int64_t kh) {
    const int64_t D = a_.width;
    const uint16_t *k = a_.k.head(b, kh), *v = a_.v.head(b, kh);
    by_dimensions(k, a_.k.row(), a_.keys, D, keys_);
    by_dimensions(v, a_.v.row(), a_.keys, D, values_);
    by_tokens(k, a_.k.row(), a_.keys, D, keys_by_tokens_);
    std::fill(of_k_.begin(), of_k_.end(), 0.0f);
    std::fill(of_v_.begin(), of_v_.end(), 0.0f);
    for (int64_t h = kh * a_.group(); h < (kh + 1) * a_.group(); ++h)
      for (int64_t first = 0; first < a_.queries; first += kBlock) block(b, h, first);
    for (int64_t s = 0; s < a_.keys; ++s) {
      const int64_t place = ((b * a_.keys + s) * a_.key_heads + kh) * D;
      for (int64_t d = 0; d < D; d += 16) {
        _mm256_storeu_si256((__m256i*)(g_.of_k + place + d), rounded(_mm512_loadu_ps(of_k_.data() + s * D + d)));
        _mm256_storeu_si256((__m256i*)(g_.of_v + place + d), rounded(_mm512_loadu_ps(of_v_.data() + s * D + d)));
      }
    }
  }

 private:
  void block(int64_t b, int64_t h, int64_t first) {
    const int64_t D = a_.width, count = std::min(kBlock, a_.queries - first);
    const int64_t seen = a_.seen(first + count - 1), reach = (seen + kTile - 1) / kTile * kTile;
    const int64_t row = a_.heads * D, begin = (b * a_.queries + first) * row + h * D;
    const uint16_t* q = a_.q.head(b, h) + first * a_.q.row();
    const uint16_t* of_out = g_.of_out + begin;
    const float* logs = g_.logs + (b * a_.heads + h) * a_.queries + first;
    for (int64_t r = 0; r < count; r += kRows) {
      const uint16_t *of_q[kRows], *of_g[kRows];
      for (int64_t i = 0; i < kRows; ++i) {
        of_q[i] = q + std::min(r + i, count - 1) * a_.q.row();
        of_g[i] = of_out + std::min(r + i, count - 1) * row;
      }
      for (int64_t t = 0; t < reach; t += kTile) {
        products(of_q, keys_.data() + t * D / 2, D, a_.scale, scores_.data() + r * padded_ + t, padded_);
        products(of_g, values_.data() + t * D / 2, D, 1.0f, slopes_.data() + r * padded_ + t, padded_);
      }
    }
    for (int64_t r = 0; r < kBlock; ++r) {
      if (r < count) {
        weigh(r, a_.seen(first + r), reach, logs[r]);
      } else {  // rows that are not there
        std::fill_n(weights_.data() + r * padded_, reach, uint16_t(0));
        std::fill_n(changes_.data() + r * padded_, reach, uint16_t(0));
      }
    }
    for (int64_t r = 0; r < count; r += kRows)
      for (int64_t d = 0; d < D; d += kTile) {
        __m512 sums[kRows][kVectors];
        for (auto& of_row : sums)
          for (auto& sum : of_row) sum = _mm512_setzero_ps();
        weighted((const uint32_t*)(changes_.data() + r * padded_), padded_ / 2, 1, keys_by_tokens_.data() + d, D, reach / 2,
                 sums);
        for (int64_t i = 0; i < std::min(kRows, count - r); ++i)
          for (int c = 0; c < kVectors; ++c)
            _mm256_storeu_si256((__m256i*)(g_.of_q + begin + (r + i) * row + d + 16 * c), rounded(sums[i][c]));
      }
    by_tokens(q, a_.q.row(), count, D, queries_);
    by_tokens(of_out, row, count, D, outer_);
    add_transposed(changes_, queries_, reach, of_k_);
    add_transposed(weights_, outer_, reach, of_v_);
  }

  // scores and gradients of weights -> weights and gradients of unscaled scores, rounded
  void weigh(int64_t r, int64_t seen, int64_t reach, float log) {
    float *s = scores_.data() + r * padded_, *slope = slopes_.data() + r * padded_;
    uint16_t *weights = weights_.data() + r * padded_, *changes = changes_.data() + r * padded_;
    __m512 sum = _mm512_setzero_ps(), whole = _mm512_setzero_ps();
    for (int64_t t = 0; t < reach; t += 16) {
      const __mmask16 there = t + 16 <= seen ? 0xffff : t < seen ? (1u << (seen - t)) - 1 : 0;
      const __m512 weight =
          _mm512_maskz_mov_ps(there, exponential(_mm512_sub_ps(_mm512_loadu_ps(s + t), _mm512_set1_ps(log))));
      _mm512_storeu_ps(s + t, weight);
      sum = _mm512_fmadd_ps(weight, _mm512_loadu_ps(slope + t), sum);
      whole = _mm512_add_ps(whole, weight);
    }
    // not from the rounded outputs: where one weight is nearly 1, the difference below is all there is
    const __m512 mean = _mm512_set1_ps(_mm512_reduce_add_ps(sum) / _mm512_reduce_add_ps(whole));
    for (int64_t t = 0; t < reach; t += 16) {
      const __m512 weight = _mm512_loadu_ps(s + t);
      const __m512 change = _mm512_mul_ps(_mm512_mul_ps(weight, _mm512_set1_ps(a_.scale)),
                                          _mm512_sub_ps(_mm512_loadu_ps(slope + t), mean));
      _mm256_storeu_si256((__m256i*)(weights + t), rounded(weight));
      _mm256_storeu_si256((__m256i*)(changes + t), rounded(change));
    }
  }

  // out[s] += sum over queries of rows[query][s] * lanes[query], lanes by tokens
  void add_transposed(const std::vector<uint16_t>& rows, const Lanes& lanes, int64_t reach, std::vector<float>& out) {
    const int64_t D = a_.width;
    for (int64_t p = 0; p < kBlock / 2; ++p) {
      const uint16_t *low = rows.data() + 2 * p * padded_, *high = low + padded_;
      for (int64_t t = 0; t < reach; t += 16) {
        const __m512i of_low = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(low + t)));
        const __m512i of_high = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)(high + t)));
        _mm512_storeu_si512(pairs_.data() + p * padded_ + t, _mm512_or_si512(of_low, _mm512_slli_epi32(of_high, 16)));
      }
    }
    for (int64_t s = 0; s < reach; s += kRows)
      for (int64_t d = 0; d < D; d += kTile) {
        float* place = out.data() + s * D + d;
        __m512 sums[kRows][kVectors];
        for (int64_t i = 0; i < kRows; ++i)
          for (int c = 0; c < kVectors; ++c) sums[i][c] = _mm512_loadu_ps(place + i * D + 16 * c);
        weighted(pairs_.data() + s, 1, padded_, lanes.data() + d, D, kBlock / 2, sums);
        for (int64_t i = 0; i < kRows; ++i)
          for (int c = 0; c < kVectors; ++c) _mm512_storeu_ps(place + i * D + 16 * c, sums[i][c]);
      }
  }

  const Attention& a_;
  const Gradients& g_;
  const int64_t padded_;
  Lanes keys_, values_, keys_by_tokens_;
  std::vector<float> scores_, slopes_;
  std::vector<uint16_t> weights_, changes_;
  Lanes pairs_, queries_, outer_;
  std::vector<float> of_k_, of_v_;
};

}  // namespace

extern "C" int64_t attention_bf16_tile() { return kTile; }

// sizes and strides: as AttentionOf has them; logs may be null. Both functions return 0, or 1 where there is not enough
// memory.
extern "C" int attention_bf16(const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* out, float* logs, const int64_t* sizes,
    const int64_t* strides, float scale, int64_t threads) {
  const Attention a(q, k, v, sizes, strides, scale);
  return over_heads(threads, a.batch, a.heads, [&] { return Forward(a, out, logs); });
}

extern "C" int attention_bf16_backward(const uint16_t* q, const uint16_t* k, const uint16_t* v, const uint16_t* of_out, const float* logs, uint16_t* of_q,
    uint16_t* of_k, uint16_t* of_v, const int64_t* sizes, const int64_t* strides, float scale, int64_t threads) {
  const Attention a(q, k, v, sizes, strides, scale);
  const Gradients g{of_out, logs, of_q, of_k, of_v};
  return over_heads(threads, a.batch, a.key_heads, [&] { return Backward(a, g); });
}
