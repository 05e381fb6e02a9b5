#define SPECMOEOFF_TARGET scalar
#include "append_kv.inc"

namespace specmoeoff {
const AppendKernels kAppendScalar = scalar::kKernels;
}  // namespace specmoeoff
