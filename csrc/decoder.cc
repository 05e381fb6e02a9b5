#include "decoder.h"

#include <algorithm>
#include <numeric>

#include "append_kv.h"
#include "elementwise.h"

namespace specmoeoff {
namespace {

// outs[i] = x @ matrices[i]^T, in one call where the matrices are of one kind and form.
void Multiply(const float* x, int64_t rows, const Matrix* const* matrices, int64_t count,
              float* const* outs, Activations activations) {
  const auto can_share = [&](const Matrix* matrix) {
    const Weight& first = matrices[0]->weight;
    return !matrix->is_int8_dot() && matrix->weight.kind == first.kind &&
           FormOf(matrix->weight) == FormOf(first);
  };
  if (std::all_of(matrices, matrices + count, can_share)) {
    LinearOperand operands[kMostOperands];
    for (int64_t i = 0; i < count; ++i) operands[i] = {&matrices[i]->weight, matrices[i]->bias};
    Linear(x, rows, operands, count, outs, activations);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const Matrix& matrix = *matrices[i];
    if (matrix.is_int8_dot()) {
      Int8DotLinear(x, rows, matrix.int8_dot, matrix.bias, outs[i]);
    } else {
      const LinearOperand operand{&matrix.weight, matrix.bias};
      Linear(x, rows, &operand, 1, outs + i, activations);
    }
  }
}

void Multiply(const float* x, int64_t rows, const Matrix& matrix, float* out,
              Activations activations) {
  const Matrix* const only = &matrix;
  Multiply(x, rows, &only, 1, &out, activations);
}

// The parts of a workspace.
struct Workspace {
  float *q, *k, *v, *attention, *logits, *expert_weights;
  int32_t* expert_ids;

  Workspace(const DecoderShape& shape, int64_t tokens, float* floats) {
    const auto take = [&](int64_t per_token) {
      float* const taken = floats;
      floats += tokens * per_token;
      return taken;
    };
    const int64_t width = int64_t{shape.num_heads} * shape.head_dim;
    const int64_t kv_width = int64_t{shape.num_kv_heads} * shape.head_dim;
    q = take(std::max(width, shape.hidden));
    k = take(kv_width);
    v = take(kv_width);
    attention = take(width);
    logits = take(shape.num_experts);
    expert_weights = take(shape.top_k);
    expert_ids = reinterpret_cast<int32_t*>(take(shape.top_k));
  }
};

void Append(const DecoderShape& shape, const DecoderLayer& layer, const DecoderStep& step,
            const Workspace& work) {
  const AttentionCall& pages = layer.pages;
  AppendKv({
      .keys = work.k,
      .values = work.v,
      .key_pages = const_cast<void*>(pages.keys),
      .value_pages = const_cast<void*>(pages.values),
      .key_page_stride = pages.key_page_stride,
      .value_page_stride = pages.value_page_stride,
      .kv_type = pages.kv_type,
      .key_scales = const_cast<float*>(pages.key_scales),
      .value_scales = const_cast<float*>(pages.value_scales),
      .key_scale_stride = pages.key_scale_stride,
      .value_scale_stride = pages.value_scale_stride,
      .slots = step.slots,
      .num_tokens = step.num_tokens,
      .num_kv_heads = shape.num_kv_heads,
      .head_dim = shape.head_dim,
      .page_size = shape.page_size,
  });
}

void Attend(const DecoderShape& shape, const DecoderLayer& layer, const DecoderStep& step,
            const Workspace& work) {
  AttentionCall call = layer.pages;
  call.q = work.q;
  call.out = work.attention;
  call.page_tables = step.page_tables;
  call.table_width = step.table_width;
  call.q_offsets = step.q_offsets;
  call.kv_lens = step.kv_lens;
  call.num_heads = shape.num_heads;
  call.num_kv_heads = shape.num_kv_heads;
  call.head_dim = shape.head_dim;
  call.page_size = shape.page_size;
  call.scale = shape.scale;
  call.sliding_window = shape.sliding_window;
  ChunkedAttention(call, step.num_sequences);
}

// Sorts the entries of expert_ids by expert; among equals the order is that of the tokens.
void SortByExpert(const DecoderShape& shape, const DecoderStep& step, const Workspace& work) {
  const int64_t entries = step.num_tokens * shape.top_k;
  int32_t* const offsets = step.offsets;
  std::fill(offsets, offsets + shape.num_experts + 1, 0);
  for (int64_t i = 0; i < entries; ++i) ++offsets[work.expert_ids[i]];
  int32_t begin = 0;
  for (int64_t e = 0; e <= shape.num_experts; ++e) {
    const int32_t count = offsets[e];
    offsets[e] = begin;
    begin += count;
  }
  for (int64_t i = 0; i < entries; ++i) {
    const int32_t at = offsets[work.expert_ids[i]]++;
    step.rows[at] = static_cast<int32_t>(i / shape.top_k);
    step.row_weights[at] = work.expert_weights[i];
  }
  // Each stands now where the next one begins.
  for (int64_t e = shape.num_experts; e > 0; --e) offsets[e] = offsets[e - 1];
  offsets[0] = 0;
}

void RouteAllToOne(const DecoderStep& step) {
  std::iota(step.rows, step.rows + step.num_tokens, 0);
  std::fill(step.row_weights, step.row_weights + step.num_tokens, 1.0f);
  step.offsets[0] = 0;
  step.offsets[1] = static_cast<int32_t>(step.num_tokens);
}

}  // namespace

int64_t DecoderRowFloats(const DecoderShape& shape) {
  const int64_t width = int64_t{shape.num_heads} * shape.head_dim;
  const int64_t kv_width = int64_t{shape.num_kv_heads} * shape.head_dim;
  return std::max(width, shape.hidden) + 2 * kv_width + width + shape.num_experts + 2 * shape.top_k;
}

void AttendAndRoute(const DecoderShape& shape, const DecoderLayer& layer, const DecoderStep& step) {
  const int64_t tokens = step.num_tokens;
  const Workspace work(shape, tokens, step.workspace);
  RmsNorm(step.x, layer.attn_norm, shape.eps, tokens, shape.hidden, step.h);
  const Matrix* const qkv[] = {&layer.q, &layer.k, &layer.v};
  float* const projected[] = {work.q, work.k, work.v};
  Multiply(step.h, tokens, qkv, 3, projected, shape.activations);
  Rope(work.q, step.cos, step.sin, tokens, shape.num_heads, shape.head_dim, step.rotary_half);
  Rope(work.k, step.cos, step.sin, tokens, shape.num_kv_heads, shape.head_dim, step.rotary_half);
  Append(shape, layer, step, work);
  Attend(shape, layer, step, work);
  float* const o = work.q;  // the queries have been asked
  Multiply(work.attention, tokens, layer.o, o, shape.activations);
  AddAndNorm(step.x, o, layer.ffn_norm, shape.eps, tokens, shape.hidden, step.h);
  if (shape.num_experts == 1) return RouteAllToOne(step);
  Multiply(step.h, tokens, layer.router, work.logits, shape.activations);
  Route(work.logits, tokens, shape.num_experts, shape.top_k, work.expert_ids, work.expert_weights);
  SortByExpert(shape, step, work);
}

void RunExperts(const DecoderShape& shape, const DecoderLayer& layer, const DecoderStep& step) {
  // Without a router the rows are all tokens in order: nothing to gather.
  const int32_t* const rows = shape.num_experts == 1 ? nullptr : step.rows;
  if (!layer.int8_experts.empty()) {
    Int8DotExpertFfn(step.h, layer.int8_experts.data(), shape.num_experts, step.offsets, rows,
                     step.row_weights, step.x);
  } else {
    ExpertFfn(step.h, layer.experts.data(), shape.num_experts, step.offsets, rows, step.row_weights,
              step.x, shape.activations);
  }
}

}  // namespace specmoeoff
