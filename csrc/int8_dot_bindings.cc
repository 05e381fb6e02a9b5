// int8_dot for Python: arguments are checked here, the work runs without the
// GIL.
#include <nanobind/nanobind.h>

#include <string>

#include "arguments.h"
#include "expert_ffn_bindings.h"
#include "int8_dot.h"

namespace nb = nanobind;

namespace specmoeoff {
namespace {

void LinearCall(nb::handle x, nb::handle weight, nb::handle bias, nb::handle out_object) {
  const ProductArguments<Int8DotArgument> in(x, weight, bias);
  const Array out(out_object, "out", {Dtype::kFloat32}, 2, /*writable=*/true);
  RequireShape(out, "out", {in.rows(), in.weight->n});
  nb::gil_scoped_release release;
  Int8DotLinear(in.x.data<float>(), in.rows(), *in.weight, in.bias(), out.data<float>());
}

void LinearTopCall(nb::handle x, nb::handle weight, nb::handle bias, nb::handle values,
                   nb::handle ids) {
  const ProductArguments<Int8DotArgument> in(x, weight, bias);
  const TopArguments best(values, ids, in.rows(), in.weight->n);
  nb::gil_scoped_release release;
  Int8DotLinearTop(in.x.data<float>(), in.rows(), *in.weight, in.bias(), best.top(),
                   best.values.data<float>(), best.ids.data<int32_t>());
}

void EmbeddingCall(nb::handle ids_object, nb::handle weight_object, nb::handle out_object) {
  const Array ids(ids_object, "token_ids", {Dtype::kInt32}, 1);
  const Int8DotArgument weight(weight_object, "weight");
  const Array out(out_object, "out", {Dtype::kFloat32}, 2, /*writable=*/true);
  RequireInRange(ids, "token_ids", weight->n);
  RequireShape(out, "out", {ids.dim(0), weight->k});
  nb::gil_scoped_release release;
  WidenInt8Dot(*weight, ids.data<int32_t>(), ids.dim(0), out.data<float>());
}

void WidenCall(nb::handle weight_object, nb::handle out_object) {
  const Int8DotArgument weight(weight_object, "weight");
  const Array out(out_object, "out", {Dtype::kFloat32}, 2, /*writable=*/true);
  RequireShape(out, "out", {weight->n, weight->k});
  nb::gil_scoped_release release;
  WidenInt8Dot(*weight, nullptr, weight->n, out.data<float>());
}

void PackCall(nb::handle weight_object, nb::handle packed_object, nb::handle scales_object) {
  const WeightArgument weight(weight_object, "weight");
  const Array packed(packed_object, "packed", {Dtype::kInt8}, 4,
                     /*writable=*/true);
  const Array scales(scales_object, "scales", {Dtype::kFloat32}, 1,
                     /*writable=*/true);
  RequireShape(packed, "packed",
               {CeilDivide(weight->n, kInt8Block), CeilDivide(weight->k, 4), kInt8Block, 4});
  RequireShape(scales, "scales", {weight->n});
  nb::gil_scoped_release release;
  PackInt8Dot(*weight, packed.data<int8_t>(), scales.data<float>());
}

}  // namespace
}  // namespace specmoeoff

void BindInt8Dot(nb::module_& m) {
  using namespace specmoeoff;
  m.def("int8_dot_linear", &LinearCall, nb::arg("x"), nb::arg("weight"), nb::arg("bias").none(),
        nb::arg("out"));
  m.def("int8_dot_linear_top", &LinearTopCall, nb::arg("x"), nb::arg("weight"),
        nb::arg("bias").none(), nb::arg("values"), nb::arg("ids"));
  m.def("int8_dot_expert_ffn", &ExpertFfnCall<Int8DotArgument, Int8DotExpert, &Int8DotExpertFfn>,
        nb::arg("x"), nb::arg("gate"), nb::arg("up"), nb::arg("down"), nb::arg("out"),
        nb::arg("rows").none() = nb::none(), nb::arg("row_weights").none() = nb::none());
  m.def("int8_dot_expert_ffn_many",
        &ExpertFfnManyCall<Int8DotArgument, Int8DotExpert, &Int8DotExpertFfn>, nb::arg("x"),
        nb::arg("experts"), nb::arg("offsets"), nb::arg("rows"), nb::arg("row_weights"),
        nb::arg("out"));
  m.def("int8_dot_embedding", &EmbeddingCall, nb::arg("token_ids"), nb::arg("weight"),
        nb::arg("out"));
  m.def("int8_dot_widen", &WidenCall, nb::arg("weight"), nb::arg("out"));
  m.def("pack_int8_dot", &PackCall, nb::arg("weight"), nb::arg("packed"), nb::arg("scales"));
}
