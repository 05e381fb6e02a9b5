#define SPECMOEOFF_TARGET avx2
#include "roof.inc"

namespace specmoeoff {
const RoofKernels kRoofAvx2 = avx2::kKernels;
}  // namespace specmoeoff
