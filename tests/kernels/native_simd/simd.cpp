// csrc/cpu/simd.h over arrays whose length is a multiple of every vector, for test_simd.py: compiled once for each
// instruction set, called through ctypes.
#include "csrc/cpu/simd.h"

using namespace bkind3d;
using namespace bkind3d::BKIND3D_ISA;

namespace {

template <class T, class F>
void map(const T* x, T* y, long n, F f) {
  for (long i = 0; i < n; i += lanes<T>) store(y + i, f(load(x + i)));
}

template <class A, class B>
void convert(const A* x, B* y, long n) {
  for (long i = 0; i < n; i += lanes<float>) store(y + i, load(x + i));
}

// Every part of a vector, from `count` elements with nothing behind them, to `count` elements and no more.
template <class T, class S>
void copy_first(const S* x, S* y, int count) {
  store_first(y, load_first<T>(x, count), count);
}

}  // namespace

#define EXPORT __attribute__((visibility("default")))

#define FOR_TYPE(T)                                                                         \
  EXPORT int lanes_##T() { return lanes<T>; }                                               \
  EXPORT void exp_##T(const T* x, T* y, long n) {                                           \
    map(x, y, n, [](vec<T> v) { return exp_of(v); });                                       \
  }                                                                                         \
  EXPORT void floor_##T(const T* x, T* y, long n) {                                         \
    map(x, y, n, [](vec<T> v) { return floor_of(v); });                                     \
  }                                                                                         \
  EXPORT void min_##T(const T* a, const T* b, T* y) { store(y, min_of(load(a), load(b))); } \
  EXPORT void max_##T(const T* a, const T* b, T* y) { store(y, max_of(load(a), load(b))); } \
  EXPORT void copy_first_##T(const T* x, T* y, int n) { copy_first<T>(x, y, n); }           \
  EXPORT int first_lane_##T(const T* x) { return first_lane(load(x) > T(0)); }              \
  EXPORT void reduce_##T(const T* x, T* y) {                                                \
    y[0] = sum_of(load(x));                                                                 \
    y[1] = maximum_of(load(x));                                                             \
  }                                                                                         \
  EXPORT void special_##T(T x, T* y) {                                                      \
    store(y, iota<T>());                                                                    \
    store(y + lanes<T>, broadcast(x));                                                      \
  }

extern "C" {
FOR_TYPE(float)
FOR_TYPE(double)

EXPORT void exp2_float(const float* x, float* y, long n) {
  map(x, y, n, [](vec<float> v) { return exp2_of_nonpositive(v); });
}

#define FOR_HALF(T)                                                          \
  EXPORT void widen_##T(const T* x, float* y, long n) { convert(x, y, n); }  \
  EXPORT void narrow_##T(const float* x, T* y, long n) { convert(x, y, n); } \
  EXPORT void copy_first_##T(const T* x, T* y, int n) { copy_first<float>(x, y, n); }
FOR_HALF(bfloat16)
FOR_HALF(float16)
}
