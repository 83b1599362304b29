"""The families of kernels have one schema for each operator."""

import pytest
import torch

from bkind3d_kernels import library, registration, triton_ops


@pytest.mark.parametrize(
    ("namespace", "missing"), [("bkind3d", library.reason("_cpu")), (triton_ops.NAMESPACE, triton_ops.MISSING)]
)
@pytest.mark.parametrize("name", registration.SCHEMAS)
def test_schema(namespace: str, missing: str | None, name: str) -> None:
    if missing is not None:
        pytest.skip(missing)
    found = str(getattr(getattr(torch.ops, namespace), name).default._schema)
    assert found == f"{namespace}::{name}{registration.SCHEMAS[name]}"
