// Edge maps in CUDA: max over edges of w exp(-d^2 / sigma^2), its winners, and the gradient to ends and weights.
//
// A small kernel makes a table of the edges' frames for each map and sample, in double, 32 bytes an edge in float.
// Forward: a block lists in shared memory the edges whose upper bound over its 32 x 32 pixels reaches the best lower
// bound; each of its 4 warps keeps of them, in the same way, those of four tiles of 8 x 8, apart those that end in or
// before a tile and those that do not, whose pixels need half of the arithmetic. A lane has two pixels, whose best
// scores and winners stay in registers; one exponential gives the value. The bounds allow for rounding: culling changes
// no bit. Backward: a warp has 8 x 16 pixels and writes one record for each edge that has won among them, in the order
// of edges, and for each 32 edges which of them those are; two small kernels add records up, by edge, then by keypoint,
// in double. No atomics: the same bits each time, and `deterministic` asks for nothing more. Up to 16 maps of a call
// share each launch.
//
// What bounds it, on paper: instructions. 64 samples of 30 keypoints = 435 edges on 128^2 pixels, sigma 2.9, keypoints
// over 80 % of a side: a block lists 244 edges, a tile keeps 47, half of them visited at 14 instructions for 64 pixels,
// half at 28. With 530 to choose them, 180 for the block's list and 200 for reading and writing (sm_90), 1900 a tile:
// 34 us where an H100 or H200 issues one a clock in each of 528 schedulers at 1.75 GHz. The Triton kernel, counted
// alike, takes 54 us. A third of that would be 1000 clocks a tile: comparisons take two clocks each, so the visits
// alone take 750, until fewer edges are kept (27 with the best threshold there is). Bytes: 6 a pixel, 6.3 MB, 1.9 us
// at 3.35 TB/s (H100), 1.5 at 4.3 (a copy measured on an H200; 4.8 by its vendor). Backward reads as much; 6 distinct
// winners a tile at 125 instructions, 1300 in all: 12 us, then about 5 and 2 for the sums.
//
// Saved for backward: the inputs and the winners, 2 bytes a pixel. Occupancy: 64 registers, 32 warps on a
// multiprocessor (96 registers and 20 in double). Considered: tiles of 8 x 4, a list for each warp's quarter, bounds
// over 4 x 4 pixels, each within a tenth of this by count; atomic additions in backward, which would not need the small
// kernel for edges, a few us, but have no order. Not measured on a GPU yet.
#include "launch.cuh"

#include <algorithm>
#include <limits>
#include <tuple>
#include <vector>

#include "../common/portable.h"

namespace bkind3d {

// One instruction each, where the templates of portable.h are two. They lose a NaN, but no frame holds one.
BKIND3D_FN float min_of(float a, float b) { return fminf(a, b); }
BKIND3D_FN float max_of(float a, float b) { return fmaxf(a, b); }

}  // namespace bkind3d

#include "../common/rasterize_edges.h"

namespace bkind3d {
namespace {

constexpr int most_maps = 16;             // in one launch
constexpr int64_t int16_edges = 1 << 15;  // up to here the winner's index is int16
constexpr int64_t longest = 1 << 22;      // pixels of a side
constexpr unsigned every_lane = ~0u;

// Forward: a block has a square of pixels, each of its warps one quarter of it, which is four tiles. `room` is how many
// edges a block lists at once.
constexpr int tile = 8, part = 2 * tile, square = 2 * part;
constexpr int warps = 4, threads = 32 * warps;
constexpr int rows_below = 32 / tile, pixels_of_lane = tile / rows_below;
constexpr int room = 256;

// Backward: a warp has a tile of pixels.
constexpr int backward_width = 16, backward_height = 8, backward_pixels = backward_width * backward_height / 32;
constexpr int backward_rows = 32 / backward_width;
constexpr int entries = 5;  // of a record: the gradient of the weight, and of x and y of both ends
constexpr int finish_warps = 8;

// Of forward and backward on a multiprocessor: 64 registers for each thread, 96 in double.
template <class T>
constexpr int blocks_at_once = sizeof(T) == 8 ? 5 : 8;

// A segment and its edge. What pixels between the ends need comes first: 16 bytes in float.
template <class T>
struct alignas(16) Frame {
  T ux, uy, across, log_weight, lo, hi, inverse;
  int edge;
};

struct Map {
  void* values;
  const void* grad;
  int64_t grad_stride[3];
  int64_t winners;     // pixels of all samples in the maps before
  int64_t frames;      // of all samples and maps before
  int64_t first_tile;  // backward: tiles of one sample in the maps before
  unsigned end;        // squares, or tiles in backward, up to this map's last, of all samples and maps of the launch
  unsigned columns, per_sample;
  int height, width;
  double sigma;
};

// What all kernels are given.
struct Problem {
  const void *keypoints, *weights;
  const int64_t* edges;
  int64_t keypoint_stride[3], weight_stride[2], edge_stride[2];
  int64_t samples, points, tiles;  // tiles: of backward, of one sample in all maps
  int count, first_height, first_width, maps;
  void* winners;
  bool wide_winners;
  double slack;  // of scores; with infinity nothing is culled
  Map map[most_maps];
};

__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }

// Never fused with a sum.
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double rounded_product(double a, double b) { return __dmul_rn(a, b); }

__device__ __forceinline__ int lane_of() { return int(threadIdx.x) % 32; }
__device__ __forceinline__ int warp_of() { return int(threadIdx.x) / 32; }
__device__ __forceinline__ int rank_in(unsigned mask) { return __popc(mask & ((1u << lane_of()) - 1)); }

template <class T>
__device__ __forceinline__ T largest_of_warp(T value) {
  for (int bits = 16; bits > 0; bits /= 2) value = max_of(value, __shfl_xor_sync(every_lane, value, bits));
  return value;
}

template <class T>
__device__ __forceinline__ Bounds<T> bounds_of(const Tile<T>& t, const Frame<T>& f) {
  return bounds<T>(t, f.ux, f.uy, f.across, f.lo, f.hi, f.log_weight);
}

// Where a block, or a warp of backward, works: its map, sample, and first column and row.
struct Place {
  const Map& map;
  int64_t sample;
  unsigned number;  // of the square or tile in its sample and map
  int x, y;
};

__device__ __forceinline__ Place place_of(const Problem& p, unsigned number, int width, int height) {
  int i = 0;
  while (number >= p.map[i].end) ++i;
  const Map& map = p.map[i];
  const unsigned local = number - (i ? p.map[i - 1].end : 0), sample = local / map.per_sample;
  const unsigned own = local - sample * map.per_sample, row = own / map.columns;
  return {map, int64_t(sample), own, int(own - row * map.columns) * width, int(row) * height};
}

// The centre of a map, from where positions are counted.
template <class T>
__device__ __forceinline__ T centre(int length) {
  return T(0.5) * T(length - 1);
}

// The winners of one sample in one map, from its first pixel on.
struct Winners {
  void* first;
  bool wide;

  __device__ __forceinline__ int get(int pixel) const {
    return wide ? static_cast<const int*>(first)[pixel] : static_cast<const int16_t*>(first)[pixel];
  }
  __device__ __forceinline__ void set(int pixel, int winner) const {
    if (wide) {
      static_cast<int*>(first)[pixel] = winner;
    } else {
      static_cast<int16_t*>(first)[pixel] = int16_t(winner);
    }
  }
};

__device__ __forceinline__ Winners winners_of(const Problem& p, const Place& place) {
  const int64_t first = place.map.winners + place.sample * place.map.height * place.map.width;
  return {static_cast<char*>(p.winners) + first * (p.wide_winners ? 4 : 2), p.wide_winners};
}

// ---- the table of frames: for each map, sample and edge ----

// A keypoint's x or y from the centre of the map, in its pixels; NaN where there is no such keypoint.
template <class T>
__device__ __forceinline__ double coordinate(const Problem& p, int64_t sample, int64_t point, int axis, int length,
                                             int first_length) {
  if (point < 0 || point >= p.points) return __builtin_nan("");
  const T* source = static_cast<const T*>(p.keypoints);
  const int64_t at = sample * p.keypoint_stride[0] + point * p.keypoint_stride[1] + axis * p.keypoint_stride[2];
  return (double(source[at]) + 0.5) * (double(length) / first_length) - 0.5 - centre<double>(length);
}

// An edge with a NaN gets an infinite log w and no extent: its score is infinite at every pixel. An infinite weight has
// a finite logarithm, whose exponential is infinite all the same.
template <class T>
__global__ void __launch_bounds__(threads) prepare_kernel(Problem p, Frame<T>* table) {
  const unsigned blocks = (p.count + threads - 1) / threads, pair = blockIdx.x / blocks;
  const int64_t sample = pair % p.samples;
  const Map& map = p.map[pair / p.samples];
  const int e = int(blockIdx.x - pair * blocks) * threads + int(threadIdx.x);
  if (e >= p.count) return;
  const int64_t a = p.edges[e * p.edge_stride[0]], b = p.edges[e * p.edge_stride[0] + p.edge_stride[1]];
  const Segment<double> s = segment(coordinate<T>(p, sample, a, 0, map.width, p.first_width),
                                    coordinate<T>(p, sample, a, 1, map.height, p.first_height),
                                    coordinate<T>(p, sample, b, 0, map.width, p.first_width),
                                    coordinate<T>(p, sample, b, 1, map.height, p.first_height), map.sigma);
  const T weight = static_cast<const T*>(p.weights)[sample * p.weight_stride[0] + e * p.weight_stride[1]];
  const double infinity = __builtin_inf();
  const double log_weight = weight > 0 ? min_of(log(double(weight)), 1e30) : -infinity;
  const bool broken = s.across != s.across || weight != weight;
  table[map.frames + sample * p.count + e] =
      broken ? Frame<T>{0, 0, 0, T(infinity), 0, 0, 0, e}
             : Frame<T>{T(s.ux), T(s.uy), T(s.across), T(log_weight), T(s.lo), T(s.hi), T(s.inverse), e};
}

// ---- forward ----

// An edge of a block's list, as the place of its frame in bytes.
using Entry = uint16_t;

// What a warp has kept for a tile: in front, in their order, edges between whose ends all of its pixels are; from the
// back on the others.
struct Kept {
  int between, others;
};

template <class T>
struct Lists {
  Frame<T> frames[room];
  Entry kept[warps][4][room];
  Kept counts_kept[warps][4];
  T lowers[warps];
  int counts[2][warps];  // of two turns, so that one barrier a turn is enough
};

template <class T>
__device__ __forceinline__ const Frame<T>& frame_of(const Frame<T>* frames, int entry) {
  return *reinterpret_cast<const Frame<T>*>(reinterpret_cast<const char*>(frames) + entry);
}

template <class T>
struct Best {
  T score;
  int entry;  // -1: none, or one of an earlier round
};

// Of the kept edges at the pixels of a lane, which lie below one another at y. A tie goes to the lowest index. The
// product is rounded by itself, or which of two the compiler fuses could differ from copy to copy of the loop, and
// culling would change the last bit.
template <class T>
__device__ __forceinline__ void visit(const Frame<T>* frames, const Entry* list, Kept kept, T x,
                                      const T (&y)[pixels_of_lane], Best<T> (&best)[pixels_of_lane]) {
#pragma unroll 4
  for (int i = 0; i < kept.between; ++i) {
    const int entry = list[i];
    const Frame<T>& f = frame_of(frames, entry);
    const T ux = f.ux, log_weight = f.log_weight;
    const Column<T> c = column(x, ux, f.uy, f.across);
#pragma unroll
    for (int r = 0; r < pixels_of_lane; ++r) {
      const T s = score(Offset<T>{y[r] * ux + c.across, 0, 0}, log_weight);
      best[r] = s > best[r].score ? Best<T>{s, entry} : best[r];
    }
  }
  Best<T> others[pixels_of_lane];
#pragma unroll
  for (Best<T>& b : others) b = {-T(__builtin_inf()), -1};
#pragma unroll 2
  for (int i = 0; i < kept.others; ++i) {
    const int entry = list[room - 1 - i];
    const Frame<T>& f = frame_of(frames, entry);
    const T ux = f.ux, uy = f.uy, log_weight = f.log_weight, lo = f.lo, hi = f.hi;
    Column<T> c = column(x, ux, uy, f.across);
    c.along = rounded_product(x, ux);
#pragma unroll
    for (int r = 0; r < pixels_of_lane; ++r) {
      const T s = score(offset(c, y[r], ux, uy, lo, hi), log_weight);
      others[r] = s > others[r].score ? Best<T>{s, entry} : others[r];
    }
  }
#pragma unroll
  for (int r = 0; r < pixels_of_lane; ++r) {
    const bool earlier = others[r].score == best[r].score && others[r].entry < best[r].entry;
    best[r] = others[r].score > best[r].score || earlier ? others[r] : best[r];
  }
}

// Of a warp's four tiles, which edges of the block's list may win there, by their bounds over the tile.
template <class T>
__device__ __forceinline__ void keep(const Frame<T>* frames, int size, const Tile<T> (&tiles)[4], T least, T slack,
                                     Entry (*lists)[room], Kept (&kept)[4]) {
  const int lane = lane_of();
  T lowers[4] = {least, least, least, least};
  Kept counts[4] = {};
  for (int i = lane; i < size; i += 32) {
    const Frame<T> f = frames[i];
#pragma unroll
    for (int q = 0; q < 4; ++q) lowers[q] = max_of(lowers[q], bounds_of(tiles[q], f).lower - slack);
  }
#pragma unroll
  for (int q = 0; q < 4; ++q) lowers[q] = largest_of_warp(lowers[q]);
  for (int first = 0; first < size; first += 32) {
    const int i = first + lane;
    const Frame<T> f = frames[i < size ? i : 0];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const Bounds<T> b = bounds_of(tiles[q], f);
      const bool may_win = i < size && !(b.upper < lowers[q]), between = b.far_end == 0;
      const unsigned in_front = __ballot_sync(every_lane, may_win && between);
      const unsigned behind = __ballot_sync(every_lane, may_win && !between);
      const int rank = rank_in(between ? in_front : behind);
      const int place = between ? counts[q].between + rank : room - 1 - counts[q].others - rank;
      if (may_win) lists[q][place] = Entry(i * int(sizeof(Frame<T>)));
      counts[q].between += __popc(in_front);
      counts[q].others += __popc(behind);
    }
  }
#pragma unroll
  for (int q = 0; q < 4; ++q)
    if (lane == 0) kept[q] = counts[q];
  __syncwarp();
}

// With more edges than a list has room for there are several rounds; in between, the map holds best scores.
struct Round {
  int size;
  bool first, last;
};

// The pixels of one tile against the edges kept for it.
template <class T>
__device__ __forceinline__ void draw_tile(const Problem& p, const Place& block, const Frame<T>* frames,
                                          const Entry* list, Kept kept, int column, int row, Round round) {
  const Map& map = block.map;
  T* values = static_cast<T*>(map.values) + block.sample * map.height * map.width;
  const Winners winners = winners_of(p, block);
  const T infinity = T(__builtin_inf());
  const int first = row * map.width + column, step = rows_below * map.width;
  bool inside[pixels_of_lane];
  T y[pixels_of_lane];
  Best<T> best[pixels_of_lane];
#pragma unroll
  for (int r = 0; r < pixels_of_lane; ++r) {
    inside[r] = column < map.width && row + r * rows_below < map.height;
    y[r] = T(row + r * rows_below) - centre<T>(map.height);
    best[r] = {round.first || !inside[r] ? -infinity : values[first + r * step], -1};
  }
  visit(frames, list, kept, T(column) - centre<T>(map.width), y, best);
#pragma unroll
  for (int r = 0; r < pixels_of_lane; ++r) {
    if (!inside[r]) continue;
    const int at = first + r * step;
    const T score = best[r].score, shown = score == infinity ? T(__builtin_nan("")) : exp_of(score);
    const bool drawn = score >= lowest_score<T>;
    int winner = round.first ? -1 : winners.get(at);
    winner = best[r].entry < 0 ? winner : frame_of(frames, best[r].entry).edge;
    values[at] = round.last ? (drawn ? shown : T(0)) : score;
    winners.set(at, round.last && !drawn ? -1 : winner);
  }
}

// A warp's tiles against the edges that its block has listed.
template <class T>
__device__ __forceinline__ void draw(const Problem& p, const Place& block, Lists<T>& lists, T least, T slack,
                                     Round round) {
  const Map& map = block.map;
  const int warp = warp_of(), x0 = block.x + warp % 2 * part, y0 = block.y + warp / 2 * part;
  if (x0 >= map.width || y0 >= map.height) return;
  const T left = T(x0) - centre<T>(map.width), top = T(y0) - centre<T>(map.height), end = T(part - 1);
  const Tile<T> all = tile_of(left, top, left + end, top + end, T(map.sigma));
  const T half = T(tile - 1) / 2, aside = T(tile) / 2;
  const Tile<T> tiles[4] = {{all.x - aside, all.y - aside, half, half, all.slack},
                            {all.x + aside, all.y - aside, half, half, all.slack},
                            {all.x - aside, all.y + aside, half, half, all.slack},
                            {all.x + aside, all.y + aside, half, half, all.slack}};
  keep(lists.frames, round.size, tiles, least, slack, lists.kept[warp], lists.counts_kept[warp]);
#pragma unroll 1
  for (int q = 0; q < 4; ++q) {
    const int x = x0 + q % 2 * tile, y = y0 + q / 2 * tile;
    if (x >= map.width || y >= map.height) continue;
    draw_tile(p, block, lists.frames, lists.kept[warp][q], lists.counts_kept[warp][q], x + lane_of() % tile,
              y + lane_of() / tile, round);
  }
}

// The largest lower bound of an edge over the block's square.
template <class T>
__device__ __forceinline__ T best_lower(const Frame<T>* frames, int count, const Tile<T>& area, T (&lowers)[warps]) {
  T lower = lowest_score<T>;
  for (int e = int(threadIdx.x); e < count; e += threads) lower = max_of(lower, bounds_of(area, frames[e]).lower);
  lower = largest_of_warp(lower);
  if (lane_of() == 0) lowers[warp_of()] = lower;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < warps; ++w) lower = max_of(lower, lowers[w]);
  return lower;
}

template <class T>
__global__ void __launch_bounds__(threads, blocks_at_once<T>) forward_kernel(Problem p, const Frame<T>* table) {
  Lists<T>& lists = shared<Lists<T>>();
  const Place block = place_of(p, blockIdx.x, square, square);
  const Map& map = block.map;
  const Frame<T>* frames = table + map.frames + block.sample * p.count;
  const T cx = centre<T>(map.width), cy = centre<T>(map.height), slack = T(p.slack);
  const Tile<T> area = tile_of(T(block.x) - cx, T(block.y) - cy, min_of(T(block.x + square - 1) - cx, cx),
                               min_of(T(block.y + square - 1) - cy, cy), T(map.sigma));
  const T least = best_lower(frames, p.count, area, lists.lowers) - slack;
  Round round = {0, true, false};
  // The last turn has no edges left.
  for (int base = 0, turn = 0; !round.last; base += threads, turn ^= 1) {
    const int e = base + int(threadIdx.x);
    const bool may_win = e < p.count && !(bounds_of(area, frames[e]).upper < least);
    const unsigned mask = __ballot_sync(every_lane, may_win);
    if (lane_of() == 0) lists.counts[turn][warp_of()] = __popc(mask);
    __syncthreads();
    int before = 0, total = 0;
#pragma unroll
    for (int w = 0; w < warps; ++w) {
      before += w < warp_of() ? lists.counts[turn][w] : 0;
      total += lists.counts[turn][w];
    }
    round.last = base >= p.count;
    if (round.last || round.size + total > room) {
      draw(p, block, lists, least, slack, round);
      __syncthreads();
      round = {0, false, round.last};
    }
    if (may_win) lists.frames[round.size + before + rank_in(mask)] = frames[e];
    round.size += total;
  }
}

// ---- backward ----

// Which of 32 edges have won a pixel of a tile, and the record of the first of them; the others follow.
struct Word {
  unsigned edges, first;
};

struct Scratch {
  Word* words;    // (samples, tiles, groups of 32 edges)
  void* records;  // (samples, tiles, most_records, entries)
  double* ends;   // (samples, edges, 4)
  int most_records;
};

// The sum over the warp of each number, of number lane / 4 in each lane.
template <class T>
__device__ __forceinline__ T sums_of_warp(const T (&numbers)[entries]) {
  T v[8] = {};
#pragma unroll
  for (int i = 0; i < entries; ++i) v[i] = numbers[i];
#pragma unroll
  for (int half = 4; half > 0; half /= 2) {
    const bool upper = lane_of() & 4 * half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const T other = __shfl_xor_sync(every_lane, upper ? v[i] : v[i + half], 4 * half);
      v[i] = (upper ? v[i + half] : v[i]) + other;
    }
  }
  v[0] += __shfl_xor_sync(every_lane, v[0], 2);
  return v[0] + __shfl_xor_sync(every_lane, v[0], 1);
}

template <class T>
struct Share {
  int winner;  // of the pixel; none: the largest int
  T numbers[entries];
};

constexpr int nobody = std::numeric_limits<int>::max();

// A pixel's part in the record of its winner, but for the factor that all of its pixels have. d value / d end = 2 value
// share (pixel - nearest point) / sigma^2, and (pixel - nearest point) / sigma is across * (-uy, ux) + beyond * (ux,
// uy) with (ux, uy) of length 1. Without the weight: d value / d weight neither overflows nor vanishes with it.
template <class T>
__device__ __forceinline__ Share<T> share_of(const Problem& p, const Place& place, const Frame<T>* frames, int x,
                                             int y) {
  const Map& map = place.map;
  if (x >= map.width || y >= map.height) return {nobody, {}};
  const int winner = winners_of(p, place).get(y * map.width + x);
  if (winner < 0 || winner >= p.count) return {nobody, {}};
  const T grad = static_cast<const T*>(
      map.grad)[place.sample * map.grad_stride[0] + y * map.grad_stride[1] + x * map.grad_stride[2]];
  const Frame<T> f = frames[winner];
  const Column<T> c = column(T(x) - centre<T>(map.width), f.ux, f.uy, f.across);
  const Offset<T> o = offset(c, T(y) - centre<T>(map.height), f.ux, f.uy, f.lo, f.hi);
  const Shares<T> share = shares(o.clamped, f.lo, f.hi, f.inverse);
  const bool broken = f.log_weight == T(__builtin_inf());
  const T m = broken ? T(__builtin_nan("")) : grad * exp_of(score(o, T(0)));
  const T dx = m * (o.beyond * f.ux - o.across * f.uy), dy = m * (o.beyond * f.uy + o.across * f.ux);
  return {winner, {m, share.a * dx, share.a * dy, share.b * dx, share.b * dy}};
}

// A warp's tile: one record for each edge that has won in it, in the order of edges.
template <class T>
__global__ void __launch_bounds__(threads)
    backward_kernel(Problem p, const Frame<T>* table, Scratch scratch, unsigned count) {
  const unsigned number = blockIdx.x * warps + warp_of();
  if (number >= count) return;
  const int lane = lane_of(), groups = (p.count + 31) / 32;
  const Place place = place_of(p, number, backward_width, backward_height);
  const int64_t at = place.sample * p.tiles + place.map.first_tile + place.number;
  const Frame<T>* frames = table + place.map.frames + place.sample * p.count;
  Share<T> pixels[backward_pixels];
#pragma unroll
  for (int r = 0; r < backward_pixels; ++r)
    pixels[r] = share_of(p, place, frames, place.x + lane % backward_width,
                         place.y + r * backward_rows + lane / backward_width);
  Word* words = scratch.words + at * groups;
  for (int g = lane; g < groups; g += 32) words[g] = {0, 0};
  __syncwarp();
  T* record = static_cast<T*>(scratch.records) + at * scratch.most_records * entries;
  const T factor_x = T(double(place.map.width) / p.first_width);
  const T factor_y = T(double(place.map.height) / p.first_height);
  Word word = {0, 0};
  int group = 0;
  for (unsigned index = 0;; ++index, record += entries) {
    int edge = nobody;
#pragma unroll
    for (int r = 0; r < backward_pixels; ++r) edge = pixels[r].winner < edge ? pixels[r].winner : edge;
    edge = __reduce_min_sync(every_lane, edge);
    if (word.edges && (edge / 32 != group) && lane == 0) words[group] = word;
    if (edge == nobody) break;
    if (edge / 32 != group) word = {0, index};
    group = edge / 32;
    word.edges |= 1u << edge % 32;
    T numbers[entries] = {};
#pragma unroll
    for (int r = 0; r < backward_pixels; ++r) {
      if (pixels[r].winner != edge) continue;
      pixels[r].winner = nobody;
#pragma unroll
      for (int i = 0; i < entries; ++i) numbers[i] += pixels[r].numbers[i];
    }
    const T sum = sums_of_warp(numbers);
    const T weight = static_cast<const T*>(p.weights)[place.sample * p.weight_stride[0] + edge * p.weight_stride[1]];
    const int i = lane / 4;
    if (lane % 4 == 0 && i < entries) record[i] = i == 0 ? sum : sum * (2 * weight * (i % 2 ? factor_x : factor_y));
  }
}

// 32 edges of one sample: their records in the order of maps and tiles, in double. Each warp takes every eighth tile.
template <class T>
__global__ void __launch_bounds__(32 * finish_warps) finish_edges_kernel(Problem p, Scratch scratch, T* grad_weights) {
  struct Sums {
    double of[finish_warps][entries][32];
  };
  Sums& sums = shared<Sums>();
  const int lane = lane_of(), warp = warp_of();
  const unsigned groups = (p.count + 31) / 32, group = blockIdx.x % groups;
  const int64_t sample = blockIdx.x / groups;
  double own[entries] = {};
  for (int64_t base = warp; base < p.tiles; base += 32 * finish_warps) {
    const int64_t mine = base + lane * finish_warps;
    const Word word = mine < p.tiles ? scratch.words[(sample * p.tiles + mine) * groups + group] : Word{0, 0};
    for (unsigned left = __ballot_sync(every_lane, word.edges != 0); left; left &= left - 1) {
      const int from = __ffs(left) - 1;
      const unsigned edges = __shfl_sync(every_lane, word.edges, from);
      const unsigned first = __shfl_sync(every_lane, word.first, from);
      if (!(edges >> lane & 1)) continue;
      const int64_t at = sample * p.tiles + base + from * finish_warps;
      const T* record =
          static_cast<const T*>(scratch.records) + (at * scratch.most_records + first + rank_in(edges)) * entries;
#pragma unroll
      for (int i = 0; i < entries; ++i) own[i] += record[i];
    }
  }
#pragma unroll
  for (int i = 0; i < entries; ++i) sums.of[warp][i][lane] = own[i];
  __syncthreads();
  const int64_t e = int64_t(group) * 32 + lane;
  if (warp >= entries || e >= p.count) return;
  double sum = 0;
  for (int w = 0; w < finish_warps; ++w) sum += sums.of[w][warp][lane];
  if (warp == 0) {
    grad_weights[sample * p.count + e] = T(sum);
  } else {
    scratch.ends[(sample * p.count + e) * 4 + warp - 1] = sum;
  }
}

// A warp for each keypoint: the sum over the edges that end there.
template <class T>
__global__ void __launch_bounds__(threads) finish_points_kernel(Problem p, const double* ends, T* grad_keypoints) {
  const int64_t row = int64_t(blockIdx.x) * warps + warp_of();
  if (row >= p.samples * p.points) return;
  const int64_t sample = row / p.points, point = row - sample * p.points;
  double x = 0, y = 0;
  for (int64_t e = lane_of(); e < p.count; e += 32) {
    for (int end = 0; end < 2; ++end) {
      if (p.edges[e * p.edge_stride[0] + end * p.edge_stride[1]] != point) continue;
      const double* of = ends + (sample * p.count + e) * 4 + 2 * end;
      x += of[0];
      y += of[1];
    }
  }
  for (int bits = 16; bits > 0; bits /= 2) {
    x += __shfl_xor_sync(every_lane, x, bits);
    y += __shfl_xor_sync(every_lane, y, bits);
  }
  if (lane_of() == 0) {
    grad_keypoints[2 * row] = T(x);
    grad_keypoints[2 * row + 1] = T(y);
  }
}

// ---- host ----

#if defined(BKIND3D_EMULATED)
bool culling = true;
#else
constexpr bool culling = true;
#endif

// Everything that forward and backward share.
struct Call {
  Problem problem{};
  ScalarType type;
  std::vector<Map> maps;
  int64_t pixels = 0;  // of one sample, in all maps
};

void take_maps(Call& call, const std::vector<int64_t>& sizes, const std::vector<double>& sigmas) {
  STD_TORCH_CHECK(!sigmas.empty() && sizes.size() == 2 * sigmas.size(), "sizes: expected (H, W) for each sigma");
  Problem& p = call.problem;
  for (size_t i = 0; i < sigmas.size(); ++i) {
    const int64_t height = sizes[2 * i], width = sizes[2 * i + 1];
    STD_TORCH_CHECK(height >= 1 && width >= 1 && sigmas[i] > 0, "sizes and sigmas: expected positive numbers");
    STD_TORCH_CHECK(std::max(height, width) < longest && height * width < (int64_t(1) << 31),
                    "sizes: expected less than 2^22 pixels a side, and 2^31 in a map");
    Map map{};
    map.height = int(height);
    map.width = int(width);
    map.sigma = sigmas[i];
    map.winners = p.samples * call.pixels;
    map.frames = int64_t(i) * p.samples * p.count;
    map.first_tile = p.tiles;
    call.maps.push_back(map);
    call.pixels += height * width;
    p.tiles += ceil_divide(height, backward_height) * ceil_divide(width, backward_width);
  }
  p.first_height = call.maps[0].height;
  p.first_width = call.maps[0].width;
}

Call prepare(const Tensor& keypoints, const Tensor& weights, const Tensor& edges, const std::vector<int64_t>& sizes,
             const std::vector<double>& sigmas) {
  Call call;
  Problem& p = call.problem;
  call.type = keypoints.scalar_type();
  STD_TORCH_CHECK(keypoints.dim() == 3 && keypoints.size(2) == 2 &&
                      (call.type == ScalarType::Float || call.type == ScalarType::Double),
                  "keypoints: expected (N, K, 2) float32 or float64");
  STD_TORCH_CHECK(edges.dim() == 2 && edges.size(1) == 2 && edges.scalar_type() == ScalarType::Long,
                  "edges: expected (E, 2) int64");
  STD_TORCH_CHECK(edges.size(0) < (int64_t(1) << 31) - 2 * threads, "edges: too many");
  STD_TORCH_CHECK(weights.dim() == 2 && weights.size(0) == keypoints.size(0) && weights.size(1) == edges.size(0) &&
                      weights.scalar_type() == call.type,
                  "weights: expected (N, E) in the dtype of the keypoints");
  STD_TORCH_CHECK(weights.device() == keypoints.device(), "weights: expected the device of the keypoints");
  STD_TORCH_CHECK(edges.device() == keypoints.device(), "edges: expected the device of the keypoints");
  p.keypoints = keypoints.const_data_ptr();
  p.weights = weights.const_data_ptr();
  p.edges = edges.const_data_ptr<int64_t>();
  for (int i = 0; i < 3; ++i) p.keypoint_stride[i] = keypoints.stride(i);
  for (int i = 0; i < 2; ++i) p.weight_stride[i] = weights.stride(i);
  for (int i = 0; i < 2; ++i) p.edge_stride[i] = edges.stride(i);
  p.samples = keypoints.size(0);
  p.points = keypoints.size(1);
  p.count = int(edges.size(0));
  p.wide_winners = p.count > int16_edges;
  const double slack = call.type == ScalarType::Double ? score_slack<double> : score_slack<float>;
  p.slack = culling ? slack : std::numeric_limits<double>::infinity();
  take_maps(call, sizes, sigmas);
  return call;
}

// f(the problem with up to most_maps of the maps, how many areas of this size they have in all samples).
template <class F>
void in_launches(const Call& call, int height, int width, F f) {
  for (size_t first = 0; first < call.maps.size(); first += most_maps) {
    Problem p = call.problem;
    p.maps = int(std::min<size_t>(most_maps, call.maps.size() - first));
    int64_t end = 0;
    for (int i = 0; i < p.maps; ++i) {
      Map& map = p.map[i] = call.maps[first + i];
      const int64_t columns = ceil_divide(map.width, width), per_sample = columns * ceil_divide(map.height, height);
      end += p.samples * per_sample;
      STD_TORCH_CHECK(end < (int64_t(1) << 31), "sizes: too many pixels in all samples");
      map.columns = unsigned(columns);
      map.per_sample = unsigned(per_sample);
      map.end = unsigned(end);
    }
    f(p, end);
  }
}

Tensor scratch_like(const Tensor& tensor, int64_t bytes) {
  return torch::stable::new_empty(tensor, {bytes}, ScalarType::Byte);
}

template <class T>
void fill_table(const OnDevice& device, const Problem& p, Frame<T>* table) {
  device.launch(prepare_kernel<T>, {p.maps * p.samples * ceil_divide(p.count, threads), 1, 1, threads, 0}, p, table);
}

template <class T>
void run_forward(const Call& call, const Tensor& keypoints) {
  const int64_t frames = int64_t(call.maps.size()) * call.problem.samples * call.problem.count;
  const Tensor memory = scratch_like(keypoints, frames * int64_t(sizeof(Frame<T>)));
  auto* table = static_cast<Frame<T>*>(memory.mutable_data_ptr());
  const OnDevice device(keypoints);
  in_launches(call, square, square, [&](const Problem& p, int64_t squares) {
    fill_table(device, p, table);
    device.launch(forward_kernel<T>, {squares, 1, 1, threads, 0}, p, table);
  });
}

std::tuple<std::vector<Tensor>, Tensor> rasterize_edges(Tensor keypoints, Tensor weights, Tensor edges,
                                                        std::vector<int64_t> sizes, std::vector<double> sigmas) {
  Call call = prepare(keypoints, weights, edges, sizes, sigmas);
  Problem& p = call.problem;
  std::vector<Tensor> maps;
  for (Map& map : call.maps) {
    maps.push_back(torch::stable::new_empty(keypoints, {p.samples, map.height, map.width}));
    map.values = maps.back().mutable_data_ptr();
  }
  const ScalarType index = p.wide_winners ? ScalarType::Int : ScalarType::Short;
  const Tensor winners = torch::stable::new_empty(keypoints, {p.samples * call.pixels}, index);
  p.winners = winners.mutable_data_ptr();
  call.type == ScalarType::Double ? run_forward<double>(call, keypoints) : run_forward<float>(call, keypoints);
  return {std::move(maps), winners};
}

void take_gradients(Call& call, const std::vector<Tensor>& grads, const Tensor& winners, const Tensor& keypoints) {
  Problem& p = call.problem;
  STD_TORCH_CHECK(grads.size() == call.maps.size(), "grad_maps: expected one for each map");
  STD_TORCH_CHECK(winners.is_contiguous() && winners.numel() == p.samples * call.pixels &&
                      winners.scalar_type() == (p.wide_winners ? ScalarType::Int : ScalarType::Short) &&
                      winners.device() == keypoints.device(),
                  "winners: expected those that the forward pass returned");
  p.winners = const_cast<void*>(winners.const_data_ptr());  // backward reads them
  for (size_t i = 0; i < grads.size(); ++i) {
    Map& map = call.maps[i];
    const Tensor& grad = grads[i];
    STD_TORCH_CHECK(grad.dim() == 3 && grad.size(0) == p.samples && grad.size(1) == map.height &&
                        grad.size(2) == map.width && grad.scalar_type() == call.type &&
                        grad.device() == keypoints.device(),
                    "grad_maps: expected the shapes, dtype and device of the maps");
    map.grad = grad.const_data_ptr();
    for (int d = 0; d < 3; ++d) map.grad_stride[d] = grad.stride(d);
  }
}

template <class T>
void run_backward(const Call& call, const Tensor& keypoints, T* grad_keypoints, T* grad_weights) {
  const Problem& all = call.problem;
  const int64_t count = all.count, groups = ceil_divide(count, 32), tiles = all.samples * all.tiles;
  Scratch scratch{};
  scratch.most_records = int(std::min<int64_t>(count, backward_height * backward_width));
  const Tensor table_memory =
      scratch_like(keypoints, int64_t(call.maps.size()) * all.samples * count * int64_t(sizeof(Frame<T>)));
  const Tensor words = scratch_like(keypoints, tiles * groups * int64_t(sizeof(Word)));
  const Tensor records = scratch_like(keypoints, tiles * scratch.most_records * entries * int64_t(sizeof(T)));
  const Tensor ends = scratch_like(keypoints, all.samples * count * 4 * int64_t(sizeof(double)));
  auto* table = static_cast<Frame<T>*>(table_memory.mutable_data_ptr());
  scratch.words = static_cast<Word*>(words.mutable_data_ptr());
  scratch.records = records.mutable_data_ptr();
  scratch.ends = static_cast<double*>(ends.mutable_data_ptr());
  const OnDevice device(keypoints);
  in_launches(call, backward_height, backward_width, [&](const Problem& p, int64_t own) {
    fill_table(device, p, table);
    device.launch(backward_kernel<T>, {ceil_divide(own, warps), 1, 1, threads, 0}, p, table, scratch, unsigned(own));
  });
  device.launch(finish_edges_kernel<T>, {all.samples * groups, 1, 1, 32 * finish_warps, 0}, all, scratch, grad_weights);
  device.launch(finish_points_kernel<T>, {ceil_divide(all.samples * all.points, warps), 1, 1, threads, 0}, all,
                scratch.ends, grad_keypoints);
}

std::tuple<Tensor, Tensor> rasterize_edges_backward(std::vector<Tensor> grad_maps, Tensor keypoints, Tensor weights,
                                                    Tensor edges, Tensor winners, std::vector<int64_t> sizes,
                                                    std::vector<double> sigmas, bool) {
  Call call = prepare(keypoints, weights, edges, sizes, sigmas);
  take_gradients(call, grad_maps, winners, keypoints);
  const Problem& p = call.problem;
  Tensor grad_keypoints = torch::stable::new_empty(keypoints, {p.samples, p.points, 2});
  Tensor grad_weights = torch::stable::new_empty(weights, {p.samples, int64_t(p.count)});
  void *points = grad_keypoints.mutable_data_ptr(), *own = grad_weights.mutable_data_ptr();
  if (call.type == ScalarType::Double) {
    run_backward(call, keypoints, static_cast<double*>(points), static_cast<double*>(own));
  } else {
    run_backward(call, keypoints, static_cast<float*>(points), static_cast<float*>(own));
  }
  return {grad_keypoints, grad_weights};
}

}  // namespace
}  // namespace bkind3d

#if defined(BKIND3D_EMULATED)
// With and without culling, tests see the same bits.
extern "C" __attribute__((visibility("default"))) void rasterize_edges_culling(int on) { bkind3d::culling = on; }
#endif

BKIND3D_KERNELS(m) {
  m.impl("rasterize_edges", TORCH_BOX(&bkind3d::rasterize_edges));
  m.impl("rasterize_edges_backward", TORCH_BOX(&bkind3d::rasterize_edges_backward));
}
