#define SPECMOEOFF_TARGET avx2
#include "int8_dot.inc"

namespace specmoeoff {
const Int8DotKernels kInt8DotAvx2 = avx2::kKernels;
}  // namespace specmoeoff
