// Writes new keys and values into the pages that attention reads (see attention.h for the layout).
//
// Who owns what: the caller owns every pointer; pages may not overlap keys or values. Work on
// different KV heads, and on keys and values, touches different memory and may run at once.
#pragma once

#include <cstdint>

#include "attention.h"

namespace specmoeoff {

struct AppendCall {
  const float* keys;    // [T, G, D]
  const float* values;  // [T, G, D]
  void* key_pages;      // as in AttentionCall
  void* value_pages;
  int64_t key_page_stride;
  int64_t value_page_stride;
  KvType kv_type;
  float* key_scales;  // as in AttentionCall
  float* value_scales;
  int64_t key_scale_stride;
  int64_t value_scale_stride;
  const int32_t* slots;  // [T] page * P + offset, valid
  int64_t num_tokens;
  int num_kv_heads;
  int head_dim;
  int page_size;
};

struct AppendKernels {
  // Write all tokens of one KV head.
  void (*keys)(const AppendCall& call, int head);
  void (*values)(const AppendCall& call, int head);
};

extern const AppendKernels kAppendScalar;
extern const AppendKernels kAppendAvx2;
extern const AppendKernels kAppendAvx512;

// Writes new keys and values into their pages, rounded to nearest even (NaN kept). int8: the scale
// is the largest magnitude of the head / 127; a head with a NaN or an infinity becomes zeros with a
// scale of NaN. A slot given twice keeps the later token. The same bits on every target.
void AppendKv(const AppendCall& call);

}  // namespace specmoeoff
