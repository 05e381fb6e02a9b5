// The eight tile registers of AMX. A tile has up to 16 rows of up to 64 bytes; its number is part
// of the instruction.
//
// Not through GCC's intrinsics: those of version 12 do not say that a load reads memory, so that
// what was stored just before may not be there yet.
#pragma once

#include <cstdint>

namespace specmoeoff {
namespace {

// As ldtilecfg reads it.
struct alignas(64) TileShapes {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  // A tile without rows or bytes must have neither.
  void Set(int tile, int64_t num_rows, int64_t bytes) {
    const bool used = num_rows > 0 && bytes > 0;
    rows[tile] = static_cast<uint8_t>(used ? num_rows : 0);
    row_bytes[tile] = static_cast<uint16_t>(used ? bytes : 0);
  }
};
static_assert(sizeof(TileShapes) == 64);

inline void UseShapes(const TileShapes& shapes) { asm volatile("ldtilecfg %0" ::"m"(shapes)); }
// Without it the tiles are saved and restored at every switch of threads.
inline void ReleaseTiles() { asm volatile("tilerelease"); }

template <int kTile>
inline void ZeroTile() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
inline void LoadTile(const void* p, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
inline void StoreTile(void* p, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(kTile) : "memory");
}
// sum[m][n] += dot of row m of a, pairs of bfloat16, and column n of b, as many pairs: the even
// products from zero in rising order, the odd ones likewise, their sum, then the old sum and that;
// one rounding each, denormals taken as zero.
template <int kSum, int kA, int kB>
inline void DotTiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSum), "i"(kA), "i"(kB));
}

}  // namespace
}  // namespace specmoeoff
