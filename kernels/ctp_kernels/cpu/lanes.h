// Sixteen floats at once: AVX-512's, or the compiler's own vectors, which it makes of whatever the processor has.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#include <immintrin.h>
#define LANES_AVX512 1
#endif

constexpr int64_t kLanes = 16;

#ifdef LANES_AVX512

using Floats = __m512;
using Tail = __mmask16;  // lanes that exist
using Kept = __mmask16;

inline Tail first(int64_t count) { return Tail((1u << std::min(kLanes, count)) - 1); }
inline Floats all(float x) { return _mm512_set1_ps(x); }
inline Floats whole(const float* from) { return _mm512_loadu_ps(from); }
inline void store_whole(float* to, Floats x) { _mm512_storeu_ps(to, x); }
inline Floats floats(Tail lanes, const float* from) { return _mm512_maskz_loadu_ps(lanes, from); }
inline void store(float* to, Tail lanes, Floats x) { _mm512_mask_storeu_ps(to, lanes, x); }
inline Floats times_plus(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats minus_times(Floats c, Floats a, Floats b) { return _mm512_fnmadd_ps(a, b, c); }
inline Floats times_where(Kept kept, Floats a, Floats b) { return _mm512_maskz_mul_ps(kept, a, b); }
inline float sum(Floats x) { return _mm512_reduce_add_ps(x); }
inline Kept kept_of(Tail lanes, const uint8_t* keep) {
  return _mm_test_epi8_mask(_mm_maskz_loadu_epi8(lanes, keep), _mm_set1_epi8(-1));
}

#else

using Floats = float __attribute__((vector_size(64)));
using Kept = int32_t __attribute__((vector_size(64)));
struct Tail {
  int64_t count;
};

inline Tail first(int64_t count) { return {std::min(kLanes, count)}; }
inline Floats all(float x) { return Floats{} + x; }
inline Floats whole(const float* from) {
  Floats x;
  std::memcpy(&x, from, sizeof x);
  return x;
}
inline void store_whole(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }
inline Floats floats(Tail lanes, const float* from) {
  if (lanes.count == kLanes) return whole(from);
  Floats x{};
  std::memcpy(&x, from, lanes.count * sizeof(float));
  return x;
}
inline void store(float* to, Tail lanes, Floats x) {
  if (lanes.count == kLanes) return store_whole(to, x);
  std::memcpy(to, &x, lanes.count * sizeof(float));
}
inline Floats times_plus(Floats a, Floats b, Floats c) { return a * b + c; }
inline Floats minus_times(Floats c, Floats a, Floats b) { return c - a * b; }
inline Floats times_where(Kept kept, Floats a, Floats b) { return kept ? a * b : Floats{}; }
inline float sum(Floats x) {
  float parts[kLanes];
  store_whole(parts, x);
  for (int64_t half = kLanes / 2; half; half /= 2)
    for (int64_t i = 0; i < half; ++i) parts[i] += parts[i + half];
  return parts[0];
}
inline Kept kept_of(Tail lanes, const uint8_t* keep) {
  using Bytes = uint8_t __attribute__((vector_size(16)));
  Bytes bytes{};
  std::memcpy(&bytes, keep, lanes.count);
  return __builtin_convertvector(bytes, Kept) != 0;
}

#endif
