// Products of int8 with int8, for draft models: activations are rounded too,
// sums are integers.
//
// A row of activations becomes int8 by its largest magnitude: scale = max|x| /
// 127, q = x / scale to the nearest even. A product is the exact integer sum of
// q * w, then
//
//     y = float(sum) * weight scale * row scale + bias
//
// from left to right, each step rounded. Integer sums have no order, so a
// result depends on its row and its weights alone, as in linear.h. A row with a
// NaN or an infinity has scale NaN and gives a row of NaN.
//
// Four neighbours along K of sixteen weight rows are one 64-byte block: sixteen
// sums grow side by side, four products at a time, which is what AVX512-VNNI
// does in one instruction. Activations are packed into tiles of rows (see
// TileHeight), each tile [k / 4][rows of the tile][4].
#pragma once

#include <cstdint>

#include "weight.h"

namespace specmoeoff {

// Weight rows in a block, and columns in a piece of work are a multiple of it.
inline constexpr int64_t kInt8Block = 16;
// Sums stay below 2^31, and those of a row alone below 2^24.
inline constexpr int64_t kInt8MostK = 128 << 10;

inline int64_t CeilDivide(int64_t value, int64_t divisor) {
  return (value + divisor - 1) / divisor;
}

// [n, k] as blocks [ceil(n / 16)][ceil(k / 4)][16][4], zeros beyond n and k.
// The caller owns it.
struct Int8DotWeight {
  const int8_t* packed = nullptr;
  const float* scales = nullptr;  // [n]
  int64_t n = 0;
  int64_t k = 0;

  int64_t steps() const { return CeilDivide(k, 4); }
  // Where the rows of a block begin; row is a multiple of 16.
  const int8_t* block(int64_t row) const { return packed + row * steps() * 4; }
};

// `rows` rounded rows of activations, tile by tile.
struct Int8Rows {
  int8_t* packed;  // rows * steps * 4
  float* scales;   // [rows]
  int32_t* sums;   // [rows], of the rounded values
  int64_t rows;
};

// Rows of every tile but the last, which may be lower: equal tiles of at most
// `most` rows.
inline int64_t TileHeight(int64_t rows, int64_t most) {
  return CeilDivide(rows, CeilDivide(rows, most));
}

// y[t * y_stride + n - begin] for all rows t and weight rows n in [begin, end).
struct Int8Product {
  Int8Rows x;
  const Int8DotWeight* weight;
  int64_t begin;      // a multiple of 16
  int64_t end;        // a multiple of 16, or weight->n
  const float* bias;  // or null
  float* y;
  int64_t y_stride;
  const int8_t* next;  // blocks that will be read after these (a hint), or null
};

struct Int8DotKernels {
  int tile_rows;
  // Rounds and packs tile `tile` of the out.rows rows x[rows[i]] (x[i] if rows
  // is null).
  void (*quantize)(const float* x, int64_t k, const int32_t* rows, int64_t tile,
                   const Int8Rows& out);
  void (*product)(const Int8Product& product);
  // gate = silu(gate) * up, [rows, columns] with strides in floats.
  void (*swiglu)(float* gate, int64_t gate_stride, const float* up, int64_t up_stride, int64_t rows,
                 int64_t columns);
};

extern const Int8DotKernels kInt8DotScalar;
extern const Int8DotKernels kInt8DotAvx2;
extern const Int8DotKernels kInt8DotAvx512;
extern const Int8DotKernels kInt8DotAvx512Vnni;

// out [rows, weight.n] = x [rows, weight.k] @ weight^T + bias
void Int8DotLinear(const float* x, int64_t rows, const Int8DotWeight& weight, const float* bias,
                   float* out);

// The `top` largest of each row of Int8DotLinear()'s out, as LinearTop() gives them.
void Int8DotLinearTop(const float* x, int64_t rows, const Int8DotWeight& weight, const float* bias,
                      int64_t top, float* values, int32_t* ids);

struct Int8DotExpert {
  Int8DotWeight gate;  // [I, K]
  Int8DotWeight up;    // [I, K]
  Int8DotWeight down;  // [K, I]
};

// ExpertFfn of linear.h; silu(gate x) * up x is rounded like x is.
void Int8DotExpertFfn(const float* x, const Int8DotExpert* experts, int64_t num_experts,
                      const int32_t* offsets, const int32_t* rows, const float* row_weights,
                      float* out);

// Rounds a matrix, row by row like Quantize() of elementwise.h with one scale
// per row, and packs it. Takes a quarter megabyte beside the result.
void PackInt8Dot(const Weight& weight, int8_t* packed, float* scales);

// Rows `ids` (all rows, in order, if ids is null) as float32.
void WidenInt8Dot(const Int8DotWeight& weight, const int32_t* ids, int64_t count, float* out);

}  // namespace specmoeoff
