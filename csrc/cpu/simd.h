// Vectors of the widest register of the instruction set that this file is compiled for, as vector types of GCC and
// Clang: arithmetic and comparisons are operators; what differs between sets is here.
//
// Included by *_loops.cpp alone. Nothing of the standard library may be used there: an inline function of it, compiled
// with AVX-512, could be the copy that the linker keeps for everybody.
#pragma once

#if !defined(BKIND3D_ISA)
#error "compile the loops through setup.py, which defines BKIND3D_ISA"
#endif

#if defined(__AVX2__)
// GCC 12 takes the undefined registers of its own intrinsics for a mistake (its bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "../common/portable.h"
#include "../common/storage.h"

namespace bkind3d {
namespace BKIND3D_ISA {

using int64 = long long;

// The scalar primitives beside those for vectors, and (at the end of this file) the other way round, so that a template
// of csrc/common, included after this file, finds both.
using bkind3d::floor_of;
using bkind3d::max_of;
using bkind3d::min_of;
using bkind3d::select;
using bkind3d::sqrt_of;

#if defined(__AVX512F__)
constexpr int register_bytes = 64;
#elif defined(__AVX2__)
constexpr int register_bytes = 32;
#else
constexpr int register_bytes = 16;
#endif

template <class T, int N>
struct vector_of {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
  typedef T unaligned __attribute__((vector_size(N * sizeof(T)), aligned(sizeof(T)), may_alias));
};

template <class T>
constexpr int lanes = register_bytes / int(sizeof(T));

// A full register of T (float, double) and of the integers of its size, as comparisons give them.
template <class T>
using vec = typename vector_of<T, lanes<T>>::type;
template <class T>
using ivec = decltype(vec<T>{} < vec<T>{});

template <class T>
BKIND3D_FN vec<T> broadcast(T x) {
  return x - vec<T>{};
}

template <class T>
BKIND3D_FN vec<T> iota() {
  vec<T> v = {};
  for (int i = 0; i < lanes<T>; ++i) v[i] = T(i);
  return v;
}

BKIND3D_FN vec<float> select(ivec<float> mask, vec<float> a, vec<float> b) { return mask ? a : b; }
BKIND3D_FN vec<double> select(ivec<double> mask, vec<double> a, vec<double> b) { return mask ? a : b; }
BKIND3D_FN ivec<float> select(ivec<float> mask, ivec<float> a, ivec<float> b) { return mask ? a : b; }
BKIND3D_FN ivec<double> select(ivec<double> mask, ivec<double> a, ivec<double> b) { return mask ? a : b; }

// ---- loads and stores: any alignment; the half formats are widened and rounded to nearest even ----

BKIND3D_FN vec<float> load(const float* p) { return *(const typename vector_of<float, lanes<float>>::unaligned*)p; }
BKIND3D_FN vec<double> load(const double* p) { return *(const typename vector_of<double, lanes<double>>::unaligned*)p; }
BKIND3D_FN void store(float* p, vec<float> v) { *(typename vector_of<float, lanes<float>>::unaligned*)p = v; }
BKIND3D_FN void store(double* p, vec<double> v) { *(typename vector_of<double, lanes<double>>::unaligned*)p = v; }

using halves = vector_of<unsigned short, lanes<float>>;
using words = vector_of<unsigned, lanes<float>>;

BKIND3D_FN vec<float> load(const bfloat16* p) {
  const typename halves::type bits = *(const typename halves::unaligned*)p;
  return (vec<float>)(__builtin_convertvector(bits, typename words::type) << 16);
}

BKIND3D_FN void store(bfloat16* p, vec<float> v) {
  const typename words::type bits = (typename words::type)v;
  const typename words::type rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const typename words::type nan = (bits >> 16) | 0x40;  // rounding could carry a NaN over into infinity
  const typename words::type chosen = (typename words::type)(v != v ? (ivec<float>)nan : (ivec<float>)rounded);
  *(typename halves::unaligned*)p = __builtin_convertvector(chosen, typename halves::type);
}

#if defined(__AVX512F__)
BKIND3D_FN vec<float> load(const float16* p) {
  return (vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
BKIND3D_FN void store(float16* p, vec<float> v) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__AVX2__)
BKIND3D_FN vec<float> load(const float16* p) { return (vec<float>)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
BKIND3D_FN void store(float16* p, vec<float> v) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
}
#else
BKIND3D_FN vec<float> load(const float16* p) {
  // Exponent and mantissa moved into place are 2^112 too small; the product puts them right, subnormals included.
  const typename halves::type stored = *(const typename halves::unaligned*)p;
  const typename words::type bits = __builtin_convertvector(stored, typename words::type);
  const vec<float> magnitude = (vec<float>)((bits & 0x7fff) << 13) * 0x1p112f;
  const ivec<float> special = (bits & 0x7c00) == 0x7c00;
  const typename words::type value =
      (typename words::type)(special ? (ivec<float>)(((bits & 0x3ff) << 13) | 0x7f800000) : (ivec<float>)magnitude);
  return (vec<float>)(value | ((bits & 0x8000) << 16));
}
BKIND3D_FN void store(float16* p, vec<float> v) {
  typedef typename words::type U;
  const U bits = (U)v, sign = (bits >> 16) & 0x8000, absolute = bits & 0x7fffffff;
  const U normal = (absolute - (112u << 23) + 0xfff + ((absolute >> 13) & 1)) >> 13;
  // Below 2^-14: the addition of 1/2 aligns the mantissa to the last bit of a subnormal and rounds.
  const U small = (U)((vec<float>)absolute + 0.5f) - 0x3f000000u;
  U value = (U)((ivec<float>)absolute < 0x38800000 ? (ivec<float>)small : (ivec<float>)normal);
  value = (U)((ivec<float>)absolute >= 0x477ff000 ? ivec<float>{} + 0x7c00 : (ivec<float>)value);  // 65520 and above
  value = (U)((ivec<float>)absolute > 0x7f800000 ? ivec<float>{} + 0x7e00 : (ivec<float>)value);   // NaN
  *(typename halves::unaligned*)p = __builtin_convertvector(value | sign, typename halves::type);
}
#endif

// The first `count` lanes, in a buffer on the stack; the other lanes are zero.
template <class T, class S>
BKIND3D_FN vec<T> load_first(const S* p, int count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 8) return (vec<T>)_mm512_maskz_loadu_pd(__mmask8((1u << count) - 1), p);
  if constexpr (sizeof(S) == 4) return (vec<T>)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
#endif
  S buffer[lanes<T>] = {};
  for (int i = 0; i < count; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <class S, class V>
BKIND3D_FN void store_first(S* p, V v, int count) {
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 8) return _mm512_mask_storeu_pd(p, __mmask8((1u << count) - 1), (__m512d)v);
  if constexpr (sizeof(S) == 4) return _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), (__m512)v);
#endif
  S buffer[sizeof(V) / sizeof(v[0])];
  store(buffer, v);
  for (int i = 0; i < count; ++i) p[i] = buffer[i];
}

// ---- arithmetic ----

// min_of and max_of: the first operand where one is NaN, in every set (minps and maxps give their second).
#if defined(__AVX512F__)
BKIND3D_FN vec<float> floor_of(vec<float> x) {
  return (vec<float>)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
BKIND3D_FN vec<double> floor_of(vec<double> x) {
  return (vec<double>)_mm512_roundscale_pd((__m512d)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
}
BKIND3D_FN vec<float> min_of(vec<float> a, vec<float> b) { return (vec<float>)_mm512_min_ps((__m512)b, (__m512)a); }
BKIND3D_FN vec<float> max_of(vec<float> a, vec<float> b) { return (vec<float>)_mm512_max_ps((__m512)b, (__m512)a); }
BKIND3D_FN vec<double> min_of(vec<double> a, vec<double> b) {
  return (vec<double>)_mm512_min_pd((__m512d)b, (__m512d)a);
}
BKIND3D_FN vec<double> max_of(vec<double> a, vec<double> b) {
  return (vec<double>)_mm512_max_pd((__m512d)b, (__m512d)a);
}
#elif defined(__AVX2__)
BKIND3D_FN vec<float> floor_of(vec<float> x) { return (vec<float>)_mm256_floor_ps((__m256)x); }
BKIND3D_FN vec<double> floor_of(vec<double> x) { return (vec<double>)_mm256_floor_pd((__m256d)x); }
BKIND3D_FN vec<float> min_of(vec<float> a, vec<float> b) { return (vec<float>)_mm256_min_ps((__m256)b, (__m256)a); }
BKIND3D_FN vec<float> max_of(vec<float> a, vec<float> b) { return (vec<float>)_mm256_max_ps((__m256)b, (__m256)a); }
BKIND3D_FN vec<double> min_of(vec<double> a, vec<double> b) {
  return (vec<double>)_mm256_min_pd((__m256d)b, (__m256d)a);
}
BKIND3D_FN vec<double> max_of(vec<double> a, vec<double> b) {
  return (vec<double>)_mm256_max_pd((__m256d)b, (__m256d)a);
}
#else
BKIND3D_FN vec<float> min_of(vec<float> a, vec<float> b) { return b < a ? b : a; }
BKIND3D_FN vec<float> max_of(vec<float> a, vec<float> b) { return b > a ? b : a; }
BKIND3D_FN vec<double> min_of(vec<double> a, vec<double> b) { return b < a ? b : a; }
BKIND3D_FN vec<double> max_of(vec<double> a, vec<double> b) { return b > a ? b : a; }
BKIND3D_FN vec<float> floor_of(vec<float> x) {
  vec<float> r = {};
  for (int i = 0; i < lanes<float>; ++i) r[i] = __builtin_floorf(x[i]);
  return r;
}
BKIND3D_FN vec<double> floor_of(vec<double> x) {
  vec<double> r = {};
  for (int i = 0; i < lanes<double>; ++i) r[i] = __builtin_floor(x[i]);
  return r;
}
#endif

BKIND3D_FN ivec<float> to_int(vec<float> x) { return __builtin_convertvector(x, ivec<float>); }
BKIND3D_FN ivec<double> to_int(vec<double> x) { return __builtin_convertvector(x, ivec<double>); }

template <class V>
BKIND3D_FN auto sum_of(V v) {
  auto total = v[0];
  for (int i = 1; i < int(sizeof(V) / sizeof(v[0])); ++i) total += v[i];
  return total;
}

BKIND3D_FN float sum_of(vec<float> v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float total = v[0];
  for (int i = 1; i < lanes<float>; ++i) total += v[i];
  return total;
#endif
}

// The lowest lane where the mask is set, or -1.
template <class M>
BKIND3D_FN int first_lane(M mask) {
#if defined(__AVX512F__)
  const unsigned bits =
      sizeof(mask[0]) == 4 ? _mm512_movepi32_mask((__m512i)mask) : _mm512_movepi64_mask((__m512i)mask);
#elif defined(__AVX2__)
  const unsigned bits = sizeof(mask[0]) == 4 ? _mm256_movemask_ps((__m256)mask) : _mm256_movemask_pd((__m256d)mask);
#else
  unsigned bits = 0;
  for (int i = 0; i < int(sizeof(M) / sizeof(mask[0])); ++i) bits |= unsigned(mask[i] != 0) << i;
#endif
  return bits ? __builtin_ctz(bits) : -1;
}

template <class V>
BKIND3D_FN auto maximum_of(V v) {
  auto best = v[0];
  for (int i = 1; i < int(sizeof(V) / sizeof(v[0])); ++i) best = v[i] > best ? v[i] : best;
  return best;
}

// e^x. float: the error is at most 1.011 ulp (every float of the range was tried), and results below the smallest
// normal number (x < -87.3365) are 0. double: at most 0.99 ulp in two million samples, and 0 for x < -708. Infinity
// above 88.7228 and 709.7827; NaN stays NaN. tests/kernels/test_simd.py measures it.
BKIND3D_FN vec<float> exp_of(vec<float> x) {
  const float low = -87.3365f, high = 88.8f;  // at 88.8 the last product overflows
  const vec<float> clamped = min_of(x, broadcast(high));
  const vec<float> shifted = clamped * 1.44269504f + 0x1.8p23f;  // rounds to an integer in the low bits
  const vec<float> n = shifted - 0x1.8p23f;
  vec<float> f = clamped - n * 0x1.62ep-1f;  // ln 2 in two parts; the first product is exact
  f = f - n * 0x1.0bfbe8p-15f;
  vec<float> p = f * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * (f * f) + f + 1.0f;
#if defined(__AVX512F__)
  const __mmask16 normal = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(low), _CMP_NLT_UQ);
  return (vec<float>)_mm512_maskz_scalef_ps(normal, (__m512)p, (__m512)n);
#else
  // 2^n by the exponent's bits, in two factors, since n may be 128.
  const ivec<float> k = (ivec<float>)shifted - 0x4b400000, half = k >> 1;
  p = p * (vec<float>)((half + 127) << 23) * (vec<float>)((k - half + 127) << 23);
  return select(x < low, vec<float>{}, p);
#endif
}

// 2^x for x <= 0 (or NaN) in half the operations of exp_of: what a softmax needs, whose logits are scaled anyway. The
// error is at most 0.952 ulp, 1.228 in the baseline set, which has no FMA (every float was tried); exactly 1 for 0; a
// result below the smallest normal number (x < -126) may be 0.
BKIND3D_FN vec<float> exp2_of_nonpositive(vec<float> x) {
#if defined(__AVX512F__)
  const __m512 n = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  // x - n, and 0 where x is -inf
  const vec<float> f = (vec<float>)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vec<float> clamped = max_of(x, broadcast(-127.0f));  // where the factor 2^n below has the bits of 0
  const vec<float> shifted = clamped + 0x1.8p23f, f = clamped - (shifted - 0x1.8p23f);
#endif
  vec<float> p = f * 0x1.41fbbcp-13f + 0x1.5f3e52p-10f;  // minimax in the relative error: 2e-9 before rounding
  p = p * f + 0x1.3b2d4cp-7f;
  p = p * f + 0x1.c6aee8p-5f;
  p = p * f + 0x1.ebfbdcp-3f;
  p = p * f + 0x1.62e43p-1f;
  p = p * f + 1.0f;
#if defined(__AVX512F__)
  return (vec<float>)_mm512_scalef_ps((__m512)p, n);
#else
  return p * (vec<float>)(((ivec<float>)shifted - (0x4b400000 - 127)) << 23);
#endif
}

BKIND3D_FN vec<double> exp_of(vec<double> x) {
  const double low = -708.0, high = 709.782712893384;
  const vec<double> clamped = select(x > high, broadcast(high), x);
  const vec<double> shifted = clamped * 1.4426950408889634 + 0x1.8p52;
  const vec<double> n = shifted - 0x1.8p52;
  vec<double> f = clamped - n * 0x1.62e42feep-1;
  f = f - n * 0x1.a39ef35793c76p-33;
  // Taylor: the first term left out, f^14/14!, is below 5e-18 for |f| <= ln(2)/2.
  double factorial[14] = {1.0};
  for (int i = 1; i < 14; ++i) factorial[i] = factorial[i - 1] * i;
  vec<double> p = broadcast(1.0 / factorial[13]);
  for (int i = 12; i > 1; --i) p = p * f + 1.0 / factorial[i];
  p = p * (f * f) + f + 1.0;
  const ivec<double> k = (ivec<double>)shifted - 0x4338000000000000LL, half = k >> 1;
  p = p * (vec<double>)((half + 1023) << 52) * (vec<double>)((k - half + 1023) << 52);
  p = select(x < low, vec<double>{}, p);
  return select(x > high, broadcast(__builtin_inf()), p);
}

BKIND3D_FN vec<double> exp2_of_nonpositive(vec<double> x) { return exp_of(x * 0x1.62e42fefa39efp-1); }

}  // namespace BKIND3D_ISA
// The formulas of csrc/common, included after this file, find the vector versions beside the scalar ones.
using namespace BKIND3D_ISA;

}  // namespace bkind3d
