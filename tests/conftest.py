import os

import pytest
import torch

# Before anything imports the package: without a GPU the Triton kernels are interpreted, on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

# What takes longest. Where processes share the tests, each takes a file at a time, and these come first, so that all
# end together. A file that is not named here is only later.
FIRST = ("test_train.py", "test_packaging.py", "test_actions.py", "test_cuda_compile.py", "test_gpu_check.py")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))
