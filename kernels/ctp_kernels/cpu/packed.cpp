// Products y = x W^T of few rows of x with packed weights: codes are decoded piece by piece, and multiplied at once.
//
// M=rows of x N=outputs K=inputs G=groups S=segments, runs of inputs that share a scale, and one of x where x is 8-bit
//
// Inputs are taken in blocks of 64; a segment is padded to whole blocks by zeros in x, so that whatever stands in the
// place of codes there does not count. A pruned weight gets its zero point as code. code - zero is multiplied with x in
// float32, exactly so; with 8-bit x, it is sum(code * x) - zero * sum(x), of integers and for each lane of a register.
//
// Fields of a decoded block are 4 or 8 bits wide. x is laid out in the order in which the fields come out of them.

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <type_traits>
#include <vector>

#include "threads.h"

namespace {

constexpr int64_t kBlock = 64;   // inputs
constexpr int64_t kRows = 4;     // of x whose sums stay in registers, each
constexpr int64_t kOutputs = 2;  // for so many outputs; one row reads one output's codes, as they lie in memory
constexpr int64_t kTaken = 16;   // outputs that a thread takes at a time

enum Kind { kDense = 0, kHalf = 1, kBitmap = 2 };  // kHalf: 8 of each 16 weights are stored, as in 8:16 and 2:4

struct Layer {
  const uint8_t *codes, *mask;    // (bytes), (N, K / 8) or null
  const int64_t* starts;          // (N) byte at which an output's codes begin
  const uint16_t* scales;         // (N, G) float16
  const uint8_t* zeros;           // (N, G) or null: 2^(bits - 1)
  int64_t bytes, outputs, inputs, groups, segment, bits;
  Kind kind;
  int64_t segments() const { return inputs / segment; }
  int64_t blocks() const { return (segment + kBlock - 1) / kBlock; }  // of a segment
};

template <typename T>
inline T loaded(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline int64_t bits_in(uint64_t word) { return __builtin_popcountll(word); }

// What one output's codes are decoded into and from: `stream` from its first code on, with kBeyond bytes to read behind
// the last one; `mask` its bits of what is stored; `zeros` (S); `fields` (S, step) bytes.
struct Row {
  const uint8_t *stream, *mask, *zeros;
  int64_t segments, inputs, step;  // inputs of a segment
  uint8_t* fields;
};
using Decode = void (*)(const Row&);

struct Segment {  // of one output, decoded; codes are fields ^ flip
  const uint8_t* fields;
  uint8_t zero, flip;
};

#if defined(__AVX512VBMI2__) && defined(__AVX512VNNI__)

// ---- AVX-512: fields are bytes, in the order of inputs

using Lanes = __m512;
constexpr int64_t kLanes = 16;
constexpr int64_t kBeyond = 80;

inline Lanes nothing() { return _mm512_setzero_ps(); }
inline Lanes all(float x) { return _mm512_set1_ps(x); }
inline Lanes lanes(const float* from) { return _mm512_loadu_ps(from); }
inline Lanes plus(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
inline Lanes minus(Lanes a, Lanes b) { return _mm512_sub_ps(a, b); }
inline Lanes times_plus(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
inline float sum(Lanes x) { return _mm512_reduce_add_ps(x); }

using Integers = __m512i;
inline Lanes minus_times(Integers sums, int32_t zero, const int32_t* of_x) {
  const __m512i zeros = _mm512_mullo_epi32(_mm512_set1_epi32(zero), _mm512_loadu_si512(of_x));
  return _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, zeros));
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
  static void place(const float* x, X* out) { std::memcpy(out, x, kBlock * sizeof(X)); }

  template <int R, int M>
  static void products(const Segment* of_output, const X* x, int64_t stride, int64_t blocks, Sum (*sums)[M]) {
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
  static constexpr int64_t kRun = 4;  // neighbouring inputs of a lane

  template <int R, int M>
  static void products(const Segment* of_output, const X* x, int64_t stride, int64_t blocks, Sum (*sums)[M]) {
    __m512i of[R][M];
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) of[r][m] = _mm512_setzero_si512();
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
  static constexpr int64_t kRun = 2;

  template <int R, int M>
  static void products(const Segment* of_output, const X* x, int64_t stride, int64_t blocks, Sum (*sums)[M]) {
    __m512i of[R][M];
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) of[r][m] = _mm512_setzero_si512();
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

#else

// ---- AVX2: fields of codes of up to 4 bits are 4 bits wide, and dense 4-bit codes are read where they are stored

using Lanes = __m256;
constexpr int64_t kLanes = 8;
constexpr int64_t kBeyond = 16;

inline Lanes nothing() { return _mm256_setzero_ps(); }
inline Lanes all(float x) { return _mm256_set1_ps(x); }
inline Lanes lanes(const float* from) { return _mm256_loadu_ps(from); }
inline Lanes plus(Lanes a, Lanes b) { return _mm256_add_ps(a, b); }
inline Lanes minus(Lanes a, Lanes b) { return _mm256_sub_ps(a, b); }
inline Lanes times_plus(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
inline float sum(Lanes x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

using Integers = __m256i;
inline Lanes minus_times(Integers sums, int32_t zero, const int32_t* of_x) {
  const __m256i of_lanes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(of_x));
  return _mm256_cvtepi32_ps(_mm256_sub_epi32(sums, _mm256_mullo_epi32(_mm256_set1_epi32(zero), of_lanes)));
}
inline __m256i integers(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

inline int64_t width(int64_t bits) { return bits == 8 ? 8 : 4; }

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
    const uint64_t zeros = repeated(kBits) * row.zeros[s];
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
  using Sum = Lanes;
  static void place(const float* x, X* out) {
    for (int64_t j = 0; j < 8; ++j)
      for (int64_t lane = 0; lane < 8; ++lane) out[8 * j + lane] = x[8 * lane + j] / float(1 << 4 * (j % 4));
  }

  template <int R, int M>
  static void products(const Segment* of_output, const X* x, int64_t stride, int64_t blocks, Sum (*sums)[M]) {
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
  using Sum = Lanes;
  static void place(const float* x, X* out) { std::memcpy(out, x, kBlock * sizeof(X)); }

  template <int R, int M>
  static void products(const Segment* of_output, const X* x, int64_t stride, int64_t blocks, Sum (*sums)[M]) {
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

  template <int R, int M>
  static void products(const Segment* of_output, const X* x, int64_t stride, int64_t blocks, Sum (*sums)[M]) {
    // two products of a code and an 8-bit x are at most 2 * 15 * 127 in size: 16 bits hold eight such sums
    constexpr int64_t kAtOnce = 4;
    __m256i flip[R];
    for (int r = 0; r < R; ++r) flip[r] = _mm256_set1_epi8(char(of_output[r].flip));
    __m256i of[R][M];
    for (int r = 0; r < R; ++r)
      for (int m = 0; m < M; ++m) of[r][m] = _mm256_setzero_si256();
    const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
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
  static constexpr float kSteps = 32767;
  using Sum = Integers;
  static void place(const int16_t* x, X* out) {
    for (int64_t k = 0; k < kBlock; ++k) out[k % 4 * 16 + k / 4] = x[k];
  }
  static constexpr int64_t kRun = 8;

  template <int R, int M>
  static void products(const Segment* of_output, const X* x, int64_t stride, int64_t blocks, Sum (*sums)[M]) {
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
      for (int m = 0; m < M; ++m) sums[r][m] = of[r][m];
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

  template <int R, int M>
  static void products(const Segment* of_output, const X* x, int64_t stride, int64_t blocks, Sum (*sums)[M]) {
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
      for (int m = 0; m < M; ++m) sums[r][m] = of[r][m];
  }
};

using WordsOfBytes = Widened<32767>;
using BytesOfBytes = Widened<127>;

#endif

Decode decoder(int64_t bits, Kind kind) {
  switch (bits * 4 + kind) {
    case 2 * 4 + kDense: return decode<2, kDense>;
    case 2 * 4 + kHalf: return decode<2, kHalf>;
    case 2 * 4 + kBitmap: return decode<2, kBitmap>;
    case 3 * 4 + kDense: return decode<3, kDense>;
    case 3 * 4 + kHalf: return decode<3, kHalf>;
    case 3 * 4 + kBitmap: return decode<3, kBitmap>;
    case 4 * 4 + kDense: return decode<4, kDense>;
    case 4 * 4 + kHalf: return decode<4, kHalf>;
    case 4 * 4 + kBitmap: return decode<4, kBitmap>;
    case 8 * 4 + kDense: return decode<8, kDense>;
    default: return decode<8, kBitmap>;
  }
}

// x as a form wants it, (M, S, blocks, 64); of integers, sums for each lane (M, S, kLanes) and scales (M, S)
template <class Form>
struct Activations {
  const Layer& layer;
  const int64_t row, segments;  // elements of x in a row
  const std::unique_ptr<typename Form::X[]> x;
  std::vector<int32_t> sums;
  std::vector<float> scales;

  Activations(const Layer& layer, int64_t rows)
      : layer(layer),
        row(layer.segments() * layer.blocks() * kBlock),
        segments(layer.segments()),
        x(new typename Form::X[rows * row]),
        sums(Form::kSteps > 0 ? rows * segments * kLanes : 0),
        scales(Form::kSteps > 0 ? rows * segments : 0) {}

  void take(const float* from, int64_t m) {
    from += m * layer.inputs;
    for (int64_t place = m * segments; place < (m + 1) * segments; ++place, from += layer.segment) {
      if constexpr (Form::kSteps > 0) scales[place] = step(from);
      for (int64_t b = 0; b < layer.blocks(); ++b) {
        typename Form::X* const to = x.get() + (place * layer.blocks() + b) * kBlock;
        float values[kBlock] = {};
        std::copy(from + b * kBlock, from + std::min((b + 1) * kBlock, layer.segment), values);
        if constexpr (Form::kSteps > 0) {
          int16_t codes[kBlock] = {};
          if (scales[place] > 0) {  // not where all are 0, or one is no number
            const float steps = 1 / scales[place];
            for (int64_t k = 0; k < kBlock; ++k) codes[k] = int16_t(int32_t(std::nearbyintf(values[k] * steps)));
          }
          for (int64_t k = 0; k < kBlock; k += Form::kRun)
            sums[place * kLanes + k / Form::kRun % kLanes] += std::accumulate(codes + k, codes + k + Form::kRun, 0);
          Form::place(codes, to);
        } else {
          Form::place(values, to);
        }
      }
    }
  }

 private:
  float step(const float* from) const {
    float largest = 0;
    for (int64_t k = 0; k < layer.segment; ++k) {
      if (!std::isfinite(from[k])) return std::numeric_limits<float>::quiet_NaN();
      largest = std::max(largest, std::fabs(from[k]));
    }
    return largest / Form::kSteps;
  }
};

// One output's decoded codes
class Output {
 public:
  std::vector<float> scales;  // (S)

  explicit Output(const Layer& layer)
      : scales(layer.segments()),
        layer_(layer),
        stored_(layer.kind == kDense && layer.bits == width(layer.bits) && layer.segment % kBlock == 0),
        flipped_(layer.mask && width(layer.bits) == 4),
        step_(layer.blocks() * kBlock * width(layer.bits) / 8),
        decode_(decoder(layer.bits, layer.kind)),
        zeros_(layer.segments()),
        buffer_(stored_ ? 0 : layer.segments() * step_),
        copy_(layer.inputs * layer.bits / 8 + kBeyond) {}

  void take(int64_t o) {
    const int64_t per_group = layer_.segments() / layer_.groups;
    for (int64_t g = 0, s = 0; g < layer_.groups; ++g) {
      const int64_t place = o * layer_.groups + g;
      const float scale = _cvtsh_ss(layer_.scales[place]);
      const uint8_t zero = layer_.zeros ? layer_.zeros[place] : uint8_t(1 << (layer_.bits - 1));
      for (const int64_t end = s + per_group; s < end; ++s) scales[s] = scale, zeros_[s] = zero;
    }
    const uint8_t* from = layer_.codes + layer_.starts[o];
    if (stored_) {
      fields_ = from;
      return;
    }
    const int64_t needed = int64_t(copy_.size()), there = layer_.bytes - layer_.starts[o];
    if (there < needed) {  // nothing is read behind the last code, whatever the mask says
      std::fill(copy_.begin(), copy_.end(), 0);
      if (there > 0) std::memcpy(copy_.data(), from, there);
      from = copy_.data();
    }
    const uint8_t* mask = layer_.mask ? layer_.mask + o * layer_.inputs / 8 : nullptr;
    decode_({from, mask, zeros_.data(), layer_.segments(), layer_.segment, step_, buffer_.data()});
    fields_ = buffer_.data();
  }

  Segment segment(int64_t s) const {
    return {fields_ + s * step_, zeros_[s], uint8_t(flipped_ ? zeros_[s] * 17 : 0)};
  }

 private:
  const Layer& layer_;
  const bool stored_, flipped_;  // as fields are; by zero points
  const int64_t step_;
  const Decode decode_;
  std::vector<uint8_t> zeros_, buffer_, copy_;
  const uint8_t* fields_ = nullptr;
};

// y (M, N) of M rows from `m` on and R outputs from `o` on
template <class Form, int R, int M, int B>
void products_of(const Activations<Form>& x, int64_t m, const Output* outputs, int64_t o, float* y) {
  const int64_t blocks = B ? B : x.layer.blocks(), segments = x.segments;
  Lanes totals[R][M];
  for (auto& of_output : totals)
    for (auto& total : of_output) total = nothing();
  for (int64_t s = 0; s < segments; ++s) {
    Segment of_output[R];
    for (int r = 0; r < R; ++r) of_output[r] = outputs[r].segment(s);
    typename Form::Sum sums[R][M];
    Form::template products<R, M>(of_output, x.x.get() + m * x.row + s * blocks * kBlock, x.row, blocks, sums);
    for (int i = 0; i < M; ++i)
      for (int r = 0; r < R; ++r) {
        const int64_t place = (m + i) * segments + s;
        if constexpr (Form::kSteps > 0)
          totals[r][i] = times_plus(
              all(outputs[r].scales[s] * x.scales[place]),
              minus_times(sums[r][i], of_output[r].zero, x.sums.data() + place * kLanes), totals[r][i]);
        else
          totals[r][i] = times_plus(all(outputs[r].scales[s]), sums[r][i], totals[r][i]);
      }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < M; ++i) y[(m + i) * x.layer.outputs + o + r] = sum(totals[r][i]);
}

template <class Form, int R, int M>
void products(const Activations<Form>& x, int64_t m, const Output* outputs, int64_t o, float* y) {
  if (x.layer.blocks() == 2)
    products_of<Form, R, M, 2>(x, m, outputs, o, y);
  else
    products_of<Form, R, M, 0>(x, m, outputs, o, y);
}

template <class Form, int R>
void all_rows(const Activations<Form>& x, int64_t rows, Output* outputs, int64_t o, float* y) {
  for (int r = 0; r < R; ++r) outputs[r].take(o + r);
  for (int64_t m = 0; m < rows; m += kRows) switch (std::min(kRows, rows - m)) {
      case 1: products<Form, R, 1>(x, m, outputs, o, y); break;
      case 2: products<Form, R, 2>(x, m, outputs, o, y); break;
      case 3: products<Form, R, 3>(x, m, outputs, o, y); break;
      default: products<Form, R, 4>(x, m, outputs, o, y);
    }
}

template <class Form>
int product(const Layer& layer, const float* x_MK, int64_t rows, float* y_MN, int64_t threads) try {
  Activations<Form> x(layer, rows);
  if (rows == 1)
    x.take(x_MK, 0);
  else
    in_parallel(threads, threads, [&](int64_t thread) {
      for (int64_t m = thread; m < rows; m += threads) x.take(x_MK, m);
    });
  std::atomic<int64_t> next{0};
  return in_parallel(threads, threads, [&](int64_t) {
    Output outputs[kOutputs] = {Output(layer), Output(layer)};
    for (int64_t begin; (begin = next.fetch_add(kTaken)) < layer.outputs;) {
      const int64_t end = std::min(begin + kTaken, layer.outputs);
      int64_t o = begin;
      for (; rows > 1 && o + kOutputs <= end; o += kOutputs) all_rows<Form, kOutputs>(x, rows, outputs, o, y_MN);
      for (; o < end; ++o) all_rows<Form, 1>(x, rows, outputs, o, y_MN);
    }
  });
} catch (const std::bad_alloc&) {
  return 1;
}

}  // namespace

// y (M, N) float of x (M, K) float. `segment`: inputs, a multiple of 8 (of 16 for kHalf) that divides K / G. `width`: bits
// that x is rounded to, 8 or 16, with a scale for each segment; 32: it is not. Returns 1 if there was not enough memory.
extern "C" int packed_product(
    const uint8_t* codes, const uint8_t* mask, const int64_t* starts, const uint16_t* scales, const uint8_t* zeros,
    int64_t bytes, int64_t outputs, int64_t inputs, int64_t groups, int64_t segment, int64_t bits, int64_t kind,
    const float* x, int64_t rows, int64_t width, float* y, int64_t threads) {
  const Layer layer{codes, mask, starts, scales, zeros, bytes, outputs, inputs, groups, segment, bits, Kind(kind)};
  const auto with = [&](auto of_nibbles, auto of_bytes) {
    return bits < 8 ? product<decltype(of_nibbles)>(layer, x, rows, y, threads)
                    : product<decltype(of_bytes)>(layer, x, rows, y, threads);
  };
  switch (width) {
    case 8: return with(BytesOfNibbles{}, BytesOfBytes{});
    case 16: return with(WordsOfNibbles{}, WordsOfBytes{});
    default: return with(FloatsOfNibbles{}, FloatsOfBytes{});
  }
}
