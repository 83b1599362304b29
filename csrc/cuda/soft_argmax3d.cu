// 3D soft-argmax in CUDA: mean, peak and covariance of the voxel index under softmax(logits / temperature).
//
// Forward: a block takes a slab of one volume, 8,192 voxels where they lie together (2,048 of double). Each thread has
// its 32 in registers, up to 8 loads of 16 bytes on their way at once; it finds the largest, exponentiates relative to
// it and sums about its place, so that nothing cancels. The moments of the threads, then in a second small kernel those
// of the slabs, are merged in an order that depends on the shape alone: no atomics, the same bits each time. Backward:
// smaller slabs, one read and one write; along z the gradient is a weight times a polynomial. Other strides, channels
// last among them: a block takes up to 32 keypoints side by side, so that whole sectors are read, and backward turns a
// tile of 16 KB in shared memory. Saved for backward: the logits (an input) and the outputs.
//
// Bound by bytes: at (2, 30, 128, 128, 128) in float forward reads 503 MB, backward reads and writes as much each. A
// voxel takes 32 instructions forward, in bfloat16 31, and backward 47 and 33 (sm_90); with other strides 130.
// Measured on an H200 (benchmarks/results/2026-11-27-h200/times/results.csv, fine): forward 0.212 ms, backward 0.508,
// both in a training step 0.718. Of small volumes the time is that of the host's launches (docs/benchmarks.md).
#include "soft_argmax3d.h"

#include "../common/soft_argmax3d.h"
#include "launch.cuh"

namespace bkind3d {
namespace {

constexpr int threads = 256, finish_threads = 64;
constexpr int most_rows = 32;         // keypoints that a block takes side by side
constexpr int tile_bytes = 16 << 10;  // of backward with other strides

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

struct Coordinates {
  int x, y, z;
};

__device__ __forceinline__ Coordinates coordinates_of(const Shape& shape, unsigned voxel) {
  const unsigned line = quotient(shape.by_z, voxel), x = quotient(shape.by_y, line);
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
__device__ __forceinline__ S minus_infinity() {
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
        const Coordinates at = coordinates_of(p.shape, voxel);
        v.packs[k] = load_once(
            reinterpret_cast<const Pack<S, 1>*>(source + at.x * p.layout.x + at.y * p.layout.y + at.z * p.layout.z));
      }
    } else {
#pragma unroll
      for (int i = 0; i < Width; ++i) v.packs[k].values[i] = minus_infinity<S>();
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
  // The largest, and where it is.
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
  // Weights relative to it, and sums about it.
  const Coordinates origin = coordinates_of(p.shape, argmax);
  const T reference = softmax_reference(largest), scale = T(p.beta * exponential_scale<T>);
  Sums<T> sums;
#pragma unroll
  for (int k = 0; k < v.count; ++k) {
    const Coordinates at = coordinates_of(p.shape, v.at(k));
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
  // About the centre of the volume, where float has most digits.
  const T about_centre[] = {T(origin.x) - T(p.shape.x - 1) / 2, T(origin.y) - T(p.shape.y - 1) / 2,
                            T(origin.z) - T(p.shape.z - 1) / 2};
  return moments_of<Covariance>(sums, largest, about_centre, argmax);
}

template <class A, int Count>
struct ThreadMoments {
  Moments<A> moments[Count];
};

// Of `groups` threads, `step` apart from `thread` on, into the first of them. By all threads of a block.
template <bool Covariance, class A, int Count>
__device__ __forceinline__ void combine_groups(Moments<A>& mine, int thread, int groups, int step, A scale) {
  ThreadMoments<A, Count>& others = shared<ThreadMoments<A, Count>>();
  const int group = thread / step;
  others.moments[thread] = mine;
  int half = 1;
  while (2 * half < groups) half *= 2;
  for (; half > 0; half /= 2) {
    __syncthreads();
    if (group < half && group + half < groups) {
      combine<Covariance>(mine, others.moments[thread + half * step], scale);
      others.moments[thread] = mine;
    }
    groups = half;
  }
}

template <bool Covariance, class S, int Width>
__global__ void __launch_bounds__(threads, blocks_at_once<S>)
    forward_kernel(Problem p, Moments<Arithmetic<S>>* partial) {
  using T = Arithmetic<S>;
  // Which row and voxels.
  const Block block = block_of(p);
  const int thread = int(threadIdx.x);
  const int group = int(quotient(p.rows.by_count, thread)), row = thread - group * p.rows.count;
  const int groups = threads / p.rows.count;
  // Moments of the thread, then of the block.
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
  const Coordinates at = coordinates_of(shape, voxel);
  const LineGradient<T> line = line_gradient(g, T(at.x), T(at.y));
  const T start = T(at.z) - g.mean[2], reference = g.maximum;
  const unsigned peak_at = unsigned(g.argmax) - voxel;
  Pack<S, Width> result;
#pragma unroll
  for (int i = 0; i < Width; ++i) {
    const T e = exponential(softmax_exponent(widen(logits.values[i]), reference, scale));
    const T value = logit_gradient(e, start + T(i), line);
    result.values[i] = narrow<S>(unsigned(i) == peak_at ? value + g.peak : value);
  }
  return result;
}

// Rows whose voxels lie together.
template <class S, int Width>
__global__ void __launch_bounds__(threads, blocks_at_once<S>)
    backward_kernel(Problem p, Saved<Arithmetic<S>> saved, S* grad) {
  using T = Arithmetic<S>;
  // Voxels into registers, the row's coefficients into shared memory.
  const Block block = block_of(p);
  const Voxels<S, Width, backward_loads> v =
      load<S, Width, backward_loads>(p, block, 0, block.first + threadIdx.x * Width, threads * Width);
  VolumeGradient<T>& g = shared<VolumeGradient<T>>();
  if (threadIdx.x == 0) g = row_gradient(saved, block.row, p.beta);
  __syncthreads();
  // The gradient, a pack at a time.
  const T scale = T(p.beta * exponential_scale<T>);
  S* target = grad + block.row * p.shape.voxels;
#pragma unroll
  for (int k = 0; k < v.count; ++k) {
    if (v.at(k) < block.end)
      *reinterpret_cast<Pack<S, Width>*>(target + v.at(k)) = gradient(p.shape, g, v.at(k), v.packs[k], scale);
  }
}

template <class S>
struct Transposed {
  VolumeGradient<Arithmetic<S>> rows[most_rows];
  Pack<S, 1> logits[tile_bytes / sizeof(S) + most_rows];  // a row has an odd number of them, or banks would clash
};

// Any strides: a tile is read with its rows next to each other and written with its voxels next to each other.
template <class S>
__global__ void __launch_bounds__(threads, blocks_at_once<S>)
    backward_strided_kernel(Problem p, Saved<Arithmetic<S>> saved, S* grad, Divider by_slab) {
  using T = Arithmetic<S>;
  const Block block = block_of(p);
  Transposed<S>& transposed = shared<Transposed<S>>();
  const unsigned step = p.slab | 1, count = p.slab * p.rows.count, thread = threadIdx.x;
  const S* source = static_cast<const S*>(p.logits) + block.offset;
  // Rows next to each other in.
#pragma unroll 4
  for (unsigned i = thread; i < count; i += threads) {
    const unsigned voxel = quotient(p.rows.by_count, i), row = i - voxel * p.rows.count;
    if (int(row) >= block.rows || block.first + voxel >= block.end) continue;
    const Coordinates at = coordinates_of(p.shape, block.first + voxel);
    transposed.logits[row * step + voxel] = load_once(reinterpret_cast<const Pack<S, 1>*>(
        source + row * p.layout.joint + at.x * p.layout.x + at.y * p.layout.y + at.z * p.layout.z));
  }
  if (int(thread) < block.rows) transposed.rows[thread] = row_gradient(saved, block.row + thread, p.beta);
  __syncthreads();
  // Voxels next to each other out.
  const T scale = T(p.beta * exponential_scale<T>);
#pragma unroll 4
  for (unsigned i = thread; i < count; i += threads) {
    const unsigned row = quotient(by_slab, i), voxel = i - row * p.slab;
    if (int(row) >= block.rows || block.first + voxel >= block.end) continue;
    grad[(block.row + row) * p.shape.voxels + block.first + voxel] =
        gradient(p.shape, transposed.rows[row], block.first + voxel, transposed.logits[row * step + voxel], scale)
            .values[0];
  }
}

// ---- launches ----

Problem problem_of(const SoftArgmaxArgs& a) {
  const auto [x, y, z] = a.shape;
  return {a.logits,
          {a.strides[0], a.strides[1], a.strides[2], a.strides[3], a.strides[4]},
          {int(x), int(y), int(z), unsigned(x * y * z), Divider(y), Divider(z)},
          {a.joints, a.joints, 1, Divider(1)},
          0,
          1,
          a.beta};
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

template <int Value>
struct Constant {
  static constexpr int value = Value;
};

// f(Problem, width of a pack): with packs, where rows can be read in packs, or with rows side by side and width 1.
template <class S, class F>
void in_layout(const SoftArgmaxArgs& a, F f) {
  Problem p = problem_of(a);
  if (in_packs<S>(p, a.samples)) return f(p, Constant<Pack<S>::width>());
  rows_side_by_side(p);
  f(p, Constant<1>());
}

template <class S, int Width>
void divide_forward(Problem& p) {
  divide(p, int64_t(threads / p.rows.count) * loads<S, Width> * Width);
}

template <bool Covariance, class S, int Width>
void launch_forward(Stream stream, const Problem& p, int64_t samples, const Outputs<Arithmetic<S>>& out,
                    Moments<Arithmetic<S>>* partial) {
  launch(stream, {blocks(p, samples), threads}, forward_kernel<Covariance, S, Width>, p, partial);
  launch(stream, {samples * p.rows.joints, finish_threads}, finish_kernel<Covariance, Arithmetic<S>>, partial, p, out);
}

}  // namespace

int64_t soft_argmax3d_scratch(const SoftArgmaxArgs& args, Storage storage) {
  int64_t bytes = 0;
  by_storage(storage, [&](auto element) {
    using S = decltype(element);
    in_layout<S>(args, [&](Problem p, auto width) {
      divide_forward<S, width.value>(p);
      bytes = args.samples * args.joints * int64_t(p.slabs) * int64_t(sizeof(Moments<Arithmetic<S>>));
    });
  });
  return bytes;
}

void launch_soft_argmax3d(Stream stream, const SoftArgmaxArgs& args, Storage storage, const SoftArgmaxOutputs& o,
                          void* scratch) {
  by_storage(storage, [&](auto element) {
    using S = decltype(element);
    using T = Arithmetic<S>;
    const Outputs<T> out = {static_cast<T*>(o.mean),    static_cast<T*>(o.peak),  static_cast<T*>(o.covariance),
                            static_cast<T*>(o.maximum), static_cast<T*>(o.total), o.argmax};
    auto* partial = static_cast<Moments<T>*>(scratch);
    in_layout<S>(args, [&](Problem p, auto width) {
      divide_forward<S, width.value>(p);
      o.covariance ? launch_forward<true, S, width.value>(stream, p, args.samples, out, partial)
                   : launch_forward<false, S, width.value>(stream, p, args.samples, out, partial);
    });
  });
}

void launch_soft_argmax3d_backward(Stream stream, const SoftArgmaxArgs& args, Storage storage, const SoftArgmaxSaved& s,
                                   void* grad) {
  by_storage(storage, [&](auto element) {
    using S = decltype(element);
    using T = Arithmetic<S>;
    auto numbers = [](const void* data) { return static_cast<const T*>(data); };
    const Saved<T> saved = {numbers(s.grad_mean),  numbers(s.grad_peak), numbers(s.grad_covariance), numbers(s.mean),
                            numbers(s.covariance), numbers(s.maximum),   numbers(s.total),           s.argmax};
    in_layout<S>(args, [&](Problem p, auto width) {
      if constexpr (width.value > 1) {
        divide(p, threads * backward_loads * width.value);
        launch(stream, {blocks(p, args.samples), threads}, backward_kernel<S, width.value>, p, saved,
               static_cast<S*>(grad));
      } else {
        divide(p, tile_bytes / int64_t(sizeof(S)) / p.rows.count);
        launch(stream, {blocks(p, args.samples), threads}, backward_strided_kernel<S>, p, saved, static_cast<S*>(grad),
               Divider(p.slab));
      }
    });
  });
}

}  // namespace bkind3d
