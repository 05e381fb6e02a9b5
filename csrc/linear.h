// Matrix products with a fixed order of summation, and what is built of them.
//
// Every sum over the inner dimension has 16 partials: partial j takes the elements k = j mod 16 in
// rising order with fused multiply-adds; then lane j + (j + 8), + (j + 4), + (j + 2), + (j + 1). So
// a result depends on its row and its weights alone: not on other rows, threads, tiles or CPU
// target.
//
// Activations are packed first: tiles of at most `tile_rows` rows, heights as equal as can be, each
// tile [k / 16][rows of the tile][16], zeros after k. One pointer walks a tile, whatever the rows'
// stride. For bfloat16 weights AVX2 has of each 16 those of even k first; the sums are the same.
//
// Activations may be rounded to bfloat16 as they are packed. They stay float32 and the order is the
// one above, except on a CPU that multiplies bfloat16 itself, for weights of bfloat16, int8 with a
// scale per row or per multiple of 32, and int4: there packing keeps bfloat16, 32 elements in place
// of 16, and partial j takes the pairs (2 j, 2 j + 1) mod 32 in rising order, by an instruction
// that adds the odd product, then the even one, each with one rounding, denormals taken as zero;
// then the partials as above. Integers with scales per group are multiplied as they are: partial j
// of each 32 starts from zero and is added to the row's with a multiply-add by the scale. Of int4
// the pairs are those of even elements of each 16, then those of odd ones. AMX has its own order
// again: a sum takes 32 elements at a time, in rising order, and each time what its instruction
// makes of them. So bits differ between such a target and the others, but still depend on a row and
// its weights alone; an expert's three matrices count as one, since they share a packed form. AMX
// packs its own way too, see linear_amx.cc.
#pragma once

#include <cstddef>
#include <cstdint>

#include "weight.h"

namespace specmoeoff {

inline int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Pieces of work are a multiple of this many columns.
inline constexpr int64_t kColumnUnit = 16;

// y[t * y_stride + n - begin] = dot(x_t, weight row n) + bias[n] for rows t and n in [begin, end).
struct Product {
  const void* packed;  // packed activations, `rows` of them, inner size weight->k
  int64_t rows;
  const Weight* weight;
  int64_t begin;
  int64_t end;
  const float* bias;  // or null
  float* y;
  int64_t y_stride;
  const char* next;  // weight rows that will be read after these (a hint), or null
};

struct LinearKernels {
  int tile_rows;
  // Packs tiles [tile_begin, tile_end) of `count` rows x[rows[i]] (x[i] if rows is null).
  void (*pack)(const float* x, int64_t k, const int32_t* rows, int64_t count, int64_t tile_begin,
               int64_t tile_end, void* packed);
  void (*product)(const Product& product);
  // Writes silu(gate) * up, columns [begin, end) of `width`, into packed form. gate and up are
  // [rows, y_stride]; begin is a multiple of 16.
  void (*swiglu)(const float* gate, const float* up, int64_t y_stride, int64_t rows, int64_t begin,
                 int64_t end, int64_t width, void* packed);
  // out[c] += weight * y[c]
  void (*accumulate)(const float* y, float weight, int64_t count, float* out);
};

extern const LinearKernels kLinearScalar;
extern const LinearKernels kLinearAvx2;
extern const LinearKernels kLinearAvx512;
// The same, activations rounded to bfloat16.
extern const LinearKernels kLinearRoundedScalar;
extern const LinearKernels kLinearRoundedAvx2;
extern const LinearKernels kLinearRoundedAvx512;
// For bfloat16 weights only, packed ones too.
extern const LinearKernels kLinearAvx2Bf16;
extern const LinearKernels kLinearRoundedAvx2Bf16;
// The same and int8 with a scale per row or per groups of whole runs of 32.
extern const LinearKernels kLinearAvx512Bf16;
// For int4 only.
extern const LinearKernels kLinearAvx512Bf16Int4;
// For plain bfloat16 weights only.
extern const LinearKernels kLinearAmx;

enum class Activations { kFloat32, kBfloat16 };

// What all weights have in common that one packed form of activations is to be multiplied with.
// Two forms from kInt8 on have the lower one in common, others that differ have kAny.
enum class WeightForm { kAny, kInt4, kInt8, kBfloat16, kPlainBfloat16 };

WeightForm FormOf(const Weight& weight);
WeightForm CommonForm(WeightForm a, WeightForm b);

// The kernels that run now, for weights of that form.
const LinearKernels& CurrentLinear(Activations activations, WeightForm form);

// Columns per piece of work, a multiple of kColumnUnit, for n columns of so many weight bytes each;
// where that is possible, so that each thread gets as many pieces.
int64_t PieceColumns(int64_t n, int64_t column_bytes);

// Packed activations take at most four bytes for each of RoundUp(k, 16) elements, in any form.
//
// Rows to pack at once, a multiple of tile_rows, so that they take about `budget` floats.
int64_t ChunkRows(int64_t rows, int64_t floats_per_row, int64_t budget, int tile_rows);

inline constexpr int64_t kMostOperands = 8;

struct LinearOperand {
  const Weight* weight;
  const float* bias;  // or null
};

// outs[i] [rows, weight.n] = x [rows, weight.k] @ weight^T + bias for each operand, at most
// kMostOperands of one inner size, kind and form.
void Linear(const float* x, int64_t rows, const LinearOperand* operands, int64_t num_operands,
            float* const* outs, Activations activations);

// The `top` largest of each row of Linear()'s out, without ever having out: values and ids are
// [rows, top], see top.h for their order. top is 1 to min(kMostTop, weight.n).
void LinearTop(const float* x, int64_t rows, const LinearOperand& operand, int64_t top,
               float* values, int32_t* ids, Activations activations);

struct Expert {
  Weight gate;  // [I, K]
  Weight up;    // [I, K]
  Weight down;  // [K, I]
};

// For each expert i and the entries e of rows[offsets[i]:offsets[i + 1]]:
// out[rows[e]] += row_weights[e] * down(silu(gate x) * up x), x = x[rows[e]]; experts in order.
// rows null: 0, 1, 2, ... ; row_weights null: ones.
void ExpertFfn(const float* x, const Expert* experts, int64_t num_experts, const int32_t* offsets,
               const int32_t* rows, const float* row_weights, float* out, Activations activations);

}  // namespace specmoeoff
