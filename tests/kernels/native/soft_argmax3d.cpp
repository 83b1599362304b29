// csrc/common/soft_argmax3d.h for NumPy. Columns: Sums as total, first (3), second (6); Moments as maximum, total,
// mean (3), second (6), argmax; VolumeGradient as maximum, mean (3), constant, linear (3), quadratic (6), peak, argmax.
#include "csrc/common/soft_argmax3d.h"

#include <cmath>

#include "binding.h"

using namespace bkind3d;

namespace {

template <class T>
Sums<T> sums_from(const T* in) {
  Sums<T> s;
  s.total = in[0];
  for (int i = 0; i < 3; ++i) s.first[i] = in[1 + i];
  for (int i = 0; i < 6; ++i) s.second[i] = in[4 + i];
  return s;
}

template <class T>
void write(const Sums<T>& s, T* out) {
  out[0] = s.total;
  for (int i = 0; i < 3; ++i) out[1 + i] = s.first[i];
  for (int i = 0; i < 6; ++i) out[4 + i] = s.second[i];
}

template <class T>
Moments<T> moments_from(const T* in) {
  Moments<T> m = no_voxels<T>();
  m.maximum = in[0], m.total = in[1], m.argmax = static_cast<long long>(in[11]);
  for (int i = 0; i < 3; ++i) m.mean[i] = in[2 + i];
  for (int i = 0; i < 6; ++i) m.second[i] = in[5 + i];
  return m;
}

template <class T>
void write(const Moments<T>& m, T* out) {
  out[0] = m.maximum, out[1] = m.total, out[11] = static_cast<T>(m.argmax);
  for (int i = 0; i < 3; ++i) out[2 + i] = m.mean[i];
  for (int i = 0; i < 6; ++i) out[5 + i] = m.second[i];
}

template <class T>
VolumeGradient<T> volume_from(const T* in) {
  VolumeGradient<T> v = {in[0], {in[1], in[2], in[3]}, in[4], {}, {}, in[14], static_cast<long long>(in[15])};
  for (int i = 0; i < 3; ++i) v.linear[i] = in[5 + i];
  for (int i = 0; i < 6; ++i) v.quadratic[i] = in[8 + i];
  return v;
}

template <class T>
void write(const VolumeGradient<T>& v, T* out) {
  out[0] = v.maximum, out[4] = v.constant, out[14] = v.peak, out[15] = static_cast<T>(v.argmax);
  for (int i = 0; i < 3; ++i) out[1 + i] = v.mean[i], out[5 + i] = v.linear[i];
  for (int i = 0; i < 6; ++i) out[8 + i] = v.quadratic[i];
}

const auto exponential = [](auto x) { return std::exp(x); };

}  // namespace

PYBIND11_MODULE(soft_argmax3d, m) {
  binding::define<1, 1>(m, "softmax_reference", [](const auto* in, auto* out) { out[0] = softmax_reference(in[0]); });
  // logit, reference, beta
  binding::define<3, 1>(m, "softmax_exponent",
                        [](const auto* in, auto* out) { out[0] = softmax_exponent(in[0], in[1], in[2]); });
  // Sums, then total, first, second, dx, dy of a line -> Sums
  binding::define<15, 10>(m, "add_line", [](const auto* in, auto* out) {
    auto sums = sums_from(in);
    add_line<true>(sums, in[10], in[11], in[12], in[13], in[14]);
    write(sums, out);
  });
  binding::define<15, 10>(m, "add_line_without_covariance", [](const auto* in, auto* out) {
    auto sums = sums_from(in);
    add_line<false>(sums, in[10], in[11], in[12], in[13], in[14]);
    write(sums, out);
  });
  // Sums, maximum, origin (3), argmax -> Moments
  binding::define<15, 12>(m, "moments_of", [](const auto* in, auto* out) {
    write(moments_of<true>(sums_from(in), in[10], in + 11, static_cast<long long>(in[14])), out);
  });
  // Moments, Moments, beta -> Moments
  binding::define<25, 12>(m, "merge", [](const auto* in, auto* out) {
    auto a = moments_from(in);
    merge<true>(a, moments_from(in + 12), in[24], exponential);
    write(a, out);
  });
  binding::define<25, 12>(m, "merge_without_covariance", [](const auto* in, auto* out) {
    auto a = moments_from(in);
    merge<false>(a, moments_from(in + 12), in[24], exponential);
    write(a, out);
  });
  // gradients of mean (3), peak, covariance (9) and whether there is one; mean (3), covariance (9), maximum, total,
  // argmax, beta -> VolumeGradient
  binding::define<30, 16>(m, "volume_gradient", [](const auto* in, auto* out) {
    write(volume_gradient(in, in[3], in[13] != 0 ? in + 4 : nullptr, in + 14, in + 17, in[26], in[27],
                          static_cast<long long>(in[28]), in[29]),
          out);
  });
  // VolumeGradient, x, y -> constant, linear, quadratic
  binding::define<18, 3>(m, "line_gradient", [](const auto* in, auto* out) {
    const auto line = line_gradient(volume_from(in), in[16], in[17]);
    out[0] = line.constant, out[1] = line.linear, out[2] = line.quadratic;
  });
  // weight, dz, constant, linear, quadratic
  binding::define<5, 1>(m, "logit_gradient", [](const auto* in, auto* out) {
    using T = std::remove_reference_t<decltype(out[0])>;
    out[0] = logit_gradient(in[0], in[1], LineGradient<T>{in[2], in[3], in[4]});
  });
}
