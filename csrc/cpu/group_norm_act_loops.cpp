// Group normalisation with a residual and a ReLU on the CPU: the loops, compiled once per instruction set.
//
// Maps are channels-last, channels along the vector. Where a voxel's channels do not fill whole vectors, a few voxels
// one after the other do: what is one channel's own (mean, scale, sums) is laid out for such a row of voxels, and every
// load but those of a sample's last row is a whole vector. Forward reads a sample for mean and variance and once more
// for the output; backward for the two sums of each channel and once more for the gradient of x. A thread takes a
// sample and goes over it twice, so that the second time it comes from the second-level cache if it fits there; where
// samples are fewer than threads, slabs of about 32,000 elements, whose sums the torch face merges in order. Saved for
// backward: x in its own type, mean and 1/sqrt(var + eps); the output where there are a residual and a ReLU, else the
// mask is made from x again.
//
// Variance: a block of up to 128 rows is summed in T about its own mean, in the first-level cache, so that nothing
// cancels when the mean is far from zero or one value far from the others; blocks are merged in double.
//
// y and the gradient of x go past the caches in float32 and float64 where they are larger than 8 MB: a store into a
// cache reads the line first.
//
// Floor, for E elements of b bytes. Forward: E b read and E b written, E b more read with a residual; E b more read
// where a sample does not fit into the cache. Backward: 2 E b read, E b written; with residual and ReLU 3 E b read, 2 E
// b written; where a sample does not fit, 2 E b more read (of the residual's gradient and x, where there is one). About
// 10 operations an element forward and 15 backward, which stay below the time of the bytes.
#include "simd.h"
// After simd.h, whose vectors its templates look for.
#include "../common/group_norm_act.h"
#include "group_norm_act.h"
#include "stream.h"

namespace bkind3d {
namespace BKIND3D_ISA {
namespace {

// Vectors side by side whose constants and sums stay in registers.
constexpr int wide = 4, narrow = register_bytes == 64 ? 4 : 2;

// A few vectors beside each other, in some rows of a map; or a part of one vector, in one row.
template <int Vectors, bool Part>
struct Tile {
  int64 at, column;  // of the first element: in the sample, and in its row
  int64 before;      // whole rows of the slab that have been taken
  int64 rows;
  int count;  // elements of each row
};

template <class T, int Vectors, bool Part, class S>
BKIND3D_FN vec<T> get(const Tile<Vectors, Part>& tile, const S* p) {
  if constexpr (Part) return load_first<T>(p, tile.count);
  return load(p);
}

template <bool Stream = false, int Vectors, bool Part, class S, class V>
BKIND3D_FN void put(const Tile<Vectors, Part>& tile, S* p, V v) {
  if constexpr (Part) return store_first(p, v, tile.count);
  if constexpr (Stream && sizeof(S) == sizeof(v[0])) return store_past_caches(p, v);
  store(p, v);
}

// f(tile) for tiles that make up slab `begin` to `end` - 1 of a sample: block by block, what is left of its last row
// at the end.
template <int Vectors, class T, class F>
BKIND3D_FN void for_each_tile(const GroupNormActArgs& a, int64 begin, int64 end, F f) {
  const int64 size = a.voxels * a.channels, first = begin * a.slab * a.row;
  const int64 last = end * a.slab * a.row < size ? end * a.slab * a.row : size;
  const int64 rows = (last - first) / a.row, rest = (last - first) % a.row;
  for (int64 row = 0; row < rows; row += a.block) {
    const int64 at = first + row * a.row, count = a.block < rows - row ? a.block : rows - row;
    int64 column = 0;
    for (; column + Vectors * lanes<T> <= a.row; column += Vectors * lanes<T>)
      f(Tile<Vectors, false>{at + column, column, row, count, Vectors * lanes<T>});
    for (; column < a.row; column += lanes<T>) f(Tile<1, false>{at + column, column, row, count, lanes<T>});
  }
  for (int64 column = 0; column < rest; column += lanes<T>) {
    const int64 left = rest - column, at = last - left;
    f(Tile<1, true>{at, column, rows, 1, left < lanes<T> ? int(left) : lanes<T>});
  }
}

// ---- constants of a row ----

// f(element of the row, channel, group) for each.
template <class F>
BKIND3D_FN void for_each_in_row(const GroupNormActArgs& a, F f) {
  for (int64 i = 0; i < a.row;)
    for (int64 g = 0, c = 0; g < a.groups; ++g)
      for (const int64 next = c + a.channels / a.groups; c < next; ++c, ++i) f(i, c, g);
}

// For each element of a row, in scratch.
template <class T>
struct Constants {
  T *mean, *scale, *bias;
  T *slope, *offset;  // backward, second pass
  void* end;
};

template <class T>
BKIND3D_FN Constants<T> constants_of(const GroupNormActArgs& a, int64 n, void* memory) {
  T* p = (T*)memory;
  const Constants<T> k = {p, p + a.row, p + 2 * a.row, p + 3 * a.row, p + 4 * a.row, p + 5 * a.row};
  const T *mean = (const T*)a.mean + n * a.groups, *rstd = (const T*)a.rstd + n * a.groups;
  const T *weight = (const T*)a.weight, *bias = (const T*)a.bias;
  for_each_in_row(a, [&](int64 i, int64 c, int64 g) {
    k.mean[i] = mean[g];
    k.scale[i] = rstd[g] * weight[c];
    k.bias[i] = bias[c];
  });
  if (!a.slope) return k;
  const T *slope = (const T*)a.slope + n * a.groups, *offset = (const T*)a.offset + n * a.groups;
  for_each_in_row(a, [&](int64 i, int64, int64 g) { k.slope[i] = slope[g], k.offset[i] = offset[g]; });
  return k;
}

// ---- forward ----

template <class T, class S>
BKIND3D_FN void statistics_of_slab(const GroupNormActArgs& a, const S* x, int64 slab, void* memory, double* groups) {
  double *mean = (double*)memory, *squares = mean + a.row;
  for (int64 i = 0; i < a.row; ++i) mean[i] = squares[i] = 0;
  // Blocks, by element of the row.
  int64 whole = 0, rest = 0;
  for_each_tile<wide, T>(a, slab, slab + 1, [&]<int Vectors, bool Part>(const Tile<Vectors, Part> tile) {
    const S* p = x + tile.at;
    const int64 step = a.row;
    const vec<T> part = broadcast(T(1) / T(tile.rows));
    vec<T> shift[Vectors], sum[Vectors], square[Vectors];
    for (int v = 0; v < Vectors; ++v) shift[v] = sum[v] = square[v] = vec<T>{};
    for (int64 row = 0; row < tile.rows; ++row)
      for (int v = 0; v < Vectors; ++v) shift[v] += get<T>(tile, p + row * step + v * lanes<T>) * part;
    for (int64 row = 0; row < tile.rows; ++row)
      for (int v = 0; v < Vectors; ++v) {
        const vec<T> distance = get<T>(tile, p + row * step + v * lanes<T>) - shift[v];
        sum[v] += distance;
        square[v] += distance * distance;
      }
    T sums[3][Vectors * lanes<T>];
    for (int v = 0; v < Vectors; ++v) {
      store(sums[0] + v * lanes<T>, shift[v]);
      store(sums[1] + v * lanes<T>, sum[v]);
      store(sums[2] + v * lanes<T>, square[v]);
    }
    const double before = double(tile.before), rows = double(tile.rows);
    for (int i = 0; i < tile.count; ++i) {
      double &m = mean[tile.column + i], &s = squares[tile.column + i];
      const Deviations<double> block = deviations_about<double>(sums[0][i], sums[1][i], sums[2][i], rows);
      const Deviations<double> both = merged({m, s}, block, before, rows);
      m = both.mean, s = both.squares;
    }
    if constexpr (Part) rest += tile.count;
    if (!Part && tile.column == 0) whole += tile.rows;
  });
  // Elements of the row, by group: the mean of their means, then the distances from it.
  const double members = double((whole * a.row + rest) / a.groups);
  for (int64 g = 0; g < 2 * a.groups; ++g) groups[g] = 0;
  auto count = [&](int64 i) { return double(whole + (i < rest)); };
  for_each_in_row(a, [&](int64 i, int64, int64 g) { groups[2 * g] += count(i) / members * mean[i]; });
  for_each_in_row(a, [&](int64 i, int64, int64 g) {
    const double distance = mean[i] - groups[2 * g];
    groups[2 * g + 1] += squares[i] + count(i) * distance * distance;
  });
}

template <class T, class S>
void statistics(const GroupNormActArgs& a, int64 n, int64 begin, int64 end, void* memory) {
  const S* x = (const S*)a.x + n * a.voxels * a.channels;
  for (int64 slab = begin; slab < end; ++slab)
    statistics_of_slab<T>(a, x, slab, memory, a.partial + (n * a.slabs + slab) * 2 * a.groups);
}

template <bool Residual, bool Relu, bool Stream, class T, class S>
BKIND3D_FN void apply_to(const GroupNormActArgs& a, int64 n, int64 begin, int64 end, const Constants<T>& k) {
  const int64 sample = n * a.voxels * a.channels;
  for_each_tile<wide, T>(a, begin, end, [&]<int Vectors, bool Part>(const Tile<Vectors, Part> tile) {
    const S *x = (const S*)a.x + sample + tile.at, *residual = (const S*)a.residual + (Residual ? sample + tile.at : 0);
    S* y = (S*)a.y + sample + tile.at;
    const int64 step = a.row;
    vec<T> mean[Vectors], scale[Vectors], bias[Vectors];
    for (int v = 0; v < Vectors; ++v) {
      const int64 i = tile.column + v * lanes<T>;
      mean[v] = load(k.mean + i), scale[v] = load(k.scale + i), bias[v] = load(k.bias + i);
    }
    for (int64 row = 0; row < tile.rows; ++row, x += step, residual += Residual ? step : 0, y += step)
      for (int v = 0; v < Vectors; ++v) {
        vec<T> value = normalised(get<T>(tile, x + v * lanes<T>), mean[v], scale[v], bias[v]);
        if constexpr (Residual) value += get<T>(tile, residual + v * lanes<T>);
        put<Stream>(tile, y + v * lanes<T>, Relu ? rectified(value) : value);
      }
  });
}

// f<value>()
template <class F>
BKIND3D_FN void with_flag(bool value, F f) {
  value ? f.template operator()<true>() : f.template operator()<false>();
}

template <class T, class S>
void apply(const GroupNormActArgs& a, int64 n, int64 begin, int64 end, void* memory) {
  const Constants<T> k = constants_of<T>(a, n, memory);
  with_flag(a.residual, [&]<bool Residual>() {
    with_flag(a.relu, [&]<bool Relu>() {
      with_flag(a.stream, [&]<bool Stream>() { apply_to<Residual, Relu, Stream, T, S>(a, n, begin, end, k); });
    });
  });
  if (a.stream) finish_copies();
}

// ---- backward ----

// Where a gradient is let through: everywhere, or as a ReLU did, of which the output is kept or made again.
enum class Mask { none, output, again };

template <class F>
BKIND3D_FN void with_mask(Mask mask, F f) {
  switch (mask) {
    case Mask::none: return f.template operator()<Mask::none>();
    case Mask::output: return f.template operator()<Mask::output>();
    case Mask::again: return f.template operator()<Mask::again>();
  }
}

BKIND3D_FN Mask mask_of(const GroupNormActArgs& a) {
  return !a.relu ? Mask::none : a.output ? Mask::output : Mask::again;
}

template <Mask mask, bool Residual, class T, class S>
BKIND3D_FN void sums_of_slab(const GroupNormActArgs& a, int64 n, int64 slab, const Constants<T>& k, double* channels) {
  const int64 sample = n * a.voxels * a.channels;
  double *total = (double*)k.end, *moment = total + a.row;
  for (int64 i = 0; i < a.row; ++i) total[i] = moment[i] = 0;
  // Blocks, by element of the row.
  for_each_tile<narrow, T>(a, slab, slab + 1, [&]<int Vectors, bool Part>(const Tile<Vectors, Part> tile) {
    const int64 at = sample + tile.at, step = a.row;
    const S *x = (const S*)a.x + at, *grad = (const S*)a.grad + at, *output = (const S*)a.output;
    S* residual = (S*)a.grad_residual;
    if constexpr (mask == Mask::output) output += at;
    if constexpr (Residual) residual += at;
    vec<T> mean[Vectors], scale[Vectors], bias[Vectors], sum[Vectors], product[Vectors];
    for (int v = 0; v < Vectors; ++v) {
      const int64 i = tile.column + v * lanes<T>;
      mean[v] = load(k.mean + i), scale[v] = load(k.scale + i), bias[v] = load(k.bias + i);
      sum[v] = product[v] = vec<T>{};
    }
    for (int64 row = 0; row < tile.rows; ++row) {
      for (int v = 0; v < Vectors; ++v) {
        const int64 i = row * step + v * lanes<T>;
        const vec<T> value = get<T>(tile, x + i);
        vec<T> h = get<T>(tile, grad + i);
        if constexpr (mask == Mask::output) h = passed(h, get<T>(tile, output + i));
        if constexpr (mask == Mask::again) h = passed(h, normalised(value, mean[v], scale[v], bias[v]));
        if constexpr (Residual) put(tile, residual + i, h);
        sum[v] += h;
        product[v] += h * (value - mean[v]);
      }
    }
    T sums[2][Vectors * lanes<T>];
    for (int v = 0; v < Vectors; ++v) store(sums[0] + v * lanes<T>, sum[v]), store(sums[1] + v * lanes<T>, product[v]);
    for (int i = 0; i < tile.count; ++i) total[tile.column + i] += sums[0][i], moment[tile.column + i] += sums[1][i];
  });
  // Elements of the row, by channel.
  for (int64 c = 0; c < 2 * a.channels; ++c) channels[c] = 0;
  for_each_in_row(a, [&](int64 i, int64 c, int64) { channels[2 * c] += total[i], channels[2 * c + 1] += moment[i]; });
}

template <class T, class S>
void sums(const GroupNormActArgs& a, int64 n, int64 begin, int64 end, void* memory) {
  const Constants<T> k = constants_of<T>(a, n, memory);
  with_mask(mask_of(a), [&]<Mask mask>() {
    for (int64 slab = begin; slab < end; ++slab) {
      double* channels = a.partial + (n * a.slabs + slab) * 2 * a.channels;
      a.grad_residual ? sums_of_slab<mask, true, T, S>(a, n, slab, k, channels)
                      : sums_of_slab<mask, false, T, S>(a, n, slab, k, channels);
    }
  });
}

template <Mask mask, bool Stream, class T, class S>
BKIND3D_FN void differentiate(const GroupNormActArgs& a, int64 n, int64 begin, int64 end, const S* let_through,
                              const Constants<T>& k) {
  const int64 sample = n * a.voxels * a.channels;
  for_each_tile<narrow, T>(a, begin, end, [&]<int Vectors, bool Part>(const Tile<Vectors, Part> tile) {
    const int64 at = sample + tile.at, step = a.row;
    const S *x = (const S*)a.x + at, *grad = let_through + at, *output = (const S*)a.output;
    S* target = (S*)a.grad_x + at;
    if constexpr (mask == Mask::output) output += at;
    vec<T> mean[Vectors], scale[Vectors], bias[Vectors];
    GroupGradient<vec<T>> group[Vectors];
    for (int v = 0; v < Vectors; ++v) {
      const int64 i = tile.column + v * lanes<T>;
      mean[v] = load(k.mean + i), scale[v] = load(k.scale + i), bias[v] = load(k.bias + i);
      group[v] = {load(k.slope + i), load(k.offset + i)};
    }
    for (int64 row = 0; row < tile.rows; ++row) {
      for (int v = 0; v < Vectors; ++v) {
        const int64 i = row * step + v * lanes<T>;
        const vec<T> value = get<T>(tile, x + i);
        vec<T> h = get<T>(tile, grad + i);
        if constexpr (mask == Mask::output) h = passed(h, get<T>(tile, output + i));
        if constexpr (mask == Mask::again) h = passed(h, normalised(value, mean[v], scale[v], bias[v]));
        put<Stream>(tile, target + i, input_gradient(h, value, mean[v], scale[v], group[v]));
      }
    }
  });
}

template <class T, class S>
void gradient(const GroupNormActArgs& a, int64 n, int64 begin, int64 end, void* memory) {
  const Constants<T> k = constants_of<T>(a, n, memory);
  with_flag(a.stream, [&]<bool Stream>() {
    // The residual's gradient, where it was written, is what has been let through.
    if (a.grad_residual) return differentiate<Mask::none, Stream, T>(a, n, begin, end, (const S*)a.grad_residual, k);
    with_mask(mask_of(a), [&]<Mask mask>() { differentiate<mask, Stream, T>(a, n, begin, end, (const S*)a.grad, k); });
  });
  if (a.stream) finish_copies();
}

}  // namespace

#define BKIND3D_BY_STORAGE(task) {task<float, float>, task<double, double>, task<float, bfloat16>, task<float, float16>}
extern const GroupNormActLoops group_norm_act_loops;
const GroupNormActLoops group_norm_act_loops = {
    {lanes<float>, lanes<double>}, BKIND3D_BY_STORAGE(statistics), BKIND3D_BY_STORAGE(apply),
    BKIND3D_BY_STORAGE(sums),      BKIND3D_BY_STORAGE(gradient),
};

}  // namespace BKIND3D_ISA
}  // namespace bkind3d
