// The layers of a decoder as arguments of the bindings: every array is checked once and kept.
#pragma once

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
#include "expert_ffn_bindings.h"

namespace specmoeoff {

// A matrix [n, k] of either kind, and its bias if there is one.
class MatrixArgument {
 public:
  MatrixArgument(nanobind::handle object, nanobind::handle bias, const std::string& name, int64_t n,
                 int64_t k) {
    if (nanobind::hasattr(object, "packed")) {
      matrix_.int8_dot = *int8_dot_.emplace(object, name);
    } else {
      matrix_.weight = *weight_.emplace(object, name);
    }
    if (matrix_.n() != n || matrix_.k() != k) {
      Refuse(name + " has shape [" + std::to_string(matrix_.n()) + ", " +
             std::to_string(matrix_.k()) + "]; it must be [" + std::to_string(n) + ", " +
             std::to_string(k) + "]");
    }
    if (bias.is_none()) return;
    bias_ = Array(bias, (name + "_bias").c_str(), {Dtype::kFloat32}, 1);
    RequireShape(bias_, (name + "_bias").c_str(), {n});
    matrix_.bias = bias_.data<float>();
  }

  const Matrix& operator*() const { return matrix_; }

 private:
  std::optional<WeightArgument> weight_;
  std::optional<Int8DotArgument> int8_dot_;
  Array bias_;
  Matrix matrix_;
};

// One layer's arguments: keeps their arrays alive.
struct LayerArguments {
  std::vector<Array> norms;
  std::vector<MatrixArgument> matrices;
  std::unique_ptr<Pages> pages;
};

// What a model's passes share. Not to be given other experts while a pass runs.
class Decoder {
 public:
  Decoder(nanobind::sequence layers, nanobind::sequence pages, int64_t hidden, int num_heads,
          int num_kv_heads, int head_dim, int64_t num_experts, int64_t top_k, double eps,
          double scale, int64_t sliding_window, bool bfloat16)
      : shape_{.hidden = hidden,
               .num_heads = num_heads,
               .num_kv_heads = num_kv_heads,
               .head_dim = head_dim,
               .page_size = 0,
               .num_experts = num_experts,
               .top_k = top_k,
               .eps = static_cast<float>(eps),
               .scale = scale,
               .sliding_window = sliding_window,
               .activations = bfloat16 ? Activations::kBfloat16 : Activations::kFloat32} {
    CheckShape();
    const size_t count = nanobind::len(layers);
    if (count == 0 || nanobind::len(pages) != count) {
      Refuse("layers and pages must be equally many, 1 or more");
    }
    for (size_t i = 0; i < count; ++i) {
      AddLayer(nanobind::object(layers[i]), nanobind::object(pages[i]),
               "layers[" + std::to_string(i) + "] ");
    }
  }

  Decoder(const Decoder&) = delete;

  const DecoderShape& shape() const { return shape_; }
  int64_t num_layers() const { return static_cast<int64_t>(layers_.size()); }
  const DecoderLayer& layer(int64_t i) const { return layers_[i]; }
  const Pages& pages() const { return *arguments_[0].pages; }
  bool has_experts() const { return has_experts_; }
  int64_t row_floats() const { return DecoderRowFloats(shape_); }

  // experts[layer][expert] is (gate, up, down), all of one kind; None: not all are in memory.
  void SetExperts(nanobind::handle experts) {
    DropExperts();
    if (experts.is_none()) return;
    const auto sequences = nanobind::cast<nanobind::sequence>(experts);
    if (static_cast<int64_t>(nanobind::len(sequences)) != num_layers()) {
      Refuse("experts must have one sequence per layer");
    }
    try {
      for (int64_t i = 0; i < num_layers(); ++i) {
        AddExperts(nanobind::cast<nanobind::sequence>(nanobind::object(sequences[i])), layers_[i],
                   "experts[" + std::to_string(i) + "]");
      }
    } catch (...) {
      DropExperts();
      throw;
    }
    has_experts_ = true;
  }

 private:
  void CheckShape() const {
    const auto require = [](bool holds, const char* message) {
      if (!holds) Refuse(message);
    };
    require(shape_.hidden >= 1, "hidden must be 1 or more");
    require(shape_.num_kv_heads >= 1 && shape_.num_heads >= 1 && shape_.num_heads <= 65536 &&
                shape_.num_heads % shape_.num_kv_heads == 0,
            "num_heads must be a multiple of num_kv_heads, up to 65536");
    require(shape_.num_experts >= 1 && shape_.top_k >= 1 && shape_.top_k <= shape_.num_experts,
            "top_k must be 1 to num_experts");
    require(std::isfinite(shape_.scale), "scale must be finite");
    require(shape_.sliding_window >= 0, "sliding_window must be 0 (none) or more");
  }

  // `weights` is a mapping; see models/base.py for its names.
  void AddLayer(nanobind::handle weights, nanobind::handle pages, const std::string& prefix) {
    LayerArguments& kept = arguments_.emplace_back();
    DecoderLayer layer{};
    const nanobind::object get = weights.attr("get");
    const auto norm = [&](const char* name) {
      const std::string label = prefix + name;
      kept.norms.push_back(Array(nanobind::object(get(name)), label.c_str(), {Dtype::kFloat32}, 1));
      RequireShape(kept.norms.back(), label.c_str(), {shape_.hidden});
      return kept.norms.back().data<float>();
    };
    const auto matrix = [&](const std::string& name, int64_t n, int64_t k) {
      return *kept.matrices.emplace_back(nanobind::object(get(name.c_str())),
                                         nanobind::object(get((name + "_bias").c_str())),
                                         prefix + name, n, k);
    };
    const int64_t width = int64_t{shape_.num_heads} * shape_.head_dim;
    const int64_t kv_width = int64_t{shape_.num_kv_heads} * shape_.head_dim;
    layer.attn_norm = norm("attn_norm");
    layer.ffn_norm = norm("ffn_norm");
    layer.q = matrix("q", width, shape_.hidden);
    layer.k = matrix("k", kv_width, shape_.hidden);
    layer.v = matrix("v", kv_width, shape_.hidden);
    layer.o = matrix("o", shape_.hidden, width);
    if (shape_.num_experts > 1) {
      layer.router = matrix("router", shape_.num_experts, shape_.hidden);
    }
    AddPages(pages, prefix, kept, layer);
    layers_.push_back(std::move(layer));
  }

  void AddPages(nanobind::handle object, const std::string& prefix, LayerArguments& kept,
                DecoderLayer& layer) {
    nanobind::tuple four;
    if (!nanobind::try_cast(object, four) || nanobind::len(four) != 4) {
      throw nanobind::type_error(
          (prefix + "pages must be a tuple (k_pages, v_pages, k_scales, v_scales)").c_str());
    }
    kept.pages = std::make_unique<Pages>(four[0], four[1], four[2], four[3], true);
    const Pages& pages = *kept.pages;
    if (pages.num_kv_heads != shape_.num_kv_heads || pages.head_dim != shape_.head_dim) {
      Refuse(prefix + "k_pages has not the KV heads and the head size of the decoder");
    }
    if (shape_.page_size == 0) shape_.page_size = static_cast<int>(pages.page_size);
    if (pages.page_size != shape_.page_size || pages.num_pages != arguments_[0].pages->num_pages) {
      Refuse(prefix + "k_pages differs in its pages from that of layer 0");
    }
    layer.pages.keys = pages.keys.data<void>();
    layer.pages.values = pages.values.data<void>();
    layer.pages.key_page_stride = pages.key_page_stride();
    layer.pages.value_page_stride = pages.value_page_stride();
    layer.pages.kv_type = pages.kv_type();
    layer.pages.key_scales = Pages::ScaleData(pages.key_scales);
    layer.pages.value_scales = Pages::ScaleData(pages.value_scales);
    layer.pages.key_scale_stride = Pages::ScaleStride(pages.key_scales);
    layer.pages.value_scale_stride = Pages::ScaleStride(pages.value_scales);
  }

  void AddExperts(nanobind::sequence experts, DecoderLayer& layer, const std::string& prefix) {
    if (static_cast<int64_t>(nanobind::len(experts)) != shape_.num_experts) {
      Refuse(prefix + " must have " + std::to_string(shape_.num_experts) + " experts");
    }
    for (nanobind::handle object : experts) {
      nanobind::tuple triple;
      if (!nanobind::try_cast(object, triple) || nanobind::len(triple) != 3) {
        throw nanobind::type_error((prefix + " must have tuples (gate, up, down)").c_str());
      }
      if (nanobind::hasattr(triple[0], "packed")) {
        const auto& expert = int8_experts_.emplace_back(triple[0], triple[1], triple[2], prefix);
        if (inner_ == 0) inner_ = expert.gate->n;
        expert.RequireSizes(shape_.hidden, inner_, prefix + " ");
        layer.int8_experts.push_back({*expert.gate, *expert.up, *expert.down});
      } else {
        const auto& expert = experts_.emplace_back(triple[0], triple[1], triple[2], prefix);
        if (inner_ == 0) inner_ = expert.gate->n;
        expert.RequireSizes(shape_.hidden, inner_, prefix + " ");
        layer.experts.push_back({*expert.gate, *expert.up, *expert.down});
      }
    }
    if (!layer.experts.empty() && !layer.int8_experts.empty()) {
      throw nanobind::type_error((prefix + " must be of one kind, Int8DotWeight or not").c_str());
    }
  }

  void DropExperts() {
    has_experts_ = false;
    inner_ = 0;
    for (DecoderLayer& layer : layers_) {
      layer.experts.clear();
      layer.int8_experts.clear();
    }
    experts_.clear();
    int8_experts_.clear();
  }

  DecoderShape shape_;
  std::vector<DecoderLayer> layers_;
  std::vector<LayerArguments> arguments_;
  std::vector<ExpertArgument<WeightArgument>> experts_;
  std::vector<ExpertArgument<Int8DotArgument>> int8_experts_;
  int64_t inner_ = 0;
  bool has_experts_ = false;
};

}  // namespace specmoeoff
