// The softmax of a volume, its moments of the voxel index, and their derivatives. Templates over V, a floating type or
// a vector of them (portable.h), over T, the floating type of V, and over A, that of long sums; exponentials are left
// to the caller.
//
// A voxel with logit l has the weight e = exp((l - maximum) beta), beta = 1 / temperature. Weights of a few voxels are
// summed in V about an origin near their largest (Sums), then kept about their mean in A (Moments), so that neither a
// large volume nor a sharp peak far from the origin cancels.
#pragma once

#include "portable.h"

namespace bkind3d {

// Symmetric matrices have their entries in the order xx, xy, xz, yy, yz, zz.

// What is subtracted from the logits: their maximum, or 0 where all are -inf (masked), since -inf + inf is NaN.
template <class T>
BKIND3D_FN T softmax_reference(T maximum) {
  return maximum == -T(__builtin_inf()) ? T(0) : maximum;
}

// The weight is the exponential of this; with beta / ln 2 in place of beta, 2 to the power of this.
template <class V, class T>
BKIND3D_FN V softmax_exponent(V logit, T reference, T beta) {
  return (logit - reference) * beta;
}

// Sums over voxels of the weights e, of e d and of e d d^T, d = index - origin.
template <class V>
struct Sums {
  V total{}, first[3]{}, second[6]{};
};

// Adds voxels of one (x, y), given their own sums of e, e dz and e dz^2.
template <bool Covariance, class V, class T>
BKIND3D_FN void add_line(Sums<V>& sums, V total, V first, V second, T dx, T dy) {
  const V x = total * dx, y = total * dy;
  sums.total += total;
  sums.first[0] += x;
  sums.first[1] += y;
  sums.first[2] += first;
  if constexpr (Covariance) {
    sums.second[0] += x * dx;
    sums.second[1] += x * dy;
    sums.second[2] += first * dx;
    sums.second[3] += y * dy;
    sums.second[4] += first * dy;
    sums.second[5] += second;
  }
}

// Some of the voxels of a volume: the largest logit and where it is (the lowest index), the sum of the weights relative
// to it, their mean index, and the sum of e (i - mean)(i - mean)^T.
template <class A>
struct Moments {
  A maximum, total, mean[3], second[6];
  long long argmax;
};

template <class A>
BKIND3D_FN Moments<A> no_voxels() {
  return {A(-__builtin_inf()), 0, {0, 0, 0}, {0, 0, 0, 0, 0, 0}, 0};
}

template <bool Covariance, class A>
BKIND3D_FN Moments<A> moments_of(const Sums<A>& sums, A maximum, const A* origin, long long argmax) {
  Moments<A> m = no_voxels<A>();
  m.maximum = maximum;
  m.total = sums.total;
  m.argmax = argmax;
  if (sums.total == 0) return m;
  A d[3];
  for (int i = 0; i < 3; ++i) {
    d[i] = sums.first[i] / sums.total;
    m.mean[i] = origin[i] + d[i];
  }
  if constexpr (Covariance) {
    for (int i = 0, k = 0; i < 3; ++i)
      for (int j = i; j < 3; ++j, ++k) m.second[k] = sums.second[k] - sums.first[i] * d[j];
  }
  return m;
}

// a and b together; voxels of a come before those of b. `exponential` is exp of A.
template <bool Covariance, class A, class Exp>
BKIND3D_FN void merge(Moments<A>& a, const Moments<A>& b, A beta, Exp exponential) {
  const bool higher = b.maximum > a.maximum;
  const A maximum = higher ? b.maximum : a.maximum;
  const A scale_a = a.maximum == maximum ? A(1) : exponential((a.maximum - maximum) * beta);
  const A scale_b = b.maximum == maximum ? A(1) : exponential((b.maximum - maximum) * beta);
  a.maximum = maximum;
  a.argmax = higher ? b.argmax : a.argmax;
  const A total_a = a.total * scale_a, total_b = b.total * scale_b;
  a.total = total_a + total_b;
  A share = total_b / a.total, delta[3];
  share = a.total == 0 ? A(0) : share;
  for (int i = 0; i < 3; ++i) {
    delta[i] = b.mean[i] - a.mean[i];
    a.mean[i] += delta[i] * share;
  }
  if constexpr (Covariance) {
    for (int i = 0, k = 0; i < 3; ++i)
      for (int j = i; j < 3; ++j, ++k)
        a.second[k] = a.second[k] * scale_a + b.second[k] * scale_b + delta[i] * delta[j] * (total_a * share);
  }
}

// ---- backward ----

// What the gradient of one volume's logits depends on, besides logit and index. With d = index - mean:
// dL/dl = e (constant + linear . d + d^T quadratic d), plus `peak` at the argmax.
template <class A>
struct VolumeGradient {
  A maximum, mean[3], constant, linear[3], quadratic[6], peak;
  long long argmax;
};

// g: gradients of mean (3), peak and covariance (3 x 3, as it is: not necessarily symmetric; null for none).
template <class A>
BKIND3D_FN VolumeGradient<A> volume_gradient(const A* g_mean, A g_peak, const A* g_covariance, const A* mean,
                                             const A* covariance, A maximum, A total, long long argmax, A beta) {
  const A scale = beta / total, peak = 1 / total;
  VolumeGradient<A> v = {maximum, {mean[0], mean[1], mean[2]}, -g_peak * peak, {}, {}, beta * g_peak * peak, argmax};
  for (int i = 0; i < 3; ++i) v.linear[i] = g_mean[i] * scale;
  if (g_covariance) {
    for (int i = 0, k = 0; i < 3; ++i) {
      for (int j = i; j < 3; ++j, ++k) {
        const A both = i == j ? g_covariance[4 * i] : g_covariance[3 * i + j] + g_covariance[3 * j + i];
        v.quadratic[k] = both * scale;
      }
      for (int j = 0; j < 3; ++j) v.constant -= g_covariance[3 * i + j] * covariance[3 * i + j];
    }
  }
  v.constant *= scale;
  return v;
}

// Along z at one (x, y): dL/dl = e (constant + dz (linear + dz quadratic)).
template <class A>
struct LineGradient {
  A constant, linear, quadratic;
};

template <class A>
BKIND3D_FN LineGradient<A> line_gradient(const VolumeGradient<A>& v, A x, A y) {
  const A dx = x - v.mean[0], dy = y - v.mean[1];
  return {v.constant + dx * (v.linear[0] + v.quadratic[0] * dx + v.quadratic[1] * dy) +
              dy * (v.linear[1] + v.quadratic[3] * dy),
          v.linear[2] + v.quadratic[2] * dx + v.quadratic[4] * dy, v.quadratic[5]};
}

template <class V, class T>
BKIND3D_FN V logit_gradient(V weight, V dz, const LineGradient<T>& line) {
  return weight * (line.constant + dz * (line.linear + dz * line.quadratic));
}

}  // namespace bkind3d
