// Row by row kernels for Python: arguments are checked here, the work runs without the GIL.
#include <nanobind/nanobind.h>

#include "arguments.h"
#include "elementwise.h"

namespace nb = nanobind;

namespace specmoeoff {
namespace {

void RmsNormCall(nb::handle x_object, nb::handle weight_object, double eps, nb::handle out_object) {
  const Array x(x_object, "x", {Dtype::kFloat32}, 2);
  const Array weight(weight_object, "weight", {Dtype::kFloat32}, 1);
  const Array out(out_object, "out", {Dtype::kFloat32}, 2, /*writable=*/true);
  RequireShape(weight, "weight", {x.dim(1)});
  RequireShape(out, "out", {x.dim(0), x.dim(1)});
  nb::gil_scoped_release release;
  RmsNorm(x.data<float>(), weight.data<float>(), static_cast<float>(eps), x.dim(0), x.dim(1),
          out.data<float>());
}

void RopeCall(nb::handle x_object, nb::handle cos_object, nb::handle sin_object) {
  const Array x(x_object, "x", {Dtype::kFloat32}, 3, /*writable=*/true);
  const Array cos(cos_object, "cos", {Dtype::kFloat32}, 2);
  const Array sin(sin_object, "sin", {Dtype::kFloat32}, 2);
  const int64_t half = cos.dim(1);
  RequireShape(cos, "cos", {x.dim(0), half});
  RequireShape(sin, "sin", {x.dim(0), half});
  if (2 * half > x.dim(2))
    throw nb::value_error("cos has more than half as many columns as a head");
  nb::gil_scoped_release release;
  Rope(x.data<float>(), cos.data<float>(), sin.data<float>(), x.dim(0), x.dim(1), x.dim(2), half);
}

void RouteCall(nb::handle logits_object, nb::handle ids_object, nb::handle weights_object) {
  const Array logits(logits_object, "logits", {Dtype::kFloat32}, 2);
  const Array ids(ids_object, "expert_ids", {Dtype::kInt32}, 2, /*writable=*/true);
  const Array weights(weights_object, "expert_weights", {Dtype::kFloat32}, 2, /*writable=*/true);
  const int64_t top_k = ids.dim(1);
  RequireShape(ids, "expert_ids", {logits.dim(0), top_k});
  RequireShape(weights, "expert_weights", {logits.dim(0), top_k});
  if (top_k < 1 || top_k > logits.dim(1)) {
    throw nb::value_error(("top_k is " + std::to_string(top_k) + "; it must be 1 to " +
                           std::to_string(logits.dim(1)) + ", the number of experts")
                              .c_str());
  }
  nb::gil_scoped_release release;
  Route(logits.data<float>(), logits.dim(0), logits.dim(1), top_k, ids.data<int32_t>(),
        weights.data<float>());
}

void EmbeddingCall(nb::handle ids_object, nb::handle weight_object, nb::handle out_object) {
  const Array ids(ids_object, "token_ids", {Dtype::kInt32}, 1);
  const WeightArgument weight(weight_object, "weight");
  const Array out(out_object, "out", {Dtype::kFloat32}, 2, /*writable=*/true);
  RequireInRange(ids, "token_ids", weight->n);
  RequireShape(out, "out", {ids.dim(0), weight->k});
  nb::gil_scoped_release release;
  Widen(*weight, ids.data<int32_t>(), ids.dim(0), out.data<float>());
}

void WidenCall(nb::handle weight_object, nb::handle out_object) {
  const WeightArgument weight(weight_object, "weight");
  const Array out(out_object, "out", {Dtype::kFloat32}, 2, /*writable=*/true);
  RequireShape(out, "out", {weight->n, weight->k});
  nb::gil_scoped_release release;
  Widen(*weight, nullptr, weight->n, out.data<float>());
}

// The group that `scales` asks for; throws ValueError unless there is one.
int64_t GroupOf(const Weight& weight, const Array& scales) {
  const int64_t groups = scales.dim(1);
  RequireShape(scales, "scales", {weight.n, groups});
  if (groups < 1 || weight.k % groups != 0) {
    throw nb::value_error("group must divide the number of columns of weight");
  }
  return weight.k / groups;
}

void QuantizeInt8Call(nb::handle weight_object, nb::handle values_object,
                      nb::handle scales_object) {
  const WeightArgument weight(weight_object, "weight");
  const Array values(values_object, "values", {Dtype::kInt8}, 2, /*writable=*/true);
  const Array scales(scales_object, "scales", {Dtype::kFloat32}, 2, /*writable=*/true);
  RequireShape(values, "values", {weight->n, weight->k});
  const int64_t group = GroupOf(*weight, scales);
  nb::gil_scoped_release release;
  QuantizeInt8(*weight, group, values.data<int8_t>(), scales.data<float>());
}

void QuantizeInt4Call(nb::handle weight_object, nb::handle values_object,
                      nb::handle scales_object) {
  const WeightArgument weight(weight_object, "weight");
  const Array values(values_object, "values", {Dtype::kUint8}, 2, /*writable=*/true);
  const Array scales(scales_object, "scales", {Dtype::kFloat32}, 2, /*writable=*/true);
  RequireShape(values, "values", {weight->n, weight->k / 2});
  const int64_t group = GroupOf(*weight, scales);
  if (!IsInt4Group(group)) throw nb::value_error("group must be 32, 64 or 128");
  nb::gil_scoped_release release;
  QuantizeInt4(*weight, group, values.data<uint8_t>(), scales.data<float>());
}

void ToBfloat16Call(nb::handle x_object, nb::handle out_object) {
  const Array x(x_object, "x", {Dtype::kFloat32}, -1);
  const Array out(out_object, "out", {Dtype::kUint16}, x.ndim(), /*writable=*/true);
  if (out.size() != x.size()) throw nb::value_error("out must have the shape of x");
  nb::gil_scoped_release release;
  ToBfloat16(x.data<float>(), x.size(), out.data<uint16_t>());
}

}  // namespace
}  // namespace specmoeoff

void BindElementwise(nb::module_& m) {
  using namespace specmoeoff;
  m.def("rms_norm", &RmsNormCall, nb::arg("x"), nb::arg("weight"), nb::arg("eps"), nb::arg("out"));
  m.def("rope", &RopeCall, nb::arg("x"), nb::arg("cos"), nb::arg("sin"));
  m.def("route", &RouteCall, nb::arg("logits"), nb::arg("expert_ids"), nb::arg("expert_weights"));
  m.def("embedding", &EmbeddingCall, nb::arg("token_ids"), nb::arg("weight"), nb::arg("out"));
  m.def("widen", &WidenCall, nb::arg("weight"), nb::arg("out"));
  m.def("quantize_int8", &QuantizeInt8Call, nb::arg("weight"), nb::arg("values"),
        nb::arg("scales"));
  m.def("quantize_int4", &QuantizeInt4Call, nb::arg("weight"), nb::arg("values"),
        nb::arg("scales"));
  m.def("to_bfloat16", &ToBfloat16Call, nb::arg("x"), nb::arg("out"));
}
