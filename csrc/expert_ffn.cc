// The experts of a step as one list of pieces with dependencies, so that no thread waits at a
// barrier: while the last pieces of one expert's down projection run, the next one's gate and up
// projections have already begun.
//
// An expert's rows are cut into units that fit the call's scratch. Unit u is packed, goes through
// gate and up (hidden), then down (added to out). Two units are in flight; the pieces are listed as
//   pack 0 | pack 1, hidden 0 | pack 2, hidden 1, down 0 | pack 3, hidden 2, down 1 | ...
// and each stage waits for the counters of the stages it needs, which are all earlier in the list.
#include <algorithm>
#include <vector>

#include "linear.h"
#include "thread_pool.h"

namespace specmoeoff {
namespace {

constexpr int64_t kScratchFloats = 1 << 20;
constexpr int64_t kPackTiles = 8;  // tiles per piece of packing

struct Unit {
  const Expert* expert;
  const LinearKernels* kernels;
  int64_t first;  // entry of rows and row_weights
  int64_t count;
  int64_t pack_pieces, hidden_pieces, down_pieces;
  int64_t packed = 0, hidden = 0, down = 0;  // pieces done, atomic
};

enum class Stage { kPack, kHidden, kDown };

struct Span {
  Stage stage;
  int64_t unit;
  int64_t begin;  // index of its first piece
};

class ExpertRun {
 public:
  ExpertRun(const float* x, const Expert* experts, int64_t num_experts, const int32_t* offsets,
            const int32_t* rows, const float* row_weights, float* out, Activations activations)
      : activations_(activations),
        x_(x),
        rows_(rows),
        row_weights_(row_weights),
        out_(out),
        width_(experts[0].gate.k),
        inner_(experts[0].gate.n) {
    MakeUnits(experts, num_experts, offsets);
    ListPieces();
    const int64_t x_floats = most_rows_ * RoundUp(width_, 16);
    const int64_t hidden_floats = most_rows_ * RoundUp(inner_, 16);
    const int64_t buffers = std::min<int64_t>(2, static_cast<int64_t>(units_.size()));
    auto* memory =
        static_cast<float*>(CallScratch(buffers * (x_floats + hidden_floats) * sizeof(float)));
    for (int64_t i = 0; i < buffers; ++i) {
      packed_[i] = memory + i * (x_floats + hidden_floats);
      hidden_[i] = packed_[i] + x_floats;
    }
  }

  void Run() {
    ParallelFor(num_pieces_, [this](int64_t piece) { RunPiece(piece); });
  }

 private:
  void MakeUnits(const Expert* experts, int64_t num_experts, const int32_t* offsets) {
    const int64_t floats_per_row = 2 * (RoundUp(width_, 16) + RoundUp(inner_, 16));
    hidden_columns_ = PieceColumns(inner_, 2 * experts[0].gate.row_bytes());
    down_columns_ = PieceColumns(width_, experts[0].down.row_bytes());
    for (int64_t e = 0; e < num_experts; ++e) {
      const int64_t total = offsets[e + 1] - offsets[e];
      const LinearKernels& kernels = CurrentLinear(activations_, FormOfAll(experts[e]));
      const int64_t chunk = ChunkRows(total, floats_per_row, kScratchFloats, kernels.tile_rows);
      for (int64_t first = 0; first < total; first += chunk) {
        Unit unit{};
        unit.expert = &experts[e];
        unit.kernels = &kernels;
        unit.first = offsets[e] + first;
        unit.count = std::min(chunk, total - first);
        unit.pack_pieces = Pieces(unit.count, kPackTiles * kernels.tile_rows);
        unit.hidden_pieces = Pieces(inner_, hidden_columns_);
        unit.down_pieces = Pieces(width_, down_columns_);
        most_rows_ = std::max(most_rows_, unit.count);
        units_.push_back(unit);
      }
    }
  }

  void ListPieces() {
    const int64_t units = static_cast<int64_t>(units_.size());
    for (int64_t i = 0; i < units + 2; ++i) {
      if (i < units) Append(Stage::kPack, i, units_[i].pack_pieces);
      if (i >= 1 && i - 1 < units) Append(Stage::kHidden, i - 1, units_[i - 1].hidden_pieces);
      if (i >= 2) Append(Stage::kDown, i - 2, units_[i - 2].down_pieces);
    }
  }

  void Append(Stage stage, int64_t unit, int64_t pieces) {
    spans_.push_back({stage, unit, num_pieces_});
    num_pieces_ += pieces;
  }

  static WeightForm FormOfAll(const Expert& expert) {
    return CommonForm(CommonForm(FormOf(expert.gate), FormOf(expert.up)), FormOf(expert.down));
  }

  static int64_t Pieces(int64_t size, int64_t each) { return (size + each - 1) / each; }

  void RunPiece(int64_t piece) {
    const auto after = std::upper_bound(spans_.begin(), spans_.end(), piece,
                                        [](int64_t p, const Span& s) { return p < s.begin; });
    const Span& span = *(after - 1);
    switch (span.stage) {
      case Stage::kPack:
        return PackPiece(span.unit, piece - span.begin);
      case Stage::kHidden:
        return HiddenPiece(span.unit, piece - span.begin);
      case Stage::kDown:
        return DownPiece(span.unit, piece - span.begin);
    }
  }

  void PackPiece(int64_t u, int64_t piece) {
    Unit& unit = units_[u];
    // The buffer's last user must be through with it.
    if (u >= 2) WaitUntilAtLeast(&units_[u - 2].hidden, units_[u - 2].hidden_pieces);
    const int64_t tiles = Pieces(unit.count, unit.kernels->tile_rows);
    const int64_t begin = piece * kPackTiles;
    const float* x = rows_ ? x_ : x_ + unit.first * width_;
    unit.kernels->pack(x, width_, rows_ ? rows_ + unit.first : nullptr, unit.count, begin,
                       std::min(tiles, begin + kPackTiles), packed_[u % 2]);
    CountDone(&unit.packed);
  }

  void HiddenPiece(int64_t u, int64_t piece) {
    Unit& unit = units_[u];
    WaitUntilAtLeast(&unit.packed, unit.pack_pieces);
    if (u >= 2) WaitUntilAtLeast(&units_[u - 2].down, units_[u - 2].down_pieces);
    Product p = Columns(unit, unit.expert->gate, packed_[u % 2], piece, hidden_columns_);
    float* gate = p.y;
    const char* following = p.next;
    p.next = unit.expert->up.row(p.begin);
    unit.kernels->product(p);
    p.weight = &unit.expert->up;
    p.y = gate + unit.count * p.y_stride;
    // A hint only: `up` is where the gate's next rows will be followed by, `gate` comes first.
    p.next = following;
    unit.kernels->product(p);
    unit.kernels->swiglu(gate, p.y, p.y_stride, unit.count, p.begin, p.end, inner_, hidden_[u % 2]);
    CountDone(&unit.hidden);
  }

  void DownPiece(int64_t u, int64_t piece) {
    Unit& unit = units_[u];
    WaitUntilAtLeast(&unit.hidden, unit.hidden_pieces);
    // Additions to a row keep the order of the experts.
    if (u >= 1) WaitUntilAtLeast(&units_[u - 1].down, units_[u - 1].down_pieces);
    const Product p = Columns(unit, unit.expert->down, hidden_[u % 2], piece, down_columns_);
    unit.kernels->product(p);
    for (int64_t i = 0; i < unit.count; ++i) {
      const int64_t entry = unit.first + i;
      float* out = out_ + (rows_ ? rows_[entry] : entry) * width_ + p.begin;
      const float weight = row_weights_ ? row_weights_[entry] : 1.0f;
      unit.kernels->accumulate(p.y + i * p.y_stride, weight, p.end - p.begin, out);
    }
    CountDone(&unit.down);
  }

  // The product of one piece's columns, into this thread's scratch (room for two results).
  Product Columns(const Unit& unit, const Weight& weight, const float* packed, int64_t piece,
                  int64_t columns) const {
    const size_t result_bytes = static_cast<size_t>(unit.count * columns) * sizeof(float);
    auto* scratch = static_cast<float*>(ThreadScratch(2 * result_bytes));
    Product p{};
    p.packed = packed;
    p.rows = unit.count;
    p.weight = &weight;
    p.begin = piece * columns;
    p.end = std::min(weight.n, p.begin + columns);
    p.y = scratch;
    p.y_stride = columns;
    const int64_t next = p.begin + NumThreads() * columns;
    p.next = next + columns <= weight.n ? weight.row(next) : nullptr;
    return p;
  }

  const Activations activations_;
  const float* x_;
  const int32_t* rows_;
  const float* row_weights_;
  float* out_;
  const int64_t width_;  // K
  const int64_t inner_;  // I
  std::vector<Unit> units_;
  std::vector<Span> spans_;
  int64_t num_pieces_ = 0;
  int64_t most_rows_ = 0;
  int64_t hidden_columns_ = 0;
  int64_t down_columns_ = 0;
  float* packed_[2] = {};
  float* hidden_[2] = {};
};

}  // namespace

void ExpertFfn(const float* x, const Expert* experts, int64_t num_experts, const int32_t* offsets,
               const int32_t* rows, const float* row_weights, float* out, Activations activations) {
  if (num_experts == 0 || offsets[num_experts] == offsets[0]) return;
  ExpertRun(x, experts, num_experts, offsets, rows, row_weights, out, activations).Run();
}

}  // namespace specmoeoff
