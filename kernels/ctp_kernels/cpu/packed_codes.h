// What packed.cpp and its two sets of instructions share: how layers are stored, and how a row of codes is decoded.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__AVX512VBMI2__) && defined(__AVX512VNNI__)
#define PACKED_AVX512 1
#endif

namespace {

constexpr int64_t kBlock = 64;  // inputs

// kHalf: 8 of each 16 weights are stored, as in 8:16 and 2:4. kPaired: 4-bit codes of an output with an even number are the
// low halves of bytes, those of the next one the high halves, as many bytes as the longer of them needs; with AVX-512 alone. kPairedFew:
// the same where few blocks have more than half of their codes
enum Kind { kDense = 0, kHalf = 1, kBitmap = 2, kPaired = 3, kPairedFew = 4 };

struct Layer {
  const uint8_t *codes, *mask;    // (bytes), (N, K / 8) or null
  const int64_t* starts;          // (N) byte at which an output's codes begin; of pairs (N / 2), rounded up
  const uint16_t* scales;         // (N, G) float16
  const uint8_t* zeros;           // (N, G) or null: 2^(bits - 1)
  int64_t bytes, outputs, inputs, groups, segment, bits;
  Kind kind;
  const int64_t count = inputs / segment, padded = (segment + kBlock - 1) / kBlock;
  int64_t segments() const { return count; }
  int64_t blocks() const { return padded; }  // of a segment
  bool paired() const { return kind == kPaired || kind == kPairedFew; }
  int64_t start(int64_t o) const { return starts[paired() ? o / 2 : o]; }
};

template <typename T>
inline T loaded(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// lanes of a register; bytes that may be read behind a stream's last code; bits that a code is decoded into
#ifdef PACKED_AVX512
constexpr int64_t kLanes = 16, kBeyond = 80;
inline int64_t width(int64_t) { return 8; }
#else
constexpr int64_t kLanes = 8, kBeyond = 16;
inline int64_t width(int64_t bits) { return bits == 8 ? 8 : 4; }
#endif

inline int64_t bits_in(uint64_t word) { return __builtin_popcountll(word); }

// What one output's codes are decoded into and from: `stream` from its first code on, with kBeyond bytes to read behind
// the last one; `mask` its bits of what is stored; `zeros` (S), or null as of a layer; `fields` (S, step) bytes; `high`: of a
// pair, its second output.
struct Row {
  const uint8_t *stream, *mask, *zeros;
  int64_t segments, inputs, step;  // inputs of a segment
  uint8_t* fields;
  bool high;
};
template <int kBits, int kKind>
void decode(const Row& row);

template <int value>
using Constant = std::integral_constant<int, value>;

// run(Constant<bits>(), Constant<kind>()), kPaired for both kinds of that
template <typename Run>
auto with_constants(int64_t bits, Kind kind, const Run& run) {
  switch (bits * 4 + std::min(kind, kPaired)) {
    case 2 * 4 + kDense: return run(Constant<2>(), Constant<kDense>());
    case 2 * 4 + kHalf: return run(Constant<2>(), Constant<kHalf>());
    case 2 * 4 + kBitmap: return run(Constant<2>(), Constant<kBitmap>());
    case 3 * 4 + kDense: return run(Constant<3>(), Constant<kDense>());
    case 3 * 4 + kHalf: return run(Constant<3>(), Constant<kHalf>());
    case 3 * 4 + kBitmap: return run(Constant<3>(), Constant<kBitmap>());
    case 4 * 4 + kDense: return run(Constant<4>(), Constant<kDense>());
    case 4 * 4 + kHalf: return run(Constant<4>(), Constant<kHalf>());
    case 4 * 4 + kBitmap: return run(Constant<4>(), Constant<kBitmap>());
#ifdef PACKED_AVX512
    case 4 * 4 + kPaired: return run(Constant<4>(), Constant<kPaired>());
#endif
    case 8 * 4 + kDense: return run(Constant<8>(), Constant<kDense>());
    default: return run(Constant<8>(), Constant<kBitmap>());
  }
}

struct Segment {  // of one output, decoded; codes are fields ^ flip
  const uint8_t* fields;
  uint8_t zero, flip;
};

}  // namespace
