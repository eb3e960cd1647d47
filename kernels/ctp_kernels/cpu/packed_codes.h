// What packed.cpp and its two sets of instructions share: how layers are stored, and how a row of codes is decoded.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kBlock = 64;  // inputs

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

}  // namespace
