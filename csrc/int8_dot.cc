// How int8 products are cut into pieces for the pool; the arithmetic is in
// int8_dot.inc.
#include "int8_dot.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "dispatch.h"
#include "elementwise.h"
#include "linear.h"
#include "thread_pool.h"
#include "top.h"

namespace specmoeoff {
namespace {

constexpr int64_t kScratchBytes = 2 << 20;  // of the rows that are worked on at once
constexpr int64_t kLeastChunk = 48;         // rows below which weights would be read too often
constexpr int64_t kPieceUnit = 64;          // columns: four blocks, the widest tile
constexpr int64_t kInlineFloats = 8 << 10;  // not worth waking a thread for
constexpr int64_t kPackBytes = 256 << 10;   // int8 values on their way into blocks
constexpr int64_t kWidenFloats = 16 << 10;  // per piece

const Int8DotKernels& Current() {
  return Select(&kInt8DotScalar, SPECMOEOFF_IF_X86(&kInt8DotAvx2),
                SPECMOEOFF_IF_X86(&kInt8DotAvx512), SPECMOEOFF_IF_X86(&kInt8DotAvx512Vnni));
}

int64_t ColumnsPerPiece(const Int8DotWeight& weight, int64_t weights_at_once) {
  return RoundUp(PieceColumns(weight.n, weights_at_once * weight.k), kPieceUnit);
}

int64_t RoundedBytes(int64_t k) { return CeilDivide(k, 4) * 4; }

// Hands out parts of one stretch of memory, each aligned to a cache line.
class Carver {
 public:
  explicit Carver(void* memory) : next_(static_cast<char*>(memory)) {}

  template <class T>
  T* Take(int64_t count) {
    T* taken = reinterpret_cast<T*>(next_);
    next_ += RoundUp(count * static_cast<int64_t>(sizeof(T)), 64);
    return taken;
  }

 private:
  char* next_;
};

// Bytes of Int8Rows of so many rows, and of as many of these as `parts` splits
// them into.
int64_t RowsBytes(int64_t rows, int64_t k, int64_t parts) {
  return rows * (RoundedBytes(k) + 8) + parts * 3 * 64;
}

Int8Rows TakeRows(Carver& carver, int64_t rows, int64_t k) {
  Int8Rows taken{};
  taken.packed = carver.Take<int8_t>(rows * RoundedBytes(k));
  taken.scales = carver.Take<float>(rows);
  taken.sums = carver.Take<int32_t>(rows);
  taken.rows = rows;
  return taken;
}

int64_t Tiles(const Int8DotKernels& kernels, int64_t rows) {
  return CeilDivide(rows, TileHeight(rows, kernels.tile_rows));
}

// ParallelFor, or a plain loop where `floats` of input are all there is to do.
template <class F>
void ForTiles(int64_t tiles, int64_t floats, F f) {
  if (floats > kInlineFloats) return ParallelFor(tiles, f);
  for (int64_t tile = 0; tile < tiles; ++tile) f(tile);
}

// The blocks that this thread most likely reads after the piece that begins at
// `begin`: pieces are taken in order.
const int8_t* NextBlocks(const Int8DotWeight& weight, int64_t begin, int64_t columns) {
  const int64_t next = begin + NumThreads() * columns;
  return next + columns <= weight.n ? weight.block(next) : nullptr;
}

Int8Product PieceOf(const Int8Rows& x, const Int8DotWeight& weight, int64_t piece,
                    int64_t columns) {
  Int8Product p{};
  p.x = x;
  p.weight = &weight;
  p.begin = piece * columns;
  p.end = std::min(weight.n, p.begin + columns);
  p.next = NextBlocks(weight, p.begin, columns);
  return p;
}

}  // namespace

namespace {

// Rounds the rows, as many at once as fit, and calls f(kernels, product, first row) for pieces
// of columns; f says where the results go.
template <class F>
void ForPieces(const float* x, int64_t rows, const Int8DotWeight& weight, const float* bias, F f) {
  if (rows == 0 || weight.n == 0) return;
  const Int8DotKernels& kernels = Current();
  const int64_t k = weight.k, n = weight.n;
  const int64_t most = std::min(rows, std::max(kLeastChunk, kScratchBytes / k));
  const int64_t columns = ColumnsPerPiece(weight, 1);
  void* memory = CallScratch(RowsBytes(most, k, 1));
  for (int64_t first = 0; first < rows; first += most) {
    const int64_t count = std::min(most, rows - first);
    Carver carver(memory);
    const Int8Rows packed = TakeRows(carver, count, k);
    ForTiles(Tiles(kernels, count), count * k,
             [&](int64_t tile) { kernels.quantize(x + first * k, k, nullptr, tile, packed); });
    ParallelFor(CeilDivide(n, columns), [&](int64_t piece) {
      Int8Product p = PieceOf(packed, weight, piece, columns);
      p.bias = bias;
      f(kernels, p, first);
    });
  }
}

}  // namespace

void Int8DotLinear(const float* x, int64_t rows, const Int8DotWeight& weight, const float* bias,
                   float* out) {
  ForPieces(x, rows, weight, bias,
            [&](const Int8DotKernels& kernels, Int8Product& p, int64_t first) {
              p.y = out + first * weight.n + p.begin;
              p.y_stride = weight.n;
              kernels.product(p);
            });
}

void Int8DotLinearTop(const float* x, int64_t rows, const Int8DotWeight& weight, const float* bias,
                      int64_t top, float* values, int32_t* ids) {
  TopRows best(rows, top, values, ids);
  ForPieces(x, rows, weight, bias,
            [&](const Int8DotKernels& kernels, Int8Product& p, int64_t first) {
              p.y_stride = p.end - p.begin;
              p.y = static_cast<float*>(ThreadScratch(p.x.rows * p.y_stride * sizeof(float)));
              kernels.product(p);
              best.Take(p.y, p.y_stride, first, p.x.rows, p.begin, p.end);
            });
}

namespace {

// Some rows of one expert.
struct Part {
  const Int8DotExpert* expert;
  int64_t first;  // entry of rows and row_weights
  int64_t count;
  Int8Rows x;
  Int8Rows rounded;  // of hidden
  float* hidden;     // [count, I]
};

struct TileOfPart {
  const Part* part;
  int64_t tile;
};

// Four rounds over the parts that fit the scratch memory, each with the whole
// pool: round x; gate, up and their SwiGLU; round that; down. A piece of the
// last round is a range of columns of every part, one after the other, so
// additions to a row keep the order of the experts.
class Int8DotRun {
 public:
  Int8DotRun(const float* x, const Int8DotExpert& like, const int32_t* rows,
             const float* row_weights, float* out)
      : kernels_(Current()),
        accumulate_(CurrentLinear(Activations::kFloat32, WeightForm::kAny).accumulate),
        x_(x),
        rows_(rows),
        row_weights_(row_weights),
        out_(out),
        width_(like.gate.k),
        inner_(like.gate.n),
        hidden_columns_(ColumnsPerPiece(like.gate, 2)),
        down_columns_(ColumnsPerPiece(like.down, 1)),
        most_rows_(std::max(kLeastChunk, kScratchBytes / BytesPerRow())) {}

  void Add(const Int8DotExpert& expert, int64_t first, int64_t end) {
    while (first < end) {
      if (num_rows_ == most_rows_) Run();
      const int64_t count = std::min(end - first, most_rows_ - num_rows_);
      parts_.push_back({&expert, first, count, {}, {}, nullptr});
      num_rows_ += count;
      first += count;
    }
  }

  // Works off what was added.
  void Run() {
    if (parts_.empty()) return;
    TakeMemory();
    ForTiles(Count(tiles_), num_rows_ * width_, [&](int64_t i) { RoundX(tiles_[i]); });
    const int64_t hidden_pieces = CeilDivide(inner_, hidden_columns_);
    ParallelFor(Count(parts_) * hidden_pieces,
                [&](int64_t i) { HiddenPiece(parts_[i / hidden_pieces], i % hidden_pieces); });
    ForTiles(Count(tiles_), num_rows_ * inner_, [&](int64_t i) {
      const Part& part = *tiles_[i].part;
      kernels_.quantize(part.hidden, inner_, nullptr, tiles_[i].tile, part.rounded);
    });
    ParallelFor(CeilDivide(width_, down_columns_), [&](int64_t piece) {
      for (const Part& part : parts_) DownPiece(part, piece);
    });
    parts_.clear();
    num_rows_ = 0;
  }

 private:
  template <class T>
  static int64_t Count(const std::vector<T>& items) {
    return static_cast<int64_t>(items.size());
  }

  int64_t BytesPerRow() const {
    return RowsBytes(1, width_, 0) + RowsBytes(1, inner_, 0) + 4 * inner_;
  }

  void TakeMemory() {
    const int64_t parts = Count(parts_);
    Carver carver(CallScratch(RowsBytes(num_rows_, width_, parts) +
                              RowsBytes(num_rows_, inner_, parts) + 4 * num_rows_ * inner_ +
                              64 * parts));
    tiles_.clear();
    for (Part& part : parts_) {
      part.x = TakeRows(carver, part.count, width_);
      part.rounded = TakeRows(carver, part.count, inner_);
      part.hidden = carver.Take<float>(part.count * inner_);
      const int64_t tiles = Tiles(kernels_, part.count);
      for (int64_t tile = 0; tile < tiles; ++tile) tiles_.push_back({&part, tile});
    }
  }

  void RoundX(const TileOfPart& at) const {
    const int64_t first = at.part->first;
    const float* x = rows_ ? x_ : x_ + first * width_;
    kernels_.quantize(x, width_, rows_ ? rows_ + first : nullptr, at.tile, at.part->x);
  }

  void HiddenPiece(const Part& part, int64_t piece) const {
    Int8Product p = PieceOf(part.x, part.expert->gate, piece, hidden_columns_);
    const int8_t* following = p.next;
    float* gate = part.hidden + p.begin;
    p.next = part.expert->up.block(p.begin);
    p.y = gate;
    p.y_stride = inner_;
    kernels_.product(p);
    p.weight = &part.expert->up;
    p.next = following;
    p.y = Results(part.count * hidden_columns_);
    p.y_stride = hidden_columns_;
    kernels_.product(p);
    kernels_.swiglu(gate, inner_, p.y, p.y_stride, part.count, p.end - p.begin);
  }

  void DownPiece(const Part& part, int64_t piece) const {
    Int8Product p = PieceOf(part.rounded, part.expert->down, piece, down_columns_);
    p.y = Results(part.count * down_columns_);
    p.y_stride = down_columns_;
    kernels_.product(p);
    for (int64_t i = 0; i < part.count; ++i) {
      const int64_t entry = part.first + i;
      float* out = out_ + (rows_ ? rows_[entry] : entry) * width_ + p.begin;
      const float weight = row_weights_ ? row_weights_[entry] : 1.0f;
      accumulate_(p.y + i * p.y_stride, weight, p.end - p.begin, out);
    }
  }

  static float* Results(int64_t count) {
    return static_cast<float*>(ThreadScratch(count * sizeof(float)));
  }

  const Int8DotKernels& kernels_;
  void (*const accumulate_)(const float*, float, int64_t, float*);
  const float* x_;
  const int32_t* rows_;
  const float* row_weights_;
  float* out_;
  const int64_t width_;  // K
  const int64_t inner_;  // I
  const int64_t hidden_columns_;
  const int64_t down_columns_;
  const int64_t most_rows_;
  std::vector<Part> parts_;
  std::vector<TileOfPart> tiles_;
  int64_t num_rows_ = 0;
};

}  // namespace

void Int8DotExpertFfn(const float* x, const Int8DotExpert* experts, int64_t num_experts,
                      const int32_t* offsets, const int32_t* rows, const float* row_weights,
                      float* out) {
  if (num_experts == 0) return;
  Int8DotRun run(x, experts[0], rows, row_weights, out);
  for (int64_t e = 0; e < num_experts; ++e) run.Add(experts[e], offsets[e], offsets[e + 1]);
  run.Run();
}

void PackInt8Dot(const Weight& weight, int8_t* packed, float* scales) {
  const int64_t k = weight.k, steps = CeilDivide(k, 4);
  const int64_t fitting = kPackBytes / k / kInt8Block * kInt8Block;
  const int64_t most = std::min(RoundUp(weight.n, kInt8Block), std::max(kInt8Block, fitting));
  auto* values = static_cast<int8_t*>(CallScratch(most * k));
  for (int64_t first = 0; first < weight.n; first += most) {
    Weight some = weight;
    some.n = std::min(most, weight.n - first);
    some.data = weight.row(first);
    if (weight.scales) some.scales = weight.scales + first * (k / weight.group);
    QuantizeInt8(some, k, values, scales + first);
    ParallelFor(CeilDivide(some.n, kInt8Block), [&](int64_t b) {
      int8_t* block = packed + (first + b * kInt8Block) * steps * 4;
      std::memset(block, 0, kInt8Block * steps * 4);
      const int64_t rows = std::min(kInt8Block, some.n - b * kInt8Block);
      for (int64_t r = 0; r < rows; ++r) {
        const int8_t* row = values + (b * kInt8Block + r) * k;
        for (int64_t s = 0; s < steps; ++s) {
          std::memcpy(block + (s * kInt8Block + r) * 4, row + 4 * s,
                      static_cast<size_t>(std::min<int64_t>(4, k - 4 * s)));
        }
      }
    });
  }
}

void WidenInt8Dot(const Int8DotWeight& weight, const int32_t* ids, int64_t count, float* out) {
  const int64_t k = weight.k;
  const int64_t each = std::max<int64_t>(1, kWidenFloats / k);
  ParallelFor(CeilDivide(count, each), [&](int64_t piece) {
    for (int64_t i = piece * each; i < std::min(count, (piece + 1) * each); ++i) {
      const int64_t n = ids ? ids[i] : i;
      const int64_t in_block = n % kInt8Block;
      const int8_t* values = weight.block(n - in_block) + in_block * 4;
      for (int64_t c = 0; c < k; ++c) {
        out[i * k + c] = static_cast<float>(values[c / 4 * 64 + c % 4]) * weight.scales[n];
      }
    }
  });
}

}  // namespace specmoeoff
