// Shares the work of an append: keys and values of each KV head are pieces of their own.
#include "append_kv.h"

#include "dispatch.h"
#include "thread_pool.h"

namespace specmoeoff {
namespace {

// Fewer elements than this are done before another thread has taken a piece.
constexpr int64_t kSharedElements = 2048;

}  // namespace

void AppendKv(const AppendCall& call) {
  const AppendKernels& kernels =
      Select(&kAppendScalar, SPECMOEOFF_IF_X86(&kAppendAvx2), SPECMOEOFF_IF_X86(&kAppendAvx512));
  const int heads = call.num_kv_heads;
  // Keys first: they are strewn over more cache lines and take longer.
  auto piece = [&](int64_t i) {
    const int head = static_cast<int>(i % heads);
    if (i < heads) {
      kernels.keys(call, head);
    } else {
      kernels.values(call, head);
    }
  };
  const int64_t pieces = 2 * int64_t{heads};
  if (call.num_tokens * heads * call.head_dim < kSharedElements) {
    for (int64_t i = 0; i < pieces; ++i) piece(i);
  } else {
    ParallelFor(pieces, piece);
  }
}

}  // namespace specmoeoff
