// Edge maps in CUDA: max over edges of w exp(-d^2 / sigma^2), its winners, and the gradient to ends and weights.
//
// A small kernel makes a table of the edges' frames for each map and sample, in double, 32 bytes an edge in float.
// Forward: a block lists in shared memory the edges whose upper bound over its 32 x 32 pixels reaches the best lower
// bound; each of its 4 warps keeps of them, in the same way, those of four tiles of 8 x 8, apart those that end in or
// before a tile and those that do not, whose pixels need half of the arithmetic. A lane has two pixels, whose best
// scores and winners stay in registers; one exponential gives the value. Culling changes no bit. Backward: a warp has
// 8 x 16 pixels and writes one record for each edge that has won there; two small kernels add records up, by edge, then
// by keypoint, in double and in order. Up to 16 maps share a launch. Saved for backward: the inputs and the winners, 2
// bytes a pixel.
//
// Bound by instructions: at 64 samples of 435 edges on 128^2 pixels, sigma 2.9, a block lists 244 edges, a tile keeps
// 47 and takes 1900 (sm_90), against 6 bytes a pixel, 6.3 MB. Backward has 6 winners in a tile, and takes 1300.
// Measured on an H200 (benchmarks/results/2026-11-27-h200/times/results.csv, batch-64): forward 0.083 ms, backward
// 0.470, both in a training step 0.737; the host takes 0.4 to 0.6 ms of any backward pass (docs/benchmarks.md).
#include "rasterize_edges.h"

#include <algorithm>
#include <limits>

#include "../common/portable.h"
#include "launch.cuh"

namespace bkind3d {

// One instruction each, where the templates of portable.h are two. They lose a NaN, but no frame holds one.
BKIND3D_FN float min_of(float a, float b) { return fminf(a, b); }
BKIND3D_FN float max_of(float a, float b) { return fmaxf(a, b); }

}  // namespace bkind3d

#include "../common/rasterize_edges.h"

namespace bkind3d {
namespace {

constexpr int most_maps = 16;  // in one launch

// Forward: a block has a square of pixels, each of its warps one quarter of it, which is four tiles.
constexpr int tile = 8, quarter = 2 * tile, square = 2 * quarter;
constexpr int warps = 4, threads = 32 * warps;
constexpr int rows_below = 32 / tile, pixels_of_lane = tile / rows_below;
constexpr int list_capacity = 256;  // edges that a block lists at once

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

// What all kernels are given.
struct Problem : RasterizeEdgesArgs {
  EdgeMap map[most_maps];
};

__device__ __forceinline__ float exp_of(float x) { return expf(x); }
__device__ __forceinline__ double exp_of(double x) { return exp(x); }

// Never fused with a sum.
__device__ __forceinline__ float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double rounded_product(double a, double b) { return __dmul_rn(a, b); }

__device__ __forceinline__ int lane_index() { return int(threadIdx.x) % 32; }
__device__ __forceinline__ int warp_index() { return int(threadIdx.x) / 32; }
__device__ __forceinline__ int rank_in(unsigned mask) { return __popc(mask & ((1u << lane_index()) - 1)); }

template <class T>
__device__ __forceinline__ T largest_of_warp(T value) {
  for (int bits = 16; bits > 0; bits /= 2) value = max_of(value, __shfl_xor_sync(all_lanes, value, bits));
  return value;
}

template <class T>
__device__ __forceinline__ Bounds<T> bounds_of(const Tile<T>& t, const Frame<T>& f) {
  return bounds<T>(t, f.ux, f.uy, f.across, f.lo, f.hi, f.log_weight);
}

// Where a block, or a warp of backward, works: its map, sample, and first column and row.
struct Region {
  const EdgeMap& map;
  int64_t sample;
  unsigned number;  // of the square or tile in its sample and map
  int x, y;
};

__device__ __forceinline__ Region region_of(const Problem& p, unsigned number, int width, int height) {
  int i = 0;
  while (number >= p.map[i].end) ++i;
  const EdgeMap& map = p.map[i];
  const unsigned in_map = number - (i ? p.map[i - 1].end : 0), sample = in_map / map.per_sample;
  const unsigned in_sample = in_map - sample * map.per_sample, row = in_sample / map.columns;
  return {map, int64_t(sample), in_sample, int(in_sample - row * map.columns) * width, int(row) * height};
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

__device__ __forceinline__ Winners winners_of(const Problem& p, const Region& region) {
  const int64_t first = region.map.first_winner + region.sample * region.map.height * region.map.width;
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
  // Which map, sample and edge.
  const unsigned blocks = (p.count + threads - 1) / threads, pair = blockIdx.x / blocks;
  const int64_t sample = pair % p.samples;
  const EdgeMap& map = p.map[pair / p.samples];
  const int e = int(blockIdx.x - pair * blocks) * threads + int(threadIdx.x);
  if (e >= p.count) return;
  const int64_t a = p.edges[e * p.edge_stride[0]], b = p.edges[e * p.edge_stride[0] + p.edge_stride[1]];
  // Its frame and its logarithm.
  const Segment<double> s = segment(coordinate<T>(p, sample, a, 0, map.width, p.first_width),
                                    coordinate<T>(p, sample, a, 1, map.height, p.first_height),
                                    coordinate<T>(p, sample, b, 0, map.width, p.first_width),
                                    coordinate<T>(p, sample, b, 1, map.height, p.first_height), map.sigma);
  const T weight = static_cast<const T*>(p.weights)[sample * p.weight_stride[0] + e * p.weight_stride[1]];
  const double infinity = __builtin_inf();
  const double log_weight = weight > 0 ? min_of(log(double(weight)), 1e30) : -infinity;
  const bool broken = s.across != s.across || weight != weight;
  table[map.first_frame + sample * p.count + e] =
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
  Frame<T> frames[list_capacity];
  Entry kept[warps][4][list_capacity];
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
  // Edges between whose ends the tile is.
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
  // The others, from the back of the list.
  Best<T> others[pixels_of_lane];
#pragma unroll
  for (Best<T>& b : others) b = {-T(__builtin_inf()), -1};
#pragma unroll 2
  for (int i = 0; i < kept.others; ++i) {
    const int entry = list[list_capacity - 1 - i];
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
  // The better of both.
#pragma unroll
  for (int r = 0; r < pixels_of_lane; ++r) {
    const bool earlier = others[r].score == best[r].score && others[r].entry < best[r].entry;
    best[r] = others[r].score > best[r].score || earlier ? others[r] : best[r];
  }
}

// Of a warp's four tiles, which edges of the block's list may win there, by their bounds over the tile.
template <class T>
__device__ __forceinline__ void keep(const Frame<T>* frames, int size, const Tile<T> (&tiles)[4], T least, T slack,
                                     Entry (*lists)[list_capacity], Kept (&kept)[4]) {
  // The best lower bound of each tile.
  const int lane = lane_index();
  T lowers[4] = {least, least, least, least};
  Kept counts[4] = {};
  for (int i = lane; i < size; i += 32) {
    const Frame<T> f = frames[i];
#pragma unroll
    for (int q = 0; q < 4; ++q) lowers[q] = max_of(lowers[q], bounds_of(tiles[q], f).lower - slack);
  }
#pragma unroll
  for (int q = 0; q < 4; ++q) lowers[q] = largest_of_warp(lowers[q]);
  // The edges that reach it.
  for (int first = 0; first < size; first += 32) {
    const int i = first + lane;
    const Frame<T> f = frames[i < size ? i : 0];
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const Bounds<T> b = bounds_of(tiles[q], f);
      const bool may_win = i < size && !(b.upper < lowers[q]), between = b.far_end == 0;
      const unsigned in_front = __ballot_sync(all_lanes, may_win && between);
      const unsigned behind = __ballot_sync(all_lanes, may_win && !between);
      const int rank = rank_in(between ? in_front : behind);
      const int slot = between ? counts[q].between + rank : list_capacity - 1 - counts[q].others - rank;
      if (may_win) lists[q][slot] = Entry(i * int(sizeof(Frame<T>)));
      counts[q].between += __popc(in_front);
      counts[q].others += __popc(behind);
    }
  }
#pragma unroll
  for (int q = 0; q < 4; ++q)
    if (lane == 0) kept[q] = counts[q];
  __syncwarp();
}

// With more edges than a list can hold there are several rounds; in between, the map holds best scores.
struct Round {
  int size;
  bool first, last;
};

// The pixels of one tile against the edges kept for it.
template <class T>
__device__ __forceinline__ void draw_tile(const Problem& p, const Region& block, const Frame<T>* frames,
                                          const Entry* list, Kept kept, int column, int row, Round round) {
  const EdgeMap& map = block.map;
  T* values = static_cast<T*>(map.values) + block.sample * map.height * map.width;
  const Winners winners = winners_of(p, block);
  const T infinity = T(__builtin_inf());
  const int first = row * map.width + column, step = rows_below * map.width;
  // Where the lane's pixels are, and what they have from earlier rounds.
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
  // Values and winners.
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
__device__ __forceinline__ void draw(const Problem& p, const Region& block, Lists<T>& lists, T least, T slack,
                                     Round round) {
  const EdgeMap& map = block.map;
  const int warp = warp_index(), x0 = block.x + warp % 2 * quarter, y0 = block.y + warp / 2 * quarter;
  if (x0 >= map.width || y0 >= map.height) return;
  const T left = T(x0) - centre<T>(map.width), top = T(y0) - centre<T>(map.height), end = T(quarter - 1);
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
    draw_tile(p, block, lists.frames, lists.kept[warp][q], lists.counts_kept[warp][q], x + lane_index() % tile,
              y + lane_index() / tile, round);
  }
}

// The largest lower bound of an edge over the block's square.
template <class T>
__device__ __forceinline__ T best_lower(const Frame<T>* frames, int count, const Tile<T>& area, T (&lowers)[warps]) {
  T lower = lowest_score<T>;
  for (int e = int(threadIdx.x); e < count; e += threads) lower = max_of(lower, bounds_of(area, frames[e]).lower);
  lower = largest_of_warp(lower);
  if (lane_index() == 0) lowers[warp_index()] = lower;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < warps; ++w) lower = max_of(lower, lowers[w]);
  return lower;
}

template <class T>
__global__ void __launch_bounds__(threads, blocks_at_once<T>) forward_kernel(Problem p, const Frame<T>* table) {
  Lists<T>& lists = shared<Lists<T>>();
  const Region block = region_of(p, blockIdx.x, square, square);
  const EdgeMap& map = block.map;
  const Frame<T>* frames = table + map.first_frame + block.sample * p.count;
  const T cx = centre<T>(map.width), cy = centre<T>(map.height), slack = T(p.slack);
  const Tile<T> area = tile_of(T(block.x) - cx, T(block.y) - cy, min_of(T(block.x + square - 1) - cx, cx),
                               min_of(T(block.y + square - 1) - cy, cy), T(map.sigma));
  // The best lower bound of the square.
  const T least = best_lower(frames, p.count, area, lists.lowers) - slack;
  // Edges that reach it, a block's worth at a time. The last turn has none left.
  Round round = {0, true, false};
  for (int base = 0, turn = 0; !round.last; base += threads, turn ^= 1) {
    const int e = base + int(threadIdx.x);
    const bool may_win = e < p.count && !(bounds_of(area, frames[e]).upper < least);
    const unsigned mask = __ballot_sync(all_lanes, may_win);
    if (lane_index() == 0) lists.counts[turn][warp_index()] = __popc(mask);
    __syncthreads();
    int before = 0, total = 0;
#pragma unroll
    for (int w = 0; w < warps; ++w) {
      before += w < warp_index() ? lists.counts[turn][w] : 0;
      total += lists.counts[turn][w];
    }
    // The list is full, or complete: its edges are drawn.
    round.last = base >= p.count;
    if (round.last || round.size + total > list_capacity) {
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
    const bool upper = lane_index() & 4 * half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const T other = __shfl_xor_sync(all_lanes, upper ? v[i] : v[i + half], 4 * half);
      v[i] = (upper ? v[i + half] : v[i]) + other;
    }
  }
  v[0] += __shfl_xor_sync(all_lanes, v[0], 2);
  return v[0] + __shfl_xor_sync(all_lanes, v[0], 1);
}

template <class T>
struct Contribution {
  int winner;  // of the pixel; none: the largest int
  T numbers[entries];
};

constexpr int no_winner = std::numeric_limits<int>::max();

// A pixel's part in the record of its winner, but for the factor that all of its pixels have. d value / d end = 2 value
// share (pixel - nearest point) / sigma^2, and (pixel - nearest point) / sigma is across * (-uy, ux) + beyond * (ux,
// uy) with (ux, uy) of length 1. Without the weight: d value / d weight neither overflows nor vanishes with it.
template <class T>
__device__ __forceinline__ Contribution<T> contribution_of(const Problem& p, const Region& region,
                                                           const Frame<T>* frames, int x, int y) {
  const EdgeMap& map = region.map;
  if (x >= map.width || y >= map.height) return {no_winner, {}};
  const int winner = winners_of(p, region).get(y * map.width + x);
  if (winner < 0 || winner >= p.count) return {no_winner, {}};
  const T grad = static_cast<const T*>(
      map.grad)[region.sample * map.grad_stride[0] + y * map.grad_stride[1] + x * map.grad_stride[2]];
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
  const unsigned number = blockIdx.x * warps + warp_index();
  if (number >= count) return;
  const int lane = lane_index(), groups = (p.count + 31) / 32;
  const Region region = region_of(p, number, backward_width, backward_height);
  const int64_t at = region.sample * p.tiles + region.map.first_tile + region.number;
  const Frame<T>* frames = table + region.map.first_frame + region.sample * p.count;
  // What each pixel adds to its winner.
  Contribution<T> pixels[backward_pixels];
#pragma unroll
  for (int r = 0; r < backward_pixels; ++r)
    pixels[r] = contribution_of(p, region, frames, region.x + lane % backward_width,
                                region.y + r * backward_rows + lane / backward_width);
  Word* words = scratch.words + at * groups;
  for (int g = lane; g < groups; g += 32) words[g] = {0, 0};
  __syncwarp();
  T* record = static_cast<T*>(scratch.records) + at * scratch.most_records * entries;
  const T factor_x = T(double(region.map.width) / p.first_width);
  const T factor_y = T(double(region.map.height) / p.first_height);
  // One winner after the other, from the lowest edge on.
  Word word = {0, 0};
  int group = 0;
  for (unsigned index = 0;; ++index, record += entries) {
    int edge = no_winner;
#pragma unroll
    for (int r = 0; r < backward_pixels; ++r) edge = pixels[r].winner < edge ? pixels[r].winner : edge;
    edge = __reduce_min_sync(all_lanes, edge);
    if (word.edges && (edge / 32 != group) && lane == 0) words[group] = word;
    if (edge == no_winner) break;
    if (edge / 32 != group) word = {0, index};
    group = edge / 32;
    word.edges |= 1u << edge % 32;
    // Its record.
    T numbers[entries] = {};
#pragma unroll
    for (int r = 0; r < backward_pixels; ++r) {
      if (pixels[r].winner != edge) continue;
      pixels[r].winner = no_winner;
#pragma unroll
      for (int i = 0; i < entries; ++i) numbers[i] += pixels[r].numbers[i];
    }
    const T sum = sums_of_warp(numbers);
    const T weight = static_cast<const T*>(p.weights)[region.sample * p.weight_stride[0] + edge * p.weight_stride[1]];
    const int i = lane / 4;
    if (lane % 4 == 0 && i < entries) record[i] = i == 0 ? sum : sum * (2 * weight * (i % 2 ? factor_x : factor_y));
  }
}

// 32 edges of one sample: their records in the order of maps and tiles, in double. Each warp takes every eighth tile.
template <class T>
__global__ void __launch_bounds__(32 * finish_warps) finish_edges_kernel(Problem p, Scratch scratch, T* grad_weights) {
  struct WarpSums {
    double of[finish_warps][entries][32];
  };
  WarpSums& sums = shared<WarpSums>();
  const int lane = lane_index(), warp = warp_index();
  const unsigned groups = (p.count + 31) / 32, group = blockIdx.x % groups;
  const int64_t sample = blockIdx.x / groups;
  // Each lane has an edge, each warp its tiles.
  double lane_sums[entries] = {};
  for (int64_t base = warp; base < p.tiles; base += 32 * finish_warps) {
    const int64_t mine = base + lane * finish_warps;
    const Word word = mine < p.tiles ? scratch.words[(sample * p.tiles + mine) * groups + group] : Word{0, 0};
    for (unsigned left = __ballot_sync(all_lanes, word.edges != 0); left; left &= left - 1) {
      const int from = __ffs(left) - 1;
      const unsigned edges = __shfl_sync(all_lanes, word.edges, from);
      const unsigned first = __shfl_sync(all_lanes, word.first, from);
      if (!(edges >> lane & 1)) continue;
      const int64_t at = sample * p.tiles + base + from * finish_warps;
      const T* record =
          static_cast<const T*>(scratch.records) + (at * scratch.most_records + first + rank_in(edges)) * entries;
#pragma unroll
      for (int i = 0; i < entries; ++i) lane_sums[i] += record[i];
    }
  }
  // The warps together.
#pragma unroll
  for (int i = 0; i < entries; ++i) sums.of[warp][i][lane] = lane_sums[i];
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
  const int64_t row = int64_t(blockIdx.x) * warps + warp_index();
  if (row >= p.samples * p.points) return;
  const int64_t sample = row / p.points, point = row - sample * p.points;
  double x = 0, y = 0;
  for (int64_t e = lane_index(); e < p.count; e += 32) {
    for (int end = 0; end < 2; ++end) {
      if (p.edges[e * p.edge_stride[0] + end * p.edge_stride[1]] != point) continue;
      const double* of = ends + (sample * p.count + e) * 4 + 2 * end;
      x += of[0];
      y += of[1];
    }
  }
  for (int bits = 16; bits > 0; bits /= 2) {
    x += __shfl_xor_sync(all_lanes, x, bits);
    y += __shfl_xor_sync(all_lanes, y, bits);
  }
  if (lane_index() == 0) {
    grad_keypoints[2 * row] = T(x);
    grad_keypoints[2 * row + 1] = T(y);
  }
}

// ---- launches ----

int64_t backward_tiles(const EdgeMap& map) {
  return ceil_divide(map.height, backward_height) * ceil_divide(map.width, backward_width);
}

// f(a problem with up to most_maps of the maps, how many areas of this size they have in all samples).
template <class F>
void in_launches(const RasterizeEdgesArgs& args, EdgeMaps maps, int height, int width, F f) {
  Problem p{args};
  for (int64_t i = 0; i < maps.count; ++i) p.tiles += backward_tiles(maps.first[i]);
  int64_t first_tile = 0;
  for (int64_t first = 0; first < maps.count; first += most_maps) {
    p.maps = int(std::min<int64_t>(most_maps, maps.count - first));
    int64_t end = 0;
    for (int i = 0; i < p.maps; ++i) {
      EdgeMap& map = p.map[i] = maps.first[first + i];
      const int64_t columns = ceil_divide(map.width, width), per_sample = columns * ceil_divide(map.height, height);
      end += args.samples * per_sample;
      STD_TORCH_CHECK(end < (int64_t(1) << 31), "sizes: too many pixels in all samples");
      map.first_tile = first_tile;
      map.end = unsigned(end), map.columns = unsigned(columns), map.per_sample = unsigned(per_sample);
      first_tile += backward_tiles(map);
    }
    f(p, end);
  }
}

template <class T>
void fill_table(Stream stream, const Problem& p, Frame<T>* table) {
  launch(stream, {p.maps * p.samples * ceil_divide(p.count, threads), threads}, prepare_kernel<T>, p, table);
}

int most_records(const RasterizeEdgesArgs& args) { return std::min(args.count, backward_height * backward_width); }

int64_t groups_of_edges(const RasterizeEdgesArgs& args) { return ceil_divide(args.count, 32); }

template <class T>
void launch_forward(Stream stream, const RasterizeEdgesArgs& args, EdgeMaps maps, Frame<T>* table) {
  in_launches(args, maps, square, square, [&](const Problem& p, int64_t squares) {
    fill_table(stream, p, table);
    launch(stream, {squares, threads}, forward_kernel<T>, p, table);
  });
}

template <class T>
void launch_backward(Stream stream, const RasterizeEdgesArgs& args, EdgeMaps maps, const RasterizeEdgesGradients& g) {
  auto* table = static_cast<Frame<T>*>(g.table);
  const Scratch scratch = {static_cast<Word*>(g.words), g.records, static_cast<double*>(g.ends), most_records(args)};
  // Records of all tiles.
  Problem all{args};
  in_launches(args, maps, backward_height, backward_width, [&](const Problem& p, int64_t tiles) {
    fill_table(stream, p, table);
    launch(stream, {ceil_divide(tiles, warps), threads}, backward_kernel<T>, p, table, scratch, unsigned(tiles));
    all.tiles = p.tiles;
  });
  // Their sums by edge, then by keypoint.
  launch(stream, {args.samples * groups_of_edges(args), 32 * finish_warps}, finish_edges_kernel<T>, all, scratch,
         static_cast<T*>(g.weights));
  launch(stream, {ceil_divide(args.samples * args.points, warps), threads}, finish_points_kernel<T>, all, scratch.ends,
         static_cast<T*>(g.keypoints));
}

}  // namespace

RasterizeEdgesScratch rasterize_edges_scratch(const RasterizeEdgesArgs& args, EdgeMaps maps, bool is_double) {
  return by_arithmetic(is_double, [&](auto number) -> RasterizeEdgesScratch {
    using T = decltype(number);
    int64_t tiles = 0;
    for (int64_t i = 0; i < maps.count; ++i) tiles += args.samples * backward_tiles(maps.first[i]);
    return {maps.count * args.samples * args.count * int64_t(sizeof(Frame<T>)),
            tiles * groups_of_edges(args) * int64_t(sizeof(Word)),
            tiles * most_records(args) * entries * int64_t(sizeof(T)),
            args.samples * args.count * 4 * int64_t(sizeof(double))};
  });
}

void launch_rasterize_edges(Stream stream, const RasterizeEdgesArgs& args, EdgeMaps maps, bool is_double, void* table) {
  by_arithmetic(is_double,
                [&](auto number) { launch_forward(stream, args, maps, static_cast<Frame<decltype(number)>*>(table)); });
}

void launch_rasterize_edges_backward(Stream stream, const RasterizeEdgesArgs& args, EdgeMaps maps, bool is_double,
                                     const RasterizeEdgesGradients& gradients) {
  by_arithmetic(is_double, [&](auto number) { launch_backward<decltype(number)>(stream, args, maps, gradients); });
}

}  // namespace bkind3d
