// Stores past the caches, for results larger than they are. Included by *_loops.cpp alone.
#pragma once

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

#include "simd.h"

namespace bkind3d {
namespace BKIND3D_ISA {

// Copies past the caches what fills whole registers of the target, the two ends as usual.
BKIND3D_FN void copy_past_caches(char* target, const char* source, int64 bytes) {
#if defined(__SSE2__)
  const int64 unaligned = -(int64)target & (register_bytes - 1), head = unaligned < bytes ? unaligned : bytes;
  __builtin_memcpy(target, source, head);
  int64 i = head;
  for (; i + register_bytes <= bytes; i += register_bytes) {
    vec<float> v;
    __builtin_memcpy(&v, source + i, register_bytes);
#if defined(__AVX512F__)
    _mm512_stream_ps((float*)(target + i), (__m512)v);
#elif defined(__AVX2__)
    _mm256_stream_ps((float*)(target + i), (__m256)v);
#else
    _mm_stream_ps((float*)(target + i), (__m128)v);
#endif
  }
  __builtin_memcpy(target + i, source + i, bytes - i);
#else
  __builtin_memcpy(target, source, bytes);
#endif
}

// A whole register past the caches, to an address that is a multiple of its size.
template <class T>
BKIND3D_FN void store_past_caches(T* p, vec<T> v) {
#if defined(__AVX512F__)
  _mm512_stream_ps((float*)p, (__m512)v);
#elif defined(__AVX2__)
  _mm256_stream_ps((float*)p, (__m256)v);
#elif defined(__SSE2__)
  _mm_stream_ps((float*)p, (__m128)v);
#else
  store(p, v);
#endif
}

// Streaming stores are weakly ordered: they are done before another thread is told of them.
BKIND3D_FN void finish_copies() {
#if defined(__SSE2__)
  __builtin_ia32_sfence();
#endif
}

}  // namespace BKIND3D_ISA
}  // namespace bkind3d
