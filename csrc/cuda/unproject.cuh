// What the kernels of unproject share: which voxels a warp walks over, their projection into the views, samples of the
// maps, and the aggregation over the views.
//
// A voxel has a group of lanes, 16 bytes of channels each (8 lanes for 32 channels of float, 4 of bfloat16), a warp as
// many voxels along z as fit. It walks over a brick, 8 steps along y and 4 along x, so that neighbours find their taps
// in the first-level cache. One lane projects for a whole group and leaves offsets and weights in shared memory, 32
// voxels and views at once. Views are taken four at a time, unrolled: any number of them with the same code.
#pragma once

#include "../common/unproject.h"
#include "device.cuh"
#include "unproject.h"

namespace bkind3d {
namespace {

constexpr int warps = 4, threads = 32 * warps;
constexpr int chunk = 4;  // views whose samples are in registers at once

using Problem = UnprojectArgs;  // what all kernels are given

template <class T>
__device__ __forceinline__ T* dynamic_shared() {
#if defined(BKIND3D_EMULATED)
  return static_cast<T*>(emulation::dynamic_shared());
#else
  extern __shared__ uint4 memory[];
  return reinterpret_cast<T*>(memory);
#endif
}

// ---- which voxel ----

struct Brick {
  int sample, x, y, z;  // of its first voxel
};

struct Voxel {
  int x, y, z;
  bool inside;
};

__device__ __forceinline__ Brick brick_of(const Problem& p, int sample, unsigned index) {
  const unsigned line = index / p.bricks_z, column = line / p.bricks_y;
  return {sample, int(column) * p.run_x, int(line - column * p.bricks_y) * (p.groups_y << p.run_y_log),
          int(index - line * p.bricks_z) * p.groups_z};
}

// Where a group is among those of its warp.
struct GroupOffset {
  int y, z;
};

__device__ __forceinline__ GroupOffset group_offset(const Problem& p, int group) {
  const int y = int(quotient(p.by_groups_z, group));
  return {y, group - y * p.groups_z};
}

// Of a walk, in groups along y: up and down, so that the next is always a neighbour.
struct Step {
  int x, y;
};

__device__ __forceinline__ Step step_of(const Problem& p, int step) {
  const int x = step >> p.run_y_log;
  return {x, (step ^ -(x & 1)) & ((1 << p.run_y_log) - 1)};
}

__device__ __forceinline__ Voxel voxel_of(const Problem& p, const Brick& brick, const GroupOffset& offset, int number) {
  const Step step = step_of(p, number);
  const int x = brick.x + step.x, y = brick.y + offset.y + step.y * p.groups_y, z = brick.z + offset.z;
  return {x, y, z, x < p.x && y < p.y && z < p.z};
}

// In its sample.
__device__ __forceinline__ unsigned index_of(const Problem& p, const Voxel& voxel) {
  return (unsigned(voxel.x) * unsigned(p.y) + unsigned(voxel.y)) * unsigned(p.z) + unsigned(voxel.z);
}

__device__ __forceinline__ int64_t voxels_of(const Problem& p) { return int64_t(p.x) * p.y * p.z; }

// ---- projection: one lane for each voxel and view ----

template <class T>
struct Sight {
  bool seen;
  T u, v, depth;
  AxisTaps<T> x, y;
};

template <class T>
struct alignas(16) Matrix {
  T q[12];
};

// a / c and b / c.
__device__ __forceinline__ void divide_both(double a, double b, double c, double& u, double& v) {
  u = a / c, v = b / c;
}
__device__ __forceinline__ void divide_both(float a, float b, float c, float& u, float& v) {
#if defined(BKIND3D_EMULATED)
  u = a / c, v = b / c;
#else  // a reciprocal and one step of Newton's for each: within 1 ulp where 1 / c is a normal number
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(c));
  u = a * inverse, v = b * inverse;
  u += inverse * (a - u * c), v += inverse * (b - v * c);
#endif
}

// Sample and view.
__device__ __forceinline__ unsigned row_of(const Problem& p, int sample, int view) {
  return unsigned(sample) * unsigned(p.views) + unsigned(view);
}

__device__ __forceinline__ bool may_see(const Problem& p, int sample, const Voxel& voxel, int view) {
  return view < p.views && voxel.inside && (!p.mask || p.mask[row_of(p, sample, view)]);
}

template <class T>
__device__ __forceinline__ Sight<T> sight_of(const Problem& p, int sample, const Voxel& voxel, int view) {
  const Matrix<T> matrix = static_cast<const Matrix<T>*>(p.q)[row_of(p, sample, view)];
  const Homogeneous<T> h = project(matrix.q, T(voxel.x), T(voxel.y), T(voxel.z));
  Sight<T> s;
  divide_both(h.x, h.y, h.depth, s.u, s.v);
  s.depth = h.depth;
  s.seen = sees(s.u, s.v, s.depth, T(p.width), T(p.height));
  s.x = axis_taps(s.u, T(p.width)), s.y = axis_taps(s.v, T(p.height));
  return s;
}

// The slot of the first tap among two: a pixel's slot is whether its index is odd. A tap outside has the other one.
template <class T>
__device__ __forceinline__ int first_slot(const AxisTaps<T>& taps) {
  return (taps.inside[0] != 0 ? int(taps.index[0]) : int(taps.index[1]) + 1) & 1;
}

// What stands for the sample of a view that takes no part: it weighs nothing, and no sample is less.
template <class T>
constexpr T lowest = -(sizeof(T) == sizeof(double) ? T(__DBL_MAX__) : T(__FLT_MAX__));

// For the sample of a view that does not see the voxel, or that there is not.
template <class T>
__device__ __forceinline__ T unseen_sample(const Problem& p, int view) {
  const bool compared = p.aggregation == Aggregation::softmax || p.aggregation == Aggregation::max;
  return compared && (p.exclude || view >= p.views) ? lowest<T> : T(0);
}

// A voxel's four taps in one view. Offsets are in packs. Where the view does not see the voxel the first is `no_pixel`,
// and the first weight what stands for the sample.
template <class T>
struct alignas(16) Taps {
  unsigned offset[4];
  T weight[4];
};

// ByParity: each tap in the slot 2 (row odd) + (column odd), so that a pixel that the next voxel shares has the same
// slot there.
template <bool ByParity, class T>
__device__ __forceinline__ Taps<T> taps_of(const Problem& p, const Sight<T>& s) {
  const T floor_x = floor_of(s.u), floor_y = floor_of(s.v);
  const int x = int(floor_x), y = int(floor_y);
  const T right = x + 1 < p.width ? s.u - floor_x : T(0), left = x >= 0 ? 1 - (s.u - floor_x) : T(0);
  const T below = y + 1 < p.height ? s.v - floor_y : T(0), above = y >= 0 ? 1 - (s.v - floor_y) : T(0);
  const unsigned x0 = unsigned(max_of(x, 0)) * p.stride_x, x1 = unsigned(min_of(x + 1, p.width - 1)) * p.stride_x;
  const unsigned y0 = unsigned(max_of(y, 0)) * p.stride_y, y1 = unsigned(min_of(y + 1, p.height - 1)) * p.stride_y;
  Taps<T> t;
  const bool odd_x = ByParity && (x & 1), odd_y = ByParity && (y & 1);
  const unsigned xs[2] = {odd_x ? x1 : x0, odd_x ? x0 : x1}, ys[2] = {odd_y ? y1 : y0, odd_y ? y0 : y1};
  const T wx[2] = {odd_x ? right : left, odd_x ? left : right}, wy[2] = {odd_y ? below : above, odd_y ? above : below};
#pragma unroll
  for (int i = 0; i < 4; ++i) t.offset[i] = ys[i / 2] + xs[i % 2], t.weight[i] = wy[i / 2] * wx[i % 2];
  return t;
}

// An item of a group: a step of its run and a view. All views of some steps, or where those are too many some views of
// one step.
struct Item {
  int group, step, view;
};

// From step 0 and view 0 on; `e` counts the groups first.
__device__ __forceinline__ Item item_of(const Problem& p, int e) {
  const int item = int(quotient(p.by_groups, e)), step = int(quotient(p.by_views, item));
  return {e - item * p.groups, step, item - step * p.padded_views};
}

__device__ __forceinline__ bool few_views(const Problem& p) { return p.padded_views <= p.items; }

// What a warp has projected: items from (step, view) on, of which `used` have been asked for.
template <class T>
struct Projected {
  Taps<T>* taps;
  int step, view, used;
};

// An item, and where its group is. The first of a lane is the same for the whole walk.
struct LocatedItem {
  Item item;
  GroupOffset offset;
};

__device__ __forceinline__ LocatedItem first_item_of(const Problem& p) {
  const Item item = item_of(p, int(threadIdx.x % 32));
  return {item, group_offset(p, item.group)};
}

template <bool ByParity, class T>
__device__ __forceinline__ Taps<T> project_item(const Problem& p, const Brick& brick, const LocatedItem& at, int step,
                                                int view) {
  const Voxel voxel = voxel_of(p, brick, at.offset, step + at.item.step);
  view += at.item.view;
  if (may_see(p, brick.sample, voxel, view)) {
    const Sight<T> sight = sight_of<T>(p, brick.sample, voxel, view);
    if (sight.seen) return taps_of<ByParity>(p, sight);
  }
  return {{no_pixel}, {unseen_sample<T>(p, view)}};
}

// Single: no lane has more than one item.
template <bool ByParity, bool Single, class T>
__device__ __forceinline__ void project_items(const Problem& p, const Brick& brick, const LocatedItem& first_item,
                                              Projected<T>& projected, int step, int view) {
  projected.step = step, projected.view = view, projected.used = 0;
  __syncwarp();
  const int first = int(threadIdx.x % 32), items = p.groups * p.items;
  if (first < items) projected.taps[first] = project_item<ByParity, T>(p, brick, first_item, step, view);
  for (int e = first + 32; !Single && e < items; e += 32) {
    const Item item = item_of(p, e);
    projected.taps[e] = project_item<ByParity, T>(p, brick, {item, group_offset(p, item.group)}, step, view);
  }
  __syncwarp();
}

// ---- a thread ----

// Of a thread: which warp, which group of its lanes, which member of that.
struct Role {
  int warp, group, member;
  bool idle;
};

__device__ __forceinline__ Role role_of(const Problem& p) {
  const int lane = int(threadIdx.x) % 32, group = lane / p.lanes;
  return {int(threadIdx.x) / 32, group, lane - group * p.lanes, group >= p.groups};
}

// What lies at `at` if `wanted`, by one instruction and no branch; else anything.
template <class P>
__device__ __forceinline__ P load_map(const P* at, bool wanted) {
#if defined(BKIND3D_EMULATED)
  return wanted ? *at : P{};
#else
  P pack;
  if constexpr (sizeof(P) == 16) {
    uint4 bits;
    asm("{ .reg .pred p; setp.ne.u32 p, %5, 0; @p ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4]; }"
        : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
        : "l"(at), "r"(unsigned(wanted)));
    __builtin_memcpy(&pack, &bits, 16);
  } else if constexpr (sizeof(P) == 8) {
    uint2 bits;
    asm("{ .reg .pred p; setp.ne.u32 p, %3, 0; @p ld.global.nc.v2.u32 {%0, %1}, [%2]; }"
        : "=r"(bits.x), "=r"(bits.y)
        : "l"(at), "r"(unsigned(wanted)));
    __builtin_memcpy(&pack, &bits, 8);
  } else if constexpr (sizeof(P) == 4) {
    unsigned bits;
    asm("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p ld.global.nc.u32 %0, [%1]; }"
        : "=r"(bits)
        : "l"(at), "r"(unsigned(wanted)));
    __builtin_memcpy(&pack, &bits, 4);
  } else {
    unsigned short bits;
    asm("{ .reg .pred p; setp.ne.u32 p, %2, 0; @p ld.global.nc.u16 %0, [%1]; }"
        : "=h"(bits)
        : "l"(at), "r"(unsigned(wanted)));
    __builtin_memcpy(&pack, &bits, 2);
  }
  return pack;
#endif
}

// Written once and not read here: first to be replaced in the second-level cache, where the maps are to stay.
template <class P>
__device__ __forceinline__ void store_once(P* p, const P& pack) {
#if defined(BKIND3D_EMULATED)
  *p = pack;
#else
  if constexpr (sizeof(P) == 16) {
    uint4 bits;
    __builtin_memcpy(&bits, &pack, 16);
    __stcs(reinterpret_cast<uint4*>(p), bits);
  } else if constexpr (sizeof(P) == 1) {
    __stcs(p, pack);
  } else {
    *p = pack;
  }
#endif
}

__device__ __forceinline__ const char* map_of(const Problem& p, int sample, int view) {
  return p.features + sample * p.stride_n + view * p.stride_m;
}

// One element, by one instruction: nvcc's own way to the second of two bfloat16 takes two.
template <class S, int Width>
__device__ __forceinline__ Arithmetic<S> element(const Pack<S, Width>& pack, int i) {
  return widen(pack.values[i]);
}
template <int Width>
__device__ __forceinline__ float element(const Pack<bfloat16, Width>& pack, int i) {
  if constexpr (Width % 2 == 0) {
    unsigned pair;
    __builtin_memcpy(&pair, pack.values + i / 2 * 2, 4);
    return __uint_as_float(i % 2 ? pair & 0xffff0000u : pair << 16);
  } else {
    return widen(pack.values[i]);
  }
}

template <class S, int Width>
__device__ __forceinline__ Arithmetic<S> blend(const Pack<S, Width> (&tap)[4], const Arithmetic<S> (&w)[4], int i) {
  Arithmetic<S> v = w[0] * element(tap[0], i);
#pragma unroll
  for (int s = 1; s < 4; ++s) v += w[s] * element(tap[s], i);
  return v;
}

// ---- aggregation over the views, a chunk of them at a time, for each channel ----

// Softmax is relative to the largest sample: `scaled`, in units of the exponential's argument, so that e^(x - largest)
// is one multiplication and addition and one exponential. Its rounding is a factor that all views share.
template <class T>
__device__ __forceinline__ T exponential_of(T x, T scaled) {
  return exponential(x * T(exponential_scale<T>) - scaled);
}

__device__ __forceinline__ float larger_of(float a, float b) { return fmaxf(a, b); }  // the other of a NaN
__device__ __forceinline__ double larger_of(double a, double b) { return fmax(a, b); }

// Where no view takes part all of them are further below this than the exponential reaches.
template <class T>
__device__ __forceinline__ T scaled_of(T best) {
  return larger_of(best * T(exponential_scale<T>), lowest<T> * T(0.999));
}

// softmax: the largest sample so far and, relative to it, the sums of exponentials and of exponentials times samples.
// max: the largest sample so far and its view. Others: sums of weights of seeing views, and of weights times samples.
template <class T>
struct Carried {
  T best, total, sum;
};

template <class T>
__device__ __forceinline__ void carry_softmax(Carried<T>& c, const T (&v)[chunk], bool begins) {
  T best = larger_of(larger_of(v[0], v[1]), larger_of(v[2], v[3]));
  if (!begins) best = larger_of(best, c.best);
  const T scaled = scaled_of(best);
  T total = exponential_of(v[0], scaled), sum = total * v[0];
  if (!begins) {
    const T older = exponential_of(c.best, scaled);
    total += c.total * older, sum += c.sum * older;
  }
#pragma unroll
  for (int m = 1; m < chunk; ++m) {
    const T e = exponential_of(v[m], scaled);
    total += e, sum += e * v[m];
  }
  c = {best, total, sum};
}

template <class T>
__device__ __forceinline__ void carry_other(const Problem& p, Carried<T>& c, const T (&v)[chunk], unsigned seen,
                                            int first, const T* weights) {
  if (first == 0) c = {lowest<T>, 0, 0};
  switch (p.aggregation) {
    case Aggregation::max:
#pragma unroll
      for (int m = 0; m < chunk; ++m) {
        const bool larger = v[m] > c.best || first + m == 0;
        c.best = larger ? v[m] : c.best, c.total = larger ? T(first + m) : c.total;
      }
      return;
    case Aggregation::weighted:
#pragma unroll
      for (int m = 0; m < chunk; ++m) {
        if (!(seen >> m & 1)) continue;
        const T w = __ldg(weights + m * p.channels);
        c.total += w, c.sum += w * v[m];
      }
      return;
    default:
#pragma unroll
      for (int m = 0; m < chunk; ++m) c.sum += v[m];
  }
}

// A chunk of views, of which `first` is the first, for every channel of a lane. `softmax` is for the compiler.
template <int Width, class T>
__device__ __forceinline__ void carry(const Problem& p, bool softmax, Carried<T> (&c)[Width],
                                      const T (&v)[chunk][Width], unsigned seen, int first, const T* weights) {
#pragma unroll
  for (int i = 0; i < Width; ++i) {
    const T of[chunk] = {v[0][i], v[1][i], v[2][i], v[3][i]};
    if (softmax) {
      carry_softmax(c[i], of, first == 0);
    } else {
      carry_other(p, c[i], of, seen, first, weights + i);
    }
  }
}

template <class T>
struct Aggregate {
  T scaled, inverse,
      value;  // softmax: scaled largest sample; weighted: factor of the weights; max: inverse is the view
};

__device__ __forceinline__ double reciprocal(double x) { return 1 / x; }
__device__ __forceinline__ float reciprocal(float x) {
#if defined(BKIND3D_EMULATED)
  return 1 / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

// Where no view takes part the sum is 0, and the total.
template <class T>
__device__ __forceinline__ Aggregate<T> aggregate_softmax(const Carried<T>& c) {
  const T inverse = reciprocal(larger_of(c.total, T(1e-30)));
  return {scaled_of(c.best), inverse, c.sum * inverse + T(0)};  // no -0
}

template <class T>
__device__ __forceinline__ Aggregate<T> aggregate_other(const Problem& p, const Carried<T>& c, int count) {
  switch (p.aggregation) {
    case Aggregation::max: return {0, c.total, p.exclude && count == 0 ? T(0) : c.best};
    case Aggregation::weighted: {
      // The reciprocal of a subnormal total would be infinite: such weights and their total are scaled alike.
      const bool tiny = p.exclude && T(-1e-30) < c.total && c.total < T(1e-30);
      const T scale = tiny ? T(18446744073709551616.0) : T(1);
      const T inverse = !p.exclude ? T(1) : c.total != 0 ? 1 / (c.total * scale) : T(0);
      return {scale, inverse, c.sum * scale * inverse};
    }
    case Aggregation::sum: return {0, 1, c.sum};
    default: {
      const T inverse = reciprocal(T(!p.exclude ? p.views : count > 0 ? count : 1));
      return {0, inverse, c.sum * inverse};
    }
  }
}

template <class T>
__device__ __forceinline__ Aggregate<T> aggregate(const Problem& p, bool softmax, const Carried<T>& c, int count) {
  return softmax ? aggregate_softmax(c) : aggregate_other(p, c, count);
}

// dL/dv of a view that sees the voxel.
template <class T>
__device__ __forceinline__ T sample_gradient(const Problem& p, const Aggregate<T>& a, T g, T v, int view,
                                             const T* weight) {
  switch (p.aggregation) {
    case Aggregation::softmax: return softmax_gradient(g, exponential_of(v, a.scaled) * a.inverse, v, a.value);
    case Aggregation::max: return a.inverse == T(view) ? g : T(0);
    case Aggregation::weighted: return g * a.inverse * (__ldg(weight) * a.scaled);
    default: return g * a.inverse;
  }
}

}  // namespace
}  // namespace bkind3d
