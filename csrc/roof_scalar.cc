#define SPECMOEOFF_TARGET scalar
#include "roof.inc"

namespace specmoeoff {
const RoofKernels kRoofScalar = scalar::kKernels;
}  // namespace specmoeoff
