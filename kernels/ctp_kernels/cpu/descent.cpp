// One step of preconditioned conjugate gradients for many least-squares problems that share their matrix, each with a
// mask of its own: everything of the step but the product with the matrix, in one pass over memory.
//
// O=problems (outputs) I=unknowns (inputs) of each; all arrays are (O, I), rows contiguous.

#include <cstdint>
#include <cstring>

#include "threads.h"

namespace {

constexpr int64_t kLanes = 16;

inline float widen(uint16_t bits) {
  const uint32_t wide = uint32_t(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

inline uint16_t narrow(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return uint16_t((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);  // to nearest, ties to even
}

// sums in kLanes parts, so that the order of additions does not depend on the compiler
template <typename Term>
float sum(int64_t inputs, const Term& term) {
  float parts[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= inputs; i += kLanes)
    for (int64_t lane = 0; lane < kLanes; ++lane) parts[lane] += term(i + lane);
  for (; i < inputs; ++i) parts[i % kLanes] += term(i);
  float total = 0;
  for (float part : parts) total += part;
  return total;
}

}  // namespace

// curved: H p, bfloat16; next: the new direction, bfloat16; products: r^T r / diagonal over the mask, before and after
extern "C" void descend(
    const uint16_t* curved, const uint8_t* keep, const float* diagonal, int64_t outputs, int64_t inputs, float* values,
    float* residual, float* direction, uint16_t* next, float* products, int64_t threads) {
  in_parallel(threads, threads, [=](int64_t thread) {
    for (int64_t o = outputs * thread / threads; o < outputs * (thread + 1) / threads; ++o) {
      const uint16_t* c = curved + o * inputs;
      const uint8_t* k = keep + o * inputs;
      float *v = values + o * inputs, *r = residual + o * inputs, *p = direction + o * inputs;
      uint16_t* n = next + o * inputs;
      const float curvature = sum(inputs, [=](int64_t i) { return p[i] * widen(c[i]); });
      const float length = curvature > 0 ? products[o] / curvature : 0.0f;
      for (int64_t i = 0; i < inputs; ++i) {
        v[i] += length * p[i];
        r[i] -= length * widen(c[i]);
      }
      const float product = sum(inputs, [=](int64_t i) { return k[i] ? r[i] * r[i] / diagonal[i] : 0.0f; });
      const float turn = products[o] > 0 ? product / products[o] : 0.0f;
      for (int64_t i = 0; i < inputs; ++i) {
        p[i] = turn * p[i] + (k[i] ? r[i] / diagonal[i] : 0.0f);
        n[i] = narrow(p[i]);
      }
      products[o] = product;
    }
  });
}
