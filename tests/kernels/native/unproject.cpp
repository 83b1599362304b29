// csrc/common/unproject.h for NumPy. The columns of each function are named at its definition.
#include "csrc/common/unproject.h"

#include "binding.h"

using namespace bkind3d;

PYBIND11_MODULE(unproject, m) {
  // q (12), i, j, k -> x, y, depth
  binding::define<15, 3>(m, "project", [](const auto* in, auto* out) {
    const auto h = project(in, in[12], in[13], in[14]);
    out[0] = h.x, out[1] = h.y, out[2] = h.depth;
  });
  // u, v, depth, width, height -> 0 or 1
  binding::define<5, 1>(m, "sees",
                        [](const auto* in, auto* out) { out[0] = sees(in[0], in[1], in[2], in[3], in[4]) ? 1 : 0; });
  // u, size -> index (2), weight (2), inside (2)
  binding::define<2, 6>(m, "axis_taps", [](const auto* in, auto* out) {
    const auto taps = axis_taps(in[0], in[1]);
    for (int i = 0; i < 2; ++i) out[i] = taps.index[i], out[2 + i] = taps.weight[i], out[4 + i] = taps.inside[i];
  });
  // u, width, v, height, s00, s01, s10, s11 -> by u, by v
  binding::define<8, 2>(m, "pixel_gradient", [](const auto* in, auto* out) {
    const auto x = axis_taps(in[0], in[1]), y = axis_taps(in[2], in[3]);
    const auto g = pixel_gradient(x, y, in[4], in[5], in[6], in[7]);
    out[0] = g.u, out[1] = g.v;
  });
  // gradient by u, by v, then u, v, depth -> by x, y, depth
  binding::define<5, 3>(m, "homogeneous_gradient", [](const auto* in, auto* out) {
    const auto h = homogeneous_gradient({in[0], in[1]}, in[2], in[3], in[4]);
    out[0] = h.x, out[1] = h.y, out[2] = h.depth;
  });
  // g, weight, value, aggregate
  binding::define<4, 1>(m, "softmax_gradient",
                        [](const auto* in, auto* out) { out[0] = softmax_gradient(in[0], in[1], in[2], in[3]); });
}
