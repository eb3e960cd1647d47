// Causal attention of bfloat16 queries, keys and values with AVX-512 BF16 dot products: sums and softmax in float32.
//
// T=tokens D=width of a head, a multiple of 64. Four queries at a time: their scores against all keys up to them, the
// softmax of these, and the weighted sum of values. Keys and values are laid out before, two numbers to a 32-bit lane
// as the instruction wants them: of keys two neighbouring dimensions, of values two neighbouring tokens.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "threads.h"

namespace {

constexpr int64_t kQueries = 4;
constexpr int64_t kVectors = 4;
constexpr int64_t kKeys = 16 * kVectors;  // of a tile of scores; also dimensions of a tile of outputs

struct Attention {
  const uint16_t *q, *k, *v;  // (B, H, T, D), strides in elements, D contiguous
  uint16_t* out;              // (B, T, H, D), contiguous
  int64_t batch, heads, key_heads, tokens, width;
  int64_t q_strides[3], k_strides[3], v_strides[3];
  float scale;
};

inline __m512bh as_bf16(__m512i bits) { return (__m512bh)bits; }

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

class Head {
 public:
  explicit Head(const Attention& a)
      : a_(a),
        padded_((a.tokens + kKeys - 1) / kKeys * kKeys),
        keys_(padded_ * a.width / 2),
        values_(padded_ / 2 * a.width),
        scores_(kQueries * padded_),
        weights_(kQueries * padded_ / 2) {}

  void run(int64_t b, int64_t h) {
    const int64_t from = h / (a_.heads / a_.key_heads);
    const uint16_t* k = a_.k + b * a_.k_strides[0] + from * a_.k_strides[1];
    if (k != laid_out_) lay_out(k, a_.v + b * a_.v_strides[0] + from * a_.v_strides[1]);
    laid_out_ = k;
    const uint16_t* q = a_.q + b * a_.q_strides[0] + h * a_.q_strides[1];
    uint16_t* out = a_.out + (b * a_.tokens * a_.heads + h) * a_.width;
    for (int64_t first = 0; first < a_.tokens; first += kQueries) queries(q, out, first);
  }

 private:
  void lay_out(const uint16_t* k, const uint16_t* v) {
    const int64_t D = a_.width, T = a_.tokens;
    for (int64_t t = 0; t < padded_; ++t) {
      uint32_t* out = keys_.data() + t / kKeys * (D / 2 * kKeys) + t % kKeys;
      const uint16_t* row = k + t * a_.k_strides[2];
      for (int64_t d = 0; d < D / 2; ++d)
        out[d * kKeys] = t < T ? row[2 * d] | uint32_t(row[2 * d + 1]) << 16 : 0u;
    }
    for (int64_t p = 0; p < padded_ / 2; ++p) {
      uint32_t* out = values_.data() + p * D;
      const uint16_t* low = v + 2 * p * a_.v_strides[2];
      const uint16_t* high = low + a_.v_strides[2];
      for (int64_t d = 0; d < D; ++d)
        out[d] = (2 * p < T ? low[d] : 0u) | (2 * p + 1 < T ? uint32_t(high[d]) << 16 : 0u);
    }
  }

  void queries(const uint16_t* q, uint16_t* out, int64_t first) {
    const int64_t count = std::min(kQueries, a_.tokens - first);
    const int64_t reach = (first + count + kKeys - 1) / kKeys * kKeys;  // keys, whole tiles
    const uint16_t* rows[kQueries];
    for (int64_t r = 0; r < kQueries; ++r) rows[r] = q + (first + std::min(r, count - 1)) * a_.q_strides[2];
    for (int64_t tile = 0; tile < reach; tile += kKeys) scores(rows, tile);
    float totals[kQueries];
    for (int64_t r = 0; r < count; ++r) totals[r] = softmax(r, first + r + 1, reach);
    for (int64_t d = 0; d < a_.width; d += kKeys) outputs(out, first, count, d, reach / 2, totals);
  }

  void scores(const uint16_t* const* rows, int64_t tile) {
    __m512 sums[kQueries][kVectors];
    for (auto& of_row : sums)
      for (auto& sum : of_row) sum = _mm512_setzero_ps();
    const uint32_t* keys = keys_.data() + tile / kKeys * (a_.width / 2 * kKeys);
    for (int64_t d = 0; d < a_.width / 2; ++d, keys += kKeys) {
      __m512bh columns[kVectors];
      for (int c = 0; c < kVectors; ++c) columns[c] = as_bf16(_mm512_loadu_si512(keys + 16 * c));
#pragma GCC unroll 4
      for (int r = 0; r < kQueries; ++r) {
        int pair;
        __builtin_memcpy(&pair, rows[r] + 2 * d, 4);
        const __m512bh value = as_bf16(_mm512_set1_epi32(pair));
#pragma GCC unroll 4
        for (int c = 0; c < kVectors; ++c) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], value, columns[c]);
      }
    }
    for (int r = 0; r < kQueries; ++r)
      for (int c = 0; c < kVectors; ++c)
        _mm512_storeu_ps(scores_.data() + r * padded_ + tile + 16 * c,
                         _mm512_mul_ps(sums[r][c], _mm512_set1_ps(a_.scale)));
  }

  // scores of `seen` keys -> weights, at most 1 and rounded; zero for keys behind them. Returns the weights' sum.
  float softmax(int64_t row, int64_t seen, int64_t reach) {
    float* s = scores_.data() + row * padded_;
    for (int64_t t = seen; t < reach; ++t) s[t] = -INFINITY;
    __m512 top = _mm512_set1_ps(-INFINITY);
    for (int64_t t = 0; t < reach; t += 16) top = _mm512_max_ps(top, _mm512_loadu_ps(s + t));
    const __m512 largest = _mm512_set1_ps(_mm512_reduce_max_ps(top));
    __m512 total = _mm512_setzero_ps();
    uint32_t* pairs = weights_.data() + row * padded_ / 2;
    for (int64_t t = 0; t < reach; t += 16) {
      const __m512 score = _mm512_loadu_ps(s + t);
      const __mmask16 seen_here = _mm512_cmp_ps_mask(score, _mm512_set1_ps(-INFINITY), _CMP_NEQ_UQ);
      const __m256i weight = (__m256i)_mm512_cvtneps_pbh(
          _mm512_maskz_mov_ps(seen_here, exponential(_mm512_sub_ps(score, largest))));
      _mm256_storeu_si256((__m256i*)(pairs + t / 2), weight);
      // as rounded, so that rounding does not change what they add up to
      total = _mm512_add_ps(total, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(weight), 16)));
    }
    return _mm512_reduce_add_ps(total);
  }

  void outputs(uint16_t* out, int64_t first, int64_t count, int64_t d, int64_t pairs, const float* totals) {
    __m512 sums[kQueries][kVectors];
    for (auto& of_row : sums)
      for (auto& sum : of_row) sum = _mm512_setzero_ps();
    const uint32_t* values = values_.data() + d;
    const uint32_t* weights = weights_.data();
    for (int64_t p = 0; p < pairs; ++p, values += a_.width) {
      __m512bh columns[kVectors];
      for (int c = 0; c < kVectors; ++c) columns[c] = as_bf16(_mm512_loadu_si512(values + 16 * c));
#pragma GCC unroll 4
      for (int r = 0; r < kQueries; ++r) {
        const __m512bh value = as_bf16(_mm512_set1_epi32(int(weights[r * (padded_ / 2) + p])));
#pragma GCC unroll 4
        for (int c = 0; c < kVectors; ++c) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], value, columns[c]);
      }
    }
    for (int64_t r = 0; r < count; ++r)
      for (int c = 0; c < kVectors; ++c)
        _mm256_storeu_si256((__m256i*)(out + (first + r) * a_.heads * a_.width + d + 16 * c),
                            (__m256i)_mm512_cvtneps_pbh(_mm512_mul_ps(sums[r][c], _mm512_set1_ps(1.0f / totals[r]))));
  }

  const Attention& a_;
  const uint16_t* laid_out_ = nullptr;  // keys that the last head used, with their values
  const int64_t padded_;
  std::vector<uint32_t> keys_, values_;
  std::vector<float> scores_;
  std::vector<uint32_t> weights_;
};

}  // namespace

// sizes: batch, heads, key heads, tokens, width; strides: of q, k and v, three each (batch, head, token)
// returns 0, or 1 where there is not enough memory
extern "C" int attention_bf16(
    const uint16_t* q, const uint16_t* k, const uint16_t* v, uint16_t* out, const int64_t* sizes,
    const int64_t* strides, float scale, int64_t threads) {
  Attention a{q, k, v, out, sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], {}, {}, {}, scale};
  std::copy(strides, strides + 3, a.q_strides);
  std::copy(strides + 3, strides + 6, a.k_strides);
  std::copy(strides + 6, strides + 9, a.v_strides);
  const int64_t heads = a.batch * a.heads, parts = std::min(threads, heads);
  return in_parallel(threads, parts, [&](int64_t part) {
    Head head(a);
    // neighbours, which share keys
    for (int64_t i = heads * part / parts; i < heads * (part + 1) / parts; ++i) head.run(i / a.heads, i % a.heads);
  });
}
