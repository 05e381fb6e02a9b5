#define SPECMOEOFF_TARGET avx2
#include "append_kv.inc"

namespace specmoeoff {
const AppendKernels kAppendAvx2 = avx2::kKernels;
}  // namespace specmoeoff
