// What the torch face of soft_argmax3d (soft_argmax3d.cpp) hands to its kernels (soft_argmax3d.cu).
#pragma once

#include <cstdint>

#include "../common/storage.h"
#include "launch.h"

namespace bkind3d {

struct SoftArgmaxArgs {
  const void* logits;  // any strides (n, j, x, y, z)
  int64_t strides[5];
  int64_t samples, joints;
  int64_t shape[3];  // fewer than 2^31 voxels
  double beta;       // 1 / temperature
};

// One entry for each volume, or 3, or 9; in the type of the arithmetic but for the index. `covariance` may be null.
struct SoftArgmaxOutputs {
  void *mean, *peak, *covariance, *maximum, *total;
  int64_t* argmax;
};

// Bytes that forward needs besides; aligned as torch does.
int64_t soft_argmax3d_scratch(const SoftArgmaxArgs& args, Storage storage);
void launch_soft_argmax3d(Stream stream, const SoftArgmaxArgs& args, Storage storage, const SoftArgmaxOutputs& outputs,
                          void* scratch);

// Saved by forward, and the gradients that come in. Those of the covariance, and it, may be null.
struct SoftArgmaxSaved {
  const void *grad_mean, *grad_peak, *grad_covariance, *mean, *covariance, *maximum, *total;
  const int64_t* argmax;
};

// The gradient is contiguous, in the storage of the logits.
void launch_soft_argmax3d_backward(Stream stream, const SoftArgmaxArgs& args, Storage storage,
                                   const SoftArgmaxSaved& saved, void* grad);

}  // namespace bkind3d
