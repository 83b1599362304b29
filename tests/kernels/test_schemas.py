"""The families of kernels have one schema for each operator."""

import pytest
import torch

from bkind3d_kernels import backends, library, registration, triton_ops

FAMILIES = {
    "cpp": ("bkind3d", library.reason("_cpu")),
    "triton": (triton_ops.NAMESPACE, triton_ops.MISSING),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", registration.SCHEMAS)
def test_schema(family: str, name: str) -> None:
    namespace, missing = FAMILIES[family]
    if missing is not None:
        pytest.skip(missing)
    if name.removesuffix("_backward") not in backends.operations_of(family):
        pytest.skip(f"this operation has no {backends.BACKENDS[family].description}")
    found = str(getattr(getattr(torch.ops, namespace), name).default._schema)
    assert found == f"{namespace}::{name}{registration.SCHEMAS[name]}"
