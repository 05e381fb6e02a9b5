#include "array.h"

#include <utility>

namespace nb = nanobind;

namespace specmoeoff {
namespace {

struct DtypeInfo {
  Dtype dtype;
  char format;
  int64_t bytes;
  const char* name;
};

constexpr DtypeInfo kDtypes[] = {
    {Dtype::kFloat32, 'f', 4, "float32"}, {Dtype::kFloat16, 'e', 2, "float16"},
    {Dtype::kUint16, 'H', 2, "uint16"},   {Dtype::kInt8, 'b', 1, "int8"},
    {Dtype::kUint8, 'B', 1, "uint8"},     {Dtype::kInt32, 'i', 4, "int32"},
    {Dtype::kUint64, 'L', 8, "uint64"},
};

const DtypeInfo& Info(Dtype dtype) { return kDtypes[static_cast<int>(dtype)]; }

const DtypeInfo* FromBuffer(const Py_buffer& view) {
  const char* format = view.format ? view.format : "B";
  if (*format == '<' || *format == '=' || *format == '@') ++format;
  if (!*format || format[1]) return nullptr;
  const char code = *format == 'Q' ? 'L' : *format;
  for (const DtypeInfo& info : kDtypes) {
    if (info.format == code && info.bytes == view.itemsize) return &info;
  }
  return nullptr;
}

std::string Names(std::initializer_list<Dtype> dtypes) {
  std::string names;
  for (Dtype dtype : dtypes) names += (names.empty() ? "" : " or ") + std::string(DtypeName(dtype));
  return names;
}

std::string Shape(const int64_t* dims, int ndim) {
  std::string text = "[";
  for (int i = 0; i < ndim; ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

[[noreturn]] void TypeError(const std::string& message) { throw nb::type_error(message.c_str()); }
[[noreturn]] void ValueError(const std::string& message) { throw nb::value_error(message.c_str()); }

}  // namespace

const char* DtypeName(Dtype dtype) { return Info(dtype).name; }

Array::Array(nb::handle object, const char* name, std::initializer_list<Dtype> dtypes, int ndim,
             bool writable, bool strided_first) {
  const std::string label(name);
  if (PyObject_GetBuffer(object.ptr(), &view_, PyBUF_STRIDES | PyBUF_FORMAT) != 0) {
    PyErr_Clear();
    view_ = Py_buffer{};
    TypeError(label + " must be a numpy array of " + Names(dtypes));
  }
  const auto fail = [&](auto raise, const std::string& message) {
    PyBuffer_Release(&view_);
    view_ = Py_buffer{};
    raise(message);
  };
  const DtypeInfo* found = FromBuffer(view_);
  bool allowed = false;
  for (Dtype dtype : dtypes) allowed |= found && found->dtype == dtype;
  if (!allowed) fail(TypeError, label + " must be an array of " + Names(dtypes));
  dtype_ = found->dtype;
  if (ndim >= 0 && view_.ndim != ndim) {
    fail(ValueError, label + " has " + std::to_string(view_.ndim) + " dimensions; it must have " +
                         std::to_string(ndim));
  }
  if (view_.ndim > 4) fail(ValueError, label + " has more than 4 dimensions");
  if (writable && view_.readonly) fail(ValueError, label + " is read-only; it is written to");
  int64_t stride = view_.itemsize;
  for (int i = view_.ndim - 1; i >= 0; --i) {
    const bool free_stride =
        view_.shape[i] <= 1 || (i == 0 && strided_first && view_.strides[i] >= stride);
    if (size() > 0 && view_.strides[i] != stride && !free_stride) {
      fail(ValueError, label + " must be C-contiguous");
    }
    if (i == 0) first_stride_ = view_.shape[i] <= 1 ? stride : view_.strides[i];
    stride *= view_.shape[i];
  }
}

Array::Array(Array&& other) noexcept
    : view_(std::exchange(other.view_, Py_buffer{})),
      dtype_(other.dtype_),
      first_stride_(other.first_stride_) {}

Array& Array::operator=(Array&& other) noexcept {
  std::swap(view_, other.view_);
  std::swap(dtype_, other.dtype_);
  std::swap(first_stride_, other.first_stride_);
  return *this;
}

Array::~Array() {
  if (view_.obj) PyBuffer_Release(&view_);
}

int64_t Array::size() const {
  int64_t size = 1;
  for (int i = 0; i < view_.ndim; ++i) size *= view_.shape[i];
  return size;
}

void RequireShape(const Array& array, const char* name, std::initializer_list<int64_t> shape) {
  bool same = array.ndim() == static_cast<int>(shape.size());
  int64_t found[4] = {};
  for (int i = 0; i < array.ndim(); ++i) {
    found[i] = array.dim(i);
    same = same && found[i] == shape.begin()[i];
  }
  if (same) return;
  ValueError(std::string(name) + " has shape " + Shape(found, array.ndim()) + "; it must be " +
             Shape(shape.begin(), static_cast<int>(shape.size())));
}

}  // namespace specmoeoff
