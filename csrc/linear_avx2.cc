#define SPECMOEOFF_TARGET avx2
#include "linear.inc"

namespace specmoeoff {
const LinearKernels kLinearAvx2 = avx2::kKernels;
const LinearKernels kLinearRoundedAvx2 = avx2::kRoundedKernels;
}  // namespace specmoeoff
