// 3D soft-argmax on the CPU: the loops, compiled once per instruction set.
//
// Forward goes over a row in blocks of about 1,000 voxels (4 KB, in the first-level cache): their maximum, where it is,
// then their exponentials and the sums about that voxel in vectors of float, merged into the slab's moments in double.
// Where the maximum has grown, the moments so far are scaled down, so memory is read once. Backward recomputes the
// exponentials from the maximum; along a line the rest of the gradient is a polynomial of degree 2 in z. Threads take
// slabs of about 32,000 voxels of a row; the torch face merges the slabs of a row in their order. Saved for backward:
// the logits (an input) and the outputs.
//
// Bytes for V voxels of float: 4 V read forward, 4 V read and 4 V written backward, past the caches when large. Forward
// a voxel takes 16 to 18 operations on vectors, 10 of them for the exponential.
// Measured, 2 threads with AVX-512, 2 x 15 volumes of 64^3: forward 2.91 ms, backward 2.04, both 4.20
// (benchmarks/results/2026-11-26-cpu-bars/results.csv, paper).
#include "simd.h"
#include "soft_argmax3d.h"
#include "softmax.h"
#include "stream.h"

namespace bkind3d {
namespace BKIND3D_ISA {
namespace {

constexpr int block_voxels = 1024;

// ---- where a block is and how its lines are walked ----

struct Block {
  int64 x, y, z, lines, length;  // of its first voxel; a line of it has `length` voxels
  int64 size_y;
};

BKIND3D_FN Block block_at(const SoftArgmaxArgs& a, int64 index) {
  const int64 line = a.segments > 1 ? index / a.segments : index * a.lines_per_block;
  const int64 z = a.segments > 1 ? index % a.segments * a.segment : 0;
  const int64 lines = a.shape[0] * a.shape[1] - line, length = a.shape[2] - z;
  return {line / a.shape[1],
          line % a.shape[1],
          z,
          lines < a.lines_per_block ? lines : a.lines_per_block,
          length < a.segment ? length : a.segment,
          a.shape[1]};
}

BKIND3D_FN int64 offset_of(const SoftArgmaxArgs& a, int64 x, int64 y, int64 z) {
  return (x * a.shape[1] + y) * a.shape[2] + z;
}

// Voxels of one line lie together: at p that of the block's first line, `step_y` and `step_x` from line to line.
template <class S>
struct Lines {
  const S* p;
  int64 step_y, step_x;
};

// f(pointer, x, y) for each line of a block.
template <class S, class F>
BKIND3D_FN void for_each_line(const Block& b, Lines<S> lines, F f) {
  int64 x = b.x, y = b.y;
  const S* p = lines.p;
  for (int64 i = 0; i < b.lines; ++i) {
    f(p, x, y);
    p += lines.step_y;
    if (++y == b.size_y) {
      p += lines.step_x - y * lines.step_y;
      y = 0;
      ++x;
    }
  }
}

// The vectors of a line: whole ones from its start, then one more for the rest, which overlaps the last whole one where
// there is one. `fresh` are the lanes of it that are voxels and have not been visited.
template <class T>
struct Span {
  int whole, last;
  ivec<T> fresh;
};

template <class T>
BKIND3D_FN Span<T> span_of(int64 length) {
  constexpr int n = lanes<T>;
  const int count = int(length), rest = count % n;
  const ivec<T> fresh = count < n ? iota<T>() < T(count) : iota<T>() >= T(n - rest);
  return {count - rest, rest == 0 ? -1 : count < n ? 0 : count - n, fresh};
}

template <class T, class S>
BKIND3D_FN vec<T> load_last(const Span<T>& span, const S* p, int64 length) {
  return length < lanes<T> ? load_first<T>(p, int(length)) : load(p + span.last);
}

// ---- rows whose voxels do not lie together (channels last): one block of several rows at a time, transposed ----

constexpr int tile_rows = 16, tile_step = block_voxels + 64;  // a step of a power of 2 would meet in few cache sets

template <class S>
struct Transposed {
  alignas(64) S voxels[tile_rows * tile_step];
};

BKIND3D_FN int64 row_offset(const SoftArgmaxArgs& a, int64 row) {
  return row / a.joints * a.strides[0] + row % a.joints * a.strides[1];
}

template <class S>
BKIND3D_FN void gather(const SoftArgmaxArgs& a, const Block& b, int64 row, int64 rows, Transposed<S>& transposed) {
  constexpr int64 run = 64;  // voxels, of which all rows are read while they are in the first-level cache
  const int64 step = a.strides[4], joint = a.strides[1];
  S* out = transposed.voxels;
  const S* first = (const S*)a.logits + row_offset(a, row) + b.x * a.strides[2] + b.y * a.strides[3] + b.z * step;
  for_each_line(b, Lines<S>{first, a.strides[3], a.strides[2]}, [&](const S* p, int64, int64) {
    for (int64 z = 0; z < b.length; z += run) {
      const int64 end = z + run < b.length ? z + run : b.length;
      for (int64 r = 0; r < rows; ++r) {
        const S* source = p + r * joint;
        for (int64 i = z; i < end; ++i) out[r * tile_step + i] = source[i * step];
      }
    }
    out += b.length;
  });
}

// f(block, row, its lines) for all blocks of a task, and for each of them its rows.
template <class S, class F>
BKIND3D_FN void for_each_block(const SoftArgmaxArgs& a, int64 task, F f) {
  Transposed<S> transposed;
  const bool together = a.strides[4] == 1;
  const int64 first_row = task / a.slabs * a.rows_per_task, end_row = first_row + a.rows_per_task;
  const int64 first = task % a.slabs * a.blocks_per_slab;
  const int64 end = first + a.blocks_per_slab < a.blocks ? first + a.blocks_per_slab : a.blocks;
  for (int64 i = first; i < end; ++i) {
    const Block b = block_at(a, i);
    for (int64 row = first_row; row < end_row; ++row) {
      const int64 at = (row - first_row) % tile_rows, rest = end_row - row;
      if (!together && at == 0) gather(a, b, row, rest < tile_rows ? rest : tile_rows, transposed);
      const S* p = (const S*)a.logits + row_offset(a, row) + b.x * a.strides[2] + b.y * a.strides[3] + b.z;
      f(b, row,
        together ? Lines<S>{p, a.strides[3], a.strides[2]}
                 : Lines<S>{transposed.voxels + at * tile_step, b.length, b.length * b.size_y});
    }
  }
}

// ---- forward ----

// The largest logit of a block; NaNs are passed over, to come back as NaN in the sums.
template <class T, class S>
BKIND3D_FN T block_maximum(const Block& b, const Lines<S>& lines, const Span<T>& span) {
  const vec<T> lowest = broadcast(T(-__builtin_inf()));
  vec<T> best = lowest;
  for_each_line(b, lines, [&](const S* p, int64, int64) {
    for (int z = 0; z < span.whole; z += lanes<T>) best = max_of(best, load(p + z));
    if (span.last >= 0) best = max_of(best, select(span.fresh, load_last(span, p, b.length), lowest));
  });
  return maximum_of(best);
}

struct Coordinates {
  int64 x, y, z;
};

// The first voxel with this logit; the block's first voxel where all are NaN.
template <class T, class S>
BKIND3D_FN Coordinates find(const Block& b, const Lines<S>& lines, const Span<T>& span, T logit) {
  int64 x = b.x, y = b.y;
  const S* p = lines.p;
  for (int64 i = 0; i < b.lines; ++i) {
    for (int z = 0; z < span.whole; z += lanes<T>) {
      const int lane = first_lane(load(p + z) == logit);
      if (lane >= 0) return {x, y, b.z + z + lane};
    }
    if (span.last >= 0) {
      const int lane = first_lane((load_last(span, p, b.length) == logit) & span.fresh);
      if (lane >= 0) return {x, y, b.z + span.last + lane};
    }
    p += lines.step_y;
    if (++y == b.size_y) {
      p += lines.step_x - y * lines.step_y;
      y = 0;
      ++x;
    }
  }
  return {b.x, b.y, b.z};
}

template <bool Covariance, class T>
BKIND3D_FN Sums<double> reduce(const Sums<vec<T>>& sums) {
  Sums<double> r;
  r.total = sum_of(sums.total);
  for (int i = 0; i < 3; ++i) r.first[i] = sum_of(sums.first[i]);
  if constexpr (Covariance)
    for (int i = 0; i < 6; ++i) r.second[i] = sum_of(sums.second[i]);
  return r;
}

template <bool Covariance, class T, class S>
BKIND3D_FN Sums<double> block_sums(const Block& b, const Lines<S>& lines, const Span<T>& span, T reference, T scale,
                                   const Coordinates& origin) {
  Sums<vec<T>> sums;
  const vec<T> start = iota<T>() + T(b.z - origin.z);
  for_each_line(b, lines, [&](const S* p, int64 x, int64 y) {
    vec<T> total{}, first{}, second{}, dz = start;
    auto add = [&](vec<T> e, vec<T> d) {
      const vec<T> product = e * d;
      total += e;
      first += product;
      if constexpr (Covariance) second += product * d;
    };
    for (int z = 0; z < span.whole; z += lanes<T>) {
      add(weight_of(load(p + z), reference, scale), dz);
      dz += T(lanes<T>);
    }
    if (span.last >= 0) {
      const vec<T> e = weight_of(load_last(span, p, b.length), reference, scale);
      add(select(span.fresh, e, vec<T>{}), start + T(span.last));
    }
    add_line<Covariance>(sums, total, first, second, T(x - origin.x), T(y - origin.y));
  });
  return reduce<Covariance, T>(sums);
}

template <bool Covariance, class T, class S>
BKIND3D_FN void forward_block(const SoftArgmaxArgs& a, const Block& b, const Lines<S>& lines,
                              Moments<double>& moments) {
  // Maximum, and where it is.
  const Span<T> span = span_of<T>(b.length);
  const T largest = block_maximum<T>(b, lines, span);
  const Coordinates largest_at = find(b, lines, span, largest);
  // Sums about that voxel, relative to the slab's maximum so far.
  const T maximum = largest > T(moments.maximum) ? largest : T(moments.maximum);
  const T reference = softmax_reference(maximum), scale = exponent_scale(T(), a.beta);
  const Sums<double> sums = block_sums<Covariance>(b, lines, span, reference, scale, largest_at);
  // Into the slab's moments.
  const double origin[] = {double(largest_at.x), double(largest_at.y), double(largest_at.z)};
  merge<Covariance>(
      moments,
      moments_of<Covariance>(sums, double(maximum), origin, offset_of(a, largest_at.x, largest_at.y, largest_at.z)),
      a.beta, [](double x) { return __builtin_exp(x); });
}

template <bool Covariance, class T, class S>
void forward_task(const SoftArgmaxArgs& a, int64 task) {
  const int64 row = task / a.slabs * a.rows_per_task, slab = task % a.slabs;
  for (int64 r = row; r < row + a.rows_per_task; ++r) a.moments[r * a.slabs + slab] = no_voxels<double>();
  for_each_block<S>(a, task, [&](const Block& b, int64 r, const Lines<S>& lines) {
    forward_block<Covariance, T>(a, b, lines, a.moments[r * a.slabs + slab]);
  });
}

template <class T, class S>
void forward(const SoftArgmaxArgs& a, int64 task) {
  a.covariance ? forward_task<true, T, S>(a, task) : forward_task<false, T, S>(a, task);
}

// ---- backward ----

template <class T, class S>
BKIND3D_FN void backward_block(const SoftArgmaxArgs& a, const Block& b, const Lines<S>& lines,
                               const VolumeGradient<double>& volume, S* out) {
  const Span<T> span = span_of<T>(b.length);
  const T reference = T(volume.maximum), scale = exponent_scale(T(), a.beta);
  const vec<T> start = iota<T>() + T(b.z) - T(volume.mean[2]);
  S* q = out;
  for_each_line(b, lines, [&](const S* p, int64 x, int64 y) {
    const LineGradient<double> exact = line_gradient(volume, double(x), double(y));
    const LineGradient<T> line = {T(exact.constant), T(exact.linear), T(exact.quadratic)};
    auto gradient = [&](vec<T> logit, int z) {
      return logit_gradient(weight_of(logit, reference, scale), start + T(z), line);
    };
    for (int z = 0; z < span.whole; z += lanes<T>) store(q + z, gradient(load(p + z), z));
    if (span.last >= 0) {
      const vec<T> g = gradient(load_last(span, p, b.length), span.last);
      if (b.length < lanes<T>) {
        store_first(q, g, int(b.length));
      } else {
        store(q + span.last, g);
      }
    }
    q += b.length;
  });
  // The gradient of the peak, once more at the argmax, where the weight is 1.
  const int64 at = volume.argmax - offset_of(a, b.x, b.y, b.z);
  if (at >= 0 && at < b.lines * b.length) {
    const int64 x = volume.argmax / a.shape[2] / a.shape[1], y = volume.argmax / a.shape[2] % a.shape[1];
    const LineGradient<double> line = line_gradient(volume, double(x), double(y));
    const double dz = double(volume.argmax % a.shape[2]) - volume.mean[2];
    store_first(out + at, broadcast(T(logit_gradient(1.0, dz, line) + volume.peak)), 1);
  }
}

template <class T, class S>
void backward(const SoftArgmaxArgs& a, int64 task) {
  alignas(64) S result[block_voxels];
  const int64 voxels = a.shape[0] * a.shape[1] * a.shape[2];
  for_each_block<S>(a, task, [&](const Block& b, int64 row, const Lines<S>& lines) {
    S* out = (S*)a.grad + row * voxels + offset_of(a, b.x, b.y, b.z);
    backward_block<T>(a, b, lines, a.volumes[row], a.stream ? result : out);
    if (a.stream) copy_past_caches((char*)out, (const char*)result, b.lines * b.length * int64(sizeof(S)));
  });
  if (a.stream) finish_copies();
}

}  // namespace

extern const SoftArgmaxLoops soft_argmax3d_loops;
const SoftArgmaxLoops soft_argmax3d_loops = {
    {forward<float, float>, forward<double, double>, forward<float, bfloat16>, forward<float, float16>},
    {backward<float, float>, backward<double, double>, backward<float, bfloat16>, backward<float, float16>},
};

}  // namespace BKIND3D_ISA
}  // namespace bkind3d
