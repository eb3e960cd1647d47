// Causal attention of float32 queries, keys and values, and its gradients, with whatever vectors the compiler was told of.
//
// Letters as in attention.h.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "attention.h"

namespace {

#ifdef __AVX512F__
constexpr int64_t kLanes = 16, kVectors = 4;
#else
constexpr int64_t kLanes = 8, kVectors = 2;
#endif
constexpr int64_t kRows = 6;                  // with kVectors sums each: what fits the registers
constexpr int64_t kTile = kLanes * kVectors;  // tokens of a tile of scores; dimensions of a tile of sums
constexpr int64_t kBlock = 8 * kRows;         // queries whose share of the gradients of keys and values is added at once

using Lanes = float __attribute__((vector_size(kLanes * 4)));
using Bits = int32_t __attribute__((vector_size(kLanes * 4)));
using Sums = Lanes[kRows][kVectors];

inline Lanes load(const float* from) {
  Lanes x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
inline void store(float* to, Lanes x) { std::memcpy(to, &x, sizeof x); }
inline float sum(const Lanes& x) {
  float parts[kLanes];
  std::memcpy(parts, &x, sizeof x);
  for (int64_t half = kLanes / 2; half; half /= 2)
    for (int64_t i = 0; i < half; ++i) parts[i] += parts[half + i];
  return parts[0];
}

// of numbers that are at most about 0; NaN stays NaN
inline Lanes exponential(Lanes x) {
  // 2^(x / ln 2): adding 1.5 * 2^23 leaves the whole part in the low bits; the rest, at most ln 2 / 2 in size, goes by
  // Taylor's series, whose next term is 5e-9
  x = x < -87.0f ? Lanes{} - 87.0f : x;
  const Lanes shifted = x * 1.44269504f + 12582912.0f;
  const Lanes whole = shifted - 12582912.0f;
  const Lanes rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Lanes series = Lanes{} + 1.0f / 5040;
  for (float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) series = series * rest + factor;
  Bits power;
  std::memcpy(&power, &shifted, sizeof power);
  power = (power - 0x4B400000 + 127) << 23;
  Lanes scale;
  std::memcpy(&scale, &power, sizeof scale);
  return series * scale;
}

using Attention = AttentionOf<float, kTile>;

// tiles of kTile tokens; in a tile, for every dimension, the tokens side by side
void by_dimensions(const float* rows, int64_t stride, int64_t tokens, int64_t D, std::vector<float>& out) {
  for (int64_t t = 0; t < int64_t(out.size()) / D; ++t) {
    float* lane = out.data() + t / kTile * (D * kTile) + t % kTile;
    const float* row = rows + t * stride;
    for (int64_t d = 0; d < D; ++d) lane[d * kTile] = t < tokens ? row[d] : 0.0f;
  }
}

// sums[r] += the sum over n of factors[r][n * step] times kTile numbers at columns + n * stride
inline void multiply(const float* const* factors, int64_t step, const float* columns, int64_t stride, int64_t count,
                     Sums& sums) {
  for (int64_t n = 0; n < count; ++n, columns += stride) {
    Lanes of_n[kVectors];
#pragma GCC unroll 4
    for (int c = 0; c < kVectors; ++c) of_n[c] = load(columns + kLanes * c);
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const float factor = factors[r][n * step];
#pragma GCC unroll 4
      for (int c = 0; c < kVectors; ++c) sums[r][c] += factor * of_n[c];
    }
  }
}

inline void store(const Sums& sums, float factor, float* to, int64_t stride, int64_t rows = kRows) {
  for (int64_t r = 0; r < rows; ++r)
    for (int c = 0; c < kVectors; ++c) store(to + r * stride + kLanes * c, sums[r][c] * factor);
}

// kRows rows from `first` on, the last that is there in place of those that are not
struct Rows {
  const float* at[kRows];
  Rows(const float* data, int64_t stride, int64_t first, int64_t count) {
    for (int64_t r = 0; r < kRows; ++r) at[r] = data + std::min(first + r, count - 1) * stride;
  }
};

class Forward {
 public:
  Forward(const Attention& a, float* out, float* logs)
      : a_(a),
        few_(a.queries < kRows && !logs),
        out_(out),
        logs_(logs),
        keys_(few_ ? 0 : a.padded() * a.width),
        scores_(kRows * a.padded()) {}

  void head(int64_t b, int64_t h) {
    const float *k = a_.k.head(b, h / a_.group()), *v = a_.v.head(b, h / a_.group());
    float* out = out_ + (b * a_.queries * a_.heads + h) * a_.width;
    if (few_) {
      for (int64_t t = 0; t < a_.queries; ++t)
        row(a_.q.head(b, h) + t * a_.q.row(), k, v, out + t * a_.heads * a_.width, a_.seen(t));
      return;
    }
    if (k != laid_out_) by_dimensions(k, a_.k.row(), a_.keys, a_.width, keys_);
    laid_out_ = k;
    float* logs = logs_ ? logs_ + (b * a_.heads + h) * a_.queries : nullptr;
    for (int64_t first = 0; first < a_.queries; first += kRows) rows(a_.q.head(b, h), v, out, logs, first);
  }

 private:
  // one query, with the keys as they lie: laying them out would take longer
  void row(const float* q, const float* k, const float* v, float* out, int64_t seen) {
    const int64_t D = a_.width;
    for (int64_t s = 0; s < seen; ++s) {
      const float* key = k + s * a_.k.row();
      Lanes products{};
      for (int64_t d = 0; d < D; d += kLanes) products += load(q + d) * load(key + d);
      scores_[s] = a_.scale * sum(products);
    }
    const float total = softmax(0, seen, seen, nullptr);
    for (int64_t d = 0; d < D; d += kTile) {
      Lanes sums[kVectors]{};
      for (int64_t s = 0; s < seen; ++s)
        for (int c = 0; c < kVectors; ++c) sums[c] += scores_[s] * load(v + s * a_.v.row() + d + kLanes * c);
      for (int c = 0; c < kVectors; ++c) store(out + d + kLanes * c, sums[c] / total);
    }
  }

  void rows(const float* q, const float* v, float* out, float* logs, int64_t first) {
    const int64_t count = std::min(kRows, a_.queries - first), padded = a_.padded(), D = a_.width;
    const int64_t seen = a_.seen(first + count - 1);
    const Rows of_q(q, a_.q.row(), first, a_.queries);
    for (int64_t t = 0; t < seen; t += kTile) {
      Sums sums{};
      multiply(of_q.at, 1, keys_.data() + t * D, kTile, D, sums);
      store(sums, a_.scale, scores_.data() + t, padded);
    }
    float totals[kRows];
    for (int64_t r = 0; r < count; ++r) totals[r] = softmax(r, a_.seen(first + r), seen, logs ? logs + first + r : nullptr);
    const Rows weights(scores_.data(), padded, 0, count);
    for (int64_t d = 0; d < D; d += kTile) {
      Sums sums{};
      multiply(weights.at, 1, v + d, a_.v.row(), seen, sums);
      for (int64_t r = 0; r < count; ++r)
        for (int c = 0; c < kVectors; ++c)
          store(out + (first + r) * a_.heads * D + d + kLanes * c, sums[r][c] / totals[r]);
    }
  }

  // scores of `seen` keys -> weights, at most 1; zero for keys behind them, up to `reach`. Returns the weights' sum.
  float softmax(int64_t row, int64_t seen, int64_t reach, float* log) {
    float* s = scores_.data() + row * a_.padded();
    const int64_t whole = (reach + kLanes - 1) / kLanes * kLanes;
    std::fill(s + seen, s + whole, -INFINITY);
    Lanes top = load(s);
    for (int64_t t = kLanes; t < whole; t += kLanes) {
      const Lanes score = load(s + t);
      top = top > score ? top : score;
    }
    float peak = top[0];
    for (int64_t i = 1; i < kLanes; ++i) peak = std::max(peak, top[i]);
    Lanes totals{};
    for (int64_t t = 0; t < whole; t += kLanes) {
      const Lanes score = load(s + t);
      const Lanes weight = score == -INFINITY ? Lanes{} : exponential(score - peak);
      store(s + t, weight);
      totals += weight;
    }
    const float total = sum(totals);
    if (log) *log = peak + std::log(total);
    return total;
  }

  const Attention& a_;
  const bool few_;  // of which no gradients are wanted: those take the scores as they are when laid out
  float* out_;   // (B, T, H, D), contiguous
  float* logs_;  // (B, H, T), contiguous: of the sum of exponentials; or null
  const float* laid_out_ = nullptr;  // keys that the last head used
  std::vector<float> keys_, scores_;
};

struct Gradients {
  const float* of_out;        // (B, T, H, D), contiguous
  const float* logs;          // (B, H, T), contiguous
  float *of_q, *of_k, *of_v;  // (B, T, H, D), (B, S, K, D) twice, contiguous
};

// Of one head of keys and the heads of queries that share it. With P the weights and G the gradient of the output:
// dV = P' G, dP = G V', dS = scale P (dP - rowsum(P dP)), dQ = dS K, dK = dS' Q.
class Backward {
 public:
  Backward(const Attention& a, const Gradients& g)
      : a_(a),
        g_(g),
        padded_(a.padded()),
        keys_(padded_ * a.width),
        values_(padded_ * a.width),
        weights_(kBlock * padded_),
        changes_(kBlock * padded_) {}

  void head(int64_t b, int64_t kh) {
    const int64_t D = a_.width, row = a_.key_heads * D;
    by_dimensions(a_.k.head(b, kh), a_.k.row(), a_.keys, D, keys_);
    by_dimensions(a_.v.head(b, kh), a_.v.row(), a_.keys, D, values_);
    float *of_k = g_.of_k + (b * a_.keys * a_.key_heads + kh) * D, *of_v = g_.of_v + (of_k - g_.of_k);
    for (int64_t s = 0; s < a_.keys; ++s) {
      std::fill_n(of_k + s * row, D, 0.0f);
      std::fill_n(of_v + s * row, D, 0.0f);
    }
    for (int64_t h = kh * a_.group(); h < (kh + 1) * a_.group(); ++h)
      for (int64_t first = 0; first < a_.queries; first += kBlock) block(b, h, first, of_k, of_v);
  }

 private:
  void block(int64_t b, int64_t h, int64_t first, float* of_k, float* of_v) {
    const int64_t D = a_.width, count = std::min(kBlock, a_.queries - first), seen = a_.seen(first + count - 1);
    const int64_t row = a_.heads * D, begin = (b * a_.queries + first) * row + h * D;
    const float *q = a_.q.head(b, h) + first * a_.q.row(), *k = a_.k.head(b, h / a_.group());
    const float *of_out = g_.of_out + begin, *logs = g_.logs + (b * a_.heads + h) * a_.queries + first;
    for (int64_t r = 0; r < count; r += kRows) {
      const Rows of_q(q, a_.q.row(), r, count), of_g(of_out, row, r, count);
      for (int64_t t = 0; t < seen; t += kTile) {
        Sums scores{}, slopes{};
        multiply(of_q.at, 1, keys_.data() + t * D, kTile, D, scores);
        store(scores, a_.scale, weights_.data() + r * padded_ + t, padded_);
        multiply(of_g.at, 1, values_.data() + t * D, kTile, D, slopes);
        store(slopes, 1.0f, changes_.data() + r * padded_ + t, padded_);
      }
    }
    for (int64_t r = 0; r < count; ++r) weigh(r, a_.seen(first + r), seen, logs[r]);
    for (int64_t r = 0; r < count; r += kRows) {
      const Rows changes(changes_.data(), padded_, r, count);
      for (int64_t d = 0; d < D; d += kTile) {
        Sums sums{};
        multiply(changes.at, 1, k + d, a_.k.row(), seen, sums);
        store(sums, 1.0f, g_.of_q + begin + r * row + d, row, std::min(kRows, count - r));
      }
    }
    add_transposed(changes_, q, a_.q.row(), count, seen, of_k);
    add_transposed(weights_, of_out, row, count, seen, of_v);
  }

  // scores and gradients of weights -> weights and gradients of unscaled scores; zero behind the keys seen
  void weigh(int64_t r, int64_t seen, int64_t reach, float log) {
    float *weights = weights_.data() + r * padded_, *changes = changes_.data() + r * padded_;
    const int64_t whole = (reach + kLanes - 1) / kLanes * kLanes;
    std::fill(weights + seen, weights + whole, -INFINITY);
    std::fill(changes + seen, changes + whole, 0.0f);
    Lanes sums{};
    for (int64_t t = 0; t < whole; t += kLanes) {
      const Lanes score = load(weights + t);
      const Lanes weight = score == -INFINITY ? Lanes{} : exponential(score - log);
      store(weights + t, weight);
      sums += weight * load(changes + t);
    }
    const float mean = sum(sums);
    for (int64_t t = 0; t < whole; t += kLanes)
      store(changes + t, load(weights + t) * a_.scale * (load(changes + t) - mean));
  }

  // out[s] += the sum over queries of factors[query][s] times rows[query]
  void add_transposed(const std::vector<float>& factors, const float* rows, int64_t stride, int64_t count, int64_t seen,
                      float* out) {
    const int64_t D = a_.width, row = a_.key_heads * D;
    for (int64_t s = 0; s < seen; s += kRows) {
      const int64_t there = std::min(kRows, seen - s);
      const Rows tokens(factors.data(), 1, s, seen);
      for (int64_t d = 0; d < D; d += kTile) {
        float* place = out + s * row + d;
        Sums sums{};
        multiply(tokens.at, padded_, rows + d, stride, count, sums);
        for (int64_t r = 0; r < there; ++r)
          for (int c = 0; c < kVectors; ++c)
            store(place + r * row + kLanes * c, load(place + r * row + kLanes * c) + sums[r][c]);
      }
    }
  }

  const Attention& a_;
  const Gradients& g_;
  const int64_t padded_;
  std::vector<float> keys_, values_, weights_, changes_;
};

}  // namespace

extern "C" int64_t attention_f32_tile() { return kTile; }

// sizes and strides: as AttentionOf has them; logs may be null. Both functions return 0, or 1 where there is not enough
// memory.
extern "C" int attention_f32(const float* q, const float* k, const float* v, float* out, float* logs, const int64_t* sizes,
    const int64_t* strides, float scale, int64_t threads) {
  const Attention a(q, k, v, sizes, strides, scale);
  return over_heads(threads, a.batch, a.heads, [&] { return Forward(a, out, logs); });
}

extern "C" int attention_f32_backward(const float* q, const float* k, const float* v, const float* of_out, const float* logs, float* of_q,
    float* of_k, float* of_v, const int64_t* sizes, const int64_t* strides, float scale, int64_t threads) {
  const Attention a(q, k, v, sizes, strides, scale);
  const Gradients g{of_out, logs, of_q, of_k, of_v};
  return over_heads(threads, a.batch, a.key_heads, [&] { return Backward(a, g); });
}
