#include "isa.h"

#include <torch/csrc/stable/library.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstdlib>
#include <string>

namespace bkind3d {
namespace {

constexpr const char* names[] = {"baseline", "avx2", "avx512"};

Isa best() {
#if defined(BKIND3D_HAS_X86)
  __builtin_cpu_init();
  // F16C came before AVX2 in every processor; older compilers do not know its name here.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? Isa::avx512 : avx2 ? Isa::avx2 : Isa::baseline;
#else
  return Isa::baseline;
#endif
}

Isa parse(const std::string& name, const char* source) {
  for (int i = 0; i < 3; ++i) {
    if (name == names[i]) {
      STD_TORCH_CHECK(i <= static_cast<int>(best()), source, " '", name, "': this processor or build has ",
                      names[static_cast<int>(best())], " at most");
      return static_cast<Isa>(i);
    }
  }
  STD_TORCH_CHECK(false, source, " '", name, "': expected baseline, avx2 or avx512");
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> value = [] {
    const char* variable = std::getenv("BKIND3D_CPU_ISA");
    return variable && *variable ? parse(variable, "BKIND3D_CPU_ISA") : best();
  }();
  return value;
}

std::string cpu_instruction_set() { return names[static_cast<int>(isa())]; }

void set_cpu_instruction_set(std::string name) { current() = parse(name, "name"); }

}  // namespace

Isa isa() { return current().load(std::memory_order_relaxed); }

}  // namespace bkind3d

STABLE_TORCH_LIBRARY_IMPL(bkind3d, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&bkind3d::cpu_instruction_set));
  m.impl("set_cpu_instruction_set", TORCH_BOX(&bkind3d::set_cpu_instruction_set));
}
