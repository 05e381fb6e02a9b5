// Sixteen lanes in one zmm register. See simd.h for the semantics.
#pragma once

#include <immintrin.h>

namespace specmoeoff {
namespace avx512 {

using Vec = __m512;

SPECMOEOFF_INLINE __mmask16 FirstLanes(int count) {
  return static_cast<__mmask16>((1u << count) - 1u);
}

SPECMOEOFF_INLINE Vec Zero() { return _mm512_setzero_ps(); }
SPECMOEOFF_INLINE Vec Set1(float x) { return _mm512_set1_ps(x); }
SPECMOEOFF_INLINE Vec Load(const float* p) { return _mm512_loadu_ps(p); }
SPECMOEOFF_INLINE void Store(float* p, Vec v) { _mm512_storeu_ps(p, v); }
// The first `count` (0..16) elements, zeros after; touches no memory beyond them.
SPECMOEOFF_INLINE Vec LoadPartial(const float* p, int count) {
  return _mm512_maskz_loadu_ps(FirstLanes(count), p);
}
SPECMOEOFF_INLINE void StorePartial(float* p, Vec v, int count) {
  _mm512_mask_storeu_ps(p, FirstLanes(count), v);
}

SPECMOEOFF_INLINE Vec Add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
SPECMOEOFF_INLINE Vec Sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
SPECMOEOFF_INLINE Vec Mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
SPECMOEOFF_INLINE Vec Div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
SPECMOEOFF_INLINE Vec Sqrt(Vec a) { return _mm512_sqrt_ps(a); }
SPECMOEOFF_INLINE Vec Fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
SPECMOEOFF_INLINE Vec Min(Vec a, Vec b) { return _mm512_min_ps(a, b); }
SPECMOEOFF_INLINE Vec Max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
SPECMOEOFF_INLINE Vec Abs(Vec a) { return _mm512_abs_ps(a); }
// To the nearest integer, ties to even.
SPECMOEOFF_INLINE Vec Round(Vec a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// The 16 words into the upper halves of the lanes, zeros below: one shuffle widens and shifts.
SPECMOEOFF_INLINE Vec WidenBf16(__m256i bits) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  return _mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(
      0xaaaaaaaau, _mm512_slli_epi32(lane, 16), _mm512_castsi256_si512(bits)));
}
SPECMOEOFF_INLINE Vec LoadBf16(const uint16_t* p) {
  return WidenBf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
SPECMOEOFF_INLINE Vec LoadPartialBf16(const uint16_t* p, int count) {
  return WidenBf16(_mm256_maskz_loadu_epi16(FirstLanes(count), p));
}
SPECMOEOFF_INLINE Vec LoadF16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
SPECMOEOFF_INLINE Vec LoadPartialF16(const uint16_t* p, int count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(FirstLanes(count), p));
}
SPECMOEOFF_INLINE Vec LoadI8(const int8_t* p) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(v));
}
SPECMOEOFF_INLINE Vec LoadPartialI8(const int8_t* p, int count) {
  const __m128i v = _mm_maskz_loadu_epi8(FirstLanes(count), p);
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(v));
}

// The values that four bits stand for, 8 less, times a scale: a table, since a shuffle looks up
// sixteen at once and takes no notice of the index's higher bits.
using NibbleScale = __m512;
SPECMOEOFF_INLINE NibbleScale ScaleNibbles(float scale) {
  const __m512 value = _mm512_set_ps(7, 6, 5, 4, 3, 2, 1, 0, -1, -2, -3, -4, -5, -6, -7, -8);
  return _mm512_mul_ps(value, _mm512_set1_ps(scale));
}
SPECMOEOFF_INLINE __m512i LoadBytes(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
SPECMOEOFF_INLINE Vec LoadLowNibbles(const uint8_t* p, NibbleScale scale) {
  return _mm512_permutexvar_ps(LoadBytes(p), scale);
}
SPECMOEOFF_INLINE Vec LoadHighNibbles(const uint8_t* p, NibbleScale scale) {
  return _mm512_permutexvar_ps(_mm512_srli_epi32(LoadBytes(p), 4), scale);
}

// Lanes hold integers in [-128, 127].
SPECMOEOFF_INLINE void StorePartialI8(int8_t* p, Vec v, int count) {
  _mm_mask_storeu_epi8(p, FirstLanes(count), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}
SPECMOEOFF_INLINE void StoreI8(int8_t* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v)));
}
SPECMOEOFF_INLINE __m256i RoundToBf16(Vec v) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  const __m512i quiet = _mm512_or_si512(bits, _mm512_set1_epi32(0x400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, nan, quiet), 16));
}
// Rounded to nearest even; NaN stays NaN (its quiet bit is set).
SPECMOEOFF_INLINE void StorePartialBf16(uint16_t* p, Vec v, int count) {
  _mm256_mask_storeu_epi16(p, FirstLanes(count), RoundToBf16(v));
}
SPECMOEOFF_INLINE void StoreBf16(uint16_t* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), RoundToBf16(v));
}
SPECMOEOFF_INLINE void StoreF16(uint16_t* p, Vec v) {
  const __m256i bits = _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bits);
}

// v * 2^n, n the integer in the low bits of `shifted` (see Exp); in two steps.
SPECMOEOFF_INLINE Vec ScaleByPowerOfTwo(Vec v, Vec shifted) {
  const __m512i n = _mm512_sub_epi32(_mm512_castps_si512(shifted), _mm512_set1_epi32(0x4b400000));
  const __m512i half = _mm512_srai_epi32(n, 1);
  const __m512i rest = _mm512_sub_epi32(n, half);
  const __m512i one = _mm512_set1_epi32(0x3f800000);
  const Vec a = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(half, 23), one));
  const Vec b = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_slli_epi32(rest, 23), one));
  return _mm512_mul_ps(_mm512_mul_ps(v, a), b);
}

SPECMOEOFF_INLINE float ReduceAdd(Vec v) {
  const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}
SPECMOEOFF_INLINE float ReduceMax(Vec v) {
  const __m256 a = _mm256_max_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
  const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_shuffle_ps(c, c, 1)));
}

// Steps of ReduceAdd for two vectors at once, each two shuffles and their sum: of masked moves,
// which could take the place of one, every third takes a multiply-add's turn.
SPECMOEOFF_INLINE Vec Fold8(Vec a, Vec b) {  // quarters a, a, b, b
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
}
SPECMOEOFF_INLINE Vec Fold4(Vec a, Vec b) {  // quarters of a's vectors, then of b's
  return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}
SPECMOEOFF_INLINE Vec Fold2(Vec a, Vec b) {  // in each quarter a, a, b, b
  return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee));
}
SPECMOEOFF_INLINE Vec Fold1(Vec a, Vec b) {  // in each quarter a's two, then b's
  return _mm512_add_ps(_mm512_shuffle_ps(a, b, 0x88), _mm512_shuffle_ps(a, b, 0xdd));
}

// Lane i is ReduceAdd(v[i]) for i in [0, 4 kRows), kRows 1 to 4: half the shuffles.
template <int kRows>
SPECMOEOFF_INLINE Vec ReduceAddFours(const Vec* v) {
  Vec four[kRows];  // a quarter per vector
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    four[r] = Fold4(Fold8(v[4 * r], v[4 * r + 1]), Fold8(v[4 * r + 2], v[4 * r + 3]));
  }
  const Vec low = Fold2(four[0], four[kRows > 1 ? 1 : 0]);
  const Vec high = kRows > 2 ? Fold2(four[kRows > 2 ? 2 : 0], four[kRows - 1]) : low;
  const __m512i transpose = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  return _mm512_permutexvar_ps(transpose, Fold1(low, high));
}

}  // namespace avx512
}  // namespace specmoeoff
