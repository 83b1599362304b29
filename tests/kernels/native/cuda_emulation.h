// CUDA's language for g++, so that a .cu file is compiled as C++ and its kernels run on the CPU: for tests only.
//
// The blocks of a grid run one after another, the threads of a block as fibers of one thread of the system, which
// change at barriers, votes and shuffles alone. AddressSanitizer watches every access, among them those of shared
// memory; ThreadSanitizer is told what orders two threads: __syncthreads, __syncwarp and the ends of a launch; atomics
// and shuffles do not. So it finds a race between any two threads of a grid, whichever of them ran first. A barrier
// that not all threads reach, a shuffle of lanes that are not in its mask, more shared memory than a block may have:
// errors.
//
// What it cannot show: speed, coalescing, bank conflicts; the memory model (what a fence does and when another block
// sees a write); blocks at the same time, so a kernel that waits for another block stops here; warps in lockstep or out
// of it; the rounding of CUDA's own functions and contraction into fma; anything of ptxas.
//
// Kernels do not write __shared__: device.cuh has shared<T>(), which this header knows.
#pragma once

#define BKIND3D_EMULATED

#include <atomic>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using uint3 = dim3;

// clang-format off
#define EMULATION_VECTOR(type, element)                                                                     \
  struct alignas(2 * sizeof(element)) type##2 { element x, y; };                                            \
  struct alignas(16) type##4 { element x, y, z, w; };                                                       \
  inline type##2 make_##type##2(element x, element y) { return {x, y}; }                                    \
  inline type##4 make_##type##4(element x, element y, element z, element w) { return {x, y, z, w}; }
// clang-format on
EMULATION_VECTOR(float, float)
EMULATION_VECTOR(double, double)
EMULATION_VECTOR(int, int)
EMULATION_VECTOR(uint, unsigned)
#undef EMULATION_VECTOR

// ---- the running thread (cuda_emulation.cpp) ----

namespace emulation {

struct Thread {
  dim3 index, block, block_size, grid;
};
const Thread& current();
int lane();

void launch(dim3 grid, dim3 block, std::size_t dynamic_bytes, const std::function<void()>& kernel);
void* shared(const void* key, std::size_t bytes);  // one object of a block for each key
void* dynamic_shared();

enum class Kind { syncwarp, shuffle };
void wait_for_block();
struct Values {
  std::uint64_t of[32];
};
// All lanes of the mask must come. The value of each is then known to all of them.
Values wait_for_lanes(Kind kind, unsigned mask, std::uint64_t value);

template <class T>
std::uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  std::uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_bits(std::uint64_t bits) {
  T value;
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

// The value of a lane; one's own where that is outside of the group of `width` lanes.
template <class T>
T shuffle(unsigned mask, T value, int source, int width) {
  const bool inside = source >= 0 && source / width == lane() / width;
  return from_bits<T>(wait_for_lanes(Kind::shuffle, mask, to_bits(value)).of[inside ? source : lane()]);
}

// f(lane, its value) for the lanes of the mask, lowest first.
template <class T, class F>
void for_lanes(unsigned mask, T value, F f) {
  const Values values = wait_for_lanes(Kind::shuffle, mask, to_bits(value));
  for (int i = 0; i < 32; ++i)
    if (mask >> i & 1) f(i, from_bits<T>(values.of[i]));
}

// Reads, changes and writes; returns what was there.
template <class T, class F>
T atomically(T* p, F f) {
  const std::atomic_ref<T> place(*p);
  T old = place.load(std::memory_order_relaxed);
  while (!place.compare_exchange_weak(old, f(old), std::memory_order_relaxed)) {
  }
  return old;
}

}  // namespace emulation

#define threadIdx (::emulation::current().index)
#define blockIdx (::emulation::current().block)
#define blockDim (::emulation::current().block_size)
#define gridDim (::emulation::current().grid)

// ---- barriers, shuffles, votes ----

inline void __syncthreads() { emulation::wait_for_block(); }
inline void __syncwarp(unsigned mask = ~0u) { emulation::wait_for_lanes(emulation::Kind::syncwarp, mask, 0); }
inline void __threadfence() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  return emulation::shuffle(mask, value, emulation::lane() / width * width + source % width, width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  return emulation::shuffle(mask, value, emulation::lane() ^ bits, width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32) {
  return emulation::shuffle(mask, value, emulation::lane() + delta, width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32) {
  return emulation::shuffle(mask, value, emulation::lane() - delta, width);
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  unsigned same = 0;
  emulation::for_lanes(mask, value, [&](int i, T other) { same |= unsigned(other == value) << i; });
  return same;
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  unsigned ballot = 0;
  emulation::for_lanes(mask, predicate, [&](int i, int vote) { ballot |= unsigned(vote != 0) << i; });
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
inline unsigned __reduce_add_sync(unsigned mask, unsigned value) {
  unsigned sum = 0;
  emulation::for_lanes(mask, value, [&](int, unsigned other) { sum += other; });
  return sum;
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  static_assert(std::is_integral_v<T> && sizeof(T) == 4);
  emulation::for_lanes(mask, T(value), [&](int, T other) { value = other > value ? other : value; });
  return value;
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  static_assert(std::is_integral_v<T> && sizeof(T) == 4);
  emulation::for_lanes(mask, T(value), [&](int, T other) { value = other < value ? other : value; });
  return value;
}

// ---- atomics: they order nothing but themselves ----

template <class T>
T atomicAdd(T* p, std::type_identity_t<T> value) {
  return emulation::atomically(p, [=](T old) { return T(old + value); });
}
template <class T>
T atomicOr(T* p, std::type_identity_t<T> value) {
  return emulation::atomically(p, [=](T old) { return T(old | value); });
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> value) {
  return emulation::atomically(p, [=](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* p, std::type_identity_t<T> value) {
  return emulation::atomically(p, [=](T old) { return value < old ? value : old; });
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> value) {
  return emulation::atomically(p, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  return emulation::atomically(p, [=](T old) { return old == expected ? value : old; });
}

// ---- loads, bits, arithmetic ----

template <class T>
T __ldg(const T* p) {
  return *p;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(std::uint64_t(a) * b >> 32); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }

// ---- half formats ----

struct __half {
  std::uint16_t bits;
};
struct __nv_bfloat16 {
  std::uint16_t bits;
};
inline __half __ushort_as_half(std::uint16_t bits) { return {bits}; }
inline std::uint16_t __half_as_ushort(__half h) { return h.bits; }
inline std::uint16_t __bfloat16_as_ushort(__nv_bfloat16 h) { return h.bits; }
inline float __half2float(__half h) { return float(std::bit_cast<_Float16>(h.bits)); }
inline __half __float2half_rn(float x) { return {std::bit_cast<std::uint16_t>(_Float16(x))}; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(x);
  if (x != x) return {0x7fff};
  return {std::uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
