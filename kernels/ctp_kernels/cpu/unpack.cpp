// Packed rows to dense weights: value = scale * (code - zero) where the mask has a bit, 0 elsewhere.
//
// A row's stored codes are one little-endian bit stream. Sixteen columns at a time: as many codes as the mask has bits
// are cut out of the stream, side by side, and spread to the places of the bits.
//
// O=rows I=columns, a multiple of 8 G=groups

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "threads.h"

namespace {

constexpr int64_t kLanes = 16;

// 16 codes of `bits` bits from bit `at` of the stream on; bytes from `end` on are taken as 0
inline __m512i cut(const uint8_t* stream, const uint8_t* end, int64_t at, int64_t bits) {
  const uint8_t* from = stream + at / 8;
  uint8_t bytes[17] = {};
  std::memcpy(bytes, from, std::min<int64_t>(sizeof bytes, std::max<int64_t>(end - from, 0)));
  if (bits == 8) return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  uint64_t word;
  std::memcpy(&word, bytes, sizeof word);
  // 16 codes of 4 bits are 64, so that an offset reaches into a ninth byte
  const int64_t offset = at % 8;
  if (offset) word = word >> offset | uint64_t(bytes[8]) << (64 - offset);
  const __m512i all = _mm512_set1_epi64(int64_t(word)), mask = _mm512_set1_epi64((1 << bits) - 1);
  const __m512i first = _mm512_mullo_epi64(_mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi64(bits));
  const __m512i later = _mm512_add_epi64(first, _mm512_set1_epi64(8 * bits));
  const __m256i low = _mm512_cvtepi64_epi32(_mm512_and_si512(_mm512_srlv_epi64(all, first), mask));
  const __m256i high = _mm512_cvtepi64_epi32(_mm512_and_si512(_mm512_srlv_epi64(all, later), mask));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

}  // namespace

// mask: (O, I / 8), or null: all are stored; starts: (O + 1), bytes; scales and zeros: (O, G) float; group: columns, a
// multiple of 16 or at least I. out: bfloat16 if `half` is set, else float
extern "C" int unpack_rows(
    const uint8_t* codes, const uint8_t* mask, const int64_t* starts, const float* scales, const float* zeros,
    int64_t rows, int64_t columns, int64_t groups, int64_t group, int64_t bits, int64_t half, void* out,
    int64_t threads) {
  return in_parallel(threads, threads, [=](int64_t thread) {
    for (int64_t o = rows * thread / threads; o < rows * (thread + 1) / threads; ++o) {
      int64_t at = 0;
      for (int64_t i = 0; i < columns; i += kLanes) {
        const __mmask16 exist = __mmask16((1u << std::min(kLanes, columns - i)) - 1);
        __mmask16 stored = exist;
        if (mask) {
          const uint8_t* bytes = mask + o * (columns / 8) + i / 8;
          stored = __mmask16(bytes[0] | (columns - i > 8 ? bytes[1] << 8 : 0));
        }
        const __m512i found = cut(codes + starts[o], codes + starts[o + 1], at, bits);
        at += bits * _mm_popcnt_u32(stored);
        const int64_t place = o * groups + i / group;
        const __m512 code = _mm512_cvtepi32_ps(_mm512_maskz_expand_epi32(stored, found));
        const __m512 value = _mm512_maskz_mul_ps(
            stored, _mm512_sub_ps(code, _mm512_set1_ps(zeros[place])), _mm512_set1_ps(scales[place]));
        if (half)
          _mm256_mask_storeu_epi16(
              static_cast<uint16_t*>(out) + o * columns + i, exist, (__m256i)_mm512_cvtneps_pbh(value));
        else
          _mm512_mask_storeu_ps(static_cast<float*>(out) + o * columns + i, exist, value);
      }
    }
  });
}
