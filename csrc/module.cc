// The Python module: targets and threads here, the kernels in *_bindings.cc.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "dispatch.h"
#include "thread_pool.h"

namespace nb = nanobind;

// Each is defined in its <family>_bindings.cc.
void BindLinear(nb::module_& m);
void BindElementwise(nb::module_& m);
void BindInt8Dot(nb::module_& m);
void BindRoof(nb::module_& m);
void BindAttention(nb::module_& m);
void BindDecoder(nb::module_& m);

NB_MODULE(_native, m) {
  using namespace specmoeoff;
  nb::set_leak_warnings(false);
  CurrentTarget();  // a wrong SPECMOEOFF_CPU_TARGET fails the import, not the first kernel
  m.def("cpu_targets", &SupportedTargets);
  m.def("cpu_target", &CurrentTargetName);
  m.def("use_cpu_target", &UseTarget, nb::arg("name"));
  m.def("num_threads", &NumThreads);
  m.def(
      "set_num_threads",
      [](int n) {
        if (n < 1 || n > 1024) throw std::invalid_argument("n must be 1 to 1024");
        nb::gil_scoped_release release;
        SetNumThreads(n);
      },
      nb::arg("n"));
  BindLinear(m);
  BindElementwise(m);
  BindInt8Dot(m);
  BindRoof(m);
  BindAttention(m);
  BindDecoder(m);
}
