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
#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "packed_operands.h"
#include "threads.h"

#ifdef PACKED_AVX512
#include "packed_avx512.h"
#else
#include "packed_rows.h"
#endif

namespace {

template <class Form>
int product(const Layer& layer, const void* x_MK, Type type, int64_t rows, void* y_MN, int64_t threads) try {
  if (!rows) return 0;
  Activations<Form> x(layer, rows);
  const std::unique_ptr<float[]> wide(type == kFloat32 ? nullptr : new float[rows * layer.outputs]);
  float* const y = wide ? wide.get() : static_cast<float*>(y_MN);
  if (rows == 1)
    x.take(x_MK, type, 0);
  else if (in_parallel(threads, threads, [&](int64_t thread) {
             for (int64_t m = thread; m < rows; m += threads) x.take(x_MK, type, m);
           }))
    return 1;
  // outputs that a thread takes at a time: many of them, since it reads ahead of what it takes
  constexpr int64_t least = Worker<Form>::kTaken;
  const int64_t taken = std::max(layer.outputs / (8 * threads * least), int64_t{1}) * least;
  std::atomic<int64_t> next{0};
  return in_parallel(threads, threads, [&](int64_t) {
    Worker<Form> worker(x, y);
    for (int64_t begin; (begin = next.fetch_add(taken)) < layer.outputs;) {
      const int64_t end = std::min(begin + taken, layer.outputs);
      for (int64_t o = begin; o < end; o += worker.kTaken) worker.take(o, std::min(o + worker.kTaken, end));
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
  return with_form(width, layer.bits, rows, [&](auto form) {
    return product<decltype(form)>(layer, x, Type(type), rows, y, threads);
  });
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

// Whether this build multiplies with pairs.
extern "C" int packed_takes_pairs() {
#ifdef PACKED_AVX512
  return 1;
#else
  return 0;
#endif
}

#ifdef PACKED_AVX512
// 4-bit codes of outputs by themselves, which begin at `starts` (N + 1), as those of pairs, which begin at `pairs` (P + 1).
extern "C" int packed_pair(
    const uint8_t* codes, const int64_t* starts, int64_t outputs, const int64_t* pairs, uint8_t* out, int64_t threads) {
  const int64_t count = (outputs + 1) / 2;
  return in_parallel(threads, threads, [&](int64_t thread) {
    for (int64_t p = count * thread / threads; p < count * (thread + 1) / threads; ++p) {
      const int64_t* const at = starts + 2 * p;
      const int64_t of_high = 2 * p + 1 < outputs ? at[2] - at[1] : 0;
      pair_codes(codes + at[0], at[1] - at[0], codes + at[1], of_high, out + pairs[p], pairs[p + 1] - pairs[p]);
    }
  });
}

// The inverse.
extern "C" int packed_unpair(
    const uint8_t* codes, const int64_t* starts, int64_t outputs, const int64_t* pairs, uint8_t* out, int64_t threads) {
  return in_parallel(threads, threads, [&](int64_t thread) {
    for (int64_t o = outputs * thread / threads; o < outputs * (thread + 1) / threads; ++o) {
      const int64_t* const at = pairs + o / 2;
      unpair_codes(codes + at[0], at[1] - at[0], o % 2 * 4, out + starts[o], starts[o + 1] - starts[o]);
    }
  });
}
#endif
