// Numpy arrays at the border: what an argument must be, and errors that name it.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <initializer_list>
#include <string>

namespace specmoeoff {

enum class Dtype { kFloat32, kFloat16, kUint16, kInt8, kUint8, kInt32, kUint64 };

const char* DtypeName(Dtype dtype);

// A view of an array's memory, valid as long as this object lives. Movable, so that a vector of
// them keeps many arguments alive through a call. Release and destruction need the GIL.
class Array {
 public:
  Array() = default;
  // Throws TypeError if `object` is no array of one of `dtypes`, ValueError if it has not `ndim`
  // dimensions (-1: any, at most 4), is not C-contiguous, or is read-only where `writable` is
  // asked. With `strided_first` the first dimension may have any positive stride.
  Array(nanobind::handle object, const char* name, std::initializer_list<Dtype> dtypes, int ndim,
        bool writable = false, bool strided_first = false);
  Array(Array&& other) noexcept;
  Array& operator=(Array&& other) noexcept;
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array();

  explicit operator bool() const { return view_.obj != nullptr; }
  Dtype dtype() const { return dtype_; }
  int ndim() const { return view_.ndim; }
  int64_t dim(int i) const { return view_.shape[i]; }
  int64_t size() const;
  // Bytes from one element of the first dimension to the next.
  int64_t first_stride() const { return first_stride_; }
  template <class T>
  T* data() const {
    return static_cast<T*>(view_.buf);
  }

 private:
  Py_buffer view_{};
  Dtype dtype_ = Dtype::kFloat32;
  int64_t first_stride_ = 0;
};

// Throws ValueError "<name> has shape [..]; it must be <wanted>" unless `array` has these
// dimensions.
void RequireShape(const Array& array, const char* name, std::initializer_list<int64_t> shape);

}  // namespace specmoeoff
