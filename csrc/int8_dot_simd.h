// Sixteen int32 sums, and the step that adds four int8 products to each. For
// int8_dot.inc.
//
// Prepared holds one block of weights in the form that Dot wants; preparing it
// is shared by all rows of a tile. Sums start at FirstSum(sum of the row's
// values), which makes up for weights that are taken as unsigned. All
// arithmetic is exact: |values| are at most 127, so two products fit 16 bits.
#pragma once

#include "simd.h"

namespace specmoeoff {
namespace SPECMOEOFF_TARGET {
namespace {

// Four values of a row as one word, in memory order.
SPECMOEOFF_INLINE int32_t LoadFour(const int8_t* p) {
  int32_t word;
  memcpy(&word, p, sizeof(word));
  return word;
}

#if SPECMOEOFF_TARGET_ID == SPECMOEOFF_IS_avx512 && defined(__AVX512VNNI__)

using Sums = __m512i;
using Prepared = __m512i;

// The instruction multiplies unsigned with signed: weights are taken plus 128.
SPECMOEOFF_INLINE Prepared Prepare(const int8_t* block) {
  return _mm512_xor_si512(_mm512_loadu_si512(block), _mm512_set1_epi8(-128));
}
SPECMOEOFF_INLINE Sums FirstSum(int32_t row_sum) { return _mm512_set1_epi32(-128 * row_sum); }
SPECMOEOFF_INLINE Sums Dot(Sums sums, const Prepared& weights, int32_t four) {
  // Through the intrinsic, GCC 12 copies and spills the sums of a full tile:
  // half the speed.
  asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(weights), "v"(_mm512_set1_epi32(four)));
  return sums;
}
SPECMOEOFF_INLINE Vec ToFloat(Sums sums) { return _mm512_cvtepi32_ps(sums); }

#elif SPECMOEOFF_TARGET_ID == SPECMOEOFF_IS_avx512

using Sums = __m512i;
struct Prepared {
  __m512i magnitude;
  __mmask64 negative;
};

SPECMOEOFF_INLINE Prepared Prepare(const int8_t* block) {
  const __m512i weights = _mm512_loadu_si512(block);
  return {_mm512_abs_epi8(weights), _mm512_movepi8_mask(weights)};
}
SPECMOEOFF_INLINE Sums FirstSum(int32_t) { return _mm512_setzero_si512(); }
// |w| * (x with the sign of w): unsigned with signed, and no pair leaves 16
// bits.
SPECMOEOFF_INLINE Sums Dot(Sums sums, const Prepared& weights, int32_t four) {
  const __m512i x = _mm512_set1_epi32(four);
  const __m512i is_signed = _mm512_mask_sub_epi8(x, weights.negative, _mm512_setzero_si512(), x);
  const __m512i pairs = _mm512_maddubs_epi16(weights.magnitude, is_signed);
  return _mm512_add_epi32(sums, _mm512_madd_epi16(pairs, _mm512_set1_epi16(1)));
}
SPECMOEOFF_INLINE Vec ToFloat(Sums sums) { return _mm512_cvtepi32_ps(sums); }

#elif SPECMOEOFF_TARGET_ID == SPECMOEOFF_IS_avx2

struct Sums {
  __m256i low, high;
};
struct Prepared {
  __m256i low, high;
};

SPECMOEOFF_INLINE Prepared Prepare(const int8_t* block) {
  return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(block)),
          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(block + 32))};
}
SPECMOEOFF_INLINE Sums FirstSum(int32_t) {
  return {_mm256_setzero_si256(), _mm256_setzero_si256()};
}
// |w| * (x with the sign of w): unsigned with signed, and no pair leaves 16
// bits.
SPECMOEOFF_INLINE __m256i DotHalf(__m256i sums, __m256i weights, __m256i x) {
  const __m256i pairs =
      _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(x, weights));
  return _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
SPECMOEOFF_INLINE Sums Dot(const Sums& sums, const Prepared& weights, int32_t four) {
  const __m256i x = _mm256_set1_epi32(four);
  return {DotHalf(sums.low, weights.low, x), DotHalf(sums.high, weights.high, x)};
}
SPECMOEOFF_INLINE Vec ToFloat(const Sums& sums) {
  return {_mm256_cvtepi32_ps(sums.low), _mm256_cvtepi32_ps(sums.high)};
}

#else

struct Sums {
  int32_t lane[16];
};
struct Prepared {
  const int8_t* block;
};

SPECMOEOFF_INLINE Prepared Prepare(const int8_t* block) { return {block}; }
SPECMOEOFF_INLINE Sums FirstSum(int32_t) { return Sums{}; }
SPECMOEOFF_INLINE Sums Dot(Sums sums, const Prepared& weights, int32_t four) {
  int8_t x[4];
  memcpy(x, &four, sizeof(x));
  for (int j = 0; j < 16; ++j) {
    const int8_t* w = weights.block + 4 * j;
    sums.lane[j] += x[0] * w[0] + x[1] * w[1] + x[2] * w[2] + x[3] * w[3];
  }
  return sums;
}
SPECMOEOFF_INLINE Vec ToFloat(const Sums& sums) {
  Vec v;
  for (int j = 0; j < 16; ++j) v.lane[j] = static_cast<float>(sums.lane[j]);
  return v;
}

#endif

}  // namespace
}  // namespace SPECMOEOFF_TARGET
}  // namespace specmoeoff
