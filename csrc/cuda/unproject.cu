// Unprojection in CUDA. For every voxel and view: projection, four taps, the aggregate over the views; and its
// gradient.
//
// A voxel has a group of lanes, 16 bytes of channels each (8 lanes for 32 channels of float, 4 of bfloat16), a warp as
// many voxels along z as fit. It walks over a brick, 8 steps along y and 4 along x, so that neighbours find their taps
// in the first-level cache. One lane projects for a whole group and leaves offsets and weights in shared memory, 32
// voxels and views at once. Views are taken four at a time, unrolled: any number of them with the same code; softmax
// over at most four has a kernel of its own. Backward recomputes all of this, keeps the four taps' gradients of each
// view in registers, each pixel at a place given by the parity of its row and column (what the next voxel shares stays
// where it is), and adds one to the map (16 bytes by one `red` where the architecture has it) when another pixel takes
// its place: that is instead of a tile of the map in shared memory, where additions of float are loops. Deterministic:
// the same twice, first for the largest |dL/dv| of each sample, then in 64-bit fixed point relative to it. dL/dQ: sums
// over a group's lanes by shuffles, then one lane for each voxel and view; it and dL/dw are summed in parts with one
// owner each, and the parts by a last kernel, in a fixed order: no atomics. Saved for backward: the inputs alone.
//
// What bounds it, on paper, at (N, M, C, map, volume) = (8, 4, 32, 64^2, 64^3). Writing the volume: 268 MB in float, 80
// us at 3.35 TB/s (H100), 56 at 4.8 (H200; 62 at 4.3, a measured copy); bfloat16 half. Taps: 4.3 GB from the
// first-level cache, 145 us at 128 bytes a cycle on 132 multiprocessors, bfloat16 half, and beside 16 such reads of a
// lane 8 from shared memory. Exponentials: 75 us at 16 a cycle. Instructions (sm_90, counted in nvcc's code along the
// path that softmax takes): 19.7 a sample of float, of which blending is 10, softmax 5, projection 3; of bfloat16 20.7,
// of which 4 make floats of it; 268 M samples, 28 T a second: 190 and 200 us. So it is bound by issue, the cache close
// behind in float: 3 times the floor. Forward, too, had the taps in registers at places by parity, a quarter of them
// read at each step: with what decided that, and the aggregation chosen in the loop, it took more than 40 a sample.
// Backward: about twice that, 1 GB of `red` instead of 4.3. Occupancy: 16 warps on a multiprocessor forward (128
// registers; in half formats, and with more than four views, 12), 8 backward (255), 16 loads of a lane on their way.
// Not tried: 2 channels a lane backward (12 warps, more instructions); tensor cores for the blend (weights would be
// rounded). Not measured on a GPU yet; every number here is an estimate.
#include "launch.cuh"

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../common/unproject.h"

#if defined(BKIND3D_EMULATED)  // g++ does not see that there is a view, whose samples begin what is carried
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace bkind3d {
namespace {

constexpr int warps = 4, threads = 32 * warps;
constexpr int chunk = 4;  // views whose samples are in registers at once
constexpr int longest_run_x = 4, longest_run_y = 8;
#if defined(BKIND3D_EMULATED)  // small grids reach every path
constexpr int64_t enough_warps = 8, most_partial_bytes = 1 << 16;
#else
constexpr int64_t enough_warps = 8192;            // of a launch; with fewer the runs are cut
constexpr int64_t most_partial_bytes = 64 << 20;  // sums of matrices and weights before they are added up
#endif
constexpr int64_t max_views = 255;  // counts are bytes
constexpr unsigned none = ~0u;

// Blocks at once on a multiprocessor: 128 registers for each thread in float with few views, else 168 forward, 255 in
// double, in half formats without softmax, and backward.
template <class S, bool Softmax, bool Small>
constexpr int forward_blocks = sizeof(S) == 8   ? 2
                               : sizeof(S) == 2 ? (Softmax ? 3 : 2)
                                                : (Small ? 4 : 3);
constexpr int backward_blocks = 2;

// Channels of a lane: 16 bytes of what is read; in the backward pass 16 bytes of what is added.
template <class S>
constexpr int forward_width = 16 / sizeof(S);
template <class S>
constexpr int backward_width = 16 / sizeof(Arithmetic<S>);

enum class Aggregation { softmax, mean, sum, max, weighted };

// What all kernels are given; T is the type of the arithmetic.
struct Problem {
  const char* features;
  int64_t stride_n, stride_m;   // of features, in bytes
  unsigned stride_y, stride_x;  // in a lane's packs of channels, which lie together
  const void* q;                // T (N, M, 12)
  const bool* mask;             // (N, M) or null
  const void* weights;          // T (N, M, C), or null without Aggregation::weighted
  int samples, views, channels, height, width;
  int x, y, z;
  Aggregation aggregation;
  bool exclude;

  // A voxel has a group of lanes, each with a pack of channels, or several one after the other. The groups of a warp
  // lie along z, and y where that is short. A warp walks over a brick: run_y steps of its groups along y, run_x along
  // x.
  int packs, lanes, groups, groups_y, groups_z;
  int run_x, run_y_log;
  unsigned bricks_y, bricks_z, bricks, blocks;  // of a sample
  int items, padded_views;                      // items: projections of a group that are made at once
  Divider by_groups = Divider(1), by_groups_z = Divider(1), by_views = Divider(1);
};

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

// Of a group among those of its warp.
struct Place {
  int y, z;
};

__device__ __forceinline__ Place place_of(const Problem& p, int group) {
  const int y = int(p.by_groups_z.quotient(group));
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

__device__ __forceinline__ Voxel voxel_of(const Problem& p, const Brick& brick, const Place& place, int number) {
  const Step step = step_of(p, number);
  const int x = brick.x + step.x, y = brick.y + place.y + step.y * p.groups_y, z = brick.z + place.z;
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

// The place of the first tap among two: a pixel's place is whether its index is odd. A tap outside has the other one.
template <class T>
__device__ __forceinline__ int first_place(const AxisTaps<T>& taps) {
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

// A voxel's four taps in one view. Offsets are in packs. Where the view does not see the voxel the first is `none`, and
// the first weight what stands for the sample.
template <class T>
struct alignas(16) Taps {
  unsigned offset[4];
  T weight[4];
};

// Placed: each tap at the place 2 (row odd) + (column odd), so that a pixel that the next voxel shares has the same
// place there.
template <bool Placed, class T>
__device__ __forceinline__ Taps<T> taps_of(const Problem& p, const Sight<T>& s) {
  const T floor_x = floor_of(s.u), floor_y = floor_of(s.v);
  const int x = int(floor_x), y = int(floor_y);
  const T right = x + 1 < p.width ? s.u - floor_x : T(0), left = x >= 0 ? 1 - (s.u - floor_x) : T(0);
  const T below = y + 1 < p.height ? s.v - floor_y : T(0), above = y >= 0 ? 1 - (s.v - floor_y) : T(0);
  const unsigned x0 = unsigned(max_of(x, 0)) * p.stride_x, x1 = unsigned(min_of(x + 1, p.width - 1)) * p.stride_x;
  const unsigned y0 = unsigned(max_of(y, 0)) * p.stride_y, y1 = unsigned(min_of(y + 1, p.height - 1)) * p.stride_y;
  Taps<T> t;
  const bool odd_x = Placed && (x & 1), odd_y = Placed && (y & 1);
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
  const int item = int(p.by_groups.quotient(e)), step = int(p.by_views.quotient(item));
  return {e - item * p.groups, step, item - step * p.padded_views};
}

__device__ __forceinline__ bool few_views(const Problem& p) { return p.padded_views <= p.items; }

// What a warp has projected: items from (step, view) on, of which `used` have been asked for.
template <class T>
struct Projected {
  Taps<T>* taps;
  int step, view, used;
};

// `own` is the first item of the lane, and where its group is: the same for the whole walk.
struct Own {
  Item item;
  Place place;
};

__device__ __forceinline__ Own own_of(const Problem& p) {
  const Item item = item_of(p, int(threadIdx.x % 32));
  return {item, place_of(p, item.group)};
}

template <bool Placed, class T>
__device__ __forceinline__ Taps<T> project_item(const Problem& p, const Brick& brick, const Own& at, int step,
                                                int view) {
  const Voxel voxel = voxel_of(p, brick, at.place, step + at.item.step);
  view += at.item.view;
  if (may_see(p, brick.sample, voxel, view)) {
    const Sight<T> sight = sight_of<T>(p, brick.sample, voxel, view);
    if (sight.seen) return taps_of<Placed>(p, sight);
  }
  return {{none}, {unseen_sample<T>(p, view)}};
}

// Single: no lane has more than one item.
template <bool Placed, bool Single, class T>
__device__ __forceinline__ void project_items(const Problem& p, const Brick& brick, const Own& own,
                                              Projected<T>& projected, int step, int view) {
  projected.step = step, projected.view = view, projected.used = 0;
  __syncwarp();
  const int first = int(threadIdx.x % 32), items = p.groups * p.items;
  if (first < items) projected.taps[first] = project_item<Placed, T>(p, brick, own, step, view);
  for (int e = first + 32; !Single && e < items; e += 32) {
    const Item item = item_of(p, e);
    projected.taps[e] = project_item<Placed, T>(p, brick, {item, place_of(p, item.group)}, step, view);
  }
  __syncwarp();
}

// ---- a thread ----

struct Lane {
  int warp, group, member;
  bool idle;
};

__device__ __forceinline__ Lane lane_of(const Problem& p) {
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
  T scaled, inverse, value;  // softmax: scaled largest sample; max: inverse is the view
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
      const T inverse = !p.exclude ? T(1) : c.total != 0 ? 1 / c.total : T(0);
      return {0, inverse, c.sum * inverse};
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
__device__ __forceinline__ T share(const Problem& p, const Aggregate<T>& a, T g, T v, int view, const T* weight) {
  switch (p.aggregation) {
    case Aggregation::softmax: return softmax_gradient(g, exponential_of(v, a.scaled) * a.inverse, v, a.value);
    case Aggregation::max: return a.inverse == T(view) ? g : T(0);
    case Aggregation::weighted: return g * a.inverse * __ldg(weight);
    default: return g * a.inverse;
  }
}

// ---- forward ----

// Samples of one view that sees the voxel, or whatever if it does not.
template <class S, int Width, class T>
__device__ __forceinline__ void sample_view(const char* map, const Taps<T>& t, bool sees, T (&v)[Width]) {
  using P = Pack<S, Width>;
  P tap[4];
#pragma unroll
  for (int s = 0; s < 4; ++s) tap[s] = load_map(reinterpret_cast<const P*>(map) + t.offset[s], sees);
#pragma unroll
  for (int i = 0; i < Width; ++i) v[i] = blend(tap, t.weight, i);
}

// Those of a chunk of views, all read before the first is needed. Of `maps`, with Small, there is one for each view,
// else that of view 0 alone. Which views see the voxel, as bits.
template <class S, int Width, bool Small, class T>
__device__ __forceinline__ unsigned sample_views(const Problem& p, const char* const* maps, int first,
                                                 const Taps<T>* taps, T (&v)[chunk][Width]) {
  unsigned seen = 0;
#pragma unroll
  for (int m = 0; m < chunk; ++m) {
    const Taps<T> t = taps[m * p.groups];
    const bool sees = t.offset[0] != none;
    sample_view<S>(Small ? maps[m] : maps[0] + (first + m) * p.stride_m, t, sees, v[m]);
#pragma unroll
    for (int i = 0; i < Width; ++i) v[m][i] = sees ? v[m][i] : t.weight[0];
    seen |= unsigned(sees) << m;
  }
  return seen;
}

// A value that is kept, and not made again from what it was made of.
template <class V>
__device__ __forceinline__ V kept(V v) {
#if !defined(BKIND3D_EMULATED)
  if constexpr (sizeof(V) == 8)
    asm("" : "+l"(v));
  else
    asm("" : "+r"(v));
#endif
  return v;
}

// Softmax: the aggregation, known to the compiler. Small: at most `chunk` views, and no lane has two items.
template <class S, int Width, bool Softmax, bool Small>
__global__ void __launch_bounds__(threads, forward_blocks<S, Softmax, Small>)
    forward_kernel(Problem p, S* volume, unsigned char* counts) {
  using T = Arithmetic<S>;
  const Lane lane = lane_of(p);
  const Own own = own_of(p);
  const Place place = place_of(p, lane.group);
  const int sample = int(blockIdx.x / p.blocks), steps = p.run_x << p.run_y_log;
  const unsigned index = (blockIdx.x - sample * p.blocks) * warps + lane.warp;
  if (index >= p.bricks) return;
  const Brick brick = brick_of(p, sample, index);
  const Voxel start = {brick.x, brick.y + place.y, brick.z + place.z, true};
  const unsigned pixel = unsigned(p.channels) * unsigned(sizeof(S)), at_start = kept(index_of(p, start));
  counts += sample * voxels_of(p);
  Projected<T> projected = {dynamic_shared<Taps<T>>() + lane.warp * p.groups * p.items, 0, 0, p.items};
  for (int base = 0; base < p.packs; base += p.lanes) {
    const int channel = kept((base + lane.member) * Width);
    const int end_y = kept(lane.idle || channel >= p.channels || start.z >= p.z ? 0 : p.y);
    const char* maps[Small ? chunk : 1];
#pragma unroll
    for (int m = 0; m < (Small ? chunk : 1); ++m) maps[m] = kept(map_of(p, sample, m) + channel * sizeof(S));
    const T* weights = static_cast<const T*>(p.weights) + int64_t(sample) * p.views * p.channels + channel;
    char* const to = kept(reinterpret_cast<char*>(volume + sample * voxels_of(p) * p.channels + channel));
    projected.used = p.items;
    for (int number = 0; number < steps; ++number) {
      const Step step = step_of(p, number);
      const bool absent = start.x + step.x >= p.x || start.y + step.y * p.groups_y >= end_y;
      Carried<T> carried[Width];
      int count = 0;
      if (!Small && !few_views(p)) projected.used = p.items;
      for (int first = 0; first < (Small ? 1 : p.views); first += chunk, projected.used += chunk) {
        if (projected.used == p.items) project_items<false, Small>(p, brick, own, projected, number, first);
        if (absent) continue;
        const Taps<T>* taps = projected.taps + projected.used * p.groups + lane.group;
        T v[chunk][Width];
        const unsigned seen = sample_views<S, Width, Small>(p, maps, first, taps, v);
        carry(p, Softmax, carried, v, seen, first, weights + int64_t(first) * p.channels);
        count += __popc(seen);
      }
      if (absent) continue;
      Pack<S, Width> out;
#pragma unroll
      for (int i = 0; i < Width; ++i) out.values[i] = narrow<S>(aggregate(p, Softmax, carried[i], count).value);
      const unsigned at = at_start + unsigned(step.x * p.y + step.y * p.groups_y) * unsigned(p.z);
      store_once(reinterpret_cast<Pack<S, Width>*>(to + uint64_t(at) * pixel), out);
      if (channel == 0) store_once(counts + at, static_cast<unsigned char>(count));
    }
  }
}

// ---- backward ----

// What becomes of dL/dv: added to the maps in floating point; the largest magnitude in a sample is found; or added in
// fixed point relative to that, which no order of the additions changes.
enum class Scatter { none, floating, largest, fixed };

struct Gradients {
  const void* volume;  // S (N, X, Y, Z, C)
  Scatter scatter;
  void* maps;         // (N, M, H, W, C): T, or 64-bit integers
  unsigned* largest;  // (N): bits of a float
  void* q;            // T (N, rows, padded views, 12), rows for every block, warp and group; null where not wanted
  void* weights;      // T (N, rows, M, C); null where not wanted
  int q_rows;         // of a group: 1, or as many as steps are projected at once
};

// 2^62 / voxels in units of the largest magnitude, as a power of two: no sum can pass 63 bits.
__device__ __forceinline__ double fixed_scale(const Problem& p, unsigned largest) {
  const double voxels = double(p.x) * p.y * p.z;
  return ldexp(1.0, 61 - ilogb(voxels > 1 ? voxels : 1) - (int(largest >> 23) - 126));
}

// One vector reduction where the architecture has it and the pack is one.
template <class T, int Width>
__device__ __forceinline__ void add_to(T* p, const T (&v)[Width]) {
#if !defined(BKIND3D_EMULATED) && __CUDA_ARCH__ >= 900
  if constexpr (sizeof(T) == 4 && Width == 4) {
    asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "f"(v[0]),
                 "f"(v[1]), "f"(v[2]), "f"(v[3])
                 : "memory");
  } else
#endif
  {
#pragma unroll
    for (int i = 0; i < Width; ++i) atomicAdd(p + i, v[i]);
  }
}

// Sums for the taps of a chunk of views, at the places of their pixels; each is added to its map when another pixel
// takes its place.
template <class T, int Width>
struct Sums {
  T of[chunk][4][Width];
  unsigned pixel[chunk][4];  // offsets as in Taps

  __device__ __forceinline__ void forget() {
#pragma unroll
    for (int i = 0; i < 4 * chunk; ++i) pixel[i / 4][i % 4] = none;
  }
};

// Where the sums of a lane go: the map of view 0, in elements, and the first of its channels.
struct Target {
  int64_t maps, map_size;
  unsigned channel;
  double scale;
};

template <class S, int Width>
__device__ __forceinline__ void add_sum(const Gradients& out, const Target& to, int view, unsigned pixel,
                                        const Arithmetic<S> (&sum)[Width]) {
  using T = Arithmetic<S>;
  const int64_t map = to.maps + view * to.map_size;
  const unsigned at = pixel * Width + to.channel;
  if (out.scatter == Scatter::floating) {
    add_to(static_cast<T*>(out.maps) + map + at, sum);
  } else {
    auto* p = static_cast<unsigned long long*>(out.maps) + map + at;
#pragma unroll
    for (int i = 0; i < Width; ++i)
      atomicAdd(p + i, static_cast<unsigned long long>(static_cast<long long>(rint(double(sum[i]) * to.scale))));
  }
}

template <class S, int Width>
__device__ __forceinline__ void flush(const Gradients& out, const Target& to, int m, int view,
                                      Sums<Arithmetic<S>, Width>& sums) {
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    if (sums.pixel[m][s] != none) add_sum<S>(out, to, view, sums.pixel[m][s], sums.of[m][s]);
    sums.pixel[m][s] = none;
  }
}

template <class S, int Width>
__device__ __forceinline__ void add_taps(const Gradients& out, const Target& to, int m, int view,
                                         const Taps<Arithmetic<S>>& t, const Arithmetic<S> (&g)[Width],
                                         Sums<Arithmetic<S>, Width>& sums) {
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    const unsigned pixel = t.offset[s];
    if (pixel != sums.pixel[m][s]) {
      if (sums.pixel[m][s] != none) add_sum<S>(out, to, view, sums.pixel[m][s], sums.of[m][s]);
      sums.pixel[m][s] = pixel;
#pragma unroll
      for (int i = 0; i < Width; ++i) sums.of[m][s][i] = 0;
    }
#pragma unroll
    for (int i = 0; i < Width; ++i) sums.of[m][s][i] += t.weight[s] * g[i];
  }
}

// ---- dL/dQ ----

// Sums over channels of gradient times tap, of every item that is projected: from all lanes of a voxel.
template <class T>
struct alignas(16) TapSums {
  T of[4];
};

template <class T>
__device__ __forceinline__ T sum_of_group(const Problem& p, const Lane& lane, T value) {
  for (int step = 16; step > 0; step >>= 1) {
    const T other = __shfl_down_sync(~0u, value, step);
    if (lane.member + step < p.lanes) value += other;
  }
  return value;
}

// Whether a lane has one item of those that are projected at once, and always the same view.
__device__ __forceinline__ bool one_view(const Problem& p) { return few_views(p) && p.groups * p.items <= 32; }

// What a warp knows of dL/dQ. With `one_view` a lane's part of it is in shared memory, its elements 32 apart.
template <class T>
struct Matrices {
  TapSums<T>* sums;
  T* part;
  int64_t row;  // in Gradients::q, of group 0
};

// A lane's part in memory.
template <class T>
__device__ __forceinline__ T* part_of(const Problem& p, const Gradients& out, const Item& item, int64_t row) {
  row = (row + item.group) * out.q_rows + (few_views(p) ? item.step : 0);
  return static_cast<T*>(out.q) + (row * p.padded_views + item.view) * 12;
}

template <class T>
__device__ __forceinline__ Homogeneous<T> gradient_of(const Sight<T>& sight, const TapSums<T>& sums) {
  const bool odd_x = first_place(sight.x), odd_y = first_place(sight.y);
  auto at = [&](bool row, bool column) {
    const T even = column ? sums.of[1] : sums.of[0], odd = column ? sums.of[3] : sums.of[2];
    return row ? odd : even;
  };
  const PixelGradient<T> pixel =
      pixel_gradient(sight.x, sight.y, at(odd_y, odd_x), at(odd_y, !odd_x), at(!odd_y, odd_x), at(!odd_y, !odd_x));
  return homogeneous_gradient(pixel, sight.u, sight.v, sight.depth);
}

// Adds what the sums of all items give, each by the lane that has projected it; clears the sums.
template <class T>
__device__ __forceinline__ void settle(const Problem& p, const Gradients& out, const Brick& brick,
                                       const Projected<T>& projected, const Matrices<T>& matrices) {
  __syncwarp();
  for (int e = int(threadIdx.x % 32); e < p.groups * p.items; e += 32) {
    const TapSums<T> sums = matrices.sums[e];
    matrices.sums[e] = {};
    Item item = item_of(p, e);
    item.view += projected.view;
    const Voxel voxel = voxel_of(p, brick, place_of(p, item.group), projected.step + item.step);
    if (!may_see(p, brick.sample, voxel, item.view)) continue;
    const Sight<T> sight = sight_of<T>(p, brick.sample, voxel, item.view);
    if (!sight.seen) continue;
    const Homogeneous<T> g = gradient_of(sight, sums);
    const T rows[3] = {g.x, g.y, g.depth}, index[4] = {T(voxel.x), T(voxel.y), T(voxel.z), T(1)};
    T* to = one_view(p) ? matrices.part : part_of<T>(p, out, item, matrices.row);
    const int stride = one_view(p) ? 32 : 1;
#pragma unroll
    for (int i = 0; i < 12; ++i) to[i * stride] += rows[i / 4] * index[i % 4];
  }
  __syncwarp();
}

// ---- the backward kernel ----

// A lane at work on a pack of channels of a brick.
template <class S, int Width>
struct Worker {
  using T = Arithmetic<S>;
  using Samples = T[chunk][Width];  // or their gradients
  const Problem& p;
  const Gradients& out;
  const Lane lane;
  const Brick brick;
  const Own own;
  const Place place;
  const int channel;
  const T* weights;  // of view 0 and the channel
  Sums<T, Width> sums;
  unsigned seen;

  __device__ __forceinline__ bool idle() const { return lane.idle || channel >= p.channels; }

  __device__ __forceinline__ void sample(int first, const Taps<T>* taps, Samples& v) {
    seen = 0;
#pragma unroll
    for (int m = 0; m < chunk; ++m) {
      const Taps<T>& t = taps[m * p.groups];
#pragma unroll
      for (int i = 0; i < Width; ++i) v[m][i] = t.weight[0];
      if (t.offset[0] == none) continue;
      sample_view<S>(map_of(p, brick.sample, first + m) + channel * sizeof(S), t, true, v[m]);
      seen |= 1u << m;
    }
  }

  __device__ __forceinline__ Pack<S, Width> gradient_at(const Voxel& voxel) const {
    const int64_t at = brick.sample * voxels_of(p) + index_of(p, voxel);
    const S* from = static_cast<const S*>(out.volume) + at * p.channels + channel;
    return load_once(reinterpret_cast<const Pack<S, Width>*>(from));
  }

  // From samples to their gradients, and dL/dw where it is wanted.
  __device__ __forceinline__ void share_out(int first, const Pack<S, Width>& g, const Aggregate<T> (&a)[Width],
                                            int64_t row, Samples& v) const {
#pragma unroll
    for (int m = 0; m < chunk; ++m) {
      if (!(seen >> m & 1)) continue;
      const int64_t at = int64_t(first + m) * p.channels;
      if (out.weights) {
        T* to = static_cast<T*>(out.weights) + row * p.views * p.channels + at + channel;
#pragma unroll
        for (int i = 0; i < Width; ++i)
          to[i] += widen(g.values[i]) * a[i].inverse * (v[m][i] - (p.exclude ? a[i].value : T(0)));
      }
#pragma unroll
      for (int i = 0; i < Width; ++i)
        v[m][i] = share(p, a[i], widen(g.values[i]), v[m][i], first + m, weights + at + i);
    }
  }

  __device__ __forceinline__ unsigned largest(unsigned so_far, const Samples& v) const {
#pragma unroll
    for (int i = 0; i < chunk * Width; ++i) {
      const unsigned bits = __float_as_uint(float(v[i / Width][i % Width])) & 0x7fffffffu;
      if ((seen >> i / Width & 1) && bits > so_far) so_far = bits;
    }
    return so_far;
  }

  __device__ __forceinline__ void scatter(int first, const Taps<T>* taps, const Target& target, const Samples& v) {
#pragma unroll
    for (int m = 0; m < chunk; ++m) {
      if (!(seen >> m & 1)) continue;
      add_taps<S>(out, target, m, first + m, taps[m * p.groups], v[m], sums);
      if (p.views > chunk) flush<S>(out, target, m, first + m, sums);
    }
  }

  // All lanes of the warp come.
  __device__ __forceinline__ void sum_taps(int first, const Taps<T>* taps, const Samples& v, TapSums<T>* to) const {
#pragma unroll
    for (int m = 0; m < chunk; ++m) {
      if (first + m >= p.views) continue;
      const Taps<T>& t = taps[m * p.groups];
      const char* map = map_of(p, brick.sample, first + m) + channel * sizeof(S);
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        T sum = 0;
        if (seen >> m & 1) {
          const auto tap = load_map(reinterpret_cast<const Pack<S, Width>*>(map) + t.offset[s], true);
#pragma unroll
          for (int i = 0; i < Width; ++i) sum += v[m][i] * element(tap, i);
        }
        sum = sum_of_group(p, lane, sum);
        if (lane.member == 0 && !lane.idle) to[m * p.groups].of[s] = sum;
      }
    }
  }
};

// One pack of channels of a brick; returns the largest magnitude of dL/dv where that is what is wanted.
template <class S, int Width>
__device__ __forceinline__ unsigned backward_brick(Worker<S, Width>& w, const Target& target,
                                                   const Matrices<Arithmetic<S>>& matrices,
                                                   Projected<Arithmetic<S>>& projected, unsigned largest) {
  using T = Arithmetic<S>;
  const Problem& p = w.p;
  const Gradients& out = w.out;
  const bool softmax = p.aggregation == Aggregation::softmax;
  const int steps = p.run_x << p.run_y_log;
  projected.used = p.items;
  for (int step = 0; step < steps; ++step) {
    const Voxel voxel = voxel_of(p, w.brick, w.place, step);
    const bool absent = w.idle() || !voxel.inside;
    Carried<T> carried[Width] = {};
    T v[chunk][Width] = {};
    Pack<S, Width> g = {};
    if (!absent) g = w.gradient_at(voxel);
    int count = 0;
    w.seen = 0;
    if (!few_views(p)) projected.used = p.items;
    for (int first = 0; first < p.views; first += chunk, projected.used += chunk) {
      if (projected.used == p.items) project_items<true, false>(p, w.brick, w.own, projected, step, first);
      if (absent) continue;
      w.sample(first, projected.taps + projected.used * p.groups + w.lane.group, v);
      carry(p, softmax, carried, v, w.seen, first, w.weights + int64_t(first) * p.channels);
      count += __popc(w.seen);
    }
    Aggregate<T> aggregated[Width] = {};
    if (!absent) {
#pragma unroll
      for (int i = 0; i < Width; ++i) aggregated[i] = aggregate(p, softmax, carried[i], count);
    }
    projected.used = few_views(p) ? projected.used - p.padded_views : p.items;
    for (int first = 0; first < p.views; first += chunk, projected.used += chunk) {
      if (projected.used == p.items) project_items<true, false>(p, w.brick, w.own, projected, step, first);
      const int place = projected.used * p.groups + w.lane.group;
      const Taps<T>* taps = projected.taps + place;
      if (!absent) {
        if (p.views > chunk) w.sample(first, taps, v);
        w.share_out(first, g, aggregated, matrices.row + w.lane.group, v);
        if (out.scatter == Scatter::largest) largest = w.largest(largest, v);
        if (out.scatter >= Scatter::floating) w.scatter(first, taps, target, v);
      }
      if (!out.q) continue;
      w.sum_taps(first, taps, v, matrices.sums + place);
      const bool last = first + chunk >= p.views && (step + 1 == steps || !few_views(p));
      if (last || projected.used + chunk == p.items) settle(p, out, w.brick, projected, matrices);
    }
  }
  if (out.scatter >= Scatter::floating) {
#pragma unroll
    for (int m = 0; m < chunk; ++m) flush<S>(out, target, m, m, w.sums);
  }
  return largest;
}

// Blocks of a sample take its bricks in turn.
template <class S, int Width>
__global__ void __launch_bounds__(threads, backward_blocks) backward_kernel(Problem p, Gradients out) {
  using T = Arithmetic<S>;
  const Lane lane = lane_of(p);
  const Own own = own_of(p);
  const Place place = place_of(p, lane.group);
  const int sample = int(blockIdx.x / p.blocks), number = int(threadIdx.x) % 32, items = p.groups * p.items;
  const unsigned block = blockIdx.x - sample * p.blocks;
  auto* taps = dynamic_shared<Taps<T>>();
  auto* sums = reinterpret_cast<TapSums<T>*>(taps + warps * items);
  T* parts = reinterpret_cast<T*>(sums + warps * items);
  Projected<T> projected = {taps + lane.warp * items, 0, 0, p.items};
  const Matrices<T> matrices = {sums + lane.warp * items, parts + lane.warp * 12 * 32 + number,
                                (int64_t(blockIdx.x) * warps + lane.warp) * p.groups};
  if (out.q) {
    for (int e = number; e < items; e += 32) matrices.sums[e] = {};
    for (int i = 0; i < 12 && one_view(p); ++i) matrices.part[32 * i] = 0;
  }
  Target target;
  target.map_size = int64_t(p.height) * p.width * p.channels;
  target.maps = sample * p.views * target.map_size;
  target.scale = out.scatter == Scatter::fixed ? fixed_scale(p, out.largest[sample]) : 0;
  unsigned largest = 0;
  for (unsigned index = block * warps + lane.warp; index < p.bricks; index += p.blocks * warps) {
    const Brick brick = brick_of(p, sample, index);
    for (int base = 0; base < p.packs; base += p.lanes) {
      const int channel = (base + lane.member) * Width;
      const T* weights = static_cast<const T*>(p.weights) + int64_t(sample) * p.views * p.channels + channel;
      Worker<S, Width> worker = {p, out, lane, brick, own, place, channel, weights, {}, 0};
      worker.sums.forget();
      target.channel = unsigned(channel);
      largest = backward_brick(worker, target, matrices, projected, largest);
    }
  }
  if (out.scatter == Scatter::largest) {
    largest = __reduce_max_sync(~0u, largest);
    if (number == 0) atomicMax(out.largest + sample, largest);
  }
  if (out.q && one_view(p) && number < items) {
    T* to = part_of<T>(p, out, own.item, matrices.row);
    for (int i = 0; i < 12; ++i) to[i] = matrices.part[32 * i];
  }
}

// ---- after the backward kernel ----

constexpr int sum_columns = 32, sum_threads = 256;

// Sums over the rows of (N, rows, columns), of the first `wanted` columns, in an order that never changes.
template <class T>
__global__ void __launch_bounds__(sum_threads)
    sum_rows_kernel(const T* from, int64_t rows, int columns, int wanted, T* to) {
  struct Partial {
    double of[sum_threads];
  };
  Partial& partial = shared<Partial>();
  const int blocks = (wanted + sum_columns - 1) / sum_columns;
  const int64_t sample = blockIdx.x / blocks;
  const int column = int(blockIdx.x - sample * blocks) * sum_columns + int(threadIdx.x) % sum_columns;
  double sum = 0;
  if (column < wanted)
    for (int64_t row = threadIdx.x / sum_columns; row < rows; row += sum_threads / sum_columns)
      sum += from[(sample * rows + row) * columns + column];
  partial.of[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= sum_columns || column >= wanted) return;
  for (int i = 1; i < sum_threads / sum_columns; ++i) sum += partial.of[threadIdx.x + i * sum_columns];
  to[sample * wanted + column] = T(sum);
}

// From fixed point to the dtype of the features. A gradient that is not finite makes all of its sample NaN.
template <class S>
__global__ void __launch_bounds__(sum_threads)
    from_fixed_kernel(Problem p, const long long* from, const unsigned* largest, int64_t count, S* to) {
  const int64_t i = int64_t(blockIdx.x) * sum_threads + threadIdx.x;
  if (i >= count) return;
  const unsigned bits = largest[i / (count / p.samples)];
  const double value = double(from[i]) / fixed_scale(p, bits);
  to[i] = narrow<S>(Arithmetic<S>(bits < 0x7f800000u ? value : __builtin_nan("")));
}

// ---- host ----

Aggregation parse_aggregation(const std::string& name) {
  constexpr const char* names[] = {"softmax", "mean", "sum", "max", "weighted"};
  for (int i = 0; i < 5; ++i)
    if (name == names[i]) return static_cast<Aggregation>(i);
  STD_TORCH_CHECK(false, "aggregation '", name, "': expected softmax, mean, sum, max or weighted");
}

bool parse_exclude(const std::string& name) {
  STD_TORCH_CHECK(name == "zero" || name == "exclude", "unseen '", name, "': expected zero or exclude");
  return name == "exclude";
}

// f(S{}) for the storage type of the features.
template <class F>
auto by_type(ScalarType type, F f) {
  switch (type) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(bfloat16{});
    case ScalarType::Half: return f(float16{});
    default: STD_TORCH_CHECK(false, "features: expected float32, float64, bfloat16 or float16");
  }
}

ScalarType arithmetic_of(ScalarType type) { return type == ScalarType::Double ? type : ScalarType::Float; }
int64_t bytes_of(ScalarType type) { return type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2; }

// Dimension `from` moved to the end.
Tensor moved_last(Tensor t, int64_t from) {
  for (; from + 1 < t.dim(); ++from) t = torch::stable::transpose(t, from, from + 1);
  return t;
}

// Everything that forward and backward share, and the tensors that the pointers need alive.
struct Call {
  Problem p{};
  Tensor features, q;
  std::optional<Tensor> mask, weights;
  ScalarType type, arithmetic;
};

// Whether packs of `bytes` can be read as they are: channels together, every pixel aligned.
bool in_packs(const Tensor& last, int64_t bytes, int64_t size) {
  if (reinterpret_cast<uintptr_t>(last.const_data_ptr()) % bytes) return false;
  for (int64_t i = 0; i + 1 < last.dim(); ++i)
    if (last.size(i) > 1 && last.stride(i) * size % bytes) return false;
  return true;
}

bool channels_together(const Tensor& last) {
  return last.stride(last.dim() - 1) == 1 || last.size(last.dim() - 1) == 1;
}

// How the lanes of a warp share voxels and channels, and the warps the volume.
void divide(Problem& p, int width) {
  p.packs = p.channels / width;
  p.stride_y /= width, p.stride_x /= width;
  int passes = 0;
  do {  // until three quarters of the lanes have work
    p.lanes = (p.packs + passes) / (passes + 1);
    ++passes;
  } while (p.lanes > 32 || 4 * p.packs * int64_t(32 / p.lanes) < 96 * int64_t(passes));
  const int groups = 32 / p.lanes;
  p.groups_z = std::max(1, std::min(groups, p.z));
  p.groups_y = groups / p.groups_z;
  p.groups = p.groups_z * p.groups_y;
  p.padded_views = int(ceil_divide(p.views, chunk)) * chunk;
  const int room = std::max(chunk, 32 / p.groups / chunk * chunk);
  p.items = p.padded_views <= room ? room / p.padded_views * p.padded_views : room;
  p.by_groups = Divider(p.groups), p.by_groups_z = Divider(p.groups_z), p.by_views = Divider(p.padded_views);

  int run_y = longest_run_y;
  p.run_x = longest_run_x;
  auto cut = [&] {
    p.bricks_z = unsigned(ceil_divide(p.z, p.groups_z)), p.bricks_y = unsigned(ceil_divide(p.y, p.groups_y * run_y));
    return p.bricks_z * int64_t(p.bricks_y) * ceil_divide(p.x, p.run_x);
  };
  while (run_y > 1 && p.groups_y * (run_y / 2) >= p.y) run_y /= 2;
  while (p.run_x > 1 && p.run_x / 2 >= p.x) p.run_x /= 2;
  while (p.run_x > 1 && cut() * p.samples < enough_warps) p.run_x /= 2;
  while (run_y > 1 && cut() * p.samples < enough_warps) run_y /= 2;
  const int64_t bricks = cut();
  STD_TORCH_CHECK(bricks * p.samples < (int64_t(1) << 31), "shape: too many voxels");
  p.bricks = unsigned(bricks), p.blocks = unsigned(ceil_divide(bricks, warps));
  for (p.run_y_log = 0; 1 << p.run_y_log < run_y;) ++p.run_y_log;
}

Call prepare(const Tensor& features, const Tensor& q, const std::optional<Tensor>& view_mask,
             const std::optional<Tensor>& view_weights, const std::vector<int64_t>& shape,
             const std::string& aggregation, const std::string& unseen, bool dense) {
  STD_TORCH_CHECK(features.dim() == 5, "features: expected (N, M, C, H, W)");
  STD_TORCH_CHECK(shape.size() == 3, "shape: expected three integers");
  Call call;
  Problem& p = call.p;
  const int64_t n = features.size(0), m = features.size(1), c = features.size(2);
  const int64_t h = features.size(3), w = features.size(4), limit = int64_t(1) << 24;  // exact in float
  STD_TORCH_CHECK(1 <= m && m <= max_views && c > 0 && h > 0 && w > 0,
                  "features: expected 1 to 255 views and no empty dimension but N");
  call.type = features.scalar_type();
  call.arithmetic = arithmetic_of(call.type);
  const int64_t size = bytes_of(call.type);
  STD_TORCH_CHECK(n < limit && c < limit && h < limit && w < limit, "features: expected dimensions below 2^24");
  for (int64_t length : shape) STD_TORCH_CHECK(0 <= length && length < limit, "shape: expected lengths below 2^24");
  STD_TORCH_CHECK(shape[0] * shape[1] < (int64_t(1) << 31) && shape[0] * shape[1] * shape[2] < (int64_t(1) << 31),
                  "shape: too many voxels");
  p.samples = int(n), p.views = int(m), p.channels = int(c), p.height = int(h), p.width = int(w);
  p.x = int(shape[0]), p.y = int(shape[1]), p.z = int(shape[2]);
  p.aggregation = parse_aggregation(aggregation);
  p.exclude = parse_exclude(unseen);

  const Tensor maps = moved_last(features, 2);
  const bool packed = c * size % 16 == 0;
  const bool as_they_are = channels_together(maps) && (!packed || in_packs(maps, 16, size)) &&
                           (!dense || (maps.stride(3) == c && maps.stride(2) == w * c));
  call.features = as_they_are ? maps : torch::stable::contiguous(maps);
  const Tensor& f = call.features;
  const int64_t last_byte = ((h - 1) * f.stride(2) + (w - 1) * f.stride(3) + c) * size;
  STD_TORCH_CHECK(last_byte < none, "features: one map of (C, H, W) is too large for 32-bit offsets");
  p.features = static_cast<const char*>(f.const_data_ptr());
  p.stride_n = f.stride(0) * size, p.stride_m = f.stride(1) * size;
  p.stride_y = unsigned(f.stride(2)), p.stride_x = unsigned(f.stride(3));
  STD_TORCH_CHECK(q.dim() == 4 && q.size(0) == n && q.size(1) == m && q.size(2) == 3 && q.size(3) == 4,
                  "q: expected (N, M, 3, 4)");
  call.q = plain("q", q, call.arithmetic, n * m * 12, features);
  if (reinterpret_cast<uintptr_t>(call.q.const_data_ptr()) % 16) call.q = torch::stable::clone(call.q);
  p.q = call.q.const_data_ptr();
  if (view_mask) {
    STD_TORCH_CHECK(view_mask->scalar_type() == ScalarType::Bool, "view_mask: expected (N, M) bool");
    call.mask = plain("view_mask", *view_mask, ScalarType::Bool, n * m, features);
    p.mask = static_cast<const bool*>(call.mask->const_data_ptr());
  }
  STD_TORCH_CHECK(view_weights.has_value() == (p.aggregation == Aggregation::weighted),
                  "view_weights: expected with aggregation 'weighted' and with no other");
  if (view_weights) {
    call.weights = plain("view_weights", *view_weights, call.arithmetic, n * m * c, features);
    p.weights = call.weights->const_data_ptr();
  }
  return call;
}

template <class S, int Width>
void run_forward(Problem p, const Tensor& volume, const Tensor& counts) {
  divide(p, Width);
  const bool softmax = p.aggregation == Aggregation::softmax, small = p.views <= chunk && p.groups * p.items <= 32;
  const auto kernel = !softmax ? forward_kernel<S, Width, false, false>
                      : small  ? forward_kernel<S, Width, true, true>
                               : forward_kernel<S, Width, true, false>;
  const OnDevice device(volume);
  device.launch(
      kernel,
      {int64_t(p.samples) * p.blocks, 1, 1, threads, int64_t(warps * p.groups * p.items * sizeof(Taps<Arithmetic<S>>))},
      p, static_cast<S*>(volume.mutable_data_ptr()), static_cast<unsigned char*>(counts.mutable_data_ptr()));
}

std::tuple<Tensor, Tensor> unproject(Tensor features, Tensor q, std::optional<Tensor> view_mask,
                                     std::optional<Tensor> view_weights, std::vector<int64_t> shape,
                                     std::string aggregation, std::string unseen) {
  const Call call = prepare(features, q, view_mask, view_weights, shape, aggregation, unseen, false);
  const int64_t n = features.size(0), c = features.size(2);
  Tensor volume = torch::stable::empty({n, c, shape[0], shape[1], shape[2]}, call.type, std::nullopt, features.device(),
                                       std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast3d);
  Tensor counts = torch::stable::new_empty(features, {n, shape[0], shape[1], shape[2]}, ScalarType::Byte);
  by_type(call.type, [&](auto storage) {
    using S = decltype(storage);
    constexpr int width = forward_width<S>;
    c % width == 0 ? run_forward<S, width>(call.p, volume, counts) : run_forward<S, 1>(call.p, volume, counts);
  });
  return {volume, counts};
}

// What the backward kernel adds up in parts, one for each group of lanes of each block.
struct Partial {
  Tensor sums;
  int64_t rows, columns;
};

Partial partial_sums(const Call& call, int64_t rows, int64_t columns) {
  return {torch::stable::new_zeros(call.q, {call.p.samples, rows, columns}, call.arithmetic), rows, columns};
}

template <class T>
void add_up(const OnDevice& device, const Partial& partial, const Tensor& to) {
  const int64_t n = partial.sums.size(0), wanted = n ? to.numel() / n : 0;
  device.launch(sum_rows_kernel<T>, {n * ceil_divide(wanted, sum_columns), 1, 1, sum_threads, 0},
                static_cast<const T*>(partial.sums.const_data_ptr()), partial.rows, int(partial.columns), int(wanted),
                static_cast<T*>(to.mutable_data_ptr()));
}

// Gradients as they are asked for, empty where not. The maps' have the channels last.
struct Results {
  Tensor maps, q, weights;
};

template <class S, int Width>
void run_backward(const Call& call, const Tensor& grad_volume, bool deterministic, Results& results) {
  using T = Arithmetic<S>;
  Problem p = call.p;
  divide(p, Width);
  const bool wants_maps = results.maps.numel() > 0, wants_q = results.q.numel() > 0;
  const bool wants_weights = results.weights.numel() > 0;
  Gradients out{};
  out.volume = grad_volume.const_data_ptr();
  out.q_rows = std::max(1, p.items / p.padded_views);
  const int64_t group_columns =
      (wants_q ? out.q_rows * p.padded_views * 12 : 0) + (wants_weights ? int64_t(p.views) * p.channels : 0);
  if (group_columns && p.blocks) {
    const int64_t most = most_partial_bytes / (group_columns * int64_t(sizeof(T)) * warps * p.groups * p.samples);
    p.blocks = unsigned(std::clamp<int64_t>(most, 1, p.blocks));
  }
  const int64_t rows = int64_t(p.blocks) * warps * p.groups;
  std::optional<Partial> q, weights;
  if (wants_q) {
    q = partial_sums(call, rows * out.q_rows, p.padded_views * 12);
    out.q = q->sums.mutable_data_ptr();
  }
  if (wants_weights) {
    weights = partial_sums(call, rows, int64_t(p.views) * p.channels);
    out.weights = weights->sums.mutable_data_ptr();
  }
  const OnDevice device(grad_volume);
  const Launch launch = {int64_t(p.samples) * p.blocks, 1, 1, threads,
                         int64_t(warps * (p.groups * p.items * (sizeof(Taps<T>) + sizeof(TapSums<T>)) +
                                          (p.groups * p.items <= 32 ? 12 * 32 * sizeof(T) : 0)))};
  if (wants_maps && deterministic) {
    const std::vector<int64_t> size(results.maps.sizes().begin(), results.maps.sizes().end());
    const Tensor fixed = torch::stable::new_zeros(results.maps, size, ScalarType::Long);
    const Tensor largest = torch::stable::new_zeros(results.maps, {p.samples}, ScalarType::Int);
    out.maps = fixed.mutable_data_ptr();
    out.largest = static_cast<unsigned*>(largest.mutable_data_ptr());
    Gradients first = out;
    first.scatter = Scatter::largest, first.q = first.weights = nullptr;
    device.launch(backward_kernel<S, Width>, launch, p, first);
    out.scatter = Scatter::fixed;
    device.launch(backward_kernel<S, Width>, launch, p, out);
    const int64_t count = fixed.numel();
    device.launch(from_fixed_kernel<S>, {ceil_divide(count, sum_threads), 1, 1, sum_threads, 0}, p,
                  static_cast<const long long*>(fixed.const_data_ptr()), out.largest, count,
                  static_cast<S*>(results.maps.mutable_data_ptr()));
  } else {
    Tensor sums = results.maps;
    if (wants_maps) {
      const std::vector<int64_t> size(results.maps.sizes().begin(), results.maps.sizes().end());
      sums = torch::stable::new_zeros(results.maps, size, call.arithmetic);
      out.maps = sums.mutable_data_ptr();
      out.scatter = Scatter::floating;
    }
    device.launch(backward_kernel<S, Width>, launch, p, out);
    if (wants_maps) results.maps = call.type == call.arithmetic ? sums : torch::stable::to(sums, call.type);
  }
  if (q) add_up<T>(device, *q, results.q);
  if (weights) add_up<T>(device, *weights, results.weights);
}

std::tuple<Tensor, Tensor, Tensor> unproject_backward(Tensor grad_volume, Tensor features, Tensor q,
                                                      std::optional<Tensor> view_mask,
                                                      std::optional<Tensor> view_weights, std::vector<int64_t> shape,
                                                      std::string aggregation, std::string unseen, bool needs_features,
                                                      bool needs_q, bool needs_weights, bool deterministic) {
  const Call call = prepare(features, q, view_mask, view_weights, shape, aggregation, unseen, true);
  const int64_t n = call.p.samples, m = call.p.views, c = call.p.channels, h = call.p.height, w = call.p.width;
  STD_TORCH_CHECK(grad_volume.dim() == 5 && grad_volume.size(0) == n && grad_volume.size(1) == c &&
                      grad_volume.size(2) == shape[0] && grad_volume.size(3) == shape[1] &&
                      grad_volume.size(4) == shape[2],
                  "grad_volume: expected (N, C, X, Y, Z)");
  STD_TORCH_CHECK(grad_volume.device() == features.device(), "grad_volume: expected the device of the features");
  STD_TORCH_CHECK(!needs_weights || view_weights, "needs_weights: there are no view_weights");
  if (grad_volume.scalar_type() != call.type) grad_volume = torch::stable::to(grad_volume, call.type);
  Tensor gradient = moved_last(grad_volume, 1);
  if (!gradient.is_contiguous()) gradient = torch::stable::contiguous(gradient);
  if (reinterpret_cast<uintptr_t>(gradient.const_data_ptr()) % 16) gradient = torch::stable::clone(gradient);
  auto empty = [&](bool wanted, const std::vector<int64_t>& size, ScalarType type) {
    return torch::stable::new_empty(features, wanted ? size : std::vector<int64_t>{0}, type);
  };
  Results results = {empty(needs_features, {n, m, h, w, c}, call.type), empty(needs_q, {n, m, 3, 4}, call.arithmetic),
                     empty(needs_weights, {n, m, c}, call.arithmetic)};
  by_type(call.type, [&](auto storage) {
    using S = decltype(storage);
    constexpr int width = backward_width<S>;
    c % width == 0 ? run_backward<S, width>(call, gradient, deterministic, results)
                   : run_backward<S, 1>(call, gradient, deterministic, results);
  });
  if (needs_features) results.maps = torch::stable::transpose(torch::stable::transpose(results.maps, 3, 4), 2, 3);
  return {results.maps, results.q, results.weights};
}

}  // namespace
}  // namespace bkind3d

BKIND3D_KERNELS(m) {
  m.impl("unproject", TORCH_BOX(&bkind3d::unproject));
  m.impl("unproject_backward", TORCH_BOX(&bkind3d::unproject_backward));
}
