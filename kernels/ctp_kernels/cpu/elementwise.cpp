// What a decoder block does between its products: RMS norms, and the product of a gated MLP, with their gradients.
//
// One pass over memory each, float32 inside; bfloat16 is rounded where transformers' own operations round it, so that
// forward passes give their bits (but for the last place of an exponential). N=rows D=width

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "threads.h"

namespace {

struct Bfloat16 {
  uint16_t bits;
};

inline float wide(float x) { return x; }
inline float wide(Bfloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}
inline void narrow(float x, float& to) { to = x; }
inline void narrow(float x, Bfloat16& to) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const uint32_t nearest = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = uint16_t((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : nearest);
}
template <typename Number>
inline float rounded(float x) {
  Number y;
  narrow(x, y);
  return wide(y);
}

// as exact as float32 is: a polynomial on half a power of two to either side
inline float exponential(float x) {
  x = std::min(std::max(x, -87.0f), 89.0f);  // infinite above 88.4, in time for a quotient that is zero
  const float n = std::nearbyintf(x * 1.44269504f);
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t bits = (int32_t(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return p * power;
}

// work(first, last) over parts of [0, count), a few for each thread
template <typename Work>
void over(int64_t threads, int64_t count, int64_t least, const Work& work) {
  const int64_t parts = std::max<int64_t>(1, std::min(4 * threads, count / least));
  in_parallel(threads, parts, [&](int64_t part) { work(count * part / parts, count * (part + 1) / parts); });
}

// the sum of term(d), in an order that vectors can take
template <typename Term>
inline float sum(int64_t width, const Term& term) {
  constexpr int64_t kTerms = 32;
  float sums[kTerms] = {};
  int64_t d = 0;
  for (; d + kTerms <= width; d += kTerms)
    for (int64_t i = 0; i < kTerms; ++i) sums[i] += term(d + i);
  for (; d < width; ++d) sums[0] += term(d);
  for (int64_t half = kTerms / 2; half; half /= 2)
    for (int64_t i = 0; i < half; ++i) sums[i] += sums[i + half];
  return sums[0];
}

template <typename Number>
float inverse_rms(const Number* x, int64_t width, float epsilon) {
  const float squares = sum(width, [=](int64_t d) { return wide(x[d]) * wide(x[d]); });
  return 1.0f / std::sqrt(squares / float(width) + epsilon);
}

template <typename Number>
void norm(const Number* x, const Number* weight, Number* out, int64_t rows, int64_t width, float epsilon, int64_t threads) {
  over(threads, rows, 8, [=](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      const Number* from = x + n * width;
      Number* to = out + n * width;
      const float inverse = inverse_rms(from, width, epsilon);
      for (int64_t d = 0; d < width; ++d) narrow(wide(weight[d]) * rounded<Number>(wide(from[d]) * inverse), to[d]);
    }
  });
}

template <typename Number>
void norm_backward(const Number* outer, const Number* x, const Number* weight, Number* gradient, int64_t rows,
                   int64_t width, float epsilon, int64_t threads) {
  over(threads, rows, 8, [=](int64_t first, int64_t last) {
    for (int64_t n = first; n < last; ++n) {
      const Number *from = x + n * width, *g = outer + n * width;
      Number* to = gradient + n * width;
      const float inverse = inverse_rms(from, width, epsilon);
      const float along = inverse * inverse / float(width) * sum(width, [=](int64_t d) {
        return rounded<Number>(wide(g[d]) * wide(weight[d])) * wide(from[d]);
      });
      for (int64_t d = 0; d < width; ++d)
        narrow(inverse * (rounded<Number>(wide(g[d]) * wide(weight[d])) - along * wide(from[d])), to[d]);
    }
  });
}

template <typename Number>
void gated(const Number* gate, const Number* up, Number* out, int64_t count, int64_t threads) {
  over(threads, count, 4096, [=](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const float g = wide(gate[i]);
      narrow(rounded<Number>(g / (1.0f + exponential(-g))) * wide(up[i]), out[i]);
    }
  });
}

template <typename Number>
void gated_backward(const Number* outer, const Number* gate, const Number* up, Number* of_gate, Number* of_up,
                    int64_t count, int64_t threads) {
  over(threads, count, 4096, [=](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const float g = wide(gate[i]), outside = wide(outer[i]);
      const float share = 1.0f / (1.0f + exponential(-g));
      const float of_activation = rounded<Number>(outside * wide(up[i]));
      narrow(outside * rounded<Number>(g * share), of_up[i]);
      narrow(of_activation * share * (1.0f + g * (1.0f - share)), of_gate[i]);
    }
  });
}

}  // namespace

#define FOR(Number, suffix)                                                                                            \
  void rms_norm_##suffix(const Number* x, const Number* weight, Number* out, int64_t rows, int64_t width,             \
                         float epsilon, int64_t threads) {                                                             \
    norm(x, weight, out, rows, width, epsilon, threads);                                                               \
  }                                                                                                                    \
  void rms_norm_backward_##suffix(const Number* outer, const Number* x, const Number* weight, Number* gradient,       \
                                  int64_t rows, int64_t width, float epsilon, int64_t threads) {                       \
    norm_backward(outer, x, weight, gradient, rows, width, epsilon, threads);                                          \
  }                                                                                                                    \
  void gated_silu_##suffix(const Number* gate, const Number* up, Number* out, int64_t count, int64_t threads) {       \
    gated(gate, up, out, count, threads);                                                                              \
  }                                                                                                                    \
  void gated_silu_backward_##suffix(const Number* outer, const Number* gate, const Number* up, Number* of_gate,       \
                                    Number* of_up, int64_t count, int64_t threads) {                                   \
    gated_backward(outer, gate, up, of_gate, of_up, count, threads);                                                   \
  }

extern "C" {
FOR(float, f32)
FOR(Bfloat16, bf16)
}
