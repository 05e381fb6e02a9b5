#define SPECMOEOFF_TARGET avx512
#include "linear.inc"

namespace specmoeoff {
const LinearKernels kLinearAvx512 = avx512::kKernels;
}  // namespace specmoeoff
