// Weights as arguments of the bindings.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>

#include <string>
#include <utility>

#include "array.h"
#include "int8_dot.h"
#include "packed.h"
#include "top.h"
#include "weight.h"

namespace specmoeoff {

// A matrix argument: an array of float32, float16 or uint16 (bfloat16), or an object with `values`
// (int8 [N, K], or uint8 [N, K / 2] for int4) and `scales` (float32 [N, K / group]), or one with
// `blob` (uint8, see packed.h) and `shape` (N, K). Keeps the arrays alive.
class WeightArgument {
 public:
  // Throws TypeError or ValueError naming the argument.
  WeightArgument(nanobind::handle object, const std::string& name) {
    namespace nb = nanobind;
    if (PyObject_CheckBuffer(object.ptr())) {
      values_ = Array(object, name.c_str(), {Dtype::kFloat32, Dtype::kFloat16, Dtype::kUint16}, 2);
      weight_.kind = values_.dtype() == Dtype::kFloat32   ? WeightKind::kFloat32
                     : values_.dtype() == Dtype::kFloat16 ? WeightKind::kFloat16
                                                          : WeightKind::kBfloat16;
    } else if (nb::hasattr(object, "values") && nb::hasattr(object, "scales")) {
      ReadQuantised(object, name);
    } else if (nb::hasattr(object, "blob") && nb::hasattr(object, "shape")) {
      ReadPacked(object, name);
      return;
    } else {
      throw nb::type_error((name +
                            " must be a numpy array of float32, float16 or uint16 (bfloat16), an "
                            "Int8Weight, an Int4Weight or a PackedBfloat16")
                               .c_str());
    }
    weight_.data = values_.data<void>();
    weight_.n = values_.dim(0);
    weight_.k = weight_.kind == WeightKind::kInt4 ? 2 * values_.dim(1) : values_.dim(1);
    if (weight_.k == 0) throw nb::value_error((name + " has rows of length 0").c_str());
    if (scales_) ReadGroup(name);
  }

  const Weight& operator*() const { return weight_; }
  const Weight* operator->() const { return &weight_; }

 private:
  void ReadQuantised(nanobind::handle object, const std::string& name) {
    namespace nb = nanobind;
    values_ = Array(nb::object(object.attr("values")), (name + ".values").c_str(),
                    {Dtype::kInt8, Dtype::kUint8}, 2);
    scales_ =
        Array(nb::object(object.attr("scales")), (name + ".scales").c_str(), {Dtype::kFloat32}, 2);
    weight_.kind = values_.dtype() == Dtype::kInt8 ? WeightKind::kInt8 : WeightKind::kInt4;
    weight_.scales = scales_.data<float>();
  }

  void ReadPacked(nanobind::handle object, const std::string& name) {
    std::pair<int64_t, int64_t> shape;
    if (!nanobind::try_cast(nanobind::object(object.attr("shape")), shape)) {
      throw nanobind::type_error((name + ".shape must be two integers").c_str());
    }
    values_ =
        Array(nanobind::object(object.attr("blob")), (name + ".blob").c_str(), {Dtype::kUint8}, 1);
    const auto [n, k] = shape;
    const bool fits = n >= 0 && k >= kPackedRun && k <= kPackedMostK && k % kPackedRun == 0 &&
                      n <= INT32_MAX && values_.size() >= PackedBytes(n, k, 0);
    if (!fits || values_.size() < PackedBytes(n, k, PackedPatches(values_.data<char>()))) {
      throw nanobind::value_error((name + ".blob is no packed matrix of shape [" +
                                   std::to_string(n) + ", " + std::to_string(k) + "]")
                                      .c_str());
    }
    weight_.kind = WeightKind::kPackedBfloat16;
    weight_.data = values_.data<char>() + kPackedHeaderBytes;
    weight_.n = n;
    weight_.k = k;
  }

  void ReadGroup(const std::string& name) {
    const int64_t groups = scales_.dim(1);
    if (scales_.dim(0) != weight_.n || groups < 1 || weight_.k % groups != 0) {
      throw nanobind::value_error(
          (name +
           ".scales must have one row per row of values and a number of columns that divides "
           "the number of columns of the matrix")
              .c_str());
    }
    weight_.group = weight_.k / groups;
    if (weight_.kind == WeightKind::kInt4 && !IsInt4Group(weight_.group)) {
      throw nanobind::value_error((name + ".scales makes groups of " +
                                   std::to_string(weight_.group) +
                                   "; those of int4 must be of 32, 64 or 128")
                                      .c_str());
    }
  }

  Array values_;
  Array scales_;
  Weight weight_;
};

// A matrix for int8_dot: an object with `packed` (int8), `scales` (float32 [N]) and `shape` (N, K).
// Keeps the arrays alive.
class Int8DotArgument {
 public:
  // Throws TypeError or ValueError naming the argument.
  Int8DotArgument(nanobind::handle object, const std::string& name) {
    std::pair<int64_t, int64_t> shape;
    if (!nanobind::hasattr(object, "packed") || !nanobind::hasattr(object, "scales") ||
        !nanobind::hasattr(object, "shape") ||
        !nanobind::try_cast(nanobind::object(object.attr("shape")), shape)) {
      throw nanobind::type_error((name + " must be an Int8DotWeight, as the others are").c_str());
    }
    weight_.n = shape.first;
    weight_.k = shape.second;
    if (weight_.n < 0 || weight_.k < 1 || weight_.k > kInt8MostK) {
      throw nanobind::value_error((name + " has rows of length " + std::to_string(weight_.k) +
                                   "; it must be 1 to " + std::to_string(kInt8MostK))
                                      .c_str());
    }
    const std::string packed = name + ".packed", scales = name + ".scales";
    packed_ = Array(nanobind::object(object.attr("packed")), packed.c_str(), {Dtype::kInt8}, 4);
    scales_ = Array(nanobind::object(object.attr("scales")), scales.c_str(), {Dtype::kFloat32}, 1);
    RequireShape(packed_, packed.c_str(),
                 {CeilDivide(weight_.n, kInt8Block), weight_.steps(), kInt8Block, 4});
    RequireShape(scales_, scales.c_str(), {weight_.n});
    weight_.packed = packed_.data<int8_t>();
    weight_.scales = scales_.data<float>();
  }

  const Int8DotWeight& operator*() const { return weight_; }
  const Int8DotWeight* operator->() const { return &weight_; }

 private:
  Array packed_;
  Array scales_;
  Int8DotWeight weight_;
};

// The operands of x @ weight^T + bias; keeps the arrays alive. W is a weight's argument class.
template <class W>
struct ProductArguments {
  // Throws TypeError or ValueError naming the argument.
  ProductArguments(nanobind::handle x_object, nanobind::handle weight_object,
                   nanobind::handle bias_object)
      : x(x_object, "x", {Dtype::kFloat32}, 2), weight(weight_object, "weight") {
    RequireShape(x, "x", {x.dim(0), weight->k});
    if (bias_object.is_none()) return;
    bias_array = Array(bias_object, "bias", {Dtype::kFloat32}, 1);
    RequireShape(bias_array, "bias", {weight->n});
  }

  int64_t rows() const { return x.dim(0); }
  const float* bias() const { return bias_array ? bias_array.template data<float>() : nullptr; }

  Array x;
  W weight;
  Array bias_array;
};

// Where the largest outputs of each row go: values float32 and ids int32, [rows, top].
struct TopArguments {
  TopArguments(nanobind::handle values_object, nanobind::handle ids_object, int64_t rows,
               int64_t columns)
      : values(values_object, "values", {Dtype::kFloat32}, 2, /*writable=*/true),
        ids(ids_object, "ids", {Dtype::kInt32}, 2, /*writable=*/true) {
    RequireShape(values, "values", {rows, values.dim(1)});
    RequireShape(ids, "ids", {rows, values.dim(1)});
    const int64_t most = columns < kMostTop ? columns : kMostTop;
    if (top() >= 1 && top() <= most) return;
    throw nanobind::value_error(("top is " + std::to_string(top()) + "; it must be 1 to " +
                                 std::to_string(most) + " for " + std::to_string(columns) +
                                 " outputs")
                                    .c_str());
  }

  int64_t top() const { return values.dim(1); }

  Array values;
  Array ids;
};

// Throws ValueError unless every id is in [0, limit).
inline void RequireInRange(const Array& ids, const char* name, int64_t limit) {
  const auto* values = ids.data<int32_t>();
  for (int64_t i = 0; i < ids.size(); ++i) {
    if (values[i] >= 0 && values[i] < limit) continue;
    throw nanobind::value_error((std::string(name) + " has " + std::to_string(values[i]) +
                                 "; it must be in 0 to " + std::to_string(limit - 1))
                                    .c_str());
  }
}

}  // namespace specmoeoff
