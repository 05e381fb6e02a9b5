// Sixteen lanes in plain C++: slow, on every CPU. See simd.h for the semantics.
#pragma once

#include <math.h>

namespace specmoeoff {
namespace scalar {

struct Vec {
  float lane[16];
};

#define SPECMOEOFF_LANES(expression)                            \
  do {                                                          \
    Vec result;                                                 \
    for (int j = 0; j < 16; ++j) result.lane[j] = (expression); \
    return result;                                              \
  } while (0)

SPECMOEOFF_INLINE float BitsToFloat(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
SPECMOEOFF_INLINE uint32_t FloatToBits(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(x));
  return bits;
}

SPECMOEOFF_INLINE Vec Zero() { return Vec{}; }
SPECMOEOFF_INLINE Vec Set1(float x) { SPECMOEOFF_LANES(x); }
// The first `count` (0..16) elements, zeros after; touches no memory beyond them.
SPECMOEOFF_INLINE Vec LoadPartial(const float* p, int count) {
  Vec v{};
  memcpy(v.lane, p, sizeof(float) * static_cast<size_t>(count));
  return v;
}
SPECMOEOFF_INLINE void StorePartial(float* p, Vec v, int count) {
  memcpy(p, v.lane, sizeof(float) * static_cast<size_t>(count));
}
SPECMOEOFF_INLINE Vec Load(const float* p) { return LoadPartial(p, 16); }
SPECMOEOFF_INLINE void Store(float* p, Vec v) { StorePartial(p, v, 16); }

SPECMOEOFF_INLINE Vec Add(Vec a, Vec b) { SPECMOEOFF_LANES(a.lane[j] + b.lane[j]); }
SPECMOEOFF_INLINE Vec Sub(Vec a, Vec b) { SPECMOEOFF_LANES(a.lane[j] - b.lane[j]); }
SPECMOEOFF_INLINE Vec Mul(Vec a, Vec b) { SPECMOEOFF_LANES(a.lane[j] * b.lane[j]); }
SPECMOEOFF_INLINE Vec Div(Vec a, Vec b) { SPECMOEOFF_LANES(a.lane[j] / b.lane[j]); }
SPECMOEOFF_INLINE Vec Sqrt(Vec a) { SPECMOEOFF_LANES(sqrtf(a.lane[j])); }
SPECMOEOFF_INLINE Vec Fma(Vec a, Vec b, Vec c) {
  SPECMOEOFF_LANES(fmaf(a.lane[j], b.lane[j], c.lane[j]));
}
SPECMOEOFF_INLINE float MinOf(float a, float b) { return a < b ? a : b; }
SPECMOEOFF_INLINE float MaxOf(float a, float b) { return a > b ? a : b; }
SPECMOEOFF_INLINE Vec Min(Vec a, Vec b) { SPECMOEOFF_LANES(MinOf(a.lane[j], b.lane[j])); }
SPECMOEOFF_INLINE Vec Max(Vec a, Vec b) { SPECMOEOFF_LANES(MaxOf(a.lane[j], b.lane[j])); }
SPECMOEOFF_INLINE Vec Abs(Vec a) { SPECMOEOFF_LANES(fabsf(a.lane[j])); }
// To the nearest integer, ties to even.
SPECMOEOFF_INLINE Vec Round(Vec a) { SPECMOEOFF_LANES(nearbyintf(a.lane[j])); }

SPECMOEOFF_INLINE float HalfToFloat(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 31u;
  const uint32_t mantissa = half & 0x3ffu;
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
    return BitsToFloat(FloatToBits(magnitude) | sign);
  }
  if (exponent == 31) {
    // As the hardware does: a NaN becomes quiet.
    return BitsToFloat(sign | 0x7f800000u | (mantissa ? 0x400000u : 0u) | (mantissa << 13));
  }
  return BitsToFloat(sign | ((exponent + 112u) << 23) | (mantissa << 13));
}

SPECMOEOFF_INLINE Vec LoadPartialBf16(const uint16_t* p, int count) {
  uint16_t bits[16] = {};
  memcpy(bits, p, sizeof(uint16_t) * static_cast<size_t>(count));
  SPECMOEOFF_LANES(BitsToFloat(static_cast<uint32_t>(bits[j]) << 16));
}
SPECMOEOFF_INLINE Vec LoadPartialF16(const uint16_t* p, int count) {
  uint16_t bits[16] = {};
  memcpy(bits, p, sizeof(uint16_t) * static_cast<size_t>(count));
  SPECMOEOFF_LANES(HalfToFloat(bits[j]));
}
SPECMOEOFF_INLINE Vec LoadPartialI8(const int8_t* p, int count) {
  SPECMOEOFF_LANES(j < count ? static_cast<float>(p[j]) : 0.0f);
}
SPECMOEOFF_INLINE Vec LoadBf16(const uint16_t* p) { return LoadPartialBf16(p, 16); }
SPECMOEOFF_INLINE Vec LoadF16(const uint16_t* p) { return LoadPartialF16(p, 16); }
SPECMOEOFF_INLINE Vec LoadI8(const int8_t* p) { return LoadPartialI8(p, 16); }

// The values that four bits stand for, 8 less, times a scale.
using NibbleScale = float;
SPECMOEOFF_INLINE NibbleScale ScaleNibbles(float scale) { return scale; }
SPECMOEOFF_INLINE Vec LoadLowNibbles(const uint8_t* p, NibbleScale scale) {
  SPECMOEOFF_LANES(static_cast<float>((p[j] & 15) - 8) * scale);
}
SPECMOEOFF_INLINE Vec LoadHighNibbles(const uint8_t* p, NibbleScale scale) {
  SPECMOEOFF_LANES(static_cast<float>((p[j] >> 4) - 8) * scale);
}

// Lanes hold integers in [-128, 127].
SPECMOEOFF_INLINE void StorePartialI8(int8_t* p, Vec v, int count) {
  for (int j = 0; j < count; ++j) p[j] = static_cast<int8_t>(v.lane[j]);
}
SPECMOEOFF_INLINE void StoreI8(int8_t* p, Vec v) { StorePartialI8(p, v, 16); }
// Rounded to nearest even; NaN stays NaN (its quiet bit is set).
SPECMOEOFF_INLINE void StorePartialBf16(uint16_t* p, Vec v, int count) {
  for (int j = 0; j < count; ++j) {
    const uint32_t bits = FloatToBits(v.lane[j]);
    const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
    const uint32_t chosen = nan ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
    p[j] = static_cast<uint16_t>(chosen >> 16);
  }
}
SPECMOEOFF_INLINE void StoreBf16(uint16_t* p, Vec v) { StorePartialBf16(p, v, 16); }

SPECMOEOFF_INLINE uint16_t FloatToHalf(float x) {
  const uint32_t bits = FloatToBits(x);
  const uint32_t sign = bits >> 16 & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | (bits >> 13 & 0x3ffu));
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to 65536
  if (magnitude < 0x38800000u) {  // below 2^-14: adding 1/2 rounds to multiples of 2^-24
    const uint32_t shifted = FloatToBits(BitsToFloat(magnitude) + 0.5f);
    return static_cast<uint16_t>(sign | (shifted - 0x3f000000u));
  }
  const uint32_t rounded = magnitude + 0xfffu + (magnitude >> 13 & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}
SPECMOEOFF_INLINE void StoreF16(uint16_t* p, Vec v) {
  for (int j = 0; j < 16; ++j) p[j] = FloatToHalf(v.lane[j]);
}

SPECMOEOFF_INLINE float ScaleLane(float x, float shifted) {
  // Unsigned arithmetic throughout: a NaN has arbitrary bits here.
  const uint32_t n = FloatToBits(shifted) - 0x4b400000u;
  const uint32_t half = (n >> 1) | (n & 0x80000000u);
  const uint32_t rest = n - half;
  return x * BitsToFloat((half << 23) + 0x3f800000u) * BitsToFloat((rest << 23) + 0x3f800000u);
}
// v * 2^n, n the integer in the low bits of `shifted` (see Exp); in two steps.
SPECMOEOFF_INLINE Vec ScaleByPowerOfTwo(Vec v, Vec shifted) {
  SPECMOEOFF_LANES(ScaleLane(v.lane[j], shifted.lane[j]));
}

SPECMOEOFF_INLINE float ReduceAdd(Vec v) {
  for (int width = 8; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) v.lane[j] += v.lane[j + width];
  }
  return v.lane[0];
}
SPECMOEOFF_INLINE float ReduceMax(Vec v) {
  for (int width = 8; width > 0; width /= 2) {
    for (int j = 0; j < width; ++j) v.lane[j] = MaxOf(v.lane[j], v.lane[j + width]);
  }
  return v.lane[0];
}

#undef SPECMOEOFF_LANES

}  // namespace scalar
}  // namespace specmoeoff
