// 3D soft-argmax in CUDA: mean, peak and covariance of the voxel index under softmax(logits / temperature).
//
// Forward: a block takes a slab of one volume, 8,192 voxels where they lie together (2,048 of double). Each thread has
// its 32 in registers, up to 8 loads of 16 bytes on their way at once; it finds the largest, exponentiates relative to
// it and sums about its place, so that nothing cancels; the moments of the threads, then in a second small kernel those
// of the slabs, are merged as Chan et al. do, in an order that depends on the shape alone: no atomics, the same bits
// each time. Backward: smaller slabs, one read and one write; along z the gradient is a weight times a polynomial.
// Other strides, channels-last among them: a block takes up to 32 keypoints side by side, so that whole sectors are
// read; backward turns a tile of 16 KB in shared memory, since the voxels of its result lie together.
//
// What bounds it, on paper. Bytes: the paper's workload, 2 samples of 15 keypoints in 64^3 voxels, is 31.5 MB of float:
// forward 9.4 us at 3.35 TB/s (H100), 6.6 at 4.8 TB/s (H200; 7.3 at 4.3, a measured copy), backward twice that, half
// formats half of it. Instructions (sm_90, all of a kernel over the voxels of a thread): forward 32 a voxel of float
// and 31 of bfloat16, where an H100 issues 34 in the time of 4 bytes; so float is near both limits and bfloat16 takes
// as long as float; backward 47 and 33, of 68 and 34. Other strides: 130, for 8 voxels a thread and the place of each.
// The second launch, about 3 us unless in a CUDA graph, could be saved by the last block that finishes: a counter to
// clear before each call. Clusters could merge slabs in shared memory, from sm_90 on alone.
// Occupancy: 256 threads, at most 80 registers and 19 KB of shared memory (double: 128 and 24, 2 blocks), 3 blocks on a
// multiprocessor with 96 KB on their way (48 in bfloat16 and backward, 24 and 12 with other strides), where Little's
// law asks for about 20 on an H100. Saved for backward: the logits (an input) and the outputs. Not measured on a GPU
// yet.
#include "launch.cuh"

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/soft_argmax3d.h"

namespace bkind3d {
namespace {

constexpr int threads = 256, finish_threads = 64;
constexpr int most_rows = 32;              // keypoints that a block takes side by side
constexpr int tile_bytes = 16 << 10;       // of backward with other strides
constexpr int64_t most_voxels = 1u << 31;  // of a volume: places are 32-bit numbers

// Blocks at once on a multiprocessor: 80 registers for each thread, 128 in double. For 4 blocks some would spill.
template <class S>
constexpr int blocks_at_once = sizeof(S) == 8 ? 2 : 3;

// Loads of a thread: as many as the registers hold, of each architecture.
constexpr int backward_loads = 4;
template <class S, int Width>
constexpr int loads = Width == 8 || Width == 2 ? 4 : 8;

// Some rows (volumes) of a sample side by side; a row of the batch is sample * joints + joint.
struct Rows {
  int64_t joints, blocks;  // blocks: of `count` rows each, the last may have fewer
  int count;
  Divider by_count;
};

struct Layout {
  int64_t sample, joint, x, y, z;  // strides
};

struct Shape {
  int x, y, z;
  unsigned voxels;
  Divider by_y, by_z;
};

// What all kernels are given. `slab` is the number of voxels of a block in each of its rows.
struct Problem {
  const void* logits;
  Layout layout;
  Shape shape;
  Rows rows;
  unsigned slab, slabs;
  double beta;
};

struct Place {
  int x, y, z;
};

__device__ __forceinline__ Place place_of(const Shape& shape, unsigned voxel) {
  const unsigned line = shape.by_z.quotient(voxel), x = shape.by_y.quotient(line);
  return {int(x), int(line - x * shape.by_y.divisor), int(voxel - line * shape.by_z.divisor)};
}

// Which rows and voxels a block has.
struct Block {
  int64_t row;                // the first, of the batch
  int rows;                   // side by side
  unsigned slab, first, end;  // voxels
  int64_t offset;             // of voxel 0 of the first row, in elements
};

__device__ __forceinline__ Block block_of(const Problem& p) {
  const unsigned group = blockIdx.x / p.slabs, slab = blockIdx.x - group * p.slabs;
  const int64_t sample = group / unsigned(p.rows.blocks), joint = (group - sample * p.rows.blocks) * p.rows.count;
  const int64_t rest = p.rows.joints - joint;
  const unsigned first = slab * p.slab, left = p.shape.voxels - first;
  return {sample * p.rows.joints + joint,          rest < p.rows.count ? int(rest) : p.rows.count,   slab, first,
          first + (left < p.slab ? left : p.slab), sample * p.layout.sample + joint * p.layout.joint};
}

// The voxels of one thread: packs of Width, `step` voxels apart.
template <class S, int Width, int Count>
struct Voxels {
  static constexpr int count = Count;
  Pack<S, Width> packs[count];
  unsigned first, step;

  __device__ __forceinline__ unsigned at(int pack) const { return first + pack * step; }
  __device__ __forceinline__ Arithmetic<S> logit(int pack, int i) const { return widen(packs[pack].values[i]); }
};

template <class S>
__device__ __forceinline__ S lowest() {
  return narrow<S>(Arithmetic<S>(-__builtin_inf()));
}

// `row` of the block, from `first` on; what lies beyond the slab is -inf and weighs nothing.
template <class S, int Width, int Count>
__device__ __forceinline__ Voxels<S, Width, Count> load(const Problem& p, const Block& block, int row, unsigned first,
                                                        unsigned step) {
  Voxels<S, Width, Count> v;
  v.first = first;
  v.step = step;
  const S* source = static_cast<const S*>(p.logits) + block.offset + row * p.layout.joint;
#pragma unroll
  for (int k = 0; k < v.count; ++k) {
    const unsigned voxel = v.at(k);
    if (voxel < block.end) {
      if constexpr (Width > 1) {
        v.packs[k] = load_once(reinterpret_cast<const Pack<S, Width>*>(source + voxel));
      } else {
        const Place at = place_of(p.shape, voxel);
        v.packs[k] = load_once(
            reinterpret_cast<const Pack<S, 1>*>(source + at.x * p.layout.x + at.y * p.layout.y + at.z * p.layout.z));
      }
    } else {
#pragma unroll
      for (int i = 0; i < Width; ++i) v.packs[k].values[i] = lowest<S>();
    }
  }
  return v;
}

// ---- forward ----

// The moments of both; of equal maxima the lowest index is kept, in whatever order their voxels are.
template <bool Covariance, class A>
__device__ __forceinline__ void combine(Moments<A>& a, const Moments<A>& b, A scale) {
  const bool tie = a.maximum == b.maximum;
  const long long lower = a.argmax < b.argmax ? a.argmax : b.argmax;
  merge<Covariance>(a, b, scale, [](A x) { return exponential(x); });
  if (tie) a.argmax = lower;
}

template <bool Covariance, class S, int Width, int Count>
__device__ __forceinline__ Moments<Arithmetic<S>> thread_moments(const Problem& p, const Voxels<S, Width, Count>& v) {
  using T = Arithmetic<S>;
  T largest = -T(__builtin_inf());
  unsigned argmax = v.first;
#pragma unroll
  for (int k = 0; k < v.count; ++k) {
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      const T logit = v.logit(k, i);
      argmax = logit > largest ? v.at(k) + i : argmax;
      largest = logit > largest ? logit : largest;
    }
  }
  const Place origin = place_of(p.shape, argmax);
  const T reference = softmax_reference(largest), scale = T(p.beta * exponential_scale<T>);
  Sums<T> sums;
#pragma unroll
  for (int k = 0; k < v.count; ++k) {
    const Place at = place_of(p.shape, v.at(k));
    const T start = T(at.z - origin.z);
    T total = 0, first = 0, second = 0;
#pragma unroll
    for (int i = 0; i < Width; ++i) {
      const T e = exponential(softmax_exponent(v.logit(k, i), reference, scale)), d = start + T(i);
      total += e;
      first += e * d;
      if constexpr (Covariance) second += e * d * d;
    }
    add_line<Covariance>(sums, total, first, second, T(at.x - origin.x), T(at.y - origin.y));
  }
  // About the centre of the volume, where float has most room.
  const T place[] = {T(origin.x) - T(p.shape.x - 1) / 2, T(origin.y) - T(p.shape.y - 1) / 2,
                     T(origin.z) - T(p.shape.z - 1) / 2};
  return moments_of<Covariance>(sums, largest, place, argmax);
}

template <class A, int Count>
struct Scratch {
  Moments<A> moments[Count];
};

// Of `groups` threads, `step` apart from `thread` on, into the first of them. By all threads of a block.
template <bool Covariance, class A, int Count>
__device__ __forceinline__ void combine_groups(Moments<A>& mine, int thread, int groups, int step, A scale) {
  Scratch<A, Count>& scratch = shared<Scratch<A, Count>>();
  const int group = thread / step;
  scratch.moments[thread] = mine;
  int half = 1;
  while (2 * half < groups) half *= 2;
  for (; half > 0; half /= 2) {
    __syncthreads();
    if (group < half && group + half < groups) {
      combine<Covariance>(mine, scratch.moments[thread + half * step], scale);
      scratch.moments[thread] = mine;
    }
    groups = half;
  }
}

template <bool Covariance, class S, int Width>
__global__ void __launch_bounds__(threads, blocks_at_once<S>)
    forward_kernel(Problem p, Moments<Arithmetic<S>>* partial) {
  using T = Arithmetic<S>;
  const Block block = block_of(p);
  const int thread = int(threadIdx.x);
  const int group = int(p.rows.by_count.quotient(thread)), row = thread - group * p.rows.count;
  const int groups = threads / p.rows.count;
  Moments<T> mine = no_voxels<T>();
  if (row < block.rows && group < groups) {
    const unsigned first = block.first + group * Width;
    mine = thread_moments<Covariance>(p, load<S, Width, loads<S, Width>>(p, block, row, first, groups * Width));
  }
  combine_groups<Covariance, T, threads>(mine, thread, groups, p.rows.count, T(p.beta * exponential_scale<T>));
  if (group == 0 && row < block.rows) partial[(block.row + row) * p.slabs + block.slab] = mine;
}

template <class T>
struct Outputs {
  T *mean, *peak, *covariance, *maximum, *total;
  int64_t* argmax;
};

__device__ __forceinline__ Moments<double> in_double(const Moments<float>& m) {
  Moments<double> w = {m.maximum, m.total, {m.mean[0], m.mean[1], m.mean[2]}, {}, m.argmax};
  for (int i = 0; i < 6; ++i) w.second[i] = m.second[i];
  return w;
}
__device__ __forceinline__ Moments<double> in_double(const Moments<double>& m) { return m; }

template <bool Covariance, class T>
__device__ __forceinline__ void write(const Outputs<T>& out, int64_t row, const Moments<double>& m,
                                      const Shape& shape) {
  // Nothing but -inf, or a NaN: nothing can be said of this row.
  const double nan = __builtin_nan(""), size[] = {double(shape.x), double(shape.y), double(shape.z)};
  const double total = m.total > 0 ? m.total : nan;
  for (int i = 0; i < 3; ++i) out.mean[3 * row + i] = T(m.total > 0 ? m.mean[i] + (size[i] - 1) / 2 : nan);
  out.peak[row] = T(1 / total);
  if constexpr (Covariance) {
    for (int i = 0, k = 0; i < 3; ++i)
      for (int j = i; j < 3; ++j, ++k)
        out.covariance[9 * row + 3 * i + j] = out.covariance[9 * row + 3 * j + i] = T(m.second[k] / total);
  }
  out.maximum[row] = T(m.maximum);
  out.total[row] = T(total);
  out.argmax[row] = m.argmax;
}

// One block a row: its slabs, in double.
template <bool Covariance, class T>
__global__ void __launch_bounds__(finish_threads) finish_kernel(const Moments<T>* partial, Problem p, Outputs<T> out) {
  const int thread = int(threadIdx.x);
  const int64_t row = blockIdx.x;
  const double scale = p.beta;
  Moments<double> mine = no_voxels<double>();
  for (unsigned slab = thread; slab < p.slabs; slab += finish_threads)
    combine<Covariance>(mine, in_double(partial[row * p.slabs + slab]), scale);
  combine_groups<Covariance, double, finish_threads>(mine, thread, finish_threads, 1, scale);
  if (thread == 0) write<Covariance>(out, row, mine, p.shape);
}

// ---- backward ----

// Saved by forward, and the gradients that come in; one entry a row, or 3, or 9. `grad_covariance` may be null.
template <class T>
struct Saved {
  const T *grad_mean, *grad_peak, *grad_covariance, *mean, *covariance, *maximum, *total;
  const int64_t* argmax;
};

template <class T>
__device__ __forceinline__ VolumeGradient<T> row_gradient(const Saved<T>& s, int64_t row, double beta) {
  const bool second = s.grad_covariance != nullptr;
  return volume_gradient(s.grad_mean + 3 * row, s.grad_peak[row], second ? s.grad_covariance + 9 * row : nullptr,
                         s.mean + 3 * row, second ? s.covariance + 9 * row : nullptr, s.maximum[row], s.total[row],
                         static_cast<long long>(s.argmax[row]), T(beta));
}

// Of Width voxels of a line, from `voxel` on.
template <class S, int Width>
__device__ __forceinline__ Pack<S, Width> gradient(const Shape& shape, const VolumeGradient<Arithmetic<S>>& g,
                                                   unsigned voxel, const Pack<S, Width>& logits, Arithmetic<S> scale) {
  using T = Arithmetic<S>;
  const Place at = place_of(shape, voxel);
  const LineGradient<T> line = line_gradient(g, T(at.x), T(at.y));
  const T start = T(at.z) - g.mean[2], reference = g.maximum;
  const unsigned peak_at = unsigned(g.argmax) - voxel;
  Pack<S, Width> result;
#pragma unroll
  for (int i = 0; i < Width; ++i) {
    const T e = exponential(softmax_exponent(widen(logits.values[i]), reference, scale));
    const T own = logit_gradient(e, start + T(i), line);
    result.values[i] = narrow<S>(unsigned(i) == peak_at ? own + g.peak : own);
  }
  return result;
}

// Rows whose voxels lie together.
template <class S, int Width>
__global__ void __launch_bounds__(threads, blocks_at_once<S>)
    backward_kernel(Problem p, Saved<Arithmetic<S>> saved, S* grad) {
  using T = Arithmetic<S>;
  const Block block = block_of(p);
  const Voxels<S, Width, backward_loads> v =
      load<S, Width, backward_loads>(p, block, 0, block.first + threadIdx.x * Width, threads * Width);
  VolumeGradient<T>& g = shared<VolumeGradient<T>>();
  if (threadIdx.x == 0) g = row_gradient(saved, block.row, p.beta);
  __syncthreads();
  const T scale = T(p.beta * exponential_scale<T>);
  S* target = grad + block.row * p.shape.voxels;
#pragma unroll
  for (int k = 0; k < v.count; ++k) {
    if (v.at(k) < block.end)
      *reinterpret_cast<Pack<S, Width>*>(target + v.at(k)) = gradient(p.shape, g, v.at(k), v.packs[k], scale);
  }
}

template <class S>
struct Tile {
  VolumeGradient<Arithmetic<S>> rows[most_rows];
  Pack<S, 1> logits[tile_bytes / sizeof(S) + most_rows];  // a row has an odd number of them, or banks would clash
};

// Any strides: a tile is read with its rows next to each other and written with its voxels next to each other.
template <class S>
__global__ void __launch_bounds__(threads, blocks_at_once<S>)
    backward_strided_kernel(Problem p, Saved<Arithmetic<S>> saved, S* grad, Divider by_slab) {
  using T = Arithmetic<S>;
  const Block block = block_of(p);
  Tile<S>& tile = shared<Tile<S>>();
  const unsigned step = p.slab | 1, count = p.slab * p.rows.count, thread = threadIdx.x;
  const S* source = static_cast<const S*>(p.logits) + block.offset;
#pragma unroll 4
  for (unsigned i = thread; i < count; i += threads) {
    const unsigned voxel = p.rows.by_count.quotient(i), row = i - voxel * p.rows.count;
    if (int(row) >= block.rows || block.first + voxel >= block.end) continue;
    const Place at = place_of(p.shape, block.first + voxel);
    tile.logits[row * step + voxel] = load_once(reinterpret_cast<const Pack<S, 1>*>(
        source + row * p.layout.joint + at.x * p.layout.x + at.y * p.layout.y + at.z * p.layout.z));
  }
  if (int(thread) < block.rows) tile.rows[thread] = row_gradient(saved, block.row + thread, p.beta);
  __syncthreads();
  const T scale = T(p.beta * exponential_scale<T>);
#pragma unroll 4
  for (unsigned i = thread; i < count; i += threads) {
    const unsigned row = by_slab.quotient(i), voxel = i - row * p.slab;
    if (int(row) >= block.rows || block.first + voxel >= block.end) continue;
    grad[(block.row + row) * p.shape.voxels + block.first + voxel] =
        gradient(p.shape, tile.rows[row], block.first + voxel, tile.logits[row * step + voxel], scale).values[0];
  }
}

// ---- host ----

Problem prepare(const Tensor& logits, double temperature) {
  STD_TORCH_CHECK(logits.dim() == 5, "logits: expected (N, J, X, Y, Z)");
  const int64_t joints = logits.size(1), x = logits.size(2), y = logits.size(3), z = logits.size(4);
  STD_TORCH_CHECK(joints > 0 && x > 0 && y > 0 && z > 0, "logits: expected no empty dimension but N");
  STD_TORCH_CHECK(
      x < most_voxels && y < most_voxels && z < most_voxels && x * y < most_voxels && x * y * z < most_voxels,
      "logits: expected fewer than 2^31 voxels in a volume");
  return {logits.const_data_ptr(),
          {logits.stride(0), logits.stride(1), logits.stride(2), logits.stride(3), logits.stride(4)},
          {int(x), int(y), int(z), unsigned(x * y * z), Divider(y), Divider(z)},
          {joints, joints, 1, Divider(1)},
          0,
          1,
          1.0 / temperature};
}

void divide(Problem& p, int64_t slab) {
  p.slab = unsigned(slab);
  p.slabs = unsigned(ceil_divide(p.shape.voxels, slab));
}

// As many keypoints side by side as make the blocks equal, where those lie closer together than voxels of a line.
void rows_side_by_side(Problem& p) {
  if (p.layout.z == 1 || p.shape.z == 1) return;
  p.rows.blocks = ceil_divide(p.rows.joints, most_rows);
  p.rows.count = int(ceil_divide(p.rows.joints, p.rows.blocks));
  p.rows.by_count = Divider(p.rows.count);
}

// Whether every row can be read 16 bytes at a time, none of them from two lines.
template <class S>
bool in_packs(const Problem& p, int64_t samples) {
  constexpr int width = Pack<S>::width;
  const Shape& s = p.shape;
  const Layout& l = p.layout;
  const bool together = (s.z == 1 || l.z == 1) && (s.y == 1 || l.y == s.z) && (s.x == 1 || l.x == int64_t(s.y) * s.z);
  const bool aligned = reinterpret_cast<uintptr_t>(p.logits) % 16 == 0 && (samples == 1 || l.sample % width == 0) &&
                       (p.rows.joints == 1 || l.joint % width == 0);
  return together && aligned && s.z % width == 0;
}

int64_t blocks(const Problem& p, int64_t samples) { return samples * p.rows.blocks * p.slabs; }

// f(S{}) for the storage type of the logits.
template <class F>
auto by_type(ScalarType type, F f) {
  switch (type) {
    case ScalarType::Float: return f(float{});
    case ScalarType::Double: return f(double{});
    case ScalarType::BFloat16: return f(bfloat16{});
    case ScalarType::Half: return f(float16{});
    default: STD_TORCH_CHECK(false, "logits: expected float32, float64, bfloat16 or float16");
  }
}

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <bool Covariance, class S, int Width>
void run_forward(const Tensor& logits, Problem p, const Outputs<Arithmetic<S>>& out) {
  using T = Arithmetic<S>;
  divide(p, int64_t(threads / p.rows.count) * loads<S, Width> * Width);
  const int64_t samples = logits.size(0), rows = samples * p.rows.joints;
  const Tensor scratch =
      torch::stable::new_empty(logits, {rows * int64_t(p.slabs) * int64_t(sizeof(Moments<T>))}, ScalarType::Byte);
  auto* partial = static_cast<Moments<T>*>(scratch.mutable_data_ptr());
  const OnDevice device(logits);
  device.launch(forward_kernel<Covariance, S, Width>, {blocks(p, samples), 1, 1, threads, 0}, p, partial);
  device.launch(finish_kernel<Covariance, T>, {rows, 1, 1, finish_threads, 0}, partial, p, out);
}

template <class S, int Width>
void run_forward(const Tensor& logits, const Problem& p, const Outputs<Arithmetic<S>>& out, bool covariance) {
  covariance ? run_forward<true, S, Width>(logits, p, out) : run_forward<false, S, Width>(logits, p, out);
}

Results soft_argmax3d(Tensor logits, double temperature, bool covariance) {
  Problem p = prepare(logits, temperature);
  const int64_t n = logits.size(0), j = p.rows.joints;
  return by_type(logits.scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    const ScalarType real = sizeof(T) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
    auto empty = [&](const std::vector<int64_t>& size, ScalarType type) {
      return torch::stable::new_empty(logits, size, type);
    };
    const std::vector<int64_t> matrix = covariance ? std::vector<int64_t>{n, j, 3, 3} : std::vector<int64_t>{0};
    Results r{empty({n, j, 3}, real), empty({n, j}, real), empty(matrix, real),
              empty({n, j}, real),    empty({n, j}, real), empty({n, j}, ScalarType::Long)};
    auto data = [](Tensor& tensor) { return static_cast<T*>(tensor.mutable_data_ptr()); };
    const Outputs<T> out = {data(std::get<0>(r)), data(std::get<1>(r)),
                            data(std::get<2>(r)), data(std::get<3>(r)),
                            data(std::get<4>(r)), static_cast<int64_t*>(std::get<5>(r).mutable_data_ptr())};
    if (in_packs<S>(p, n)) {
      run_forward<S, Pack<S>::width>(logits, p, out, covariance);
    } else {
      rows_side_by_side(p);
      run_forward<S, 1>(logits, p, out, covariance);
    }
    return r;
  });
}

template <class S>
void run_backward(const Tensor& logits, Problem p, const Saved<Arithmetic<S>>& saved, S* grad) {
  constexpr int width = Pack<S>::width;
  const int64_t samples = logits.size(0);
  const OnDevice device(logits);
  if (in_packs<S>(p, samples)) {
    divide(p, threads * backward_loads * width);
    device.launch(backward_kernel<S, width>, {blocks(p, samples), 1, 1, threads, 0}, p, saved, grad);
  } else {
    rows_side_by_side(p);
    divide(p, tile_bytes / int64_t(sizeof(S)) / p.rows.count);
    device.launch(backward_strided_kernel<S>, {blocks(p, samples), 1, 1, threads, 0}, p, saved, grad, Divider(p.slab));
  }
}

Tensor soft_argmax3d_backward(Tensor grad_mean, Tensor grad_peak, std::optional<Tensor> grad_covariance, Tensor logits,
                              double temperature, Tensor mean, Tensor covariance, Tensor maximum, Tensor total,
                              Tensor argmax) {
  const Problem p = prepare(logits, temperature);
  const int64_t rows = logits.size(0) * p.rows.joints;
  const Tensor grad =
      torch::stable::new_empty(logits, {logits.size(0), p.rows.joints, logits.size(2), logits.size(3), logits.size(4)});
  by_type(logits.scalar_type(), [&](auto storage) {
    using S = decltype(storage);
    using T = Arithmetic<S>;
    const ScalarType real = sizeof(T) == sizeof(double) ? ScalarType::Double : ScalarType::Float;
    std::vector<Tensor> kept;  // until the launch
    auto data = [&](const char* name, const Tensor& tensor, int64_t width) {
      kept.push_back(plain(name, tensor, real, width * rows, logits));
      return static_cast<const T*>(kept.back().const_data_ptr());
    };
    STD_TORCH_CHECK(argmax.scalar_type() == ScalarType::Long, "argmax: expected (N, J) int64");
    const Tensor places = plain("argmax", argmax, ScalarType::Long, rows, logits);
    const bool second = grad_covariance.has_value();
    const Saved<T> saved = {data("grad_mean", grad_mean, 3),
                            data("grad_peak", grad_peak, 1),
                            second ? data("grad_covariance", *grad_covariance, 9) : nullptr,
                            data("mean", mean, 3),
                            second ? data("covariance", covariance, 9) : nullptr,
                            data("maximum", maximum, 1),
                            data("total", total, 1),
                            static_cast<const int64_t*>(places.const_data_ptr())};
    run_backward<S>(logits, p, saved, static_cast<S*>(grad.mutable_data_ptr()));
  });
  return grad;
}

}  // namespace
}  // namespace bkind3d

BKIND3D_KERNELS(m) {
  m.impl("soft_argmax3d", TORCH_BOX(&bkind3d::soft_argmax3d));
  m.impl("soft_argmax3d_backward", TORCH_BOX(&bkind3d::soft_argmax3d_backward));
}
