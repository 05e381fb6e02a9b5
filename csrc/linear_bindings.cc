// linear and expert_ffn for Python: arguments are checked here, the work runs without the GIL.
#include <nanobind/nanobind.h>

#include <string>
#include <vector>

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
  const LinearOperand operand{&*in.weight, in.bias()};
  float* y = out.data<float>();
  nb::gil_scoped_release release;
  Linear(in.x.data<float>(), in.rows(), &operand, 1, &y, ActivationsOf(bfloat16));
}

// All of one kind and form, so that one packed form of x does for all.
void LinearManyCall(nb::handle x_object, nb::sequence weights, nb::sequence biases,
                    nb::sequence outs, bool bfloat16) {
  const Array x(x_object, "x", {Dtype::kFloat32}, 2);
  const int64_t count = static_cast<int64_t>(nb::len(weights));
  if (count < 1 || count > kMostOperands || static_cast<int64_t>(nb::len(biases)) != count ||
      static_cast<int64_t>(nb::len(outs)) != count) {
    throw nb::value_error(
        ("weights, biases and outs must be equally many, 1 to " + std::to_string(kMostOperands))
            .c_str());
  }
  std::vector<WeightArgument> kept;
  std::vector<Array> arrays;
  LinearOperand operands[kMostOperands];
  float* results[kMostOperands];
  kept.reserve(count);
  for (int64_t i = 0; i < count; ++i) {
    const std::string at = "[" + std::to_string(i) + "]";
    const WeightArgument& weight = kept.emplace_back(nb::object(weights[i]), "weights" + at);
    if (weight->kind != kept[0]->kind) {
      throw nb::type_error(("weights" + at + " differs in dtype from weights[0]").c_str());
    }
    if (FormOf(*weight) != FormOf(*kept[0])) {
      throw nb::value_error(("weights" + at + " has groups unlike those of weights[0]").c_str());
    }
    RequireShape(x, "x", {x.dim(0), weight->k});
    const float* bias = nullptr;
    if (!nb::object(biases[i]).is_none()) {
      const std::string name = "biases" + at;
      arrays.push_back(Array(nb::object(biases[i]), name.c_str(), {Dtype::kFloat32}, 1));
      RequireShape(arrays.back(), name.c_str(), {weight->n});
      bias = arrays.back().data<float>();
    }
    operands[i] = {&*weight, bias};
    const std::string name = "outs" + at;
    arrays.push_back(
        Array(nb::object(outs[i]), name.c_str(), {Dtype::kFloat32}, 2, /*writable=*/true));
    RequireShape(arrays.back(), name.c_str(), {x.dim(0), weight->n});
    results[i] = arrays.back().data<float>();
  }
  nb::gil_scoped_release release;
  Linear(x.data<float>(), x.dim(0), operands, count, results, ActivationsOf(bfloat16));
}

void LinearTopCall(nb::handle x, nb::handle weight, nb::handle bias, nb::handle values,
                   nb::handle ids, bool bfloat16) {
  const ProductArguments<WeightArgument> in(x, weight, bias);
  const TopArguments best(values, ids, in.rows(), in.weight->n);
  const LinearOperand operand{&*in.weight, in.bias()};
  nb::gil_scoped_release release;
  LinearTop(in.x.data<float>(), in.rows(), operand, best.top(), best.values.data<float>(),
            best.ids.data<int32_t>(), ActivationsOf(bfloat16));
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
  m.def("linear_many", &LinearManyCall, nb::arg("x"), nb::arg("weights"), nb::arg("biases"),
        nb::arg("outs"), nb::arg("bfloat16") = false);
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
