// What is done to rows one by one: norms, rotary embedding, routing, changes of dtype.
#pragma once

#include <cstdint>

#include "weight.h"

namespace specmoeoff {

struct ElementwiseKernels {
  // out = x / sqrt(mean(x^2) + eps) * weight, one row of k.
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t k, float* out);
  // Rotates `heads` heads of size `head_dim` by cos and sin [half], first half with second half.
  void (*rope)(float* x, int64_t heads, int64_t head_dim, const float* cos, const float* sin,
               int64_t half);
  // Softmax over `experts` logits, the top_k largest, renormalised. `scratch` has `experts` floats.
  void (*route)(const float* logits, int64_t experts, int64_t top_k, int32_t* ids, float* weights,
                float* scratch);
  // Weight row n as float32.
  void (*widen)(const Weight& weight, int64_t n, float* out);
  // Weight row n as int8 of magnitude `most` at most, with a scale per `group` elements. `scratch`
  // has k floats.
  void (*quantize)(const Weight& weight, int64_t n, int64_t group, float most, int8_t* values,
                   float* scales, float* scratch);
  void (*to_bfloat16)(const float* x, int64_t count, uint16_t* out);
};

extern const ElementwiseKernels kElementwiseScalar;
extern const ElementwiseKernels kElementwiseAvx2;
extern const ElementwiseKernels kElementwiseAvx512;

void RmsNorm(const float* x, const float* weight, float eps, int64_t rows, int64_t k, float* out);
// x += y, then RmsNorm() of x.
void AddAndNorm(float* x, const float* y, const float* weight, float eps, int64_t rows, int64_t k,
                float* out);
void Rope(float* x, const float* cos, const float* sin, int64_t rows, int64_t heads,
          int64_t head_dim, int64_t half);
void Route(const float* logits, int64_t rows, int64_t experts, int64_t top_k, int32_t* ids,
           float* weights);
// Rows `ids` of the table (all rows, in order, if ids is null) as float32.
void Widen(const Weight& weight, const int32_t* ids, int64_t count, float* out);
void QuantizeInt8(const Weight& weight, int64_t group, int8_t* values, float* scales);
// values [n, k / 2], see weight.h.
void QuantizeInt4(const Weight& weight, int64_t group, uint8_t* values, float* scales);
void ToBfloat16(const float* x, int64_t count, uint16_t* out);

}  // namespace specmoeoff
