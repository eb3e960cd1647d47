// packed.cpp with AVX2: fields of codes of up to 4 bits are 4 bits wide, and dense 4-bit codes are read where they are
// stored.

#pragma once

#include <immintrin.h>

#include <algorithm>

#include "packed_codes.h"

namespace {

using Lanes = __m256;

inline Lanes nothing() { return _mm256_setzero_ps(); }
inline Lanes all(float x) { return _mm256_set1_ps(x); }
inline Lanes lanes(const float* from) { return _mm256_loadu_ps(from); }
inline Lanes plus(Lanes a, Lanes b) { return _mm256_add_ps(a, b); }
inline Lanes minus(Lanes a, Lanes b) { return _mm256_sub_ps(a, b); }
inline Lanes times(Lanes a, Lanes b) { return _mm256_mul_ps(a, b); }
inline Lanes times_plus(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(Lanes x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

using Integers = __m256i;
inline __m256i integers(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
inline Lanes numbers(Integers x) { return _mm256_cvtepi32_ps(x); }
inline Lanes numbers(Lanes x) { return x; }
inline Integers minus_zero_times(uint8_t zero, const int32_t* of_x) {
  return _mm256_mullo_epi32(_mm256_set1_epi32(-zero), integers(of_x));
}
inline Integers plus(Integers a, Integers b) { return _mm256_add_epi32(a, b); }

// Of 8 bits of a mask, the bits of a word of fields that codes of `bits` bits go to; `shift` of them to its upper half
struct Places {
  uint64_t of[256];
  constexpr Places(int bits, int width, int shift) : of() {
    for (int stored = 0; stored < 256; ++stored)
      for (int i = 0; i < 8; ++i) of[stored] |= uint64_t(stored >> i & 1) * ((1u << bits) - 1) << (i * width + shift);
  }
};

constexpr uint64_t repeated(int bits) {  // a 1 at the beginning of each code that fits into a word
  uint64_t word = 0;
  for (int at = 0; at + bits <= 64; at += bits) word |= uint64_t{1} << at;
  return word;
}

// Of 8-bit codes pruned ones become the zero point. Of others, all become code ^ zero point, and pruned ones 0, which takes
// fewer instructions; a form undoes it (Segment::flip).
template <int kBits, int kKind>
void decode(const Row& given) {
  const Row row = given;  // or each byte that is written might change it, as far as a compiler knows
  constexpr bool kBytes = kBits == 8;
  constexpr int64_t kCodes = kBytes ? 8 : 16;
  static constexpr Places kLow(kBits, kBytes ? 8 : 4, 0), kHigh(kBytes ? 0 : kBits, 4, kBytes ? 0 : 32);
  const uint8_t* mask = row.mask;
  uint64_t at = 0;
  for (int64_t s = 0; s < row.segments; ++s) {
    uint8_t* fields = row.fields + s * row.step;
    const uint64_t zeros = repeated(kBits) * (row.zeros ? row.zeros[s] : 1 << (kBits - 1));
    const auto write = [&](uint64_t places) {
      uint64_t word = loaded<uint64_t>(row.stream + at / 8);
      if (kKind == kBitmap && !kBytes) {  // elsewhere the codes of a word begin on a byte
        word >>= at % 8;
        // 16 codes of 4 bits are 64 bits, and may reach into a ninth byte
        if (kBits == 4 && __builtin_expect(!~places, 0) && at % 8) word |= uint64_t(row.stream[at / 8 + 8]) << 60;
      }
      if (kKind == kDense)
        word = _pdep_u64(word, places);
      else if (kBytes)
        word = _pdep_u64(word, places) | (zeros & ~places);
      else
        word = _pdep_u64(word ^ zeros, places);
      std::memcpy(fields, &word, sizeof word);
      fields += sizeof word;
      at += kKind == kBitmap ? bits_in(places) : kKind == kHalf ? kBits * kCodes / 2 : kBits * kCodes;
    };
    const auto stored = [&](int64_t byte) { return kKind == kDense ? 255 : mask[byte]; };
#pragma GCC unroll 4
    for (int64_t words = row.inputs / kCodes; words > 0; --words, mask += kCodes / 8)
      write(kLow.of[stored(0)] | (kBytes ? 0 : kHigh.of[stored(1)]));
    if (row.inputs % kCodes) {
      write(kLow.of[stored(0)]);
      mask += 1;
      if (kKind == kDense) at -= 8 * kBits;
    }
  }
}

// Eight lanes of 32 bits with eight fields each. Fields are not shifted down but for one step of 16 bits: x is divided
// by what they are multiplied with where they stand, a power of two.
struct FloatsOfNibbles {
  using X = float;
  static constexpr float kSteps = 0;  // x is as it is
  static constexpr bool kLessZero = true;
  using Sum = Lanes;
  static void place(const float* x, X* out) {
    for (int64_t j = 0; j < 8; ++j)
      for (int64_t lane = 0; lane < 8; ++lane) out[8 * j + lane] = x[8 * lane + j] / float(1 << 4 * (j % 4));
  }

  template <int R, int M, int B>
  static void products(
      const Segment* of_output, const X* x, int64_t stride, int64_t any, const int32_t*, int64_t,
      Sum (*sums)[M]) {
    const int64_t blocks = B ? B : any;
    constexpr int kChains = M == 1 ? 4 : 1;  // a sum waits for itself, so one row takes several
    Lanes zero[R][4];
    __m256i flip[R];
    for (int r = 0; r < R; ++r) flip[r] = _mm256_set1_epi8(char(of_output[r].flip));
    for (int r = 0; r < R; ++r)
      for (int j = 0; j < 4; ++j) zero[r][j] = all(float(of_output[r].zero) * float(1 << 4 * j));
    Lanes of[R][M][kChains];
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m)
        for (int c = 0; c < kChains; ++c) of[r][m][c] = nothing();
    for (int64_t b = 0; b < blocks; ++b, x += kBlock) {
      __m256i word[R];
      for (int r = 0; r < R; ++r) word[r] = _mm256_xor_si256(integers(of_output[r].fields + b * kBlock / 2), flip[r]);
#pragma GCC unroll 8
      for (int j = 0; j < 8; ++j) {
        Lanes code[R];
        for (int r = 0; r < R; ++r) {
          if (j == 4) word[r] = _mm256_srli_epi32(word[r], 16);
          code[r] = _mm256_cvtepi32_ps(_mm256_and_si256(word[r], _mm256_set1_epi32(15 << 4 * (j % 4))));
          code[r] = minus(code[r], zero[r][j % 4]);
        }
        for (int m = 0; m < M; ++m) {
          const Lanes value = lanes(x + m * stride + 8 * j);
          for (int r = 0; r < R; ++r) of[r][m][j % kChains] = times_plus(code[r], value, of[r][m][j % kChains]);
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) {
        sums[r][m] = of[r][m][0];
        for (int c = 1; c < kChains; ++c) sums[r][m] = plus(sums[r][m], of[r][m][c]);
      }
  }
};

struct FloatsOfBytes {
  using X = float;
  static constexpr float kSteps = 0;  // x is as it is
  static constexpr bool kLessZero = true;
  using Sum = Lanes;
  static void place(const float* x, X* out) { std::memcpy(out, x, kBlock * sizeof(X)); }

  template <int R, int M, int B>
  static void products(
      const Segment* of_output, const X* x, int64_t stride, int64_t any, const int32_t*, int64_t,
      Sum (*sums)[M]) {
    const int64_t blocks = B ? B : any;
    Lanes of[R][M];
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) of[r][m] = nothing();
    for (int64_t k = 0; k < blocks * kBlock; k += 8) {
      Lanes code[R];
      for (int r = 0; r < R; ++r)
        code[r] = minus(
            _mm256_cvtepi32_ps(
                _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(of_output[r].fields + k)))),
            all(of_output[r].zero));
      for (int m = 0; m < M; ++m) {
        const Lanes value = lanes(x + m * stride + k);
        for (int r = 0; r < R; ++r) of[r][m] = times_plus(code[r], value, of[r][m]);
      }
    }
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) sums[r][m] = of[r][m];
  }
};

// Low fields of bytes are even inputs, high ones odd inputs.
struct BytesOfNibbles {
  using X = int8_t;
  static constexpr float kSteps = 127;
  using Sum = Integers;
  static void place(const int16_t* x, X* out) {
    for (int64_t k = 0; k < kBlock; ++k) out[k % 2 * 32 + k / 2] = X(x[k]);
  }
  static constexpr int64_t kRun = 8;
  static constexpr bool kLessZero = false;

  template <int R, int M, int B>
  static void products(
      const Segment* of_output, const X* x, int64_t stride, int64_t any, const int32_t*, int64_t,
      Sum (*sums)[M]) {
    const int64_t blocks = B ? B : any;
    // two products of a code and an 8-bit x are at most 2 * 15 * 127 in size: 16 bits hold eight such sums
    constexpr int64_t kAtOnce = 4;
    __m256i flip[R];
    for (int r = 0; r < R; ++r) flip[r] = _mm256_set1_epi8(char(of_output[r].flip));
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    __m256i of[R][M];
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) of[r][m] = _mm256_setzero_si256();
    for (int64_t first = 0; first < blocks; first += kAtOnce) {
      __m256i few[R][M];
      for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) few[r][m] = _mm256_setzero_si256();
      for (int64_t b = first; b < std::min(first + kAtOnce, blocks); ++b, x += kBlock) {
        __m256i even[R], odd[R];
        for (int r = 0; r < R; ++r) {
          const __m256i word = _mm256_xor_si256(integers(of_output[r].fields + b * kBlock / 2), flip[r]);
          even[r] = _mm256_and_si256(word, low);
          odd[r] = _mm256_and_si256(_mm256_srli_epi16(word, 4), low);
        }
        for (int m = 0; m < M; ++m) {
          const __m256i of_even = integers(x + m * stride), of_odd = integers(x + m * stride + 32);
          for (int r = 0; r < R; ++r)
            few[r][m] = _mm256_add_epi16(
                few[r][m],
                _mm256_add_epi16(_mm256_maddubs_epi16(even[r], of_even), _mm256_maddubs_epi16(odd[r], of_odd)));
        }
      }
      for (int r = 0; r < R; ++r)
        for (int m = 0; m < M; ++m) of[r][m] = _mm256_add_epi32(of[r][m], _mm256_madd_epi16(few[r][m], ones));
    }
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) sums[r][m] = of[r][m];
  }
};

// Sixteen lanes of 16 bits with four fields each.
struct WordsOfNibbles {
  using X = int16_t;
  static constexpr float kSteps = kWordSteps;
  using Sum = Integers;
  static void place(const int16_t* x, X* out) {
    for (int64_t k = 0; k < kBlock; ++k) out[k % 4 * 16 + k / 4] = x[k];
  }
  static constexpr int64_t kRun = 8;
  static constexpr bool kLessZero = true;

  template <int R, int M, int B>
  static void products(
      const Segment* of_output, const X* x, int64_t stride, int64_t any, const int32_t* of_x, int64_t of_x_stride,
      Sum (*sums)[M]) {
    const int64_t blocks = B ? B : any;
    __m256i flip[R], of[R][M];
    for (int r = 0; r < R; ++r) flip[r] = _mm256_set1_epi8(char(of_output[r].flip));
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) of[r][m] = _mm256_setzero_si256();
    for (int64_t b = 0; b < blocks; ++b, x += kBlock) {
      __m256i word[R];
      for (int r = 0; r < R; ++r)
        word[r] = _mm256_xor_si256(integers(of_output[r].fields + b * kBlock / 2), flip[r]);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        __m256i code[R];
        for (int r = 0; r < R; ++r)
          code[r] = _mm256_and_si256(_mm256_srli_epi16(word[r], 4 * j), _mm256_set1_epi16(15));
        for (int m = 0; m < M; ++m) {
          const __m256i value = integers(x + m * stride + 16 * j);
          for (int r = 0; r < R; ++r) of[r][m] = _mm256_add_epi32(of[r][m], _mm256_madd_epi16(code[r], value));
        }
      }
    }
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m)
        sums[r][m] = plus(of[r][m], minus_zero_times(of_output[r].zero, of_x + m * of_x_stride));
  }
};

// Also where x is 8-bit: products of bytes would saturate 16 bits.
template <int kLargest>
struct Widened {
  using X = int16_t;
  static constexpr float kSteps = kLargest;
  using Sum = Integers;
  static void place(const int16_t* x, X* out) { std::copy(x, x + kBlock, out); }
  static constexpr int64_t kRun = 2;
  static constexpr bool kLessZero = true;

  template <int R, int M, int B>
  static void products(
      const Segment* of_output, const X* x, int64_t stride, int64_t any, const int32_t* of_x, int64_t of_x_stride,
      Sum (*sums)[M]) {
    const int64_t blocks = B ? B : any;
    __m256i of[R][M];
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) of[r][m] = _mm256_setzero_si256();
    for (int64_t k = 0; k < blocks * kBlock; k += 16) {
      __m256i code[R];
      for (int r = 0; r < R; ++r)
        code[r] = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(of_output[r].fields + k)));
      for (int m = 0; m < M; ++m) {
        const __m256i value = integers(x + m * stride + k);
        for (int r = 0; r < R; ++r) of[r][m] = _mm256_add_epi32(of[r][m], _mm256_madd_epi16(code[r], value));
      }
    }
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m)
        sums[r][m] = plus(of[r][m], minus_zero_times(of_output[r].zero, of_x + m * of_x_stride));
  }
};

using WordsOfBytes = Widened<kWordSteps>;
using BytesOfBytes = Widened<127>;

}  // namespace
