// Unprojection on the CPU: the loops, compiled once per instruction set.
//
// A tile is up to 64 voxels of one row (i, j, .). For each view its voxels are projected, a vector at a time, into four
// tap offsets and weights each; then the channels of one voxel are blended with contiguous loads into
// v[m][voxel][channel], which stays in the first-level cache; then the views are aggregated over that flat array.
// Threads take rows of the volume forward, and a range of channels of one sample backward, so that no two of them add
// to the same gradient. Saved for backward: the inputs alone.
//
// Bound by arithmetic: at (M, C) = (4, 32) in float a voxel takes 128 bytes written and 2,560 multiply-adds, 4 taps and
// about 16 for the exponential and its sums a sample; backward recomputes them and adds 4 taps a sample to the maps.
// Measured, 2 threads with AVX-512, (N, M, C) = (1, 4, 32), 64^2 maps, 64^3 voxels: forward 18.5 ms, backward 25.7,
// both 44.4 (benchmarks/results/2026-11-26-cpu-bars/results.csv, paper).
#include "simd.h"
#include "../common/unproject.h"
#include "unproject.h"

namespace bkind3d {
namespace BKIND3D_ISA {
namespace {

constexpr int max_tile = 64, alignment = 64;
constexpr int64 cache_bytes = 20480;  // of the samples v, so that they and the taps fit a 32 KB cache

BKIND3D_FN int64 round_up(int64 value, int64 to) { return (value + to - 1) / to * to; }

// ---- scratch ----

template <class T>
struct Scratch {
  int tile;             // voxels
  int block;            // channels
  int64 cells;          // between views in v: tile * block and room for one vector more
  T* v;                 // (M, cells): samples, in the backward pass then their gradients
  T* g;                 // (cells): the aggregate, or the gradient of the volume
  T* weight;            // (M, 4, tile): of the taps 00, 01, 10, 11 (row, column)
  int* offset;          // (M, 4, tile): of the taps in the view's map
  T* pixel;             // (M, 3, tile): u, v, depth
  T* tap;               // (4, tile): sums over channels of gradient times feature
  T* scale;             // (tile): 1 / number of seeing views
  unsigned char* seen;  // (M, tile)
  bool* any;            // (M): whether the view sees any voxel of the tile
};

template <class T>
BKIND3D_FN int64 lay_out(Scratch<T>& s, const UnprojectArgs& a, int block, void* memory) {
  const int64 m = a.views;
  const int64 fit = cache_bytes / int64(sizeof(T)) / (m * block);
  s.block = block;
  s.tile = int(fit > max_tile ? max_tile : fit < 16 ? 16 : fit / 16 * 16);
  s.cells = round_up(int64(s.tile) * block + lanes<T>, lanes<T>);
  char* p = (char*)memory;
  auto take = [&](int64 bytes) {
    char* start = p;
    p += round_up(bytes, alignment);
    return (void*)start;
  };
  s.v = (T*)take(m * s.cells * sizeof(T));
  s.g = (T*)take(s.cells * sizeof(T));
  s.weight = (T*)take(m * 4 * s.tile * sizeof(T));
  s.offset = (int*)take(m * 4 * s.tile * sizeof(int));
  s.pixel = (T*)take(m * 3 * s.tile * sizeof(T));
  s.tap = (T*)take(4 * s.tile * sizeof(T));
  s.scale = (T*)take(s.tile * sizeof(T));
  s.seen = (unsigned char*)take(m * s.tile);
  s.any = (bool*)take(m);
  return p - (char*)memory;
}

BKIND3D_FN int forward_block(const UnprojectArgs& a) { return int(a.channels < 64 ? a.channels : 64); }

// ---- projection ----

// Voxels (i, j, k0 + t), t < count, of view m: taps, weights, visibility and, for the backward pass, pixels.
template <class T>
BKIND3D_FN void project_tile(const UnprojectArgs& a, Scratch<T>& s, int64 n, int64 m, T i, T j, T k0, int count) {
  using I = typename vector_of<int, lanes<T>>::type;
  using IU = typename vector_of<int, lanes<T>>::unaligned;
  using B = typename vector_of<unsigned char, lanes<T>>::type;
  using BU = typename vector_of<unsigned char, lanes<T>>::unaligned;
  unsigned char* seen = s.seen + m * s.tile;
  // A masked view.
  s.any[m] = false;
  if (a.mask && !a.mask[n * a.views + m]) {
    for (int t = 0; t < s.tile; ++t) seen[t] = 0;
    return;
  }
  const T* q = (const T*)a.q + (n * a.views + m) * 12;
  const T width = T(a.width), height = T(a.height);
  T* weight = s.weight + m * 4 * s.tile;
  int* offset = s.offset + m * 4 * s.tile;
  T* pixel = s.pixel + m * 3 * s.tile;
  int total = 0;
  for (int t = 0; t < count; t += lanes<T>) {
    // Pixels, and which voxels the view sees.
    const vec<T> k = iota<T>() + (k0 + T(t));
    const auto h = project(q, broadcast(i), broadcast(j), k);
    const vec<T> u = h.x / h.depth, v = h.y / h.depth;
    auto visible = sees(u, v, h.depth, width, height);
    visible &= (iota<T>() < T(count - t));
    // Taps.
    const auto x = axis_taps(u, width), y = axis_taps(v, height);
    I column[2], row[2];
    for (int e = 0; e < 2; ++e) {
      column[e] = __builtin_convertvector(select(visible, x.index[e], vec<T>{}), I) * int(a.stride_x);
      row[e] = __builtin_convertvector(select(visible, y.index[e], vec<T>{}), I) * int(a.stride_y);
    }
    for (int e = 0; e < 4; ++e) {
      store(weight + e * s.tile + t, select(visible, y.weight[e / 2] * x.weight[e % 2], vec<T>{}));
      *(IU*)(offset + e * s.tile + t) = row[e / 2] + column[e % 2];
    }
    // For the backward pass.
    store(pixel + t, u);
    store(pixel + s.tile + t, v);
    store(pixel + 2 * s.tile + t, h.depth);
    *(BU*)(seen + t) = __builtin_convertvector(visible, B) & 1;
    total += first_lane(visible) >= 0;
  }
  s.any[m] = total > 0;
}

// ---- sampling ----

// Channels of one voxel and view; CB channels, or `block` of them when CB is 0. Stores whole vectors: what is behind
// the last channel belongs to the next voxel, which is written later.
template <class T, int CB>
BKIND3D_FN void sample_voxel(const T* map, const int* offset, const T* weight, int tile, int block, T* out) {
  const int channels = CB ? CB : block;
  const T *p0 = map + offset[0], *p1 = map + offset[tile], *p2 = map + offset[2 * tile], *p3 = map + offset[3 * tile];
  const vec<T> w0 = broadcast(weight[0]), w1 = broadcast(weight[tile]), w2 = broadcast(weight[2 * tile]),
               w3 = broadcast(weight[3 * tile]);
  int c = 0;
#pragma GCC unroll 8
  for (; c + lanes<T> <= channels; c += lanes<T>)
    store(out + c, (w0 * load(p0 + c) + w1 * load(p1 + c)) + (w2 * load(p2 + c) + w3 * load(p3 + c)));
  if (const int rest = channels - c; rest > 0)
    store(out + c, (w0 * load_first<T>(p0 + c, rest) + w1 * load_first<T>(p1 + c, rest)) +
                       (w2 * load_first<T>(p2 + c, rest) + w3 * load_first<T>(p3 + c, rest)));
}

template <class T, int CB>
BKIND3D_FN void sample_view(const Scratch<T>& s, const T* map, int64 m, int count, T unseen) {
  T* out = s.v + m * s.cells;
  const unsigned char* seen = s.seen + m * s.tile;
  const int* offset = s.offset + m * 4 * s.tile;
  const T* weight = s.weight + m * 4 * s.tile;
  const int block = CB ? CB : s.block;
  for (int t = 0; t < count; ++t, out += block) {
    if (seen[t]) {
      sample_voxel<T, CB>(map, offset + t, weight + t, s.tile, block, out);
    } else {
      for (int c = 0; c < block; c += lanes<T>) store(out + c, broadcast(unseen));
    }
  }
}

template <class T>
BKIND3D_FN void fill(T* p, int64 count, T value) {
  for (int64 c = 0; c < count; c += lanes<T>) store(p + c, broadcast(value));
}

// Samples of all views at channels `first` to first + block; `unseen` where a view does not see the voxel.
template <class T>
void sample_tile(const UnprojectArgs& a, const Scratch<T>& s, int64 n, int first, int count, T unseen) {
  for (int64 m = 0; m < a.views; ++m) {
    if (!s.any[m]) {
      fill(s.v + m * s.cells, int64(count) * s.block, unseen);
      continue;
    }
    const T* map = (const T*)a.features + n * a.stride_n + m * a.stride_m + first;
    switch (s.block) {
      case 16: sample_view<T, 16>(s, map, m, count, unseen); break;
      case 32: sample_view<T, 32>(s, map, m, count, unseen); break;
      case 64: sample_view<T, 64>(s, map, m, count, unseen); break;
      default: sample_view<T, 0>(s, map, m, count, unseen);
    }
  }
}

// What an unseeing view leaves in v: nothing to take part in a softmax or maximum over the seeing views.
template <class T>
BKIND3D_FN T unseen_value(const UnprojectArgs& a) {
  const bool excluded = a.exclude && (a.aggregation == Aggregation::softmax || a.aggregation == Aggregation::max);
  return excluded ? -T(__builtin_inff()) : T(0);
}

template <class T>
void count_views(const UnprojectArgs& a, const Scratch<T>& s, int count, unsigned char* counts) {
  for (int t = 0; t < count; ++t) {
    int total = 0;
    for (int64 m = 0; m < a.views; ++m) total += s.seen[m * s.tile + t];
    counts[t] = (unsigned char)total;
  }
}

template <class T>
BKIND3D_FN void mean_scale(const UnprojectArgs& a, const Scratch<T>& s, const unsigned char* counts, int count) {
  for (int t = 0; t < count; ++t) s.scale[t] = a.exclude ? T(1) / T(counts[t] ? counts[t] : 1) : T(1) / T(a.views);
}

// ---- aggregation, forward: v (M, cells) to out ----

// e^(value - best). The rounding of the product is a relative error of |value - best| 2^-24, where the weight is small.
template <class T>
BKIND3D_FN vec<T> softmax_exponential(vec<T> value, vec<T> best) {
  return exp2_of_nonpositive((value - best) * T(1.44269504088896340736));
}

template <class T, int M, bool Exclude>
BKIND3D_FN vec<T> softmax_at(const T* v, int64 cells, int64 views) {
  const int64 count = M ? M : views;
  vec<T> values[M ? M : 1], best = load(v);
  if constexpr (M > 0) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) values[m] = load(v + m * cells);
  }
#pragma GCC unroll 8
  for (int64 m = 1; m < count; ++m) best = max_of(best, M ? values[M ? m : 0] : load(v + m * cells));
  const vec<T> low = broadcast(-T(__builtin_inff()));
  if (Exclude) best = select(best == low, vec<T>{}, best);
  vec<T> total = {}, weighted = {};
#pragma GCC unroll 8
  for (int64 m = 0; m < count; ++m) {
    const vec<T> value = M ? values[M ? m : 0] : load(v + m * cells);
    const vec<T> e = softmax_exponential<T>(value, best);
    total += e;
    weighted += e * (Exclude ? select(value == low, vec<T>{}, value) : value);
  }
  const vec<T> result = weighted / total;
  return Exclude ? select(total == 0, vec<T>{}, result) : result;
}

template <class T, int M, bool Exclude>
void softmax_run(const T* v, int64 cells, int64 views, int64 length, T* out) {
  for (int64 c = 0; c < length; c += lanes<T>) store(out + c, softmax_at<T, M, Exclude>(v + c, cells, views));
}

template <class T, bool Exclude>
void softmax_views(const UnprojectArgs& a, const Scratch<T>& s, int64 length, T* out) {
  switch (a.views) {
    case 1: return softmax_run<T, 1, Exclude>(s.v, s.cells, 1, length, out);
    case 2: return softmax_run<T, 2, Exclude>(s.v, s.cells, 2, length, out);
    case 3: return softmax_run<T, 3, Exclude>(s.v, s.cells, 3, length, out);
    case 4: return softmax_run<T, 4, Exclude>(s.v, s.cells, 4, length, out);
    case 5: return softmax_run<T, 5, Exclude>(s.v, s.cells, 5, length, out);
    case 6: return softmax_run<T, 6, Exclude>(s.v, s.cells, 6, length, out);
    default: return softmax_run<T, 0, Exclude>(s.v, s.cells, a.views, length, out);
  }
}

template <class T>
void max_views(const UnprojectArgs& a, const Scratch<T>& s, int64 length, T* out) {
  const vec<T> low = broadcast(-T(__builtin_inff()));
  for (int64 c = 0; c < length; c += lanes<T>) {
    vec<T> best = load(s.v + c);
    for (int64 m = 1; m < a.views; ++m) {
      const vec<T> value = load(s.v + m * s.cells + c);
      best = select(value > best, value, best);
    }
    store(out + c, a.exclude ? select(best == low, vec<T>{}, best) : best);
  }
}

template <class T>
void sum_views(const UnprojectArgs& a, const Scratch<T>& s, int64 length, T* out) {
  for (int64 c = 0; c < length; c += lanes<T>) {
    vec<T> total = {};
    for (int64 m = 0; m < a.views; ++m) total += load(s.v + m * s.cells + c);
    store(out + c, total);
  }
}

template <class T>
void scale_voxels(const Scratch<T>& s, int count, T* out) {
  for (int t = 0; t < count; ++t)
    for (int c = 0; c < s.block; c += lanes<T>) {
      const int rest = s.block - c < lanes<T> ? s.block - c : lanes<T>;
      T* p = out + t * s.block + c;
      store_first(p, load_first<T>(p, rest) * s.scale[t], rest);
    }
}

template <class T>
void weigh_views(const UnprojectArgs& a, const Scratch<T>& s, int64 n, int first, int count, T* out) {
  const T* weights = (const T*)a.weights + n * a.views * a.channels + first;
  for (int t = 0; t < count; ++t)
    for (int c = 0; c < s.block; c += lanes<T>) {
      const int rest = s.block - c < lanes<T> ? s.block - c : lanes<T>;
      vec<T> total = {}, norm = {};
      for (int64 m = 0; m < a.views; ++m) {
        const vec<T> w = load_first<T>(weights + m * a.channels + c, rest);
        total += w * load(s.v + m * s.cells + t * s.block + c);
        if (s.seen[m * s.tile + t]) norm += w;
      }
      const vec<T> mean = select(norm != 0, total / select(norm != 0, norm, broadcast(T(1))), vec<T>{});
      store_first(out + t * s.block + c, a.exclude ? mean : total, rest);
    }
}

// The aggregate of the tile into `out`; whole vectors are stored.
template <class T>
void aggregate(const UnprojectArgs& a, const Scratch<T>& s, int64 n, int first, int count, T* out) {
  const int64 length = int64(count) * s.block;
  switch (a.aggregation) {
    case Aggregation::softmax:
      return a.exclude ? softmax_views<T, true>(a, s, length, out) : softmax_views<T, false>(a, s, length, out);
    case Aggregation::max: return max_views(a, s, length, out);
    case Aggregation::weighted: return weigh_views(a, s, n, first, count, out);
    case Aggregation::sum: return sum_views(a, s, length, out);
    case Aggregation::mean: sum_views(a, s, length, out); return scale_voxels(s, count, out);
  }
}

// ---- the volume: `count` voxels of `block` channels between a flat buffer and the volume in its storage type ----

template <class S, class T>
BKIND3D_FN void store_run(S* out, const T* in, int64 count) {
  int64 c = 0;
  for (; c + lanes<T> <= count; c += lanes<T>) store(out + c, load(in + c));
  if (c < count) store_first(out + c, load(in + c), int(count - c));
}

template <class S, class T>
void store_tile(const UnprojectArgs& a, const Scratch<T>& s, int64 voxel, int first, int count) {
  S* out = (S*)a.volume + voxel * a.channels + first;
  if (s.block == a.channels) return store_run(out, s.g, int64(count) * s.block);
  for (int t = 0; t < count; ++t) store_run(out + t * a.channels, s.g + t * s.block, s.block);
}

template <class S, class T>
void load_gradient(const UnprojectArgs& a, const Scratch<T>& s, int64 n, int64 i, int64 j, int64 k, int first,
                   int count) {
  const long long* stride = a.grad_stride;
  const S* in =
      (const S*)a.grad_volume + n * stride[0] + first * stride[1] + i * stride[2] + j * stride[3] + k * stride[4];
  if (stride[1] == 1) {
    for (int t = 0; t < count; ++t, in += stride[4]) {
      int c = 0;
      for (; c + lanes<T> <= s.block; c += lanes<T>) store(s.g + t * s.block + c, load(in + c));
      if (c < s.block) store(s.g + t * s.block + c, load_first<T>(in + c, s.block - c));
    }
    return;
  }
  for (int c = 0; c < s.block; ++c)
    for (int t = 0; t < count; ++t) {
      if constexpr (sizeof(S) == 2) {
        s.g[t * s.block + c] = load_first<T>(in + c * stride[1] + t * stride[4], 1)[0];
      } else {
        s.g[t * s.block + c] = in[c * stride[1] + t * stride[4]];
      }
    }
}

// ---- forward ----

template <class T>
void store_tile_as(const UnprojectArgs& a, const Scratch<T>& s, int64 voxel, int first, int count) {
  by_storage(a.storage, [&](auto element) {
    using S = decltype(element);
    if constexpr (sizeof(Arithmetic<S>) == sizeof(T)) store_tile<S>(a, s, voxel, first, count);
  });
}

// One tile of voxels: all channels, a block of them at a time.
template <class T>
void forward_tile(const UnprojectArgs& a, Scratch<T>& s, int64 n, int64 i, int64 j, int64 k, int count) {
  for (int64 m = 0; m < a.views; ++m) project_tile(a, s, n, m, T(i), T(j), T(k), count);
  // Counts.
  const int64 voxel = ((n * a.shape[0] + i) * a.shape[1] + j) * a.shape[2] + k;
  count_views(a, s, count, a.counts + voxel);
  if (a.aggregation == Aggregation::mean) mean_scale(a, s, a.counts + voxel, count);
  const int block = s.block;
  for (int first = 0; first < a.channels; first += block) {
    // Samples, then their aggregate: into the volume where it is of its type and layout, else through a tile.
    s.block = int(a.channels - first < block ? a.channels - first : block);
    sample_tile(a, s, n, first, count, unseen_value<T>(a));
    const int64 length = int64(count) * s.block;
    T* direct = (T*)a.volume + voxel * a.channels + first;
    const bool same = a.storage == (sizeof(T) == 8 ? Storage::float64 : Storage::float32);
    if (same && s.block == a.channels && length % lanes<T> == 0) {
      aggregate(a, s, n, first, count, direct);
    } else {
      aggregate(a, s, n, first, count, s.g);
      store_tile_as(a, s, voxel, first, count);
    }
  }
  s.block = block;
}

template <class T>
void forward_rows(const UnprojectArgs& a, int64 begin, int64 end, void* memory) {
  Scratch<T> s;
  lay_out(s, a, forward_block(a), memory);
  for (int64 row = begin; row < end; ++row) {
    const int64 j = row % a.shape[1], i = row / a.shape[1] % a.shape[0], n = row / a.shape[1] / a.shape[0];
    for (int64 k = 0; k < a.shape[2]; k += s.tile) {
      const int64 left = a.shape[2] - k;
      forward_tile(a, s, n, i, j, k, int(left < s.tile ? left : s.tile));
    }
  }
}

// ---- aggregation, backward: g and v (M, cells) to dL/dv in place of v ----

template <class T, int M, bool Exclude>
BKIND3D_FN void softmax_gradient_at(T* v, vec<T> g, int64 cells, int64 views) {
  const int64 count = M ? M : views;
  vec<T> values[M ? M : 1], exponentials[M ? M : 1], best = load(v);
  const vec<T> low = broadcast(-T(__builtin_inff()));
#pragma GCC unroll 8
  for (int64 m = 0; m < count; ++m) {
    const vec<T> value = load(v + m * cells);
    if (M) values[M ? m : 0] = value;
    best = max_of(best, value);
  }
  if (Exclude) best = select(best == low, vec<T>{}, best);
  vec<T> total = {}, weighted = {};
#pragma GCC unroll 8
  for (int64 m = 0; m < count; ++m) {
    const vec<T> value = M ? values[M ? m : 0] : load(v + m * cells);
    const vec<T> e = softmax_exponential<T>(value, best);
    if (M) exponentials[M ? m : 0] = e;
    total += e;
    weighted += e * (Exclude ? select(value == low, vec<T>{}, value) : value);
  }
  const vec<T> inverse = Exclude ? select(total == 0, vec<T>{}, 1 / total) : 1 / total, aggregate = weighted * inverse;
#pragma GCC unroll 8
  for (int64 m = 0; m < count; ++m) {
    const vec<T> value = M ? values[M ? m : 0] : load(v + m * cells);
    const vec<T> e = M ? exponentials[M ? m : 0] : softmax_exponential<T>(value, best);
    const vec<T> gradient = softmax_gradient(g, e * inverse, value, aggregate);
    store(v + m * cells, Exclude ? select(value == low, vec<T>{}, gradient) : gradient);
  }
}

template <class T, int M, bool Exclude>
void softmax_gradient_run(const Scratch<T>& s, int64 views, int64 length) {
  for (int64 c = 0; c < length; c += lanes<T>)
    softmax_gradient_at<T, M, Exclude>(s.v + c, load(s.g + c), s.cells, views);
}

template <class T, bool Exclude>
void softmax_gradient_views(const UnprojectArgs& a, const Scratch<T>& s, int64 length) {
  switch (a.views) {
    case 1: return softmax_gradient_run<T, 1, Exclude>(s, 1, length);
    case 2: return softmax_gradient_run<T, 2, Exclude>(s, 2, length);
    case 3: return softmax_gradient_run<T, 3, Exclude>(s, 3, length);
    case 4: return softmax_gradient_run<T, 4, Exclude>(s, 4, length);
    case 5: return softmax_gradient_run<T, 5, Exclude>(s, 5, length);
    case 6: return softmax_gradient_run<T, 6, Exclude>(s, 6, length);
    default: return softmax_gradient_run<T, 0, Exclude>(s, a.views, length);
  }
}

// The gradient goes to the largest value, in a tie to the lowest view.
template <class T>
void max_gradient_views(const UnprojectArgs& a, const Scratch<T>& s, int64 length) {
  for (int64 c = 0; c < length; c += lanes<T>) {
    vec<T> best = load(s.v + c), winner = {};
    for (int64 m = 1; m < a.views; ++m) {
      const vec<T> value = load(s.v + m * s.cells + c);
      winner = select(value > best, broadcast(T(m)), winner);
      best = select(value > best, value, best);
    }
    const vec<T> g = load(s.g + c);
    for (int64 m = 0; m < a.views; ++m) store(s.v + m * s.cells + c, select(winner == T(m), g, vec<T>{}));
  }
}

// Weights of their own: dL/dv = g w, and dL/dw summed over the voxels into grad_weights (M, block) if it is wanted.
template <class T>
void weigh_gradient_views(const UnprojectArgs& a, const Scratch<T>& s, int64 n, int first, int count, double* grad) {
  const T* weights = (const T*)a.weights + n * a.views * a.channels + first;
  for (int t = 0; t < count; ++t)
    for (int c = 0; c < s.block; c += lanes<T>) {
      const int rest = s.block - c < lanes<T> ? s.block - c : lanes<T>;
      const int64 at = int64(t) * s.block + c;
      const vec<T> g = load_first<T>(s.g + at, rest);
      vec<T> total = {}, norm = {};
      for (int64 m = 0; m < a.views; ++m) {
        if (!a.exclude || !s.seen[m * s.tile + t]) continue;
        const vec<T> w = load_first<T>(weights + m * a.channels + c, rest);
        total += w * load_first<T>(s.v + m * s.cells + at, rest);
        norm += w;
      }
      // Divided by, since the reciprocal of a subnormal number is infinite.
      const vec<T> divisor = a.exclude ? select(norm != 0, norm, broadcast(T(1))) : broadcast(T(1));
      const vec<T> given = a.exclude ? select(norm != 0, g, vec<T>{}) : g, mean = total / divisor;
      for (int64 m = 0; m < a.views; ++m) {
        if (!s.seen[m * s.tile + t]) continue;
        T* p = s.v + m * s.cells + at;
        const vec<T> share = given / divisor * (load_first<T>(p, rest) - (a.exclude ? mean : vec<T>{}));
        if (grad)
          for (int e = 0; e < rest; ++e) grad[m * a.channel_block + c + e] += double(share[e]);
        store_first(p, given * (load_first<T>(weights + m * a.channels + c, rest) / divisor), rest);
      }
    }
}

template <class T>
void gradient_of_samples(const UnprojectArgs& a, const Scratch<T>& s, int64 n, int first, int count,
                         double* grad_weights) {
  const int64 length = int64(count) * s.block;
  switch (a.aggregation) {
    case Aggregation::softmax:
      return a.exclude ? softmax_gradient_views<T, true>(a, s, length) : softmax_gradient_views<T, false>(a, s, length);
    case Aggregation::max: return max_gradient_views(a, s, length);
    case Aggregation::weighted: return weigh_gradient_views(a, s, n, first, count, grad_weights);
    case Aggregation::mean: scale_voxels(s, count, s.g); [[fallthrough]];
    case Aggregation::sum:
      for (int64 m = 0; m < a.views; ++m)
        for (int64 c = 0; c < length; c += lanes<T>) store(s.v + m * s.cells + c, load(s.g + c));
  }
}

// ---- gradients of one view's map and matrix from dL/dv ----

// p += w * g for N elements where `count` has that bit: whole narrow vectors, since a load that follows a masked store
// to the same place waits until that has left the store buffer, and neighbouring voxels share their taps.
template <class T, int N>
BKIND3D_FN void add_part(T*& p, T w, const T*& g, int count) {
  if (!(count & N)) return;
  using U = typename vector_of<T, N>::unaligned;
  *(U*)p = *(const U*)p + *(const U*)g * w;
  p += N, g += N;
}

template <class T>
BKIND3D_FN void add_tail(T* p, T w, const T* g, int count) {
  if constexpr (lanes<T> > 8) add_part<T, 8>(p, w, g, count);
  if constexpr (lanes<T> > 4) add_part<T, 4>(p, w, g, count);
  if constexpr (lanes<T> > 2) add_part<T, 2>(p, w, g, count);
  if (count & 1) *p += w * *g;
}

// Each tap's pixel gets its weight times the gradient. The four may be the same pixel: one after the other. The views
// are the inner loop: neighbouring voxels share pixels, and an addition must wait for the last one to the same place.
template <class T, int CB>
BKIND3D_FN void scatter_tile(const UnprojectArgs& a, const Scratch<T>& s, T* maps, int count) {
  const int block = CB ? CB : s.block;
  const int64 per_map = a.height * a.width * a.channels;
  for (int t = 0; t < count; ++t)
    for (int64 m = 0; m < a.views; ++m) {
      if (!s.seen[m * s.tile + t]) continue;
      const T* gradient = s.v + m * s.cells + int64(t) * block;
      for (int e = 0; e < 4; ++e) {
        const int64 at = (m * 4 + e) * s.tile + t;
        T* p = maps + m * per_map + s.offset[at];
        const T w = s.weight[at];
        int c = 0;
#pragma GCC unroll 4
        for (; c + lanes<T> <= block; c += lanes<T>) store(p + c, load(p + c) + w * load(gradient + c));
        if (c < block) add_tail(p + c, w, gradient + c, block - c);
      }
    }
}

template <class T>
BKIND3D_FN T dot(const T* a, const T* b, int block) {
  vec<T> total = {};
  int c = 0;
  for (; c + lanes<T> <= block; c += lanes<T>) total += load(a + c) * load(b + c);
  if (c < block) total += load_first<T>(a + c, block - c) * load_first<T>(b + c, block - c);
  return sum_of(total);
}

// dL/dQ of one view: from the taps' sums over channels to the pixel, to the homogeneous coordinates, to the matrix.
template <class T>
void matrix_view(const UnprojectArgs& a, const Scratch<T>& s, int64 n, int first, int64 m, T i, T j, T k0, int count,
                 double* grad) {
  const T* map = (const T*)a.features + n * a.stride_n + m * a.stride_m + first;
  const T* gradient = s.v + m * s.cells;
  const unsigned char* seen = s.seen + m * s.tile;
  // Each tap's sum over the channels.
  for (int t = 0; t < count; ++t)
    for (int e = 0; e < 4; ++e)
      s.tap[e * s.tile + t] =
          seen[t] ? dot(map + s.offset[(m * 4 + e) * s.tile + t], gradient + int64(t) * s.block, s.block) : T(0);
  // To the pixel, a vector of voxels at a time, and to the matrix.
  const T* pixel = s.pixel + m * 3 * s.tile;
  for (int t = 0; t < count; t += lanes<T>) {
    const vec<T> u = load(pixel + t), v = load(pixel + s.tile + t), depth = load(pixel + 2 * s.tile + t);
    const auto x = axis_taps(u, T(a.width)), y = axis_taps(v, T(a.height));
    const T* tap = s.tap + t;
    const auto g = homogeneous_gradient(
        pixel_gradient(x, y, load(tap), load(tap + s.tile), load(tap + 2 * s.tile), load(tap + 3 * s.tile)), u, v,
        depth);
    for (int e = 0; e < lanes<T> && t + e < count; ++e) {
      if (!seen[t + e]) continue;
      const double rows[3] = {double(g.x[e]), double(g.y[e]), double(g.depth[e])};
      const double index[4] = {double(i), double(j), double(k0) + t + e, 1.0};
      for (int r = 0; r < 3; ++r)
        for (int c = 0; c < 4; ++c) grad[r * 4 + c] += rows[r] * index[c];
    }
  }
}

// ---- backward ----

template <class T>
void load_gradient_as(const UnprojectArgs& a, const Scratch<T>& s, int64 n, int64 i, int64 j, int64 k, int first,
                      int count) {
  by_storage(a.storage, [&](auto element) {
    using S = decltype(element);
    if constexpr (sizeof(Arithmetic<S>) == sizeof(T)) load_gradient<S>(a, s, n, i, j, k, first, count);
  });
}

template <class T>
void backward_tile(const UnprojectArgs& a, Scratch<T>& s, int64 n, int first, int64 i, int64 j, int64 k, int count,
                   T* grad_maps, double* grad_q, double* grad_weights) {
  // Samples again, and the volume's gradient.
  for (int64 m = 0; m < a.views; ++m) project_tile(a, s, n, m, T(i), T(j), T(k), count);
  sample_tile(a, s, n, first, count, unseen_value<T>(a));
  load_gradient_as(a, s, n, i, j, k, first, count);
  // From the aggregate to the samples.
  if (a.aggregation == Aggregation::mean) {
    unsigned char counts[max_tile];
    count_views(a, s, count, counts);
    mean_scale(a, s, counts, count);
  }
  gradient_of_samples(a, s, n, first, count, grad_weights);
  // To the matrices and the maps.
  for (int64 m = 0; grad_q && m < a.views; ++m)
    if (s.any[m]) matrix_view(a, s, n, first, m, T(i), T(j), T(k), count, grad_q + m * 12);
  if (!grad_maps) return;
  switch (s.block) {
    case 16: return scatter_tile<T, 16>(a, s, grad_maps, count);
    case 32: return scatter_tile<T, 32>(a, s, grad_maps, count);
    case 64: return scatter_tile<T, 64>(a, s, grad_maps, count);
    default: return scatter_tile<T, 0>(a, s, grad_maps, count);
  }
}

template <class T>
void backward_task(const UnprojectArgs& a, int64 task, void* memory) {
  const int64 blocks = (a.channels + a.channel_block - 1) / a.channel_block;
  const int64 slab = task % a.slabs, block = task / a.slabs % blocks, n = task / a.slabs / blocks;
  const int first = int(block * a.channel_block);
  Scratch<T> s;
  lay_out(s, a, int(a.channel_block), memory);
  if (a.channels - first < a.channel_block) s.block = int(a.channels - first);
  const int64 sample = a.views * a.height * a.width * a.channels;
  T* grad_maps = a.grad_features ? (T*)a.grad_features + (slab * a.samples + n) * sample + first : nullptr;
  double* grad_q = a.grad_q ? a.grad_q + task * a.views * 12 : nullptr;
  double* grad_weights = a.grad_weights ? a.grad_weights + task * a.views * a.channel_block : nullptr;
  const int64 rows = a.shape[0] * a.shape[1];
  for (int64 row = rows * slab / a.slabs; row < rows * (slab + 1) / a.slabs; ++row)
    for (int64 k = 0; k < a.shape[2]; k += s.tile) {
      const int64 left = a.shape[2] - k;
      backward_tile(a, s, n, first, row / a.shape[1], row % a.shape[1], k, int(left < s.tile ? left : s.tile),
                    grad_maps, grad_q, grad_weights);
    }
}

// ---- table ----

// f(T()) for the type of the arithmetic.
template <class F>
auto in_arithmetic(const UnprojectArgs& a, F f) {
  return by_arithmetic(a.storage == Storage::float64, f);
}

long long scratch(const UnprojectArgs& a, bool backward) {
  return in_arithmetic(a, [&](auto number) {
    Scratch<decltype(number)> s;
    return lay_out(s, a, backward ? int(a.channel_block) : forward_block(a), nullptr);
  });
}

void forward(const UnprojectArgs& a, long long begin, long long end, void* memory) {
  in_arithmetic(a, [&](auto number) { forward_rows<decltype(number)>(a, begin, end, memory); });
}

void backward(const UnprojectArgs& a, long long task, void* memory) {
  in_arithmetic(a, [&](auto number) { backward_task<decltype(number)>(a, task, memory); });
}

}  // namespace

extern const UnprojectLoops unproject_loops = {scratch, forward, backward};

}  // namespace BKIND3D_ISA
}  // namespace bkind3d
