// The inner loop of GPTQ and SparseGPT: take inputs one after the other, round or prune them, and hand each error on to
// the inputs of the block that are still to come.
//
// C=inputs of a block O=outputs; all matrices are (C, O) with outputs contiguous. Outputs are independent of each
// other: a strip of them over the whole block stays in the first-level cache.
// Beside it the search for grids, what rounding to each of several grids would cost, and the search for better codes.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "threads.h"

namespace {

constexpr int64_t kStrip = 64;

struct Sweep {
  float* W;              // (C, O), rounded and pruned from `first` to `last` afterwards, corrected behind that
  int64_t outputs, first, last, inputs;
  const float* U;        // (C, C) upper triangular, rows `stride` apart
  int64_t stride;
  const float *scales, *zeros;   // (G, O) or null: inputs are pruned only
  const int32_t* group_of;       // (C,) row of `scales`
  float max_code;
  const uint8_t* keep;   // (C, O) 0 where pruned, or null
  uint8_t* codes;        // (C, O) or null
  float* errors;         // (C, O), divided by the diagonal of U
};

inline float nearest_code(float w, float scale, float zero, float max_code) {
  return std::min(std::max(std::nearbyintf(w / scale) + zero, 0.0f), max_code);
}

void strip(const Sweep& s, int64_t begin, int64_t end) {
  const int64_t n = end - begin;
  float error[kStrip];
  for (int64_t c = s.first; c < s.last; ++c) {
    float* w = s.W + c * s.outputs + begin;
    const float diagonal = s.U[c * s.stride + c];
    const uint8_t* keep = s.keep ? s.keep + c * s.outputs + begin : nullptr;
    float value[kStrip], code[kStrip];
    if (s.scales) {
      const float* scale = s.scales + s.group_of[c] * s.outputs + begin;
      const float* zero = s.zeros + s.group_of[c] * s.outputs + begin;
      for (int64_t o = 0; o < n; ++o) {
        float rounded = nearest_code(w[o], scale[o], zero[o], s.max_code);
        if (keep) rounded = keep[o] ? rounded : zero[o];
        code[o] = rounded;
        value[o] = (rounded - zero[o]) * scale[o];
      }
      if (s.codes) {
        uint8_t* out = s.codes + c * s.outputs + begin;
        for (int64_t o = 0; o < n; ++o) out[o] = uint8_t(code[o]);
      }
    } else {
      for (int64_t o = 0; o < n; ++o) value[o] = !keep || keep[o] ? w[o] : 0.0f;
    }
    float* out = s.errors + c * s.outputs + begin;
    for (int64_t o = 0; o < n; ++o) out[o] = error[o] = (w[o] - value[o]) / diagonal;
    for (int64_t later = c + 1; later < s.inputs; ++later) {
      const float factor = s.U[c * s.stride + later];
      float* target = s.W + later * s.outputs + begin;
      for (int64_t o = 0; o < n; ++o) target[o] -= factor * error[o];
    }
    for (int64_t o = 0; o < n; ++o) w[o] = value[o];
  }
}

}  // namespace

extern "C" void sweep(
    float* W, int64_t outputs, int64_t first, int64_t last, int64_t inputs, const float* U, int64_t stride,
    const float* scales, const float* zeros, const int32_t* group_of, float max_code, const uint8_t* keep,
    uint8_t* codes, float* errors, int64_t threads) {
  const Sweep s{W, outputs, first, last, inputs, U, stride, scales, zeros, group_of, max_code, keep, codes, errors};
  in_parallel(threads, threads, [&](int64_t thread) {
    for (int64_t begin = thread * kStrip; begin < outputs; begin += threads * kStrip)
      strip(s, begin, std::min(begin + kStrip, outputs));
  });
}

// errors (K, O): of each of the K grids, the squared rounding errors of W (C, O), summed over inputs
extern "C" void rounding_errors(
    const float* W, int64_t inputs, int64_t outputs, const float* scales, const float* zeros, int64_t grids,
    float max_code, float* errors, int64_t threads) {
  in_parallel(threads, threads, [=](int64_t thread) {
    for (int64_t begin = thread * kStrip; begin < outputs; begin += threads * kStrip) {
      const int64_t n = std::min(kStrip, outputs - begin);
      for (int64_t k = 0; k < grids; ++k) {
        const float *scale = scales + k * outputs + begin, *zero = zeros + k * outputs + begin;
        float sum[kStrip] = {};
        for (int64_t c = 0; c < inputs; ++c) {
          const float* w = W + c * outputs + begin;
          for (int64_t o = 0; o < n; ++o) {
            const float error = (nearest_code(w[o], scale[o], zero[o], max_code) - zero[o]) * scale[o] - w[o];
            sum[o] += error * error;
          }
        }
        std::copy(sum, sum + n, errors + k * outputs + begin);
      }
    }
  });
}

// Take every input of every output in turn and give it the code that is best while all others stay, `sweeps` times.
// H (I, I) symmetric; residual (O, I) = (W - V) H and codes (O, I) move along; keep (O, I) may be null.
// scales, zeros (O, G); group_of (I,)
extern "C" void improve_codes(
    const float* H, const float* scales, const float* zeros, const int32_t* group_of, const uint8_t* keep,
    int64_t outputs, int64_t inputs, int64_t groups, float max_code, int64_t sweeps, uint8_t* codes, float* residual,
    int64_t threads) {
  in_parallel(threads, threads, [=](int64_t thread) {
    for (int64_t o = outputs * thread / threads; o < outputs * (thread + 1) / threads; ++o) {
      float* r = residual + o * inputs;
      for (int64_t sweep = 0; sweep < sweeps; ++sweep) {
        bool changed = false;
        for (int64_t i = 0; i < inputs; ++i) {
          if (keep && !keep[o * inputs + i]) continue;
          const float scale = scales[o * groups + group_of[i]], zero = zeros[o * groups + group_of[i]];
          uint8_t& code = codes[o * inputs + i];
          const float best = nearest_code((code - zero) * scale + r[i] / H[i * inputs + i], scale, zero, max_code);
          if (best == code) continue;
          const float change = (best - code) * scale;
          const float* h = H + i * inputs;
          for (int64_t j = 0; j < inputs; ++j) r[j] -= change * h[j];
          code = uint8_t(best);
          changed = true;
        }
        if (!changed) break;
      }
    }
  });
}
