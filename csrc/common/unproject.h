// Unprojection, per voxel and view: projection, visibility, bilinear taps, the softmax over views, and the derivatives
// of each. Templates over V, a floating type or a vector of them (portable.h).
#pragma once

#include "portable.h"

namespace bkind3d {

enum class Aggregation { softmax, mean, sum, max, weighted };

// Homogeneous pixel (x, y, depth) = Q (i, j, k, 1), Q row-major 3 x 4.
template <class V>
struct Homogeneous {
  V x, y, depth;
};

template <class V, class T>
BKIND3D_FN Homogeneous<V> project(const T* q, V i, V j, V k) {
  return {q[0] * i + q[1] * j + q[2] * k + q[3], q[4] * i + q[5] * j + q[6] * k + q[7],
          q[8] * i + q[9] * j + q[10] * k + q[11]};
}

// Whether a view sees pixel (u, v) at this depth: in front, and floor(u) in -1 .. W-1, floor(v) in -1 .. H-1, so that a
// tap is inside the map. A NaN compares false.
template <class V, class T>
BKIND3D_FN auto sees(V u, V v, V depth, T width, T height) {
  return (depth > 0) & (u >= -1) & (u < width) & (v >= -1) & (v < height);
}

// The two taps along one axis of length `size`: indices clamped into the map, and weights, zero for a tap outside.
// `inside` are 0 or 1: the weights' derivatives are -inside[0] and +inside[1].
template <class V>
struct AxisTaps {
  V index[2], weight[2], inside[2];
};

template <class V, class T>
BKIND3D_FN AxisTaps<V> axis_taps(V u, T size) {
  const V first = floor_of(u), fraction = u - first, zero = u - u, one = zero + 1;
  AxisTaps<V> taps;
  taps.inside[0] = select(first >= 0, one, zero);
  taps.inside[1] = select(first < size - 1, one, zero);
  taps.index[0] = select(first >= 0, first, zero);
  taps.index[1] = select(first < size - 1, first + 1, zero + (size - 1));
  taps.weight[0] = taps.inside[0] * (1 - fraction);
  taps.weight[1] = taps.inside[1] * fraction;
  return taps;
}

// d sample / du and d sample / dv from the gradient-weighted taps s[row][column] = sum over channels of g * feature.
template <class V>
struct PixelGradient {
  V u, v;
};

template <class V>
BKIND3D_FN PixelGradient<V> pixel_gradient(const AxisTaps<V>& x, const AxisTaps<V>& y, V s00, V s01, V s10, V s11) {
  return {
      y.weight[0] * (x.inside[1] * s01 - x.inside[0] * s00) + y.weight[1] * (x.inside[1] * s11 - x.inside[0] * s10),
      x.weight[0] * (y.inside[1] * s10 - y.inside[0] * s00) + x.weight[1] * (y.inside[1] * s11 - y.inside[0] * s01)};
}

// From the gradient at the pixel to that of its homogeneous coordinates: u = x / depth, v = y / depth.
template <class V>
BKIND3D_FN Homogeneous<V> homogeneous_gradient(PixelGradient<V> g, V u, V v, V depth) {
  const V gx = g.u / depth, gy = g.v / depth;
  return {gx, gy, -(gx * u + gy * v)};
}

// The softmax aggregate V = sum w v, w = softmax(v): dV/dv = w (1 + v - V).
template <class V>
BKIND3D_FN V softmax_gradient(V g, V weight, V value, V aggregate) {
  return g * weight * (1 + value - aggregate);
}

}  // namespace bkind3d
