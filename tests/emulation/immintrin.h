// The AVX-512 intrinsics that the kernels use, as Intel documents them, in the compiler's own vectors, so that the
// kernels' AVX-512 branches run on a processor without it. Stands before the compiler's header on the include path.
//
// Masked loads and stores touch no lane outside their mask: an address sanitizer sees what the hardware would read.
// Rounding modes and predicates that the kernels do not pass are not here, and trap.

#pragma once

#define EMULATED_AVX512 1  // there is no assembler for it

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

using __m128i = long long __attribute__((vector_size(16)));
using __m256i = long long __attribute__((vector_size(32)));
using __m512i = long long __attribute__((vector_size(64)));
using __m512 = float __attribute__((vector_size(64)));
using __m256bh = short __attribute__((vector_size(32)));
using __m512bh = short __attribute__((vector_size(64)));
using __mmask16 = uint16_t;
using __mmask64 = uint64_t;

constexpr int _MM_FROUND_TO_NEAREST_INT = 0, _MM_FROUND_NO_EXC = 8, _CMP_NEQ_UQ = 4;

namespace emulated {

template <typename T, int count>
struct VectorOf {
  using Type __attribute__((vector_size(count * sizeof(T)))) = T;
};
template <typename T, int count>
using Vector = typename VectorOf<T, count>::Type;
using Bytes = Vector<int8_t, 16>;
using ManyBytes = Vector<uint8_t, 64>;
using Shorts = Vector<uint16_t, 16>;
using Ints = Vector<int32_t, 16>;
using Words = Vector<uint32_t, 16>;
using Longs = Vector<uint64_t, 8>;

template <typename V>
inline V load(const void* from) {
  V x;
  std::memcpy(&x, from, sizeof x);
  return x;
}

// copy(place in bytes, bytes of a lane) for every lane of the mask
template <typename V, typename Copy>
inline void for_lanes(__mmask16 mask, const Copy& copy) {
  constexpr size_t size = sizeof(V) / 16;
  for (size_t i = 0; i < 16; ++i)
    if (mask >> i & 1) copy(i * size, size);
}

template <typename V>
inline V load(__mmask16 mask, const void* from) {
  char lanes[sizeof(V)] = {};
  const char* bytes = static_cast<const char*>(from);
  for_lanes<V>(mask, [&](size_t at, size_t size) { std::memcpy(lanes + at, bytes + at, size); });
  return load<V>(lanes);
}

template <typename V>
inline void store(void* to, __mmask16 mask, V x) {
  char lanes[sizeof(V)];
  std::memcpy(lanes, &x, sizeof x);
  char* bytes = static_cast<char*>(to);
  for_lanes<V>(mask, [&](size_t at, size_t size) { std::memcpy(bytes + at, lanes + at, size); });
}

inline Ints chosen(__mmask16 mask) {
  Ints lane;
  for (int i = 0; i < 16; ++i) lane[i] = -(mask >> i & 1);
  return lane;
}

// subnormal numbers are zeros to the BF16 instructions, coming in and going out
inline __m512 flushed(__m512 x) {
  const Words word = (Words)x;
  return (__m512)((word & 0x7f800000) == 0 ? word & 0x80000000 : word);
}

template <typename Operation>
inline float reduced(__m512 x, const Operation& operation) {
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) x[i] = operation(x[i], x[i + half]);
  return x[0];
}

}  // namespace emulated

// constants
inline __m512 _mm512_setzero_ps() { return __m512{}; }
inline __m512 _mm512_set1_ps(float x) { return x - __m512{}; }
inline __m512i _mm512_set1_epi32(int x) { return (__m512i)(x + emulated::Ints{}); }
inline __m512i _mm512_set1_epi64(long long x) { return x + __m512i{}; }
inline __m128i _mm_set1_epi8(char x) { return (__m128i)(int8_t(x) + emulated::Bytes{}); }
inline __m512i _mm512_set_epi64(  // the highest first
    long long h, long long g, long long f, long long e, long long d, long long c, long long b, long long a) {
  return __m512i{a, b, c, d, e, f, g, h};
}

inline __m512i _mm512_setzero_si512() { return __m512i{}; }
enum { _MM_HINT_T0 };
inline void _mm_prefetch(const char*, int) {}
inline __m512i _mm512_set1_epi8(char x) { return (__m512i)(uint8_t(x) + emulated::ManyBytes{}); }

// memory
inline __m128i _mm_loadu_si128(const __m128i* from) { return emulated::load<__m128i>(from); }
inline __m256i _mm256_loadu_si256(const __m256i* from) { return emulated::load<__m256i>(from); }
inline __m512i _mm512_load_si512(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % 64) __builtin_trap();
  return emulated::load<__m512i>(from);
}
inline __m512i _mm512_loadu_si512(const void* from) { return emulated::load<__m512i>(from); }
inline __m512 _mm512_loadu_ps(const void* from) { return emulated::load<__m512>(from); }
inline void _mm256_storeu_si256(__m256i* to, __m256i x) { std::memcpy(to, &x, sizeof x); }
inline void _mm512_storeu_si512(void* to, __m512i x) { std::memcpy(to, &x, sizeof x); }
inline void _mm512_storeu_ps(void* to, __m512 x) { std::memcpy(to, &x, sizeof x); }
inline __m128i _mm_maskz_loadu_epi8(__mmask16 mask, const void* from) {
  return (__m128i)emulated::load<emulated::Bytes>(mask, from);
}
inline __m256i _mm256_maskz_loadu_epi16(__mmask16 mask, const void* from) {
  return (__m256i)emulated::load<emulated::Shorts>(mask, from);
}
inline __m512 _mm512_maskz_loadu_ps(__mmask16 mask, const void* from) { return emulated::load<__m512>(mask, from); }
inline void _mm256_mask_storeu_epi16(void* to, __mmask16 mask, __m256i x) {
  emulated::store(to, mask, (emulated::Shorts)x);
}
inline void _mm512_mask_storeu_ps(void* to, __mmask16 mask, __m512 x) { emulated::store(to, mask, x); }

// arithmetic
inline __m512 _mm512_add_ps(__m512 a, __m512 b) { return a + b; }
inline __m512 _mm512_sub_ps(__m512 a, __m512 b) { return a - b; }
inline __m512 _mm512_mul_ps(__m512 a, __m512 b) { return a * b; }
inline __m512 _mm512_div_ps(__m512 a, __m512 b) { return a / b; }
inline __m512 _mm512_max_ps(__m512 a, __m512 b) { return a > b ? a : b; }  // the second where one is NaN
inline __m512 _mm512_fmadd_ps(__m512 a, __m512 b, __m512 c) { return a * b + c; }
inline __m512 _mm512_fnmadd_ps(__m512 a, __m512 b, __m512 c) { return c - a * b; }
inline __m512 _mm512_maskz_mov_ps(__mmask16 mask, __m512 x) { return emulated::chosen(mask) ? x : __m512{}; }
inline __m512 _mm512_mask_mul_ps(__m512 other, __mmask16 mask, __m512 a, __m512 b) {
  return emulated::chosen(mask) ? a * b : other;
}
inline __m512 _mm512_maskz_mul_ps(__mmask16 mask, __m512 a, __m512 b) { return _mm512_maskz_mov_ps(mask, a * b); }
inline __m512 _mm512_roundscale_ps(__m512 x, int how) {
  if (how != (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) __builtin_trap();
  for (int i = 0; i < 16; ++i) x[i] = std::nearbyintf(x[i]);
  return x;
}
inline __m512 _mm512_scalef_ps(__m512 x, __m512 power) {
  for (int i = 0; i < 16; ++i) {
    const float held = std::fmin(std::fmax(std::floor(power[i]), -999.0f), 999.0f);  // by an int
    x[i] = std::isnan(power[i]) ? power[i] : std::ldexp(x[i], int(held));
  }
  return x;
}
inline float _mm512_reduce_add_ps(__m512 x) {
  return emulated::reduced(x, [](float a, float b) { return a + b; });
}
inline float _mm512_reduce_max_ps(__m512 x) {
  return emulated::reduced(x, [](float a, float b) { return a > b ? a : b; });
}

// whole numbers
inline __m512i _mm512_add_epi64(__m512i a, __m512i b) { return (__m512i)((emulated::Longs)a + (emulated::Longs)b); }
inline __m512i _mm512_mullo_epi64(__m512i a, __m512i b) { return (__m512i)((emulated::Longs)a * (emulated::Longs)b); }
inline __m512i _mm512_add_epi32(__m512i a, __m512i b) { return (__m512i)((emulated::Words)a + (emulated::Words)b); }
inline __m512i _mm512_sub_epi32(__m512i a, __m512i b) { return (__m512i)((emulated::Words)a - (emulated::Words)b); }
inline __m512i _mm512_mullo_epi32(__m512i a, __m512i b) { return (__m512i)((emulated::Words)a * (emulated::Words)b); }
inline __m512i _mm512_dpbusd_epi32(__m512i sum, __m512i a, __m512i b) {  // bytes of b are signed, sums wrap around
  emulated::Words sums = (emulated::Words)sum;
  for (int i = 0; i < 64; ++i) sums[i / 4] += int(((emulated::ManyBytes)a)[i]) * int8_t(((emulated::ManyBytes)b)[i]);
  return (__m512i)sums;
}
inline __m512i _mm512_dpwssd_epi32(__m512i sum, __m512i a, __m512i b) {
  using Words = emulated::Vector<int16_t, 32>;
  emulated::Words sums = (emulated::Words)sum;
  for (int i = 0; i < 32; ++i) sums[i / 2] += int(((Words)a)[i]) * ((Words)b)[i];
  return (__m512i)sums;
}
inline int _mm512_reduce_add_epi32(__m512i x) {
  uint32_t sum = 0;
  for (int i = 0; i < 16; ++i) sum += ((emulated::Words)x)[i];
  return int(sum);
}
inline __m512i _mm512_and_si512(__m512i a, __m512i b) { return a & b; }
inline __m512i _mm512_or_si512(__m512i a, __m512i b) { return a | b; }
inline __m512i _mm512_slli_epi32(__m512i x, unsigned count) {
  return count > 31 ? __m512i{} : (__m512i)((emulated::Words)x << count);
}
inline __m512i _mm512_srli_epi32(__m512i x, unsigned count) {
  return count > 31 ? __m512i{} : (__m512i)((emulated::Words)x >> count);
}
inline __m512i _mm512_srli_epi16(__m512i x, unsigned count) {
  using Words = emulated::Vector<uint16_t, 32>;
  return count > 15 ? __m512i{} : (__m512i)((Words)x >> count);
}
inline __m512i _mm512_slli_epi16(__m512i x, unsigned count) {
  using Words = emulated::Vector<uint16_t, 32>;
  return count > 15 ? __m512i{} : (__m512i)((Words)x << count);
}
inline __m512i _mm512_set1_epi16(short x) {
  using Words = emulated::Vector<int16_t, 32>;
  return (__m512i)(Words{} + x);
}
inline __m512i _mm512_maddubs_epi16(__m512i a, __m512i b) {  // bytes without a sign times such with one, neighbours added
  emulated::Vector<int16_t, 32> out;
  for (int i = 0; i < 32; ++i) {
    int sum = 0;
    for (int j = 2 * i; j < 2 * i + 2; ++j) sum += ((emulated::ManyBytes)a)[j] * int8_t(((emulated::ManyBytes)b)[j]);
    out[i] = int16_t(sum > 32767 ? 32767 : sum < -32768 ? -32768 : sum);
  }
  return (__m512i)out;
}
inline __m256i _mm512_cvtepi16_epi8(__m512i x) {
  emulated::Vector<uint8_t, 32> out;
  for (int i = 0; i < 32; ++i) out[i] = uint8_t(((emulated::Vector<uint16_t, 32>)x)[i]);
  return (__m256i)out;
}
inline __m512i _mm512_cvtepu8_epi16(__m256i x) {
  emulated::Vector<uint16_t, 32> out;
  for (int i = 0; i < 32; ++i) out[i] = ((emulated::Vector<uint8_t, 32>)x)[i];
  return (__m512i)out;
}
inline __m512i _mm512_srlv_epi64(__m512i x, __m512i count) {
  const emulated::Longs places = (emulated::Longs)count;
  return (__m512i)(places > 63 ? emulated::Longs{} : (emulated::Longs)x >> (places & 63));
}

// masks
inline __mmask16 _mm_test_epi8_mask(__m128i a, __m128i b) {
  __mmask16 mask = 0;
  for (int i = 0; i < 16; ++i) mask |= ((emulated::Bytes)(a & b))[i] ? 1 << i : 0;
  return mask;
}
inline __mmask16 _mm512_cmp_ps_mask(__m512 a, __m512 b, int predicate) {
  if (predicate != _CMP_NEQ_UQ) __builtin_trap();
  __mmask16 mask = 0;
  for (int i = 0; i < 16; ++i) mask |= a[i] != b[i] ? 1 << i : 0;
  return mask;
}

// from lane to lane
inline __m512 _mm512_permutexvar_ps(__m512i places, __m512 x) {
  __m512 out;
  for (int i = 0; i < 16; ++i) out[i] = x[((emulated::Ints)places)[i] & 15];
  return out;
}
inline __m512i _mm512_maskz_expand_epi32(__mmask16 mask, __m512i x) {
  emulated::Ints out{};
  for (int i = 0, next = 0; i < 16; ++i)
    if (mask >> i & 1) out[i] = ((emulated::Ints)x)[next++];
  return (__m512i)out;
}
inline __m512i _mm512_permutexvar_epi8(__m512i places, __m512i x) {
  emulated::ManyBytes out;
  for (int i = 0; i < 64; ++i) out[i] = ((emulated::ManyBytes)x)[((emulated::ManyBytes)places)[i] & 63];
  return (__m512i)out;
}
inline __m512i _mm512_multishift_epi64_epi8(__m512i shifts, __m512i x) {  // lanes of 64 bits are rotated
  emulated::ManyBytes out;
  for (int i = 0; i < 64; ++i) {
    const uint64_t lane = ((emulated::Longs)x)[i / 8];
    const int shift = ((emulated::ManyBytes)shifts)[i] & 63;
    out[i] = uint8_t(shift ? lane >> shift | lane << (64 - shift) : lane);
  }
  return (__m512i)out;
}
inline __m512i _mm512_mask_expand_epi8(__m512i other, __mmask64 mask, __m512i x) {
  emulated::ManyBytes out = (emulated::ManyBytes)other;
  for (int i = 0, next = 0; i < 64; ++i)
    if (mask >> i & 1) out[i] = ((emulated::ManyBytes)x)[next++];
  return (__m512i)out;
}
// of each 128 bits: neighbours of a and b from the lower half, or from the upper one
template <typename V>
inline __m512i unpacked(__m512i a, __m512i b, bool upper) {
  constexpr int lanes = sizeof(V) / sizeof(V{}[0]), few = lanes / 4;
  V out;
  for (int i = 0; i < lanes; ++i) {
    const int from = i / few * few + i % few / 2 + (upper ? few / 2 : 0);
    out[i] = i % 2 ? ((V)b)[from] : ((V)a)[from];
  }
  return (__m512i)out;
}
inline __m512i _mm512_unpacklo_epi32(__m512i a, __m512i b) { return unpacked<emulated::Words>(a, b, false); }
inline __m512i _mm512_unpackhi_epi32(__m512i a, __m512i b) { return unpacked<emulated::Words>(a, b, true); }
inline __m512i _mm512_unpacklo_epi64(__m512i a, __m512i b) { return unpacked<emulated::Longs>(a, b, false); }
inline __m512i _mm512_unpackhi_epi64(__m512i a, __m512i b) { return unpacked<emulated::Longs>(a, b, true); }
inline __m512i _mm512_shuffle_i32x4(__m512i a, __m512i b, int places) {  // of 128 bits, two of each
  __m512i out;
  for (int i = 0; i < 8; ++i) out[i] = (i < 4 ? a : b)[(places >> i / 2 * 2 & 3) * 2 + i % 2];
  return out;
}
// What the hardware leaves undefined is not nothing here, so that who reads it gets something wrong.
inline __m512i _mm512_castsi128_si512(__m128i x) { return __m512i{x[0], x[1], -1, -1, -1, -1, -1, -1}; }
inline __m512i _mm512_castsi256_si512(__m256i x) { return __m512i{x[0], x[1], x[2], x[3], -1, -1, -1, -1}; }
inline __m512i _mm512_inserti64x4(__m512i x, __m256i half, int place) {
  for (int i = 0; i < 4; ++i) x[4 * (place & 1) + i] = half[i];
  return x;
}

// from type to type
inline __m512 _mm512_castsi512_ps(__m512i x) { return (__m512)x; }
inline __m512 _mm512_cvtepi32_ps(__m512i x) { return __builtin_convertvector((emulated::Ints)x, __m512); }
inline __m512i _mm512_cvtepu8_epi32(__m128i x) {
  return (__m512i)__builtin_convertvector((emulated::Vector<uint8_t, 16>)x, emulated::Words);
}
inline float _cvtsh_ss(uint16_t bits) {  // not of AVX-512, but of this header
  _Float16 x;
  std::memcpy(&x, &bits, sizeof x);
  return float(x);
}
inline uint16_t _cvtss_sh(float x, int) {
  const _Float16 rounded = _Float16(x);
  uint16_t bits;
  std::memcpy(&bits, &rounded, sizeof bits);
  return bits;
}
inline emulated::Vector<float, 8> _mm256_cvtph_ps(__m128i halves) {  // likewise
  uint16_t bits[8];
  std::memcpy(bits, &halves, sizeof bits);
  emulated::Vector<float, 8> x;
  for (int i = 0; i < 8; ++i) x[i] = _cvtsh_ss(bits[i]);
  return x;
}
inline emulated::Vector<float, 8> _mm256_loadu_ps(const float* from) {
  return emulated::load<emulated::Vector<float, 8>>(from);
}
inline emulated::Vector<float, 8> _mm256_mul_ps(emulated::Vector<float, 8> a, emulated::Vector<float, 8> b) {
  return a * b;
}
inline void _mm256_storeu_ps(float* to, emulated::Vector<float, 8> x) { std::memcpy(to, &x, sizeof x); }
inline __m512i _mm512_cvtepu16_epi32(__m256i x) {
  return (__m512i)__builtin_convertvector((emulated::Shorts)x, emulated::Words);
}
inline __m256i _mm512_cvtepi64_epi32(__m512i x) {
  return (__m256i)__builtin_convertvector((emulated::Longs)x, emulated::Vector<uint32_t, 8>);
}

// BF16
inline __m256bh _mm512_cvtneps_pbh(__m512 x) {
  const emulated::Words word = (emulated::Words)emulated::flushed(x), nearest = word + 0x7fff + (word >> 16 & 1);
  return (__m256bh)__builtin_convertvector((x != x ? word | 0x400000 : nearest) >> 16, emulated::Shorts);
}
__attribute__((noinline)) inline __m512 _mm512_dpbf16_ps(__m512 sum, __m512bh a, __m512bh b) {
  const emulated::Words words_a = (emulated::Words)a, words_b = (emulated::Words)b;
  const __m512 high_a = (__m512)(words_a & 0xffff0000), high_b = (__m512)(words_b & 0xffff0000);
  const __m512 low_a = (__m512)(words_a << 16), low_b = (__m512)(words_b << 16);
  // the odd product first
  sum = emulated::flushed(emulated::flushed(high_a) * emulated::flushed(high_b) + emulated::flushed(sum));
  return emulated::flushed(emulated::flushed(low_a) * emulated::flushed(low_b) + sum);
}
