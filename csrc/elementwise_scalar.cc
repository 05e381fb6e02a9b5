#define SPECMOEOFF_TARGET scalar
#include "elementwise.inc"

namespace specmoeoff {
const ElementwiseKernels kElementwiseScalar = scalar::kKernels;
}  // namespace specmoeoff
