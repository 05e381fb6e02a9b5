#include "amx_support.h"

#if defined(__x86_64__) && defined(__linux__) && !defined(SPECMOEOFF_EMULATE_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace specmoeoff {

#if defined(SPECMOEOFF_EMULATE_AMX)

// See tests/amx_emulator.cc.
bool HasTiles() { return true; }

#elif defined(__x86_64__) && defined(__linux__)

bool HasTiles() {
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return false;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (!(edx & kAmxBf16) || !(edx & kAmxTile)) return false;
  if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || !(ecx & bit_OSXSAVE)) return false;
  unsigned low, high;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  constexpr unsigned kTileState = 3u << 17;
  if ((low & kTileState) != kTileState) return false;
  // ARCH_REQ_XCOMP_PERM for XFEATURE_XTILEDATA, by number: older headers do not name them.
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

#else

bool HasTiles() { return false; }

#endif

}  // namespace specmoeoff
