// Which instruction set the kernels use: found once, or forced.
#include "kernel.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>

namespace xeon {
namespace {

#ifdef XEON_EMULATED_TILES
bool has_tiles() { return true; }
#else
// AMX in bf16, that Linux lets this process use: its registers are 8 KB for each thread, so it wants to be asked (since 5.16).
bool has_tiles() {
  unsigned a, b, c, d;
  if (!__builtin_cpu_supports("avx512bf16") || __get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  constexpr unsigned bf16 = 1u << 22, tiles = 1u << 24;
  constexpr long ask = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return (d & bf16) != 0 && (d & tiles) != 0 && syscall(SYS_arch_prctl, ask, tile_data) == 0;
}
#endif

Path best() {
  __builtin_cpu_init();
  const bool skylake = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                       __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  return !skylake ? Path::portable : has_tiles() ? Path::amx : Path::avx512;
}

std::atomic<int> chosen{0};

int64_t best_path() { return static_cast<int64_t>(best()); }

void use_path(int64_t wanted) {
  STD_TORCH_CHECK(wanted >= 1 && wanted <= 3, "path ", wanted, " is neither 1 (portable) nor 2 (avx512) nor 3 (amx)");
  STD_TORCH_CHECK(wanted <= best_path(), "this processor has no ", wanted == 3 ? "AMX" : "AVX-512 (F, BW, DQ, VL)");
  chosen.store(static_cast<int>(wanted));
}

}  // namespace

Path path() {
  int now = chosen.load(std::memory_order_relaxed);
  if (now == 0) {
    now = static_cast<int>(best());
    chosen.store(now);
  }
  return static_cast<Path>(now);
}

}  // namespace xeon

STABLE_TORCH_LIBRARY_FRAGMENT(trimtab_xeon, m) {
  m.def("best_path() -> int");
  m.def("use_path(int path) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(trimtab_xeon, CompositeExplicitAutograd, m) {
  m.impl("best_path", TORCH_BOX(&xeon::best_path));
  m.impl("use_path", TORCH_BOX(&xeon::use_path));
}
