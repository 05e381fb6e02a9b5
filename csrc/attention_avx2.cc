#define SPECMOEOFF_TARGET avx2
#include "attention.inc"

namespace specmoeoff {
const AttentionKernels kAttentionAvx2 = {avx2::Attend, avx2::Combine};
}  // namespace specmoeoff
