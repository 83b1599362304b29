// Group normalisation with an activation, one element at a time, and its derivatives.
//
// V is a floating type or a vector of them. Within a sample n and a group g, with the mean m, r = 1 / sqrt(var + eps)
// and M elements, for channel c:
//   y = act((x - m) r w_c + b_c + residual)
//   dL/dx = r w_c h - r (sum of w h) / M - (x - m) r^3 (sum of w h (x - m)) / M
// where h is dL/dy where the activation lets it through, else 0, and the sums are over the group.
#pragma once

#include "portable.h"

namespace bkind3d {

// ---- mean and variance ----

// The mean of some numbers, and the sum of their squared distances from it.
template <class V>
struct Deviations {
  V mean, squares;
};

// From sums about any number near them: sum of (x - shift) and of (x - shift)^2.
template <class V>
BKIND3D_FN Deviations<V> deviations_about(V shift, V sum, V squares, V count) {
  const V offset = sum / count;
  return {shift + offset, max_of(squares - sum * offset, V{})};
}

// Of a numbers and b > 0 others (Chan, Golub, LeVeque, 1979).
template <class V>
BKIND3D_FN Deviations<V> merged(const Deviations<V>& left, const Deviations<V>& right, V a, V b) {
  const V share = b / (a + b), delta = right.mean - left.mean;
  return {left.mean + delta * share, left.squares + right.squares + delta * delta * (a * share)};
}

// ---- one element ----

// scale: r w. The mean is taken off first: a product would round what the subtraction leaves.
template <class V>
BKIND3D_FN V normalised(V x, V mean, V scale, V bias) {
  return (x - mean) * scale + bias;
}

// NaN stays NaN.
template <class V>
BKIND3D_FN V rectified(V y) {
  return max_of(y, V{});
}

// A gradient where a ReLU lets it through. y: before or after it.
template <class V>
BKIND3D_FN V passed(V gradient, V y) {
  return select(y <= V{}, V{}, gradient);
}

// ---- backward ----

// What is the same for all elements of a group.
template <class V>
struct GroupGradient {
  V slope, offset;
};

// weighted: sum of w h; moment: sum of w h (x - m); both over the `count` elements of the group.
template <class V>
BKIND3D_FN GroupGradient<V> group_gradient(V weighted, V moment, V rstd, V count) {
  return {-(rstd * rstd * rstd) * (moment / count), -rstd * (weighted / count)};
}

// h: the gradient that has been let through.
template <class V>
BKIND3D_FN V input_gradient(V h, V x, V mean, V scale, const GroupGradient<V>& group) {
  return h * scale + ((x - mean) * group.slope + group.offset);
}

}  // namespace bkind3d
