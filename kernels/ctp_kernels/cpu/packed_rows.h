// packed.cpp with AVX2: sums of a few rows of x and one or two outputs stay in registers, whose lanes are inputs.

#pragma once

#include <numeric>

#include "packed_avx2.h"
#include "packed_operands.h"

namespace {

constexpr int64_t kRows = 4;     // of x whose sums stay in registers, each
constexpr int64_t kOutputs = 2;  // for so many outputs; one row reads one output's codes, as they lie in memory

// y (M, N) of M rows from `m` on and R outputs from `o` on
template <class Form, int R, int M, int B>
void products_of(const Activations<Form>& x, int64_t m, const Output* outputs, int64_t o, float* y) {
  const int64_t blocks = B ? B : x.layer.blocks(), segments = x.segments, row = segments * blocks * kBlock;
  Lanes totals[R][M];
  for (auto& of_output : totals)
    for (auto& total : of_output) total = nothing();
  for (int64_t s = 0; s < segments; ++s) {
    Segment of_output[R];
    for (int r = 0; r < R; ++r) of_output[r] = outputs[r].segment(s);
    typename Form::Sum sums[R][M];
    // B is an argument, so that each form is called in one place, and made part of it
    Form::template products<R, M, B>(
        of_output, x.x + m * row + s * blocks * kBlock, row, blocks,
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

template <class Arithmetic>
struct Rows : Arithmetic {  // x (rows, blocks, 64)
  static constexpr int64_t kSums = kLanes;
  static int32_t factor(const Layer&) { return 1; }
  static int64_t begin(int64_t block, int64_t m, int64_t, int64_t blocks) { return (m * blocks + block) * kBlock; }
  static void take(const float* x, typename Arithmetic::X* out, int64_t, const void*) { Arithmetic::place(x, out); }
  static void take(const int16_t* x, typename Arithmetic::X* out, int64_t, int32_t* sums) {
    constexpr int64_t run = Arithmetic::kRun;
    for (int64_t k = 0; k < kBlock; k += run) sums[k / run % kSums] += std::accumulate(x + k, x + k + run, 0);
    Arithmetic::place(x, out);
  }
};

// run(Form()) with the form for such a product
template <typename Run>
int with_form(int64_t width, int64_t bits, int64_t, const Run& run) {
  const auto with = [&](auto of_nibbles, auto of_bytes) { return bits < 8 ? run(of_nibbles) : run(of_bytes); };
  switch (width) {
    case 8: return with(Rows<BytesOfNibbles>(), Rows<BytesOfBytes>());
    case 16: return with(Rows<WordsOfNibbles>(), Rows<WordsOfBytes>());
    default: return with(Rows<FloatsOfNibbles>(), Rows<FloatsOfBytes>());
  }
}

template <class Form>
class Worker {
 public:
  static constexpr int64_t kTaken = 16;  // outputs at a time

  Worker(const Activations<Form>& x, float* y) : x_(x), y_(y), outputs_{Output(x.layer), Output(x.layer)} {}

  void take(int64_t begin, int64_t end) {
    int64_t o = begin;
    for (; x_.rows > 1 && o + kOutputs <= end; o += kOutputs) all_rows<kOutputs>(o);
    for (; o < end; ++o) all_rows<1>(o);
  }

 private:
  const Activations<Form>& x_;
  float* const y_;
  Output outputs_[kOutputs];

  template <int R>
  void all_rows(int64_t o) {
    for (int r = 0; r < R; ++r) outputs_[r].take(o + r);
    for (int64_t m = 0; m < x_.rows; m += kRows) switch (std::min(kRows, x_.rows - m)) {
        case 1: products<Form, R, 1>(x_, m, outputs_, o, y_); break;
        case 2: products<Form, R, 2>(x_, m, outputs_, o, y_); break;
        case 3: products<Form, R, 3>(x_, m, outputs_, o, y_); break;
        default: products<Form, R, 4>(x_, m, outputs_, o, y_);
      }
  }
};

}  // namespace
