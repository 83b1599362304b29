"""Two processes under DistributedDataParallel: gradients of every backend are the mean of those of each process."""

import subprocess
import sys
from pathlib import Path

import ddp_worker
import torch

from bkind3d_kernels import explain


def test_two_processes(tmp_path: Path) -> None:
    names = [line.backend for line in explain("unproject") if line.available]
    command = [sys.executable, str(Path(ddp_worker.__file__))]
    workers = [subprocess.Popen([*command, str(rank), str(tmp_path), *names]) for rank in range(2)]
    for worker in workers:
        worker.wait(timeout=120)
    for name in names:
        single = []
        for rank in range(2):
            model = ddp_worker.model(name)
            model(*ddp_worker.batch(rank)).square().sum().backward()
            single.append([p.grad for p in model.parameters()])
        for rank in range(2):
            together = torch.load(tmp_path / f"gradients{rank}.pt")[name]
            assert any(g.abs().max() > 1e-3 for g in together)
            for got, a, b in zip(together, *single):
                torch.testing.assert_close(got, (a + b) / 2, rtol=1e-4, atol=1e-5)
