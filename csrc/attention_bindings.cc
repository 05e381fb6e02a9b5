// chunked_attention and append_kv as Python sees them: checks every argument, then runs without the
// GIL.
#include <nanobind/nanobind.h>

#include <cmath>
#include <string>

#include "append_kv.h"
#include "array.h"
#include "attention.h"
#include "attention_arguments.h"

namespace nb = nanobind;

namespace specmoeoff {
namespace {

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
  CheckSlots(where, pages);
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
      .slots = where.data<int32_t>(),
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
