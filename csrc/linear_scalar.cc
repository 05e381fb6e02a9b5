#define SPECMOEOFF_TARGET scalar
#include "linear.inc"

namespace specmoeoff {
const LinearKernels kLinearScalar = scalar::kKernels;
const LinearKernels kLinearRoundedScalar = scalar::kRoundedKernels;
}  // namespace specmoeoff
