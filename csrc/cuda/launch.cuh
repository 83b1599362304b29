// What the host side of every CUDA file needs: torch's stable types, the device and stream of a call, launches that are
// checked, and the registration of operators. Kernels include device.cuh.
//
// The tests compile the same files as C++ for the CPU (tests/kernels/native/cuda_emulation.h): BKIND3D_EMULATED then
// puts a loop over blocks in the place of a launch, and the operators into a namespace of their own.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include "device.cuh"

// BKIND3D_KERNELS(m) { m.impl("name", TORCH_BOX(&function)); }
#if defined(BKIND3D_EMULATED)
#define BKIND3D_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(bkind3d_emulated, CPU, m)
#else
#define BKIND3D_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(bkind3d, CUDA, m)
#endif

namespace bkind3d {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One launch: blocks in x, y and z, threads of a block in x, bytes of dynamic shared memory.
struct Launch {
  int64_t x, y, z;
  int threads;
  int64_t shared_bytes;
};

// While it lives, the device of a tensor is the current one. Launches go to torch's current stream there.
class OnDevice {
 public:
#if defined(BKIND3D_EMULATED)
  explicit OnDevice(const Tensor&) {}
#else
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
#endif

  // An empty grid launches nothing: CUDA would call it an error.
  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), const Launch& l, const Arguments&... arguments) const {
    if (l.x == 0 || l.y == 0 || l.z == 0) return;
    STD_TORCH_CHECK(l.x < (int64_t(1) << 31) && l.y < 65536 && l.z < 65536, "a grid of ", l.x, " x ", l.y, " x ", l.z,
                    " blocks is more than CUDA launches");
    const dim3 grid(static_cast<unsigned>(l.x), static_cast<unsigned>(l.y), static_cast<unsigned>(l.z));
#if defined(BKIND3D_EMULATED)
    emulation::launch(grid, dim3(l.threads), l.shared_bytes, [&] { kernel(arguments...); });
#else
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(l.threads);
    config.dynamicSmemBytes = l.shared_bytes;
    config.stream = stream_;
    STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, arguments...));
#endif
  }

 private:
#if !defined(BKIND3D_EMULATED)
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
#endif
};

inline int64_t ceil_divide(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A small tensor as a kernel reads it: contiguous, of this dtype, with this many elements, beside `other`.
inline Tensor plain(const char* name, const Tensor& tensor, ScalarType dtype, int64_t numel, const Tensor& other) {
  STD_TORCH_CHECK(tensor.numel() == numel, name, ": expected ", numel, " elements");
  STD_TORCH_CHECK(tensor.device() == other.device(), name, ": expected the device of the other arguments");
  const Tensor exact = tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
  return exact.is_contiguous() ? exact : torch::stable::contiguous(exact);
}

}  // namespace bkind3d
