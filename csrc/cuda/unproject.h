// What the torch face of unproject (unproject.cpp) hands to its kernels (unproject.cu).
#pragma once

#include <cstdint>

#include "../common/storage.h"
#include "../common/unproject.h"
#include "launch.h"

namespace bkind3d {

// T is the type of the arithmetic: double for float64 tensors, float for all others.
struct UnprojectArgs {
  // Features with their channels together; where these have a multiple of 16 bytes, all strides and the address have.
  const char* features;
  int64_t stride_n, stride_m;   // in bytes
  unsigned stride_y, stride_x;  // in elements
  const void* q;                // T (N, M, 12), at a multiple of 16 bytes
  const bool* mask;             // (N, M) or null
  const void* weights;          // T (N, M, C), or null without Aggregation::weighted
  int samples, views, channels, height, width;
  int x, y, z;
  Aggregation aggregation;
  bool exclude;

  // How the work is divided: set for a launch, which also counts stride_y and stride_x in packs of channels. A voxel
  // has a group of lanes, each with a pack of channels, or several one after the other. The groups of a warp lie along
  // z, and y where that is short. A warp walks over a brick: run_y steps of its groups along y, run_x along x.
  int packs, lanes, groups, groups_y, groups_z;
  int run_x, run_y_log;
  unsigned bricks_y, bricks_z, bricks, blocks;  // of a sample
  int items, padded_views;                      // items: projections of a group that are made at once
  Divider by_groups, by_groups_z, by_views;
};

// In place of the offset of a pixel; every map has fewer bytes.
constexpr unsigned no_pixel = ~0u;

// The volume (N, X, Y, Z, C) in memory, in the storage of the features, and counts (N, X, Y, Z).
void launch_unproject(Stream stream, const UnprojectArgs& args, Storage storage, void* volume, unsigned char* counts);

// Of one sample, the rows and columns of the partial sums that the gradients of matrices and weights are added up from.
struct UnprojectPartials {
  int64_t q_rows, q_columns, weight_rows, weight_columns;
};
UnprojectPartials unproject_partials(const UnprojectArgs& args, Storage storage, bool wants_q, bool wants_weights);

// Null for what is not wanted; `cleared` is all zeros.
struct UnprojectGradients {
  const void* volume;     // in the storage of the features, (N, X, Y, Z, C), at a multiple of 16 bytes
  void* maps;             // (N, M, H, W, C): T, cleared; with `fixed` in the storage of the features
  long long* fixed;       // the same in fixed point, cleared: additions whose order changes no bit
  unsigned* largest;      // with `fixed`, (N), cleared
  void* q_partials;       // T, cleared
  void* q;                // T (N, M, 12)
  void* weight_partials;  // T, cleared
  void* weights;          // T (N, M, C)
};
void launch_unproject_backward(Stream stream, const UnprojectArgs& args, Storage storage,
                               const UnprojectGradients& gradients);

}  // namespace bkind3d
