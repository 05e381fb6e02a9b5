// Products of bfloat16 on AMX tiles. Run on emulated instructions only so far, see dispatch.h.
//
// A step takes 32 elements of K for 32 weight rows and 32 rows of activations: two tiles each, four
// of sums, [weight row][activation row]. Weights are loaded as they lie; activations are packed as
// the instruction wants its second operand, [k / 32][16 pairs][rows of the tile][2]. A sum starts
// at zero and takes the steps in rising order, each by the instruction's own order within it.
#define SPECMOEOFF_TARGET avx512
#include "amx_tiles.h"
#include "linear.inc"

namespace specmoeoff {
namespace avx512 {
namespace {

constexpr int64_t kSide = 16;  // rows of a tile
constexpr int64_t kDeep = 32;  // elements of K in a step

SPECMOEOFF_INLINE int64_t Most(int64_t a, int64_t b) { return a > b ? a : b; }

// Elements [begin, begin + 16) of row r of a tile so high; after a row's last one, zeros up to a
// whole step.
SPECMOEOFF_INLINE void PutPairs(uint16_t* tile, int64_t height, int64_t r, int64_t begin, int64_t k,
                                Vec v) {
  uint16_t bits[kDeep] = {};
  StorePartialBf16(bits, v, kLanes);
  const int64_t last = begin + kLanes >= k ? RoundUp(begin + kLanes, kDeep) : begin + kLanes;
  for (int64_t i = begin; i < last; i += 2) {
    memcpy(tile + (i / 2 * height + r) * 2, bits + (i - begin), 2 * sizeof(uint16_t));
  }
}

void PackTiles(const float* x, int64_t k, const int32_t* rows, int64_t count, int64_t tile_begin,
               int64_t tile_end, void* packed) {
  for (int64_t tile = tile_begin; tile < tile_end; ++tile) {
    const int64_t first = tile * kSide;
    const int64_t height = Least(kSide, count - first);
    uint16_t* out = static_cast<uint16_t*>(packed) + first * RoundUp(k, kDeep);
    for (int64_t r = 0; r < height; ++r) {
      const float* row = x + (rows ? rows[first + r] : first + r) * k;
      for (int64_t i = 0; i < k; i += kLanes) {
        const int part = static_cast<int>(Least(kLanes, k - i));
        PutPairs(out, height, r, i, k, LoadPartial(row + i, part));
      }
    }
  }
}

void SwigluTiles(const float* gate, const float* up, int64_t y_stride, int64_t rows, int64_t begin,
                 int64_t end, int64_t width, void* packed) {
  for (int64_t t = 0; t < rows; ++t) {
    const int64_t first = t / kSide * kSide;
    uint16_t* tile = static_cast<uint16_t*>(packed) + first * RoundUp(width, kDeep);
    for (int64_t c = begin; c < end; c += kLanes) {
      const int part = static_cast<int>(Least(kLanes, end - c));
      const Vec g = LoadPartial(gate + t * y_stride + (c - begin), part);
      const Vec u = LoadPartial(up + t * y_stride + (c - begin), part);
      PutPairs(tile, Least(kSide, rows - first), t - first, c, width, Mul(Silu(g), u));
    }
  }
}

// One or two tiles of weights (4, 5) by one or two of activations (6, 7), into 0 to 3.
struct Block {
  const uint16_t* weights[2];
  int64_t weight_stride;  // bytes
  const uint16_t* x[2];
  int64_t x_stride[2];  // bytes
};

template <bool kTwoWeights, bool kTwoX>
SPECMOEOFF_INLINE void Step(const Block& b, int64_t weight_at, int64_t s) {
  LoadTile<6>(b.x[0] + s * kSide * (b.x_stride[0] / 2), b.x_stride[0]);
  LoadTile<4>(b.weights[0] + weight_at, b.weight_stride);
  DotTiles<0, 4, 6>();
  if constexpr (kTwoX) {
    LoadTile<7>(b.x[1] + s * kSide * (b.x_stride[1] / 2), b.x_stride[1]);
    DotTiles<1, 4, 7>();
  }
  if constexpr (kTwoWeights) {
    LoadTile<5>(b.weights[1] + weight_at, b.weight_stride);
    DotTiles<2, 5, 6>();
    if constexpr (kTwoX) DotTiles<3, 5, 7>();
  }
}

// `rest`: the weights after the last whole step, zeros after k, [2][16][32].
template <bool kTwoWeights, bool kTwoX>
void RunBlock(const Block& block, const uint16_t* rest, int64_t k, float* sums) {
  const int64_t full = k / kDeep;
  ZeroTile<0>();
  if constexpr (kTwoX) ZeroTile<1>();
  if constexpr (kTwoWeights) ZeroTile<2>();
  if constexpr (kTwoWeights && kTwoX) ZeroTile<3>();
  for (int64_t s = 0; s < full; ++s) Step<kTwoWeights, kTwoX>(block, s * kDeep, s);
  if (k % kDeep) {
    Block last = block;
    last.weights[0] = rest;
    last.weights[1] = rest + kSide * kDeep;
    last.weight_stride = kDeep * 2;
    Step<kTwoWeights, kTwoX>(last, 0, full);
  }
  constexpr int64_t kSize = kSide * kSide;
  constexpr int64_t kStride = kSide * 4;
  StoreTile<0>(sums, kStride);
  if constexpr (kTwoX) StoreTile<1>(sums + kSize, kStride);
  if constexpr (kTwoWeights) StoreTile<2>(sums + 2 * kSize, kStride);
  if constexpr (kTwoWeights && kTwoX) StoreTile<3>(sums + 3 * kSize, kStride);
}

// Shapes for `cols` weight rows and `rows` activation rows, up to 32 each.
void SetShapes(int64_t cols, int64_t rows) {
  TileShapes shapes;
  for (int i = 0; i < 2; ++i) {
    const int64_t height = Least(kSide, Most(0, cols - i * kSide));
    shapes.Set(4 + i, height, kDeep * 2);
    for (int j = 0; j < 2; ++j) {
      const int64_t width = Least(kSide, Most(0, rows - j * kSide));
      shapes.Set(2 * i + j, height, width * 4);
      shapes.Set(6 + j, kSide, width * 4);
    }
  }
  UseShapes(shapes);
}

void RunTiles(const Product& p) {
  const int64_t k = p.weight->k, depth = RoundUp(k, kDeep), whole = k / kDeep * kDeep;
  const auto* packed = static_cast<const uint16_t*>(p.packed);
  alignas(64) uint16_t rest[2 * kSide * kDeep] = {};
  alignas(64) float sums[4 * kSide * kSide];
  int64_t shaped_cols = 0, shaped_rows = 0;
  for (int64_t n = p.begin; n < p.end; n += 2 * kSide) {
    const auto* weights = static_cast<const uint16_t*>(p.weight->data) + n * k;
    const int64_t cols = Least(2 * kSide, p.end - n);
    for (int64_t c = 0; c < cols && whole < k; ++c) {
      memcpy(rest + c * kDeep, weights + c * k + whole, (k - whole) * sizeof(uint16_t));
    }
    for (int64_t t = 0; t < p.rows; t += 2 * kSide) {
      const int64_t rows = Least(2 * kSide, p.rows - t);
      if (cols != shaped_cols || rows != shaped_rows) SetShapes(cols, rows);
      shaped_cols = cols;
      shaped_rows = rows;
      const uint16_t* x = packed + t * depth;
      const Block block = {{weights, weights + kSide * k},
                           k * 2,
                           {x, x + kSide * depth},
                           {Least(kSide, rows) * 4, (rows - kSide) * 4}};
      if (cols > kSide) {
        rows > kSide ? RunBlock<true, true>(block, rest, k, sums)
                     : RunBlock<true, false>(block, rest, k, sums);
      } else {
        rows > kSide ? RunBlock<false, true>(block, rest, k, sums)
                     : RunBlock<false, false>(block, rest, k, sums);
      }
      for (int64_t r = 0; r < rows; ++r) {
        float* y = p.y + (t + r) * p.y_stride + (n - p.begin);
        for (int64_t c = 0; c < cols; ++c) {
          const int64_t tile = c / kSide * 2 + r / kSide;
          const float sum = sums[(tile * kSide + c % kSide) * kSide + r % kSide];
          y[c] = p.bias ? sum + p.bias[n + c] : sum;
        }
      }
    }
  }
  ReleaseTiles();
}

constexpr LinearKernels kTileKernels = {kSide, PackTiles, RunTiles, SwigluTiles, Accumulate};

}  // namespace
}  // namespace avx512

const LinearKernels kLinearAmx = avx512::kTileKernels;

}  // namespace specmoeoff
