// packed.cpp with AVX-512 VBMI2 and VNNI: fields are bytes, in the order of inputs.

#pragma once

#include <immintrin.h>

#include <algorithm>

#include "packed_codes.h"

namespace {

using Lanes = __m512;
constexpr int64_t kLanes = 16;
constexpr int64_t kBeyond = 80;

inline Lanes nothing() { return _mm512_setzero_ps(); }
inline Lanes all(float x) { return _mm512_set1_ps(x); }
inline Lanes lanes(const float* from) { return _mm512_loadu_ps(from); }
inline Lanes plus(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
inline Lanes minus(Lanes a, Lanes b) { return _mm512_sub_ps(a, b); }
inline Lanes times(Lanes a, Lanes b) { return _mm512_mul_ps(a, b); }
inline Lanes times_plus(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Lanes x) { return _mm512_reduce_add_ps(x); }

using Integers = __m512i;
inline Lanes numbers(Integers x) { return _mm512_cvtepi32_ps(x); }
inline Lanes numbers(Lanes x) { return x; }
inline Integers minus_zero_times(uint8_t zero, const int32_t* of_x) {
  return _mm512_mullo_epi32(_mm512_set1_epi32(-zero), _mm512_loadu_si512(of_x));
}

inline int64_t width(int64_t) { return 8; }

template <int kBits, int kKind>
void decode(const Row& row) {
  // 8 codes are kBits bytes: a lane of 64 bits gets the bytes that 8 codes are in, and these are cut out of it
  alignas(64) uint8_t first[64], shift[64];
  for (int i = 0; i < 64; ++i) {
    first[i] = uint8_t(i / 8 * kBits + i % 8);
    shift[i] = uint8_t(i % 8 * kBits);
  }
  const __m512i bytes = _mm512_load_si512(first), shifts = _mm512_load_si512(shift);
  const uint8_t* mask = row.mask;
  int64_t at = 0;
  for (int64_t s = 0; s < row.segments; ++s) {
    uint8_t* fields = row.fields + s * row.step;
    for (int64_t left = row.inputs; left > 0; left -= kBlock, fields += kBlock) {
      __m512i code = _mm512_loadu_si512(row.stream + at / 8);
      if (kBits < 8) {
        const __m512i from = _mm512_add_epi8(shifts, _mm512_set1_epi8(char(at % 8)));
        code = _mm512_multishift_epi64_epi8(from, _mm512_permutexvar_epi8(bytes, code));
        code = _mm512_and_si512(code, _mm512_set1_epi8((1 << kBits) - 1));
      }
      int64_t stored = std::min(kBlock, left);
      if (kKind != kDense) {
        uint64_t word = 0;
        std::memcpy(&word, mask, stored / 8);
        mask += stored / 8;
        code = _mm512_mask_expand_epi8(_mm512_set1_epi8(char(row.zeros[s])), word, code);
        stored = bits_in(word);
      }
      _mm512_storeu_si512(fields, code);
      at += kBits * stored;
    }
  }
}

struct Floats {
  using X = float;
  static constexpr float kSteps = 0;  // x is as it is
  using Sum = Lanes;
  static constexpr bool kLessZero = true;
  static void place(const float* x, X* out) { std::memcpy(out, x, kBlock * sizeof(X)); }

  template <int R, int M, int B>
  static void products(
      const Segment* of_output, const X* x, int64_t stride, int64_t any, const int32_t*, int64_t,
      Sum (*sums)[M]) {
    const int64_t blocks = B ? B : any;
    constexpr int kChains = M == 1 ? 4 : 1;  // a sum waits for itself, so one row takes several
    Lanes of[R][M][kChains];
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m)
        for (int c = 0; c < kChains; ++c) of[r][m][c] = nothing();
    for (int64_t b = 0; b < blocks; ++b, x += kBlock)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        Lanes code[R];
        for (int r = 0; r < R; ++r)
          code[r] = minus(
              _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(
                  _mm_loadu_si128(reinterpret_cast<const __m128i*>(of_output[r].fields + b * kBlock + 16 * j)))),
              all(of_output[r].zero));
        for (int m = 0; m < M; ++m) {
          const Lanes value = lanes(x + m * stride + 16 * j);
          for (int r = 0; r < R; ++r) of[r][m][j % kChains] = times_plus(code[r], value, of[r][m][j % kChains]);
        }
      }
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) {
        sums[r][m] = of[r][m][0];
        for (int c = 1; c < kChains; ++c) sums[r][m] = plus(sums[r][m], of[r][m][c]);
      }
  }
};

struct Bytes {
  using X = int8_t;
  static constexpr float kSteps = 127;
  using Sum = Integers;
  static void place(const int16_t* x, X* out) { std::copy(x, x + kBlock, out); }
  static constexpr bool kLessZero = true;
  static constexpr int64_t kRun = 4;  // neighbouring inputs of a lane

  template <int R, int M, int B>
  static void products(
      const Segment* of_output, const X* x, int64_t stride, int64_t any, const int32_t* of_x, int64_t of_x_stride,
      Sum (*sums)[M]) {
    const int64_t blocks = B ? B : any;
    __m512i of[R][M];
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) of[r][m] = minus_zero_times(of_output[r].zero, of_x + m * of_x_stride);
    for (int64_t b = 0; b < blocks; ++b, x += kBlock) {
      __m512i code[R];
      for (int r = 0; r < R; ++r) code[r] = _mm512_loadu_si512(of_output[r].fields + b * kBlock);
      for (int m = 0; m < M; ++m) {
        const __m512i value = _mm512_loadu_si512(x + m * stride);
        for (int r = 0; r < R; ++r) of[r][m] = _mm512_dpbusd_epi32(of[r][m], code[r], value);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) sums[r][m] = of[r][m];
  }
};

struct Words {
  using X = int16_t;
  static constexpr float kSteps = 32767;
  using Sum = Integers;
  static void place(const int16_t* x, X* out) { std::copy(x, x + kBlock, out); }
  static constexpr bool kLessZero = true;
  static constexpr int64_t kRun = 2;

  template <int R, int M, int B>
  static void products(
      const Segment* of_output, const X* x, int64_t stride, int64_t any, const int32_t* of_x, int64_t of_x_stride,
      Sum (*sums)[M]) {
    const int64_t blocks = B ? B : any;
    __m512i of[R][M];
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) of[r][m] = minus_zero_times(of_output[r].zero, of_x + m * of_x_stride);
    for (int64_t k = 0; k < blocks * kBlock; k += 32) {
      __m512i code[R];
      for (int r = 0; r < R; ++r)
        code[r] = _mm512_cvtepu8_epi16(
            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(of_output[r].fields + k)));
      for (int m = 0; m < M; ++m) {
        const __m512i value = _mm512_loadu_si512(x + m * stride + k);
        for (int r = 0; r < R; ++r) of[r][m] = _mm512_dpwssd_epi32(of[r][m], code[r], value);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) sums[r][m] = of[r][m];
  }
};

using FloatsOfNibbles = Floats;
using FloatsOfBytes = Floats;
using WordsOfNibbles = Words;
using WordsOfBytes = Words;
using BytesOfNibbles = Bytes;
using BytesOfBytes = Bytes;

}  // namespace
