// A weight matrix as it lies in memory.
#pragma once

#include <cstdint>

namespace specmoeoff {

enum class WeightKind : int { kFloat32, kFloat16, kBfloat16, kInt8 };

// [n, k], rows one after the other, aligned to no more than their element type. The caller owns it.
struct Weight {
  WeightKind kind = WeightKind::kFloat32;
  const void* data = nullptr;
  int64_t n = 0;
  int64_t k = 0;
  // int8 only: scales [n, k / group]; group == k is one scale per row.
  const float* scales = nullptr;
  int64_t group = 0;

  int64_t element_bytes() const {
    return kind == WeightKind::kFloat32 ? 4 : kind == WeightKind::kInt8 ? 1 : 2;
  }
  int64_t row_bytes() const { return k * element_bytes(); }
  const char* row(int64_t i) const { return static_cast<const char*>(data) + i * row_bytes(); }
};

}  // namespace specmoeoff
