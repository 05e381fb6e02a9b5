// The measured ceilings for Python.
#include <nanobind/nanobind.h>

#include <stdexcept>

#include "array.h"
#include "roof.h"

namespace nb = nanobind;

namespace specmoeoff {
namespace {

void RequireRepeats(int repeats) {
  if (repeats < 1) throw nb::value_error("repeats must be at least 1");
}

double ReadBandwidthCall(nb::handle data_object, int repeats) {
  const Array data(data_object, "data", {Dtype::kFloat32}, 1);
  RequireRepeats(repeats);
  if (data.size() == 0) throw nb::value_error("data is empty");
  nb::gil_scoped_release release;
  return MeasureReadBandwidth(data.data<float>(), data.size(), repeats);
}

double MultiplyAddCall(int repeats) {
  RequireRepeats(repeats);
  nb::gil_scoped_release release;
  return MeasureMultiplyAdd(repeats);
}

}  // namespace
}  // namespace specmoeoff

void BindRoof(nb::module_& m) {
  using namespace specmoeoff;
  m.def("measure_read_bandwidth", &ReadBandwidthCall, nb::arg("data"), nb::arg("repeats") = 5);
  m.def("measure_fma", &MultiplyAddCall, nb::arg("repeats") = 5);
}
