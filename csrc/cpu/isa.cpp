#include "isa.h"

#include <atomic>

#if defined(DALLE_FAST_HAS_AMX) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace dalle_fast {

#if defined(DALLE_FAST_HAS_AMX)
namespace amx {
bool tiles_multiply();  // sparse_attention_amx_kernel.cpp: whether they do, on this processor, as amx.h has it
}
#endif

namespace {

// Matrix tiles for bfloat16, and the permission to use them.
bool has_tiles() {
#if defined(DALLE_FAST_EMULATE_AMX)
  return amx::tiles_multiply();
#elif defined(DALLE_FAST_HAS_AMX) && defined(__linux__)
  // By cpuid: older compilers' __builtin_cpu_supports knows none of the three.
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24, kAvx512Bf16 = 1u << 5;
  unsigned eax, ebx, ecx, edx;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & (kAmxBf16 | kAmxTile)) != (kAmxBf16 | kAmxTile)) return false;
  if (!__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) || !(eax & kAvx512Bf16)) return false;
  // Linux reserves room for a thread's tiles only where its process asked.
  constexpr long kArchRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = syscall(SYS_arch_prctl, kArchRequestPermission, kTileData) == 0 && amx::tiles_multiply();
  return granted;
#else
  return false;
#endif
}

}  // namespace

bool isa_supported(Isa isa) {
#if defined(__x86_64__)
  switch (isa) {
    case Isa::amx:
      return isa_supported(Isa::avx512) && has_tiles();
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
    case Isa::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::baseline:
      return true;
  }
  return false;
#else
  return isa == Isa::baseline;
#endif
}

namespace {

Isa best_isa() {
  for (int isa = kIsaCount - 1; isa > 0; --isa) {
    if (isa_supported(static_cast<Isa>(isa))) return static_cast<Isa>(isa);
  }
  return Isa::baseline;
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa{best_isa()};
  return isa;
}

}  // namespace

Isa current_isa() { return chosen().load(std::memory_order_relaxed); }

void set_isa(Isa isa) { chosen().store(isa, std::memory_order_relaxed); }

}  // namespace dalle_fast
