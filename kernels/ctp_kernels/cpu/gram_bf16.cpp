// H += x^T x for bfloat16 x and float32 H, upper triangle only, with AVX-512 BF16 dot products.
//
// A product of two bfloat16 numbers is exact in float32, so nothing is rounded but the sums. PyTorch has no such
// product: its bfloat16 matmul rounds the result to bfloat16, and its float32 one does half as many products a second.
//
// T=tokens I=width of x. Tokens are taken in runs that fit the second-level cache; two tokens share a 32-bit lane, as
// the instruction wants them. A tile of H, 6 rows of 64 columns, stays in registers over a run.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr int64_t kPairs = 128;  // tokens of a run, halved: 1536 columns are then 768 KB
constexpr int64_t kRows = 6;
constexpr int64_t kColumns = 64;
constexpr int64_t kPadding = 192;  // a multiple of both

// pairs[p][i] = x[2p][i] in the low half, x[2p + 1][i] in the high half; zeros beyond the last token and column
void pair_up(const uint16_t* x, int64_t tokens, int64_t width, int64_t stride, int64_t padded, uint32_t* pairs) {
  for (int64_t p = 0; p < kPairs; ++p) {
    uint32_t* out = pairs + p * padded;
    const uint16_t* low = x + 2 * p * stride;
    const uint16_t* high = low + stride;
    const bool has_low = 2 * p < tokens, has_high = 2 * p + 1 < tokens;
    for (int64_t i = 0; i < width; ++i) {
      out[i] = (has_low ? low[i] : 0u) | (has_high ? uint32_t(high[i]) << 16 : 0u);
    }
  }
}

inline __m512bh as_bf16(__m512i bits) { return (__m512bh)bits; }

void tile(const uint32_t* pairs, int64_t padded, int64_t width, int64_t row, int64_t column, float* H) {
  __m512 sums[kRows][4];
  for (auto& sums_of_row : sums)
    for (auto& sum : sums_of_row) sum = _mm512_setzero_ps();
  for (int64_t p = 0; p < kPairs; ++p) {
    const uint32_t* here = pairs + p * padded;
    __m512bh columns[4];
    for (int c = 0; c < 4; ++c) columns[c] = as_bf16(_mm512_loadu_si512(here + column + 16 * c));
#pragma GCC unroll 6
    for (int r = 0; r < kRows; ++r) {
      const __m512bh value = as_bf16(_mm512_set1_epi32(int(here[row + r])));
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) sums[r][c] = _mm512_dpbf16_ps(sums[r][c], value, columns[c]);
    }
  }
  for (int64_t r = 0; r < std::min(kRows, width - row); ++r) {
    for (int c = 0; c < 4; ++c) {
      const int64_t left = width - (column + 16 * c);
      if (left <= 0) break;
      const __mmask16 mask = left >= 16 ? 0xFFFF : __mmask16((1u << left) - 1);
      float* out = H + (row + r) * width + column + 16 * c;
      _mm512_mask_storeu_ps(out, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, out), sums[r][c]));
    }
  }
}

// rows of tiles first, first + step, ...: the triangle's long and short rows are dealt out evenly
void work(const uint16_t* x, int64_t tokens, int64_t width, int64_t stride, float* H, int64_t first, int64_t step) {
  const int64_t padded = (width + kPadding - 1) / kPadding * kPadding;
  std::vector<uint32_t> pairs(kPairs * padded, 0);
  for (int64_t start = 0; start < tokens; start += 2 * kPairs) {
    pair_up(x + start * stride, tokens - start, width, stride, padded, pairs.data());
    for (int64_t row = first * kRows; row < width; row += step * kRows)
      for (int64_t column = row / kColumns * kColumns; column < width; column += kColumns)
        tile(pairs.data(), padded, width, row, column, H);
  }
}

}  // namespace

extern "C" void gram_bf16(
    const uint16_t* x, int64_t tokens, int64_t width, int64_t stride, float* H, int64_t threads) {
  std::vector<std::thread> others;
  for (int64_t t = 1; t < threads; ++t) others.emplace_back(work, x, tokens, width, stride, H, t, threads);
  work(x, tokens, width, stride, H, 0, threads);
  for (auto& other : others) other.join();
}
