// What the torch face of rasterize_edges (rasterize_edges.cpp) hands to its loops (rasterize_edges_loops.cpp).
#pragma once

#include "isa.h"

namespace bkind3d {

// T below is the dtype of the keypoints, float or double.
struct EdgeMap {
  long long height, width;
  double sigma, scale_x, scale_y;  // scales: from the first size to this one
  void* values;                    // T (N, H, W)
  void* winners;                   // int16 (N, H, W), int32 with wide_winners
  const void* grad;                // T, any strides (n, y, x)
  long long grad_stride[3];
};

struct RasterizeEdgesArgs {
  const void* keypoints;  // T, strides (n, keypoint, coordinate)
  long long keypoint_stride[3];
  const void* log_weights;  // T, row n at n log_weight_stride; -inf where an edge is not drawn
  long long log_weight_stride;
  const void* weights;  // T, strides (n, edge)
  long long weight_stride[2];
  const int* edges;  // (E, 2)
  long long samples, points, count, maps;
  const EdgeMap* map;  // (maps)
  bool is_double, wide_winners;
  bool cull;  // false in tests alone: every edge visits every pixel
};

// Rows from one band to the next; a band of one map of one sample is one task for a thread.
constexpr long long band_rows = 32;

struct RasterizeEdgesLoops {
  // A table holds the edges of one sample, prepared for one map.
  long long (*table_bytes)(const RasterizeEdgesArgs&, bool backward);
  long long (*record_bytes)();
  // Bytes of scratch that a thread needs; aligned to 64.
  long long (*scratch)(const RasterizeEdgesArgs&);
  void (*prepare)(const RasterizeEdgesArgs&, long long sample, long long map, bool backward, char* table,
                  void* scratch);
  void (*forward)(const RasterizeEdgesArgs&, long long sample, long long map, long long band, const char* table,
                  void* scratch);
  // Returns the number of records written: one for each edge that wins a pixel of the band.
  long long (*backward)(const RasterizeEdgesArgs&, long long sample, long long map, long long band, const char* table,
                        char* records, void* scratch);
  // Adds records to the sums of a sample, double (K, 2) and (E).
  void (*collect)(const RasterizeEdgesArgs&, long long sample, long long map, const char* table, const char* records,
                  long long count, double* keypoints, double* weights);
};

BKIND3D_DECLARE_LOOPS(RasterizeEdgesLoops, rasterize_edges_loops)

}  // namespace bkind3d
