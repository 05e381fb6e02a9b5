#define SPECMOEOFF_TARGET avx2
#include "elementwise.inc"

namespace specmoeoff {
const ElementwiseKernels kElementwiseAvx2 = avx2::kKernels;
}  // namespace specmoeoff
