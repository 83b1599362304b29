// What the torch face of group_norm_act (group_norm_act.cpp) hands to its kernels (group_norm_act.cu).
#pragma once

#include <cstdint>

#include "../common/storage.h"
#include "launch.h"

namespace bkind3d {

// T is the type of the arithmetic: double for float64 maps, float for all others. Maps are (N, voxels, channels)
// without gaps, at any address.
struct GroupNormActArgs {
  const void *x, *residual, *grad, *output;   // the last three may be null
  void *y, *grad_x, *grad_residual;           // likewise
  const void *weight, *bias;                  // T (channels)
  void *mean, *rstd;                          // T (N, groups); written by forward, read by backward
  void *grad_weight, *grad_bias;              // T (channels), or both null
  int64_t samples, voxels, channels, groups;  // channels: fewer than 2^31
  double eps;                                 // forward
  bool relu;
};

// Bytes that forward, or backward, needs besides; aligned as torch does.
int64_t group_norm_act_scratch(const GroupNormActArgs& args, Storage storage);
int64_t group_norm_act_backward_scratch(const GroupNormActArgs& args, Storage storage);

void launch_group_norm_act(Stream stream, const GroupNormActArgs& args, Storage storage, void* scratch);
// Gradients that are null are not made.
void launch_group_norm_act_backward(Stream stream, const GroupNormActArgs& args, Storage storage, void* scratch);

}  // namespace bkind3d
