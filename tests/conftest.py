import os

import torch

# Before anything imports the package: without a GPU the Triton kernels are interpreted, on CPU tensors.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
