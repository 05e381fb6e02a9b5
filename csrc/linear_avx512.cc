#define SPECMOEOFF_TARGET avx512
#include "linear.inc"

namespace specmoeoff {
const LinearKernels kLinearAvx512 = avx512::kKernels;
const LinearKernels kLinearRoundedAvx512 = avx512::kRoundedKernels;
}  // namespace specmoeoff
