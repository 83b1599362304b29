// What the torch face of rasterize_edges (rasterize_edges.cpp) hands to its kernels (rasterize_edges.cu).
#pragma once

#include <cstdint>

#include "launch.h"

namespace bkind3d {

// T below is the dtype of the keypoints, float or double.
struct EdgeMap {
  void* values;      // T (N, H, W)
  const void* grad;  // T, any strides (n, y, x)
  int64_t grad_stride[3];
  int64_t first_winner;  // pixels of all samples in the maps before
  int64_t first_frame;   // edges of all samples in the maps before
  // Set for a launch: tiles of backward of one sample in the maps before; squares, or tiles in backward, up to this
  // map's last, of all samples and maps of the launch; in a row, and in one sample.
  int64_t first_tile;
  unsigned end, columns, per_sample;
  int height, width;
  double sigma;
};

struct RasterizeEdgesArgs {
  const void *keypoints, *weights;  // T, strides (n, keypoint, coordinate) and (n, edge)
  const int64_t* edges;             // strides (edge, end)
  int64_t keypoint_stride[3], weight_stride[2], edge_stride[2];
  int64_t samples, points;
  int64_t tiles;                         // set for a launch: of backward, of one sample in all maps
  int count, first_height, first_width;  // count: of edges
  int maps;                              // set for a launch
  void* winners;                         // int16, int32 with wide_winners: of the maps one after the other
  bool wide_winners;
  double slack;  // of scores; with infinity nothing is culled
};

struct EdgeMaps {
  const EdgeMap* first;
  int64_t count;
};

// Bytes of what a pass keeps besides.
struct RasterizeEdgesScratch {
  int64_t table, words, records, ends;  // the last three of backward
};
RasterizeEdgesScratch rasterize_edges_scratch(const RasterizeEdgesArgs& args, EdgeMaps maps, bool is_double);

void launch_rasterize_edges(Stream stream, const RasterizeEdgesArgs& args, EdgeMaps maps, bool is_double, void* table);

struct RasterizeEdgesGradients {
  void *keypoints, *weights;             // T (N, K, 2) and (N, E)
  void *table, *words, *records, *ends;  // of the sizes above
};
void launch_rasterize_edges_backward(Stream stream, const RasterizeEdgesArgs& args, EdgeMaps maps, bool is_double,
                                     const RasterizeEdgesGradients& gradients);

}  // namespace bkind3d
