// Unprojection in CUDA. For every voxel and view: projection, four taps, the aggregate over the views; and its
// gradient.
//
// A warp walks over a brick of voxels, each of which has a group of lanes, 16 bytes of channels a lane (unproject.cuh).
// Forward keeps the samples of four views in registers; more views go through an online softmax. Backward recomputes
// all of it, keeps the gradients of each view's four taps in registers, each pixel in a slot given by the parity of its
// row and column (what the next voxel shares stays where it is), and adds one to the map, 16 bytes by one `red` where
// the architecture has it, when another pixel takes its slot. Deterministic: twice, first for the largest |dL/dv| of
// each sample, then in 64-bit fixed point relative to it. dL/dQ and dL/dw are summed in parts with one owner each, and
// the parts in a fixed order by a last kernel. Saved for backward: the inputs alone.
//
// Bound, at (N, M, C) = (8, 4, 32), 64^2 maps, 64^3 voxels, float: by bytes 285 MB forward and 302 MB backward; inside,
// 4.3 GB of taps through the first-level cache, and about 20 instructions for each of 268 M samples (sm_90).
// Measured on an H200 (benchmarks/results/2026-11-27-h200/times/results.csv, batch-8): forward 0.288 ms, backward 1.97,
// both in a training step 2.26; the paper's sizes 0.099, 0.401 and 0.535.
#include "unproject.h"

#include <algorithm>

#include "launch.cuh"
#include "unproject.cuh"

#if defined(BKIND3D_EMULATED)  // g++ does not see that there is a view, whose samples begin what is carried
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

namespace bkind3d {
namespace {

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
    const bool sees = t.offset[0] != no_pixel;
    sample_view<S>(Small ? maps[m] : maps[0] + (first + m) * p.stride_m, t, sees, v[m]);
#pragma unroll
    for (int i = 0; i < Width; ++i) v[m][i] = sees ? v[m][i] : t.weight[0];
    seen |= unsigned(sees) << m;
  }
  return seen;
}

// A value that is held in a register, and not made again from what it was made of.
template <class V>
__device__ __forceinline__ V held(V v) {
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
  // Which brick.
  const Role role = role_of(p);
  const LocatedItem first_item = first_item_of(p);
  const GroupOffset offset = group_offset(p, role.group);
  const int sample = int(blockIdx.x / p.blocks), steps = p.run_x << p.run_y_log;
  const unsigned index = (blockIdx.x - sample * p.blocks) * warps + role.warp;
  if (index >= p.bricks) return;
  const Brick brick = brick_of(p, sample, index);
  const Voxel start = {brick.x, brick.y + offset.y, brick.z + offset.z, true};
  const unsigned pixel = unsigned(p.channels) * unsigned(sizeof(S)), at_start = held(index_of(p, start));
  counts += sample * voxels_of(p);
  Projected<T> projected = {dynamic_shared<Taps<T>>() + role.warp * p.groups * p.items, 0, 0, p.items};
  for (int base = 0; base < p.packs; base += p.lanes) {
    // A pack of channels a lane: where it reads and writes.
    const int channel = held((base + role.member) * Width);
    const int end_y = held(role.idle || channel >= p.channels || start.z >= p.z ? 0 : p.y);
    const char* maps[Small ? chunk : 1];
#pragma unroll
    for (int m = 0; m < (Small ? chunk : 1); ++m) maps[m] = held(map_of(p, sample, m) + channel * sizeof(S));
    const T* weights = static_cast<const T*>(p.weights) + int64_t(sample) * p.views * p.channels + channel;
    char* const to = held(reinterpret_cast<char*>(volume + sample * voxels_of(p) * p.channels + channel));
    projected.used = p.items;
    for (int number = 0; number < steps; ++number) {
      const Step step = step_of(p, number);
      const bool absent = start.x + step.x >= p.x || start.y + step.y * p.groups_y >= end_y;
      // One voxel: a chunk of views after the other.
      Carried<T> carried[Width];
      int count = 0;
      if (!Small && !few_views(p)) projected.used = p.items;
      for (int first = 0; first < (Small ? 1 : p.views); first += chunk, projected.used += chunk) {
        if (projected.used == p.items) project_items<false, Small>(p, brick, first_item, projected, number, first);
        if (absent) continue;
        const Taps<T>* taps = projected.taps + projected.used * p.groups + role.group;
        T v[chunk][Width];
        const unsigned seen = sample_views<S, Width, Small>(p, maps, first, taps, v);
        carry(p, Softmax, carried, v, seen, first, weights + int64_t(first) * p.channels);
        count += __popc(seen);
      }
      if (absent) continue;
      // Its aggregate and count.
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
enum class Scatter { nothing, floating, largest, fixed };

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

// Sums for the taps of a chunk of views, in the slots of their pixels; each is added to its map when another pixel
// takes its slot.
template <class T, int Width>
struct PixelSums {
  T of[chunk][4][Width];
  unsigned pixel[chunk][4];  // offsets as in Taps

  __device__ __forceinline__ void forget() {
#pragma unroll
    for (int i = 0; i < 4 * chunk; ++i) pixel[i / 4][i % 4] = no_pixel;
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
                                      PixelSums<Arithmetic<S>, Width>& sums) {
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    if (sums.pixel[m][s] != no_pixel) add_sum<S>(out, to, view, sums.pixel[m][s], sums.of[m][s]);
    sums.pixel[m][s] = no_pixel;
  }
}

template <class S, int Width>
__device__ __forceinline__ void add_taps(const Gradients& out, const Target& to, int m, int view,
                                         const Taps<Arithmetic<S>>& t, const Arithmetic<S> (&g)[Width],
                                         PixelSums<Arithmetic<S>, Width>& sums) {
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    const unsigned pixel = t.offset[s];
    if (pixel != sums.pixel[m][s]) {
      if (sums.pixel[m][s] != no_pixel) add_sum<S>(out, to, view, sums.pixel[m][s], sums.of[m][s]);
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
__device__ __forceinline__ T sum_of_group(const Problem& p, const Role& role, T value) {
  for (int step = 16; step > 0; step >>= 1) {
    const T other = __shfl_down_sync(all_lanes, value, step);
    if (role.member + step < p.lanes) value += other;
  }
  return value;
}

// Whether a lane has one item of those that are projected at once, and always the same view.
__device__ __forceinline__ bool one_view(const Problem& p) { return few_views(p) && p.groups * p.items <= 32; }

// What a warp knows of dL/dQ. With `one_view` a lane's sums are in shared memory, their elements 32 apart.
template <class T>
struct Matrices {
  TapSums<T>* sums;
  T* lane_sums;
  int64_t row;  // in Gradients::q, of group 0
};

// Where a lane's sums of dL/dQ go in memory.
template <class T>
__device__ __forceinline__ T* matrix_of(const Problem& p, const Gradients& out, const Item& item, int64_t row) {
  row = (row + item.group) * out.q_rows + (few_views(p) ? item.step : 0);
  return static_cast<T*>(out.q) + (row * p.padded_views + item.view) * 12;
}

template <class T>
__device__ __forceinline__ Homogeneous<T> gradient_of(const Sight<T>& sight, const TapSums<T>& sums) {
  const bool odd_x = first_slot(sight.x), odd_y = first_slot(sight.y);
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
    const Voxel voxel = voxel_of(p, brick, group_offset(p, item.group), projected.step + item.step);
    if (!may_see(p, brick.sample, voxel, item.view)) continue;
    const Sight<T> sight = sight_of<T>(p, brick.sample, voxel, item.view);
    if (!sight.seen) continue;
    const Homogeneous<T> g = gradient_of(sight, sums);
    const T rows[3] = {g.x, g.y, g.depth}, index[4] = {T(voxel.x), T(voxel.y), T(voxel.z), T(1)};
    T* to = one_view(p) ? matrices.lane_sums : matrix_of<T>(p, out, item, matrices.row);
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
  const Role role;
  const Brick brick;
  const LocatedItem first_item;
  const GroupOffset offset;
  const int channel;
  const T* weights;  // of view 0 and the channel
  PixelSums<T, Width> sums;
  unsigned seen;

  __device__ __forceinline__ bool idle() const { return role.idle || channel >= p.channels; }

  __device__ __forceinline__ void sample(int first, const Taps<T>* taps, Samples& v) {
    seen = 0;
#pragma unroll
    for (int m = 0; m < chunk; ++m) {
      const Taps<T>& t = taps[m * p.groups];
#pragma unroll
      for (int i = 0; i < Width; ++i) v[m][i] = t.weight[0];
      if (t.offset[0] == no_pixel) continue;
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
  __device__ __forceinline__ void to_gradients(int first, const Pack<S, Width>& g, const Aggregate<T> (&a)[Width],
                                               int64_t row, Samples& v) const {
#pragma unroll
    for (int m = 0; m < chunk; ++m) {
      if (!(seen >> m & 1)) continue;
      const int64_t at = int64_t(first + m) * p.channels;
      if (out.weights) {
        T* to = static_cast<T*>(out.weights) + row * p.views * p.channels + at + channel;
#pragma unroll
        for (int i = 0; i < Width; ++i)
          to[i] += widen(g.values[i]) * a[i].inverse * (v[m][i] - (p.exclude ? a[i].value : T(0))) * a[i].scaled;
      }
#pragma unroll
      for (int i = 0; i < Width; ++i)
        v[m][i] = sample_gradient(p, a[i], widen(g.values[i]), v[m][i], first + m, weights + at + i);
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
        sum = sum_of_group(p, role, sum);
        if (role.member == 0 && !role.idle) to[m * p.groups].of[s] = sum;
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
    const Voxel voxel = voxel_of(p, w.brick, w.offset, step);
    const bool absent = w.idle() || !voxel.inside;
    Carried<T> carried[Width] = {};
    T v[chunk][Width] = {};
    Pack<S, Width> g = {};
    // The volume's gradient, and the aggregate again.
    if (!absent) g = w.gradient_at(voxel);
    int count = 0;
    w.seen = 0;
    if (!few_views(p)) projected.used = p.items;
    for (int first = 0; first < p.views; first += chunk, projected.used += chunk) {
      if (projected.used == p.items) project_items<true, false>(p, w.brick, w.first_item, projected, step, first);
      if (absent) continue;
      w.sample(first, projected.taps + projected.used * p.groups + w.role.group, v);
      carry(p, softmax, carried, v, w.seen, first, w.weights + int64_t(first) * p.channels);
      count += __popc(w.seen);
    }
    Aggregate<T> aggregated[Width] = {};
    if (!absent) {
#pragma unroll
      for (int i = 0; i < Width; ++i) aggregated[i] = aggregate(p, softmax, carried[i], count);
    }
    // From the aggregate to the samples: to the maps, and to the matrices.
    projected.used = few_views(p) ? projected.used - p.padded_views : p.items;
    for (int first = 0; first < p.views; first += chunk, projected.used += chunk) {
      if (projected.used == p.items) project_items<true, false>(p, w.brick, w.first_item, projected, step, first);
      const int at = projected.used * p.groups + w.role.group;
      const Taps<T>* taps = projected.taps + at;
      if (!absent) {
        if (p.views > chunk) w.sample(first, taps, v);
        w.to_gradients(first, g, aggregated, matrices.row + w.role.group, v);
        if (out.scatter == Scatter::largest) largest = w.largest(largest, v);
        if (out.scatter >= Scatter::floating) w.scatter(first, taps, target, v);
      }
      if (!out.q) continue;
      w.sum_taps(first, taps, v, matrices.sums + at);
      const bool last = first + chunk >= p.views && (step + 1 == steps || !few_views(p));
      if (last || projected.used + chunk == p.items) settle(p, out, w.brick, projected, matrices);
    }
  }
  // What is left in registers.
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
  const Role role = role_of(p);
  const LocatedItem first_item = first_item_of(p);
  const GroupOffset offset = group_offset(p, role.group);
  const int sample = int(blockIdx.x / p.blocks), lane = int(threadIdx.x) % 32, items = p.groups * p.items;
  const unsigned block = blockIdx.x - sample * p.blocks;
  // Shared memory of the warp.
  auto* taps = dynamic_shared<Taps<T>>();
  auto* sums = reinterpret_cast<TapSums<T>*>(taps + warps * items);
  T* lane_sums = reinterpret_cast<T*>(sums + warps * items);
  Projected<T> projected = {taps + role.warp * items, 0, 0, p.items};
  const Matrices<T> matrices = {sums + role.warp * items, lane_sums + role.warp * 12 * 32 + lane,
                                (int64_t(blockIdx.x) * warps + role.warp) * p.groups};
  if (out.q) {
    for (int e = lane; e < items; e += 32) matrices.sums[e] = {};
    for (int i = 0; i < 12 && one_view(p); ++i) matrices.lane_sums[32 * i] = 0;
  }
  // Brick after brick, a pack of channels at a time.
  Target target;
  target.map_size = int64_t(p.height) * p.width * p.channels;
  target.maps = sample * p.views * target.map_size;
  target.scale = out.scatter == Scatter::fixed ? fixed_scale(p, out.largest[sample]) : 0;
  unsigned largest = 0;
  for (unsigned index = block * warps + role.warp; index < p.bricks; index += p.blocks * warps) {
    const Brick brick = brick_of(p, sample, index);
    for (int base = 0; base < p.packs; base += p.lanes) {
      const int channel = (base + role.member) * Width;
      const T* weights = static_cast<const T*>(p.weights) + int64_t(sample) * p.views * p.channels + channel;
      Worker<S, Width> worker = {p, out, role, brick, first_item, offset, channel, weights, {}, 0};
      worker.sums.forget();
      target.channel = unsigned(channel);
      largest = backward_brick(worker, target, matrices, projected, largest);
    }
  }
  // The largest gradient of the warp, and the sums of dL/dQ.
  if (out.scatter == Scatter::largest) {
    largest = __reduce_max_sync(all_lanes, largest);
    if (lane == 0) atomicMax(out.largest + sample, largest);
  }
  if (out.q && one_view(p) && lane < items) {
    T* to = matrix_of<T>(p, out, first_item.item, matrices.row);
    for (int i = 0; i < 12; ++i) to[i] = matrices.lane_sums[32 * i];
  }
}

// ---- after the backward kernel ----

constexpr int sum_columns = 32, sum_threads = 256;

// PixelSums over the rows of (N, rows, columns), of the first `wanted` columns, in an order that never changes.
template <class T>
__global__ void __launch_bounds__(sum_threads)
    sum_rows_kernel(const T* from, int64_t rows, int columns, int wanted, T* to) {
  struct ThreadSums {
    double of[sum_threads];
  };
  ThreadSums& sums = shared<ThreadSums>();
  const int blocks = (wanted + sum_columns - 1) / sum_columns;
  const int64_t sample = blockIdx.x / blocks;
  const int column = int(blockIdx.x - sample * blocks) * sum_columns + int(threadIdx.x) % sum_columns;
  double sum = 0;
  if (column < wanted)
    for (int64_t row = threadIdx.x / sum_columns; row < rows; row += sum_threads / sum_columns)
      sum += from[(sample * rows + row) * columns + column];
  sums.of[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= sum_columns || column >= wanted) return;
  for (int i = 1; i < sum_threads / sum_columns; ++i) sum += sums.of[threadIdx.x + i * sum_columns];
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

// ---- launches ----

#if defined(BKIND3D_EMULATED)  // small grids reach every path
constexpr int64_t enough_warps = 8, most_partial_bytes = 1 << 16;
#else
constexpr int64_t enough_warps = 8192;            // of a launch; with fewer the runs are cut
constexpr int64_t most_partial_bytes = 64 << 20;  // sums of matrices and weights before they are added up
#endif
constexpr int longest_run_x = 4, longest_run_y = 8;

// How the lanes of a warp share voxels and channels, and the warps the volume.
Problem divided(const UnprojectArgs& args, int width) {
  Problem p = args;
  // Lanes of a voxel.
  p.packs = p.channels / width;
  p.stride_y /= width, p.stride_x /= width;
  int passes = 0;
  do {  // until three quarters of the lanes have work
    p.lanes = (p.packs + passes) / (passes + 1);
    ++passes;
  } while (p.lanes > 32 || 4 * p.packs * int64_t(32 / p.lanes) < 96 * int64_t(passes));
  // Voxels and projections of a warp.
  const int groups = 32 / p.lanes;
  p.groups_z = std::max(1, std::min(groups, p.z));
  p.groups_y = groups / p.groups_z;
  p.groups = p.groups_z * p.groups_y;
  p.padded_views = int(ceil_divide(p.views, chunk)) * chunk;
  const int most_items = std::max(chunk, 32 / p.groups / chunk * chunk);
  p.items = p.padded_views <= most_items ? most_items / p.padded_views * p.padded_views : most_items;
  p.by_groups = Divider(p.groups), p.by_groups_z = Divider(p.groups_z), p.by_views = Divider(p.padded_views);

  // Bricks: long runs, as long as there are warps enough.
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
  return p;
}

int64_t bytes_of_taps(const Problem& p, int64_t bytes) { return warps * p.groups * p.items * bytes; }

template <class S, int Width>
void launch_forward(Stream stream, const UnprojectArgs& args, void* volume, unsigned char* counts) {
  const Problem p = divided(args, Width);
  const bool softmax = p.aggregation == Aggregation::softmax, small = p.views <= chunk && p.groups * p.items <= 32;
  const auto kernel = !softmax ? forward_kernel<S, Width, false, false>
                      : small  ? forward_kernel<S, Width, true, true>
                               : forward_kernel<S, Width, true, false>;
  launch(stream, {int64_t(p.samples) * p.blocks, threads, bytes_of_taps(p, sizeof(Taps<Arithmetic<S>>))}, kernel, p,
         static_cast<S*>(volume), counts);
}

// Rows of dL/dQ of a group.
int q_rows(const Problem& p) { return std::max(1, p.items / p.padded_views); }

// As forward, on fewer blocks where their partial sums would be too large. T: of the arithmetic.
template <class T>
Problem divided_backward(const UnprojectArgs& args, int width, bool wants_q, bool wants_weights) {
  Problem p = divided(args, width);
  const int64_t group_columns =
      (wants_q ? q_rows(p) * p.padded_views * 12 : 0) + (wants_weights ? int64_t(p.views) * p.channels : 0);
  if (group_columns && p.blocks) {
    const int64_t most = most_partial_bytes / (group_columns * int64_t(sizeof(T)) * warps * p.groups * p.samples);
    p.blocks = unsigned(std::clamp<int64_t>(most, 1, p.blocks));
  }
  return p;
}

UnprojectPartials partials_of(const Problem& p) {
  const int64_t rows = int64_t(p.blocks) * warps * p.groups;
  return {rows * q_rows(p), p.padded_views * 12, rows, int64_t(p.views) * p.channels};
}

template <class T>
void add_up(Stream stream, int64_t samples, const void* partials, int64_t rows, int64_t columns, int64_t wanted,
            void* to) {
  launch(stream, {samples * ceil_divide(wanted, sum_columns), sum_threads}, sum_rows_kernel<T>,
         static_cast<const T*>(partials), rows, int(columns), int(wanted), static_cast<T*>(to));
}

template <class S, int Width>
void launch_backward(Stream stream, const UnprojectArgs& args, const UnprojectGradients& g) {
  using T = Arithmetic<S>;
  const Problem p = divided_backward<T>(args, Width, g.q, g.weights);
  const bool lanes_have_one = p.groups * p.items <= 32;
  const Launch grid = {int64_t(p.samples) * p.blocks, threads,
                       bytes_of_taps(p, sizeof(Taps<T>) + sizeof(TapSums<T>)) +
                           int64_t(lanes_have_one ? warps * 12 * 32 * sizeof(T) : 0)};
  Gradients out = {g.volume, Scatter::nothing, g.maps, g.largest, g.q_partials, g.weight_partials, q_rows(p)};
  if (g.fixed) {
    // The scale, the sums, and these as numbers.
    out.maps = g.fixed;
    Gradients first = out;
    first.scatter = Scatter::largest, first.q = first.weights = nullptr;
    launch(stream, grid, backward_kernel<S, Width>, p, first);
    out.scatter = Scatter::fixed;
    launch(stream, grid, backward_kernel<S, Width>, p, out);
    const int64_t count = int64_t(p.samples) * p.views * p.height * p.width * p.channels;
    launch(stream, {ceil_divide(count, sum_threads), sum_threads}, from_fixed_kernel<S>, p, g.fixed, g.largest, count,
           static_cast<S*>(g.maps));
  } else {
    if (g.maps) out.scatter = Scatter::floating;
    launch(stream, grid, backward_kernel<S, Width>, p, out);
  }
  // Partial sums.
  const UnprojectPartials size = partials_of(p);
  if (g.q) add_up<T>(stream, p.samples, g.q_partials, size.q_rows, size.q_columns, p.views * 12, g.q);
  if (g.weights)
    add_up<T>(stream, p.samples, g.weight_partials, size.weight_rows, size.weight_columns, size.weight_columns,
              g.weights);
}

}  // namespace

void launch_unproject(Stream stream, const UnprojectArgs& args, Storage storage, void* volume, unsigned char* counts) {
  by_storage(storage, [&](auto element) {
    using S = decltype(element);
    constexpr int width = forward_width<S>;
    args.channels % width == 0 ? launch_forward<S, width>(stream, args, volume, counts)
                               : launch_forward<S, 1>(stream, args, volume, counts);
  });
}

UnprojectPartials unproject_partials(const UnprojectArgs& args, Storage storage, bool wants_q, bool wants_weights) {
  return by_storage(storage, [&](auto element) {
    using S = decltype(element);
    const int width = args.channels % backward_width<S> == 0 ? backward_width<S> : 1;
    return partials_of(divided_backward<Arithmetic<S>>(args, width, wants_q, wants_weights));
  });
}

void launch_unproject_backward(Stream stream, const UnprojectArgs& args, Storage storage,
                               const UnprojectGradients& gradients) {
  by_storage(storage, [&](auto element) {
    using S = decltype(element);
    constexpr int width = backward_width<S>;
    args.channels % width == 0 ? launch_backward<S, width>(stream, args, gradients)
                               : launch_backward<S, 1>(stream, args, gradients);
  });
}

}  // namespace bkind3d
