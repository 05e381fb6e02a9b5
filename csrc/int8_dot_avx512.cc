#define SPECMOEOFF_TARGET avx512
#include "int8_dot.inc"

namespace specmoeoff {
const Int8DotKernels kInt8DotAvx512 = avx512::kKernels;
}  // namespace specmoeoff
