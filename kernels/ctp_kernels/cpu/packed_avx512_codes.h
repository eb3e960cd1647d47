// Codes of a packed layer with AVX-512 VBMI2: 64 of an output at a time, as bytes in the order of inputs.

#pragma once

#include <immintrin.h>

#include "packed_codes.h"

namespace {

#ifndef EMULATED_AVX512
// Each from memory by itself: a word that is in a register takes a vector's port on its way to a mask.
inline __mmask64 mask_at(const uint8_t* word) {
  __mmask64 mask;
  asm("kmovq %1, %0" : "=k"(mask) : "m"(*reinterpret_cast<const uint8_t(*)[8]>(word)));
  return mask;
}
inline int64_t bits_at(const uint8_t* word) {
  int64_t bits;
  asm("popcntq %1, %0" : "=r"(bits) : "m"(*reinterpret_cast<const uint8_t(*)[8]>(word)) : "cc");
  return bits;
}
#else
inline __mmask64 mask_at(const uint8_t* word) { return loaded<uint64_t>(word); }
inline int64_t bits_at(const uint8_t* word) { return bits_in(loaded<uint64_t>(word)); }
#endif

inline uint64_t mask_at(const uint8_t* from, int64_t inputs) {  // of less than a block
  uint64_t word = 0;
  for (int64_t i = 0; i < inputs / 8; ++i) word |= uint64_t(from[i]) << 8 * i;
  return word;
}

constexpr int64_t kAhead = 8192;  // bytes, about as many as are read while memory answers
// What does nothing but this is left out by GCC, unless it is inlined early.
[[gnu::always_inline]] inline void prefetch(const uint8_t* from) {
  _mm_prefetch(reinterpret_cast<const char*>(from), _MM_HINT_T0);
}

inline __m512i low_bits(__m512i x, int bits) { return _mm512_and_si512(x, _mm512_set1_epi8(char((1 << bits) - 1))); }

// 64 codes that begin with a byte, as bytes
template <int kBits>
inline __m512i codes_at(const uint8_t* from) {
  if constexpr (kBits == 8) {
    return _mm512_loadu_si512(from);
  } else {
    // Lanes of 64 bits get the bytes that 8 codes are in; or lanes of 16 or 32 bits those that 2 or 4 are in.
    struct Table {
      alignas(64) uint8_t bytes[64] = {}, shifts[64] = {};
      constexpr Table() {
        constexpr int together = kBits == 4 ? 2 : kBits == 2 ? 4 : 8;
        for (int i = 0; i < 64; ++i) {
          bytes[i] = uint8_t(i / 8 * kBits + i % 8);
          shifts[i] = uint8_t(i % 8 / together * together * 8 + i % together * kBits);
        }
      }
    };
    static constexpr Table table;
    __m512i lanes;
    if constexpr (kBits == 4)
      lanes = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    else if constexpr (kBits == 2)
      lanes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    else
      lanes = _mm512_permutexvar_epi8(
          _mm512_load_si512(table.bytes),
          _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
    return low_bits(_mm512_multishift_epi64_epi8(_mm512_load_si512(table.shifts), lanes), kBits);
  }
}

// The next block's codes of an output of a pair, as bytes; where none is stored, that of `zeros`. Moves `codes` on.
// kFew: there are seldom more than 32. Half a register is read then, which is less often in two cache lines.
template <bool kHigh, bool kFew = false>
inline __m512i paired_codes(const uint8_t*& codes, const uint8_t* mask, __m512i zeros, int64_t inputs) {
  const bool whole = inputs == kBlock;
  const __mmask64 there = whole ? mask_at(mask) : mask_at(mask, inputs);
  const int64_t stored = whole ? bits_at(mask) : bits_in(there);
  __m512i both;
  if (kFew && __builtin_expect(stored <= kBlock / 2, 1))
    both = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
  else
    both = _mm512_loadu_si512(codes);
  codes += stored;
  return _mm512_mask_expand_epi8(zeros, there, low_bits(kHigh ? _mm512_srli_epi16(both, 4) : both, 4));
}

// An output's codes, a block at a time, as bytes; where none is stored, that of `zeros`. inputs: fewer than a block has
// where a segment ends. kHigh: of a pair, its second output's.
template <int kBits, int kKind, bool kHigh = false>
class Codes {
 public:
  explicit Codes(const Row& row) : codes_(row.stream), mask_(row.mask) {}

  __m512i next(__m512i zeros, int64_t inputs = kBlock) {
    if constexpr (kKind == kDense) {
      const __m512i codes = codes_at<kBits>(codes_);
      codes_ += inputs * kBits / 8;
      return codes;
    } else if constexpr (kKind == kPaired || kKind == kPairedFew) {
      const __m512i codes = paired_codes<kHigh, kKind == kPairedFew>(codes_, mask_, zeros, inputs);
      mask_ += inputs / 8;
      return codes;
    } else {
      const uint64_t mask = inputs == kBlock ? loaded<uint64_t>(mask_) : mask_at(mask_, inputs);
      mask_ += inputs / 8;
      const __m512i codes = kBits == 8 ? _mm512_loadu_si512(codes_ + at_ / 8) : cut(codes_ + at_ / 8, at_ % 8);
      at_ += kBits * (kKind == kHalf ? inputs / 2 : bits_in(mask));
      return _mm512_mask_expand_epi8(zeros, mask, codes);
    }
  }

  // What is read a while after segment s of so many inputs is not waited for then.
  [[gnu::always_inline]] void prefetch_ahead(int64_t s, int64_t inputs) const {
    for (int64_t at = 0; at < (kKind == kDense ? inputs * kBits / 8 : 1) && !kHigh; at += 64)
      prefetch(codes_ + at_ / 8 + kAhead + at);
    if (kKind != kDense && s % 4 == 0) prefetch(mask_ + kAhead / 2);
  }

 private:
  const uint8_t *codes_, *mask_;
  uint64_t at_ = 0;  // bits before the next code, where that may be inside of a byte

  // Codes that begin at a bit of a byte: a lane of 64 bits gets the bytes that 8 of them are in, and they are cut out.
  static __m512i cut(const uint8_t* from, uint64_t begin) {
    struct Table {
      alignas(64) uint8_t bytes[64] = {}, shifts[8][64] = {};
      constexpr Table() {
        for (int i = 0; i < 64; ++i) bytes[i] = uint8_t(i / 8 * kBits + i % 8);
        for (int at = 0; at < 8; ++at)
          for (int i = 0; i < 64; ++i) shifts[at][i] = uint8_t(i % 8 * kBits + at);
      }
    };
    static constexpr Table table;
    const __m512i lanes = _mm512_permutexvar_epi8(_mm512_load_si512(table.bytes), _mm512_loadu_si512(from));
    return low_bits(_mm512_multishift_epi64_epi8(_mm512_load_si512(table.shifts[begin]), lanes), kBits);
  }
};

class Decoded {  // the same of what has been decoded
 public:
  explicit Decoded(const Row& row) : fields_(row.fields) {}
  __m512i next(__m512i, int64_t = kBlock) {
    const __m512i codes = _mm512_loadu_si512(fields_);
    fields_ += kBlock;
    return codes;
  }
  void prefetch_ahead(int64_t, int64_t) const {}

 private:
  const uint8_t* fields_;
};

template <class Codes>
void decode(const Row& row, int bits) {
  Codes codes(row);
  for (int64_t s = 0; s < row.segments; ++s) {
    const __m512i zeros = _mm512_set1_epi8(char(row.zeros ? row.zeros[s] : 1 << (bits - 1)));
    uint8_t* fields = row.fields + s * row.step;
    codes.prefetch_ahead(s, row.inputs);
    for (int64_t b = 0; b < row.inputs / kBlock; ++b, fields += kBlock) _mm512_storeu_si512(fields, codes.next(zeros));
    if (row.inputs % kBlock) _mm512_storeu_si512(fields, codes.next(zeros, row.inputs % kBlock));
  }
}

template <int kBits, int kKind>
void decode(const Row& given) {
  const Row row = given;  // or each byte that is written might change it, as far as a compiler knows
  if (kKind == kPaired && row.high)
    decode<Codes<kBits, kKind, true>>(row, kBits);
  else
    decode<Codes<kBits, kKind>>(row, kBits);
}

// `count` bytes of pairs, of as many bytes of each output's codes.
inline void pair_codes(
    const uint8_t* low, int64_t of_low, const uint8_t* high, int64_t of_high, uint8_t* out, int64_t count) {
  const auto code = [](const uint8_t* from, int64_t bytes, int64_t i) {
    return i / 2 < bytes ? from[i / 2] >> i % 2 * 4 & 15 : 0;
  };
  int64_t i = 0;
  for (; i + kBlock <= std::min(2 * std::min(of_low, of_high), count); i += kBlock)
    _mm512_storeu_si512(
        out + i, _mm512_or_si512(codes_at<4>(low + i / 2), _mm512_slli_epi16(codes_at<4>(high + i / 2), 4)));
  for (; i < count; ++i) out[i] = uint8_t(code(low, of_low, i) | code(high, of_high, i) << 4);
}

// `count` bytes of an output's codes, from the bits of its pair's bytes that begin at `shift`.
inline void unpair_codes(const uint8_t* both, int64_t of_both, int shift, uint8_t* out, int64_t count) {
  const auto code = [&](int64_t i) { return i < of_both ? both[i] >> shift & 15 : 0; };
  const __m512i together = _mm512_set1_epi16(0x1001);  // of two neighbours, the first and 16 times the second
  int64_t i = 0;
  for (; i + kBlock / 2 <= std::min(count, of_both / 2); i += kBlock / 2) {
    const __m512i pairs = _mm512_loadu_si512(both + 2 * i);
    const __m512i codes = low_bits(shift ? _mm512_srli_epi16(pairs, 4) : pairs, 4);
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(out + i), _mm512_cvtepi16_epi8(_mm512_maddubs_epi16(codes, together)));
  }
  for (; i < count; ++i) out[i] = uint8_t(code(2 * i) | code(2 * i + 1) << 4);
}

}  // namespace
