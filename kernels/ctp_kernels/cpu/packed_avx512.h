// packed.cpp with AVX-512 VBMI2 and VNNI: 64 codes of an output at a time, as bytes in the order of inputs.
//
// A lane of a register has four inputs of an output, a quad. For a few rows of x, lanes are the quads of a block. For more
// of them codes are transposed first: lanes are 16 outputs, and each row's quad is broadcast to them. Sums need no adding up
// across lanes then, and scales are vectors.
//
// One row is multiplied with codes as they are decoded, and so are up to four with 4-bit codes, dense or paired, in segments of
// one or two blocks. For the rest an output's codes are decoded before.

#pragma once

#include <immintrin.h>

#include "packed_avx512_codes.h"
#include "packed_operands.h"

namespace {

using Lanes = __m512;
inline Lanes nothing() { return _mm512_setzero_ps(); }
inline Lanes all(float x) { return _mm512_set1_ps(x); }
inline Lanes times_plus(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
inline Lanes numbers(__m512i x) { return _mm512_cvtepi32_ps(x); }
inline Lanes numbers(Lanes x) { return x; }

#ifndef EMULATED_AVX512
// Not by the compiler's own functions: GCC 12 copies sums that stay in registers, which takes half of the time.
inline __m512i dot_bytes(__m512i sum, __m512i codes, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
  return sum;
}
inline __m512i dot_words(__m512i sum, __m512i codes, __m512i x) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(codes), "v"(x));
  return sum;
}
inline __m512i dot_bytes(__m512i sum, __m512i codes, const __m512i* x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(codes), "m"(*x));
  return sum;
}
#else
inline __m512i dot_bytes(__m512i sum, __m512i codes, __m512i x) { return _mm512_dpbusd_epi32(sum, codes, x); }
inline __m512i dot_words(__m512i sum, __m512i codes, __m512i x) { return _mm512_dpwssd_epi32(sum, codes, x); }
inline __m512i dot_bytes(__m512i sum, __m512i codes, const __m512i* x) { return dot_bytes(sum, codes, *x); }
#endif

// How x is held and multiplied. A quad of it takes kParts lanes. `spread` makes those of a block, parts of a quad `apart`
// lanes from each other; `split` makes codes what `add` multiplies all parts with; `from` is a sum to begin with.
struct Bytes {
  using X = int8_t;
  static constexpr float kSteps = 127;
  static constexpr int kParts = 1, kCodes = 1;
  using Part = __m512i;
  using Sum = __m512i;
  static Sum from(__m512i sum) { return sum; }
  static void spread(const int16_t* x, X* out, int64_t) { std::copy(x, x + kBlock, out); }
  static __m512i sums(const X* lanes) {
    return dot_bytes(_mm512_setzero_si512(), _mm512_set1_epi8(1), _mm512_loadu_si512(lanes));
  }
  static void split(__m512i codes, __m512i, Part* parts) { parts[0] = codes; }
  static Sum add(Sum sum, const Part* codes, const __m512i* x) { return dot_bytes(sum, codes[0], x[0]); }
  static Sum add_at(Sum sum, const Part* codes, const __m512i* x) { return dot_bytes(sum, codes[0], x); }
};

// 16 bits as 256 times one byte and another one, both with a sign, so that codes are multiplied as they are decoded
struct Halves {
  using X = int16_t;  // the first ones of a block, then the others
  static constexpr float kSteps = kWordSteps;
  static constexpr int kParts = 2, kCodes = 1;
  using Part = __m512i;
  struct Sum {
    __m512i high, low;
  };
  static Sum from(__m512i sum) { return {_mm512_setzero_si512(), sum}; }
  static void spread(const int16_t* x, X* out, int64_t) {
    int8_t bytes[2 * kBlock];
    for (int64_t k = 0; k < kBlock; ++k) {
      const int high = (x[k] + 128) >> 8;
      bytes[k] = int8_t(high);
      bytes[kBlock + k] = int8_t(x[k] - 256 * high);
    }
    std::memcpy(out, bytes, sizeof bytes);
  }
  static __m512i sums(const X* lanes) {
    const __m512i ones = _mm512_set1_epi8(1);
    const __m512i of_high = dot_bytes(_mm512_setzero_si512(), ones, _mm512_loadu_si512(lanes));
    return dot_bytes(_mm512_slli_epi32(of_high, 8), ones, _mm512_loadu_si512(lanes + kBlock / 2));
  }
  static void split(__m512i codes, __m512i, Part* parts) { parts[0] = codes; }
  static Sum add(Sum sum, const Part* codes, const __m512i* x) {
    return {dot_bytes(sum.high, codes[0], x[0]), dot_bytes(sum.low, codes[0], x[1])};
  }
  static Sum add_at(Sum sum, const Part* codes, const __m512i* x) {
    return {dot_bytes(sum.high, codes[0], x), dot_bytes(sum.low, codes[0], x + 1)};
  }
};
inline Lanes numbers(Halves::Sum sum) {
  return numbers(_mm512_add_epi32(_mm512_slli_epi32(sum.high, 8), sum.low));
}

struct Words {  // for many rows, where Halves' sums would need twice the registers
  using X = int16_t;
  static constexpr float kSteps = kWordSteps;
  static constexpr int kParts = 2, kCodes = 2;
  using Part = __m512i;
  using Sum = __m512i;
  static void spread(const int16_t* x, X* out, int64_t apart) {
    const int64_t next = apart == 1 ? 4 : 2;
    for (int64_t quad = 0; quad < kLanes; ++quad)
      for (int part = 0; part < kParts; ++part)
        for (int i = 0; i < 2; ++i) out[quad * next + part * apart * 2 + i] = x[4 * quad + 2 * i + part];
  }
  static __m512i sums(const X* lanes) {
    const __m512i ones = _mm512_set1_epi32(0x00010001);
    const __m512i of_first = dot_words(_mm512_setzero_si512(), ones, _mm512_loadu_si512(lanes));
    return dot_words(of_first, ones, _mm512_loadu_si512(lanes + kBlock / 2));
  }
  static void split(__m512i codes, __m512i, Part* parts) {
    parts[0] = _mm512_and_si512(codes, _mm512_set1_epi32(0x00ff00ff));
    parts[1] = _mm512_srli_epi16(codes, 8);
  }
  static Sum add(Sum sum, const Part* codes, const __m512i* x) {
    return dot_words(dot_words(sum, codes[0], x[0]), codes[1], x[1]);
  }
};

struct Floats {
  using X = float;
  static constexpr float kSteps = 0;  // x is as it is
  static constexpr int kParts = 4, kCodes = 4;
  using Part = Lanes;
  using Sum = Lanes;
  static Sum from(__m512i) { return nothing(); }
  static void spread(const float* x, X* out, int64_t apart) {
    const int64_t next = apart == 1 ? 4 : 1;
    for (int64_t quad = 0; quad < kLanes; ++quad)
      for (int part = 0; part < kParts; ++part) out[quad * next + part * apart] = x[4 * quad + part];
  }
  static void split(__m512i codes, __m512i zeros, Part* parts) {
    const __m512i byte = _mm512_set1_epi32(255);
    const __m512i of[] = {
        _mm512_and_si512(codes, byte), _mm512_and_si512(_mm512_srli_epi32(codes, 8), byte),
        _mm512_and_si512(_mm512_srli_epi32(codes, 16), byte), _mm512_srli_epi32(codes, 24)};
    for (int part = 0; part < kParts; ++part) parts[part] = numbers(_mm512_sub_epi32(of[part], zeros));
  }
  // a quad by itself, since fewer numbers are added up one after the other then, and rounded
  static Sum add(Sum sum, const Part* weights, const __m512i* x) {
    Lanes quad = _mm512_mul_ps(weights[0], _mm512_castsi512_ps(x[0]));
    for (int part = 1; part < kParts; ++part) quad = times_plus(weights[part], _mm512_castsi512_ps(x[part]), quad);
    return _mm512_add_ps(sum, quad);
  }
  static Sum add_at(Sum sum, const Part* weights, const __m512i* x) { return add(sum, weights, x); }
};

// x of few rows: (rows, blocks, parts, quads), with sums for each quad; of many: (blocks, quads, parts, rows)
template <class Arithmetic, bool kFew>
struct Form : Arithmetic {
  using typename Arithmetic::X;
  static constexpr int64_t kSums = kFew ? kLanes : 1;
  static constexpr int64_t kWide = 4 / sizeof(X);  // elements of a lane

  // What sums are multiplied with, once: they are to be subtracted as often as the zero point says.
  static int32_t factor(const Layer& layer) { return layer.zeros ? -1 : -(1 << (layer.bits - 1)); }

  static int64_t begin(int64_t block, int64_t m, int64_t rows, int64_t blocks) {
    return kFew ? (m * blocks + block) * kBlock : block * kBlock * rows + m * kWide;
  }

  template <typename Value>
  static void take(const Value* x, X* out, int64_t rows, int32_t* sums) {
    alignas(64) X lanes[kBlock];
    Arithmetic::spread(x, lanes, kFew ? kLanes : 1);
    if constexpr (Arithmetic::kSteps > 0) {
      const __m512i of_lanes = Arithmetic::sums(lanes);
      if (kFew)
        _mm512_storeu_si512(sums, _mm512_add_epi32(of_lanes, _mm512_loadu_si512(sums)));
      else
        *sums += _mm512_reduce_add_epi32(of_lanes);
    }
    if (kFew)
      std::memcpy(out, lanes, sizeof lanes);
    else
      for (int64_t lane = 0; lane < kBlock / kWide; ++lane)
        std::memcpy(out + lane * rows * kWide, lanes + lane * kWide, sizeof(int32_t));
  }
};

template <class Arithmetic>
using Few = Form<Arithmetic, true>;
template <class Arithmetic>
using Many = Form<Arithmetic, false>;
constexpr int64_t kFewRows = 4;      // for more of them it pays to transpose codes
constexpr int64_t kMostBlocks = 32;  // of a segment

// run(Form()) with the form for such a product
template <typename Run>
int with_form(int64_t width, int64_t, int64_t rows, const Run& run) {
  if (rows <= kFewRows) return width == 8 ? run(Few<Bytes>()) : width == 16 ? run(Few<Halves>()) : run(Few<Floats>());
  return width == 8 ? run(Many<Bytes>()) : width == 16 ? run(Many<Words>()) : run(Many<Floats>());
}

// An output's products with M rows of x. scales (M, S): of weights, times those of x where it has some. B: blocks of a
// segment, if they are whole and few; or 0. kZeros: whether the layer has zero points, or has to be asked for each segment
enum Zeros { kUsual, kGiven, kAsked };
template <class Arithmetic, int B, int M, class Codes, Zeros kZeros>
void products_of(const Row& row, const Activations<Few<Arithmetic>>& x, const float* scales, float* y) {
  constexpr int kParts = Arithmetic::kParts;
  Codes codes(row);
  const int64_t blocks = B ? B : x.layer.blocks(), segments = row.segments;
  const __m512i usual = _mm512_set1_epi32(int(0x01010101u << (x.layer.bits - 1)));
  __m512i zeros = usual, zero = _mm512_and_si512(usual, _mm512_set1_epi32(255));
  Lanes totals[M];
  for (auto& total : totals) total = nothing();
  for (int64_t s = 0; s < segments; ++s) {
    codes.prefetch_ahead(s, B ? B * kBlock : row.inputs);
    const bool given = kZeros == kAsked ? row.zeros != nullptr : kZeros == kGiven;
    if (given) {
      zeros = _mm512_set1_epi8(char(row.zeros[s]));
      zero = _mm512_set1_epi32(row.zeros[s]);
    }
    typename Arithmetic::Part parts[B ? B : kMostBlocks][Arithmetic::kCodes];
    for (int64_t b = 0; b < blocks; ++b)
      Arithmetic::split(codes.next(zeros, B ? kBlock : std::min(kBlock, row.inputs - b * kBlock)), zero, parts[b]);
#pragma GCC unroll 4
    for (int64_t m = 0; m < M; ++m) {
      __m512i of_x = _mm512_setzero_si512();
      if constexpr (Arithmetic::kSteps > 0) {
        of_x = _mm512_loadu_si512(&x.sums[(m * segments + s) * kLanes]);
        if (given) of_x = _mm512_mullo_epi32(of_x, zero);
      }
      auto sum = Arithmetic::from(of_x);
      const auto* lanes = reinterpret_cast<const __m512i*>(x.x) + (m * segments + s) * blocks * kParts;
      for (int64_t b = 0; b < blocks; ++b) sum = Arithmetic::add_at(sum, parts[b], lanes + b * kParts);
      totals[m] = times_plus(all(scales[m * segments + s]), numbers(sum), totals[m]);
    }
  }
  for (int64_t m = 0; m < M; ++m) y[m * x.layer.outputs] = _mm512_reduce_add_ps(totals[m]);
}

// The same of a pair of outputs and one row of x. B: 1, 2, or 0 for any number of blocks; scales (2, S); `rows` of one
// output where there is no second one. Pointers are few and simple, or a compiler puts some of them into vectors.
template <class Arithmetic, int B, bool kFew, bool kZeros>
void products_of_pair(const Row* rows, const Activations<Few<Arithmetic>>& x, const float* scales, float* y) {
  constexpr int kParts = Arithmetic::kParts;
  const int64_t blocks = B ? B : x.layer.blocks(), segments = rows[0].segments, inputs = rows[0].inputs;
  const int64_t apart = rows[1].mask - rows[0].mask, zeros_apart = rows[1].zeros - rows[0].zeros;
  const uint8_t *low = rows[0].stream, *high = rows[1].stream, *mask = rows[0].mask, *zero_points = rows[0].zeros;
  const auto* of_x = reinterpret_cast<const __m512i*>(x.x);
  const int32_t* sums_of_x = x.sums.data();
  const float* const end = scales + segments;
  const __m512i usual = _mm512_set1_epi32(0x08080808), usual_zero = _mm512_set1_epi32(8);
  Lanes total[2] = {nothing(), nothing()};
  for (; scales < end; ++scales) {
    prefetch(low + kAhead);
    if ((reinterpret_cast<uintptr_t>(mask) & 63) < (B ? B * 8 : 64)) {  // once for a cache line
      prefetch(mask + kAhead / 2);
      prefetch(mask + apart + kAhead / 2);
    }
    __m512i zeros[2] = {usual, usual}, zero[2] = {usual_zero, usual_zero};
    if constexpr (kZeros) {
      for (int r = 0; r < 2; ++r) {
        zeros[r] = _mm512_set1_epi8(char(zero_points[r * zeros_apart]));
        zero[r] = _mm512_set1_epi32(zero_points[r * zeros_apart]);
      }
      ++zero_points;
    }
    __m512i beginning[2] = {};
    if constexpr (Arithmetic::kSteps > 0) {
      beginning[0] = beginning[1] = _mm512_loadu_si512(sums_of_x);
      for (int r = 0; kZeros && r < 2; ++r) beginning[r] = _mm512_mullo_epi32(beginning[r], zero[r]);
      sums_of_x += kLanes;
    }
    typename Arithmetic::Sum sum[2] = {Arithmetic::from(beginning[0]), Arithmetic::from(beginning[1])};
    for (int64_t b = 0; b < blocks; ++b) {
      __m512i x_b[kParts];
      for (int part = 0; part < kParts; ++part) x_b[part] = of_x[part];
      of_x += kParts;
      const int64_t there = B ? kBlock : std::min(kBlock, inputs - b * kBlock);
      typename Arithmetic::Part parts[Arithmetic::kCodes];
      Arithmetic::split(paired_codes<false, kFew>(low, mask, zeros[0], there), zero[0], parts);
      sum[0] = Arithmetic::add(sum[0], parts, x_b);
      Arithmetic::split(paired_codes<true, kFew>(high, mask + apart, zeros[1], there), zero[1], parts);
      sum[1] = Arithmetic::add(sum[1], parts, x_b);
      mask += there / 8;
    }
    total[0] = times_plus(all(scales[0]), numbers(sum[0]), total[0]);
    total[1] = times_plus(all(scales[segments]), numbers(sum[1]), total[1]);
  }
  for (int r = 0; r < 2; ++r) y[r] = _mm512_reduce_add_ps(total[r]);
}

template <class Form>
class Worker;

template <class Arithmetic>
class Worker<Few<Arithmetic>> {
 public:
  static constexpr int64_t kTaken = 16;  // outputs at a time

  Worker(const Activations<Few<Arithmetic>>& x, float* y)
      : x_(x),
        y_(y),
        outputs_{Output(x.layer), Output(x.layer)},
        scales_(std::max(x.rows, int64_t{2}) * x.segments) {}

  void take(int64_t begin, int64_t end) {
    switch (x_.layer.segment) {
      case kBlock: return take_blocks<1>(begin, end);
      case 2 * kBlock: return take_blocks<2>(begin, end);
      default: return take_blocks<0>(begin, end);
    }
  }

 private:
  const Activations<Few<Arithmetic>>& x_;
  float* const y_;
  Output outputs_[2];          // two where they are a pair
  std::vector<float> scales_;  // (M, S) or (2, S)

  template <int B>
  void take_blocks(int64_t begin, int64_t end) {
    switch (x_.rows) {
      case 1: return take_row<B>(begin, end);
      case 2: return take_rows<B, 2>(begin, end);
      case 3: return take_rows<B, 3>(begin, end);
      default: return take_rows<B, 4>(begin, end);
    }
  }

  template <int B>
  void take_row(int64_t begin, int64_t end) {
    switch (x_.layer.kind) {
      case kPaired: return take_pairs<B, false>(begin, end);
      case kPairedFew: return take_pairs<B, true>(begin, end);
      default:
        with_constants(x_.layer.bits, x_.layer.kind, [&](auto bits, auto kind) {
          if constexpr (kind == kDense)
            for (int64_t o = begin; o < end; ++o)
              if (x_.layer.zeros)
                take_one<B, 1, Codes<bits, kind>, kGiven>(o);
              else
                take_one<B, 1, Codes<bits, kind>, kUsual>(o);
          else if constexpr (kind != kPaired)
            for (int64_t o = begin; o < end; ++o) take_one<B, 1, Codes<bits, kind>, kAsked>(o);
        });
    }
  }

  template <int B, int M>
  void take_rows(int64_t begin, int64_t end) {
    const Layer& layer = x_.layer;
    for (int64_t o = begin; o < end; ++o) {
      if (B && layer.kind == kDense && layer.bits == 4)
        take_one<B, M, Codes<4, kDense>, kAsked>(o);
      else if (B && layer.kind == kPaired)
        o % 2 ? take_one<B, M, Codes<4, kPaired, true>, kAsked>(o) : take_one<B, M, Codes<4, kPaired>, kAsked>(o);
      else if (B && layer.kind == kPairedFew)
        o % 2 ? take_one<B, M, Codes<4, kPairedFew, true>, kAsked>(o) : take_one<B, M, Codes<4, kPairedFew>, kAsked>(o);
      else
        take_one<B, M, Decoded, kAsked>(o);
    }
  }

  const float* of_x(int64_t m) const {
    return Arithmetic::kSteps > 0 ? x_.scales.data() + m * x_.segments : nullptr;
  }

  template <int B, int M, class Codes, Zeros kZeros>
  void take_one(int64_t o) {
    Output& output = outputs_[0];
    const Row row = std::is_same_v<Codes, Decoded> ? output.decoded(o) : output.locate(o);
    for (int64_t m = 0; m < M; ++m) output.take_scales(o, of_x(m), &scales_[m * x_.segments]);
    products_of<Arithmetic, B, M, Codes, kZeros>(row, x_, scales_.data(), y_ + o);
  }

  template <int B, bool kFew>
  void take_pairs(int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; o += 2) {
      Row rows[2];
      float y[2];
      for (int64_t r = 0; r < 2; ++r) {
        const int64_t output = std::min(o + r, end - 1);
        rows[r] = outputs_[r].locate(output);
        outputs_[r].take_scales(output, of_x(0), &scales_[r * x_.segments]);
      }
      if (x_.layer.zeros)
        products_of_pair<Arithmetic, B, kFew, true>(rows, x_, scales_.data(), y);
      else
        products_of_pair<Arithmetic, B, kFew, false>(rows, x_, scales_.data(), y);
      y_[o] = y[0];
      if (o + 1 < end) y_[o + 1] = y[1];
    }
  }
};

// lanes (16, 16) of 32 bits, whose rows begin at `from`, with rows and columns exchanged
inline void transpose(const uint8_t* const* from, int64_t at, __m512i* out, int64_t stride) {
  __m512i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(from[i] + at);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; ++j) {
      a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
      a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
    }
  // a[4 i + j]: rows 4 i to 4 i + 3 of columns j, j + 4, j + 8 and j + 12
  for (int j = 0; j < 4; ++j) {
    const __m512i low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x88), high = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xdd);
    const __m512i low2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x88);
    const __m512i high2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xdd);
    out[j * stride] = _mm512_shuffle_i32x4(low, low2, 0x88);
    out[(j + 4) * stride] = _mm512_shuffle_i32x4(high, high2, 0x88);
    out[(j + 8) * stride] = _mm512_shuffle_i32x4(low, low2, 0xdd);
    out[(j + 12) * stride] = _mm512_shuffle_i32x4(high, high2, 0xdd);
  }
}

template <class Arithmetic>
class Worker<Many<Arithmetic>> {
  static constexpr int kTiles = 2;  // of 16 outputs
  static constexpr int kParts = Arithmetic::kParts;
  static constexpr int64_t kRows = 8;  // of x whose sums stay in registers

 public:
  static constexpr int64_t kTaken = kTiles * kLanes;

  Worker(const Activations<Many<Arithmetic>>& x, float* y)
      : x_(x),
        rows_(x.rows),
        y_(y),
        segments_((x.segments + kLanes - 1) / kLanes * kLanes),
        nothing_(std::max(segments_ * int64_t(sizeof(float)), x.segments * x.layer.blocks() * kBlock)),
        scales_(new __m512i[segments_ * kTiles]),
        zeros_(x.layer.zeros ? new int32_t[x.layer.segments() * kTaken]() : nullptr),
        codes_(new __m512i[x.layer.blocks() * kLanes * kTiles]),
        totals_(new Lanes[x.rows * kTiles]) {
    outputs_.reserve(kTaken);
    for (int64_t i = 0; i < kTaken; ++i) outputs_.emplace_back(x.layer);
  }

  void take(int64_t begin, int64_t end) {
    const Layer& layer = x_.layer;
    const uint8_t *fields[kTaken], *scales[kTaken];
    for (int64_t i = 0; i < kTaken; ++i) {
      const bool there = begin + i < end;
      if (there) outputs_[i].take(begin + i);
      fields[i] = there ? outputs_[i].fields() : nothing_.data();
      scales[i] = there ? reinterpret_cast<const uint8_t*>(outputs_[i].scales.data()) : nothing_.data();
      if (zeros_ && there)
        for (int64_t s = 0; s < layer.segments(); ++s) zeros_[s * kTaken + i] = outputs_[i].zero(s);
    }
    for (int64_t s = 0; s < segments_; s += kLanes)
      for (int t = 0; t < kTiles; ++t) transpose(scales + t * kLanes, s * 4, &scales_[s * kTiles + t], kTiles);
    std::fill_n(totals_.get(), rows_ * kTiles, nothing());
    for (int64_t s = 0; s < layer.segments(); ++s) {
      for (int64_t b = 0; b < layer.blocks(); ++b)
        for (int t = 0; t < kTiles; ++t)
          transpose(
              fields + t * kLanes, (s * layer.blocks() + b) * kBlock, &codes_[b * kLanes * kTiles + t], kTiles);
      const int64_t parts = (rows_ + kRows - 1) / kRows;  // of as many rows, but for one
      // integers of a segment are summed; of floats no more at once than a block, or rounding would add up, too
      const int64_t at_once = Arithmetic::kSteps > 0 ? layer.blocks() : 1;
      for (int64_t part = 0; part < parts; ++part)
        for (int64_t b = 0; b < layer.blocks(); b += at_once) {
          const int64_t m = rows_ * part / parts;
          products({s, b, at_once, m}, rows_ * (part + 1) / parts - m);
        }
    }
    for (int64_t m = 0; m < rows_; ++m)
      std::copy_n(reinterpret_cast<const float*>(&totals_[m * kTiles]), end - begin, y_ + m * layer.outputs + begin);
  }

 private:
  const Activations<Many<Arithmetic>>& x_;
  const int64_t rows_;
  float* const y_;
  const int64_t segments_;  // up to a multiple of 16
  std::vector<Output> outputs_;
  const std::vector<uint8_t> nothing_;       // what stands for outputs that there are not
  const std::unique_ptr<__m512i[]> scales_;  // (S, tiles), floats
  const std::unique_ptr<int32_t[]> zeros_;   // (S, tiles, 16)
  const std::unique_ptr<__m512i[]> codes_;   // of a segment, (quads, tiles)
  const std::unique_ptr<Lanes[]> totals_;    // (M, tiles)

  struct Place {
    int64_t s, block, blocks, m;  // blocks of a segment, from that row of x on
  };

  void products(const Place& at, int64_t count) {
    switch (count) {
      case 1: return products<1>(at);
      case 2: return products<2>(at);
      case 3: return products<3>(at);
      case 4: return products<4>(at);
      case 5: return products<5>(at);
      case 6: return products<6>(at);
      case 7: return products<7>(at);
      default: return products<8>(at);
    }
  }

  template <int M>
  void products(const Place& at) {
    const Layer& layer = x_.layer;
    const auto [s, block, blocks, m] = at;
    __m512i zeros[kTiles];
    typename Arithmetic::Sum sums[kTiles][M];
#pragma GCC unroll 2
    for (int t = 0; t < kTiles; ++t) {
      zeros[t] = zeros_ ? _mm512_loadu_si512(&zeros_[s * kTaken + t * kLanes])
                        : _mm512_set1_epi32(1 << (layer.bits - 1));
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        sums[t][i] = typename Arithmetic::Sum();
        if constexpr (Arithmetic::kSteps > 0) {
          sums[t][i] = _mm512_set1_epi32(x_.sums[(m + i) * layer.segments() + s]);
          if (zeros_) sums[t][i] = _mm512_mullo_epi32(sums[t][i], zeros[t]);
        }
      }
    }
    const typename Arithmetic::X* x = x_.x + Many<Arithmetic>::begin(s * layer.blocks() + block, m, rows_, 0);
    const __m512i* codes = &codes_[block * kLanes * kTiles];
    constexpr int64_t wide = Many<Arithmetic>::kWide;
    for (int64_t quad = 0; quad < blocks * kLanes; ++quad, codes += kTiles, x += kParts * rows_ * wide) {
      typename Arithmetic::Part parts[kTiles][Arithmetic::kCodes];
#pragma GCC unroll 2
      for (int t = 0; t < kTiles; ++t) Arithmetic::split(codes[t], zeros[t], parts[t]);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        __m512i of_x[kParts];
#pragma GCC unroll 4
        for (int part = 0; part < kParts; ++part)
          of_x[part] = _mm512_set1_epi32(loaded<int32_t>(x + (part * rows_ + i) * wide));
#pragma GCC unroll 2
        for (int t = 0; t < kTiles; ++t) sums[t][i] = Arithmetic::add(sums[t][i], parts[t], of_x);
      }
    }
#pragma GCC unroll 2
    for (int t = 0; t < kTiles; ++t) {
      const Lanes scale = _mm512_castsi512_ps(scales_[s * kTiles + t]);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        Lanes& total = totals_[(m + i) * kTiles + t];
        const float of_x = Arithmetic::kSteps > 0 ? x_.scales[(m + i) * layer.segments() + s] : 1;
        total = times_plus(_mm512_mul_ps(scale, all(of_x)), numbers(sums[t][i]), total);
      }
    }
  }
};

}  // namespace
