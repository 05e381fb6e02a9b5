// Chunked attention over a paged KV cache: n new tokens of each sequence against its whole KV.
//
// Who owns what: the caller owns every pointer and keeps it alive during the call; nothing here
// allocates except the scratch the caller passes in. `out` may not overlap any input. All functions
// may be called from any number of threads at once, on disjoint work items.
//
// int8 pages hold whole numbers of -127 to 127 and one float32 scale per token and KV head beside
// them. A score is computed of the whole numbers and then multiplied by K's scale, a probability by
// V's scale before it weighs V (not in the softmax sum).
//
// Order of every sum (why a row's bits depend on nothing but the row): KV is walked in blocks of
// kBlock tokens aligned at position 0. A score is a chain of fused multiply-adds over d = 0, 1, ...
// An output element is a chain over visible tokens in rising order. The softmax sum has 16 partials
// (token mod 16), combined as (j, j+8), (j, j+4), (j, j+2), (j, j+1). Probabilities are relative to
// a reference: the largest score of the block in which it was last set, and it is set again in a
// block that has one larger by more than kSlack (in powers of two), which is seldom; sum and output
// are then rescaled. Reference, sum and output restart every kRange tokens, and the ranges are
// combined in rising order. The result is multiplied by the reciprocal of the sum. Page size,
// number of queries, tiling, batch mates, threads and CPU target change none of this.
#pragma once

#include <cstddef>
#include <cstdint>

namespace specmoeoff {

inline constexpr int kAttentionBlock = 128;
inline constexpr int kAttentionRange = 1024;
inline constexpr float kAttentionSlack = 8.0f;
inline constexpr int kAttentionMaxHeadDim = 1024;
// Rows (query token x query head of the group) that share one pass over the KV.
inline constexpr int kAttentionMaxRows = 128;

// Element type of keys and values.
enum class KvType { kFloat32, kBfloat16, kFloat16, kInt8 };
// An element of float16; one of bfloat16 is a plain uint16_t.
struct Half {
  uint16_t bits;
};

struct AttentionCall {
  const float* q;           // [T, H, D]
  float* out;               // [T, H, D]
  const void* keys;         // [num_pages, G, D, P]: token-minor, so scores need no horizontal sums
  const void* values;       // [num_pages, G, P, D]
  int64_t key_page_stride;  // elements from one page to the next
  int64_t value_page_stride;
  KvType kv_type;
  const float* key_scales;    // [num_pages, G, P], int8 only
  const float* value_scales;  // the same
  int64_t key_scale_stride;   // elements from one page to the next
  int64_t value_scale_stride;
  const int32_t* page_tables;  // [B, table_width], entries below ceil(kv_len / P) are valid pages
  int64_t table_width;
  const int32_t* q_offsets;  // [B + 1], rising
  const int32_t* kv_lens;    // [B], at least the sequence's number of queries
  int num_heads;
  int num_kv_heads;
  int head_dim;
  int page_size;  // a multiple of 16
  double scale;
  double softcap;             // 0: none
  int64_t sliding_window;     // 0: none
  const float* sinks;         // [H] or null
  const uint64_t* tree_mask;  // [T] or null: bit j = sees new token j
};

// One piece of work: some rows of some KV heads of one sequence. Row r is query token r / group of
// the sequence, query head r % group of each of the KV heads. Several heads share an item because a
// page holds them side by side: longer runs of memory, fewer page walks.
struct AttentionItem {
  int sequence;
  int first_kv_head;
  int num_kv_heads;
  int first_row;
  int num_rows;  // at least 1; num_rows * num_kv_heads is at most kAttentionMaxRows
  int range;     // the KV range to do, or -1 for all of them and the final result
};

// Floats of one row's result over one range: 16 partial sums, reference, seen flag, padding,
// output.
inline int AttentionPaddedDim(int head_dim) { return (head_dim + 15) / 16 * 16; }
inline int64_t AttentionPartialFloats(int head_dim) { return 32 + AttentionPaddedDim(head_dim); }
// Floats of scratch that one thread needs for items of up to `num_states` rows times KV heads;
// 64-byte aligned.
int64_t AttentionScratchFloats(int head_dim, int num_states);

struct AttentionKernels {
  // Does an item. `partial` [num_kv_heads, num_rows, AttentionPartialFloats] takes the result of a
  // single range; unused (null) if item.range is -1. `next` (or null) is the item this thread will
  // do next, as far as one can tell: its first KV is prefetched.
  void (*attend)(const AttentionCall& call, const AttentionItem& item, const AttentionItem* next,
                 float* scratch, float* partial);
  // Combines the partial results [num_ranges, num_kv_heads, num_rows, ...] of all ranges and writes
  // the rows.
  void (*combine)(const AttentionCall& call, const AttentionItem& item, float* scratch,
                  const float* partials, int num_ranges);
};

extern const AttentionKernels kAttentionScalar;
#if defined(__x86_64__) || defined(_M_X64)
extern const AttentionKernels kAttentionAvx2;
extern const AttentionKernels kAttentionAvx512;
#endif

// KV positions that an item's queries see: none outside [begin, end), all in [all_begin, all_end).
struct AttentionSpan {
  int64_t begin;
  int64_t end;
  int64_t all_begin;
  int64_t all_end;
};
AttentionSpan VisibleSpan(const AttentionCall& call, const AttentionItem& item);

// Does the whole call on the pool's threads. T is q_offsets[num_sequences].
void ChunkedAttention(const AttentionCall& call, int num_sequences);

// Bits of tokens base .. base + 63 that query token i of n (KV length kv_len) sees.
uint64_t VisibleTokens(const AttentionCall& call, int sequence, int query, int64_t base);

}  // namespace specmoeoff
