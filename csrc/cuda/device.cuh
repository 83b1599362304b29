// What kernels share: conversions of storage types, 16 bytes at a time, exponentials, shared memory, division by a
// constant.
#pragma once

#if !defined(BKIND3D_EMULATED)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include <cstdint>

#include "../common/portable.h"
#include "../common/storage.h"
#include "launch.h"

namespace bkind3d {

constexpr unsigned all_lanes = ~0u;  // of a warp

// ---- storage and arithmetic ----

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

#if !defined(BKIND3D_EMULATED)
// One instruction of `load`, which takes a pointer to bits.
template <class P, class Load>
__device__ __forceinline__ P load_bits(const P* p, Load load) {
  P pack;
  if constexpr (sizeof(P) == 16) {
    const uint4 bits = load(reinterpret_cast<const uint4*>(p));
    __builtin_memcpy(&pack, &bits, 16);
  } else if constexpr (sizeof(P) == 8) {
    const uint2 bits = load(reinterpret_cast<const uint2*>(p));
    __builtin_memcpy(&pack, &bits, 8);
  } else if constexpr (sizeof(P) == 4) {
    const unsigned bits = load(reinterpret_cast<const unsigned*>(p));
    __builtin_memcpy(&pack, &bits, 4);
  } else {
    static_assert(sizeof(P) == 2);
    const unsigned short bits = load(reinterpret_cast<const unsigned short*>(p));
    __builtin_memcpy(&pack, &bits, 2);
  }
  return pack;
}
#endif

// Read once, never written meanwhile: past the first-level cache, and first to be replaced in the second.
template <class P>
__device__ __forceinline__ P load_once(const P* p) {
#if defined(BKIND3D_EMULATED)
  return *p;
#else
  return load_bits(p, [](const auto* bits) { return __ldcs(bits); });
#endif
}

// Read again soon, by this kernel or the next, and never written meanwhile.
template <class P>
__device__ __forceinline__ P load_kept(const P* p) {
#if defined(BKIND3D_EMULATED)
  return *p;
#else
  return load_bits(p, [](const auto* bits) { return __ldg(bits); });
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

// ---- division ----

__device__ __forceinline__ unsigned quotient(const Divider& d, unsigned n) {
  return (__umulhi(n, d.multiplier) + n) >> d.shift;
}

}  // namespace bkind3d
