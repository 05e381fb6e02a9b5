// Sixteen lanes in the parts that a target's registers take one after the other.
//
// A tile of products that keeps both halves of sixteen lanes of AVX2 in flight has no registers
// left for what is loaded, and one whose multiply-adds load for themselves waits for the load ports
// (measured on Zen 1: two thirds of the speed). So on AVX2 a step has two parts of eight lanes,
// each with its own loads; elsewhere it has one.
//
// Which lanes a part has is the source's affair: the low and the high eight, or, from bfloat16,
// those of even and of odd index (ReduceEvenOdd() adds them up in the same order). Loading bfloat16
// so takes one instruction a part instead of two.
#pragma once

#include "simd.h"

namespace specmoeoff {
namespace SPECMOEOFF_TARGET {

#if SPECMOEOFF_TARGET_ID == SPECMOEOFF_IS_avx2

constexpr int kParts = 2;
using Part = __m256;

// Keeps a value that was loaded in a register: GCC would load it anew in each multiply-add.
SPECMOEOFF_INLINE Part Keep(Part v) {
  asm("" : "+x"(v));
  return v;
}
SPECMOEOFF_INLINE Part Mul(Part a, Part b) { return _mm256_mul_ps(a, b); }
SPECMOEOFF_INLINE Part Fma(Part a, Part b, Part c) { return _mm256_fmadd_ps(a, b, c); }
SPECMOEOFF_INLINE Part ZeroPart() { return _mm256_setzero_ps(); }

template <int kPart>
SPECMOEOFF_INLINE Part PartOf(Vec v) {
  return kPart == 0 ? v.lo : v.hi;
}
template <int kPart>
SPECMOEOFF_INLINE Part LoadPart(const float* p) {
  return _mm256_loadu_ps(p + 8 * kPart);
}
template <int kPart>
SPECMOEOFF_INLINE void StorePart(float* p, Part v) {
  _mm256_storeu_ps(p + 8 * kPart, v);
}
template <int kPart>
SPECMOEOFF_INLINE Part LoadPartBf16(const uint16_t* p) {
  return WidenBf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * kPart)));
}
template <int kPart>
SPECMOEOFF_INLINE Part LoadPartF16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 8 * kPart)));
}
template <int kPart>
SPECMOEOFF_INLINE Part LoadPartI8(const int8_t* p) {
  // Through the intrinsics, GCC 12 loads first and widens then.
  __m256i v;
  asm("vpmovsxbd %1, %0" : "=x"(v) : "m"(*reinterpret_cast<const int8_t (*)[8]>(p + 8 * kPart)));
  return _mm256_cvtepi32_ps(v);
}
// Of 32 nibbles the sixteen low (kHigh false) or high ones.
template <int kPart, bool kHigh>
SPECMOEOFF_INLINE Part LoadPartNibbles(const uint8_t* p, NibbleScale scale) {
  const __m128i v = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p + 8 * kPart));
  return WidenNibbles(kHigh ? _mm_srli_epi16(v, 4) : v, scale);
}

// Sixteen bfloat16: part 0 has those of even index, part 1 those of odd index.
template <int kPart>
SPECMOEOFF_INLINE Part LoadEvenOdd(const uint16_t* p) {
  const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  if constexpr (kPart == 0) return _mm256_castsi256_ps(_mm256_slli_epi32(v, 16));
  return _mm256_castsi256_ps(
      _mm256_and_si256(v, _mm256_set1_epi32(static_cast<int32_t>(0xffff0000))));
}
// The same order for float32: lanes 0, 2, 4, ... before 1, 3, 5, ...
SPECMOEOFF_INLINE Vec SplitEvenOdd(Vec v) {
  const __m256 a = _mm256_permute2f128_ps(v.lo, v.hi, 0x20);
  const __m256 b = _mm256_permute2f128_ps(v.lo, v.hi, 0x31);
  const __m256 even = _mm256_shuffle_ps(a, b, 0x88);  // 0 2 4 6 | 8 10 12 14
  const __m256 odd = _mm256_shuffle_ps(a, b, 0xdd);
  return {even, odd};
}
SPECMOEOFF_INLINE float ReduceParts(const Part (&v)[kParts]) { return ReduceAdd(Vec{v[0], v[1]}); }
// ReduceAdd() of lanes split so: j + (j + 8), + (j + 4), + (j + 2), + (j + 1).
SPECMOEOFF_INLINE float ReduceEvenOdd(const Part (&v)[kParts]) {
  const __m128 even = _mm_add_ps(_mm256_castps256_ps128(v[0]), _mm256_extractf128_ps(v[0], 1));
  const __m128 odd = _mm_add_ps(_mm256_castps256_ps128(v[1]), _mm256_extractf128_ps(v[1], 1));
  const __m128 four = _mm_add_ps(_mm_unpacklo_ps(even, odd), _mm_unpackhi_ps(even, odd));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

#else

constexpr int kParts = 1;
using Part = Vec;

SPECMOEOFF_INLINE Part Keep(Part v) { return v; }
SPECMOEOFF_INLINE Part ZeroPart() { return Zero(); }
template <int kPart>
SPECMOEOFF_INLINE Part PartOf(Vec v) {
  return v;
}
template <int kPart>
SPECMOEOFF_INLINE Part LoadPart(const float* p) {
  return Load(p);
}
template <int kPart>
SPECMOEOFF_INLINE void StorePart(float* p, Part v) {
  Store(p, v);
}
template <int kPart>
SPECMOEOFF_INLINE Part LoadPartBf16(const uint16_t* p) {
  return LoadBf16(p);
}
template <int kPart>
SPECMOEOFF_INLINE Part LoadPartF16(const uint16_t* p) {
  return LoadF16(p);
}
template <int kPart>
SPECMOEOFF_INLINE Part LoadPartI8(const int8_t* p) {
  return LoadI8(p);
}
template <int kPart, bool kHigh>
SPECMOEOFF_INLINE Part LoadPartNibbles(const uint8_t* p, NibbleScale scale) {
  return kHigh ? LoadHighNibbles(p, scale) : LoadLowNibbles(p, scale);
}
SPECMOEOFF_INLINE float ReduceParts(const Part (&v)[kParts]) { return ReduceAdd(v[0]); }

#endif

}  // namespace SPECMOEOFF_TARGET
}  // namespace specmoeoff
