#define SPECMOEOFF_TARGET avx512
#include "append_kv.inc"

namespace specmoeoff {
const AppendKernels kAppendAvx512 = avx512::kKernels;
}  // namespace specmoeoff
