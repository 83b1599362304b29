"""The operations in C++ for CPU tensors: ``csrc/cpu``, loaded by :mod:`bkind3d_kernels.library`."""
