// Plans the work of a chunked attention call and hands it to the pool; what each query sees.
#include "attention.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "dispatch.h"
#include "thread_pool.h"

namespace specmoeoff {
namespace {

// With fewer items than this per thread the KV ranges become items of their own.
constexpr int kItemsPerThread = 4;
// Results of ranges are kept between calls, so they must stay small (4 MiB).
constexpr size_t kMaxPartialFloats = size_t{1} << 20;

int NumQueries(const AttentionCall& call, int sequence) {
  return call.q_offsets[sequence + 1] - call.q_offsets[sequence];
}

// Tokens at or past this one lie outside query i's causal past; with a tree, see the tree's bits.
int64_t Position(const AttentionCall& call, int sequence, int query) {
  return int64_t{call.kv_lens[sequence]} - NumQueries(call, sequence) + query;
}

int64_t WindowBegin(const AttentionCall& call, int64_t position) {
  return call.sliding_window > 0 ? std::max<int64_t>(0, position - call.sliding_window + 1) : 0;
}

// Bits of tokens base .. base + 63 that lie in [begin, end).
uint64_t BitsBetween(int64_t begin, int64_t end, int64_t base) {
  const auto below = [base](int64_t at) {
    const int64_t n = std::clamp<int64_t>(at - base, 0, 64);
    return n == 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1;
  };
  return below(end) & ~below(begin);
}

// Kept by each calling thread: the work, and the results of ranges.
struct Plan {
  std::vector<AttentionItem> items;
  std::vector<AttentionItem> pieces;    // items, each once per range
  std::vector<size_t> partial_offsets;  // of each piece
  std::vector<size_t> first_piece;      // of each item, and the end
  std::unique_ptr<float[]> partials;
  size_t partials_capacity = 0;
  int most_states = 0;

  float* Partials(size_t floats) {
    if (floats > partials_capacity) {
      partials.reset();  // first, so that both are never alive
      partials.reset(new float[floats]);
      partials_capacity = floats;
    }
    return partials.get();
  }
};

// One item per sequence, up to `num_heads` KV heads and tile of rows. Of the sequences that are
// left when all threads have had as many, each head is one: the threads then end together.
void ListItems(const AttentionCall& call, int num_sequences, int num_heads, Plan& plan) {
  const int group = call.num_heads / call.num_kv_heads;
  plan.items.clear();
  plan.most_states = 0;
  const int num_even = num_sequences - num_sequences % NumThreads();
  for (int b = 0; b < num_sequences; ++b) {
    const int64_t rows = int64_t{NumQueries(call, b)} * group;
    const int64_t tiles = (rows + kAttentionMaxRows - 1) / kAttentionMaxRows;
    const int64_t heads =
        tiles > 0 && b < num_even
            ? std::clamp<int64_t>(kAttentionMaxRows / ((rows + tiles - 1) / tiles), 1, num_heads)
            : 1;
    for (int g = 0; g < call.num_kv_heads; g += static_cast<int>(heads)) {
      const int taken = std::min(static_cast<int>(heads), call.num_kv_heads - g);
      for (int64_t i = 0; i < tiles; ++i) {
        const int first = static_cast<int>(rows * i / tiles);
        const int count = static_cast<int>(rows * (i + 1) / tiles) - first;
        plan.items.push_back({b, g, taken, first, count, -1});
        plan.most_states = std::max(plan.most_states, count * taken);
      }
    }
  }
}

// Cuts items into ranges; returns the floats their results take.
size_t ListPieces(const AttentionCall& call, Plan& plan) {
  const int64_t floats = AttentionPartialFloats(call.head_dim);
  size_t total = 0;
  plan.pieces.clear();
  plan.partial_offsets.clear();
  plan.first_piece.clear();
  for (const AttentionItem& item : plan.items) {
    plan.first_piece.push_back(plan.pieces.size());
    const int64_t end = VisibleSpan(call, item).end;
    for (int range = 0; range * int64_t{kAttentionRange} < end; ++range) {
      plan.pieces.push_back(item);
      plan.pieces.back().range = range;
      plan.partial_offsets.push_back(total);
      total += static_cast<size_t>(item.num_rows) * item.num_kv_heads * floats;
    }
  }
  plan.first_piece.push_back(plan.pieces.size());
  return total;
}

// As many KV heads per item as still keep every thread busy, with or without cutting the KV into
// ranges. Returns the floats of the ranges' results, 0 if items stay whole.
size_t MakePlan(const AttentionCall& call, int num_sequences, Plan& plan) {
  const size_t wanted = static_cast<size_t>(kItemsPerThread) * NumThreads();
  if (NumThreads() == 1) {
    ListItems(call, num_sequences, call.num_kv_heads, plan);
    return 0;
  }
  for (int heads = call.num_kv_heads;; heads = (heads + 1) / 2) {
    ListItems(call, num_sequences, heads, plan);
    if (plan.items.size() >= wanted) return 0;
    const size_t floats = ListPieces(call, plan);
    const bool is_cut = plan.pieces.size() > plan.items.size() && floats <= kMaxPartialFloats;
    if (is_cut && plan.pieces.size() >= wanted) return floats;
    if (heads == 1) return is_cut ? floats : 0;
  }
}

// What the thread that does item i will do next if all take as long.
const AttentionItem* NextOf(const std::vector<AttentionItem>& items, int64_t i) {
  const size_t next = static_cast<size_t>(i) + NumThreads();
  return next < items.size() ? &items[next] : nullptr;
}

void AttendByRange(const AttentionCall& call, const AttentionKernels& kernels, size_t scratch_bytes,
                   size_t floats, Plan& plan) {
  float* const partials = plan.Partials(floats);
  ParallelFor(static_cast<int64_t>(plan.pieces.size()), [&](int64_t i) {
    kernels.attend(call, plan.pieces[i], NextOf(plan.pieces, i),
                   static_cast<float*>(ThreadScratch(scratch_bytes)),
                   partials + plan.partial_offsets[i]);
  });
  ParallelFor(static_cast<int64_t>(plan.items.size()), [&](int64_t i) {
    const size_t first = plan.first_piece[i];
    kernels.combine(call, plan.items[i], static_cast<float*>(ThreadScratch(scratch_bytes)),
                    partials + plan.partial_offsets[first],
                    static_cast<int>(plan.first_piece[i + 1] - first));
  });
}

}  // namespace

AttentionSpan VisibleSpan(const AttentionCall& call, const AttentionItem& item) {
  const int group = call.num_heads / call.num_kv_heads;
  const int b = item.sequence;
  const int64_t first = Position(call, b, item.first_row / group);
  const int64_t last = Position(call, b, (item.first_row + item.num_rows - 1) / group);
  AttentionSpan span{WindowBegin(call, first), last + 1, WindowBegin(call, last), first + 1};
  if (call.tree_mask) {
    span.end = call.kv_lens[b];
    span.all_end = Position(call, b, 0);
  }
  return span;
}

uint64_t VisibleTokens(const AttentionCall& call, int sequence, int query, int64_t base) {
  const int64_t position = Position(call, sequence, query);
  const int64_t begin = WindowBegin(call, position);
  if (!call.tree_mask) return BitsBetween(begin, position + 1, base);
  const int n = NumQueries(call, sequence);
  const int64_t prefix = Position(call, sequence, 0);
  uint64_t tree = call.tree_mask[call.q_offsets[sequence] + query] & BitsBetween(0, n, 0);
  const int64_t shift = prefix - base;
  if (shift >= 64 || shift <= -64) {
    tree = 0;
  } else {
    tree = shift >= 0 ? tree << shift : tree >> -shift;
  }
  const uint64_t seen = BitsBetween(0, prefix, base) | tree;
  return seen & BitsBetween(begin, call.kv_lens[sequence], base);
}

int64_t AttentionScratchFloats(int head_dim, int num_states) {
  const int64_t padded = AttentionPaddedDim(head_dim);
  const int64_t states = (num_states + 15) / 16 * 16;  // rows are at most states
  const int64_t stage = kAttentionBlock + 1 + 2 * (kAttentionBlock / 64);
  return states * (3 * padded + 2 * 16 + 4 + 2 * stage) + kAttentionBlock * (2 * padded);
}

void ChunkedAttention(const AttentionCall& call, int num_sequences) {
  thread_local Plan plan_of_thread;
  Plan& plan = plan_of_thread;
  const AttentionKernels& kernels = Select(&kAttentionScalar, SPECMOEOFF_IF_X86(&kAttentionAvx2),
                                           SPECMOEOFF_IF_X86(&kAttentionAvx512));
  const size_t partial_floats = MakePlan(call, num_sequences, plan);
  const size_t bytes = sizeof(float) * AttentionScratchFloats(call.head_dim, plan.most_states);
  if (partial_floats > 0) {
    AttendByRange(call, kernels, bytes, partial_floats, plan);
    return;
  }
  ParallelFor(static_cast<int64_t>(plan.items.size()), [&](int64_t i) {
    kernels.attend(call, plan.items[i], NextOf(plan.items, i),
                   static_cast<float*>(ThreadScratch(bytes)), nullptr);
  });
}

}  // namespace specmoeoff
