#define SPECMOEOFF_TARGET avx512
#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the undefined operand inside its own intrinsics for a mistake of ours.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include "attention.inc"

namespace specmoeoff {
const AttentionKernels kAttentionAvx512 = {avx512::Attend, avx512::Combine};
}  // namespace specmoeoff
