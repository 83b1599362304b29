// CUDA's language for g++, so that a .cu file is compiled as C++ and its kernels run on the CPU: for tests only.
//
// The blocks of a grid run one after another, the threads of a block as fibers of one thread of the system, which change
// at barriers, votes and shuffles alone. AddressSanitizer watches every access, among them those of shared memory;
// ThreadSanitizer is told what orders two threads: __syncthreads, __syncwarp and the ends of a launch; atomics and
// shuffles do not. So it finds a race between any two threads of a grid, whichever of them ran first. A barrier that
// not all threads reach, a shuffle of lanes that are not in its mask, more shared memory than a block may have: errors.
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
#include <cstring>
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
#define EMULATION_VECTOR(type, element, align)                                                                 \
  struct alignas(2 * align) type##2 { element x, y; };                                                         \
  struct alignas(4 * align > 16 ? 16 : 4 * align) type##4 { element x, y, z, w; };                             \
  [[maybe_unused]] static inline type##2 make_##type##2(element x, element y) { return {x, y}; }               \
  [[maybe_unused]] static inline type##4 make_##type##4(element x, element y, element z, element w) { return {x, y, z, w}; }
// clang-format on
EMULATION_VECTOR(float, float, 4)
EMULATION_VECTOR(double, double, 8)
EMULATION_VECTOR(int, int, 4)
EMULATION_VECTOR(uint, unsigned, 4)
#undef EMULATION_VECTOR

// ---- the running thread (cuda_emulation.cpp) ----

namespace emulation {

struct Thread {
  dim3 index, block, block_size, grid;
};
const Thread& current();

void launch(dim3 grid, dim3 block, std::size_t dynamic_bytes, const std::function<void()>& kernel);
void* shared(const void* key, std::size_t bytes);  // one object of a block for each key
void* dynamic_shared();

enum class Kind { barrier, syncwarp, shuffle };
void wait_for_block();
// All lanes of the mask must come; the value of each is then known to all of them, as values[lane].
const std::uint64_t* wait_for_lanes(Kind kind, unsigned mask, std::uint64_t value);

template <class T>
std::uint64_t bits_of(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  std::uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  return bits;
}

unsigned lane();

template <class T>
T exchange(unsigned mask, T value, unsigned source) {
  const std::uint64_t bits = wait_for_lanes(Kind::shuffle, mask, bits_of(value))[source];
  T result;
  __builtin_memcpy(&result, &bits, sizeof(T));
  return result;
}

// Of all lanes in the mask, lowest first.
template <class T, class F>
T reduce(unsigned mask, T value, F f) {
  const std::uint64_t* values = wait_for_lanes(Kind::shuffle, mask, bits_of(value));
  bool first = true;
  T result = value;
  for (unsigned i = 0; i < 32; ++i) {
    if (!(mask >> i & 1)) continue;
    T other;
    __builtin_memcpy(&other, &values[i], sizeof(T));
    result = first ? other : f(result, other);
    first = false;
  }
  return result;
}

}  // namespace emulation

#define threadIdx (::emulation::current().index)
#define blockIdx (::emulation::current().block)
#define blockDim (::emulation::current().block_size)
#define gridDim (::emulation::current().grid)
constexpr int warpSize = 32;

// ---- barriers, votes, shuffles ----

inline void __syncthreads() { emulation::wait_for_block(); }
inline void __syncwarp(unsigned mask = ~0u) { emulation::wait_for_lanes(emulation::Kind::syncwarp, mask, 0); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const unsigned base = emulation::lane() & ~unsigned(width - 1);
  return emulation::exchange(mask, value, base + unsigned(source) % width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const unsigned lane = emulation::lane(), source = lane ^ bits, end = (lane & ~unsigned(width - 1)) + width;
  return emulation::exchange(mask, value, source < end ? source : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = emulation::lane(), source = lane + delta, end = (lane & ~unsigned(width - 1)) + width;
  return emulation::exchange(mask, value, source < end ? source : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = emulation::lane(), base = lane & ~unsigned(width - 1);
  return emulation::exchange(mask, value, lane - base >= delta ? lane - delta : lane);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const std::uint64_t* votes = emulation::wait_for_lanes(emulation::Kind::shuffle, mask, predicate != 0);
  unsigned ballot = 0;
  for (unsigned i = 0; i < 32; ++i) ballot |= mask >> i & 1 ? unsigned(votes[i]) << i : 0;
  return ballot;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  const std::uint64_t* values = emulation::wait_for_lanes(emulation::Kind::shuffle, mask, emulation::bits_of(value));
  unsigned same = 0;
  for (unsigned i = 0; i < 32; ++i)
    if (mask >> i & 1 && values[i] == emulation::bits_of(value)) same |= 1u << i;
  return same;
}
// 32-bit integers, as in CUDA.
template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  static_assert(std::is_integral_v<T> && sizeof(T) == 4);
  return emulation::reduce(mask, value, [](T a, T b) { return T(unsigned(a) + unsigned(b)); });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  static_assert(std::is_integral_v<T> && sizeof(T) == 4);
  return emulation::reduce(mask, value, [](T a, T b) { return a > b ? a : b; });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  static_assert(std::is_integral_v<T> && sizeof(T) == 4);
  return emulation::reduce(mask, value, [](T a, T b) { return a < b ? a : b; });
}
inline unsigned __activemask() { return 1u << emulation::lane(); }  // all that is certain

// ---- atomics: they order nothing but themselves ----

template <class T, class V>
T atomicAdd(T* p, V value) {
  return std::atomic_ref<T>(*p).fetch_add(T(value), std::memory_order_relaxed);
}
template <class T, class V>
T atomicExch(T* p, V value) {
  return std::atomic_ref<T>(*p).exchange(T(value), std::memory_order_relaxed);
}
template <class T, class V>
T atomicCAS(T* p, V expected, V value) {
  T old = T(expected);
  std::atomic_ref<T>(*p).compare_exchange_strong(old, T(value), std::memory_order_relaxed);
  return old;
}
template <class T, class V>
T atomicOr(T* p, V value) {
  return std::atomic_ref<T>(*p).fetch_or(T(value), std::memory_order_relaxed);
}
template <class T, class V>
T atomicMax(T* p, V value) {
  T old = std::atomic_ref<T>(*p).load(std::memory_order_relaxed);
  while (old < T(value) &&
         !std::atomic_ref<T>(*p).compare_exchange_weak(old, T(value), std::memory_order_relaxed)) {
  }
  return old;
}
template <class T, class V>
T atomicMin(T* p, V value) {
  T old = std::atomic_ref<T>(*p).load(std::memory_order_relaxed);
  while (T(value) < old &&
         !std::atomic_ref<T>(*p).compare_exchange_weak(old, T(value), std::memory_order_relaxed)) {
  }
  return old;
}

// ---- loads, bits, arithmetic ----

template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcs(T* p, T value) {
  *p = value;
}

inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(std::uint64_t(a) * b >> 32); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return std::countl_zero(unsigned(x)); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __frcp_rn(float x) { return 1 / x; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline double rsqrt(double x) { return 1 / std::sqrt(x); }
template <class T>
constexpr std::enable_if_t<std::is_arithmetic_v<T>, T> min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr std::enable_if_t<std::is_arithmetic_v<T>, T> max(T a, T b) {
  return a < b ? b : a;
}

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
