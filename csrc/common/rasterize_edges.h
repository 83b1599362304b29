// Edges in images, per segment, pixel and tile: the segment's frame, the score of an edge at a pixel, bounds of it over
// a rectangle, and the derivative of the squared distance by both ends. Templates over V, a floating type or a vector
// of them (portable.h).
//
// The score is log w - d^2 / sigma^2; an edge's value is its exponential, so the winner of a pixel has the largest
// score. In the segment's own frame d^2 = across^2 + beyond^2, and both coordinates are a term in x plus a term in y.
// Positions are relative to the centre of the map, in pixels, where x and y are exact and small; the frame's are
// divided by sigma.
#pragma once

#include "portable.h"

namespace bkind3d {

// A pixel whose best score is lower has value 0 and no winner: the exponential would not be a normal number.
template <class T>
inline constexpr T lowest_score = T(-87.33);
template <>
inline constexpr double lowest_score<double> = -708.0;

template <class T>
inline constexpr T unit_roundoff = T(5.9604645e-8);
template <>
inline constexpr double unit_roundoff<double> = 1.1102230246251565e-16;

constexpr double min_length_squared = 1e-12;  // pixels^2: a shorter segment is a point, its first end

// (ux, uy) is the segment's direction over sigma. A point p has along = p . u and across = (u x p) + `across`; the ends
// are at along = lo and hi. inverse = 1 / (hi - lo), 0 for a point.
template <class V>
struct Segment {
  V ux, uy, across, lo, hi, inverse;
};

// From the ends (ax, ay), (bx, by). Always in double, however the pixels are visited: an end may be far outside, and
// what is left near the map is then the small difference of large numbers. A NaN or infinity makes the result NaN.
template <class V>
BKIND3D_FN Segment<V> segment(V ax, V ay, V bx, V by, double sigma) {
  const V dx = bx - ax, dy = by - ay, squared = dx * dx + dy * dy, finite = (squared - squared) + 1.0;
  const auto proper = squared > min_length_squared;
  const V length = sqrt_of(select(proper, squared, finite)), scale = finite / (length * sigma);
  const auto nearer = bx * bx + by * by < ax * ax + ay * ay;  // b is: the line is known best at the nearer end
  Segment<V> s;
  s.ux = select(proper, dx, finite) * scale;
  s.uy = select(proper, dy, finite - finite) * scale;
  s.lo = ax * s.ux + ay * s.uy;
  s.hi = select(proper, max_of(bx * s.ux + by * s.uy, s.lo), s.lo);
  s.across = select(nearer, bx, ax) * s.uy - select(nearer, by, ay) * s.ux;
  s.inverse = select(proper, sigma / length, finite - finite);
  return s;
}

// What all pixels of one column x share.
template <class V>
struct Column {
  V along, across;
};

template <class V>
BKIND3D_FN Column<V> column(V x, V ux, V uy, V across) {
  return {x * ux, across - x * uy};
}

// From the nearest point of the segment to a pixel: across it, and beyond its ends (0 between them).
template <class V>
struct Offset {
  V across, beyond, clamped;
};

template <class V>
BKIND3D_FN Offset<V> offset(Column<V> c, V y, V ux, V uy, V lo, V hi) {
  const V along = y * uy + c.along, clamped = min_of(max_of(along, lo), hi);
  return {y * ux + c.across, along - clamped, clamped};
}

template <class V>
BKIND3D_FN V score(Offset<V> o, V log_weight) {
  return (log_weight - o.across * o.across) - o.beyond * o.beyond;
}

// The nearest point is near * a + far * b. The smaller of the two comes from the nearer end: its relative error stays
// small where the other end is far outside. d(d^2)/da = -2 near * (pixel - nearest point), and far alike for b.
template <class V>
struct Shares {
  V a, b;
};

template <class V>
BKIND3D_FN Shares<V> shares(V clamped, V lo, V hi, V inverse) {
  const V from_a = clamped - lo, from_b = hi - clamped;
  const auto first = from_a <= from_b;
  const V small = select(first, from_a, from_b) * inverse, large = V{} + 1 - small;
  return {select(first, large, small), select(first, small, large)};
}

// A rectangle of pixel centres: its centre, half its extent, and `slack`, a bound of the rounding errors of across and
// along in it that do not depend on the edge.
template <class T>
struct Tile {
  T x, y, half_width, half_height, slack;
};

// Rounding errors are bounded 8 times over: culling must never change a result, and pixels are not visited by this
// much.
template <class T>
inline constexpr T tolerance = 16 * unit_roundoff<T>;
// The same for log w, which lies between -746 (-104) and 710 (89), and for lowest_score.
template <class T>
inline constexpr T score_slack = tolerance<T> * (sizeof(T) == 8 ? 1500 : 200);

template <class T>
BKIND3D_FN Tile<T> tile_of(T x0, T y0, T x1, T y1, T sigma) {
  Tile<T> t = {(x0 + x1) / 2, (y0 + y1) / 2, (x1 - x0) / 2, (y1 - y0) / 2, 0};
  t.slack = tolerance<T> * T(1.5) / sigma * (max_of(t.x, -t.x) + max_of(t.y, -t.y) + t.half_width + t.half_height);
  return t;
}

// No pixel of the tile has a score above `upper` + score_slack / 2, as computed, nor one below `lower` - score_slack /
// 2. Where far_end is 0, no pixel is beyond an end, as computed.
template <class V>
struct Bounds {
  V upper, lower, far_end;
};

template <class V>
BKIND3D_FN V absolute(V x) {
  return max_of(x, -x);
}

template <class V, class T>
BKIND3D_FN Bounds<V> bounds(Tile<T> t, V ux, V uy, V across, V lo, V hi, V log_weight) {
  const V zero = ux - ux, au = absolute(ux), av = absolute(uy), slack = tolerance<T> * absolute(across) + t.slack;
  const V radius_across = av * t.half_width + au * t.half_height + slack;
  const V radius_along = au * t.half_width + av * t.half_height + slack;
  const V side = absolute(t.y * ux + (across - t.x * uy)), along = t.x * ux + t.y * uy;
  const V outside = max_of(lo - along, along - hi);
  const V near_side = max_of(side - radius_across, zero), near_end = max_of(outside - radius_along, zero);
  const V far_side = side + radius_across, far_end = max_of(outside + radius_along, zero);
  return {log_weight - (near_side * near_side + near_end * near_end) * (1 - tolerance<T>),
          log_weight - (far_side * far_side + far_end * far_end) * (1 + tolerance<T>), far_end};
}

}  // namespace bkind3d
