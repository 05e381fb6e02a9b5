// How products are cut into pieces for the pool; the arithmetic is in linear.inc.
#include "linear.h"

#include <algorithm>

#include "dispatch.h"
#include "thread_pool.h"
#include "top.h"

namespace specmoeoff {
namespace {

constexpr int64_t kPieceBytes = 256 << 10;  // weights per piece: long enough to hide its start
constexpr int64_t kPackedFloats = 512 << 10;
constexpr int64_t kLeastChunk = 48;        // rows below which weights would be read too often
constexpr int64_t kPackFloats = 16 << 10;  // packed per piece; less is not worth sharing

}  // namespace

WeightForm FormOf(const Weight& weight) {
  switch (weight.kind) {
    case WeightKind::kBfloat16:
      return WeightForm::kPlainBfloat16;
    case WeightKind::kPackedBfloat16:
      return WeightForm::kBfloat16;
    case WeightKind::kInt8:
      return weight.group == weight.k || weight.group % 32 == 0 ? WeightForm::kInt8
                                                                : WeightForm::kAny;
    case WeightKind::kInt4:
      return WeightForm::kInt4;
    default:
      return WeightForm::kAny;
  }
}

WeightForm CommonForm(WeightForm a, WeightForm b) {
  if (a == b) return a;
  return std::min(a, b) >= WeightForm::kInt8 ? std::min(a, b) : WeightForm::kAny;
}

const LinearKernels& CurrentLinear(Activations activations, WeightForm form) {
  const bool is_bfloat16 = form >= WeightForm::kBfloat16;
  if (activations == Activations::kFloat32) {
    return Select(
        &kLinearScalar,
        is_bfloat16 ? SPECMOEOFF_IF_X86(&kLinearAvx2Bf16) : SPECMOEOFF_IF_X86(&kLinearAvx2),
        SPECMOEOFF_IF_X86(&kLinearAvx512));
  }
  const LinearKernels* pairs = SPECMOEOFF_IF_X86(&kLinearAvx512Bf16);
  if (form == WeightForm::kInt4) pairs = SPECMOEOFF_IF_X86(&kLinearAvx512Bf16Int4);
  if (form == WeightForm::kAny) pairs = nullptr;
  return Select(&kLinearRoundedScalar,
                is_bfloat16 ? SPECMOEOFF_IF_X86(&kLinearRoundedAvx2Bf16)
                            : SPECMOEOFF_IF_X86(&kLinearRoundedAvx2),
                SPECMOEOFF_IF_X86(&kLinearRoundedAvx512), nullptr, pairs,
                form == WeightForm::kPlainBfloat16 ? SPECMOEOFF_IF_X86(&kLinearAmx) : nullptr);
}

int64_t PieceColumns(int64_t n, int64_t column_bytes) {
  const int64_t threads = NumThreads();
  const int64_t by_bytes = RoundUp(kPieceBytes / std::max<int64_t>(column_bytes, 1), kColumnUnit);
  const int64_t by_threads = n / (4 * threads) / kColumnUnit * kColumnUnit;
  const int64_t most = std::max(kColumnUnit, std::min(by_bytes, by_threads));
  // As many pieces for each thread, if somewhat smaller ones allow it: 9 pieces take two threads
  // as long as 10.
  for (int64_t columns = most; 2 * columns > most; columns -= kColumnUnit) {
    if ((n + columns - 1) / columns % threads == 0) return columns;
  }
  return most;
}

int64_t ChunkRows(int64_t rows, int64_t floats_per_row, int64_t budget, int tile_rows) {
  const int64_t most = std::max(kLeastChunk, budget / std::max<int64_t>(floats_per_row, 1));
  const int64_t chunks = (rows + most - 1) / most;
  return RoundUp((rows + chunks - 1) / std::max<int64_t>(chunks, 1), tile_rows);
}

namespace {

// Columns of one of several products.
struct Part {
  const LinearOperand* operand;
  int64_t columns;  // of a piece
  int64_t pieces;
};

// Packs the rows, as many at once as fit, and calls f(product, index of its operand, first row) for
// pieces of columns of all operands; f says where the results go. The operands have one inner size,
// one kind and one form.
template <class F>
void ForPieces(const float* x, int64_t rows, const LinearOperand* operands, int64_t num_operands,
               Activations activations, F f) {
  if (rows == 0) return;
  const Weight& like = *operands[0].weight;
  const LinearKernels& kernels = CurrentLinear(activations, FormOf(like));
  const int64_t k = like.k, depth = RoundUp(k, 16);
  const int64_t chunk = ChunkRows(rows, depth, kPackedFloats, kernels.tile_rows);
  const int64_t threads = NumThreads();
  Part parts[kMostOperands];
  int64_t num_pieces = 0;
  for (int64_t i = 0; i < num_operands; ++i) {
    const Weight& weight = *operands[i].weight;
    const int64_t columns = PieceColumns(weight.n, weight.row_bytes());
    parts[i] = {&operands[i], columns, (weight.n + columns - 1) / columns};
    num_pieces += parts[i].pieces;
  }
  void* packed = CallScratch(std::min(chunk, rows) * depth * sizeof(float));
  for (int64_t first = 0; first < rows; first += chunk) {
    const int64_t count = std::min(chunk, rows - first);
    const int64_t tiles = (count + kernels.tile_rows - 1) / kernels.tile_rows;
    const int64_t tiles_at_once = std::max<int64_t>(1, kPackFloats / (kernels.tile_rows * depth));
    const int64_t pack_pieces = (tiles + tiles_at_once - 1) / tiles_at_once;
    int64_t pieces_packed = 0;
    const auto pack = [&](int64_t piece) {
      const int64_t begin = piece * tiles_at_once;
      kernels.pack(x + first * k, k, nullptr, count, begin, std::min(tiles, begin + tiles_at_once),
                   packed);
      CountDone(&pieces_packed);
    };
    const auto multiply = [&](int64_t piece) {
      WaitUntilAtLeast(&pieces_packed, pack_pieces);
      const Part* part = parts;
      for (; piece >= part->pieces; ++part) piece -= part->pieces;
      const Weight& weight = *part->operand->weight;
      Product p{};
      p.packed = packed;
      p.rows = count;
      p.weight = &weight;
      p.begin = piece * part->columns;
      p.end = std::min(weight.n, p.begin + part->columns);
      p.bias = part->operand->bias;
      // Pieces are taken in order, so this thread's next one most likely is `threads` further.
      const int64_t next = p.begin + threads * part->columns;
      p.next = next + part->columns <= weight.n ? weight.row(next) : nullptr;
      f(kernels, p, part - parts, first);
    };
    if (pack_pieces == 1) pack(0);
    const int64_t first_product = pack_pieces == 1 ? 0 : pack_pieces;
    ParallelFor(first_product + num_pieces, [&](int64_t piece) {
      piece < first_product ? pack(piece) : multiply(piece - first_product);
    });
  }
}

}  // namespace

void Linear(const float* x, int64_t rows, const LinearOperand* operands, int64_t num_operands,
            float* const* outs, Activations activations) {
  ForPieces(x, rows, operands, num_operands, activations,
            [&](const LinearKernels& kernels, Product& p, int64_t i, int64_t first) {
              p.y = outs[i] + first * p.weight->n + p.begin;
              p.y_stride = p.weight->n;
              kernels.product(p);
            });
}

void LinearTop(const float* x, int64_t rows, const LinearOperand& operand, int64_t top,
               float* values, int32_t* ids, Activations activations) {
  TopRows best(rows, top, values, ids);
  ForPieces(x, rows, &operand, 1, activations,
            [&](const LinearKernels& kernels, Product& p, int64_t, int64_t first) {
              p.y_stride = p.end - p.begin;
              p.y = static_cast<float*>(ThreadScratch(p.rows * p.y_stride * sizeof(float)));
              kernels.product(p);
              best.Take(p.y, p.y_stride, first, p.rows, p.begin, p.end);
            });
}

}  // namespace specmoeoff
