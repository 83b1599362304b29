// What the CUDA kernels were compiled for.
#include <torch/csrc/stable/library.h>

#include <string>

namespace {
std::string cuda_architectures() { return BKIND3D_ARCHITECTURES; }
}  // namespace

STABLE_TORCH_LIBRARY_IMPL(bkind3d, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&cuda_architectures));
}
