// What every header of csrc/common needs: the qualifiers of its functions, and the scalar versions of the few
// primitives that differ between scalars and vectors. No torch, and of the standard library its integers alone: the
// same text is compiled for scalars (CUDA device code, the NumPy bindings of the tests) and for the vectors of
// csrc/cpu/simd.h.
//
// A formula is a template over V, a floating type or a vector of them. It is branch-free: choices are select(mask, a,
// b), and what is left is +, -, *, / and comparisons, which vectors of GCC and Clang have like scalars.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define BKIND3D_FN static __host__ __device__ __forceinline__
#else
// Internal linkage: the CPU loops are compiled once per instruction set, and the linker must never merge two of them.
#define BKIND3D_FN [[maybe_unused]] static inline __attribute__((always_inline))
#endif

namespace bkind3d {

BKIND3D_FN float select(bool mask, float a, float b) { return mask ? a : b; }
BKIND3D_FN double select(bool mask, double a, double b) { return mask ? a : b; }
BKIND3D_FN int select(bool mask, int a, int b) { return mask ? a : b; }

BKIND3D_FN float floor_of(float x) { return __builtin_floorf(x); }
BKIND3D_FN double floor_of(double x) { return __builtin_floor(x); }

BKIND3D_FN float sqrt_of(float x) { return __builtin_sqrtf(x); }
BKIND3D_FN double sqrt_of(double x) { return __builtin_sqrt(x); }

template <class V>
BKIND3D_FN V min_of(V a, V b) {
  return select(b < a, b, a);
}
template <class V>
BKIND3D_FN V max_of(V a, V b) {
  return select(b > a, b, a);
}

BKIND3D_FN std::int64_t ceil_divide(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace bkind3d
