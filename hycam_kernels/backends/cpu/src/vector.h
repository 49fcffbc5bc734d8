// Vectors of float32 in two instruction sets, behind the same names: VECTOR_SET is avx512 or avx2 by the compiler's flags.
//
// Rows are float32, bfloat16 or float16 in memory and float32 in registers. Loads and stores take how many lanes count:
// Whole, or Part for what is left at a row's end, whose other lanes are 0 and are not touched in memory.
#pragma once
#include <cstdint>
#include <cstring>
#include <immintrin.h>

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define VECTOR_SET avx512
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define VECTOR_SET avx2
#else
#error "compile this file for AVX-512 (F, BW, DQ, VL) or for AVX2 with FMA and F16C"
#endif

namespace VECTOR_SET {

struct BFloat16 { uint16_t bits; };
struct Float16 { uint16_t bits; };

struct Whole {};
struct Part { int lanes; };

#ifdef __AVX512F__

constexpr int64_t kLanes = 16;
using Vector = __m512;
using Halves = __m256i;  // 16 lanes of 16 bits

inline Vector fill(float x) { return _mm512_set1_ps(x); }
inline Vector add(Vector a, Vector b) { return _mm512_add_ps(a, b); }
inline Vector sub(Vector a, Vector b) { return _mm512_sub_ps(a, b); }
inline Vector mul(Vector a, Vector b) { return _mm512_mul_ps(a, b); }
inline Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
inline Vector fnma(Vector a, Vector b, Vector c) { return _mm512_fnmadd_ps(a, b, c); }

// 2^f for an f in [-1/2, 1/2]: minimax in the relative error, 7.5e-8
inline Vector power_of_fraction(Vector f);

// 2^t; beyond float32's range infinite, or 0
inline Vector power(Vector t) {
  const Vector f = _mm512_reduce_ps(t, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return _mm512_scalef_ps(power_of_fraction(f), sub(t, f));
}
// 1 / x, 0 where t > bound: 14 bits of an estimate, and a step of Newton's to double them
inline Vector reciprocal_up_to(Vector x, Vector t, Vector bound) {
  const Vector rough = _mm512_rcp14_ps(x);
  const __mmask16 within = _mm512_cmp_ps_mask(t, bound, _CMP_NGT_UQ);
  return _mm512_maskz_fmadd_ps(within, rough, fnma(x, rough, fill(1.f)), rough);
}
inline float sum(Vector x) { return _mm512_reduce_add_ps(x); }

inline __mmask16 mask(Part part) { return static_cast<__mmask16>((1u << part.lanes) - 1); }
inline Vector load(const float* at, Whole) { return _mm512_loadu_ps(at); }
inline Vector load(const float* at, Part part) { return _mm512_maskz_loadu_ps(mask(part), at); }
inline void store(float* at, Vector x, Whole) { _mm512_storeu_ps(at, x); }
inline void store(float* at, Vector x, Part part) { _mm512_mask_storeu_ps(at, mask(part), x); }
inline Halves load_halves(const uint16_t* at, Whole) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)); }
inline Halves load_halves(const uint16_t* at, Part part) { return _mm256_maskz_loadu_epi16(mask(part), at); }
inline void store_halves(uint16_t* at, Halves x, Whole) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(at), x); }
inline void store_halves(uint16_t* at, Halves x, Part part) { _mm256_mask_storeu_epi16(at, mask(part), x); }

inline Vector widen(Halves x, BFloat16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16));
}
inline Vector widen(Halves x, Float16) { return _mm512_cvtph_ps(x); }
// to the nearest, ties to even, as torch rounds; the processor's own instruction would lose denormals
inline Halves narrow(Vector x, BFloat16) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0)));
}
inline Halves narrow(Vector x, Float16) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

#else

constexpr int64_t kLanes = 8;
using Vector = __m256;
using Halves = __m128i;  // 8 lanes of 16 bits

inline Vector fill(float x) { return _mm256_set1_ps(x); }
inline Vector add(Vector a, Vector b) { return _mm256_add_ps(a, b); }
inline Vector sub(Vector a, Vector b) { return _mm256_sub_ps(a, b); }
inline Vector mul(Vector a, Vector b) { return _mm256_mul_ps(a, b); }
inline Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
inline Vector fnma(Vector a, Vector b, Vector c) { return _mm256_fnmadd_ps(a, b, c); }
inline Vector power_of_fraction(Vector f);

// 2^t; beyond float32's range its largest or smallest power. Of two operands the second is taken where one is NaN.
inline Vector power(Vector t) {
  const Vector bounded = _mm256_max_ps(fill(-126.f), _mm256_min_ps(fill(126.f), t));
  const Vector n = _mm256_round_ps(bounded, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(power_of_fraction(sub(bounded, n))), exponent));
}
// an estimate of 12 bits would not do here: 1 - sigmoid(x) loses some
inline Vector reciprocal_up_to(Vector x, Vector t, Vector bound) {
  return _mm256_and_ps(_mm256_cmp_ps(t, bound, _CMP_NGT_UQ), _mm256_div_ps(fill(1.f), x));
}
inline float sum(Vector x) {
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
}

inline __m256i mask(Part part) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(part.lanes), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vector load(const float* at, Whole) { return _mm256_loadu_ps(at); }
inline Vector load(const float* at, Part part) { return _mm256_maskload_ps(at, mask(part)); }
inline void store(float* at, Vector x, Whole) { _mm256_storeu_ps(at, x); }
inline void store(float* at, Vector x, Part part) { _mm256_maskstore_ps(at, mask(part), x); }
inline Halves load_halves(const uint16_t* at, Whole) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at)); }
inline Halves load_halves(const uint16_t* at, Part part) {
  uint16_t lanes[8] = {};
  std::memcpy(lanes, at, 2 * part.lanes);
  return load_halves(lanes, Whole{});
}
inline void store_halves(uint16_t* at, Halves x, Whole) { _mm_storeu_si128(reinterpret_cast<__m128i*>(at), x); }
inline void store_halves(uint16_t* at, Halves x, Part part) {
  uint16_t lanes[8];
  store_halves(lanes, x, Whole{});
  std::memcpy(at, lanes, 2 * part.lanes);
}

inline Vector widen(Halves x, BFloat16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
}
inline Vector widen(Halves x, Float16) { return _mm256_cvtph_ps(x); }
inline Halves narrow(Vector x, BFloat16) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i high = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
inline Halves narrow(Vector x, Float16) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

#endif

template <class Lanes>
inline Vector load(const BFloat16* at, Lanes lanes) { return widen(load_halves(&at->bits, lanes), BFloat16{}); }
template <class Lanes>
inline Vector load(const Float16* at, Lanes lanes) { return widen(load_halves(&at->bits, lanes), Float16{}); }
template <class Lanes>
inline void store(BFloat16* at, Vector x, Lanes lanes) { store_halves(&at->bits, narrow(x, BFloat16{}), lanes); }
template <class Lanes>
inline void store(Float16* at, Vector x, Lanes lanes) { store_halves(&at->bits, narrow(x, Float16{}), lanes); }

// f(j, lanes) for the elements j of a row of n, a vector at a time
template <class F>
inline void each_vector(int64_t n, F f) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) f(j, Whole{});
  if (j < n) f(j, Part{static_cast<int>(n - j)});
}

inline Vector power_of_fraction(Vector f) {
  Vector power = fma(fill(1.327647198e-03f), f, fill(9.675541334e-03f));
  power = fma(power, f, fill(5.550713274e-02f));
  power = fma(power, f, fill(2.402211972e-01f));
  power = fma(power, f, fill(6.931469671e-01f));
  return fma(power, f, fill(1.f));
}

// 1 / (1 + 2^t), t = -x log2(e), to some 3 units in float32's last place; 0 below -87.3, NaN of NaN
inline Vector sigmoid(Vector x) {
  const Vector t = mul(x, fill(-1.442695041f));
  return reciprocal_up_to(add(power(t), fill(1.f)), t, fill(126.f));
}

}  // namespace VECTOR_SET
