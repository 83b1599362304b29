// What the torch face of soft_argmax3d (soft_argmax3d.cpp) hands to its loops (soft_argmax3d_loops.cpp).
#pragma once

#include "../common/soft_argmax3d.h"
#include "isa.h"

namespace bkind3d {

// A row is one volume: (n, j), flattened to n joints + j. A line is the run of voxels of one (x, y). A block is a few
// whole lines, or a segment of one long line, in the order of the voxels; a slab is a few blocks.
struct SoftArgmaxArgs {
  const void* logits;  // any strides (n, j, x, y, z)
  long long strides[5];
  long long joints, shape[3];
  double beta;
  bool covariance;

  // How a row is divided; from its shape alone, so that results do not depend on the number of threads.
  long long segment, segments;  // voxels of a segment (the last may have fewer), segments of a line
  long long lines_per_block, blocks, blocks_per_slab, slabs;
  // One task is one slab of `rows_per_task` consecutive rows: 1, or all joints of a sample where voxels of one row do
  // not lie together, so that a cache line is used for all the joints that it holds.
  long long rows_per_task;

  Moments<double>* moments;               // forward: (rows, slabs)
  const VolumeGradient<double>* volumes;  // backward: (rows)
  void* grad;                             // contiguous, in the type of the logits
  bool stream;                            // past the caches: the gradient is larger than they are
};

// Task (group of rows, slab), flattened.
using SoftArgmaxTask = void (*)(const SoftArgmaxArgs&, long long task);

// By the Storage of the logits.
struct SoftArgmaxLoops {
  SoftArgmaxTask forward[4], backward[4];
};

BKIND3D_DECLARE_LOOPS(SoftArgmaxLoops, soft_argmax3d_loops)

}  // namespace bkind3d
