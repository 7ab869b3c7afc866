// Which instruction set the kernels use: found once, or forced.
#include "kernel.h"

#include <atomic>

namespace xeon {
namespace {

Path best() {
  __builtin_cpu_init();
  const bool skylake = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                       __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  return skylake ? Path::avx512 : Path::portable;
}

std::atomic<int> chosen{0};

int64_t best_path() { return static_cast<int64_t>(best()); }

void use_path(int64_t wanted) {
  STD_TORCH_CHECK(wanted == 1 || wanted == 2, "path ", wanted, " is neither 1 (portable) nor 2 (avx512)");
  STD_TORCH_CHECK(wanted <= best_path(), "this processor has no AVX-512 (F, BW, DQ, VL)");
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
