// The types that tensors are stored in and the types that kernels compute in, and the choice among kernels that are
// compiled for each. No torch: the faces translate its dtypes (options.h).
#pragma once

namespace bkind3d {

struct bfloat16 {
  unsigned short bits;
};
struct float16 {
  unsigned short bits;
};

enum class Storage { float32, float64, bfloat16, float16 };

// Arithmetic is in float, or double for double.
template <class S>
struct ArithmeticOf {
  using type = float;
};
template <>
struct ArithmeticOf<double> {
  using type = double;
};
template <class S>
using Arithmetic = typename ArithmeticOf<S>::type;

// f(S()) for the type S of a storage.
template <class F>
[[maybe_unused]] static auto by_storage(Storage storage, F f) {
  switch (storage) {
    case Storage::float64: return f(double());
    case Storage::bfloat16: return f(bfloat16());
    case Storage::float16: return f(float16());
    default: return f(float());
  }
}

// f(T()) for a type T of the arithmetic.
template <class F>
[[maybe_unused]] static auto by_arithmetic(bool is_double, F f) {
  return is_double ? f(double()) : f(float());
}

}  // namespace bkind3d
