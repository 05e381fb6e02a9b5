// Sixteen lanes in two ymm registers. See simd.h for the semantics.
#pragma once

#include <immintrin.h>

namespace specmoeoff {
namespace avx2 {

struct Vec {
  __m256 lo, hi;
};

SPECMOEOFF_INLINE Vec Zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
SPECMOEOFF_INLINE Vec Set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
SPECMOEOFF_INLINE Vec Load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
SPECMOEOFF_INLINE void Store(float* p, Vec v) {
  _mm256_storeu_ps(p, v.lo);
  _mm256_storeu_ps(p + 8, v.hi);
}
// The first `count` (0..16) elements, zeros after; touches no memory beyond them.
SPECMOEOFF_INLINE Vec LoadPartial(const float* p, int count) {
  alignas(32) float lanes[16] = {};
  memcpy(lanes, p, sizeof(float) * static_cast<size_t>(count));
  return Load(lanes);
}
SPECMOEOFF_INLINE void StorePartial(float* p, Vec v, int count) {
  alignas(32) float lanes[16];
  Store(lanes, v);
  memcpy(p, lanes, sizeof(float) * static_cast<size_t>(count));
}

SPECMOEOFF_INLINE Vec Add(Vec a, Vec b) {
  return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)};
}
SPECMOEOFF_INLINE Vec Sub(Vec a, Vec b) {
  return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)};
}
SPECMOEOFF_INLINE Vec Mul(Vec a, Vec b) {
  return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)};
}
SPECMOEOFF_INLINE Vec Div(Vec a, Vec b) {
  return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)};
}
SPECMOEOFF_INLINE Vec Sqrt(Vec a) { return {_mm256_sqrt_ps(a.lo), _mm256_sqrt_ps(a.hi)}; }
SPECMOEOFF_INLINE Vec Fma(Vec a, Vec b, Vec c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
SPECMOEOFF_INLINE Vec Min(Vec a, Vec b) {
  return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)};
}
SPECMOEOFF_INLINE Vec Max(Vec a, Vec b) {
  return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)};
}
SPECMOEOFF_INLINE Vec Abs(Vec a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return {_mm256_andnot_ps(sign, a.lo), _mm256_andnot_ps(sign, a.hi)};
}
// To the nearest integer, ties to even.
SPECMOEOFF_INLINE Vec Round(Vec a) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  return {_mm256_round_ps(a.lo, kMode), _mm256_round_ps(a.hi, kMode)};
}

SPECMOEOFF_INLINE __m256 WidenBf16(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
SPECMOEOFF_INLINE Vec LoadBf16(const uint16_t* p) {
  return {WidenBf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          WidenBf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
SPECMOEOFF_INLINE Vec LoadF16(const uint16_t* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
          _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8)))};
}
SPECMOEOFF_INLINE Vec LoadI8(const int8_t* p) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(v)),
          _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(v, 8)))};
}
SPECMOEOFF_INLINE Vec LoadPartialBf16(const uint16_t* p, int count) {
  uint16_t lanes[16] = {};
  memcpy(lanes, p, sizeof(uint16_t) * static_cast<size_t>(count));
  return LoadBf16(lanes);
}
SPECMOEOFF_INLINE Vec LoadPartialF16(const uint16_t* p, int count) {
  uint16_t lanes[16] = {};
  memcpy(lanes, p, sizeof(uint16_t) * static_cast<size_t>(count));
  return LoadF16(lanes);
}
SPECMOEOFF_INLINE Vec LoadPartialI8(const int8_t* p, int count) {
  int8_t lanes[16] = {};
  memcpy(lanes, p, static_cast<size_t>(count));
  return LoadI8(lanes);
}

// The values that four bits stand for, 8 less, times a scale.
using NibbleScale = __m256;
SPECMOEOFF_INLINE NibbleScale ScaleNibbles(float scale) { return _mm256_set1_ps(scale); }
// The low four bits of eight bytes.
SPECMOEOFF_INLINE __m256 WidenNibbles(__m128i bytes, NibbleScale scale) {
  const __m256i low = _mm256_and_si256(_mm256_cvtepu8_epi32(bytes), _mm256_set1_epi32(15));
  return _mm256_mul_ps(_mm256_cvtepi32_ps(_mm256_sub_epi32(low, _mm256_set1_epi32(8))), scale);
}
SPECMOEOFF_INLINE Vec LoadLowNibbles(const uint8_t* p, NibbleScale scale) {
  const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return {WidenNibbles(v, scale), WidenNibbles(_mm_srli_si128(v, 8), scale)};
}
SPECMOEOFF_INLINE Vec LoadHighNibbles(const uint8_t* p, NibbleScale scale) {
  const __m128i v = _mm_srli_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), 4);
  return {WidenNibbles(v, scale), WidenNibbles(_mm_srli_si128(v, 8), scale)};
}

// Lanes hold integers in [-128, 127].
SPECMOEOFF_INLINE void StorePartialI8(int8_t* p, Vec v, int count) {
  alignas(32) int32_t lanes[16];
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes), _mm256_cvtps_epi32(v.lo));
  _mm256_store_si256(reinterpret_cast<__m256i*>(lanes + 8), _mm256_cvtps_epi32(v.hi));
  for (int i = 0; i < count; ++i) p[i] = static_cast<int8_t>(lanes[i]);
}
SPECMOEOFF_INLINE void StoreI8(int8_t* p, Vec v) {
  const __m256i words = _mm256_packs_epi32(_mm256_cvtps_epi32(v.lo), _mm256_cvtps_epi32(v.hi));
  const __m256i sorted = _mm256_permute4x64_epi64(words, 0xd8);
  const __m128i bytes =
      _mm_packs_epi16(_mm256_castsi256_si128(sorted), _mm256_extracti128_si256(sorted, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
SPECMOEOFF_INLINE __m256i RoundToBf16(__m256 v) {
  const __m256i bits = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
  const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256 chosen =
      _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(quiet), nan);
  return _mm256_srli_epi32(_mm256_castps_si256(chosen), 16);
}
// Rounded to nearest even; NaN stays NaN (its quiet bit is set).
SPECMOEOFF_INLINE void StoreBf16(uint16_t* p, Vec v) {
  const __m256i packed = _mm256_packus_epi32(RoundToBf16(v.lo), RoundToBf16(v.hi));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm256_permute4x64_epi64(packed, 0xd8));
}
SPECMOEOFF_INLINE void StorePartialBf16(uint16_t* p, Vec v, int count) {
  uint16_t lanes[16];
  StoreBf16(lanes, v);
  memcpy(p, lanes, sizeof(uint16_t) * static_cast<size_t>(count));
}
SPECMOEOFF_INLINE void StoreF16(uint16_t* p, Vec v) {
  constexpr int kMode = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v.lo, kMode));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(v.hi, kMode));
}

SPECMOEOFF_INLINE __m256 ScaleHalf(__m256 v, __m256 shifted) {
  const __m256i n = _mm256_sub_epi32(_mm256_castps_si256(shifted), _mm256_set1_epi32(0x4b400000));
  const __m256i half = _mm256_srai_epi32(n, 1);
  const __m256i rest = _mm256_sub_epi32(n, half);
  const __m256i one = _mm256_set1_epi32(0x3f800000);
  const __m256 a = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(half, 23), one));
  const __m256 b = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_slli_epi32(rest, 23), one));
  return _mm256_mul_ps(_mm256_mul_ps(v, a), b);
}
// v * 2^n, n the integer in the low bits of `shifted` (see Exp); in two steps.
SPECMOEOFF_INLINE Vec ScaleByPowerOfTwo(Vec v, Vec shifted) {
  return {ScaleHalf(v.lo, shifted.lo), ScaleHalf(v.hi, shifted.hi)};
}

SPECMOEOFF_INLINE float ReduceAdd(Vec v) {
  const __m256 a = _mm256_add_ps(v.lo, v.hi);
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}
SPECMOEOFF_INLINE float ReduceMax(Vec v) {
  const __m256 a = _mm256_max_ps(v.lo, v.hi);
  const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_shuffle_ps(c, c, 1)));
}

}  // namespace avx2
}  // namespace specmoeoff
