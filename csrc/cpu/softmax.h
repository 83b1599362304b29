// Weights of a softmax in vectors. Included by *_loops.cpp alone.
#pragma once

#include "simd.h"
// After simd.h, whose vectors its templates look for.
#include "../common/soft_argmax3d.h"

namespace bkind3d {
namespace BKIND3D_ISA {

// In float a power of 2, whose factor goes into that of the temperature.
BKIND3D_FN float exponent_scale(float, double beta) { return float(beta * 1.4426950408889634); }
BKIND3D_FN double exponent_scale(double, double beta) { return beta; }

// R: a number, or a vector of one for each lane.
template <class R>
BKIND3D_FN vec<float> weight_of(vec<float> logit, R reference, R scale) {
  return exp2_of_nonpositive(softmax_exponent(logit, reference, scale));
}
template <class R>
BKIND3D_FN vec<double> weight_of(vec<double> logit, R reference, R scale) {
  return exp_of(softmax_exponent(logit, reference, scale));
}

}  // namespace BKIND3D_ISA
}  // namespace bkind3d
