// How products are cut into pieces for the pool; the arithmetic is in linear.inc.
#include "linear.h"

#include <algorithm>

#include "dispatch.h"
#include "thread_pool.h"
#include "top.h"

namespace specmoeoff {
namespace {

constexpr int64_t kPieceBytes = 128 << 10;  // weights per piece: long enough to hide its start
constexpr int64_t kPackedFloats = 512 << 10;
constexpr int64_t kLeastChunk = 48;        // rows below which weights would be read too often
constexpr int64_t kInlinePack = 64 << 10;  // floats that are not worth waking a thread for

}  // namespace

const LinearKernels& CurrentLinear(Activations activations, bool bfloat16_weights) {
  if (activations == Activations::kFloat32) {
    return Select(&kLinearScalar, SPECMOEOFF_IF_X86(&kLinearAvx2),
                  SPECMOEOFF_IF_X86(&kLinearAvx512));
  }
  return Select(&kLinearRoundedScalar, SPECMOEOFF_IF_X86(&kLinearRoundedAvx2),
                SPECMOEOFF_IF_X86(&kLinearRoundedAvx512), nullptr,
                bfloat16_weights ? SPECMOEOFF_IF_X86(&kLinearAvx512Bf16) : nullptr);
}

int64_t PieceColumns(int64_t n, int64_t column_bytes) {
  const int64_t by_bytes = RoundUp(kPieceBytes / std::max<int64_t>(column_bytes, 1), kColumnUnit);
  const int64_t by_threads = n / (4 * NumThreads()) / kColumnUnit * kColumnUnit;
  return std::max(kColumnUnit, std::min(by_bytes, by_threads));
}

int64_t ChunkRows(int64_t rows, int64_t floats_per_row, int64_t budget, int tile_rows) {
  const int64_t most = std::max(kLeastChunk, budget / std::max<int64_t>(floats_per_row, 1));
  const int64_t chunks = (rows + most - 1) / most;
  return RoundUp((rows + chunks - 1) / std::max<int64_t>(chunks, 1), tile_rows);
}

namespace {

// Packs the rows, as many at once as fit, and calls f(kernels, product, first row) for pieces of
// columns; f says where the results go.
template <class F>
void ForPieces(const float* x, int64_t rows, const Weight& weight, const float* bias,
               Activations activations, F f) {
  if (rows == 0 || weight.n == 0) return;
  const LinearKernels& kernels = CurrentLinear(activations, weight.kind == WeightKind::kBfloat16);
  const int64_t k = weight.k, n = weight.n, depth = RoundUp(k, 16);
  const int64_t chunk = ChunkRows(rows, depth, kPackedFloats, kernels.tile_rows);
  const int64_t columns = PieceColumns(n, weight.row_bytes());
  const int64_t threads = NumThreads();
  void* packed = CallScratch(std::min(chunk, rows) * depth * sizeof(float));
  for (int64_t first = 0; first < rows; first += chunk) {
    const int64_t count = std::min(chunk, rows - first);
    const float* xs = x + first * k;
    const int64_t tiles = (count + kernels.tile_rows - 1) / kernels.tile_rows;
    if (count * k <= kInlinePack) {
      kernels.pack(xs, k, nullptr, count, 0, tiles, packed);
    } else {
      ParallelFor(tiles, [&](int64_t tile) {
        kernels.pack(xs, k, nullptr, count, tile, tile + 1, packed);
      });
    }
    ParallelFor((n + columns - 1) / columns, [&](int64_t piece) {
      Product p{};
      p.packed = packed;
      p.rows = count;
      p.weight = &weight;
      p.begin = piece * columns;
      p.end = std::min(n, p.begin + columns);
      p.bias = bias;
      // Pieces are taken in order, so this thread's next one most likely is `threads` further.
      const int64_t next = p.begin + threads * columns;
      p.next = next + columns <= n ? weight.row(next) : nullptr;
      f(kernels, p, first);
    });
  }
}

}  // namespace

void Linear(const float* x, int64_t rows, const Weight& weight, const float* bias, float* out,
            Activations activations) {
  ForPieces(x, rows, weight, bias, activations,
            [&](const LinearKernels& kernels, Product& p, int64_t first) {
              p.y = out + first * weight.n + p.begin;
              p.y_stride = weight.n;
              kernels.product(p);
            });
}

void LinearTop(const float* x, int64_t rows, const Weight& weight, const float* bias, int64_t top,
               float* values, int32_t* ids, Activations activations) {
  TopRows best(rows, top, values, ids);
  ForPieces(x, rows, weight, bias, activations,
            [&](const LinearKernels& kernels, Product& p, int64_t first) {
              p.y_stride = p.end - p.begin;
              p.y = static_cast<float*>(ThreadScratch(p.rows * p.y_stride * sizeof(float)));
              kernels.product(p);
              best.Take(p.y, p.y_stride, first, p.rows, p.begin, p.end);
            });
}

}  // namespace specmoeoff
