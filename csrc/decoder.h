// A decoder layer as one call: norm, Q, K and V, rotary embedding, the KV cache, attention, the
// output projection, the second norm and the router, with no return to Python in between; and its
// experts as a second one, where all are in memory.
//
// Each step is the kernel of its own header, called with the same arguments as from Python, so the
// bits are those of the calls one by one.
#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"
#include "int8_dot.h"
#include "linear.h"

namespace specmoeoff {

// A matrix of either kind. The caller owns what it points to.
struct Matrix {
  Weight weight;
  Int8DotWeight int8_dot;  // this one, if it has any data
  const float* bias = nullptr;

  bool is_int8_dot() const { return int8_dot.packed != nullptr; }
  int64_t n() const { return is_int8_dot() ? int8_dot.n : weight.n; }
  int64_t k() const { return is_int8_dot() ? int8_dot.k : weight.k; }
};

struct DecoderLayer {
  const float* attn_norm;  // [hidden]
  const float* ffn_norm;   // [hidden]
  Matrix q, k, v, o;
  Matrix router;        // [experts, hidden]; unused by a dense model
  AttentionCall pages;  // keys, values, their scales and strides; nothing else is looked at
  // All experts of the layer, in either form, or none.
  std::vector<Expert> experts;
  std::vector<Int8DotExpert> int8_experts;
};

struct DecoderShape {
  int64_t hidden;
  int num_heads, num_kv_heads, head_dim, page_size;
  int64_t num_experts;  // 1: dense, no router
  int64_t top_k;
  float eps;
  double scale;
  int64_t sliding_window;
  Activations activations;
};

// A pass of T tokens. Rows of the workspace: see DecoderRowFloats().
struct DecoderStep {
  int64_t num_tokens;
  int num_sequences;
  float* x;  // [T, hidden], in and out
  const float* cos;
  const float* sin;
  int64_t rotary_half;
  const int32_t* slots;
  const int32_t* page_tables;
  int64_t table_width;
  const int32_t* q_offsets;
  const int32_t* kv_lens;
  float* workspace;
  // What routing leaves for the experts: h [T, hidden]; entries sorted by expert, tokens rising,
  // rows and weights [T * top_k], those of expert e from offsets[e] on, [experts + 1].
  float* h;
  int32_t* rows;
  float* row_weights;
  int32_t* offsets;
};

// Floats per token of a pass's workspace.
int64_t DecoderRowFloats(const DecoderShape& shape);

// From x to h and the routing; x has the attention's output added.
void AttendAndRoute(const DecoderShape& shape, const DecoderLayer& layer, const DecoderStep& step);

// Adds the routed experts' output to x; the layer has its experts.
void RunExperts(const DecoderShape& shape, const DecoderLayer& layer, const DecoderStep& step);

}  // namespace specmoeoff
