// Preconditioned conjugate gradients for many least-squares problems that share their matrix H, each with a mask of its
// own: everything of a step but the product with H, in one pass over memory.
//
// The preconditioner of a problem is the inverse of D (I + U L U^T) D on its mask, where D^2 is the diagonal of H and U
// are the leading eigenvectors of D^-1 H D^-1. With S = D^-1 on the mask that is S (I - U C U^T) S (Woodbury), and
// C = (L^-1 + U^T U over the mask)^-1 is all that has to be kept of it for each problem.
//
// O=problems (outputs) I=unknowns (inputs) of each R=kRank; arrays are contiguous

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "threads.h"

namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kRank = 16;

// step(first, lanes) for every run of 16 inputs; `lanes` are those that exist
template <typename Step>
inline void for_lanes(int64_t inputs, const Step& step) {
  for (int64_t i = 0; i < inputs; i += kLanes) step(i, __mmask16((1u << std::min(kLanes, inputs - i)) - 1));
}

inline __m512 floats(__mmask16 lanes, const float* from) { return _mm512_maskz_loadu_ps(lanes, from); }

inline __m512 widened(__mmask16 lanes, const uint16_t* from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from)), 16));
}

inline __mmask16 kept(__mmask16 lanes, const uint8_t* keep) {
  return _mm_test_epi8_mask(_mm_maskz_loadu_epi8(lanes, keep), _mm_set1_epi8(-1));
}

// In place, symmetric and positive definite; Gauss-Jordan, which needs no pivots then.
inline void invert(__m512 (&rows)[kRank]) {
#pragma GCC unroll 16
  for (int pivot = 0; pivot < kRank; ++pivot) {
    const __m512i place = _mm512_set1_epi32(pivot);
    const __mmask16 others = __mmask16(~(1u << pivot));
    const __m512 factor = _mm512_div_ps(_mm512_set1_ps(1.0f), _mm512_permutexvar_ps(place, rows[pivot]));
    rows[pivot] = _mm512_mask_mul_ps(factor, others, rows[pivot], factor);
#pragma GCC unroll 16
    for (int r = 0; r < kRank; ++r) {
      if (r == pivot) continue;
      const __m512 share = _mm512_permutexvar_ps(place, rows[r]);
      rows[r] = _mm512_fnmadd_ps(share, rows[pivot], _mm512_maskz_mov_ps(others, rows[r]));
    }
  }
}

}  // namespace

extern "C" {

// What all problems share.
struct Shared {
  const float* scale_I;  // 1 / D
  const float* modes_IR;  // U
  const float* modes_RI;
  const float* inverse_R;  // diagonal of L^-1
  const float* leading_I;  // what H is more than the matrix the direction was multiplied by is this vector's square
  int64_t outputs, inputs, threads;
};

// One array for each part of all problems' state.
struct State {
  const uint8_t* keep_OI;
  float* core_ORR;  // C
  float* values_OI;
  float* residual_OI;
  float* direction_OI;
  uint16_t* next_OI;  // the direction, bfloat16: what is multiplied by H
  float* products_O;  // residual times preconditioned residual
};

}  // extern "C"

namespace {

// out = S (I - U C U^T) S residual; returns residual^T out
float precondition(const Shared& shared, const uint8_t* keep, const float* core, const float* residual, float* out) {
  const int64_t inputs = shared.inputs;
  __m512 sums[kRank];
  for (auto& sum : sums) sum = _mm512_setzero_ps();
  for_lanes(inputs, [&](int64_t i, __mmask16 lanes) {
    const __m512 scale = floats(lanes, shared.scale_I + i);
    const __m512 scaled = _mm512_maskz_mul_ps(kept(lanes, keep + i), floats(lanes, residual + i), scale);
    _mm512_mask_storeu_ps(out + i, lanes, scaled);
#pragma GCC unroll 16
    for (int64_t r = 0; r < kRank; ++r)
      sums[r] = _mm512_fmadd_ps(scaled, floats(lanes, shared.modes_RI + r * inputs + i), sums[r]);
  });
  __m512 parts = _mm512_setzero_ps();
  for (int64_t r = 0; r < kRank; ++r)
    parts = _mm512_fmadd_ps(_mm512_set1_ps(_mm512_reduce_add_ps(sums[r])), _mm512_loadu_ps(core + r * kRank), parts);
  float part[kRank];
  _mm512_storeu_ps(part, parts);
  __m512 product = _mm512_setzero_ps();
  for_lanes(inputs, [&](int64_t i, __mmask16 lanes) {
    __m512 left = floats(lanes, out + i);
#pragma GCC unroll 16
    for (int64_t r = 0; r < kRank; ++r)
      left = _mm512_fnmadd_ps(_mm512_set1_ps(part[r]), floats(lanes, shared.modes_RI + r * inputs + i), left);
    left = _mm512_maskz_mul_ps(kept(lanes, keep + i), left, floats(lanes, shared.scale_I + i));
    _mm512_mask_storeu_ps(out + i, lanes, left);
    product = _mm512_fmadd_ps(left, floats(lanes, residual + i), product);
  });
  return _mm512_reduce_add_ps(product);
}

// work(first row, one after the last) on every thread
template <typename Work>
int over_rows(const Shared& shared, const Work& work) {
  const int64_t threads = shared.threads;
  return in_parallel(threads, threads, [&](int64_t thread) {
    work(shared.outputs * thread / threads, shared.outputs * (thread + 1) / threads);
  });
}

}  // namespace

extern "C" {

// Prepare: the masks' cores and the first directions. Returns 0, or 1 where there is not enough memory.
int begin(const Shared* shared, const State* state) {
  return over_rows(*shared, [&](int64_t begin, int64_t end) {
    const int64_t inputs = shared->inputs;
    std::vector<int64_t> places(inputs + 1);
    for (int64_t o = begin; o < end; ++o) {
      const uint8_t* keep = state->keep_OI + o * inputs;
      int64_t count = 0;
      for (int64_t i = 0; i < inputs; ++i) {
        places[count] = i;
        count += keep[i] != 0;
      }
      __m512 gram[kRank];
      for (auto& row : gram) row = _mm512_setzero_ps();
      for (int64_t kept = 0; kept < count; ++kept) {
        const float* modes = shared->modes_IR + places[kept] * kRank;
        const __m512 all = _mm512_loadu_ps(modes);
#pragma GCC unroll 16
        for (int64_t r = 0; r < kRank; ++r) gram[r] = _mm512_fmadd_ps(_mm512_set1_ps(modes[r]), all, gram[r]);
      }
      for (int64_t r = 0; r < kRank; ++r)
        gram[r] = _mm512_mask_add_ps(gram[r], __mmask16(1u << r), gram[r], _mm512_set1_ps(shared->inverse_R[r]));
      invert(gram);
      float* core = state->core_ORR + o * kRank * kRank;
      for (int64_t r = 0; r < kRank; ++r) _mm512_storeu_ps(core + r * kRank, gram[r]);
      float* direction = state->direction_OI + o * inputs;
      state->products_O[o] = precondition(*shared, keep, core, state->residual_OI + o * inputs, direction);
      for_lanes(inputs, [&](int64_t i, __mmask16 lanes) {
        const __m256i narrow = (__m256i)_mm512_cvtneps_pbh(floats(lanes, direction + i));
        _mm256_mask_storeu_epi16(state->next_OI + o * inputs + i, lanes, narrow);
      });
    }
  });
}

// One step; curved: H but for its leading mode times the direction, (O, I) bfloat16. Returns as `begin` does.
int step(const Shared* shared, const State* state, const uint16_t* curved_OI) {
  return over_rows(*shared, [&](int64_t begin, int64_t end) {
    const int64_t inputs = shared->inputs;
    std::vector<float> turned(inputs);
    for (int64_t o = begin; o < end; ++o) {
      const uint16_t* c = curved_OI + o * inputs;
      float *v = state->values_OI + o * inputs, *r = state->residual_OI + o * inputs;
      float* p = state->direction_OI + o * inputs;
      __m512 sums = _mm512_setzero_ps(), sums_along = _mm512_setzero_ps();
      for_lanes(inputs, [&](int64_t i, __mmask16 lanes) {
        const __m512 direction = floats(lanes, p + i);
        sums = _mm512_fmadd_ps(direction, widened(lanes, c + i), sums);
        sums_along = _mm512_fmadd_ps(direction, floats(lanes, shared->leading_I + i), sums_along);
      });
      const float along = _mm512_reduce_add_ps(sums_along), before = state->products_O[o];
      const float curvature = _mm512_reduce_add_ps(sums) + along * along;
      const float scale = curvature > 0 ? before / curvature : 0.0f;
      const __m512 length = _mm512_set1_ps(scale), length_along = _mm512_set1_ps(scale * along);
      for_lanes(inputs, [&](int64_t i, __mmask16 lanes) {
        const __m512 value = _mm512_fmadd_ps(length, floats(lanes, p + i), floats(lanes, v + i));
        __m512 left = _mm512_fnmadd_ps(length, widened(lanes, c + i), floats(lanes, r + i));
        left = _mm512_fnmadd_ps(length_along, floats(lanes, shared->leading_I + i), left);
        _mm512_mask_storeu_ps(v + i, lanes, value);
        _mm512_mask_storeu_ps(r + i, lanes, left);
      });
      const float* core = state->core_ORR + o * kRank * kRank;
      const float product = precondition(*shared, state->keep_OI + o * inputs, core, r, turned.data());
      const __m512 turn = _mm512_set1_ps(before > 0 ? product / before : 0.0f);
      for_lanes(inputs, [&](int64_t i, __mmask16 lanes) {
        const __m512 ahead = _mm512_fmadd_ps(turn, floats(lanes, p + i), floats(lanes, turned.data() + i));
        _mm512_mask_storeu_ps(p + i, lanes, ahead);
        _mm256_mask_storeu_epi16(state->next_OI + o * inputs + i, lanes, (__m256i)_mm512_cvtneps_pbh(ahead));
      });
      state->products_O[o] = product;
    }
  });
}

}  // extern "C"
