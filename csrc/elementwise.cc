// How rows are cut into pieces for the pool; the arithmetic is in elementwise.inc.
#include "elementwise.h"

#include <algorithm>

#include "dispatch.h"
#include "thread_pool.h"

namespace specmoeoff {
namespace {

constexpr int64_t kPieceFloats = 16 << 10;  // some microseconds of work

const ElementwiseKernels& Current() {
  return Select(&kElementwiseScalar, SPECMOEOFF_IF_X86(&kElementwiseAvx2),
                SPECMOEOFF_IF_X86(&kElementwiseAvx512));
}

// Calls f(row) for every row, rows of so many floats.
template <class F>
void ForRows(int64_t rows, int64_t floats, F f) {
  const int64_t each = std::max<int64_t>(1, kPieceFloats / std::max<int64_t>(floats, 1));
  ParallelFor((rows + each - 1) / each, [&](int64_t piece) {
    const int64_t end = std::min(rows, (piece + 1) * each);
    for (int64_t row = piece * each; row < end; ++row) f(row);
  });
}

float* Floats(int64_t count) { return static_cast<float*>(ThreadScratch(count * sizeof(float))); }

}  // namespace

void RmsNorm(const float* x, const float* weight, float eps, int64_t rows, int64_t k, float* out) {
  const ElementwiseKernels& kernels = Current();
  ForRows(rows, k, [&](int64_t t) { kernels.rms_norm(x + t * k, weight, eps, k, out + t * k); });
}

void AddAndNorm(float* x, const float* y, const float* weight, float eps, int64_t rows, int64_t k,
                float* out) {
  const ElementwiseKernels& kernels = Current();
  ForRows(rows, k, [&](int64_t t) {
    float* const row = x + t * k;
    for (int64_t i = 0; i < k; ++i) row[i] += y[t * k + i];
    kernels.rms_norm(row, weight, eps, k, out + t * k);
  });
}

void Rope(float* x, const float* cos, const float* sin, int64_t rows, int64_t heads,
          int64_t head_dim, int64_t half) {
  const ElementwiseKernels& kernels = Current();
  const int64_t width = heads * head_dim;
  ForRows(rows, width, [&](int64_t t) {
    kernels.rope(x + t * width, heads, head_dim, cos + t * half, sin + t * half, half);
  });
}

void Route(const float* logits, int64_t rows, int64_t experts, int64_t top_k, int32_t* ids,
           float* weights) {
  const ElementwiseKernels& kernels = Current();
  ForRows(rows, experts * top_k, [&](int64_t t) {
    kernels.route(logits + t * experts, experts, top_k, ids + t * top_k, weights + t * top_k,
                  Floats(experts));
  });
}

void Widen(const Weight& weight, const int32_t* ids, int64_t count, float* out) {
  const ElementwiseKernels& kernels = Current();
  ForRows(count, weight.k,
          [&](int64_t t) { kernels.widen(weight, ids ? ids[t] : t, out + t * weight.k); });
}

void QuantizeInt8(const Weight& weight, int64_t group, int8_t* values, float* scales) {
  const ElementwiseKernels& kernels = Current();
  const int64_t groups = weight.k / group;
  ForRows(weight.n, weight.k, [&](int64_t n) {
    kernels.quantize(weight, n, group, 127.0f, values + n * weight.k, scales + n * groups,
                     Floats(weight.k));
  });
}

void QuantizeInt4(const Weight& weight, int64_t group, uint8_t* values, float* scales) {
  const ElementwiseKernels& kernels = Current();
  const int64_t k = weight.k, groups = k / group;
  ForRows(weight.n, k, [&](int64_t n) {
    float* floats = static_cast<float*>(ThreadScratch(k * (sizeof(float) + 1)));
    auto* wide = reinterpret_cast<int8_t*>(floats + k);
    kernels.quantize(weight, n, group, 7.0f, wide, scales + n * groups, floats);
    uint8_t* row = values + n * (k / 2);
    for (int64_t i = 0; i < k; i += kInt4Run) {
      for (int64_t j = 0; j < kInt4Run / 2; ++j) {
        const int low = wide[i + j] + 8, high = wide[i + kInt4Run / 2 + j] + 8;
        row[i / 2 + j] = static_cast<uint8_t>(low | high << 4);
      }
    }
  });
}

void ToBfloat16(const float* x, int64_t count, uint16_t* out) {
  const ElementwiseKernels& kernels = Current();
  const int64_t pieces = (count + kPieceFloats - 1) / kPieceFloats;
  ParallelFor(pieces, [&](int64_t piece) {
    const int64_t begin = piece * kPieceFloats;
    kernels.to_bfloat16(x + begin, std::min(kPieceFloats, count - begin), out + begin);
  });
}

}  // namespace specmoeoff
