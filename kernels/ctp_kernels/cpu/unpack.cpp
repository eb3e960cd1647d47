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

#include "lanes.h"
#include "threads.h"

namespace {

// 64 bits of the stream from bit `at` on; bytes from `end` on are taken as 0
inline uint64_t window(const uint8_t* stream, const uint8_t* end, int64_t at) {
  const uint8_t* from = stream + at / 8;
  uint8_t bytes[9] = {};
  std::memcpy(bytes, from, std::min<int64_t>(sizeof bytes, std::max<int64_t>(end - from, 0)));
  uint64_t word;
  std::memcpy(&word, bytes, sizeof word);
  // 16 codes of 4 bits are 64, so that an offset reaches into a ninth byte
  const int64_t offset = at % 8;
  return offset ? word >> offset | uint64_t(bytes[8]) << (64 - offset) : word;
}

#ifdef LANES_AVX512

// 16 codes of `bits` bits from bit `at` of the stream on
inline __m512i cut(const uint8_t* stream, const uint8_t* end, int64_t at, int64_t bits) {
  if (bits == 8) {
    const uint64_t words[2] = {window(stream, end, at), window(stream, end, at + 64)};
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(words)));
  }
  const __m512i all = _mm512_set1_epi64(int64_t(window(stream, end, at)));
  const __m512i mask = _mm512_set1_epi64((1 << bits) - 1);
  const __m512i first = _mm512_mullo_epi64(_mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi64(bits));
  const __m512i later = _mm512_add_epi64(first, _mm512_set1_epi64(8 * bits));
  const __m256i low = _mm512_cvtepi64_epi32(_mm512_and_si512(_mm512_srlv_epi64(all, first), mask));
  const __m256i high = _mm512_cvtepi64_epi32(_mm512_and_si512(_mm512_srlv_epi64(all, later), mask));
  return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
}

// Weights of up to 16 columns, of which those with a bit in `stored` have a code in the stream.
inline void write(
    void* out, int64_t half, int64_t count, const uint8_t* stream, const uint8_t* end, int64_t at, int64_t bits,
    uint32_t stored, float scale, float zero) {
  const __m512 code = _mm512_cvtepi32_ps(_mm512_maskz_expand_epi32(__mmask16(stored), cut(stream, end, at, bits)));
  const __m512 value = _mm512_maskz_mul_ps(
      __mmask16(stored), _mm512_sub_ps(code, _mm512_set1_ps(zero)), _mm512_set1_ps(scale));
  if (half)
    _mm256_mask_storeu_epi16(out, first(count), (__m256i)_mm512_cvtneps_pbh(value));
  else
    store(static_cast<float*>(out), first(count), value);
}

#else

constexpr uint64_t kUnits[] = {0, 0, 0x55555555, 0x249249249249, 0x1111111111111111};  // a bit in each of 16 places

// Codes of 2, 3 or 4 bits from the stream, each in the place of its bit in `stored`.
inline uint64_t spread(uint64_t word, uint32_t stored, int64_t bits) {
  return _pdep_u64(word, _pdep_u64(stored, kUnits[bits]) * ((1u << bits) - 1));
}

// Weights of up to 16 columns, of which those with a bit in `stored` have a code in the stream.
inline void write(
    void* out, int64_t half, int64_t count, const uint8_t* stream, const uint8_t* end, int64_t at, int64_t bits,
    uint32_t stored, float scale, float zero) {
  using Codes = int32_t __attribute__((vector_size(64)));
  Codes code;
  if (bits == 8) {
    for (int64_t part = 0; part < 2; ++part) {
      const uint32_t mask = stored >> (8 * part) & 255;
      const uint64_t places = _pdep_u64(mask, 0x0101010101010101) * 255;
      const uint64_t word = _pdep_u64(window(stream, end, at), places);
      at += 8 * __builtin_popcount(mask);
      for (int64_t i = 0; i < 8; ++i) code[8 * part + i] = word >> (8 * i) & 255;
    }
  } else {
    const uint64_t word = spread(window(stream, end, at), stored, bits), mask = (1u << bits) - 1;
    for (int64_t i = 0; i < kLanes; ++i) code[i] = word >> (bits * i) & mask;
  }
  Kept lane;
  for (int64_t i = 0; i < kLanes; ++i) lane[i] = stored >> i & 1;
  const Floats value = times_where(lane != 0, __builtin_convertvector(code, Floats) - zero, all(scale));
  if (!half) return store(static_cast<float*>(out), first(count), value);
  using Words = uint32_t __attribute__((vector_size(64)));
  using Halves = uint16_t __attribute__((vector_size(32)));
  Words word;
  std::memcpy(&word, &value, sizeof word);
  // to the nearest bfloat16, ties to the even one; scales are finite, so nothing here is NaN
  const Halves rounded = __builtin_convertvector((word + 0x7fff + (word >> 16 & 1)) >> 16, Halves);
  std::memcpy(out, &rounded, count * sizeof(uint16_t));
}

#endif

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
        const int64_t count = std::min(kLanes, columns - i), place = o * groups + i / group;
        uint32_t stored = (1u << count) - 1;
        if (mask) {
          const uint8_t* bytes = mask + o * (columns / 8) + i / 8;
          stored = bytes[0] | (columns - i > 8 ? bytes[1] << 8 : 0);
        }
        void* to = static_cast<uint8_t*>(out) + (o * columns + i) * (half ? 2 : 4);
        write(to, half, count, codes + starts[o], codes + starts[o + 1], at, bits, stored, scales[place], zeros[place]);
        at += bits * __builtin_popcount(stored);
      }
    }
  });
}
