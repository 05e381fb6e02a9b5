// A layer's pages and a step's sequences as arguments of the bindings.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "array.h"
#include "attention.h"

namespace specmoeoff {

[[noreturn]] inline void Refuse(const std::string& message) {
  throw nanobind::value_error(message.c_str());
}

// The pages of one layer's K and V and what their shapes say.
struct Pages {
  Array keys;
  Array values;
  Array key_scales;  // of int8, else empty
  Array value_scales;
  int64_t num_pages, num_kv_heads, head_dim, page_size;

  Pages(nanobind::handle k_pages, nanobind::handle v_pages, nanobind::handle k_scales,
        nanobind::handle v_scales, bool writable)
      : keys(k_pages, "k_pages", {Dtype::kUint16, Dtype::kFloat16, Dtype::kFloat32, Dtype::kInt8},
             4, writable, true),
        values(v_pages, "v_pages", {Dtype::kUint16, Dtype::kFloat16, Dtype::kFloat32, Dtype::kInt8},
               4, writable, true),
        num_pages(keys.dim(0)),
        num_kv_heads(keys.dim(1)),
        head_dim(keys.dim(2)),
        page_size(keys.dim(3)) {
    if (keys.dtype() != values.dtype()) {
      throw nanobind::type_error("v_pages must have the dtype of k_pages");
    }
    RequireShape(values, "v_pages", {num_pages, num_kv_heads, page_size, head_dim});
    if (page_size < 16 || page_size % 16 != 0 || page_size > 4096) {
      Refuse("k_pages has pages of " + std::to_string(page_size) +
             " tokens; it must be a multiple of 16 up to 4096");
    }
    if (num_kv_heads < 1) Refuse("k_pages has no KV heads");
    if (head_dim < 1 || head_dim > kAttentionMaxHeadDim) {
      Refuse("k_pages has head size " + std::to_string(head_dim) + "; it must be 1 to " +
             std::to_string(kAttentionMaxHeadDim));
    }
    if (keys.first_stride() % item_size() != 0) Refuse("k_pages has an odd stride");
    if (values.first_stride() % item_size() != 0) Refuse("v_pages has an odd stride");
    key_scales = Scales(k_scales, "k_scales", writable);
    value_scales = Scales(v_scales, "v_scales", writable);
  }

  KvType kv_type() const {
    switch (keys.dtype()) {
      case Dtype::kUint16:
        return KvType::kBfloat16;
      case Dtype::kFloat16:
        return KvType::kFloat16;
      case Dtype::kInt8:
        return KvType::kInt8;
      default:
        return KvType::kFloat32;
    }
  }
  int64_t item_size() const {
    switch (kv_type()) {
      case KvType::kFloat32:
        return 4;
      case KvType::kInt8:
        return 1;
      default:
        return 2;
    }
  }
  int64_t key_page_stride() const { return keys.first_stride() / item_size(); }
  int64_t value_page_stride() const { return values.first_stride() / item_size(); }
  static float* ScaleData(const Array& scales) { return scales ? scales.data<float>() : nullptr; }
  static int64_t ScaleStride(const Array& scales) { return scales ? scales.first_stride() / 4 : 0; }

 private:
  Array Scales(nanobind::handle object, const char* name, bool writable) const {
    const std::string label(name);
    if (keys.dtype() != Dtype::kInt8) {
      if (!object.is_none()) Refuse(label + " goes with pages of int8; it must be None");
      return Array();
    }
    if (object.is_none()) Refuse(label + " is missing; pages of int8 need it");
    Array scales(object, name, {Dtype::kFloat32}, 3, writable, true);
    RequireShape(scales, name, {num_pages, num_kv_heads, page_size});
    if (scales.first_stride() % 4 != 0) Refuse(label + " has an odd stride");
    return scales;
  }
};

// Every slot must lie in a page.
inline void CheckSlots(const Array& slots, const Pages& pages) {
  const auto* const slot = slots.data<int32_t>();
  for (int64_t t = 0; t < slots.dim(0); ++t) {
    if (slot[t] >= 0 && slot[t] < pages.num_pages * pages.page_size) continue;
    Refuse("slots has " + std::to_string(slot[t]) + "; k_pages has room for " +
           std::to_string(pages.num_pages * pages.page_size) + " tokens");
  }
}

// Each sequence's numbers must make sense and its pages must exist.
inline void CheckSequences(const AttentionCall& call, const Pages& pages, int64_t num_sequences,
                           int64_t num_tokens) {
  if (call.q_offsets[0] != 0) Refuse("q_offsets must start with 0");
  for (int64_t b = 0; b < num_sequences; ++b) {
    const std::string where = " of sequence " + std::to_string(b);
    const int64_t n = int64_t{call.q_offsets[b + 1]} - call.q_offsets[b];
    const int64_t kv_len = call.kv_lens[b];
    if (n < 0) Refuse("q_offsets must not fall");
    if (n > 0 && call.q_offsets[b + 1] > num_tokens)
      Refuse("q_offsets must end with T, the rows of q");
    if (kv_len < n) {
      Refuse("kv_lens" + where + " is " + std::to_string(kv_len) + ", less than its " +
             std::to_string(n) + " queries");
    }
    if (call.tree_mask && n > 64)
      Refuse("tree_mask allows 64 queries; q_offsets gives more" + where);
    const int64_t used = (kv_len + pages.page_size - 1) / pages.page_size;
    if (n > 0 && used > call.table_width) Refuse("page_tables is too narrow for kv_lens" + where);
    for (int64_t i = 0; n > 0 && i < used; ++i) {
      const int64_t page = call.page_tables[b * call.table_width + i];
      if (page < 0 || page >= pages.num_pages) {
        Refuse("page_tables" + where + " has page " + std::to_string(page) + "; k_pages has " +
               std::to_string(pages.num_pages));
      }
    }
  }
  if (call.q_offsets[num_sequences] != num_tokens)
    Refuse("q_offsets must end with T, the rows of q");
}

}  // namespace specmoeoff
