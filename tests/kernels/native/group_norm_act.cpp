// csrc/common/group_norm_act.h for NumPy. The columns of each function are named at its definition.
#include "csrc/common/group_norm_act.h"

#include "binding.h"

using namespace bkind3d;

PYBIND11_MODULE(group_norm_act, m) {
  // shift, sum, squares, count -> mean, squares
  binding::define<4, 2>(m, "deviations_about", [](const auto* in, auto* out) {
    const auto d = deviations_about(in[0], in[1], in[2], in[3]);
    out[0] = d.mean, out[1] = d.squares;
  });
  // mean, squares, count, then the same of the others -> mean, squares
  binding::define<6, 2>(m, "merged", [](const auto* in, auto* out) {
    const auto d = merged({in[0], in[1]}, {in[3], in[4]}, in[2], in[5]);
    out[0] = d.mean, out[1] = d.squares;
  });
  // x, mean, scale, bias -> y
  binding::define<4, 1>(m, "normalised",
                        [](const auto* in, auto* out) { out[0] = normalised(in[0], in[1], in[2], in[3]); });
  // y -> y
  binding::define<1, 1>(m, "rectified", [](const auto* in, auto* out) { out[0] = rectified(in[0]); });
  // gradient, y -> gradient
  binding::define<2, 1>(m, "passed", [](const auto* in, auto* out) { out[0] = passed(in[0], in[1]); });
  // weighted, moment, rstd, count, h, x, mean, scale -> gradient of x
  binding::define<8, 1>(m, "input_gradient", [](const auto* in, auto* out) {
    const auto group = group_gradient(in[0], in[1], in[2], in[3]);
    out[0] = input_gradient(in[4], in[5], in[6], in[7], group);
  });
}
