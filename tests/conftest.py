import os

import pytest
import torch

# Before anything imports the package: without a GPU the Triton kernels are interpreted, on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# What takes longest. Where processes share the tests, each takes a file at a time, and these come first, so that all
# end together. A file that is not named here is only later.
FIRST = (
    "test_triton_compile.py",
    "test_packaging.py",
    "test_train.py",
    "test_linear_soft_argmax3d_operators.py",
    "test_soft_argmax3d_operators.py",
    "test_unproject_operators.py",
    "test_rasterize_edges_operators.py",
    "test_unproject.py",
    "test_triton_rasterize_edges.py",
    "test_triton_soft_argmax3d.py",
    "test_gpu_check.py",
    "test_cuda_compile.py",
    "test_actions.py",
)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))
