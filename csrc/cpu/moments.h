// What the torch faces of soft_argmax3d and linear_soft_argmax3d share: outputs from the moments of slabs of voxels,
// and gradients of the outputs as the loops take them.
#pragma once

#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/options.h"
#include "../common/soft_argmax3d.h"

namespace bkind3d {

// Mean, peak, covariance, maximum, total, argmax.
using MomentsOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

namespace moments_detail {

template <bool Covariance>
Moments<double> merged(const Moments<double>* slabs, int64_t count, double beta) {
  Moments<double> row = slabs[0];
  for (int64_t i = 1; i < count; ++i) merge<Covariance>(row, slabs[i], beta, [](double x) { return std::exp(x); });
  // Nothing but -inf, or a NaN: nothing can be said of this row.
  if (!(row.total > 0)) {
    row.total = std::numeric_limits<double>::quiet_NaN();
    for (double& m : row.mean) m = row.total;
  }
  return row;
}

template <class T>
void write(const MomentsOutputs& outputs, int64_t row, const Moments<double>& m, bool covariance) {
  for (int i = 0; i < 3; ++i) std::get<0>(outputs).mutable_data_ptr<T>()[3 * row + i] = T(m.mean[i]);
  std::get<1>(outputs).mutable_data_ptr<T>()[row] = T(1 / m.total);
  if (covariance) {
    constexpr int entry[] = {0, 1, 2, 1, 3, 4, 2, 4, 5};
    for (int i = 0; i < 9; ++i)
      std::get<2>(outputs).mutable_data_ptr<T>()[9 * row + i] = T(m.second[entry[i]] / m.total);
  }
  std::get<3>(outputs).mutable_data_ptr<T>()[row] = T(m.maximum);
  std::get<4>(outputs).mutable_data_ptr<T>()[row] = T(m.total);
  std::get<5>(outputs).mutable_data_ptr<int64_t>()[row] = m.argmax;
}

// A small tensor of `numel` elements as doubles.
inline std::vector<double> doubles(const char* name, const Tensor& tensor, int64_t numel) {
  STD_TORCH_CHECK(tensor.numel() == numel, name, ": expected ", numel, " elements");
  const Tensor whole = as_contiguous(tensor);
  if (whole.scalar_type() == ScalarType::Float) {
    const float* data = whole.const_data_ptr<float>();
    return std::vector<double>(data, data + numel);
  }
  const Tensor exact = as_type(whole, ScalarType::Double);
  const double* data = exact.const_data_ptr<double>();
  return std::vector<double>(data, data + numel);
}

}  // namespace moments_detail

// The outputs of (n, joints) rows, in float or double, from `slabs` moments of each, merged in their order.
inline MomentsOutputs moments_outputs(const Tensor& like, int64_t n, int64_t joints, bool is_double,
                                      const Moments<double>* moments, int64_t slabs, double beta, bool covariance) {
  using namespace moments_detail;
  const ScalarType arithmetic = is_double ? ScalarType::Double : ScalarType::Float;
  auto empty = [&](const std::vector<int64_t>& size, ScalarType dtype) { return empty_beside(like, size, dtype); };
  const std::vector<int64_t> matrix = covariance ? std::vector<int64_t>{n, joints, 3, 3} : std::vector<int64_t>{0};
  MomentsOutputs outputs{empty({n, joints, 3}, arithmetic), empty({n, joints}, arithmetic),
                         empty(matrix, arithmetic),         empty({n, joints}, arithmetic),
                         empty({n, joints}, arithmetic),    empty({n, joints}, ScalarType::Long)};
  for (int64_t row = 0; row < n * joints; ++row) {
    const Moments<double>* of_row = moments + row * slabs;
    const Moments<double> m = covariance ? merged<true>(of_row, slabs, beta) : merged<false>(of_row, slabs, beta);
    by_arithmetic(is_double, [&](auto number) { write<decltype(number)>(outputs, row, m, covariance); });
  }
  return outputs;
}

// What the gradient of each row's logits depends on, from the gradients of the outputs and from the outputs.
inline std::vector<VolumeGradient<double>> volume_gradients(int64_t rows, double beta, const Tensor& grad_mean,
                                                            const Tensor& grad_peak,
                                                            const std::optional<Tensor>& grad_covariance,
                                                            const Tensor& mean, const Tensor& covariance,
                                                            const Tensor& maximum, const Tensor& total,
                                                            const Tensor& argmax) {
  using namespace moments_detail;
  const bool second = grad_covariance.has_value();
  const std::vector<double> g_mean = doubles("grad_mean", grad_mean, 3 * rows);
  const std::vector<double> g_peak = doubles("grad_peak", grad_peak, rows);
  const std::vector<double> g_covariance =
      second ? doubles("grad_covariance", *grad_covariance, 9 * rows) : std::vector<double>();
  const std::vector<double> means = doubles("mean", mean, 3 * rows);
  const std::vector<double> covariances = second ? doubles("covariance", covariance, 9 * rows) : std::vector<double>();
  const std::vector<double> maxima = doubles("maximum", maximum, rows);
  const std::vector<double> totals = doubles("total", total, rows);
  STD_TORCH_CHECK(argmax.scalar_type() == ScalarType::Long && argmax.numel() == rows, "argmax: expected (N, J) int64");
  const Tensor argmaxes = as_contiguous(argmax);

  std::vector<VolumeGradient<double>> volumes(rows);
  for (int64_t row = 0; row < rows; ++row) {
    volumes[row] = volume_gradient(&g_mean[3 * row], g_peak[row], second ? &g_covariance[9 * row] : nullptr,
                                   &means[3 * row], second ? &covariances[9 * row] : nullptr, maxima[row], totals[row],
                                   argmaxes.const_data_ptr<int64_t>()[row], beta);
  }
  return volumes;
}

}  // namespace bkind3d
