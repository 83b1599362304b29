"""The operations in CUDA C++: ``csrc/cuda``, loaded by :mod:`bkind3d_kernels.library`.

The operators are those of the C++ kernels, which torch calls by the device of their tensors.
"""
