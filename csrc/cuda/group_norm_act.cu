// Group normalisation with a residual and a ReLU in CUDA, over channels-last maps, and its gradients.
//
// A thread has a column of packs, 16 bytes of channels, and every few voxels one of them, so that mean, scale and bias
// of its channels stay in registers; up to 8 columns lie side by side, 128 bytes. Where channels or addresses do not
// allow packs, a pack is one element. Forward: a block takes a slab of 256 voxels where 8 columns lie side by side,
// holds it in registers, sums it for the mean of each channel there and once more about that mean, so that nothing
// cancels; a second kernel merges the slabs of each group in double, and a third makes y, from the last slab to the
// first, since the last are still in the second-level cache. Backward likewise: sums of h and of h (x - mean) by slab
// and channel, and the residual's gradient with them; what its slabs have in common for each group; the gradient of x.
// The gradients of weight and bias are sums over the samples. A group that one block can hold, such as 8,192 elements
// of float, is one block's own, forward in one launch, backward in one and that of weight and bias. All sums are in an
// order that depends on shapes and alignment alone: no atomics, the same bits each time. Saved for backward: x in its
// own type, mean and 1 / sqrt(var + eps); y where there are a residual and a ReLU, else the mask is made from x again.
//
// Bound by bytes, for E elements of b bytes. Forward: E b read and E b written, E b more read with a residual, E b more
// where a sample goes through slabs and has left the second-level cache. Backward: 2 E b read, E b written; with
// residual and ReLU 3 E b read, 2 E b written; where a sample goes through slabs and has left that cache 2 E b more
// read, of x and of the residual's gradient or, without one, the incoming one. Sums of slabs in float are 1.6 % of the
// map forward and 0.8 % backward. Not measured on a GPU.
#include "group_norm_act.h"

#include <type_traits>

#include "../common/group_norm_act.h"
#include "launch.cuh"

namespace bkind3d {
namespace {

constexpr int threads = 256, finish_threads = 128;

// Packs of a thread, of each map, in one slab; and those that are on their way at once where it does not hold them.
template <int Width>
constexpr int loads = Width == 1 ? 16 : 8;
constexpr int forward_batch = 4, backward_batch = 2;

// Packs of a voxel that a block takes side by side, unless it has a whole group.
template <int Width>
constexpr int most_columns = Width == 1 ? 32 : 8;

// Blocks at once on a multiprocessor: 80 registers for each thread, 128 in half formats.
template <int Width>
constexpr int blocks_at_once = Width == 8 ? 2 : 3;

// How the work is divided. A block has some columns of packs, which are a chunk of a voxel's packs, of the voxels of a
// slab; its threads stand in rows of so many columns, and go down the slab that many rows at a time.
struct Problem {
  int64_t voxels, channels;
  unsigned slabs, chunks;  // of a sample
  unsigned packs, groups;  // of a voxel
  int slab;                // voxels
  int columns, rows;
  Divider by_columns, by_group;  // by_group: channels of a group
  bool relu;
};

// What a thread has of it.
struct Place {
  unsigned sample, slab;
  unsigned channel;  // the first of its pack
  int thread, column, row;
  int voxels;           // of the slab
  int left;             // of these, from the thread's first one on: not positive where it has none
  int64_t first, step;  // of its first element in a map, and from one of its voxels to the next

  __device__ __forceinline__ bool owns_column() const { return row == 0 && left > 0; }
};

__device__ __forceinline__ Place place_of(const Problem& p, unsigned block) {
  const unsigned piece = block / p.chunks, chunk = block - piece * p.chunks;
  const unsigned sample = piece / p.slabs, slab = piece - sample * p.slabs;
  const int thread = int(threadIdx.x), row = int(quotient(p.by_columns, thread)), column = thread - row * p.columns;
  const unsigned pack = chunk * p.columns + column, width = unsigned(p.channels) / p.packs;
  const bool idle = row >= p.rows || pack >= p.packs;
  const int64_t voxel = int64_t(slab) * p.slab, rest = p.voxels - voxel;
  const unsigned channel = idle ? 0 : pack * width;
  const int voxels = rest < p.slab ? int(rest) : p.slab;
  return {sample,
          slab,
          channel,
          thread,
          column,
          row,
          voxels,
          idle ? 0 : voxels - row,
          (sample * p.voxels + voxel + row) * p.channels + channel,
          p.rows * p.channels};
}

// The thread's packs of a map from the given one on; beyond its last one, zeros.
template <class S, int Width, int Count, class Load>
__device__ __forceinline__ void load(const Problem& p, const Place& at, const S* map, int from,
                                     Pack<S, Width> (&packs)[Count], Load load_pack) {
#pragma unroll
  for (int k = 0; k < Count; ++k) {
    packs[k] = Pack<S, Width>{};
    if ((from + k) * p.rows < at.left)
      packs[k] = load_pack(reinterpret_cast<const Pack<S, Width>*>(map + at.first + (from + k) * at.step));
  }
}

struct Once {
  template <class P>
  __device__ __forceinline__ P operator()(const P* p) const {
    return load_once(p);
  }
};

struct Kept {
  template <class P>
  __device__ __forceinline__ P operator()(const P* p) const {
    return load_kept(p);
  }
};

template <class S, int Width>
__device__ __forceinline__ void store(const Place& at, S* map, int k, const Pack<S, Width>& pack) {
  *reinterpret_cast<Pack<S, Width>*>(map + at.first + k * at.step) = pack;
}

// ---- sums over a block ----

template <class T, int Threads, int Count>
struct Sums {
  T values[Count][Threads];
};

// For each column the sums over its rows, to all of its threads, those without a row too. By all threads of a block.
template <int Threads, class T, int Count>
__device__ __forceinline__ void sum_rows(T (&mine)[Count], int thread, int columns, int rows) {
  auto& all = shared<Sums<T, Threads, Count>>().values;
  const int row = thread / columns, column = thread - row * columns;
  int half = 1;
  while (2 * half < rows) half *= 2;
  __syncthreads();  // what was summed before has been read
#pragma unroll
  for (int i = 0; i < Count; ++i) all[i][thread] = mine[i];
  for (; half > 0; half /= 2) {
    __syncthreads();
    if (row < half && row + half < rows) {
#pragma unroll
      for (int i = 0; i < Count; ++i) all[i][thread] = mine[i] += all[i][thread + half * columns];
    }
    rows = half;
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < Count; ++i) mine[i] = all[i][column];
}

// Over all threads.
template <int Threads, class T, int Count>
__device__ __forceinline__ void sum_block(T (&mine)[Count], int thread) {
  sum_rows<Threads>(mine, thread, 1, Threads);
}

// ---- forward ----

// Mean and 1 / sqrt(var + eps), (N, groups), and the parameters.
template <class T>
struct Given {
  const T *mean, *rstd, *weight, *bias;
};

// Of the channels of a pack.
template <class T, int Width>
struct Constants {
  T mean[Width], scale[Width], bias[Width];
};

template <int Width, class T>
__device__ __forceinline__ Constants<T, Width> constants_of(const Problem& p, const Place& at, const Given<T>& given) {
  Constants<T, Width> k;
#pragma unroll
  for (int i = 0; i < Width; ++i) {
    const unsigned channel = at.channel + i;
    const int64_t group = int64_t(at.sample) * p.groups + quotient(p.by_group, channel);
    k.mean[i] = given.mean[group];
    k.scale[i] = given.rstd[group] * given.weight[channel];
    k.bias[i] = given.bias[channel];
  }
  return k;
}

// `added`: whether there is a residual.
template <class S, int Width>
__device__ __forceinline__ Pack<S, Width> output_of(const Constants<Arithmetic<S>, Width>& k, const Pack<S, Width>& x,
                                                    const Pack<S, Width>& residual, bool added, bool relu) {
  Pack<S, Width> y;
#pragma unroll
  for (int i = 0; i < Width; ++i) {
    Arithmetic<S> value = normalised(widen(x.values[i]), k.mean[i], k.scale[i], k.bias[i]);
    if (added) value += widen(residual.values[i]);
    y.values[i] = narrow<S>(relu ? rectified(value) : value);
  }
  return y;
}

// Of each channel in a slab.
template <class S, int Width>
__global__ void __launch_bounds__(threads, blocks_at_once<Width>)
    statistics_kernel(Problem p, const S* x, Deviations<double>* partial) {
  using T = Arithmetic<S>;
  constexpr int count = loads<Width>;
  // The slab into registers.
  const Place at = place_of(p, blockIdx.x);
  Pack<S, Width> packs[count];
  load(p, at, x, 0, packs, Kept());
  // Means.
  T shift[Width] = {};
#pragma unroll
  for (int k = 0; k < count; ++k) {
#pragma unroll
    for (int i = 0; i < Width; ++i) shift[i] += widen(packs[k].values[i]);
  }
  sum_rows<threads>(shift, at.thread, p.columns, p.rows);
  const T voxels = T(at.voxels);
#pragma unroll
  for (int i = 0; i < Width; ++i) shift[i] /= voxels;
  // Sums about them.
  T sums[2 * Width] = {};
#pragma unroll
  for (int k = 0; k < count; ++k) {
    if (k * p.rows < at.left) {
#pragma unroll
      for (int i = 0; i < Width; ++i) {
        const T distance = widen(packs[k].values[i]) - shift[i];
        sums[i] += distance;
        sums[Width + i] += distance * distance;
      }
    }
  }
  sum_rows<threads>(sums, at.thread, p.columns, p.rows);
  if (!at.owns_column()) return;
  Deviations<double>* target = partial + (int64_t(at.sample) * p.slabs + at.slab) * p.channels + at.channel;
#pragma unroll
  for (int i = 0; i < Width; ++i) target[i] = deviations_about<double>(shift[i], sums[i], sums[Width + i], at.voxels);
}

// f(where a channel of the group has its entry in the partial sums, slab) for what a thread has to add up.
template <class F>
__device__ __forceinline__ void for_each_part(const Problem& p, unsigned sample, unsigned group, F f) {
  const unsigned width = p.by_group.divisor, columns = width < finish_threads ? width : finish_threads;
  const unsigned rows = finish_threads / columns, row = threadIdx.x / columns, column = threadIdx.x - row * columns;
  if (row >= rows) return;
  for (unsigned slab = row; slab < p.slabs; slab += rows) {
    const int64_t first = (int64_t(sample) * p.slabs + slab) * p.channels + group * width;
    for (unsigned i = column; i < width; i += columns) f(first + i, slab);
  }
}

// One block for each group of a sample: the mean of the parts' means, then the distances from it.
template <class T>
__global__ void __launch_bounds__(finish_threads)
    finish_statistics_kernel(Problem p, const Deviations<double>* partial, double eps, T* mean, T* rstd) {
  const int thread = int(threadIdx.x);
  const unsigned sample = blockIdx.x / p.groups, group = blockIdx.x - sample * p.groups;
  const double members = double(p.voxels) * p.by_group.divisor;
  auto voxels_of = [&](unsigned slab) {
    return double(slab + 1 < p.slabs ? p.slab : p.voxels - int64_t(slab) * p.slab);
  };
  double sum[1] = {}, squares[1] = {};
  for_each_part(p, sample, group, [&](int64_t i, unsigned slab) { sum[0] += voxels_of(slab) * partial[i].mean; });
  sum_block<finish_threads>(sum, thread);
  const double middle = sum[0] / members;
  for_each_part(p, sample, group, [&](int64_t i, unsigned slab) {
    const double distance = partial[i].mean - middle;
    squares[0] += partial[i].squares + voxels_of(slab) * distance * distance;
  });
  sum_block<finish_threads>(squares, thread);
  if (thread != 0) return;
  mean[blockIdx.x] = T(middle);
  rstd[blockIdx.x] = T(1 / sqrt_of(squares[0] / members + eps));
}

template <class S, int Width>
__global__ void __launch_bounds__(threads, blocks_at_once<Width>)
    apply_kernel(Problem p, Given<Arithmetic<S>> given, const S* x, const S* residual, S* y) {
  constexpr int batch = forward_batch;
  const Place at = place_of(p, gridDim.x - 1 - blockIdx.x);
  if (at.left <= 0) return;
  const auto constants = constants_of<Width>(p, at, given);
#pragma unroll 1
  for (int from = 0; from * p.rows < at.left; from += batch) {
    Pack<S, Width> packs[batch], added[batch] = {};
    load(p, at, x, from, packs, Once());
    if (residual) load(p, at, residual, from, added, Once());
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      if ((from + k) * p.rows < at.left)
        store(at, y, from + k, output_of(constants, packs[k], added[k], residual, p.relu));
    }
  }
}

// One block for each group of a sample, which it holds in registers.
template <class S, int Width>
__global__ void __launch_bounds__(threads, blocks_at_once<Width>)
    group_kernel(Problem p, Given<Arithmetic<S>> given, double eps, const S* x, const S* residual, S* y,
                 Arithmetic<S>* mean, Arithmetic<S>* rstd) {
  using T = Arithmetic<S>;
  constexpr int count = loads<Width>, batch = forward_batch;
  // The group into registers.
  const Place at = place_of(p, blockIdx.x);
  Pack<S, Width> packs[count];
  load(p, at, x, 0, packs, Once());
  // Its mean.
  T sum[1] = {};
#pragma unroll
  for (int k = 0; k < count; ++k) {
#pragma unroll
    for (int i = 0; i < Width; ++i) sum[0] += widen(packs[k].values[i]);
  }
  sum_block<threads>(sum, at.thread);
  const T members = T(p.voxels * p.by_group.divisor), shift = sum[0] / members;
  // Sums about it.
  T sums[2] = {};
#pragma unroll
  for (int k = 0; k < count; ++k) {
    if (k * p.rows < at.left) {
#pragma unroll
      for (int i = 0; i < Width; ++i) {
        const T distance = widen(packs[k].values[i]) - shift;
        sums[0] += distance;
        sums[1] += distance * distance;
      }
    }
  }
  sum_block<threads>(sums, at.thread);
  const Deviations<double> all = deviations_about<double>(shift, sums[0], sums[1], members);
  const T middle = T(all.mean), inverse = T(1 / sqrt_of(all.squares / double(members) + eps));
  if (at.thread == 0) mean[blockIdx.x] = middle, rstd[blockIdx.x] = inverse;
  if (at.left <= 0) return;
  // The output.
  Constants<T, Width> constants;
#pragma unroll
  for (int i = 0; i < Width; ++i) {
    constants.mean[i] = middle;
    constants.scale[i] = inverse * given.weight[at.channel + i];
    constants.bias[i] = given.bias[at.channel + i];
  }
#pragma unroll
  for (int from = 0; from < count; from += batch) {
    Pack<S, Width> added[batch] = {};
    if (residual) load(p, at, residual, from, added, Once());
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      if ((from + k) * p.rows < at.left)
        store(at, y, from + k, output_of(constants, packs[from + k], added[k], residual, p.relu));
    }
  }
}

// ---- backward ----

// Where a gradient is let through: everywhere, or as a ReLU did, of which the output is kept or made again.
enum class Mask { none, output, again };

template <class S>
struct Maps {
  const S *x, *grad, *output;
  S *grad_x, *grad_residual;
};

// Of h, the gradient let through, and of h (x - mean).
template <class T>
struct ChannelSums {
  T total, moment;
};

// f(k, x, h) for the thread's packs of both, a few of which are read before the first is needed.
template <Mask mask, class S, int Width, class Load, class F>
__device__ __forceinline__ void for_each_pack(const Problem& p, const Place& at, const Maps<S>& maps,
                                              const Constants<Arithmetic<S>, Width>& constants, Load load_pack, F f) {
  constexpr int batch = backward_batch;
#pragma unroll 1
  for (int from = 0; from * p.rows < at.left; from += batch) {
    Pack<S, Width> x[batch], h[batch], output[batch] = {};
    load(p, at, maps.x, from, x, load_pack);
    load(p, at, maps.grad, from, h, load_pack);
    if constexpr (mask == Mask::output) load(p, at, maps.output, from, output, load_pack);
#pragma unroll
    for (int k = 0; k < batch; ++k) {
      if ((from + k) * p.rows >= at.left) continue;
      Arithmetic<S> values[Width], gradients[Width];
#pragma unroll
      for (int i = 0; i < Width; ++i) {
        values[i] = widen(x[k].values[i]);
        gradients[i] = widen(h[k].values[i]);
        if constexpr (mask == Mask::output) gradients[i] = passed(gradients[i], widen(output[k].values[i]));
        if constexpr (mask == Mask::again)
          gradients[i] =
              passed(gradients[i], normalised(values[i], constants.mean[i], constants.scale[i], constants.bias[i]));
      }
      f(from + k, values, gradients);
    }
  }
}

template <class S, int Width, class T>
__device__ __forceinline__ Pack<S, Width> narrowed(const T (&values)[Width]) {
  Pack<S, Width> pack;
#pragma unroll
  for (int i = 0; i < Width; ++i) pack.values[i] = narrow<S>(values[i]);
  return pack;
}

// Over the rows of the block: of each channel the sum of h, then that of h (x - mean). Writes the residual's gradient.
template <Mask mask, class S, int Width>
__device__ __forceinline__ void channel_sums(const Problem& p, const Place& at, const Maps<S>& maps,
                                             const Constants<Arithmetic<S>, Width>& constants,
                                             Arithmetic<S> (&sums)[2 * Width]) {
  using T = Arithmetic<S>;
  for_each_pack<mask>(p, at, maps, constants, Kept(), [&](int k, const T(&x)[Width], const T(&h)[Width]) {
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      sums[i] += h[i];
      sums[Width + i] += h[i] * (x[i] - constants.mean[i]);
    }
    if (maps.grad_residual) store(at, maps.grad_residual, k, narrowed<S>(h));
  });
  sum_rows<threads>(sums, at.thread, p.columns, p.rows);
}

// `group`: of each channel of the pack.
template <Mask mask, class S, int Width, class Load>
__device__ __forceinline__ void write_gradient(const Problem& p, const Place& at, const Maps<S>& maps,
                                               const Constants<Arithmetic<S>, Width>& constants,
                                               const GroupGradient<Arithmetic<S>> (&group)[Width], Load load_pack) {
  using T = Arithmetic<S>;
  for_each_pack<mask>(p, at, maps, constants, load_pack, [&](int k, const T(&x)[Width], const T(&h)[Width]) {
    T gradients[Width];
#pragma unroll
    for (int i = 0; i < Width; ++i)
      gradients[i] = input_gradient(h[i], x[i], constants.mean[i], constants.scale[i], group[i]);
    store(at, maps.grad_x, k, narrowed<S>(gradients));
  });
}

// Of each channel in a slab.
template <Mask mask, class S, int Width>
__global__ void __launch_bounds__(threads, blocks_at_once<Width>)
    sums_kernel(Problem p, Given<Arithmetic<S>> given, Maps<S> maps, ChannelSums<Arithmetic<S>>* partial) {
  const Place at = place_of(p, blockIdx.x);
  const auto constants = constants_of<Width>(p, at, given);
  Arithmetic<S> sums[2 * Width] = {};
  channel_sums<mask>(p, at, maps, constants, sums);
  if (!at.owns_column()) return;
  ChannelSums<Arithmetic<S>>* target = partial + (int64_t(at.sample) * p.slabs + at.slab) * p.channels + at.channel;
#pragma unroll
  for (int i = 0; i < Width; ++i) target[i] = {sums[i], sums[Width + i]};
}

// One block for each group of a sample: the totals of its channels, and from them what the group has in common.
template <class T>
__global__ void __launch_bounds__(finish_threads)
    finish_sums_kernel(Problem p, Given<T> given, const ChannelSums<T>* partial, ChannelSums<double>* totals,
                       GroupGradient<T>* groups) {
  const int thread = int(threadIdx.x);
  const unsigned sample = blockIdx.x / p.groups, group = blockIdx.x - sample * p.groups, width = p.by_group.divisor;
  const int columns = width < finish_threads ? int(width) : finish_threads, rows = finish_threads / columns;
  const int row = thread / columns, column = thread - row * columns;
  // Channel after channel, where there are more of them than threads.
  double weighted[2] = {};
  for (unsigned first = 0; first < width; first += columns) {
    const unsigned channel = group * width + first + column;
    const bool has = row < rows && first + column < width;
    double sums[2] = {};
    if (has) {
      for (unsigned slab = row; slab < p.slabs; slab += rows) {
        const ChannelSums<T> part = partial[(int64_t(sample) * p.slabs + slab) * p.channels + channel];
        sums[0] += part.total;
        sums[1] += part.moment;
      }
    }
    sum_rows<finish_threads>(sums, thread, columns, rows);
    if (!has || row > 0) continue;
    totals[int64_t(sample) * p.channels + channel] = {sums[0], sums[1]};
    weighted[0] += double(given.weight[channel]) * sums[0];
    weighted[1] += double(given.weight[channel]) * sums[1];
  }
  sum_block<finish_threads>(weighted, thread);
  if (thread != 0) return;
  const auto all = group_gradient<double>(weighted[0], weighted[1], given.rstd[blockIdx.x], double(p.voxels) * width);
  groups[blockIdx.x] = {T(all.slope), T(all.offset)};
}

template <Mask mask, class S, int Width>
__global__ void __launch_bounds__(threads, blocks_at_once<Width>)
    gradient_kernel(Problem p, Given<Arithmetic<S>> given, Maps<S> maps, const GroupGradient<Arithmetic<S>>* groups) {
  const Place at = place_of(p, gridDim.x - 1 - blockIdx.x);
  if (at.left <= 0) return;
  const auto constants = constants_of<Width>(p, at, given);
  GroupGradient<Arithmetic<S>> group[Width];
#pragma unroll
  for (int i = 0; i < Width; ++i)
    group[i] = groups[int64_t(at.sample) * p.groups + quotient(p.by_group, at.channel + i)];
  write_gradient<mask>(p, at, maps, constants, group, Once());
}

// One block for each group of a sample, which it reads twice, the second time from a cache.
template <Mask mask, class S, int Width>
__global__ void __launch_bounds__(threads, blocks_at_once<Width>)
    group_backward_kernel(Problem p, Given<Arithmetic<S>> given, Maps<S> maps, ChannelSums<double>* totals) {
  using T = Arithmetic<S>;
  // Sums of the channels.
  const Place at = place_of(p, blockIdx.x);
  const auto constants = constants_of<Width>(p, at, given);
  T sums[2 * Width] = {};
  channel_sums<mask>(p, at, maps, constants, sums);
  // What the group has in common.
  double weighted[2] = {};
  if (at.owns_column()) {
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      const unsigned channel = at.channel + i;
      totals[int64_t(at.sample) * p.channels + channel] = {sums[i], sums[Width + i]};
      weighted[0] += double(given.weight[channel]) * sums[i];
      weighted[1] += double(given.weight[channel]) * sums[Width + i];
    }
  }
  sum_block<threads>(weighted, at.thread);
  if (!maps.grad_x || at.left <= 0) return;
  const auto all =
      group_gradient<double>(weighted[0], weighted[1], given.rstd[blockIdx.x], double(p.voxels) * p.by_group.divisor);
  GroupGradient<T> group[Width];
#pragma unroll
  for (int i = 0; i < Width; ++i) group[i] = {T(all.slope), T(all.offset)};
  // The gradient.
  write_gradient<mask>(p, at, maps, constants, group, Once());
}

// One thread a channel: over the samples, in their order.
template <class T>
__global__ void __launch_bounds__(finish_threads)
    parameters_kernel(Problem p, int64_t samples, const T* rstd, const ChannelSums<double>* totals, T* grad_weight,
                      T* grad_bias) {
  const unsigned channel = blockIdx.x * finish_threads + threadIdx.x;
  if (channel >= p.channels) return;
  const unsigned group = quotient(p.by_group, channel);
  double weight = 0, bias = 0;
  for (int64_t n = 0; n < samples; ++n) {
    const ChannelSums<double> sums = totals[n * p.channels + channel];
    bias += sums.total;
    weight += sums.moment * double(rstd[n * p.groups + group]);
  }
  grad_weight[channel] = T(weight);
  grad_bias[channel] = T(bias);
}

// ---- launches ----

template <int Value>
struct Constant {
  static constexpr int value = Value;
};

template <int Width>
Problem problem_of(const GroupNormActArgs& a, int64_t columns) {
  Problem p{};
  p.voxels = a.voxels;
  p.channels = a.channels;
  p.packs = unsigned(a.channels / Width);
  p.groups = unsigned(a.groups);
  p.columns = int(columns);
  p.rows = threads / p.columns;
  p.slab = p.rows * loads<Width>;
  p.slabs = unsigned(ceil_divide(p.voxels, p.slab));
  p.chunks = unsigned(ceil_divide(p.packs, columns));
  p.by_columns = Divider(columns);
  p.by_group = Divider(a.channels / a.groups);
  p.relu = a.relu;
  return p;
}

int64_t blocks(const Problem& p, int64_t samples) { return samples * ceil_divide(p.voxels, p.slab) * p.chunks; }

// Whether every pack of every map lies at a multiple of 16 bytes.
template <class S>
bool in_packs(const GroupNormActArgs& a) {
  for (const void* map : {a.x, a.residual, a.grad, a.output, static_cast<const void*>(a.y),
                          static_cast<const void*>(a.grad_x), static_cast<const void*>(a.grad_residual)})
    if (reinterpret_cast<uintptr_t>(map) % 16) return false;
  return a.channels % Pack<S>::width == 0;
}

template <int Width>
bool group_in_block(const GroupNormActArgs& a) {
  const int64_t width = a.channels / a.groups, columns = width / Width;
  return width % Width == 0 && columns <= threads && a.voxels <= threads / columns * loads<Width>;
}

// As many columns side by side as make the chunks equal.
template <int Width>
int64_t columns_of(const GroupNormActArgs& a) {
  const int64_t packs = a.channels / Width;
  return ceil_divide(packs, ceil_divide(packs, most_columns<Width>));
}

// f(Problem, width of a pack, whether each block has a group as a whole).
template <class S, class F>
void divided(const GroupNormActArgs& a, F f) {
  constexpr int width = Pack<S>::width;
  const bool packs = in_packs<S>(a);
  const int64_t of_group = a.channels / a.groups;
  if (packs && group_in_block<width>(a)) return f(problem_of<width>(a, of_group / width), Constant<width>(), true);
  if (group_in_block<1>(a)) return f(problem_of<1>(a, of_group), Constant<1>(), true);
  if (packs) return f(problem_of<width>(a, columns_of<width>(a)), Constant<width>(), false);
  f(problem_of<1>(a, columns_of<1>(a)), Constant<1>(), false);
}

template <class T>
Given<T> given_of(const GroupNormActArgs& a) {
  return {static_cast<const T*>(a.mean), static_cast<const T*>(a.rstd), static_cast<const T*>(a.weight),
          static_cast<const T*>(a.bias)};
}

// What backward needs besides, one after the other.
template <class T>
struct Scratch {
  int64_t totals, partial, groups, bytes;  // places

  Scratch(const GroupNormActArgs& a, const Problem& p, bool whole)
      : totals(0),
        partial(totals + a.samples * a.channels * int64_t(sizeof(ChannelSums<double>))),
        groups(partial + (whole ? 0 : a.samples * p.slabs * a.channels * int64_t(sizeof(ChannelSums<T>)))),
        bytes(groups + (whole ? 0 : a.samples * a.groups * int64_t(sizeof(GroupGradient<T>)))) {}
};

template <class F>
void with_mask(const GroupNormActArgs& a, F f) {
  if (!a.relu) return f(std::integral_constant<Mask, Mask::none>());
  if (a.output) return f(std::integral_constant<Mask, Mask::output>());
  f(std::integral_constant<Mask, Mask::again>());
}

template <class S, int Width>
void launch_slabs_backward(Stream stream, const GroupNormActArgs& a, const Problem& p, Maps<S> maps, char* memory) {
  using T = Arithmetic<S>;
  const Scratch<T> scratch(a, p, false);
  const Given<T> given = given_of<T>(a);
  auto* totals = reinterpret_cast<ChannelSums<double>*>(memory + scratch.totals);
  auto* partial = reinterpret_cast<ChannelSums<T>*>(memory + scratch.partial);
  auto* groups = reinterpret_cast<GroupGradient<T>*>(memory + scratch.groups);
  with_mask(a, [&](auto mask) {
    launch(stream, {blocks(p, a.samples), threads}, sums_kernel<mask.value, S, Width>, p, given, maps, partial);
  });
  launch(stream, {a.samples * a.groups, finish_threads}, finish_sums_kernel<T>, p, given, partial, totals, groups);
  if (!maps.grad_x) return;
  // The residual's gradient, where it was written, is what has been let through.
  if (maps.grad_residual) {
    maps.grad = maps.grad_residual;
    return launch(stream, {blocks(p, a.samples), threads}, gradient_kernel<Mask::none, S, Width>, p, given, maps,
                  groups);
  }
  with_mask(a, [&](auto mask) {
    launch(stream, {blocks(p, a.samples), threads}, gradient_kernel<mask.value, S, Width>, p, given, maps, groups);
  });
}

}  // namespace

int64_t group_norm_act_scratch(const GroupNormActArgs& a, Storage storage) {
  int64_t bytes = 0;
  by_storage(storage, [&](auto element) {
    divided<decltype(element)>(a, [&](const Problem& p, auto, bool whole) {
      if (!whole) bytes = a.samples * p.slabs * a.channels * int64_t(sizeof(Deviations<double>));
    });
  });
  return bytes;
}

int64_t group_norm_act_backward_scratch(const GroupNormActArgs& a, Storage storage) {
  int64_t bytes = 0;
  by_storage(storage, [&](auto element) {
    using S = decltype(element);
    divided<S>(a, [&](const Problem& p, auto, bool whole) { bytes = Scratch<Arithmetic<S>>(a, p, whole).bytes; });
  });
  return bytes;
}

void launch_group_norm_act(Stream stream, const GroupNormActArgs& a, Storage storage, void* scratch) {
  by_storage(storage, [&](auto element) {
    using S = decltype(element);
    using T = Arithmetic<S>;
    const Given<T> given = given_of<T>(a);
    const S *x = static_cast<const S*>(a.x), *residual = static_cast<const S*>(a.residual);
    S* y = static_cast<S*>(a.y);
    T *mean = static_cast<T*>(a.mean), *rstd = static_cast<T*>(a.rstd);
    auto* partial = static_cast<Deviations<double>*>(scratch);
    divided<S>(a, [&](const Problem& p, auto width, bool whole) {
      constexpr int w = decltype(width)::value;
      const Launch all = {blocks(p, a.samples), threads};
      if (whole) return launch(stream, all, group_kernel<S, w>, p, given, a.eps, x, residual, y, mean, rstd);
      launch(stream, all, statistics_kernel<S, w>, p, x, partial);
      launch(stream, {a.samples * a.groups, finish_threads}, finish_statistics_kernel<T>, p, partial, a.eps, mean,
             rstd);
      launch(stream, all, apply_kernel<S, w>, p, given, x, residual, y);
    });
  });
}

void launch_group_norm_act_backward(Stream stream, const GroupNormActArgs& a, Storage storage, void* memory) {
  by_storage(storage, [&](auto element) {
    using S = decltype(element);
    using T = Arithmetic<S>;
    const Maps<S> maps = {static_cast<const S*>(a.x), static_cast<const S*>(a.grad), static_cast<const S*>(a.output),
                          static_cast<S*>(a.grad_x), static_cast<S*>(a.grad_residual)};
    auto* totals = static_cast<ChannelSums<double>*>(memory);
    divided<S>(a, [&](const Problem& p, auto width, bool whole) {
      constexpr int w = decltype(width)::value;
      if (whole) {
        with_mask(a, [&](auto mask) {
          launch(stream, {blocks(p, a.samples), threads}, group_backward_kernel<mask.value, S, w>, p, given_of<T>(a),
                 maps, totals);
        });
      } else {
        launch_slabs_backward<S, w>(stream, a, p, maps, static_cast<char*>(memory));
      }
      if (!a.grad_weight) return;
      launch(stream, {ceil_divide(a.channels, finish_threads), finish_threads}, parameters_kernel<T>, p, a.samples,
             static_cast<const T*>(a.rstd), totals, static_cast<T*>(a.grad_weight), static_cast<T*>(a.grad_bias));
    });
  });
}

}  // namespace bkind3d
