#include <nanobind/nanobind.h>
void BindLinear(nanobind::module_&) {}
