// chunked_attention and append_kv as Python sees them: checks every argument, then runs without the
// GIL.
#include <nanobind/nanobind.h>

#include <cmath>
#include <string>

#include "append_kv.h"
#include "array.h"
#include "attention.h"

namespace nb = nanobind;

namespace specmoeoff {
namespace {

[[noreturn]] void Refuse(const std::string& message) { throw nb::value_error(message.c_str()); }

// The pages of one layer's K and V and what their shapes say.
struct Pages {
  Array keys;
  Array values;
  Array key_scales;  // of int8, else empty
  Array value_scales;
  int64_t num_pages, num_kv_heads, head_dim, page_size;

  Pages(nb::handle k_pages, nb::handle v_pages, nb::handle k_scales, nb::handle v_scales,
        bool writable)
      : keys(k_pages, "k_pages", {Dtype::kUint16, Dtype::kFloat16, Dtype::kFloat32, Dtype::kInt8},
             4, writable, true),
        values(v_pages, "v_pages", {Dtype::kUint16, Dtype::kFloat16, Dtype::kFloat32, Dtype::kInt8},
               4, writable, true),
        num_pages(keys.dim(0)),
        num_kv_heads(keys.dim(1)),
        head_dim(keys.dim(2)),
        page_size(keys.dim(3)) {
    if (keys.dtype() != values.dtype()) {
      throw nb::type_error("v_pages must have the dtype of k_pages");
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
  Array Scales(nb::handle object, const char* name, bool writable) const {
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

// Each sequence's numbers must make sense and its pages must exist.
void CheckSequences(const AttentionCall& call, const Pages& pages, int64_t num_sequences,
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

void CheckNumbers(double scale, int64_t sliding_window, double softcap) {
  if (!std::isfinite(scale)) Refuse("scale must be finite");
  if (sliding_window < 0) Refuse("sliding_window must be 0 (none) or more");
  if (!std::isfinite(softcap) || softcap < 0) Refuse("softcap must be 0 (none) or more");
}

void BoundAttention(nb::handle q, nb::handle k_pages, nb::handle v_pages, nb::handle page_tables,
                    nb::handle q_offsets, nb::handle kv_lens, double scale, int64_t sliding_window,
                    double softcap, nb::object sinks, nb::object tree_mask, nb::object k_scales,
                    nb::object v_scales, nb::handle out) {
  const Pages pages(k_pages, v_pages, k_scales, v_scales, false);
  const Array queries(q, "q", {Dtype::kFloat32}, 3);
  const Array output(out, "out", {Dtype::kFloat32}, 3, true);
  const Array tables(page_tables, "page_tables", {Dtype::kInt32}, 2);
  const Array offsets(q_offsets, "q_offsets", {Dtype::kInt32}, 1);
  const Array lens(kv_lens, "kv_lens", {Dtype::kInt32}, 1);
  const int64_t num_tokens = queries.dim(0), num_heads = queries.dim(1);
  const int64_t num_sequences = lens.dim(0);
  CheckNumbers(scale, sliding_window, softcap);
  RequireShape(queries, "q", {num_tokens, num_heads, pages.head_dim});
  RequireShape(output, "out", {num_tokens, num_heads, pages.head_dim});
  RequireShape(offsets, "q_offsets", {num_sequences + 1});
  RequireShape(tables, "page_tables", {num_sequences, tables.dim(1)});
  if (num_heads < 1 || num_heads % pages.num_kv_heads != 0 || num_heads > 65536) {
    Refuse("q has " + std::to_string(num_heads) + " heads; it must be a multiple of the " +
           std::to_string(pages.num_kv_heads) + " KV heads of k_pages");
  }
  Array sink_values, tree_bits;
  if (!sinks.is_none()) {
    sink_values = Array(sinks, "sinks", {Dtype::kFloat32}, 1);
    RequireShape(sink_values, "sinks", {num_heads});
  }
  if (!tree_mask.is_none()) {
    tree_bits = Array(tree_mask, "tree_mask", {Dtype::kUint64}, 1);
    RequireShape(tree_bits, "tree_mask", {num_tokens});
  }
  const AttentionCall call{
      .q = queries.data<float>(),
      .out = output.data<float>(),
      .keys = pages.keys.data<void>(),
      .values = pages.values.data<void>(),
      .key_page_stride = pages.key_page_stride(),
      .value_page_stride = pages.value_page_stride(),
      .kv_type = pages.kv_type(),
      .key_scales = Pages::ScaleData(pages.key_scales),
      .value_scales = Pages::ScaleData(pages.value_scales),
      .key_scale_stride = Pages::ScaleStride(pages.key_scales),
      .value_scale_stride = Pages::ScaleStride(pages.value_scales),
      .page_tables = tables.data<int32_t>(),
      .table_width = tables.dim(1),
      .q_offsets = offsets.data<int32_t>(),
      .kv_lens = lens.data<int32_t>(),
      .num_heads = static_cast<int>(num_heads),
      .num_kv_heads = static_cast<int>(pages.num_kv_heads),
      .head_dim = static_cast<int>(pages.head_dim),
      .page_size = static_cast<int>(pages.page_size),
      .scale = scale,
      .softcap = softcap,
      .sliding_window = sliding_window,
      .sinks = sink_values ? sink_values.data<float>() : nullptr,
      .tree_mask = tree_bits ? tree_bits.data<uint64_t>() : nullptr,
  };
  CheckSequences(call, pages, num_sequences, num_tokens);
  nb::gil_scoped_release release;
  ChunkedAttention(call, static_cast<int>(num_sequences));
}

void BoundAppend(nb::handle keys, nb::handle values, nb::handle k_pages, nb::handle v_pages,
                 nb::handle slots, nb::object k_scales, nb::object v_scales) {
  const Pages pages(k_pages, v_pages, k_scales, v_scales, true);
  const Array k(keys, "keys", {Dtype::kFloat32}, 3);
  const Array v(values, "values", {Dtype::kFloat32}, 3);
  const Array where(slots, "slots", {Dtype::kInt32}, 1);
  const int64_t num_tokens = where.dim(0);
  RequireShape(k, "keys", {num_tokens, pages.num_kv_heads, pages.head_dim});
  RequireShape(v, "values", {num_tokens, pages.num_kv_heads, pages.head_dim});
  const int32_t* const slot = where.data<int32_t>();
  for (int64_t t = 0; t < num_tokens; ++t) {
    if (slot[t] < 0 || slot[t] >= pages.num_pages * pages.page_size) {
      Refuse("slots has " + std::to_string(slot[t]) + "; k_pages has room for " +
             std::to_string(pages.num_pages * pages.page_size) + " tokens");
    }
  }
  const AppendCall call{
      .keys = k.data<float>(),
      .values = v.data<float>(),
      .key_pages = pages.keys.data<void>(),
      .value_pages = pages.values.data<void>(),
      .key_page_stride = pages.key_page_stride(),
      .value_page_stride = pages.value_page_stride(),
      .kv_type = pages.kv_type(),
      .key_scales = Pages::ScaleData(pages.key_scales),
      .value_scales = Pages::ScaleData(pages.value_scales),
      .key_scale_stride = Pages::ScaleStride(pages.key_scales),
      .value_scale_stride = Pages::ScaleStride(pages.value_scales),
      .slots = slot,
      .num_tokens = num_tokens,
      .num_kv_heads = static_cast<int>(pages.num_kv_heads),
      .head_dim = static_cast<int>(pages.head_dim),
      .page_size = static_cast<int>(pages.page_size),
  };
  nb::gil_scoped_release release;
  AppendKv(call);
}

}  // namespace
}  // namespace specmoeoff

void BindAttention(nb::module_& m) {
  m.def("chunked_attention", &specmoeoff::BoundAttention, nb::arg("q"), nb::arg("k_pages"),
        nb::arg("v_pages"), nb::arg("page_tables"), nb::arg("q_offsets"), nb::arg("kv_lens"),
        nb::arg("scale"), nb::arg("sliding_window"), nb::arg("softcap"), nb::arg("sinks").none(),
        nb::arg("tree_mask").none(), nb::arg("k_scales").none(), nb::arg("v_scales").none(),
        nb::arg("out"));
  m.def("append_kv", &specmoeoff::BoundAppend, nb::arg("keys"), nb::arg("values"),
        nb::arg("k_pages"), nb::arg("v_pages"), nb::arg("slots"), nb::arg("k_scales").none(),
        nb::arg("v_scales").none());
}
