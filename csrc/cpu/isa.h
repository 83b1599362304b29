// Instruction sets of the CPU loops. Each file *_loops.cpp is compiled once for every set (setup.py gives the flags and
// defines BKIND3D_ISA), each time into a namespace of that name; which of them runs is chosen when a kernel is called.
#pragma once

#include <cstdint>

namespace bkind3d {

enum class Isa { baseline, avx2, avx512 };

// The set in use: the best that the processor has, unless BKIND3D_CPU_ISA or set_cpu_instruction_set named another.
Isa isa();

}  // namespace bkind3d

// Declares `const Table& ` chosen for the set in use, for a table of function pointers that every set defines under the
// same name: BKIND3D_DECLARE_LOOPS(UnprojectLoops, unproject_loops) and then choose: unproject_loops().
#if defined(BKIND3D_HAS_X86)
#define BKIND3D_DECLARE_LOOPS(Table, name)   \
  namespace baseline {                       \
  extern const Table name;                   \
  }                                          \
  namespace avx2 {                           \
  extern const Table name;                   \
  }                                          \
  namespace avx512 {                         \
  extern const Table name;                   \
  }                                          \
  inline const Table& name() {               \
    switch (isa()) {                         \
      case Isa::avx512: return avx512::name; \
      case Isa::avx2: return avx2::name;     \
      default: return baseline::name;        \
    }                                        \
  }
#else
#define BKIND3D_DECLARE_LOOPS(Table, name) \
  namespace baseline {                     \
  extern const Table name;                 \
  }                                        \
  inline const Table& name() { return baseline::name; }
#endif
