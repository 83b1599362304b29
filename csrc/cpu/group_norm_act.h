// What the torch face of group_norm_act (group_norm_act.cpp) hands to its loops (group_norm_act_loops.cpp).
#pragma once

#include "isa.h"

namespace bkind3d {

// T is the type of the arithmetic: double for float64 maps, float for all others. Maps are (N, voxels, channels)
// without gaps.
struct GroupNormActArgs {
  const void *x, *residual, *grad, *output;  // the last three may be null
  void *y, *grad_x, *grad_residual;          // likewise
  const void *weight, *bias;                 // T (channels)
  const void *mean, *rstd;                   // T (N, groups)
  const void *slope, *offset;                // backward: GroupGradient, T (N, groups)
  long long voxels, channels, groups;
  bool relu;
  bool stream;  // y, or the gradient of x, past the caches: it is larger than they are

  // A row is a few voxels one after the other whose elements fill whole vectors; a sample's last row may be a part of
  // one. A block is a few rows, summed in T; a slab many rows. From sizes alone, so that results do not depend on the
  // number of threads.
  long long row;          // elements
  long long block, slab;  // rows
  long long slabs;        // of a sample

  // What a slab adds: forward (N, slabs, groups, 2), Deviations of each group; backward (N, slabs, channels, 2), for
  // each channel the sums of h and of h (x - mean), where h is the gradient that the activation lets through.
  double* partial;
};

// Slabs `begin` to `end` - 1 of sample n. The scratch is aligned to 64 bytes.
using GroupNormActTask = void (*)(const GroupNormActArgs&, long long n, long long begin, long long end, void* scratch);

struct GroupNormActLoops {
  long long lanes[2];  // for float and double
  // By the Storage of the maps.
  GroupNormActTask statistics[4], apply[4];  // forward: partial from x; y from mean and rstd
  GroupNormActTask sums[4], gradient[4];     // backward: partial, and the residual's gradient; that of x
};

constexpr long long scratch_bytes = 5 * 8 + 2 * 8;  // at most, for each element of a row

BKIND3D_DECLARE_LOOPS(GroupNormActLoops, group_norm_act_loops)

}  // namespace bkind3d
