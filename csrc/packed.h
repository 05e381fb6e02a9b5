// A bfloat16 matrix in twelve bits an element, without loss.
//
// The exponents of trained weights have two and a half bits of entropy in their eight. So a
// matrix's sixteen commonest exponents get a code of four bits; sign and mantissa stay as they are.
// The few other elements (one in ten thousand) are patches: their place and all their bits.
//
// In memory, little-endian, at any address:
//   header, 64 bytes: the exponents of codes 0 to 15, uint8; the number of patches, uint32; zeros
//   rows, n of k / 32 runs of 48 bytes: codes of 32 elements, byte j with element j in its low
//     four bits and element 16 + j in its high ones; then a byte each: sign << 7 | mantissa
//   first patch of each row, and the end: uint32, n + 1
//   patches, by row and column: uint32, column << 16 | bits
// A Weight's `data` points at the rows. Patches that contradict this are left out, so that no
// content leads outside of the memory.
#pragma once

#include <cstdint>
#include <cstring>

#include "weight.h"

namespace specmoeoff {

inline constexpr int64_t kPackedHeaderBytes = 64;
inline constexpr int64_t kPackedRun = 32;  // elements
inline constexpr int64_t kPackedRunBytes = 48;
inline constexpr int64_t kPackedMostK = 16384;  // a few rows fit a thread's stack unpacked

inline __attribute__((always_inline)) uint32_t PackedWord(const void* words, int64_t index) {
  uint32_t word;
  std::memcpy(&word, static_cast<const char*>(words) + 4 * index, sizeof(word));
  return word;
}

inline const uint8_t* PackedExponents(const Weight& w) {
  return static_cast<const uint8_t*>(w.data) - kPackedHeaderBytes;
}
inline int64_t PackedPatches(const void* header) { return PackedWord(header, 4); }

// Bytes of all for so many patches.
inline int64_t PackedBytes(int64_t n, int64_t k, int64_t patches) {
  return kPackedHeaderBytes + n * (k / kPackedRun) * kPackedRunBytes + 4 * (n + 1 + patches);
}

// Calls f(column, bits) for the patches of row n.
template <class F>
inline void ForPatches(const Weight& w, int64_t n, F f) {
  const char* const starts = w.row(w.n);
  const char* const patches = starts + 4 * (w.n + 1);
  const int64_t count = PackedPatches(PackedExponents(w));
  int64_t end = PackedWord(starts, n + 1);
  if (end > count) end = count;
  for (int64_t i = PackedWord(starts, n); i < end; ++i) {
    const uint32_t patch = PackedWord(patches, i);
    if (patch >> 16 < w.k) f(patch >> 16, static_cast<uint16_t>(patch));
  }
}

// Asks for what ForPatches() will look at some rows after row n: it lies apart from the rows, so
// nothing else would.
inline __attribute__((always_inline)) void PrefetchPatches(const Weight& w, int64_t n) {
  constexpr int64_t kAhead = 128;  // bytes
  const char* const start = w.row(w.n) + 4 * n;
  __builtin_prefetch(start + kAhead);
  __builtin_prefetch(w.row(w.n) + 4 * (w.n + 1) + 4 * int64_t{PackedWord(start, 0)} + kAhead);
}

}  // namespace specmoeoff
