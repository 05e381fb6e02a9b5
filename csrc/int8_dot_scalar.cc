#define SPECMOEOFF_TARGET scalar
#include "int8_dot.inc"

namespace specmoeoff {
const Int8DotKernels kInt8DotScalar = scalar::kKernels;
}  // namespace specmoeoff
