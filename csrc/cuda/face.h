// What the torch faces of the CUDA kernels share: the device and stream of a call, small tensors as kernels read them,
// and the registration of operators. A face holds no device code, and the C++ compiler compiles it.
//
// The tests compile faces and kernels as C++ for the CPU (tests/kernels/native/cuda_emulation.h): BKIND3D_EMULATED then
// puts the operators into a namespace of their own.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>

#include "../common/options.h"
#include "launch.h"

// BKIND3D_KERNELS(m) { m.impl("name", TORCH_BOX(&function)); }
#if defined(BKIND3D_EMULATED)
#define BKIND3D_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(bkind3d_emulated, CPU, m)
#else
#define BKIND3D_KERNELS(m) STABLE_TORCH_LIBRARY_IMPL(bkind3d, CUDA, m)
#endif

namespace bkind3d {

// While it lives, the device of a tensor is the current one. Launches go to torch's current stream there.
class OnDevice {
 public:
#if defined(BKIND3D_EMULATED)
  explicit OnDevice(const Tensor&) {}
#else
  explicit OnDevice(const Tensor& tensor) : guard_(tensor.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream_.handle));
  }
#endif

  Stream stream() const { return stream_; }

 private:
#if !defined(BKIND3D_EMULATED)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  Stream stream_;
};

// A small tensor as a kernel reads it: contiguous, of this dtype, with this many elements, beside `other`.
inline Tensor plain(const char* name, const Tensor& tensor, ScalarType dtype, int64_t numel, const Tensor& other) {
  STD_TORCH_CHECK(tensor.numel() == numel, name, ": expected ", numel, " elements");
  STD_TORCH_CHECK(tensor.device() == other.device(), name, ": expected the device of the other arguments");
  return as_contiguous(as_type(tensor, dtype));
}

}  // namespace bkind3d
