// What packed products multiply: rows of x as a form of arithmetic wants them, and one output's codes and scales.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "packed_codes.h"

namespace {

constexpr int kWordSteps = 127 * 257;  // of 16-bit x: the largest number of steps whose two bytes both have a sign
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

// x as a form wants it; of integers, scales (M, S) and sums of neighbours (M, S, kSums), as they are added up in its lanes
template <class Form>
struct Activations {
  const Layer& layer;
  const int64_t rows, segments;
  const std::unique_ptr<typename Form::X[]> memory;
  typename Form::X* const x;  // a cache line begins there
  std::vector<int32_t> sums;
  std::vector<float> scales;

  Activations(const Layer& layer, int64_t rows)
      : layer(layer),
        rows(rows),
        segments(layer.segments()),
        memory(new typename Form::X[rows * segments * layer.blocks() * kBlock + 64]),
        x(reinterpret_cast<typename Form::X*>((reinterpret_cast<uintptr_t>(memory.get()) + 63) / 64 * 64)),
        sums(Form::kSteps > 0 ? rows * segments * Form::kSums : 0),
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
        const int64_t block = place % segments * layer.blocks() + b;
        typename Form::X* const to = x + Form::begin(block, m, rows, segments * layer.blocks());
        float values[kBlock] = {};
        std::copy(from + b * kBlock, from + std::min((b + 1) * kBlock, layer.segment), values);
        if constexpr (Form::kSteps > 0) {
          int16_t codes[kBlock] = {};
          if (scales[place] > 0) {  // not where all are 0, or one is no number
            const float steps = 1 / scales[place];
            for (int64_t k = 0; k < kBlock; ++k) codes[k] = int16_t(int32_t(std::nearbyintf(values[k] * steps)));
          }
          Form::take(codes, to, rows, &sums[place * Form::kSums]);
        } else {
          Form::take(values, to, rows, nullptr);
        }
      }
    }
    if constexpr (Form::kSteps > 0)
      for (int64_t i = m * segments * Form::kSums; i < (m + 1) * segments * Form::kSums; ++i)
        sums[i] *= Form::factor(layer);
  }

 private:
  float step(const float* from) const {
    uint32_t bits = 0;  // of the largest one: without their signs, numbers are ordered as their bits are
    for (int64_t k = 0; k < layer.segment; ++k) bits = std::max(bits, loaded<uint32_t>(from + k) & 0x7fffffff);
    const float largest = loaded<float>(&bits);
    if (!std::isfinite(largest)) return std::numeric_limits<float>::quiet_NaN();
    return largest < 1e-30f ? 0 : largest / Form::kSteps;  // of less, 1 / step might not be finite
  }
};

// One output's scales and codes
class Output {
 public:
  std::vector<float> scales;  // (S), and zeros up to a multiple of 16

  explicit Output(const Layer& layer)
      : scales((layer.segments() + 15) / 16 * 16),
        layer_(layer),
        stored_(layer.kind == kDense && layer.bits == width(layer.bits) && layer.segment % kBlock == 0),
        flipped_(layer.mask && width(layer.bits) == 4),
        step_(layer.blocks() * kBlock * width(layer.bits) / 8),
        per_group_(layer.segments() / layer.groups),
        filled_(layer.segments(), uint8_t(1 << (layer.bits - 1))),
        zeros_(filled_.data()) {}

  // Where output o's codes are, and where they are decoded to.
  Row locate(int64_t o) {
    const int64_t groups = layer_.groups;
    if (layer_.zeros) {
      zeros_ = layer_.zeros + o * groups;
      if (per_group_ > 1) {
        for (int64_t s = 0; s < layer_.segments(); ++s) filled_[s] = zeros_[s / per_group_];
        zeros_ = filled_.data();
      }
    }
    const uint8_t* from = layer_.codes + layer_.start(o);
    const int64_t bits = layer_.paired() ? 8 : layer_.bits;  // that a code takes in the stream
    const int64_t needed = layer_.inputs * bits / 8 + kBeyond, there = layer_.bytes - layer_.start(o);
    if (!stored_ && there < needed) {  // nothing is read behind the last code, whatever the mask says
      copy_.assign(needed, 0);
      if (there > 0) std::memcpy(copy_.data(), from, there);
      from = copy_.data();
    }
    const uint8_t* const mask = layer_.mask ? layer_.mask + o * layer_.inputs / 8 : nullptr;
    return {from,  mask,    layer_.zeros ? zeros_ : nullptr,   layer_.segments(), layer_.segment,
            step_, fields_, layer_.paired() && o % 2 > 0};
  }

  // Output o's scales, times those of x where they are given, (S) each.
  void take_scales(int64_t o, const float* of_x, float* to) const {
    const int64_t groups = layer_.groups, segments = layer_.segments();
    const uint16_t* const halves = layer_.scales + o * groups;
    int64_t s = 0;
    for (; per_group_ == 1 && s + 8 <= segments; s += 8) {
      const auto eight = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + s)));
      _mm256_storeu_ps(to + s, of_x ? _mm256_mul_ps(eight, _mm256_loadu_ps(of_x + s)) : eight);
    }
    for (; s < segments; ++s) to[s] = _cvtsh_ss(halves[s / per_group_]) * (of_x ? of_x[s] : 1);
  }

  // As `locate`, with fields: its codes are decoded, unless they are stored as they would be.
  Row decoded(int64_t o) {
    if (!stored_ && !fields_) {
      buffer_.reset(new uint8_t[layer_.segments() * step_ + 64]);
      fields_ = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(buffer_.get()) + 63) / 64 * 64);
    }
    Row row = locate(o);
    if (stored_)
      row.fields = const_cast<uint8_t*>(row.stream);  // which are only read
    else
      with_constants(layer_.bits, layer_.kind, [&](auto bits, auto kind) { decode<bits, kind>(row); });
    taken_ = row.fields;
    return row;
  }

  // That, and its scales.
  void take(int64_t o) {
    decoded(o);
    take_scales(o, nullptr, scales.data());
  }

  uint8_t zero(int64_t s) const { return zeros_[s]; }
  const uint8_t* fields() const { return taken_; }
  Segment segment(int64_t s) const {
    return {taken_ + s * step_, zeros_[s], uint8_t(flipped_ ? zeros_[s] * 17 : 0)};
  }

  uint8_t code(int64_t s, int64_t k) const {
    const uint8_t* const fields = taken_ + s * step_;
    return width(layer_.bits) == 8 ? fields[k] : (fields[k / 2] >> 4 * (k % 2) & 15) ^ (flipped_ ? zeros_[s] : 0);
  }

 private:
  const Layer& layer_;
  const bool stored_, flipped_;  // as fields are; by zero points
  const int64_t step_, per_group_;
  std::vector<uint8_t> filled_, copy_;  // zero points of segments
  const uint8_t* zeros_;
  std::unique_ptr<uint8_t[]> buffer_;
  uint8_t* fields_ = nullptr;  // in it, where a cache line begins
  const uint8_t* taken_ = nullptr;
};

}  // namespace
