#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

#include "amx_support.h"

namespace specmoeoff {
namespace {

constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512vnni", "avx512bf16", "amx"};
constexpr int kNumTargets = 6;
// amx only by name: see dispatch.h.
constexpr Target kBestDefault = Target::kAvx512Bf16;

bool Supports(Target target) {
  if (target == Target::kScalar) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (target == Target::kAvx2) return avx2;
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (target == Target::kAvx512) return avx512;
  const bool avx512vnni = avx512 && __builtin_cpu_supports("avx512vnni");
  if (target == Target::kAvx512Vnni) return avx512vnni;
  const bool avx512bf16 = avx512vnni && __builtin_cpu_supports("avx512bf16");
  if (target == Target::kAvx512Bf16) return avx512bf16;
  return avx512bf16 && HasTiles();
#else
  return false;
#endif
}

Target Parse(const std::string& name, const char* source) {
  std::string supported;
  for (const std::string& each : SupportedTargets()) {
    if (each == name) break;
    supported += (supported.empty() ? "" : ", ") + each;
  }
  for (int i = 0; i < kNumTargets; ++i) {
    if (name == kNames[i] && Supports(static_cast<Target>(i))) return static_cast<Target>(i);
  }
  throw std::invalid_argument(std::string(source) + " is '" + name +
                              "', which this CPU does not support; use one of " + supported);
}

Target Default() {
  if (const char* name = std::getenv("SPECMOEOFF_CPU_TARGET"); name && *name) {
    return Parse(name, "SPECMOEOFF_CPU_TARGET");
  }
  for (int i = static_cast<int>(kBestDefault); i > 0; --i) {
    if (Supports(static_cast<Target>(i))) return static_cast<Target>(i);
  }
  return Target::kScalar;
}

std::atomic<int> current{-1};

}  // namespace

std::vector<std::string> SupportedTargets() {
  std::vector<std::string> names;
  for (int i = 0; i < kNumTargets; ++i) {
    if (Supports(static_cast<Target>(i))) names.emplace_back(kNames[i]);
  }
  return names;
}

Target CurrentTarget() {
  int target = current.load(std::memory_order_relaxed);
  if (target < 0) {
    target = static_cast<int>(Default());
    current.store(target, std::memory_order_relaxed);
  }
  return static_cast<Target>(target);
}

std::string CurrentTargetName() { return kNames[static_cast<int>(CurrentTarget())]; }

void UseTarget(const std::string& name) {
  current.store(static_cast<int>(Parse(name, "CPU target")), std::memory_order_relaxed);
}

}  // namespace specmoeoff
