// Products y = x W^T of few rows of x with packed weights: codes are decoded piece by piece, and multiplied at once.
//
// M=rows of x N=outputs K=inputs G=groups S=segments, runs of inputs that share a scale, and one of x where it is rounded
//
// Inputs are taken in blocks of 64; a segment is padded to whole blocks by zeros in x, so that whatever stands in the
// place of codes there does not count. A pruned weight gets its zero point as code. code - zero is multiplied with x in
// float32, exactly so; where x is rounded to integers, it is sum(code * x) - zero * sum(x), for each lane of a register.
//
// Fields of a decoded block are 4 or 8 bits wide. x is laid out in the order in which the fields come out of them.
//
// A form's sums are of code - zero where it has kLessZero, else of codes: with AVX2, 16-bit x takes a fifth more time where
// this is left to `products_of`, and 8-bit x a tenth more where it is not, as the compiler divides 16 registers.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "threads.h"

#if defined(__AVX512VBMI2__) && defined(__AVX512VNNI__)
#include "packed_avx512.h"
#else
#include "packed_avx2.h"
#endif

namespace {

constexpr int64_t kRows = 4;     // of x whose sums stay in registers, each
constexpr int64_t kOutputs = 2;  // for so many outputs; one row reads one output's codes, as they lie in memory
constexpr int64_t kTaken = 16;   // outputs that a thread takes at a time

enum Type { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };  // of x and of y

void widen(const uint16_t* from, int64_t count, Type type, float* to) {
  if (type == kFloat16)
    for (int64_t i = 0; i < count; ++i) to[i] = _cvtsh_ss(from[i]);
  else
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = uint32_t(from[i]) << 16;
      std::memcpy(to + i, &bits, sizeof bits);
    }
}

// to the nearest, of two the even one
void narrow(const float* from, int64_t count, Type type, uint16_t* to) {
  if (type == kFloat16)
    for (int64_t i = 0; i < count; ++i) to[i] = _cvtss_sh(from[i], 0);
  else
    for (int64_t i = 0; i < count; ++i) {
      const uint32_t bits = loaded<uint32_t>(from + i);
      to[i] = uint16_t(std::isnan(from[i]) ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
    }
}

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

  void take(const void* x_MK, Type type, int64_t m) {
    std::vector<float> wide(type == kFloat32 ? 0 : layer.inputs);
    const float* from = wide.data();
    if (type == kFloat32)
      from = static_cast<const float*>(x_MK) + m * layer.inputs;
    else
      widen(static_cast<const uint16_t*>(x_MK) + m * layer.inputs, layer.inputs, type, wide.data());
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
    return largest < 1e-30f ? 0 : largest / Form::kSteps;  // of less, 1 / step might not be finite
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
        zeros_(layer.segments(), uint8_t(1 << (layer.bits - 1))),
        buffer_(stored_ ? 0 : layer.segments() * step_),
        copy_(layer.inputs * layer.bits / 8 + kBeyond) {}

  void take(int64_t o) {
    const int64_t groups = layer_.groups, per_group = layer_.segments() / groups;
    const uint16_t* const halves = layer_.scales + o * groups;
    const uint8_t* const zeros = layer_.zeros ? layer_.zeros + o * groups : nullptr;
    if (per_group == 1) {
      int64_t g = 0;
      for (; g + 8 <= groups; g += 8)
        _mm256_storeu_ps(&scales[g], _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + g))));
      for (; g < groups; ++g) scales[g] = _cvtsh_ss(halves[g]);
      if (zeros) std::copy_n(zeros, groups, zeros_.begin());
    } else {
      for (int64_t g = 0; g < groups; ++g) {
        std::fill_n(scales.begin() + g * per_group, per_group, _cvtsh_ss(halves[g]));
        if (zeros) std::fill_n(zeros_.begin() + g * per_group, per_group, zeros[g]);
      }
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

  uint8_t code(int64_t s, int64_t k) const {
    const uint8_t* const fields = fields_ + s * step_;
    return width(layer_.bits) == 8 ? fields[k] : (fields[k / 2] >> 4 * (k % 2) & 15) ^ (flipped_ ? zeros_[s] : 0);
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
    // B is an argument, so that each form is called in one place, and made part of it
    Form::template products<R, M, B>(
        of_output, x.x.get() + m * x.row + s * blocks * kBlock, x.row, blocks,
        Form::kSteps > 0 ? x.sums.data() + (m * segments + s) * kLanes : nullptr, segments * kLanes, sums);
    Lanes scales[R];
    for (int r = 0; r < R; ++r) scales[r] = all(outputs[r].scales[s]);
    for (int i = 0; i < M; ++i) {
      const Lanes of_x = Form::kSteps > 0 ? all(x.scales[(m + i) * segments + s]) : nothing();
      for (int r = 0; r < R; ++r) {
        const Lanes scale = Form::kSteps > 0 ? times(scales[r], of_x) : scales[r];
        if constexpr (!Form::kLessZero)
          sums[r][i] =
              plus(sums[r][i], minus_zero_times(of_output[r].zero, x.sums.data() + ((m + i) * segments + s) * kLanes));
        totals[r][i] = times_plus(scale, numbers(sums[r][i]), totals[r][i]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < M; ++i) y[(m + i) * x.layer.outputs + o + r] = sum(totals[r][i]);
}

template <class Form, int R, int M>
void products(const Activations<Form>& x, int64_t m, const Output* outputs, int64_t o, float* y) {
  if (x.layer.blocks() == 1)
    products_of<Form, R, M, 1>(x, m, outputs, o, y);
  else if (x.layer.blocks() == 2)
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
int product(const Layer& layer, const void* x_MK, Type type, int64_t rows, void* y_MN, int64_t threads) try {
  Activations<Form> x(layer, rows);
  const std::unique_ptr<float[]> wide(type == kFloat32 ? nullptr : new float[rows * layer.outputs]);
  float* const y = wide ? wide.get() : static_cast<float*>(y_MN);
  if (rows == 1)
    x.take(x_MK, type, 0);
  else if (in_parallel(threads, threads, [&](int64_t thread) {
             for (int64_t m = thread; m < rows; m += threads) x.take(x_MK, type, m);
           }))
    return 1;
  std::atomic<int64_t> next{0};
  return in_parallel(threads, threads, [&](int64_t) {
    Output outputs[kOutputs] = {Output(layer), Output(layer)};
    for (int64_t begin; (begin = next.fetch_add(kTaken)) < layer.outputs;) {
      const int64_t end = std::min(begin + kTaken, layer.outputs);
      int64_t o = begin;
      for (; rows > 1 && o + kOutputs <= end; o += kOutputs) all_rows<Form, kOutputs>(x, rows, outputs, o, y);
      for (; o < end; ++o) all_rows<Form, 1>(x, rows, outputs, o, y);
      for (int64_t at = begin; wide && at < rows * layer.outputs; at += layer.outputs)
        narrow(y + at, end - begin, type, static_cast<uint16_t*>(y_MN) + at);
    }
  });
} catch (const std::bad_alloc&) {
  return 1;
}

Layer layer_of(
    const uint8_t* codes, const uint8_t* mask, const int64_t* starts, const uint16_t* scales, const uint8_t* zeros,
    const int64_t* sizes) {
  return {codes,    mask,     starts,   scales,   zeros,         sizes[0], sizes[1],
          sizes[2], sizes[3], sizes[4], sizes[5], Kind(sizes[6])};
}

}  // namespace

// y (M, N) of x (M, K), both of `type`. `sizes`: bytes of codes, N, K, G, inputs of a segment, a multiple of 8 (of 16 for
// kHalf) that divides K / G, bits, Kind. `width`: bits that x is rounded to, 8 or 16, with a scale for each segment; 32: it
// is not. Returns 1 if there was not enough memory.
extern "C" int packed_product(
    const uint8_t* codes, const uint8_t* mask, const int64_t* starts, const uint16_t* scales, const uint8_t* zeros,
    const int64_t* sizes, const void* x, int64_t type, int64_t rows, int64_t width, void* y, int64_t threads) {
  const Layer layer = layer_of(codes, mask, starts, scales, zeros, sizes);
  const auto with = [&](auto of_nibbles, auto of_bytes) {
    return layer.bits < 8 ? product<decltype(of_nibbles)>(layer, x, Type(type), rows, y, threads)
                          : product<decltype(of_bytes)>(layer, x, Type(type), rows, y, threads);
  };
  switch (width) {
    case 8: return with(BytesOfNibbles{}, BytesOfBytes{});
    case 16: return with(WordsOfNibbles{}, WordsOfBytes{});
    default: return with(FloatsOfNibbles{}, FloatsOfBytes{});
  }
}

// Codes of a layer with a mask as one without has them, (N, K * bits / 8): what the mask leaves out gets its zero point.
// Arguments as those of `packed_product`.
extern "C" int packed_dense_codes(
    const uint8_t* codes, const uint8_t* mask, const int64_t* starts, const uint16_t* scales, const uint8_t* zeros,
    const int64_t* sizes, uint8_t* out, int64_t threads) try {
  const Layer layer = layer_of(codes, mask, starts, scales, zeros, sizes);
  const int64_t outputs = layer.outputs, bits = layer.bits;
  return in_parallel(threads, threads, [&](int64_t thread) {
    Output output(layer);
    for (int64_t o = outputs * thread / threads; o < outputs * (thread + 1) / threads; ++o) {
      output.take(o);
      uint8_t* to = out + o * layer.inputs * bits / 8;
      for (int64_t s = 0; s < layer.segments(); ++s)
        for (int64_t k = 0; k < layer.segment; k += 8, to += bits) {
          uint64_t word = 0;
          for (int64_t i = 0; i < 8; ++i) word |= uint64_t(output.code(s, k + i)) << (i * bits);
          std::memcpy(to, &word, bits);
        }
    }
  });
} catch (const std::bad_alloc&) {
  return 1;
}
