// 3D soft-argmax in CUDA: the torch face. Checks what the kernels rely on, allocates, and launches.
#include "soft_argmax3d.h"

#include <optional>
#include <tuple>
#include <vector>

#include "face.h"

namespace bkind3d {
namespace {

constexpr int64_t most_voxels = int64_t(1) << 31;  // of a volume: indices are 32-bit numbers

using Results = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

SoftArgmaxArgs prepare(const Tensor& logits, double temperature) {
  STD_TORCH_CHECK(logits.dim() == 5, "logits: expected (N, J, X, Y, Z)");
  const int64_t joints = logits.size(1), x = logits.size(2), y = logits.size(3), z = logits.size(4);
  STD_TORCH_CHECK(joints > 0 && x > 0 && y > 0 && z > 0, "logits: expected no empty dimension but N");
  STD_TORCH_CHECK(
      x < most_voxels && y < most_voxels && z < most_voxels && x * y < most_voxels && x * y * z < most_voxels,
      "logits: expected fewer than 2^31 voxels in a volume");
  return {logits.const_data_ptr(),
          {logits.stride(0), logits.stride(1), logits.stride(2), logits.stride(3), logits.stride(4)},
          logits.size(0),
          joints,
          {x, y, z},
          1.0 / temperature};
}

Results soft_argmax3d(Tensor logits, double temperature, bool covariance) {
  const SoftArgmaxArgs a = prepare(logits, temperature);
  const Storage storage = storage_of("logits", logits);
  const ScalarType real = arithmetic_of(storage);
  const int64_t n = a.samples, j = a.joints;
  auto empty = [&](const std::vector<int64_t>& size, ScalarType type) { return empty_beside(logits, size, type); };
  const std::vector<int64_t> matrix = covariance ? std::vector<int64_t>{n, j, 3, 3} : std::vector<int64_t>{0};
  Tensor mean = empty({n, j, 3}, real), peak = empty({n, j}, real), second = empty(matrix, real);
  Tensor maximum = empty({n, j}, real), total = empty({n, j}, real), argmax = empty({n, j}, ScalarType::Long);
  const Tensor scratch = empty({soft_argmax3d_scratch(a, storage)}, ScalarType::Byte);
  const SoftArgmaxOutputs outputs = {
      mean.mutable_data_ptr(),    peak.mutable_data_ptr(),  covariance ? second.mutable_data_ptr() : nullptr,
      maximum.mutable_data_ptr(), total.mutable_data_ptr(), static_cast<int64_t*>(argmax.mutable_data_ptr())};
  const OnDevice device(logits);
  launch_soft_argmax3d(device.stream(), a, storage, outputs, scratch.mutable_data_ptr());
  return {mean, peak, second, maximum, total, argmax};
}

Tensor soft_argmax3d_backward(Tensor grad_mean, Tensor grad_peak, std::optional<Tensor> grad_covariance, Tensor logits,
                              double temperature, Tensor mean, Tensor covariance, Tensor maximum, Tensor total,
                              Tensor argmax) {
  const SoftArgmaxArgs a = prepare(logits, temperature);
  const Storage storage = storage_of("logits", logits);
  const int64_t rows = a.samples * a.joints;
  Tensor grad = empty_beside(logits, std::vector<int64_t>{a.samples, a.joints, a.shape[0], a.shape[1], a.shape[2]});
  std::vector<Tensor> used;  // until the launch
  auto data = [&](const char* name, const Tensor& tensor, int64_t width) {
    used.push_back(plain(name, tensor, arithmetic_of(storage), width * rows, logits));
    return used.back().const_data_ptr();
  };
  STD_TORCH_CHECK(argmax.scalar_type() == ScalarType::Long, "argmax: expected (N, J) int64");
  const Tensor argmaxes = plain("argmax", argmax, ScalarType::Long, rows, logits);
  const bool second = grad_covariance.has_value();
  const SoftArgmaxSaved saved = {data("grad_mean", grad_mean, 3),
                                 data("grad_peak", grad_peak, 1),
                                 second ? data("grad_covariance", *grad_covariance, 9) : nullptr,
                                 data("mean", mean, 3),
                                 second ? data("covariance", covariance, 9) : nullptr,
                                 data("maximum", maximum, 1),
                                 data("total", total, 1),
                                 static_cast<const int64_t*>(argmaxes.const_data_ptr())};
  const OnDevice device(logits);
  launch_soft_argmax3d_backward(device.stream(), a, storage, saved, grad.mutable_data_ptr());
  return grad;
}

}  // namespace
}  // namespace bkind3d

BKIND3D_KERNELS(m) {
  m.impl("soft_argmax3d", TORCH_BOX(&bkind3d::soft_argmax3d));
  m.impl("soft_argmax3d_backward", TORCH_BOX(&bkind3d::soft_argmax3d_backward));
}
