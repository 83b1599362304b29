// A linear map with a 3D soft-argmax on the CPU: the torch face. Lays the weight out for the loops, divides the work,
// and merges what the slabs of each sample give.
#include "linear_soft_argmax3d.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/options.h"
#include "memory.h"
#include "moments.h"
#include "threads.h"

namespace bkind3d {
namespace {

constexpr int64_t tile_numbers = 8192;     // features and logits of a tile: 32 KB in float
constexpr int64_t slab_voxels = 16 << 10;  // about
constexpr int64_t small_work = 1 << 15;    // logits: fewer are not worth a second thread
constexpr int64_t stream_bytes = 8 << 20;  // a gradient larger than this is written past the caches

int64_t round_up(int64_t a, int64_t step) { return ceil_divide(a, step) * step; }

int64_t voxels(const LinearSoftArgmaxArgs& a) { return a.shape[0] * a.shape[1] * a.shape[2]; }

// Everything that forward and backward share, and the memory that the pointers need.
struct Call {
  LinearSoftArgmaxArgs args{};
  Storage storage;
  int64_t samples;
  Tensor weight;
  std::optional<Tensor> bias;
  std::vector<char> columns, rows, offsets;
};

template <class T>
void lay_out(Call& call) {
  LinearSoftArgmaxArgs& a = call.args;
  call.columns.resize(a.channels * a.joint_step * sizeof(T));
  call.rows.resize(a.joints * a.channel_step * sizeof(T));
  call.offsets.resize(a.joint_step * sizeof(T));
  T *columns = reinterpret_cast<T*>(call.columns.data()), *rows = reinterpret_cast<T*>(call.rows.data());
  const T* weight = call.weight.const_data_ptr<T>();
  for (int64_t j = 0; j < a.joints; ++j)
    for (int64_t c = 0; c < a.channels; ++c)
      columns[c * a.joint_step + j] = rows[j * a.channel_step + c] = weight[j * a.channels + c];
  if (call.bias) std::copy_n(call.bias->const_data_ptr<T>(), a.joints, reinterpret_cast<T*>(call.offsets.data()));
  a.columns = columns;
  a.rows = rows;
  a.bias = call.offsets.data();
}

Call prepare(const Tensor& features, const Tensor& weight, const std::optional<Tensor>& bias, double temperature) {
  STD_TORCH_CHECK(features.dim() == 5, "features: expected (N, C, X, Y, Z)");
  Call call;
  LinearSoftArgmaxArgs& a = call.args;
  call.storage = storage_of("features", features);
  call.samples = features.size(0);
  a.features = features.const_data_ptr();
  for (int i = 0; i < 5; ++i) a.strides[i] = features.stride(i);
  a.channels = features.size(1);
  for (int i = 0; i < 3; ++i) a.shape[i] = features.size(2 + i);
  STD_TORCH_CHECK(voxels(a) > 0 && a.channels > 0, "features: expected no empty dimension but N");
  if (a.channels == 1) a.strides[1] = 1;  // of no meaning then
  const ScalarType arithmetic = arithmetic_of(call.storage);
  STD_TORCH_CHECK(
      weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) == a.channels && weight.scalar_type() == arithmetic,
      "weight: expected (J, C), float32, or float64 for float64 features");
  a.joints = weight.size(0);
  call.weight = as_contiguous(weight);
  if (bias) {
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == a.joints && bias->scalar_type() == arithmetic,
                    "bias: expected (J,) in the dtype of the weight");
    call.bias = as_contiguous(*bias);
  }
  const int64_t step = linear_soft_argmax3d_loops().step[is_double(call.storage)];
  a.channel_step = round_up(a.channels, step);
  a.joint_step = round_up(a.joints, step);
  by_arithmetic(is_double(call.storage), [&](auto number) { lay_out<decltype(number)>(call); });
  a.beta = 1.0 / temperature;
  // Not from the steps, which differ between instruction sets.
  a.tile = std::clamp<int64_t>(tile_numbers / (a.channels + a.joints) / 32 * 32, 64, 256);
  a.slab = std::max(slab_voxels / a.tile * a.tile, a.tile);
  a.slabs = ceil_divide(voxels(a), a.slab);
  return call;
}

template <class Task>
void run(Task task, const Call& call) {
  const LinearSoftArgmaxArgs& a = call.args;
  const bool serial = call.samples * voxels(a) * a.joints < small_work;
  for_each(call.samples * a.slabs, serial, linear_soft_argmax3d_loops().scratch[int(call.storage)](a),
           [&](int64_t item, void* scratch) { task(a, item, scratch); });
}

MomentsOutputs linear_soft_argmax3d(Tensor features, Tensor weight, std::optional<Tensor> bias, double temperature,
                                    bool covariance) {
  Call call = prepare(features, weight, bias, temperature);
  LinearSoftArgmaxArgs& a = call.args;
  a.covariance = covariance;
  std::vector<Moments<double>> moments(call.samples * a.joints * a.slabs);
  a.moments = moments.data();
  run(linear_soft_argmax3d_loops().forward[int(call.storage)], call);
  return moments_outputs(features, call.samples, a.joints, is_double(call.storage), a.moments, a.slabs, a.beta,
                         covariance);
}

// The gradients of the tasks, added in their order.
template <class T>
void add_weights(const Call& call, const std::vector<char>& partial, T* gradient) {
  const LinearSoftArgmaxArgs& a = call.args;
  const T* parts = reinterpret_cast<const T*>(partial.data());
  const int64_t tasks = call.samples * a.slabs, size = a.joint_step * a.channel_step;
  torch::stable::parallel_for(0, a.joints, 1 + (1 << 16) / (tasks * a.channels + 1), [&](int64_t begin, int64_t end) {
    std::vector<double> total(a.channels);
    for (int64_t j = begin; j < end; ++j) {
      std::fill(total.begin(), total.end(), 0.0);
      for (int64_t task = 0; task < tasks; ++task)
        for (int64_t c = 0; c < a.channels; ++c) total[c] += parts[task * size + j * a.channel_step + c];
      for (int64_t c = 0; c < a.channels; ++c) gradient[j * a.channels + c] = static_cast<T>(total[c]);
    }
  });
}

std::tuple<Tensor, Tensor> linear_soft_argmax3d_backward(Tensor grad_mean, Tensor grad_peak,
                                                         std::optional<Tensor> grad_covariance, Tensor features,
                                                         Tensor weight, std::optional<Tensor> bias, double temperature,
                                                         Tensor mean, Tensor covariance, Tensor maximum, Tensor total,
                                                         Tensor argmax, bool needs_features, bool needs_weight) {
  Call call = prepare(features, weight, bias, temperature);
  LinearSoftArgmaxArgs& a = call.args;
  const std::vector<VolumeGradient<double>> volumes = volume_gradients(
      call.samples * a.joints, a.beta, grad_mean, grad_peak, grad_covariance, mean, covariance, maximum, total, argmax);
  a.volumes = volumes.data();

  Tensor grad_features = empty_beside(features, {0});
  if (needs_features) {
    const std::vector<int64_t> size{call.samples, a.channels, a.shape[0], a.shape[1], a.shape[2]};
    grad_features = empty_channels_last(features, size);
    const int64_t bytes = grad_features.numel() * bytes_of(call.storage);
    a.grad_features = grad_features.mutable_data_ptr();
    a.stream = bytes > stream_bytes;
    advise_huge_pages(a.grad_features, bytes);
  }
  const int64_t size = a.joint_step * a.channel_step * (is_double(call.storage) ? sizeof(double) : sizeof(float));
  std::vector<char> partial(needs_weight ? call.samples * a.slabs * size : 0);
  a.grad_weight = needs_weight ? partial.data() : nullptr;
  if (needs_features || needs_weight) run(linear_soft_argmax3d_loops().backward[int(call.storage)], call);

  const std::vector<int64_t> matrix =
      needs_weight ? std::vector<int64_t>{a.joints, a.channels} : std::vector<int64_t>{0};
  Tensor grad_weight = empty_beside(call.weight, matrix);
  if (needs_weight)
    by_arithmetic(is_double(call.storage),
                  [&](auto number) { add_weights(call, partial, grad_weight.mutable_data_ptr<decltype(number)>()); });
  return {grad_features, grad_weight};
}

}  // namespace
}  // namespace bkind3d

STABLE_TORCH_LIBRARY_IMPL(bkind3d, CPU, m) {
  m.impl("linear_soft_argmax3d", TORCH_BOX(&bkind3d::linear_soft_argmax3d));
  m.impl("linear_soft_argmax3d_backward", TORCH_BOX(&bkind3d::linear_soft_argmax3d_backward));
}
