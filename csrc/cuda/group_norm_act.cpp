// Group normalisation with a residual and a ReLU in CUDA: the torch face. Checks what the kernels rely on, allocates,
// and launches.
#include "group_norm_act.h"

#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "face.h"

namespace bkind3d {
namespace {

constexpr int64_t most_channels = int64_t(1) << 31;  // they are 32-bit numbers

// Everything that forward and backward share. The tensors are those that the pointers need.
struct Call {
  GroupNormActArgs args{};
  Storage storage;
  Tensor x, weight, bias;
};

Tensor parameter(const char* name, const Tensor& tensor, const Tensor& x) {
  const ScalarType arithmetic = arithmetic_of(storage_of("x", x));
  STD_TORCH_CHECK(has_shape(tensor, {x.size(1)}) && tensor.scalar_type() == arithmetic, name,
                  ": expected (C,), float32, or float64 for float64 maps");
  return plain(name, tensor, arithmetic, x.size(1), x);
}

Tensor empty_map(const Tensor& x) {
  const auto sizes = x.sizes();
  return empty_channels_last(x, std::vector<int64_t>(sizes.begin(), sizes.end()));
}

Call prepare(const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t groups, const std::string& activation) {
  STD_TORCH_CHECK(x.dim() == 4 || x.dim() == 5, "x: expected (N, C, H, W) or (N, C, X, Y, Z)");
  Call call;
  GroupNormActArgs& a = call.args;
  call.storage = storage_of("x", x);
  a.samples = x.size(0);
  a.channels = x.size(1);
  a.voxels = 1;
  for (int64_t i = 2; i < x.dim(); ++i) a.voxels *= x.size(i);
  STD_TORCH_CHECK(a.voxels > 0 && a.channels > 0, "x: expected no empty dimension but N");
  STD_TORCH_CHECK(a.channels < most_channels, "x: expected fewer than 2^31 channels");
  STD_TORCH_CHECK(groups > 0 && a.channels % groups == 0, "groups: expected a divisor of the channels");
  a.groups = groups;
  a.relu = parse_relu(activation);
  call.weight = parameter("weight", weight, x);
  call.bias = parameter("bias", bias, x);
  call.x = as_channels_last(x);
  a.x = call.x.const_data_ptr();
  a.weight = call.weight.const_data_ptr();
  a.bias = call.bias.const_data_ptr();
  return call;
}

std::tuple<Tensor, Tensor, Tensor> group_norm_act(Tensor x, Tensor weight, Tensor bias, std::optional<Tensor> residual,
                                                  int64_t groups, double eps, std::string activation) {
  Call call = prepare(x, weight, bias, groups, activation);
  GroupNormActArgs& a = call.args;
  std::optional<Tensor> added;
  if (residual) added = map_like("residual", *residual, x);
  Tensor y = empty_map(x);
  Tensor mean = empty_beside(call.weight, {a.samples, groups});
  Tensor rstd = empty_beside(call.weight, {a.samples, groups});
  a.residual = added ? added->const_data_ptr() : nullptr;
  a.y = y.mutable_data_ptr();
  a.mean = mean.mutable_data_ptr();
  a.rstd = rstd.mutable_data_ptr();
  a.eps = eps;
  Tensor scratch = empty_beside(x, {group_norm_act_scratch(a, call.storage)}, ScalarType::Byte);
  const OnDevice device(x);
  launch_group_norm_act(device.stream(), a, call.storage, scratch.mutable_data_ptr());
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_act_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias,
                                                                   std::optional<Tensor> output, Tensor mean,
                                                                   Tensor rstd, std::string activation, bool needs_x,
                                                                   bool needs_weight, bool needs_residual) {
  STD_TORCH_CHECK(mean.dim() == 2, "mean: expected (N, G) in the dtype of the weight");
  Call call = prepare(x, weight, bias, mean.size(1), activation);
  GroupNormActArgs& a = call.args;
  auto saved = [&](const char* name, const Tensor& tensor) {
    STD_TORCH_CHECK(has_shape(tensor, {a.samples, a.groups}) && tensor.scalar_type() == call.weight.scalar_type(), name,
                    ": expected (N, G) in the dtype of the weight");
    return plain(name, tensor, tensor.scalar_type(), a.samples * a.groups, x);
  };
  const Tensor means = saved("mean", mean), rstds = saved("rstd", rstd);
  STD_TORCH_CHECK(output || !a.relu || !needs_residual, "output: expected where a residual was added before a ReLU");
  const Tensor gradient = map_like("grad", grad, x);
  std::optional<Tensor> kept;
  if (output) kept = map_like("output", *output, x);

  const std::vector<int64_t> channels{needs_weight ? a.channels : 0};
  Tensor grad_x = needs_x ? empty_map(x) : empty_beside(x, {0});
  Tensor grad_residual = needs_residual ? empty_map(x) : empty_beside(x, {0});
  Tensor grad_weight = empty_beside(call.weight, channels);
  Tensor grad_bias = empty_beside(call.weight, channels);
  if (!needs_x && !needs_weight && !needs_residual) return {grad_x, grad_weight, grad_bias, grad_residual};

  a.grad = gradient.const_data_ptr();
  a.output = kept && a.relu ? kept->const_data_ptr() : nullptr;
  a.mean = const_cast<void*>(means.const_data_ptr());
  a.rstd = const_cast<void*>(rstds.const_data_ptr());
  if (needs_x) a.grad_x = grad_x.mutable_data_ptr();
  if (needs_residual) a.grad_residual = grad_residual.mutable_data_ptr();
  if (needs_weight) a.grad_weight = grad_weight.mutable_data_ptr(), a.grad_bias = grad_bias.mutable_data_ptr();
  Tensor scratch = empty_beside(x, {group_norm_act_backward_scratch(a, call.storage)}, ScalarType::Byte);
  const OnDevice device(x);
  launch_group_norm_act_backward(device.stream(), a, call.storage, scratch.mutable_data_ptr());
  return {grad_x, grad_weight, grad_bias, grad_residual};
}

}  // namespace
}  // namespace bkind3d

BKIND3D_KERNELS(m) {
  m.impl("group_norm_act", TORCH_BOX(&bkind3d::group_norm_act));
  m.impl("group_norm_act_backward", TORCH_BOX(&bkind3d::group_norm_act_backward));
}
