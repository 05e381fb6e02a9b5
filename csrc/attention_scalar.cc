#define SPECMOEOFF_TARGET scalar
#include "attention.inc"

namespace specmoeoff {
const AttentionKernels kAttentionScalar = {scalar::Attend, scalar::Combine};
}  // namespace specmoeoff
