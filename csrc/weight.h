// A weight matrix as it lies in memory.
#pragma once

#include <cstdint>

namespace specmoeoff {

enum class WeightKind : int { kFloat32, kFloat16, kBfloat16, kInt8, kInt4, kPackedBfloat16 };

// Of each 32 elements of a row of int4, 16 bytes: byte j has element j in its low four bits and
// element 16 + j in its high ones, as value + 8. k is a multiple of the group, and that of 32.
inline constexpr int64_t kInt4Run = 32;
inline bool IsInt4Group(int64_t group) { return group == 32 || group == 64 || group == 128; }

// [n, k], rows one after the other, aligned to no more than their element type. The caller owns it.
struct Weight {
  WeightKind kind = WeightKind::kFloat32;
  const void* data = nullptr;
  int64_t n = 0;
  int64_t k = 0;
  // int8 and int4 only: scales [n, k / group]; group == k is one scale per row.
  const float* scales = nullptr;
  int64_t group = 0;

  int64_t row_bytes() const {
    switch (kind) {
      case WeightKind::kFloat32:
        return 4 * k;
      case WeightKind::kFloat16:
      case WeightKind::kBfloat16:
        return 2 * k;
      case WeightKind::kInt8:
        return k;
      case WeightKind::kInt4:
        return k / 2;
      case WeightKind::kPackedBfloat16:  // see packed.h
        return k / 32 * 48;
    }
    return 0;
  }
  const char* row(int64_t i) const { return static_cast<const char*>(data) + i * row_bytes(); }
};

}  // namespace specmoeoff
