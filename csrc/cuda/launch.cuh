// What the launch functions of the kernels share: a launch on a face's stream, with the error checked.
//
// BKIND3D_EMULATED (tests/kernels/native/cuda_emulation.h) puts a loop over blocks in its place.
#pragma once

#include <torch/csrc/stable/macros.h>
#include <torch/headeronly/util/Exception.h>

#include "device.cuh"
#include "launch.h"

namespace bkind3d {

// One launch: blocks, threads of a block, bytes of dynamic shared memory.
struct Launch {
  int64_t blocks;
  int threads;
  int64_t shared_bytes = 0;
};

// On the current device. An empty grid launches nothing: CUDA would call it an error.
template <class... Parameters, class... Arguments>
void launch([[maybe_unused]] Stream stream, const Launch& l, void (*kernel)(Parameters...),
            const Arguments&... arguments) {
  if (l.blocks == 0) return;
  STD_TORCH_CHECK(l.blocks < (int64_t(1) << 31), "a grid of ", l.blocks, " blocks is more than CUDA launches");
#if defined(BKIND3D_EMULATED)
  emulation::launch(dim3(static_cast<unsigned>(l.blocks)), dim3(l.threads), l.shared_bytes,
                    [&] { kernel(arguments...); });
#else
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(l.blocks));
  config.blockDim = dim3(l.threads);
  config.dynamicSmemBytes = l.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream.handle);
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
#endif
}

}  // namespace bkind3d
