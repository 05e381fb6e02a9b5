// The avx512 body again, with the instruction it was laid out for.
#define SPECMOEOFF_TARGET avx512
#include "int8_dot.inc"

namespace specmoeoff {
const Int8DotKernels kInt8DotAvx512Vnni = avx512::kKernels;
}  // namespace specmoeoff
