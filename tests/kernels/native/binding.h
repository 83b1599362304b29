// Functions of csrc/common over the rows of a NumPy array: (n, In) in, (n, Out) out, in float and in double.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

namespace binding {

namespace py = pybind11;

template <class T>
using Array = py::array_t<T, py::array::c_style>;

template <class T, int In, int Out, class F>
void define_for(py::module_& m, const char* name, F f) {
  m.def(
      name,
      [f, name](const Array<T>& x) {
        if (x.ndim() != 2 || x.shape(1) != In)
          throw std::invalid_argument(std::string(name) + ": expected " + std::to_string(In) + " columns");
        Array<T> y({x.shape(0), py::ssize_t(Out)});
        for (py::ssize_t row = 0; row < x.shape(0); ++row) f(x.data() + row * In, y.mutable_data() + row * Out);
        return y;
      },
      py::arg("rows").noconvert());
}

// f(const T* in, T* out) for one row.
template <int In, int Out, class F>
void define(py::module_& m, const char* name, F f) {
  define_for<float, In, Out>(m, name, f);
  define_for<double, In, Out>(m, name, f);
}

}  // namespace binding
