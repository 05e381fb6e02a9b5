#define SPECMOEOFF_TARGET avx2
#include "linear.inc"

namespace specmoeoff {
const LinearKernels kLinearAvx2 = avx2::kKernels;
const LinearKernels kLinearRoundedAvx2 = avx2::kRoundedKernels;
const LinearKernels kLinearAvx2Bf16 = avx2::kEvenOddKernels;
const LinearKernels kLinearRoundedAvx2Bf16 = avx2::kRoundedEvenOddKernels;
}  // namespace specmoeoff
