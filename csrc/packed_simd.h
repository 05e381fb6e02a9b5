// Runs of a packed bfloat16 matrix as float32 or as plain bfloat16; see packed.h for what they are.
#pragma once

#include "packed.h"
#include "simd.h"

namespace specmoeoff {
namespace SPECMOEOFF_TARGET {

#if SPECMOEOFF_TARGET_ID == SPECMOEOFF_IS_avx512

// Looks exponents up by a shuffle, which takes no notice of an index's higher bits.
struct PackedRuns {
  __m512i exponents;  // [16] in place for float32
  __m512i words;      // [32] in place for bfloat16, twice the sixteen

  SPECMOEOFF_INLINE PackedRuns For(const uint8_t* codes) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m512i twice = _mm512_cvtepu8_epi16(_mm256_broadcastsi128_si256(bytes));
    return {_mm512_slli_epi32(_mm512_cvtepu8_epi32(bytes), 23), _mm512_slli_epi16(twice, 7)};
  }

  // Elements 0 to 15 of a run, or the sixteen after them.
  template <int kHalf>
  inline __attribute__((always_inline)) Vec Sixteen(const uint8_t* run) const {
    __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(run)));
    if constexpr (kHalf == 1) codes = _mm512_srli_epi32(codes, 4);
    return Join(run + 16 + 16 * kHalf, _mm512_permutexvar_epi32(codes, exponents));
  }

  // A run as bfloat16.
  inline __attribute__((always_inline)) __m512i Words(const uint8_t* run) const {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(run));
    const __m512i codes = _mm512_cvtepu8_epi16(_mm256_broadcastsi128_si256(bytes));
    const __m512i shifts = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(4), 1);
    const __m512i exponent = _mm512_permutexvar_epi16(_mm512_srlv_epi16(codes, shifts), words);
    const __m512i rest =
        _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(run + 16)));
    const __m512i both = _mm512_mullo_epi16(rest, _mm512_set1_epi16(0x101));
    // 0xea: exponent | both & mask
    return _mm512_ternarylogic_epi32(both, _mm512_set1_epi16(static_cast<int16_t>(0x807f)),
                                     exponent, 0xea);
  }

  inline __attribute__((always_inline)) void Unpack(const uint8_t* run, float* out) const {
    Store(out, Sixteen<0>(run));
    Store(out + 16, Sixteen<1>(run));
  }
  inline __attribute__((always_inline)) void Unpack(const uint8_t* run, uint16_t* out) const {
    _mm512_storeu_si512(out, Words(run));
  }

 private:
  // Sign and mantissa of sixteen bytes around exponents: a byte goes to both upper ones of its
  // lane, and a mask leaves of each what belongs there.
  SPECMOEOFF_INLINE __m512 Join(const uint8_t* rest, __m512i exponent) {
    const __m512i bytes =
        _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(rest)));
    const __m512i order =
        _mm512_set_epi32(0x0f0f8080, 0x0e0e8080, 0x0d0d8080, 0x0c0c8080, 0x0b0b8080, 0x0a0a8080,
                         0x09098080, 0x08088080, 0x07078080, 0x06068080, 0x05058080, 0x04048080,
                         0x03038080, 0x02028080, 0x01018080, 0x00008080);
    const __m512i mask = _mm512_set1_epi32(static_cast<int32_t>(0x807f0000));
    return _mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(_mm512_shuffle_epi8(bytes, order), mask, exponent, 0xea));
  }
};

#elif SPECMOEOFF_TARGET_ID == SPECMOEOFF_IS_avx2

// A bfloat16 is two bytes, each an exponent's share, looked up, and the rest's.
struct PackedRuns {
  __m128i high;  // [16] exponents without their last bit
  __m128i low;   // [16] their last bits, on top of the byte

  SPECMOEOFF_INLINE PackedRuns For(const uint8_t* codes) {
    const __m128i exponents = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    const __m128i high = _mm_and_si128(_mm_srli_epi16(exponents, 1), _mm_set1_epi8(0x7f));
    const __m128i low = _mm_and_si128(_mm_slli_epi16(exponents, 7), _mm_set1_epi8(-128));
    return {high, low};
  }

  inline __attribute__((always_inline)) void Unpack(const uint8_t* run, uint16_t* out) const {
    const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(run));
    const __m128i four = _mm_set1_epi8(15);
    Join(run + 16, _mm_and_si128(codes, four), out);
    Join(run + 32, _mm_and_si128(_mm_srli_epi16(codes, 4), four), out + 16);
  }
  inline __attribute__((always_inline)) void Unpack(const uint8_t* run, float* out) const {
    uint16_t bits[32];
    Unpack(run, bits);
    Store(out, LoadBf16(bits));
    Store(out + 16, LoadBf16(bits + 16));
  }

 private:
  inline __attribute__((always_inline)) void Join(const uint8_t* rest, __m128i codes,
                                                  uint16_t* out) const {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rest));
    const __m128i sign = _mm_set1_epi8(-128);
    const __m128i upper = _mm_or_si128(_mm_shuffle_epi8(high, codes), _mm_and_si128(bytes, sign));
    const __m128i lower = _mm_or_si128(_mm_shuffle_epi8(low, codes), _mm_andnot_si128(sign, bytes));
    auto* const words = reinterpret_cast<__m128i*>(out);
    _mm_storeu_si128(words, _mm_unpacklo_epi8(lower, upper));
    _mm_storeu_si128(words + 1, _mm_unpackhi_epi8(lower, upper));
  }
};

#else

struct PackedRuns {
  const uint8_t* exponents;

  SPECMOEOFF_INLINE PackedRuns For(const uint8_t* codes) { return {codes}; }

  inline void Unpack(const uint8_t* run, float* out) const {
    for (int j = 0; j < kPackedRun; ++j) {
      const uint32_t code = j < 16 ? run[j] & 15u : run[j - 16] >> 4;
      const uint32_t rest = run[16 + j];
      const uint32_t bits = rest >> 7 << 31 | uint32_t{exponents[code]} << 23 | (rest & 0x7f) << 16;
      std::memcpy(out + j, &bits, sizeof(bits));
    }
  }
};

#endif

SPECMOEOFF_INLINE void PutBits(float* out, uint16_t bits) {
  const uint32_t wide = uint32_t{bits} << 16;
  std::memcpy(out, &wide, sizeof(wide));
}
SPECMOEOFF_INLINE void PutBits(uint16_t* out, uint16_t bits) { *out = bits; }

// Row n as [k] elements.
template <class Element>
SPECMOEOFF_INLINE void UnpackRow(const Weight& w, const PackedRuns& runs, int64_t n, Element* out) {
  const auto* from = reinterpret_cast<const uint8_t*>(w.row(n));
  const int64_t count = w.k / kPackedRun;
  for (int64_t i = 0; i < count; ++i) {
    runs.Unpack(from + i * kPackedRunBytes, out + i * kPackedRun);
  }
  ForPatches(w, n, [&](int64_t k, uint16_t bits) { PutBits(out + k, bits); });
}

}  // namespace SPECMOEOFF_TARGET
}  // namespace specmoeoff
