// expert_ffn and expert_ffn_many for Python, for any kind of weight: arguments
// are checked here, the work runs without the GIL.
#pragma once

#include <nanobind/nanobind.h>

#include <string>
#include <vector>

#include "arguments.h"

namespace specmoeoff {

// An expert as an argument. Argument reads one matrix, from (handle, name), and
// gives its view by *.
template <class Argument>
struct ExpertArgument {
  Argument gate, up, down;

  ExpertArgument(nanobind::handle gate_object, nanobind::handle up_object,
                 nanobind::handle down_object, const std::string& prefix)
      : gate(gate_object, prefix + "gate"),
        up(up_object, prefix + "up"),
        down(down_object, prefix + "down") {}

  // Throws ValueError unless this is an expert of width k and inner size i.
  void RequireSizes(int64_t k, int64_t i, const std::string& prefix) const {
    const auto require = [&](const auto& w, const char* name, int64_t n_wanted, int64_t k_wanted) {
      if (w.n == n_wanted && w.k == k_wanted) return;
      throw nanobind::value_error((prefix + name + " has shape [" + std::to_string(w.n) + ", " +
                                   std::to_string(w.k) + "]; it must be [" +
                                   std::to_string(n_wanted) + ", " + std::to_string(k_wanted) + "]")
                                      .c_str());
    };
    require(*gate, "gate", i, k);
    require(*up, "up", i, k);
    require(*down, "down", k, i);
  }
};

inline void RequireXAndOut(const Array& x, const Array& out) {
  RequireShape(out, "out", {x.dim(0), x.dim(1)});
  const char* x_begin = x.data<char>();
  const char* out_begin = out.data<char>();
  const int64_t bytes = x.size() * static_cast<int64_t>(sizeof(float));
  if (x_begin < out_begin + bytes && out_begin < x_begin + bytes) {
    throw nanobind::value_error("out overlaps x; it must be other memory");
  }
}

inline void RequireNoRepeats(const int32_t* rows, int64_t count, int64_t limit) {
  std::vector<bool> seen(static_cast<size_t>(limit));
  for (int64_t i = 0; i < count; ++i) {
    if (seen[rows[i]]) {
      throw nanobind::value_error(
          ("rows has " + std::to_string(rows[i]) + " twice for one expert").c_str());
    }
    seen[rows[i]] = true;
  }
}

inline void RequireOffsets(const Array& offsets, int64_t num_experts, int64_t num_rows) {
  RequireShape(offsets, "offsets", {num_experts + 1});
  const auto* values = offsets.data<int32_t>();
  bool rising = values[0] >= 0 && values[num_experts] <= num_rows;
  for (int64_t i = 0; i < num_experts; ++i) rising = rising && values[i] <= values[i + 1];
  if (!rising) {
    throw nanobind::value_error("offsets must rise from 0 or more to at most the length of rows");
  }
}

// kRun is ExpertFfn() for experts of type Expert, a triple of what Argument
// views; `extra` are its further arguments.
template <class Argument, class Expert, auto kRun, class... Extra>
void ExpertFfnCall(nanobind::handle x_object, nanobind::handle gate, nanobind::handle up,
                   nanobind::handle down, nanobind::handle out_object, nanobind::handle rows_object,
                   nanobind::handle weights_object, Extra... extra) {
  const Array x(x_object, "x", {Dtype::kFloat32}, 2);
  const Array out(out_object, "out", {Dtype::kFloat32}, 2, /*writable=*/true);
  RequireXAndOut(x, out);
  const ExpertArgument<Argument> argument(gate, up, down, "");
  argument.RequireSizes(x.dim(1), argument.gate->n, "");
  Array rows, row_weights;
  int64_t count = x.dim(0);
  if (!rows_object.is_none()) {
    rows = Array(rows_object, "rows", {Dtype::kInt32}, 1);
    RequireInRange(rows, "rows", x.dim(0));
    count = rows.dim(0);
    RequireNoRepeats(rows.data<int32_t>(), count, x.dim(0));
  }
  if (!weights_object.is_none()) {
    row_weights = Array(weights_object, "row_weights", {Dtype::kFloat32}, 1);
    RequireShape(row_weights, "row_weights", {count});
  }
  const Expert expert = {*argument.gate, *argument.up, *argument.down};
  const int32_t offsets[2] = {0, static_cast<int32_t>(count)};
  nanobind::gil_scoped_release release;
  kRun(x.data<float>(), &expert, 1, offsets, rows ? rows.data<int32_t>() : nullptr,
       row_weights ? row_weights.data<float>() : nullptr, out.data<float>(), extra...);
}

template <class Argument, class Expert, auto kRun, class... Extra>
void ExpertFfnManyCall(nanobind::handle x_object, nanobind::sequence experts,
                       nanobind::handle offsets_object, nanobind::handle rows_object,
                       nanobind::handle weights_object, nanobind::handle out_object,
                       Extra... extra) {
  const Array x(x_object, "x", {Dtype::kFloat32}, 2);
  const Array out(out_object, "out", {Dtype::kFloat32}, 2, /*writable=*/true);
  RequireXAndOut(x, out);
  const Array offsets(offsets_object, "offsets", {Dtype::kInt32}, 1);
  const Array rows(rows_object, "rows", {Dtype::kInt32}, 1);
  const Array row_weights(weights_object, "row_weights", {Dtype::kFloat32}, 1);
  RequireInRange(rows, "rows", x.dim(0));
  RequireShape(row_weights, "row_weights", {rows.dim(0)});
  std::vector<ExpertArgument<Argument>> arguments;
  std::vector<Expert> views;
  for (nanobind::handle object : experts) {
    const std::string prefix = "experts[" + std::to_string(arguments.size()) + "] ";
    nanobind::tuple triple;
    if (!nanobind::try_cast(object, triple) || nanobind::len(triple) != 3) {
      throw nanobind::type_error((prefix + "must be a tuple (gate, up, down)").c_str());
    }
    arguments.emplace_back(triple[0], triple[1], triple[2], prefix);
    const ExpertArgument<Argument>& last = arguments.back();
    last.RequireSizes(x.dim(1), arguments.front().gate->n, prefix);
    views.push_back({*last.gate, *last.up, *last.down});
  }
  const int64_t count = static_cast<int64_t>(views.size());
  RequireOffsets(offsets, count, rows.dim(0));
  const auto* bounds = offsets.data<int32_t>();
  for (int64_t e = 0; e < count; ++e) {
    RequireNoRepeats(rows.data<int32_t>() + bounds[e], bounds[e + 1] - bounds[e], x.dim(0));
  }
  nanobind::gil_scoped_release release;
  kRun(x.data<float>(), views.data(), count, bounds, rows.data<int32_t>(),
       row_weights.data<float>(), out.data<float>(), extra...);
}

}  // namespace specmoeoff
