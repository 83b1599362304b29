// Edge maps on the CPU: the loops, compiled once per instruction set.
//
// The segments of each (sample, map) are prepared once, 28 bytes (float) an edge. A band of 32 rows of one map is a
// task for a thread; in it squares of 32, 16 and 8 pixels each keep, of the list that the larger square left, the edges
// whose upper bound reaches the best lower bound. Those left visit the 64 pixels of the smallest square; best score and
// winner stay in registers, and one exponential gives the value. The bounds allow for rounding, so culling changes no
// bit. Backward takes the edges that won in a tile one after the other, sums over their pixels in vectors, writes one
// record for each edge that won in the band, and adds up in the order of maps and bands: the same sums for any number
// of threads. Saved for backward: the inputs and the winners (2 bytes a pixel).
//
// Bound by arithmetic: of 18.3 M pairs of pixel and edge (N = 8, 105 edges, maps of 8 to 128 pixels a side) 3.9 M are
// visited, at 10 operations for a vector of pixels, against 6 bytes written for each of 0.17 M pixels.
// Measured, 2 threads with AVX-512: forward 0.826 ms, backward 0.596, both 1.41
// (benchmarks/results/2026-11-26-cpu-bars/results.csv, paper).
#include "simd.h"

namespace bkind3d {
namespace BKIND3D_ISA {

BKIND3D_FN vec<double> sqrt_of(vec<double> x) {
#if defined(__AVX512F__)
  return (vec<double>)_mm512_sqrt_pd((__m512d)x);
#elif defined(__AVX2__)
  return (vec<double>)_mm256_sqrt_pd((__m256d)x);
#else
  for (int i = 0; i < lanes<double>; ++i) x[i] = __builtin_sqrt(x[i]);
  return x;
#endif
}

}  // namespace BKIND3D_ISA
}  // namespace bkind3d

#include "../common/rasterize_edges.h"
#include "rasterize_edges.h"

namespace bkind3d {
namespace BKIND3D_ISA {
namespace {

// Pixels: sides of the squares of the three culls in a band, each from the list that the one before has left. A vector
// of pixels is at most one tile wide; the rest of its lanes are further rows. Of these vectors, vectors_at_once one
// below the other keep their best scores and winners in registers while the edges pass by.
constexpr int square = band_rows, quarter = 16, tile = 8;
template <class T>
constexpr int lane_width = lanes<T> < tile ? lanes<T> : tile;
template <class T>
constexpr int lane_height = lanes<T> / lane_width<T>;
template <class T>
#if defined(__AVX512F__)
constexpr int vectors_at_once = tile / lane_height<T>;
#else
constexpr int vectors_at_once = 4;
#endif
constexpr int edges_at_once = 64;  // in their preparation
constexpr int backward_rows = 16;

template <class T>
struct integer_beside;
template <>
struct integer_beside<float> {
  using type = int;
};
template <>
struct integer_beside<double> {
  using type = long;
};
template <class T>
using Index = typename integer_beside<T>::type;  // as wide as T

BKIND3D_FN int64 least(int64 a, int64 b) { return a < b ? a : b; }
BKIND3D_FN int64 round_up(int64 value, int64 to) { return (value + to - 1) / to * to; }

// ---- a list of edges, one array for each number, and a register's worth of undrawn ones at its end ----

template <class T>
struct Edges {
  T *ux, *uy, *across, *lo, *hi, *log_weight;
  Index<T>* index;
};

template <class T>
int64 capacity(int64 count) {
  return round_up(count, lanes<T>) + lanes<T>;
}

template <class T>
int64 edges_bytes(int64 count) {
  return round_up(7 * capacity<T>(count) * int64(sizeof(T)), 64);
}

template <class T>
Edges<T> edges_at(char* memory, int64 count) {
  T* p = (T*)memory;
  const int64 n = capacity<T>(count);
  return {p, p + n, p + 2 * n, p + 3 * n, p + 4 * n, p + 5 * n, (Index<T>*)(p + 6 * n)};
}

// At the head of a table.
struct Head {
  int64 count;
  int64 nan_edge;  // the first edge with a NaN, or -1: the whole map is NaN then
};
constexpr int64 head_bytes = 64;

template <class T>
void end_list(Edges<T> e, int64 count) {
  const vec<T> zero = {};
  store(e.ux + count, zero), store(e.uy + count, zero), store(e.across + count, zero);
  store(e.lo + count, zero), store(e.hi + count, zero), store(e.log_weight + count, zero - T(__builtin_inf()));
}

template <class T>
BKIND3D_FN unsigned bits_of(ivec<T> mask) {
#if defined(__AVX512F__)
  return sizeof(T) == 4 ? _mm512_movepi32_mask((__m512i)mask) : _mm512_movepi64_mask((__m512i)mask);
#elif defined(__AVX2__)
  return sizeof(T) == 4 ? _mm256_movemask_ps((__m256)mask) : _mm256_movemask_pd((__m256d)mask);
#else
  unsigned bits = 0;
  for (int i = 0; i < lanes<T>; ++i) bits |= unsigned(mask[i] != 0) << i;
  return bits;
#endif
}

// The lanes of `from` whose bits are set, packed; up to a register's worth behind them is overwritten.
template <class T>
BKIND3D_FN void pack(T* to, const T* from, unsigned bits) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) {
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32((__mmask16)bits, _mm512_loadu_si512(from)));
  } else {
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi64((__mmask8)bits, _mm512_loadu_si512(from)));
  }
#else
  for (; bits; bits &= bits - 1) *to++ = from[__builtin_ctz(bits)];
#endif
}

// Appends the edges first + (lanes in bits) of `from`; `to` may be `from` if it is not ahead.
template <class T>
BKIND3D_FN int64 append(Edges<T> to, int64 count, Edges<T> from, int64 first, unsigned bits) {
  pack(to.ux + count, from.ux + first, bits);
  pack(to.uy + count, from.uy + first, bits);
  pack(to.across + count, from.across + first, bits);
  pack(to.lo + count, from.lo + first, bits);
  pack(to.hi + count, from.hi + first, bits);
  pack(to.log_weight + count, from.log_weight + first, bits);
  pack(to.index + count, from.index + first, bits);
  return count + __builtin_popcount(bits);
}

// The edges that may win a pixel of the square: those whose upper bound reaches the best lower bound. `to` may be
// `from`.
template <class T>
int64 cull(Tile<T> area, Edges<T> from, int64 count, Edges<T> to, T* upper) {
  vec<T> best = broadcast<T>(lowest_score<T>);
  for (int64 e = 0; e < count; e += lanes<T>) {
    const Bounds<vec<T>> b = bounds<vec<T>>(area, load(from.ux + e), load(from.uy + e), load(from.across + e),
                                            load(from.lo + e), load(from.hi + e), load(from.log_weight + e));
    store(upper + e, b.upper);
    best = max_of(best, b.lower);
  }
  const T least = maximum_of(best) - score_slack<T>;
  int64 kept = 0;
  for (int64 e = 0; e < count; e += lanes<T>) {
    const unsigned bits = bits_of<T>(load(upper + e) >= least);
    if (bits) kept = append(to, kept, from, e, bits);
  }
  end_list(to, kept);
  return kept;
}

// ---- preparation: the segments of one sample in the pixels of one map ----

// Keypoints relative to the map's centre, in its pixels, double (K, 2).
template <class T>
void keypoints_in_map(const RasterizeEdgesArgs& a, int64 sample, const EdgeMap& map, double* points) {
  const T* p = (const T*)a.keypoints + sample * a.keypoint_stride[0];
  for (int64 k = 0; k < a.points; ++k, p += a.keypoint_stride[1]) {
    points[2 * k] = (double(p[0]) + 0.5) * map.scale_x - 0.5 - 0.5 * double(map.width - 1);
    points[2 * k + 1] = (double(p[a.keypoint_stride[2]]) + 0.5) * map.scale_y - 0.5 - 0.5 * double(map.height - 1);
  }
}

struct Ends {
  double ax[edges_at_once], ay[edges_at_once], bx[edges_at_once], by[edges_at_once];
};

BKIND3D_FN void gather(const double* points, const int* edges, int count, Ends& ends) {
  for (int e = 0; e < count; ++e) {
    const double *a = points + 2 * edges[2 * e], *b = points + 2 * edges[2 * e + 1];
    ends.ax[e] = a[0], ends.ay[e] = a[1], ends.bx[e] = b[0], ends.by[e] = b[1];
  }
}

template <class T>
BKIND3D_FN void store_as(T* to, vec<double> v) {
  *(typename vector_of<T, lanes<double>>::unaligned*)to =
      __builtin_convertvector(v, typename vector_of<T, lanes<double>>::type);
}

// The segments of up to `edges_at_once` edges, rounded up to whole vectors; returns whether one of them may hold a NaN.
template <class T>
bool segments(const Ends& ends, int count, double sigma, Edges<T> e, T* inverse) {
  ivec<double> doubt = {};
  for (int i = 0; i < count; i += lanes<double>) {
    const Segment<vec<double>> s =
        segment(load(ends.ax + i), load(ends.ay + i), load(ends.bx + i), load(ends.by + i), sigma);
    store_as(e.ux + i, s.ux), store_as(e.uy + i, s.uy), store_as(e.across + i, s.across);
    store_as(e.lo + i, s.lo), store_as(e.hi + i, s.hi), store_as(inverse + i, s.inverse);
    doubt |= s.across != s.across;
  }
  return first_lane(doubt) >= 0;
}

template <class T>
Edges<T> behind(Edges<T> e, int64 n) {
  return {e.ux + n, e.uy + n, e.across + n, e.lo + n, e.hi + n, e.log_weight + n, e.index + n};
}

template <class T>
int64 first_nan(Edges<T> e, int64 count) {
  for (int64 i = 0; i < count; ++i)
    if (e.across[i] != e.across[i] || e.log_weight[i] != e.log_weight[i]) return i;
  return -1;
}

template <class T>
BKIND3D_FN Tile<T> tile_in(const EdgeMap& map, int64 x, int64 y, int64 side) {
  const int64 x1 = least(x + side, map.width), y1 = least(y + side, map.height);
  const T cx = T(0.5) * T(map.width - 1), cy = T(0.5) * T(map.height - 1);
  return tile_of(T(x) - cx, T(y) - cy, T(x1 - 1) - cx, T(y1 - 1) - cy, T(map.sigma));
}

// Backward looks edges up by their index: nothing is dropped, and there is an array of `inverse` behind the others.
template <class T>
void prepare(const RasterizeEdgesArgs& a, int64 sample, const EdgeMap& map, bool backward, char* table, char* scratch) {
  Head& head = *(Head*)table;
  const Edges<T> edges = edges_at<T>(table + head_bytes, a.count);
  double* points = (double*)scratch;
  T* upper = (T*)(scratch + round_up(a.points * 16, 64));
  T* inverse = backward ? (T*)(table + head_bytes + edges_bytes<T>(a.count)) : upper;
  keypoints_in_map<T>(a, sample, map, points);
  const T* log_weights = (const T*)a.log_weights + sample * a.log_weight_stride;
  // Frames and weights of all edges.
  bool doubt = false;
  Ends ends = {};
  for (int64 e = 0; e < a.count; e += edges_at_once) {
    const int some = int(least(a.count - e, edges_at_once));
    gather(points, a.edges + 2 * e, some, ends);
    doubt |= segments(ends, some, map.sigma, behind(edges, e), inverse + e);
    for (int i = 0; i < some; ++i) {
      edges.index[e + i] = Index<T>(e + i);
      edges.log_weight[e + i] = log_weights[e + i];
      doubt |= log_weights[e + i] != log_weights[e + i];
    }
  }
  // What forward leaves out: all edges of a map with a NaN, edges that win nowhere, edges not drawn.
  end_list(edges, a.count);
  head.count = a.count;
  head.nan_edge = doubt ? first_nan(edges, a.count) : -1;
  if (backward || head.nan_edge >= 0) return;
  if (a.cull) {
    head.count = cull(tile_in<T>(map, 0, 0, map.width + map.height), edges, a.count, edges, upper);
    return;
  }
  head.count = 0;
  for (int64 e = 0; e < a.count; e += lanes<T>) {
    const unsigned bits = bits_of<T>(load(edges.log_weight + e) > -T(__builtin_inf()));
    head.count = append(edges, head.count, edges, e, bits);
  }
  end_list(edges, head.count);
}

// ---- forward ----

// Of each pixel the best score and its edge.
template <class T>
struct Best {
  vec<T> score[vectors_at_once<T>];
  ivec<T> index[vectors_at_once<T>];
};

// Keeps the compiler from contracting the product that made v into a later sum: what all rows of a column share would
// be computed anew for each row, and the last bit would depend on where this is inlined.
template <class V>
BKIND3D_FN V settled(V v) {
#if defined(__x86_64__)
  __asm__("" : "+v"(v));
#endif
  return v;
}

// vectors_at_once vectors of pixels, one below the other, against all edges of the list.
template <class T>
BKIND3D_FN Best<T> visit(Edges<T> edges, int64 count, vec<T> x, vec<T> y) {
  Best<T> best;
  for (int r = 0; r < vectors_at_once<T>; ++r) {
    best.score[r] = broadcast<T>(-T(__builtin_inf()));
    best.index[r] = ivec<T>{} - 1;
  }
  for (int64 e = 0; e < count; ++e) {
    const vec<T> ux = broadcast(edges.ux[e]), uy = broadcast(edges.uy[e]), lo = broadcast(edges.lo[e]);
    const vec<T> hi = broadcast(edges.hi[e]), log_weight = broadcast(edges.log_weight[e]);
    const ivec<T> index = ivec<T>{} + edges.index[e];
    Column<vec<T>> c = column(x, ux, uy, broadcast(edges.across[e]));
    c.along = settled(c.along);
#pragma GCC unroll 8
    for (int r = 0; r < vectors_at_once<T>; ++r) {
      const vec<T> s = score(offset(c, y + T(r * lane_height<T>), ux, uy, lo, hi), log_weight);
      const ivec<T> better = s > best.score[r];
      best.score[r] = select(better, s, best.score[r]);
      best.index[r] = select(better, index, best.index[r]);
    }
  }
  return best;
}

// The lanes of v to lane_height rows of lane_width numbers, clipped to rows x columns.
template <class T, class S, class V>
BKIND3D_FN void store_rows(S* to, V v, int64 stride, int rows, int columns) {
  S buffer[lanes<T>];
  *(typename vector_of<S, lanes<T>>::unaligned*)buffer = v;
  for (int r = 0; r < lane_height<T> && r < rows; ++r) {
    const S* from = buffer + r * lane_width<T>;
    if (columns >= lane_width<T>) {
      __builtin_memcpy(to + r * stride, from, lane_width<T> * sizeof(S));
    } else {
      for (int i = 0; i < columns; ++i) to[r * stride + i] = from[i];
    }
  }
}

template <class T, class I>
BKIND3D_FN void write(const Best<T>& best, T* values, I* winners, int64 stride, int rows, int columns) {
  for (int r = 0; r < vectors_at_once<T> && r * lane_height<T> < rows; ++r) {
    const auto drawn = best.score[r] >= lowest_score<T>;
    const vec<T> value = select(drawn, exp_of(best.score[r]), vec<T>{});
    const ivec<T> index = select(drawn, best.index[r], ivec<T>{} - 1);
    const int64 at = r * lane_height<T> * stride;
    const int left = rows - r * lane_height<T>;
    store_rows<T>(values + at, value, stride, left, columns);
    store_rows<T>(winners + at, __builtin_convertvector(index, typename vector_of<I, lanes<T>>::type), stride, left,
                  columns);
  }
}

// Not inlined: with culling and without, the very same instructions.
template <class T, class I>
__attribute__((noinline)) void fill_tile(const EdgeMap& map, int64 sample, Edges<T> edges, int64 count, int64 x0,
                                         int64 y0) {
  const int64 x1 = least(x0 + tile, map.width), y1 = least(y0 + tile, map.height);
  const T cx = T(0.5) * T(map.width - 1), cy = T(0.5) * T(map.height - 1);
  vec<T> lane_x, lane_y;
  for (int i = 0; i < lanes<T>; ++i) lane_x[i] = T(i % lane_width<T>), lane_y[i] = T(i / lane_width<T>);
  for (int64 y = y0; y < y1; y += vectors_at_once<T> * lane_height<T>)
    for (int64 x = x0; x < x1; x += lane_width<T>) {
      const int64 at = (sample * map.height + y) * map.width + x;
      const Best<T> best = visit(edges, count, lane_x + (T(x) - cx), lane_y + (T(y) - cy));
      write(best, (T*)map.values + at, (I*)map.winners + at, map.width, int(y1 - y), int(x1 - x));
    }
}

template <class T, class I>
void fill_nan(const EdgeMap& map, int64 sample, int64 y0, int64 y1, int64 edge) {
  for (int64 at = (sample * map.height + y0) * map.width; at < (sample * map.height + y1) * map.width; ++at) {
    ((T*)map.values)[at] = T(__builtin_nan(""));
    ((I*)map.winners)[at] = I(edge);
  }
}

template <class T>
struct Scratch {
  Edges<T> near, nearer, nearest;
  T* upper;
};

// Tile by tile over a square of side `quarter` at (x0, y0), of edges that may win there.
template <class T, class I>
void fill_quarter(const EdgeMap& map, int64 sample, Edges<T> edges, int64 count, const Scratch<T>& s, int64 x0,
                  int64 y0) {
  for (int64 y = y0; y < least(y0 + quarter, map.height); y += tile)
    for (int64 x = x0; x < least(x0 + quarter, map.width); x += tile) {
      const int64 kept = cull(tile_in<T>(map, x, y, tile), edges, count, s.nearest, s.upper);
      fill_tile<T, I>(map, sample, s.nearest, kept, x, y);
    }
}

template <class T, class I>
void fill_square(const EdgeMap& map, int64 sample, Edges<T> edges, int64 count, const Scratch<T>& s, int64 x0,
                 int64 y0) {
  for (int64 y = y0; y < least(y0 + square, map.height); y += quarter)
    for (int64 x = x0; x < least(x0 + square, map.width); x += quarter) {
      const int64 kept = cull(tile_in<T>(map, x, y, quarter), edges, count, s.nearer, s.upper);
      fill_quarter<T, I>(map, sample, s.nearer, kept, s, x, y);
    }
}

template <class T, class I>
void forward(const RasterizeEdgesArgs& a, int64 sample, const EdgeMap& map, int64 band, const char* table,
             char* memory) {
  const Head head = *(const Head*)table;
  const Edges<T> all = edges_at<T>((char*)table + head_bytes, a.count);
  const int64 bytes = edges_bytes<T>(a.count), y0 = band * band_rows, y1 = least(y0 + band_rows, map.height);
  const Scratch<T> s = {edges_at<T>(memory, a.count), edges_at<T>(memory + bytes, a.count),
                        edges_at<T>(memory + 2 * bytes, a.count), (T*)(memory + 3 * bytes)};
  if (head.nan_edge >= 0) return fill_nan<T, I>(map, sample, y0, y1, head.nan_edge);
  if (!a.cull) {
    for (int64 y = y0; y < y1; y += tile)
      for (int64 x = 0; x < map.width; x += tile) fill_tile<T, I>(map, sample, all, head.count, x, y);
    return;
  }
  for (int64 x = 0; x < map.width; x += square) {
    const int64 kept = cull(tile_in<T>(map, x, y0, square), all, head.count, s.near, s.upper);
    fill_square<T, I>(map, sample, s.near, kept, s, x, y0);
  }
}

// ---- backward ----

// Sums over the pixels that an edge has won, of m = gradient * value: m, and m * share of the end * offset in the
// frame.
struct Record {
  int64 edge;
  double value, across_a, across_b, beyond_a, beyond_b;
};

template <class T>
struct EdgeSums {
  vec<T> value, across_a, across_b, beyond_a, beyond_b;
};

// A tile of pixels, a vector wide: their winners, cleared as they are dealt with, and the gradient of the map.
template <class T>
struct Pixels {
  ivec<T> winner[backward_rows];
  vec<T> grad[backward_rows];
};

template <class T>
BKIND3D_FN vec<T> load_gradient(const T* p, int64 stride, int count) {
  if (stride == 0) return broadcast(*p);
  if (stride == 1) return count == lanes<T> ? load(p) : load_first<T>(p, count);
  T buffer[lanes<T>] = {};
  for (int i = 0; i < count; ++i) buffer[i] = p[i * stride];
  return load(buffer);
}

template <class T, class I>
BKIND3D_FN ivec<T> load_winners(const I* p, int count) {
  typedef typename vector_of<I, lanes<T>>::unaligned Narrow;
  if (count == lanes<T>) return __builtin_convertvector(*(const Narrow*)p, ivec<T>);
  ivec<T> v = ivec<T>{} - 1;
  for (int i = 0; i < count; ++i) v[i] = p[i];
  return v;
}

template <class T, class I>
BKIND3D_FN int read(const EdgeMap& map, int64 sample, int64 x, int64 y0, int64 y1, Pixels<T>& pixels) {
  const int columns = int(least(map.width - x, lanes<T>));
  for (int64 y = y0; y < y1; ++y) {
    const T* grad = (const T*)map.grad + sample * map.grad_stride[0] + y * map.grad_stride[1] + x * map.grad_stride[2];
    pixels.winner[y - y0] = load_winners<T>((const I*)map.winners + (sample * map.height + y) * map.width + x, columns);
    pixels.grad[y - y0] = load_gradient(grad, map.grad_stride[2], columns);
  }
  return int(y1 - y0);
}

template <class T>
BKIND3D_FN Record add_up(Edges<T> edges, const T* inverses, int64 e, vec<T> x, T y, Pixels<T>& pixels, int first,
                         int rows) {
  const vec<T> ux = broadcast(edges.ux[e]), uy = broadcast(edges.uy[e]), lo = broadcast(edges.lo[e]);
  const vec<T> hi = broadcast(edges.hi[e]);
  const vec<T> inverse = broadcast(inverses[e]);
  const Column<vec<T>> c = column(x, ux, uy, broadcast(edges.across[e]));
  const ivec<T> index = ivec<T>{} + Index<T>(e);
  EdgeSums<T> s = {};
  for (int r = first; r < rows; ++r) {
    const ivec<T> won = pixels.winner[r] == index;
    if (first_lane(won) < 0) continue;
    pixels.winner[r] = select(won, ivec<T>{} - 1, pixels.winner[r]);
    const Offset<vec<T>> o = offset(c, broadcast(y + T(r)), ux, uy, lo, hi);
    const Shares<vec<T>> share = shares(o.clamped, lo, hi, inverse);
    const vec<T> m = select(won, pixels.grad[r] * exp_of(score(o, vec<T>{})), vec<T>{});
    const vec<T> ma = m * share.a, mb = m * share.b;
    s.value += m;
    s.across_a += ma * o.across, s.across_b += mb * o.across;
    s.beyond_a += ma * o.beyond, s.beyond_b += mb * o.beyond;
  }
  return {e, sum_of(s.value), sum_of(s.across_a), sum_of(s.across_b), sum_of(s.beyond_a), sum_of(s.beyond_b)};
}

BKIND3D_FN void add(Record& to, const Record& r) {
  to.value += r.value;
  to.across_a += r.across_a, to.across_b += r.across_b;
  to.beyond_a += r.beyond_a, to.beyond_b += r.beyond_b;
}

template <class T, class I>
int64 backward(const RasterizeEdgesArgs& a, int64 sample, const EdgeMap& map, int64 band, const char* table,
               Record* records, int* slot) {
  const Edges<T> edges = edges_at<T>((char*)table + head_bytes, a.count);
  const T* inverses = (const T*)(table + head_bytes + edges_bytes<T>(a.count));
  const T cx = T(0.5) * T(map.width - 1), cy = T(0.5) * T(map.height - 1);
  const int64 band_end = least((band + 1) * band_rows, map.height);
  __builtin_memset(slot, -1, a.count * sizeof(int));
  int count = 0;
  for (int64 y = band * band_rows; y < band_end; y += backward_rows)
    for (int64 x = 0; x < map.width; x += lanes<T>) {
      // The tile's winners one after the other, each with all of its pixels.
      Pixels<T> pixels;
      const int rows = read<T, I>(map, sample, x, y, least(y + backward_rows, band_end), pixels);
      for (int r = 0; r < rows;) {
        const int lane = first_lane(pixels.winner[r] >= 0);
        if (lane < 0) {
          ++r;
          continue;
        }
        const int64 e = ((const Index<T>*)&pixels.winner[r])[lane];
        if (e >= a.count) {  // no edge's: not the winners of the forward pass
          const ivec<T> w = pixels.winner[r];
          pixels.winner[r] = select(w == ivec<T>{} + Index<T>(e), ivec<T>{} - 1, w);
          continue;
        }
        const Record sums = add_up(edges, inverses, e, iota<T>() + (T(x) - cx), T(y) - cy, pixels, r, rows);
        // A record of its own, or what has been found before.
        if (slot[e] < 0) {
          slot[e] = count;
          records[count++] = sums;
        } else {
          add(records[slot[e]], sums);
        }
      }
    }
  return count;
}

// Records are without the weight, so that d value / d weight = exp(-d^2 / sigma^2) neither overflows nor vanishes with
// it. d value / d end = 2 value share (pixel - nearest point) / sigma^2, and (pixel - nearest point) / sigma is across
// * (-uy, ux) + beyond * (ux, uy) with (ux, uy) of length 1.
template <class T>
void collect(const RasterizeEdgesArgs& a, int64 sample, const EdgeMap& map, const char* table, const Record* records,
             int64 count, double* keypoints, double* weights) {
  const Edges<T> edges = edges_at<T>((char*)table + head_bytes, a.count);
  for (int64 i = 0; i < count; ++i) {
    const Record& r = records[i];
    const double weight = ((const T*)a.weights)[sample * a.weight_stride[0] + r.edge * a.weight_stride[1]];
    const double ux = 2 * weight * edges.ux[r.edge], uy = 2 * weight * edges.uy[r.edge];
    double *p = keypoints + 2 * a.edges[2 * r.edge], *q = keypoints + 2 * a.edges[2 * r.edge + 1];
    p[0] += map.scale_x * (r.beyond_a * ux - r.across_a * uy);
    p[1] += map.scale_y * (r.beyond_a * uy + r.across_a * ux);
    q[0] += map.scale_x * (r.beyond_b * ux - r.across_b * uy);
    q[1] += map.scale_y * (r.beyond_b * uy + r.across_b * ux);
    weights[r.edge] += r.value;
  }
}

// ---- the table of functions: the choice of T, and of the winners' type ----

int64 table_bytes(const RasterizeEdgesArgs& a, bool backward) {
  const int64 edges = a.is_double ? edges_bytes<double>(a.count) : edges_bytes<float>(a.count);
  return head_bytes + edges + (backward ? round_up(a.count * 8, 64) : 0);
}

int64 record_bytes() { return sizeof(Record); }

int64 scratch(const RasterizeEdgesArgs& a) {
  const int64 edges = a.is_double ? edges_bytes<double>(a.count) : edges_bytes<float>(a.count);
  return 4 * edges + round_up(a.points * 16, 64);
}

void prepare_any(const RasterizeEdgesArgs& a, int64 sample, int64 map, bool backward, char* table, void* scratch) {
  if (a.is_double) {
    prepare<double>(a, sample, a.map[map], backward, table, (char*)scratch);
  } else {
    prepare<float>(a, sample, a.map[map], backward, table, (char*)scratch);
  }
}

void forward_any(const RasterizeEdgesArgs& a, int64 sample, int64 map, int64 band, const char* table, void* scratch) {
  const auto run = a.is_double ? (a.wide_winners ? forward<double, int> : forward<double, short>)
                               : (a.wide_winners ? forward<float, int> : forward<float, short>);
  run(a, sample, a.map[map], band, table, (char*)scratch);
}

int64 backward_any(const RasterizeEdgesArgs& a, int64 sample, int64 map, int64 band, const char* table, char* records,
                   void* scratch) {
  const auto run = a.is_double ? (a.wide_winners ? backward<double, int> : backward<double, short>)
                               : (a.wide_winners ? backward<float, int> : backward<float, short>);
  return run(a, sample, a.map[map], band, table, (Record*)records, (int*)scratch);
}

void collect_any(const RasterizeEdgesArgs& a, int64 sample, int64 map, const char* table, const char* records,
                 int64 count, double* keypoints, double* weights) {
  (a.is_double ? collect<double> : collect<float>)(a, sample, a.map[map], table, (const Record*)records, count,
                                                   keypoints, weights);
}

}  // namespace

extern const RasterizeEdgesLoops rasterize_edges_loops = {table_bytes, record_bytes, scratch,    prepare_any,
                                                          forward_any, backward_any, collect_any};

}  // namespace BKIND3D_ISA
}  // namespace bkind3d
