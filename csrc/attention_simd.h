// What attention needs of sixteen lanes beyond simd.h. Rounds the same way on every target.
#pragma once

#include "simd.h"

namespace specmoeoff {
namespace SPECMOEOFF_TARGET {

#if SPECMOEOFF_TARGET_ID == SPECMOEOFF_IS_avx512

// a < b ? x : y
SPECMOEOFF_INLINE Vec IfLess(Vec a, Vec b, Vec x, Vec y) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), y, x);
}
// Whether a < b in some lane.
SPECMOEOFF_INLINE bool AnyLess(Vec a, Vec b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ) != 0; }
// Lane j of x where bit j of `bits` is set, of y elsewhere.
SPECMOEOFF_INLINE Vec IfBit(uint32_t bits, Vec x, Vec y) {
  return _mm512_mask_blend_ps(static_cast<__mmask16>(bits), y, x);
}
SPECMOEOFF_INLINE Vec ShiftBitsLeft23(Vec a) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(a), 23));
}
SPECMOEOFF_INLINE Vec CopySign(Vec magnitude, Vec sign) {
  const __m512i top = _mm512_set1_epi32(INT32_MIN);
  return _mm512_castsi512_ps(_mm512_ternarylogic_epi32(top, _mm512_castps_si512(sign),
                                                       _mm512_castps_si512(magnitude), 0xca));
}
// Widens 32 values into those of even and of odd index: one load, one shift and one AND.
SPECMOEOFF_INLINE void LoadBf16Pair(const uint16_t* p, Vec& even, Vec& odd) {
  const __m512i x = _mm512_loadu_si512(p);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(x, _mm512_set1_epi32(static_cast<int>(0xffff0000))));
}
// The inverse of the split: even and odd become the first and the second 16 of 32 values.
SPECMOEOFF_INLINE void Interleave(Vec& a, Vec& b) {
  const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i high =
      _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  const Vec first = _mm512_permutex2var_ps(a, low, b);
  b = _mm512_permutex2var_ps(a, high, b);
  a = first;
}

#elif SPECMOEOFF_TARGET_ID == SPECMOEOFF_IS_avx2

SPECMOEOFF_INLINE Vec IfLess(Vec a, Vec b, Vec x, Vec y) {
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))};
}
SPECMOEOFF_INLINE bool AnyLess(Vec a, Vec b) {
  const __m256 low = _mm256_cmp_ps(a.lo, b.lo, _CMP_LT_OQ);
  return _mm256_movemask_ps(_mm256_or_ps(low, _mm256_cmp_ps(a.hi, b.hi, _CMP_LT_OQ))) != 0;
}
SPECMOEOFF_INLINE Vec IfBit(uint32_t bits, Vec x, Vec y) {
  const __m256i each = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i low = _mm256_set1_epi32(static_cast<int>(bits & 0xff));
  const __m256i high = _mm256_set1_epi32(static_cast<int>(bits >> 8 & 0xff));
  const __m256i set_low = _mm256_cmpeq_epi32(_mm256_and_si256(low, each), each);
  const __m256i set_high = _mm256_cmpeq_epi32(_mm256_and_si256(high, each), each);
  return {_mm256_blendv_ps(y.lo, x.lo, _mm256_castsi256_ps(set_low)),
          _mm256_blendv_ps(y.hi, x.hi, _mm256_castsi256_ps(set_high))};
}
SPECMOEOFF_INLINE Vec ShiftBitsLeft23(Vec a) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.lo), 23)),
          _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(a.hi), 23))};
}
SPECMOEOFF_INLINE Vec CopySign(Vec magnitude, Vec sign) {
  const __m256 top = _mm256_set1_ps(-0.0f);
  return {_mm256_or_ps(_mm256_andnot_ps(top, magnitude.lo), _mm256_and_ps(top, sign.lo)),
          _mm256_or_ps(_mm256_andnot_ps(top, magnitude.hi), _mm256_and_ps(top, sign.hi))};
}
// Widens 16 values into the eight of even index and the eight of odd index.
SPECMOEOFF_INLINE Vec LoadBf16Split(const uint16_t* p) {
  const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i top = _mm256_set1_epi32(static_cast<int>(0xffff0000));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(x, 16)),
          _mm256_castsi256_ps(_mm256_and_si256(x, top))};
}
// The inverse of the split.
SPECMOEOFF_INLINE Vec Interleave(Vec v) {
  const __m256 a = _mm256_unpacklo_ps(v.lo, v.hi);
  const __m256 b = _mm256_unpackhi_ps(v.lo, v.hi);
  // Not _mm256_permute2f128_ps, which is eight operations on Zen 1.
  return {_mm256_insertf128_ps(a, _mm256_castps256_ps128(b), 1),
          _mm256_blend_ps(_mm256_castps128_ps256(_mm256_extractf128_ps(a, 1)), b, 0xf0)};
}
// The same of 32 values, each 16 by themselves.
SPECMOEOFF_INLINE void LoadBf16Pair(const uint16_t* p, Vec& a, Vec& b) {
  a = LoadBf16Split(p);
  b = LoadBf16Split(p + 16);
}
SPECMOEOFF_INLINE void Interleave(Vec& a, Vec& b) {
  a = Interleave(a);
  b = Interleave(b);
}

#else

template <class F>
SPECMOEOFF_INLINE Vec Each(F f) {
  Vec r;
  for (int j = 0; j < 16; ++j) r.lane[j] = f(j);
  return r;
}
SPECMOEOFF_INLINE Vec IfLess(const Vec& a, const Vec& b, const Vec& x, const Vec& y) {
  return Each([&](int j) { return a.lane[j] < b.lane[j] ? x.lane[j] : y.lane[j]; });
}
SPECMOEOFF_INLINE bool AnyLess(const Vec& a, const Vec& b) {
  bool any = false;
  for (int j = 0; j < 16; ++j) any |= a.lane[j] < b.lane[j];
  return any;
}
SPECMOEOFF_INLINE Vec IfBit(uint32_t bits, const Vec& x, const Vec& y) {
  return Each([&](int j) { return bits >> j & 1 ? x.lane[j] : y.lane[j]; });
}
SPECMOEOFF_INLINE Vec ShiftBitsLeft23(const Vec& a) {
  return Each([&](int j) { return BitsToFloat(FloatToBits(a.lane[j]) << 23); });
}
SPECMOEOFF_INLINE Vec CopySign(const Vec& magnitude, const Vec& sign) {
  return Each([&](int j) { return __builtin_copysignf(magnitude.lane[j], sign.lane[j]); });
}
SPECMOEOFF_INLINE void LoadBf16Pair(const uint16_t* p, Vec& even, Vec& odd) {
  even = Each([&](int j) { return BitsToFloat(static_cast<uint32_t>(p[2 * j]) << 16); });
  odd = Each([&](int j) { return BitsToFloat(static_cast<uint32_t>(p[2 * j + 1]) << 16); });
}
SPECMOEOFF_INLINE void Interleave(Vec& a, Vec& b) {
  const Vec even = a, odd = b;
  a = Each([&](int j) { return j % 2 ? odd.lane[j / 2] : even.lane[j / 2]; });
  b = Each([&](int j) { return j % 2 ? odd.lane[8 + j / 2] : even.lane[8 + j / 2]; });
}

#endif

// 2^x for x up to 127: exactly 1 at 0, 0 below -126.5, NaN for NaN; elsewhere off by 1.6e-7 of it
// at most. The polynomial is the best of degree 5 whose value at 0 is 1. Adding `shift` rounds x to
// an integer and leaves it, biased, in the low bits.
SPECMOEOFF_INLINE Vec Exp2(Vec x) {
  const Vec shift = Set1(12583039.0f);  // 1.5 * 2^23 + 127
  x = Max(Set1(-127.0f), x);            // whose power of two comes out as 0
  const Vec t = Add(x, shift);
  const Vec f = Sub(x, Sub(t, shift));
  Vec p = Set1(0.0013264728477224708f);
  p = Fma(p, f, Set1(0.009671512991189957f));
  p = Fma(p, f, Set1(0.05550733581185341f));
  p = Fma(p, f, Set1(0.24022242426872253f));
  p = Fma(p, f, Set1(0.6931470036506653f));
  p = Fma(p, f, Set1(1.0f));
  return Mul(p, ShiftBitsLeft23(t));
}

// tanh(x): a polynomial near 0, where the difference below would lose digits, else by Exp2.
SPECMOEOFF_INLINE Vec Tanh(Vec x) {
  const Vec a = Abs(x);
  const Vec z = Mul(x, x);
  Vec p = Set1(-0.005515057593584061f);
  p = Fma(p, z, Set1(0.02046932280063629f));
  p = Fma(p, z, Set1(-0.05368799343705177f));
  p = Fma(p, z, Set1(0.1333083063364029f));
  p = Fma(p, z, Set1(-0.3333325982093811f));
  const Vec near = Fma(Mul(p, z), x, x);
  const Vec e = Exp2(Mul(a, Set1(-2.8853900817779268f)));
  const Vec one = Set1(1.0f);
  const Vec far = CopySign(Div(Sub(one, e), Add(one, e)), x);
  return IfLess(a, Set1(0.625f), near, far);
}

}  // namespace SPECMOEOFF_TARGET
}  // namespace specmoeoff
