// A linear map with a 3D soft-argmax on the CPU: the loops, compiled once per instruction set.
//
// A tile is some hundred voxels with their C features and their J logits, side by side in vectors over the joints: both
// lie in the first-level cache. Forward makes the logits by a matrix product in registers, takes each joint's maximum,
// and adds weights and moments about the largest voxel in vectors of float, which go into the slab's moments in double
// about every 1,000 voxels. Backward makes the logits again, turns them into their gradient in place (the weight times
// a polynomial of z), and takes two more products: with the weight, for the gradient of the features, and with the
// features, for that of the weight. Threads take slabs of about 16,000 voxels; the torch face merges them in order. The
// logits and their gradient are never in memory. Saved for backward: the inputs and outputs.
//
// For V voxels of float: 4 V C bytes read forward, 2 V C J operations of the product and 16 to 18 V J of the softmax;
// backward 4 V C bytes read, 4 V C written, 6 V C J operations and as many of the softmax.
// Measured, 2 threads with AVX-512, 2 x 64^3 voxels, C = 32, J = 15: forward 8.11 ms, backward 20.4, both 28.6
// (benchmarks/results/2026-11-26-cpu-bars/results.csv, paper).
#include "simd.h"
#include "linear_soft_argmax3d.h"
#include "softmax.h"
#include "stream.h"

namespace bkind3d {
namespace BKIND3D_ISA {
namespace {

constexpr int block_voxels = 1024;  // summed in T before they go into moments in double
constexpr int rows_at_once = register_bytes == 64 ? 8 : 4;

// Rows and columns of every product are multiples of this.
template <class T>
constexpr int step_of = lanes<T> < 8 ? 8 : lanes<T>;

BKIND3D_FN int64 round_up(int64 a, int64 step) { return (a + step - 1) / step * step; }

// ---- products ----

// out[r][v] = start[r][v] + sum over k of left[r][k] right[k][v]
template <class T>
struct Product {
  const T* left;
  int64 left_row, left_step;  // left[r][k] is at r left_row + k left_step
  const T* right;
  int64 right_step;
  const T* start;
  int64 start_step;  // 0: one row for all
  T* out;
  int64 out_step;
  int64 rows, depth, width;
};

template <int Vectors, class T>
BKIND3D_FN void product_block(const Product<T>& p, int64 row, int64 column) {
  vec<T> sum[rows_at_once][Vectors];
  const T *left = p.left + row * p.left_row, *right = p.right + column;
  for (int r = 0; r < rows_at_once; ++r)
    for (int v = 0; v < Vectors; ++v) sum[r][v] = load(p.start + (row + r) * p.start_step + column + v * lanes<T>);
  for (int64 k = 0; k < p.depth; ++k, left += p.left_step, right += p.right_step) {
    vec<T> factor[Vectors];
    for (int v = 0; v < Vectors; ++v) factor[v] = load(right + v * lanes<T>);
    for (int r = 0; r < rows_at_once; ++r) {
      const vec<T> x = broadcast(left[r * p.left_row]);
      for (int v = 0; v < Vectors; ++v) sum[r][v] += x * factor[v];
    }
  }
  for (int r = 0; r < rows_at_once; ++r)
    for (int v = 0; v < Vectors; ++v) store(p.out + (row + r) * p.out_step + column + v * lanes<T>, sum[r][v]);
}

template <class T>
void multiply(const Product<T>& p) {
  int64 column = 0;
  for (; column + 2 * lanes<T> <= p.width; column += 2 * lanes<T>)
    for (int64 row = 0; row < p.rows; row += rows_at_once) product_block<2>(p, row, column);
  if (column < p.width)
    for (int64 row = 0; row < p.rows; row += rows_at_once) product_block<1>(p, row, column);
}

// ---- tiles ----

// Per lane, that is per joint, `joint_step` of each.
template <class T>
struct Lanes {
  T* maximum;                                   // forward: the largest logit so far; backward: the reference
  T *origin[3], *total, *first[3], *second[6];  // forward: the sums and the voxel about which they are
  T* line[3];                                   // backward: LineGradient
  double *mean[3], *constant, *linear[3], *quadratic[6];
};

template <class T>
struct Scratch {
  T *features, *logits, *gradient, *zeros;
  void *gathered, *result;  // in the type of the features
  int64* argmax;            // voxel of the largest logit
  Lanes<T> lane;
};

template <class T, class S>
BKIND3D_FN int64 lay_out(const LinearSoftArgmaxArgs& a, void* memory, Scratch<T>& s) {
  char* p = (char*)memory;
  auto take = [&](int64 bytes) {
    char* here = p;
    p += round_up(bytes, 64) + 64;  // a vector may end beyond the last row
    return here;
  };
  auto joints = [&](auto*& target) { target = (decltype(+target))take(a.joint_step * sizeof(*target)); };
  s.features = (T*)take(a.tile * a.channel_step * sizeof(T));
  s.logits = (T*)take(a.tile * a.joint_step * sizeof(T));
  s.gradient = (T*)take(a.tile * a.channel_step * sizeof(T));
  s.zeros = (T*)take(a.channel_step * sizeof(T));
  s.gathered = take(a.tile * a.channels * sizeof(S));
  s.result = take(a.tile * a.channels * sizeof(S));
  joints(s.argmax);
  joints(s.lane.maximum);
  joints(s.lane.total);
  joints(s.lane.constant);
  for (int i = 0; i < 3; ++i) {
    joints(s.lane.origin[i]);
    joints(s.lane.first[i]);
    joints(s.lane.line[i]);
    joints(s.lane.mean[i]);
    joints(s.lane.linear[i]);
  }
  for (int i = 0; i < 6; ++i) {
    joints(s.lane.second[i]);
    joints(s.lane.quadratic[i]);
  }
  return p - (char*)memory;
}

// f(offset, x, y, z, count) for each run along z of `count` voxels from `first` on.
template <class F>
BKIND3D_FN void for_each_run(const LinearSoftArgmaxArgs& a, int64 first, int64 count, F f) {
  int64 z = first % a.shape[2], y = first / a.shape[2] % a.shape[1], x = first / a.shape[2] / a.shape[1];
  for (int64 done = 0; done < count;) {
    const int64 rest = a.shape[2] - z, length = rest < count - done ? rest : count - done;
    f(done, x, y, z, length);
    done += length;
    z = 0;
    if (++y == a.shape[1]) y = 0, ++x;
  }
}

// The features of voxels as rows of T.
template <class T>
struct FeatureRows {
  const T* p;
  int64 step;
};

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

// Whether voxels follow one another at even distances, each with its channels together.
BKIND3D_FN bool is_channels_last(const LinearSoftArgmaxArgs& a) {
  return a.strides[1] == 1 && (a.shape[1] == 1 || a.strides[3] == a.shape[2] * a.strides[4]) &&
         (a.shape[0] == 1 || a.strides[2] == a.shape[1] * a.shape[2] * a.strides[4]);
}

template <class T, class S>
BKIND3D_FN void widen(const S* source, int64 step, int64 channels, T* out, int64 out_step, int64 count) {
  const int64 whole = channels / lanes<T> * lanes<T>;
  for (int64 v = 0; v < count; ++v, source += step, out += out_step) {
    int64 c = 0;
    for (; c < whole; c += lanes<T>) store(out + c, load(source + c));
    if (c < channels) store(out + c, load_first<T>(source + c, int(channels - c))), c += lanes<T>;
    for (; c < out_step; c += lanes<T>) store(out + c, vec<T>{});
  }
}

// A tile's features: in place where they can be, else in scratch with zeros up to the steps.
template <class T, class S>
BKIND3D_FN FeatureRows<T> features_of(const LinearSoftArgmaxArgs& a, int64 n, int64 first, int64 count, bool padded,
                                      Scratch<T>& s) {
  const S* sample = (const S*)a.features + n * a.strides[0];
  const bool last = is_channels_last(a);
  if constexpr (same<T, S>)
    if (last && count % step_of<T> == 0 && (!padded || a.channels == a.channel_step))
      return {sample + first * a.strides[4], a.strides[4]};
  for (int64 i = count * a.channel_step; i < round_up(count, step_of<T>) * a.channel_step; ++i) s.features[i] = 0;
  for_each_run(a, first, count, [&](int64 offset, int64 x, int64 y, int64 z, int64 length) {
    const S* p = sample + x * a.strides[2] + y * a.strides[3] + z * a.strides[4];
    T* out = s.features + offset * a.channel_step;
    if (a.strides[1] == 1) return widen(p, a.strides[4], a.channels, out, a.channel_step, length);
    S* gathered = (S*)s.gathered;
    for (int64 c = 0; c < a.channels; ++c)
      for (int64 i = 0; i < length; ++i) gathered[i * a.channels + c] = p[c * a.strides[1] + i * a.strides[4]];
    widen(gathered, a.channels, a.channels, out, a.channel_step, length);
  });
  return {s.features, a.channel_step};
}

template <class T>
void make_logits(const LinearSoftArgmaxArgs& a, const FeatureRows<T>& h, int64 count, Scratch<T>& s) {
  multiply<T>({h.p, h.step, 1, (const T*)a.columns, a.joint_step, (const T*)a.bias, 0, s.logits, a.joint_step,
               round_up(count, step_of<T>), a.channels, a.joint_step});
}

template <class T>
BKIND3D_FN vec<T> reference_of(vec<T> maximum) {
  return select(maximum == broadcast(T(-__builtin_inf())), vec<T>{}, maximum);
}

// ---- forward ----

// Takes a joint's sums into its moments, and leaves none.
template <bool Covariance, class T>
void flush(const LinearSoftArgmaxArgs& a, Scratch<T>& s, int64 j, Moments<double>& moments) {
  const Lanes<T>& l = s.lane;
  Sums<double> sums;
  double origin[3];
  sums.total = l.total[j];
  for (int i = 0; i < 3; ++i) sums.first[i] = l.first[i][j], origin[i] = l.origin[i][j], l.first[i][j] = 0;
  for (int i = 0; Covariance && i < 6; ++i) sums.second[i] = l.second[i][j], l.second[i][j] = 0;
  l.total[j] = 0;
  if (sums.total == 0) return;
  merge<Covariance>(moments, moments_of<Covariance>(sums, double(l.maximum[j]), origin, s.argmax[j]), a.beta,
                    [](double x) { return __builtin_exp(x); });
}

BKIND3D_FN int64 clamp(int64 x, int64 low, int64 high) { return x < low ? low : x > high ? high : x; }

// The origin of a joint's sums: its largest voxel, or what lies nearest to it in the block of voxels to come.
template <class T>
BKIND3D_FN void set_origin(const LinearSoftArgmaxArgs& a, Scratch<T>& s, int64 j, int64 first, int64 last) {
  const int64 size_y = a.shape[1], size_z = a.shape[2], voxel = s.argmax[j];
  const int64 first_line = first / size_z, last_line = last / size_z;
  const bool plane = first_line / size_y == last_line / size_y, line = first_line == last_line;
  s.lane.origin[0][j] = T(clamp(voxel / size_z / size_y, first_line / size_y, last_line / size_y));
  s.lane.origin[1][j] =
      T(plane ? clamp(voxel / size_z % size_y, first_line % size_y, last_line % size_y) : voxel / size_z % size_y);
  s.lane.origin[2][j] = T(line ? clamp(voxel % size_z, first % size_z, last % size_z) : voxel % size_z);
}

// The largest logits of the tile. Where one is larger than all before, the joint begins anew, about that voxel.
template <bool Covariance, class T>
void find_maxima(const LinearSoftArgmaxArgs& a, Scratch<T>& s, int64 first, int64 count, Moments<double>* moments) {
  for (int64 column = 0; column < a.joint_step; column += lanes<T>) {
    const T* logits = s.logits + column;
    const vec<T> before = load(s.lane.maximum + column);
    vec<T> best = before;  // a NaN is passed over, to come back in the sums
    for (int64 v = 0; v < count; ++v) best = max_of(best, load(logits + v * a.joint_step));
    if (first_lane(best > before) < 0) continue;
    for (int lane = 0; lane < lanes<T>; ++lane) {
      const int64 j = column + lane;
      if (!(best[lane] > before[lane]) || j >= a.joints) continue;
      flush<Covariance>(a, s, j, moments[j * a.slabs]);
      int64 at = 0;
      while (logits[at * a.joint_step + lane] != best[lane]) ++at;
      s.lane.maximum[j] = best[lane];
      s.argmax[j] = first + at;
      set_origin(a, s, j, first, first + count - 1);
    }
  }
}

template <bool Covariance, class T>
void add_weights(const LinearSoftArgmaxArgs& a, Scratch<T>& s, int64 first, int64 count) {
  const Lanes<T>& l = s.lane;
  const vec<T> scale = broadcast(exponent_scale(T(), a.beta));
  for (int64 column = 0; column < a.joint_step; column += lanes<T>) {
    const vec<T> reference = reference_of<T>(load(l.maximum + column));
    Sums<vec<T>> sums;
    sums.total = load(l.total + column);
    for (int i = 0; i < 3; ++i) sums.first[i] = load(l.first[i] + column);
    for (int i = 0; Covariance && i < 6; ++i) sums.second[i] = load(l.second[i] + column);
    for_each_run(a, first, count, [&](int64 offset, int64 x, int64 y, int64 z, int64 length) {
      const T* logits = s.logits + offset * a.joint_step + column;
      vec<T> line{}, line_first{}, line_second{}, dz = T(z) - load(l.origin[2] + column);
      for (int64 v = 0; v < length; ++v, dz += T(1)) {
        const vec<T> e = weight_of(load(logits + v * a.joint_step), reference, scale), product = e * dz;
        line += e;
        line_first += product;
        if constexpr (Covariance) line_second += product * dz;
      }
      add_line<Covariance>(sums, line, line_first, line_second, vec<T>(T(x) - load(l.origin[0] + column)),
                           vec<T>(T(y) - load(l.origin[1] + column)));
    });
    store(l.total + column, sums.total);
    for (int i = 0; i < 3; ++i) store(l.first[i] + column, sums.first[i]);
    for (int i = 0; Covariance && i < 6; ++i) store(l.second[i] + column, sums.second[i]);
  }
}

template <bool Covariance, class T, class S>
BKIND3D_FN void forward_task(const LinearSoftArgmaxArgs& a, int64 task, Scratch<T>& s) {
  const int64 n = task / a.slabs, begin = task % a.slabs * a.slab, size = a.shape[0] * a.shape[1] * a.shape[2];
  const int64 end = begin + a.slab < size ? begin + a.slab : size, block = round_up(block_voxels, a.tile);
  Moments<double>* moments = a.moments + n * a.joints * a.slabs + task % a.slabs;  // of joint j at j slabs
  // No voxels yet.
  for (int64 j = 0; j < a.joint_step; ++j) {
    s.lane.maximum[j] = -T(__builtin_inf());
    s.lane.total[j] = 0;
    s.argmax[j] = begin;
    for (int i = 0; i < 3; ++i) s.lane.first[i][j] = s.lane.origin[i][j] = 0;
    for (int i = 0; i < 6; ++i) s.lane.second[i][j] = 0;
  }
  for (int64 j = 0; j < a.joints; ++j) moments[j * a.slabs] = no_voxels<double>();
  for (int64 first = begin; first < end; first += a.tile) {
    const int64 count = a.tile < end - first ? a.tile : end - first;
    // A block is done: its sums go into moments.
    if ((first - begin) % block == 0) {
      const int64 last = (first + block < end ? first + block : end) - 1;
      for (int64 j = 0; j < a.joints; ++j) {
        flush<Covariance>(a, s, j, moments[j * a.slabs]);
        set_origin(a, s, j, first, last);
      }
    }
    // Logits, maxima, weights.
    make_logits(a, features_of<T, S>(a, n, first, count, false, s), count, s);
    find_maxima<Covariance>(a, s, first, count, moments);
    add_weights<Covariance>(a, s, first, count);
  }
  for (int64 j = 0; j < a.joints; ++j) flush<Covariance>(a, s, j, moments[j * a.slabs]);
}

template <class T, class S>
void forward(const LinearSoftArgmaxArgs& a, int64 task, void* memory) {
  Scratch<T> s;
  lay_out<T, S>(a, memory, s);
  a.covariance ? forward_task<true, T, S>(a, task, s) : forward_task<false, T, S>(a, task, s);
}

// ---- backward ----

// Lanes of double beside those of T: half as many in a register.
BKIND3D_FN void store_narrow(float* p, vec<double> v) {
  using Half = vector_of<float, lanes<double>>;
  *(typename Half::unaligned*)p = __builtin_convertvector(v, typename Half::type);
}
BKIND3D_FN void store_narrow(double* p, vec<double> v) { store(p, v); }

template <class T>
void load_volumes(const LinearSoftArgmaxArgs& a, int64 n, Scratch<T>& s) {
  const Lanes<T>& l = s.lane;
  for (int64 j = 0; j < a.joint_step; ++j) {
    VolumeGradient<double> v{};
    if (j < a.joints) v = a.volumes[n * a.joints + j];
    l.maximum[j] = T(v.maximum);
    l.constant[j] = v.constant;
    for (int i = 0; i < 3; ++i) l.mean[i][j] = v.mean[i], l.linear[i][j] = v.linear[i];
    for (int i = 0; i < 6; ++i) l.quadratic[i][j] = v.quadratic[i];
  }
}

// What is left of the gradient along z at (x, y), for all joints.
template <class T>
BKIND3D_FN void set_lines(const LinearSoftArgmaxArgs& a, const Lanes<T>& l, int64 x, int64 y) {
  for (int64 j = 0; j < a.joint_step; j += lanes<double>) {
    VolumeGradient<vec<double>> v;
    v.constant = load(l.constant + j);
    for (int i = 0; i < 3; ++i) v.mean[i] = load(l.mean[i] + j), v.linear[i] = load(l.linear[i] + j);
    for (int i = 0; i < 6; ++i) v.quadratic[i] = load(l.quadratic[i] + j);
    const LineGradient<vec<double>> line = line_gradient(v, broadcast(double(x)), broadcast(double(y)));
    store_narrow(l.line[0] + j, line.constant);
    store_narrow(l.line[1] + j, line.linear);
    store_narrow(l.line[2] + j, line.quadratic);
  }
}

// The logits of a tile become their gradient.
template <class T>
void differentiate(const LinearSoftArgmaxArgs& a, int64 n, int64 first, int64 count, Scratch<T>& s) {
  const Lanes<T>& l = s.lane;
  const vec<T> scale = broadcast(exponent_scale(T(), a.beta));
  for_each_run(a, first, count, [&](int64 offset, int64 x, int64 y, int64 z, int64 length) {
    set_lines(a, l, x, y);
    for (int64 column = 0; column < a.joint_step; column += lanes<T>) {
      const vec<T> reference = load(l.maximum + column);
      const LineGradient<vec<T>> line = {load(l.line[0] + column), load(l.line[1] + column), load(l.line[2] + column)};
      vec<T> mean = {};
      for (int i = 0; i < lanes<T>; ++i) mean[i] = T(double(z) - l.mean[2][column + i]);
      vec<T> dz = mean;
      T* logits = s.logits + offset * a.joint_step + column;
      for (int64 v = 0; v < length; ++v, dz += T(1), logits += a.joint_step)
        store(logits, logit_gradient(weight_of(load(logits), reference, scale), dz, line));
    }
  });
  // The gradient of the peak, once more at the argmax, where the weight is 1.
  for (int64 j = 0; j < a.joints; ++j) {
    const VolumeGradient<double>& v = a.volumes[n * a.joints + j];
    const int64 at = v.argmax - first;
    if (at < 0 || at >= count) continue;
    const int64 row = v.argmax / a.shape[2];
    const LineGradient<double> line = line_gradient(v, double(row / a.shape[1]), double(row % a.shape[1]));
    s.logits[at * a.joint_step + j] = T(logit_gradient(1.0, double(v.argmax % a.shape[2]) - v.mean[2], line) + v.peak);
  }
}

// Writes the gradient of a tile's features.
template <class T, class S>
BKIND3D_FN void write_features(const LinearSoftArgmaxArgs& a, int64 n, int64 first, int64 count, Scratch<T>& s) {
  const void* source = s.gradient;
  if (!same<T, S> || a.channels != a.channel_step) {
    S* row = (S*)s.result;  // what a vector writes beyond its row, the next row overwrites
    for (int64 v = 0; v < count; ++v, row += a.channels)
      for (int64 c = 0; c < a.channels; c += lanes<T>) store(row + c, load(s.gradient + v * a.channel_step + c));
    source = s.result;
  }
  S* target = (S*)a.grad_features + (n * a.shape[0] * a.shape[1] * a.shape[2] + first) * a.channels;
  const int64 bytes = count * a.channels * int64(sizeof(S));
  if (a.stream) {
    copy_past_caches((char*)target, (const char*)source, bytes);
  } else {
    __builtin_memcpy(target, source, bytes);
  }
}

template <class T, class S>
void backward(const LinearSoftArgmaxArgs& a, int64 task, void* memory) {
  Scratch<T> s;
  lay_out<T, S>(a, memory, s);
  const int64 n = task / a.slabs, begin = task % a.slabs * a.slab, size = a.shape[0] * a.shape[1] * a.shape[2];
  const int64 end = begin + a.slab < size ? begin + a.slab : size;
  load_volumes(a, n, s);
  for (int64 c = 0; c < a.channel_step; ++c) s.zeros[c] = 0;
  T* weight = a.grad_weight ? (T*)a.grad_weight + task * a.joint_step * a.channel_step : nullptr;
  for (int64 first = begin; first < end; first += a.tile) {
    const int64 count = a.tile < end - first ? a.tile : end - first;
    // Logits, then their gradient in place.
    const FeatureRows<T> h = features_of<T, S>(a, n, first, count, weight, s);
    make_logits(a, h, count, s);
    differentiate(a, n, first, count, s);
    // Gradients of the weight and of the features.
    if (weight)
      multiply<T>({s.logits, 1, a.joint_step, h.p, h.step, weight, a.channel_step, weight, a.channel_step, a.joint_step,
                   count, a.channel_step});
    if (!a.grad_features) continue;
    multiply<T>({s.logits, a.joint_step, 1, (const T*)a.rows, a.channel_step, s.zeros, 0, s.gradient, a.channel_step,
                 round_up(count, step_of<T>), a.joints, a.channel_step});
    write_features<T, S>(a, n, first, count, s);
  }
  if (a.stream) finish_copies();
}

template <class T, class S>
long long scratch(const LinearSoftArgmaxArgs& a) {
  Scratch<T> s;
  return lay_out<T, S>(a, nullptr, s);
}

}  // namespace

extern const LinearSoftArgmaxLoops linear_soft_argmax3d_loops;
const LinearSoftArgmaxLoops linear_soft_argmax3d_loops = {
    {step_of<float>, step_of<double>},
    {scratch<float, float>, scratch<double, double>, scratch<float, bfloat16>, scratch<float, float16>},
    {forward<float, float>, forward<double, double>, forward<float, bfloat16>, forward<float, float16>},
    {backward<float, float>, backward<double, double>, backward<float, bfloat16>, backward<float, float16>},
};

}  // namespace BKIND3D_ISA
}  // namespace bkind3d
