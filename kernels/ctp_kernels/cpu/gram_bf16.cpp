// H += x^T x for bfloat16 x and float32 H, upper triangle only, with AVX-512 BF16 dot products.
//
// A product of two bfloat16 numbers is exact in float32, so nothing is rounded but the sums. PyTorch has no such
// product: its bfloat16 matmul rounds the result to bfloat16, and its float32 one does half as many products a second.
//
// T=tokens I=width of x. Tokens are taken in runs; two tokens share a 32-bit lane, as the instruction wants them. Columns
// lie in panels, so that a tile of H, 8 rows of 48 columns, stays in registers while it reads two streams of memory.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "threads.h"

namespace {

constexpr int64_t kPairs = 1024;  // most tokens of a run, halved
constexpr int64_t kRows = 8;
constexpr int64_t kVectors = 3;
constexpr int64_t kColumns = 16 * kVectors;  // of a panel, and of a tile
constexpr int64_t kPanel = kPairs * kColumns;

// panels[i / 48][p][i % 48] = x[2p][i] in the low half, x[2p + 1][i] in the high half, 0 beyond the last token
void pair_up(const uint16_t* x, int64_t tokens, int64_t width, int64_t stride, int64_t p, uint32_t* panels) {
  for (int64_t begin = 0; begin < width; begin += kColumns) {
    uint32_t* out = panels + begin * kPairs + p * kColumns;
    const uint16_t* low = x + 2 * p * stride + begin;
    const uint16_t* high = low + stride;
    const int64_t count = std::min(kColumns, width - begin);
    if (2 * p + 1 < tokens)
      for (int64_t i = 0; i < count; ++i) out[i] = low[i] | uint32_t(high[i]) << 16;
    else
      std::copy(low, low + count, out);
  }
}

inline __m512bh as_bf16(__m512i bits) { return (__m512bh)bits; }

void tile(const uint32_t* panels, int64_t pairs, int64_t width, int64_t row, int64_t column, float* H) {
  __m512 sums[kRows][kVectors];
  for (auto& sums_of_row : sums)
    for (auto& sum : sums_of_row) sum = _mm512_setzero_ps();
  const uint32_t* row_values = panels + row / kColumns * kPanel + row % kColumns;
  const uint32_t* column_values = panels + column / kColumns * kPanel;
  for (int64_t p = 0; p < pairs; ++p, row_values += kColumns, column_values += kColumns) {
    __m512bh columns[kVectors];
    for (int c = 0; c < kVectors; ++c) columns[c] = as_bf16(_mm512_loadu_si512(column_values + 16 * c));
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512bh value = as_bf16(_mm512_set1_epi32(int(row_values[r])));
#pragma GCC unroll 3
      for (int c = 0; c < kVectors; ++c) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], value, columns[c]);
    }
  }
  for (int64_t r = 0; r < std::min(kRows, width - row); ++r) {
    for (int c = 0; c < kVectors; ++c) {
      const int64_t left = width - (column + 16 * c);
      if (left <= 0) break;
      const __mmask16 mask = left >= 16 ? 0xFFFF : __mmask16((1u << left) - 1);
      float* out = H + (row + r) * width + column + 16 * c;
      _mm512_mask_storeu_ps(out, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, out), sums[r][c]));
    }
  }
}

}  // namespace

// returns 0, or 1 where there is not enough memory
extern "C" int gram_bf16(
    const uint16_t* x, int64_t tokens, int64_t width, int64_t stride, float* H, int64_t threads) {
  std::vector<uint32_t> panels;
  try {
    panels.resize((width + kColumns - 1) / kColumns * kPanel);
  } catch (const std::bad_alloc&) {
    return 1;
  }
  for (int64_t start = 0; start < tokens; start += 2 * kPairs) {
    const int64_t pairs = std::min(kPairs, (tokens - start + 1) / 2);
    in_parallel(threads, threads, [&](int64_t thread) {
      for (int64_t p = thread; p < pairs; p += threads)
        pair_up(x + start * stride, tokens - start, width, stride, p, panels.data());
    });
    // rows of tiles in turn: the triangle's long and short ones are dealt out evenly
    in_parallel(threads, threads, [&](int64_t thread) {
      for (int64_t column = 0; column < width; column += kColumns)
        for (int64_t row = thread * kRows; row < std::min(column + kColumns, width); row += threads * kRows)
          tile(panels.data(), pairs, width, row, column, H);
    });
  }
  return 0;
}
