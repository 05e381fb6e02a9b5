// Keeps the largest outputs of each row while a product's columns come in pieces, in any order and
// from any thread. What is kept depends on the outputs alone: larger ones first, the lower column
// among equals. NaN counts as larger than everything, so that whoever looks at the best notices it.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <mutex>

namespace specmoeoff {

inline constexpr int64_t kMostTop = 64;

class TopRows {
 public:
  // values and ids are [rows, top]; top is 1 to kMostTop, at most the number of columns.
  TopRows(int64_t rows, int64_t top, float* values, int32_t* ids)
      : top_(top), values_(values), ids_(ids) {
    for (int64_t i = 0; i < rows * top; ++i) {
      values_[i] = -std::numeric_limits<float>::infinity();
      ids_[i] = std::numeric_limits<int32_t>::max();
    }
  }

  // Takes columns [begin, end) of `count` rows from row `first` on; y is [count, y_stride].
  void Take(const float* y, int64_t y_stride, int64_t first, int64_t count, int64_t begin,
            int64_t end) {
    for (int64_t r = 0; r < count; ++r) {
      float values[kMostTop];
      int32_t ids[kMostTop];
      int64_t kept = 0;
      const float* row = y + r * y_stride;
      for (int64_t c = 0; c < end - begin; ++c) {
        if (kept == top_ && row[c] <= values[kept - 1]) continue;
        if (kept < top_) ++kept;
        // The last place is free, or its owner gives way if it is worse.
        Put(row[c], static_cast<int32_t>(begin + c), values, ids, kept, kept == c + 1);
      }
      std::lock_guard<std::mutex> lock(mutex_);
      for (int64_t i = 0; i < kept; ++i) {
        Put(values[i], ids[i], values_ + (first + r) * top_, ids_ + (first + r) * top_, top_,
            false);
      }
    }
  }

 private:
  static bool IsBetter(float value, int32_t id, float other, int32_t other_id) {
    if (std::isnan(value) != std::isnan(other)) return std::isnan(value);
    return value > other || (!(value < other) && id < other_id);
  }

  // Puts an output in its place among `size` sorted ones, of which the last is lost.
  static void Put(float value, int32_t id, float* values, int32_t* ids, int64_t size,
                  bool last_is_free) {
    int64_t place = size - 1;
    if (!last_is_free && !IsBetter(value, id, values[place], ids[place])) return;
    for (; place > 0 && IsBetter(value, id, values[place - 1], ids[place - 1]); --place) {
      values[place] = values[place - 1];
      ids[place] = ids[place - 1];
    }
    values[place] = value;
    ids[place] = id;
  }

  const int64_t top_;
  float* const values_;
  int32_t* const ids_;
  std::mutex mutex_;
};

}  // namespace specmoeoff
