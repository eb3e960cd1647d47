// packed.cpp with AVX-512 VBMI2 and VNNI: 64 codes of an output at a time, as bytes in the order of inputs.
//
// A lane of a register has four inputs of an output, a quad. For a few rows of x, lanes are the quads of a block, and codes
// are multiplied as they are decoded. For more of them codes are transposed first: lanes are 16 outputs, and each row's
// quad is broadcast to them. Sums need no adding up across lanes then, and scales are vectors.

#pragma once

#include <immintrin.h>

#include "packed_operands.h"

namespace {

using Lanes = __m512;
inline Lanes nothing() { return _mm512_setzero_ps(); }
inline Lanes all(float x) { return _mm512_set1_ps(x); }
inline Lanes times_plus(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
inline Lanes numbers(__m512i x) { return _mm512_cvtepi32_ps(x); }
inline Lanes numbers(Lanes x) { return x; }

// Cuts codes out of a stream, a block at a time.
template <int kBits, int kKind>
class Decoder {
 public:
  explicit Decoder(const Row& row) : stream_(row.stream), mask_(row.mask) {}

  // The codes of the next block, as bytes; where none is stored, that of `zeros`. inputs: fewer where a segment ends.
  __m512i next(__m512i zeros, int64_t inputs = kBlock) {
    uint64_t word = 0;
    if constexpr (kKind != kDense) {
      word = inputs == kBlock ? loaded<uint64_t>(mask_) : beginning(inputs / 8);
      mask_ += inputs / 8;
    }
    const uint64_t stored = kKind == kDense ? inputs : kKind == kHalf ? inputs / 2 : bits_in(word);
    const uint8_t* const from = stream_ + at_ / (8 * kShift);
    __m512i codes;
    if constexpr (kKind == kBitmap)
      codes = __builtin_expect(stored <= (32 * 8 - 7) / kBits, 1) ? read<32>(from) : read<64>(from);
    else
      codes = read<(kKind == kHalf ? kBlock / 2 : kBlock) * kBits / 8 + (kKind == kHalf && kBits == 3)>(from);
    codes = cut(codes, kKind == kDense || (kKind == kHalf && kBits % 2 == 0) ? 0 : at_ % (8 * kShift));
    at_ += kBits * kShift * stored;
    return kKind == kDense ? codes : _mm512_mask_expand_epi8(zeros, word, codes);
  }

  // What is read a while later is not waited for then.
  void prefetch() const {
    _mm_prefetch(reinterpret_cast<const char*>(stream_ + at_ / (8 * kShift) + kAhead), _MM_HINT_T0);
    if (kKind != kDense) _mm_prefetch(reinterpret_cast<const char*>(mask_ + kAhead / 2), _MM_HINT_T0);
  }

 private:
  static constexpr int64_t kAhead = 8192;  // bytes, about as many as are read while memory answers
  static constexpr uint64_t kShift = 64;   // bytes of a table of shifts
  const uint8_t *stream_, *mask_;
  uint64_t at_ = 0;  // bits of the stream before the next code, times kShift

  // Codes as bytes. 8 of them are kBits bytes: a lane of 64 bits gets the bytes that 8 codes are in, and they are cut out.
  static __m512i cut(__m512i stream, uint64_t shifts) {
    if constexpr (kBits == 8) return stream;
    struct Table {
      alignas(64) uint8_t bytes[64] = {}, shifts[8][kShift] = {};
      constexpr Table() {
        for (int i = 0; i < 64; ++i) bytes[i] = uint8_t(i / 8 * kBits + i % 8);
        for (int begin = 0; begin < 8; ++begin)
          for (int i = 0; i < 64; ++i) shifts[begin][i] = uint8_t(i % 8 * kBits + begin);
      }
    };
    static constexpr Table table;
    const __m512i lanes = _mm512_permutexvar_epi8(_mm512_load_si512(table.bytes), stream);
    const __m512i codes = _mm512_multishift_epi64_epi8(_mm512_load_si512(table.shifts[0] + shifts), lanes);
    return _mm512_and_si512(codes, _mm512_set1_epi8((1 << kBits) - 1));
  }

  // No more than there is need for: what crosses the border of a cache line is read twice.
  template <int bytes>
  static __m512i read(const uint8_t* from) {
    if constexpr (bytes <= 16)
      return _mm512_castsi128_si512(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    else if constexpr (bytes <= 32)
      return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    else
      return _mm512_loadu_si512(from);
  }

  uint64_t beginning(int64_t bytes) const {
    uint64_t word = 0;
    for (int64_t i = 0; i < bytes; ++i) word |= uint64_t(mask_[i]) << 8 * i;
    return word;
  }
};

template <int kBits, int kKind>
void decode(const Row& given) {
  const Row row = given;  // or each byte that is written might change it, as far as a compiler knows
  Decoder<kBits, kKind> decoder(row);
  for (int64_t s = 0; s < row.segments; ++s) {
    const __m512i zeros = _mm512_set1_epi8(char(row.zeros ? row.zeros[s] : 1 << (kBits - 1)));
    uint8_t* fields = row.fields + s * row.step;
    decoder.prefetch();
    for (int64_t b = 0; b < row.inputs / kBlock; ++b, fields += kBlock)
      _mm512_storeu_si512(fields, decoder.next(zeros));
    if (row.inputs % kBlock) _mm512_storeu_si512(fields, decoder.next(zeros, row.inputs % kBlock));
  }
}

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
inline __m512i dot_words(__m512i sum, __m512i codes, const __m512i* x) {
  asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(codes), "m"(*x));
  return sum;
}
#else
inline __m512i dot_bytes(__m512i sum, __m512i codes, __m512i x) { return _mm512_dpbusd_epi32(sum, codes, x); }
inline __m512i dot_words(__m512i sum, __m512i codes, __m512i x) { return _mm512_dpwssd_epi32(sum, codes, x); }
inline __m512i dot_bytes(__m512i sum, __m512i codes, const __m512i* x) { return dot_bytes(sum, codes, *x); }
inline __m512i dot_words(__m512i sum, __m512i codes, const __m512i* x) { return dot_words(sum, codes, *x); }
#endif

// How x is held and multiplied. A quad of it takes kParts lanes. `spread` makes those of a block, parts of a quad `apart`
// lanes from each other; `add` multiplies all parts.
struct Bytes {
  using X = int8_t;
  static constexpr float kSteps = 127;
  static constexpr int kParts = 1;
  using Part = __m512i;
  using Sum = __m512i;
  static void spread(const int16_t* x, X* out, int64_t) { std::copy(x, x + kBlock, out); }
  static __m512i sums(const X* lanes) {
    return dot_bytes(_mm512_setzero_si512(), _mm512_set1_epi8(1), _mm512_loadu_si512(lanes));
  }
  static void split(__m512i codes, __m512i, Part* parts) { parts[0] = codes; }
  static Sum add(Sum sum, const Part* codes, const __m512i* x) { return dot_bytes(sum, codes[0], x[0]); }
  static Sum add_at(Sum sum, const Part* codes, const __m512i* x) { return dot_bytes(sum, codes[0], x); }
};

struct Words {
  using X = int16_t;
  static constexpr float kSteps = 32767;
  static constexpr int kParts = 2;
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
  static Sum add_at(Sum sum, const Part* codes, const __m512i* x) {
    return dot_words(dot_words(sum, codes[0], x), codes[1], x + 1);
  }
};

struct Floats {
  using X = float;
  static constexpr float kSteps = 0;  // x is as it is
  static constexpr int kParts = 4;
  using Part = Lanes;
  using Sum = Lanes;
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
  if (rows <= kFewRows) return width == 8 ? run(Few<Bytes>()) : width == 16 ? run(Few<Words>()) : run(Few<Floats>());
  return width == 8 ? run(Many<Bytes>()) : width == 16 ? run(Many<Words>()) : run(Many<Floats>());
}

// An output's products with M rows of x. scales (M, S): of weights, times those of x where it has some. B: blocks of a
// segment, if they are whole and few; or 0
template <class Arithmetic, int kBits, int kKind, int B, int M>
void products_of(const Row& row, const Activations<Few<Arithmetic>>& x, const float* scales, float* y) {
  constexpr int kParts = Arithmetic::kParts;
  Decoder<kBits, kKind> decoder(row);
  const int64_t blocks = B ? B : x.layer.blocks(), segments = row.segments;
  Lanes totals[M];
  for (auto& total : totals) total = nothing();
  for (int64_t s = 0; s < segments; ++s) {
    decoder.prefetch();
    const int zero_point = row.zeros ? row.zeros[s] : 1 << (kBits - 1);
    const __m512i zeros = _mm512_set1_epi8(char(zero_point)), zero = _mm512_set1_epi32(zero_point);
    typename Arithmetic::Part parts[B ? B : kMostBlocks][kParts];
    for (int64_t b = 0; b < blocks; ++b)
      Arithmetic::split(decoder.next(zeros, B ? kBlock : std::min(kBlock, row.inputs - b * kBlock)), zero, parts[b]);
#pragma GCC unroll 4
    for (int64_t m = 0; m < M; ++m) {
      auto sum = typename Arithmetic::Sum();
      if constexpr (Arithmetic::kSteps > 0) {
        sum = _mm512_loadu_si512(&x.sums[(m * segments + s) * kLanes]);
        if (row.zeros) sum = _mm512_mullo_epi32(sum, zero);
      }
      const auto* lanes = reinterpret_cast<const __m512i*>(x.x) + (m * segments + s) * blocks * kParts;
      for (int64_t b = 0; b < blocks; ++b) sum = Arithmetic::add_at(sum, parts[b], lanes + b * kParts);
      totals[m] = times_plus(all(scales[m * segments + s]), numbers(sum), totals[m]);
    }
  }
  for (int64_t m = 0; m < M; ++m) y[m * x.layer.outputs] = _mm512_reduce_add_ps(totals[m]);
}

template <class Form>
class Worker;

template <class Arithmetic>
class Worker<Few<Arithmetic>> {
 public:
  static constexpr int64_t kTaken = 16;  // outputs at a time

  Worker(const Activations<Few<Arithmetic>>& x, float* y)
      : x_(x), y_(y), output_(x.layer), scales_(x.rows * x.segments) {}

  void take(int64_t begin, int64_t end) {
    with_constants(x_.layer.bits, x_.layer.kind, [&](auto bits, auto kind) {
      switch (x_.layer.segment) {
        case kBlock: return take_blocks<bits, kind, 1>(begin, end);
        case 2 * kBlock: return take_blocks<bits, kind, 2>(begin, end);
        default: return take_blocks<bits, kind, 0>(begin, end);
      }
    });
  }

 private:
  const Activations<Few<Arithmetic>>& x_;
  float* const y_;
  Output output_;
  std::vector<float> scales_;  // (M, S)

  template <int kBits, int kKind, int B>
  void take_blocks(int64_t begin, int64_t end) {
    switch (x_.rows) {
      case 1: return take_all<kBits, kKind, B, 1>(begin, end);
      case 2: return take_all<kBits, kKind, B, 2>(begin, end);
      case 3: return take_all<kBits, kKind, B, 3>(begin, end);
      default: return take_all<kBits, kKind, B, 4>(begin, end);
    }
  }

  template <int kBits, int kKind, int B, int M>
  void take_all(int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      const Row row = output_.open(o);
      const float* const scales = output_.scales.data();
      float* to = scales_.data();
      for (int64_t m = 0; m < M; ++m, to += row.segments) {
        const float* const of_x = x_.scales.data() + m * row.segments;
        for (int64_t s = 0; s < row.segments; ++s) to[s] = Arithmetic::kSteps > 0 ? scales[s] * of_x[s] : scales[s];
      }
      products_of<Arithmetic, kBits, kKind, B, M>(row, x_, scales_.data(), y_ + o);
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
      typename Arithmetic::Part parts[kTiles][kParts];
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
