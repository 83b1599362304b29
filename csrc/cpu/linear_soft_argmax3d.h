// What the torch face of linear_soft_argmax3d (linear_soft_argmax3d.cpp) hands to its loops
// (linear_soft_argmax3d_loops.cpp).
#pragma once

#include "../common/soft_argmax3d.h"
#include "isa.h"

namespace bkind3d {

// T is the type of the arithmetic: double for float64 features, float for all others. Sizes with `_step` are rounded up
// to a multiple of LinearSoftArgmaxLoops::step; what is beyond the true size is zero.
struct LinearSoftArgmaxArgs {
  const void* features;  // any strides (n, c, x, y, z)
  long long strides[5];
  long long channels, joints, shape[3];
  long long channel_step, joint_step;
  const void* columns;  // T (channels, joint_step): the weight transposed
  const void* rows;     // T (joints, channel_step): the weight; backward alone
  const void* bias;     // T (joint_step)
  double beta;
  bool covariance;

  // How the voxels of a sample are divided; from sizes alone, so that results do not depend on the number of threads.
  // One task is one slab of one sample: whole tiles, but for the last of the volume.
  long long tile, slab, slabs;

  Moments<double>* moments;               // forward: (N, joints, slabs)
  const VolumeGradient<double>* volumes;  // backward: (N, joints)
  void* grad_features;                    // (N, X, Y, Z, channels) in the type of the features, or null
  void* grad_weight;                      // T (tasks, joint_step, channel_step), or null
  bool stream;                            // past the caches: the features' gradient is larger than they are
};

struct LinearSoftArgmaxLoops {
  long long step[2];  // for float and double
  // By the Storage of the features.
  long long (*scratch[4])(const LinearSoftArgmaxArgs&);  // bytes that a thread needs; aligned to 64
  // Task (n, slab), flattened.
  void (*forward[4])(const LinearSoftArgmaxArgs&, long long task, void* scratch);
  void (*backward[4])(const LinearSoftArgmaxArgs&, long long task, void* scratch);
};

BKIND3D_DECLARE_LOOPS(LinearSoftArgmaxLoops, linear_soft_argmax3d_loops)

}  // namespace bkind3d
