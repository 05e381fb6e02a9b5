// linear and expert_ffn for Python: arguments are checked here, the work runs without the GIL.
#include <nanobind/nanobind.h>

#include "arguments.h"
#include "expert_ffn_bindings.h"
#include "linear.h"

namespace nb = nanobind;

namespace specmoeoff {
namespace {

Activations ActivationsOf(bool bfloat16) {
  return bfloat16 ? Activations::kBfloat16 : Activations::kFloat32;
}

void LinearCall(nb::handle x, nb::handle weight, nb::handle bias, nb::handle out_object,
                bool bfloat16) {
  const ProductArguments<WeightArgument> in(x, weight, bias);
  const Array out(out_object, "out", {Dtype::kFloat32}, 2, /*writable=*/true);
  RequireShape(out, "out", {in.rows(), in.weight->n});
  nb::gil_scoped_release release;
  Linear(in.x.data<float>(), in.rows(), *in.weight, in.bias(), out.data<float>(),
         ActivationsOf(bfloat16));
}

void LinearTopCall(nb::handle x, nb::handle weight, nb::handle bias, nb::handle values,
                   nb::handle ids, bool bfloat16) {
  const ProductArguments<WeightArgument> in(x, weight, bias);
  const TopArguments best(values, ids, in.rows(), in.weight->n);
  nb::gil_scoped_release release;
  LinearTop(in.x.data<float>(), in.rows(), *in.weight, in.bias(), best.top(),
            best.values.data<float>(), best.ids.data<int32_t>(), ActivationsOf(bfloat16));
}

void RunExperts(const float* x, const Expert* experts, int64_t num_experts, const int32_t* offsets,
                const int32_t* rows, const float* row_weights, float* out, bool bfloat16) {
  ExpertFfn(x, experts, num_experts, offsets, rows, row_weights, out, ActivationsOf(bfloat16));
}

}  // namespace
}  // namespace specmoeoff

void BindLinear(nb::module_& m) {
  using namespace specmoeoff;
  m.def("linear", &LinearCall, nb::arg("x"), nb::arg("weight"), nb::arg("bias").none(),
        nb::arg("out"), nb::arg("bfloat16") = false);
  m.def("linear_top", &LinearTopCall, nb::arg("x"), nb::arg("weight"), nb::arg("bias").none(),
        nb::arg("values"), nb::arg("ids"), nb::arg("bfloat16") = false);
  m.def("expert_ffn", &ExpertFfnCall<WeightArgument, Expert, &RunExperts, bool>, nb::arg("x"),
        nb::arg("gate"), nb::arg("up"), nb::arg("down"), nb::arg("out"),
        nb::arg("rows").none() = nb::none(), nb::arg("row_weights").none() = nb::none(),
        nb::arg("bfloat16") = false);
  m.def("expert_ffn_many", &ExpertFfnManyCall<WeightArgument, Expert, &RunExperts, bool>,
        nb::arg("x"), nb::arg("experts"), nb::arg("offsets"), nb::arg("rows"),
        nb::arg("row_weights"), nb::arg("out"), nb::arg("bfloat16") = false);
}
