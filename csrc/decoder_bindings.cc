// Decoder and DecoderPass for Python. A decoder's weights and pages are checked once, when it is
// made (decoder_arguments.h); a pass's arrays when it begins; then a layer is a call.
#include <nanobind/nanobind.h>

#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "arguments.h"
#include "attention_arguments.h"
#include "decoder.h"
#include "decoder_arguments.h"

namespace nb = nanobind;

namespace specmoeoff {
namespace {

// A pass's arrays; whoever holds it may run one layer after the other, each from one thread.
class DecoderPass {
 public:
  DecoderPass(nb::object decoder, nb::handle x, nb::handle cos, nb::handle sin, nb::handle slots,
              nb::handle page_tables, nb::handle q_offsets, nb::handle kv_lens,
              nb::handle workspace, nb::handle h, nb::handle rows, nb::handle row_weights,
              nb::handle offsets)
      : owner_(std::move(decoder)), decoder_(nb::cast<const Decoder&>(owner_)) {
    const DecoderShape& shape = decoder_.shape();
    const int64_t tokens = step_.num_tokens = TakeX(x, shape);
    step_.x = arrays_.back().data<float>();
    step_.cos = Take(cos, "cos", Dtype::kFloat32, 2).data<float>();
    step_.rotary_half = arrays_.back().dim(1);
    RequireShape(arrays_.back(), "cos", {tokens, step_.rotary_half});
    if (2 * step_.rotary_half > shape.head_dim) {
      Refuse("cos has more than half as many columns as a head");
    }
    step_.sin = Floats(sin, "sin", {tokens, step_.rotary_half}, false);
    const Array& where = Take(slots, "slots", Dtype::kInt32, 1);
    RequireShape(where, "slots", {tokens});
    CheckSlots(where, decoder_.pages());
    step_.slots = where.data<int32_t>();
    step_.kv_lens = Take(kv_lens, "kv_lens", Dtype::kInt32, 1).data<int32_t>();
    const int64_t sequences = arrays_.back().dim(0);
    step_.num_sequences = static_cast<int>(sequences);
    step_.page_tables = Take(page_tables, "page_tables", Dtype::kInt32, 2).data<int32_t>();
    step_.table_width = arrays_.back().dim(1);
    RequireShape(arrays_.back(), "page_tables", {sequences, step_.table_width});
    step_.q_offsets = Integers(q_offsets, "q_offsets", {sequences + 1}, false);
    CheckStep();
    step_.workspace = Floats(workspace, "workspace", {tokens * decoder_.row_floats()}, true);
    step_.h = Floats(h, "h", {tokens, shape.hidden}, true);
    step_.rows = Integers(rows, "rows", {tokens * shape.top_k}, true);
    step_.row_weights = Floats(row_weights, "row_weights", {tokens * shape.top_k}, true);
    step_.offsets = Integers(offsets, "offsets", {shape.num_experts + 1}, true);
  }

  DecoderPass(const DecoderPass&) = delete;

  void Attend(int64_t layer) {
    CheckLayer(layer);
    nb::gil_scoped_release release;
    AttendAndRoute(decoder_.shape(), decoder_.layer(layer), step_);
  }

  void Experts(int64_t layer) {
    CheckLayer(layer);
    if (!decoder_.has_experts()) Refuse("the decoder has not been given its experts");
    nb::gil_scoped_release release;
    RunExperts(decoder_.shape(), decoder_.layer(layer), step_);
  }

 private:
  Array& Take(nb::handle object, const char* name, Dtype dtype, int ndim, bool writable = false) {
    arrays_.push_back(Array(object, name, {dtype}, ndim, writable));
    return arrays_.back();
  }
  int64_t TakeX(nb::handle x, const DecoderShape& shape) {
    const Array& array = Take(x, "x", Dtype::kFloat32, 2, true);
    RequireShape(array, "x", {array.dim(0), shape.hidden});
    return array.dim(0);
  }
  float* Floats(nb::handle object, const char* name, std::initializer_list<int64_t> shape,
                bool writable) {
    const Array& array =
        Take(object, name, Dtype::kFloat32, static_cast<int>(shape.size()), writable);
    RequireShape(array, name, shape);
    return array.data<float>();
  }
  int32_t* Integers(nb::handle object, const char* name, std::initializer_list<int64_t> shape,
                    bool writable) {
    const Array& array =
        Take(object, name, Dtype::kInt32, static_cast<int>(shape.size()), writable);
    RequireShape(array, name, shape);
    return array.data<int32_t>();
  }
  void CheckStep() const {
    AttentionCall call{};
    call.page_tables = step_.page_tables;
    call.table_width = step_.table_width;
    call.q_offsets = step_.q_offsets;
    call.kv_lens = step_.kv_lens;
    CheckSequences(call, decoder_.pages(), step_.num_sequences, step_.num_tokens);
  }
  void CheckLayer(int64_t layer) const {
    if (layer >= 0 && layer < decoder_.num_layers()) return;
    Refuse("layer is " + std::to_string(layer) + "; it must be 0 to " +
           std::to_string(decoder_.num_layers() - 1));
  }

  nb::object owner_;
  const Decoder& decoder_;
  std::vector<Array> arrays_;
  DecoderStep step_{};
};

}  // namespace
}  // namespace specmoeoff

void BindDecoder(nb::module_& m) {
  using namespace specmoeoff;
  nb::class_<Decoder>(m, "Decoder")
      .def(nb::init<nb::sequence, nb::sequence, int64_t, int, int, int, int64_t, int64_t, double,
                    double, int64_t, bool>(),
           nb::kw_only(), nb::arg("layers"), nb::arg("pages"), nb::arg("hidden"),
           nb::arg("num_heads"), nb::arg("num_kv_heads"), nb::arg("head_dim"),
           nb::arg("num_experts"), nb::arg("top_k"), nb::arg("eps"), nb::arg("scale"),
           nb::arg("sliding_window"), nb::arg("bfloat16"))
      .def_prop_ro("row_floats", &Decoder::row_floats)
      .def("set_experts", &Decoder::SetExperts, nb::arg("experts").none());
  nb::class_<DecoderPass>(m, "DecoderPass")
      .def(nb::init<nb::object, nb::handle, nb::handle, nb::handle, nb::handle, nb::handle,
                    nb::handle, nb::handle, nb::handle, nb::handle, nb::handle, nb::handle,
                    nb::handle>(),
           nb::arg("decoder"), nb::arg("x"), nb::arg("cos"), nb::arg("sin"), nb::arg("slots"),
           nb::arg("page_tables"), nb::arg("q_offsets"), nb::arg("kv_lens"), nb::arg("workspace"),
           nb::arg("h"), nb::arg("rows"), nb::arg("row_weights"), nb::arg("offsets"))
      .def("attend", &DecoderPass::Attend, nb::arg("layer"))
      .def("experts", &DecoderPass::Experts, nb::arg("layer"));
}
