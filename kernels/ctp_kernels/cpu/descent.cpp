// Preconditioned conjugate gradients for many least-squares problems that share their matrix H, each with a mask of its
// own: everything of a step but the product with H, in one pass over memory.
//
// The preconditioner of a problem is the inverse of D (I + U L U^T) D on its mask, where D^2 is the diagonal of H and U
// are the leading eigenvectors of D^-1 H D^-1. With S = D^-1 on the mask that is S (I - U C U^T) S (Woodbury), and
// C = (L^-1 + U^T U over the mask)^-1 is all that has to be kept of it for each problem.
//
// O=problems (outputs) I=unknowns (inputs) of each R=kRank; arrays are contiguous

#include <algorithm>
#include <cstdint>
#include <vector>

#include "lanes.h"
#include "threads.h"

namespace {

constexpr int64_t kRank = 16;

// step(first, lanes) for every run of 16 inputs; `lanes` are those that exist
template <typename Step>
inline void for_lanes(int64_t inputs, const Step& step) {
  for (int64_t i = 0; i < inputs; i += kLanes) step(i, first(inputs - i));
}

// What is multiplied by H: bfloat16 where the processor has products of those, else float.
#ifdef __AVX512BF16__

using Factor = uint16_t;

inline Floats widened(Tail lanes, const Factor* from) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from)), 16));
}

inline void narrow(Factor* to, Tail lanes, Floats x) {
  _mm256_mask_storeu_epi16(to, lanes, (__m256i)_mm512_cvtneps_pbh(x));
}

#else

using Factor = float;

inline Floats widened(Tail lanes, const Factor* from) { return floats(lanes, from); }

inline void narrow(Factor* to, Tail lanes, Floats x) { store(to, lanes, x); }

#endif

// In place, symmetric and positive definite; Gauss-Jordan, which needs no pivots then.
#ifdef LANES_AVX512

inline void invert(Floats (&rows)[kRank]) {
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

#else

inline void invert(Floats (&rows)[kRank]) {
  for (int pivot = 0; pivot < kRank; ++pivot) {
    const float factor = 1.0f / rows[pivot][pivot];
    rows[pivot] *= factor;
    rows[pivot][pivot] = factor;
    for (int r = 0; r < kRank; ++r) {
      if (r == pivot) continue;
      const float share = rows[r][pivot];
      rows[r][pivot] = 0.0f;
      rows[r] -= share * rows[pivot];
    }
  }
}

#endif

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
  Factor* next_OI;  // the direction: what is multiplied by H; may be direction_OI itself where it is float
  float* products_O;  // residual times preconditioned residual
};

}  // extern "C"

namespace {

// out = S (I - U C U^T) S residual; returns residual^T out
float precondition(const Shared& shared, const uint8_t* keep, const float* core, const float* residual, float* out) {
  const int64_t inputs = shared.inputs;
  Floats sums[kRank];
  for (auto& sum : sums) sum = all(0.0f);
  for_lanes(inputs, [&](int64_t i, Tail lanes) {
    const Floats scale = floats(lanes, shared.scale_I + i);
    const Floats scaled = times_where(kept_of(lanes, keep + i), floats(lanes, residual + i), scale);
    store(out + i, lanes, scaled);
#pragma GCC unroll 16
    for (int64_t r = 0; r < kRank; ++r)
      sums[r] = times_plus(scaled, floats(lanes, shared.modes_RI + r * inputs + i), sums[r]);
  });
  Floats parts = all(0.0f);
  for (int64_t r = 0; r < kRank; ++r)
    parts = times_plus(all(sum(sums[r])), whole(core + r * kRank), parts);
  float part[kRank];
  store_whole(part, parts);
  Floats product = all(0.0f);
  for_lanes(inputs, [&](int64_t i, Tail lanes) {
    Floats left = floats(lanes, out + i);
#pragma GCC unroll 16
    for (int64_t r = 0; r < kRank; ++r)
      left = minus_times(left, all(part[r]), floats(lanes, shared.modes_RI + r * inputs + i));
    left = times_where(kept_of(lanes, keep + i), left, floats(lanes, shared.scale_I + i));
    store(out + i, lanes, left);
    product = times_plus(left, floats(lanes, residual + i), product);
  });
  return sum(product);
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
      Floats gram[kRank];
      for (auto& row : gram) row = all(0.0f);
      for (int64_t kept = 0; kept < count; ++kept) {
        const float* modes = shared->modes_IR + places[kept] * kRank;
        const Floats row = whole(modes);
#pragma GCC unroll 16
        for (int64_t r = 0; r < kRank; ++r) gram[r] = times_plus(all(modes[r]), row, gram[r]);
      }
      for (int64_t r = 0; r < kRank; ++r)
        gram[r][r] += shared->inverse_R[r];
      invert(gram);
      float* core = state->core_ORR + o * kRank * kRank;
      for (int64_t r = 0; r < kRank; ++r) store_whole(core + r * kRank, gram[r]);
      float* direction = state->direction_OI + o * inputs;
      state->products_O[o] = precondition(*shared, keep, core, state->residual_OI + o * inputs, direction);
      for_lanes(inputs, [&](int64_t i, Tail lanes) {
        narrow(state->next_OI + o * inputs + i, lanes, floats(lanes, direction + i));
      });
    }
  });
}

// One step; curved: H but for its leading mode times the direction, (O, I). Returns as `begin` does.
int step(const Shared* shared, const State* state, const Factor* curved_OI) {
  return over_rows(*shared, [&](int64_t begin, int64_t end) {
    const int64_t inputs = shared->inputs;
    std::vector<float> turned(inputs);
    for (int64_t o = begin; o < end; ++o) {
      const Factor* c = curved_OI + o * inputs;
      float *v = state->values_OI + o * inputs, *r = state->residual_OI + o * inputs;
      float* p = state->direction_OI + o * inputs;
      Floats sums = all(0.0f), sums_along = all(0.0f);
      for_lanes(inputs, [&](int64_t i, Tail lanes) {
        const Floats direction = floats(lanes, p + i);
        sums = times_plus(direction, widened(lanes, c + i), sums);
        sums_along = times_plus(direction, floats(lanes, shared->leading_I + i), sums_along);
      });
      const float along = sum(sums_along), before = state->products_O[o];
      const float curvature = sum(sums) + along * along;
      const float scale = curvature > 0 ? before / curvature : 0.0f;
      const Floats length = all(scale), length_along = all(scale * along);
      for_lanes(inputs, [&](int64_t i, Tail lanes) {
        const Floats value = times_plus(length, floats(lanes, p + i), floats(lanes, v + i));
        Floats left = minus_times(floats(lanes, r + i), length, widened(lanes, c + i));
        left = minus_times(left, length_along, floats(lanes, shared->leading_I + i));
        store(v + i, lanes, value);
        store(r + i, lanes, left);
      });
      const float* core = state->core_ORR + o * kRank * kRank;
      const float product = precondition(*shared, state->keep_OI + o * inputs, core, r, turned.data());
      const Floats turn = all(before > 0 ? product / before : 0.0f);
      for_lanes(inputs, [&](int64_t i, Tail lanes) {
        const Floats ahead = times_plus(turn, floats(lanes, p + i), floats(lanes, turned.data() + i));
        store(p + i, lanes, ahead);
        narrow(state->next_OI + o * inputs + i, lanes, ahead);
      });
      state->products_O[o] = product;
    }
  });
}

// Bytes of a Factor.
int factor_bytes() { return sizeof(Factor); }

}  // extern "C"
