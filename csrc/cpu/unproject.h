// What the torch face of unproject (unproject.cpp) hands to its loops (unproject_loops.cpp).
#pragma once

#include "../common/storage.h"
#include "../common/unproject.h"
#include "isa.h"

namespace bkind3d {

// T is the type of the arithmetic: double for float64 tensors, float for all others.
struct UnprojectArgs {
  // Features in T with channels last: element (n, m, y, x, c) at n stride_n + m stride_m + y stride_y + x stride_x + c.
  const void* features;
  long long stride_n, stride_m, stride_y, stride_x;
  const void* q;        // T (N, M, 12)
  const bool* mask;     // (N, M) or null
  const void* weights;  // T (N, M, C), or null without Aggregation::weighted
  long long samples, views, channels, height, width;
  long long shape[3];
  Aggregation aggregation;
  bool exclude;

  // Forward: the volume in `storage`, (N, X, Y, Z, C) in memory, and counts (N, X, Y, Z).
  Storage storage;
  void* volume;
  unsigned char* counts;

  // Backward: the volume's gradient in `storage` with any strides (n, c, x, y, z).
  const void* grad_volume;
  long long grad_stride[5];
  // One task is a range of channels of one sample over a range of rows (i, j). Slab 0 adds to grad_features, T
  // (N, M, H, W, C), the others to their own copies behind it; null where not wanted.
  long long channel_block, slabs;
  void* grad_features;
  double* grad_q;        // (tasks, M, 12)
  double* grad_weights;  // (tasks, M, channel_block)
};

struct UnprojectLoops {
  // Bytes of scratch that a thread needs; aligned to 64.
  long long (*scratch)(const UnprojectArgs&, bool backward);
  // Rows (n, i, j) begin to end, flattened.
  void (*forward)(const UnprojectArgs&, long long begin, long long end, void* scratch);
  // Task (n, channel block, slab), flattened.
  void (*backward)(const UnprojectArgs&, long long task, void* scratch);
};

BKIND3D_DECLARE_LOOPS(UnprojectLoops, unproject_loops)

}  // namespace bkind3d
