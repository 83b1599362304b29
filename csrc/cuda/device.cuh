// What kernels share: storage types and their conversions, 16 bytes at a time, shared memory, division by a constant.
#pragma once

#if !defined(BKIND3D_EMULATED)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstdint>

#include "../common/portable.h"

namespace bkind3d {

// ---- storage: float, double, bfloat16, float16; arithmetic is in float, or double for double ----

template <class S>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};
template <class S>
using Arithmetic = typename ArithmeticOf<S>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
__device__ __forceinline__ float widen(float16 x) { return __half2float(__ushort_as_half(x.bits)); }

template <class S>
__device__ __forceinline__ S narrow(Arithmetic<S> x) {
  return x;
}
template <>
__device__ __forceinline__ bfloat16 narrow<bfloat16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
__device__ __forceinline__ float16 narrow<float16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

// Width elements that are read and written together; 16 bytes are one instruction.
template <class S, int Width = 16 / sizeof(S)>
struct alignas(Width * sizeof(S)) Pack {
  static constexpr int width = Width;
  S values[Width];
};

// Read once, never written meanwhile: past the first-level cache, and first to be replaced in the second.
template <class P>
__device__ __forceinline__ P load_once(const P* p) {
#if defined(BKIND3D_EMULATED)
  return *p;
#else
  P pack;
  if constexpr (sizeof(P) == 16) {
    const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(p));
    __builtin_memcpy(&pack, &bits, 16);
  } else if constexpr (sizeof(P) == 8) {
    const uint2 bits = __ldcs(reinterpret_cast<const uint2*>(p));
    __builtin_memcpy(&pack, &bits, 8);
  } else if constexpr (sizeof(P) == 4) {
    const unsigned bits = __ldcs(reinterpret_cast<const unsigned*>(p));
    __builtin_memcpy(&pack, &bits, 4);
  } else {
    static_assert(sizeof(P) == 2);
    const unsigned short bits = __ldcs(reinterpret_cast<const unsigned short*>(p));
    __builtin_memcpy(&pack, &bits, 2);
  }
  return pack;
#endif
}

// Adds to 4 floats together, at a multiple of 16 bytes: one request instead of 4 from sm_90 on.
__device__ __forceinline__ void add_to(float* p, float4 v) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(p)), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
#else
  atomicAdd(p, v.x);
  atomicAdd(p + 1, v.y);
  atomicAdd(p + 2, v.z);
  atomicAdd(p + 3, v.w);
#endif
}

// ---- exponentials: those of the arithmetic, and the factor that their argument has more than that of exp ----

// Within 2 ulp; below the smallest normal number it is 0.
__device__ __forceinline__ float exponential(float x) {
#if defined(BKIND3D_EMULATED)
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
__device__ __forceinline__ double exponential(double x) { return exp(x); }

template <class T>
constexpr double exponential_scale = sizeof(T) == sizeof(float) ? 1.4426950408889634 : 1.0;  // 1 / ln 2

// ---- shared memory: one object of a block, of any type without a constructor ----

template <class T>
__device__ __forceinline__ T& shared() {
#if defined(BKIND3D_EMULATED)
  static char key;
  return *static_cast<T*>(emulation::shared(&key, sizeof(T)));
#else
  __shared__ T object;
  return object;
#endif
}

// ---- division of 0 <= n < 2^31 by a constant 1 <= divisor < 2^31: a multiplication and a shift ----

struct Divider {
  unsigned divisor, multiplier, shift;

  // Round-up method: multiplier = ceil(2^(32 + shift) / divisor) - 2^32, shift = ceil(log2(divisor)).
  explicit Divider(int64_t d) : divisor(unsigned(d)), shift(0) {
    while ((int64_t(1) << shift) < d) ++shift;
    multiplier = unsigned(((uint64_t(1) << 32) * ((uint64_t(1) << shift) - uint64_t(d))) / uint64_t(d) + 1);
  }

  __device__ __forceinline__ unsigned quotient(unsigned n) const { return (__umulhi(n, multiplier) + n) >> shift; }
};

}  // namespace bkind3d
