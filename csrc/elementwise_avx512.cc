#define SPECMOEOFF_TARGET avx512
#include "elementwise.inc"

namespace specmoeoff {
const ElementwiseKernels kElementwiseAvx512 = avx512::kKernels;
}  // namespace specmoeoff
