// Sixteen float32 lanes, the same on every target, so that one kernel body serves them all.
//
// A <family>_<target>.cc defines SPECMOEOFF_TARGET (scalar, avx2 or avx512), includes this and then
// the body. Everything lives in the target's own namespace: an inline function shared between files
// of different flags could reach a CPU that lacks the instructions. For the same reason bodies use
// no standard library templates.
//
// Semantics all targets share, bit for bit: Fma rounds once, nothing else is fused; Min and Max
// return the second operand if either is NaN; ReduceAdd and ReduceMax combine lane j with j + 8,
// then j + 4, j + 2, j + 1.
#pragma once

#include <cstdint>
#include <cstring>

#define SPECMOEOFF_INLINE static inline __attribute__((always_inline, unused))

#define SPECMOEOFF_IS_scalar 1
#define SPECMOEOFF_IS_avx2 2
#define SPECMOEOFF_IS_avx512 3
#define SPECMOEOFF_CAT2(a, b) a##b
#define SPECMOEOFF_CAT(a, b) SPECMOEOFF_CAT2(a, b)
#define SPECMOEOFF_TARGET_ID SPECMOEOFF_CAT(SPECMOEOFF_IS_, SPECMOEOFF_TARGET)

#if SPECMOEOFF_TARGET_ID == SPECMOEOFF_IS_avx512
#include "simd_avx512.h"
#elif SPECMOEOFF_TARGET_ID == SPECMOEOFF_IS_avx2
#include "simd_avx2.h"
#else
#include "simd_scalar.h"
#endif

namespace specmoeoff {
namespace SPECMOEOFF_TARGET {

constexpr int kLanes = 16;

// e^x per lane to about 1 ulp: 0 far below, inf far above, denormals kept, NaN stays NaN.
SPECMOEOFF_INLINE Vec Exp(Vec x) {
  x = Min(Set1(89.0f), Max(Set1(-104.0f), x));
  const Vec magic = Set1(12582912.0f);  // adding 1.5 * 2^23 rounds to an integer in the low bits
  const Vec shifted = Fma(x, Set1(1.44269504f), magic);
  const Vec n = Sub(shifted, magic);
  Vec r = Fma(n, Set1(-0.693359375f), x);
  r = Fma(n, Set1(2.12194440e-4f), r);
  Vec p = Set1(1.9875691500e-4f);
  p = Fma(p, r, Set1(1.3981999507e-3f));
  p = Fma(p, r, Set1(8.3334519073e-3f));
  p = Fma(p, r, Set1(4.1665795894e-2f));
  p = Fma(p, r, Set1(1.6666665459e-1f));
  p = Fma(p, r, Set1(5.0000001201e-1f));
  p = Fma(p, Mul(r, r), r);
  p = Add(p, Set1(1.0f));
  // 2^n in two factors, so that denormal results and 2^128 come out by ordinary rounding.
  return ScaleByPowerOfTwo(p, shifted);
}

// x / (1 + e^-x)
SPECMOEOFF_INLINE Vec Silu(Vec x) { return Div(x, Add(Set1(1.0f), Exp(Sub(Set1(0.0f), x)))); }

}  // namespace SPECMOEOFF_TARGET
}  // namespace specmoeoff
