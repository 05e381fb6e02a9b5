#include "roof.h"

#include <algorithm>
#include <chrono>

#include "dispatch.h"
#include "thread_pool.h"

namespace specmoeoff {
namespace {

constexpr int64_t kPieceFloats = 256 << 10;
// Passes are short, a millisecond or two, so that on a busy machine the best one ran undisturbed.
constexpr int64_t kWindowFloats = 16 << 20;
constexpr int64_t kRounds = 50 << 10;
constexpr int64_t kPiecesPerThread = 4;

const RoofKernels& Current() {
  return Select(&kRoofScalar, SPECMOEOFF_IF_X86(&kRoofAvx2), SPECMOEOFF_IF_X86(&kRoofAvx512));
}

// Keeps a result that nobody uses.
void Use(float value) { asm volatile("" : : "r"(&value) : "memory"); }

template <class F>
double BestSeconds(int repeats, F pass) {
  using Clock = std::chrono::steady_clock;
  double best = 1e30;
  for (int i = 0; i < repeats; ++i) {
    const auto start = Clock::now();
    pass();
    best = std::min(best, std::chrono::duration<double>(Clock::now() - start).count());
  }
  return best;
}

}  // namespace

double MeasureReadBandwidth(const float* data, int64_t count, int repeats) {
  const RoofKernels& kernels = Current();
  const int64_t window = std::min(count, kWindowFloats);
  const int64_t pieces = (window + kPieceFloats - 1) / kPieceFloats;
  int64_t start = 0;
  const double seconds = BestSeconds(repeats, [&] {
    ParallelFor(pieces, [&](int64_t piece) {
      const int64_t begin = piece * kPieceFloats;
      Use(kernels.read(data + start + begin, std::min(kPieceFloats, window - begin)));
    });
    start = start + 2 * window <= count ? start + window : 0;
  });
  return static_cast<double>(window) * sizeof(float) / seconds;
}

double MeasureMultiplyAdd(int repeats) {
  const RoofKernels& kernels = Current();
  const int64_t pieces = kPiecesPerThread * NumThreads();
  const double seconds = BestSeconds(
      repeats, [&] { ParallelFor(pieces, [&](int64_t) { Use(kernels.multiply_add(kRounds)); }); });
  return static_cast<double>(pieces * kRounds * kFlopsPerRound) / seconds;
}

}  // namespace specmoeoff
