// Which CPU target runs: the best this CPU has, unless one was asked for.
//
// A kernel family (linear, attention, ...) defines a struct of function pointers in its contract
// header and one constant of it per target, declared `extern const Family k<Family>Scalar, ...` and
// defined in <family>_<target>.cc. Select() picks the one that runs:
//
//     Select(&kLinearScalar, SPECMOEOFF_IF_X86(&kLinearAvx2), SPECMOEOFF_IF_X86(&kLinearAvx512))
//
// A later target adds an enumerator and a parameter to Select(); families without code for it fall
// back to the one below, so a target has all that the ones before it have.
//
// "amx" (the tiles of AMX-BF16) was never run on a CPU that has it, only with its instructions
// trapped and emulated (`make amx`). So it runs where it is asked for by name, and is no default.
#pragma once

#include <string>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#define SPECMOEOFF_IF_X86(x) (x)
#else
#define SPECMOEOFF_IF_X86(x) nullptr
#endif

namespace specmoeoff {

enum class Target : int {
  kScalar = 0,
  kAvx2 = 1,
  kAvx512 = 2,
  kAvx512Vnni = 3,
  kAvx512Bf16 = 4,
  kAmx = 5
};

// Names of the targets this CPU supports, worst first: "scalar", "avx2", "avx512",
// "avx512vnni", "avx512bf16", "amx".
std::vector<std::string> SupportedTargets();

// The target that runs now. The first call honours SPECMOEOFF_CPU_TARGET; throws
// std::invalid_argument if that names a target that is unknown or unsupported here.
Target CurrentTarget();
std::string CurrentTargetName();

// Makes a target run from the next call on; throws std::invalid_argument like CurrentTarget().
void UseTarget(const std::string& name);

template <class Kernels>
const Kernels& Select(const Kernels* scalar, const std::type_identity_t<Kernels>* avx2,
                      const std::type_identity_t<Kernels>* avx512,
                      const std::type_identity_t<Kernels>* avx512vnni = nullptr,
                      const std::type_identity_t<Kernels>* avx512bf16 = nullptr,
                      const std::type_identity_t<Kernels>* amx = nullptr) {
  const Target target = CurrentTarget();
  if (target >= Target::kAmx && amx) return *amx;
  if (target >= Target::kAvx512Bf16 && avx512bf16) return *avx512bf16;
  if (target >= Target::kAvx512Vnni && avx512vnni) return *avx512vnni;
  if (target >= Target::kAvx512 && avx512) return *avx512;
  if (target >= Target::kAvx2 && avx2) return *avx2;
  return *scalar;
}

}  // namespace specmoeoff
