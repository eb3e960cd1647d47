// y = x w' + b for one row x of bfloat16: w is read about as fast as memory gives it. Sums are float32.
//
// O=outputs I=inputs, a multiple of 32

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "threads.h"

namespace {

constexpr int64_t kBlock = 32;  // inputs; 16 pairs of them fill a vector

using Words = uint32_t __attribute__((vector_size(64)));
using Floats = float __attribute__((vector_size(64)));

inline float wide(uint16_t x) {
  const uint32_t bits = uint32_t(x) << 16;
  float y;
  std::memcpy(&y, &bits, sizeof y);
  return y;
}

inline uint16_t narrow(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return std::isnan(x) ? 0x7fc0 : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float sum(const Floats& x) {
  float parts[16];
  std::memcpy(parts, &x, sizeof x);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) parts[i] += parts[half + i];
  return parts[0];
}

struct Product {
  const float* x;            // (I,), of every block the even inputs first
  const uint16_t *w, *bias;  // bias may be null
  uint16_t* y;
  int64_t inputs, stride;

  void part(int64_t first, int64_t last) const {
    for (int64_t o = first; o < last; ++o) {
      const uint16_t* row = w + o * stride;
      Floats sums[4]{};
      int64_t i = 0;
      for (; i + kBlock < inputs; i += 2 * kBlock) {
        block(row + i, x + i, sums[0], sums[1]);
        block(row + i + kBlock, x + i + kBlock, sums[2], sums[3]);
      }
      if (i < inputs) block(row + i, x + i, sums[0], sums[1]);
      const float total = sum((sums[0] + sums[2]) + (sums[1] + sums[3]));
      y[o] = narrow(total + (bias ? wide(bias[o]) : 0.0f));
    }
  }

  // the lower halves of 16 words of w are even inputs' weights, the upper ones odd inputs'
  static void block(const uint16_t* w, const float* x, Floats& even, Floats& odd) {
    Words words;
    Floats x_even, x_odd;
    std::memcpy(&words, w, sizeof words);
    std::memcpy(&x_even, x, sizeof x_even);
    std::memcpy(&x_odd, x + 16, sizeof x_odd);
    even += (Floats)(words << 16) * x_even;
    odd += (Floats)(words & 0xffff0000u) * x_odd;
  }
};

}  // namespace

// x (I,) and y (O,) contiguous, rows of w `stride` numbers apart. Returns 0, or 1 where there is not enough memory.
extern "C" int one_row(const uint16_t* x, const uint16_t* w, const uint16_t* bias, uint16_t* y, int64_t outputs, int64_t inputs,
    int64_t stride, int64_t threads) {
  std::vector<float> laid_out;
  try {
    laid_out.resize(inputs);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  for (int64_t i = 0; i < inputs; ++i) {
    const int64_t within = i % kBlock;
    laid_out[i - within + within % 2 * 16 + within / 2] = wide(x[i]);
  }
  const Product product{laid_out.data(), w, bias, y, inputs, stride};
  const int64_t parts = std::min(outputs, 8 * threads);
  return in_parallel(threads, parts,
                     [&](int64_t part) { product.part(outputs * part / parts, outputs * (part + 1) / parts); });
}
