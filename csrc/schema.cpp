// Every operation's schema, nothing else. Shapes and meaning: docs/ops.md; what Python adds to each of them (fake
// kernel, autograd, the guard against second derivatives): bkind3d_kernels/registration.py.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(bkind3d, m) {
  m.def(
      "unproject(Tensor features, Tensor q, Tensor? view_mask, Tensor? view_weights, int[] shape, str aggregation, "
      "str unseen) -> (Tensor volume, Tensor counts)");
  m.def(
      "unproject_backward(Tensor grad_volume, Tensor features, Tensor q, Tensor? view_mask, Tensor? view_weights, "
      "int[] shape, str aggregation, str unseen, bool needs_features, bool needs_q, bool needs_weights, "
      "bool deterministic) -> (Tensor grad_features, Tensor grad_q, Tensor grad_weights)");

  m.def(
      "soft_argmax3d(Tensor logits, float temperature, bool covariance) -> (Tensor mean, Tensor peak, "
      "Tensor covariance, Tensor maximum, Tensor total, Tensor argmax)");
  m.def(
      "soft_argmax3d_backward(Tensor grad_mean, Tensor grad_peak, Tensor? grad_covariance, Tensor logits, "
      "float temperature, Tensor mean, Tensor covariance, Tensor maximum, Tensor total, Tensor argmax) -> Tensor");

  m.def(
      "linear_soft_argmax3d(Tensor features, Tensor weight, Tensor? bias, float temperature, bool covariance) -> "
      "(Tensor mean, Tensor peak, Tensor covariance, Tensor maximum, Tensor total, Tensor argmax)");
  m.def(
      "linear_soft_argmax3d_backward(Tensor grad_mean, Tensor grad_peak, Tensor? grad_covariance, Tensor features, "
      "Tensor weight, Tensor? bias, float temperature, Tensor mean, Tensor covariance, Tensor maximum, Tensor total, "
      "Tensor argmax, bool needs_features, bool needs_weight) -> (Tensor grad_features, Tensor grad_weight)");

  m.def(
      "rasterize_edges(Tensor keypoints, Tensor weights, Tensor edges, int[] sizes, float[] sigmas) -> (Tensor[] maps, "
      "Tensor winners)");
  m.def(
      "rasterize_edges_backward(Tensor[] grad_maps, Tensor keypoints, Tensor weights, Tensor edges, Tensor winners, "
      "int[] sizes, float[] sigmas, bool deterministic) -> (Tensor grad_keypoints, Tensor grad_weights)");

  m.def(
      "group_norm_act(Tensor x, Tensor weight, Tensor bias, Tensor? residual, int groups, float eps, str activation) "
      "-> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "group_norm_act_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor? output, Tensor mean, "
      "Tensor rstd, str activation, bool needs_x, bool needs_weight, bool needs_residual) -> (Tensor grad_x, "
      "Tensor grad_weight, Tensor grad_bias, Tensor grad_residual)");

  m.def("set_rasterize_edges_culling(bool on) -> ()");  // for tests: off, every edge visits every pixel

  m.def("cpu_instruction_set() -> str");
  m.def("set_cpu_instruction_set(str name) -> ()");
  m.def("cuda_architectures() -> str");
}
