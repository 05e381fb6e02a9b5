// The avx512 body again, for its products of pairs of bfloat16.
#define SPECMOEOFF_TARGET avx512
#include "linear.inc"

namespace specmoeoff {
const LinearKernels kLinearAvx512Bf16 = avx512::kPairKernels;
const LinearKernels kLinearAvx512Bf16Int4 = avx512::kNibblePairKernels;
}  // namespace specmoeoff
