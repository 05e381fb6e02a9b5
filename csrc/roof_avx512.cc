#define SPECMOEOFF_TARGET avx512
#include "roof.inc"

namespace specmoeoff {
const RoofKernels kRoofAvx512 = avx512::kKernels;
}  // namespace specmoeoff
