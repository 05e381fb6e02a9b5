// What this machine can do at best, measured: the ceilings that benchmarks print beside a figure.
#pragma once

#include <cstdint>

namespace specmoeoff {

struct RoofKernels {
  // Reads `count` floats and returns something that depends on all of them.
  float (*read)(const float* data, int64_t count);
  // Runs `rounds` rounds of independent multiply-adds on registers; kFlopsPerRound each.
  float (*multiply_add)(int64_t rounds);
};

// 12 registers of 16 lanes, two operations a lane.
inline constexpr int64_t kFlopsPerRound = 12 * 16 * 2;

extern const RoofKernels kRoofScalar;
extern const RoofKernels kRoofAvx2;
extern const RoofKernels kRoofAvx512;

// Bytes per second at which all threads together read `data`; the best of `repeats` passes, each
// over the next 64 MiB of it, so give it more than the caches hold.
double MeasureReadBandwidth(const float* data, int64_t count, int repeats);

// Floating-point operations per second of all threads together; the best of `repeats` passes.
double MeasureMultiplyAdd(int repeats);

}  // namespace specmoeoff
