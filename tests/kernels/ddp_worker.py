"""One of two processes of test_ddp.py: gradients of a small model under DistributedDataParallel, saved to a file."""

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bkind3d_kernels import EdgeRasterizer, LinearSoftArgmax3d, SoftArgmax3d, Unproject, VoxelGrid
from bkind3d_kernels.geometry import project_points

SIZE = (8, 8)


class Model(nn.Module):
    """Images of two views to edge maps; every operation sits between parameters."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, 4, 3, padding=1)
        self.heatmaps = nn.Conv3d(4, 3, 1)
        self.weights = nn.Parameter(torch.rand(3))
        self.unproject = Unproject(backend=backend)
        self.soft_argmax = SoftArgmax3d(backend=backend)
        self.linear_soft_argmax = LinearSoftArgmax3d(4, 3, backend=backend)
        self.rasterize = EdgeRasterizer(SIZE, 1.0, backend=backend)

    def forward(self, images: Tensor, projections: Tensor) -> Tensor:
        features = self.encoder(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        grid = VoxelGrid.cube((0.0, 0.0, 3.0), 2.0, 6)
        volume = self.unproject(features, projections, grid)
        keypoints = (self.soft_argmax(self.heatmaps(volume), grid) + self.linear_soft_argmax(volume, grid)) / 2
        return self.rasterize(project_points(projections[:, 0], keypoints)[0], self.weights)


def batch(rank: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    camera = torch.tensor([[8.0, 0, 3.5, 0], [0, 8.0, 3.5, 0], [0, 0, 1, 0]])
    shifted = camera + torch.tensor([[0, 0, 0, 1.0], [0, 0, 0, 0], [0, 0, 0, 0]])
    return torch.randn(2, 2, 3, *SIZE, generator=generator), torch.stack([camera, shifted]).expand(2, 2, 3, 4)


def model(backend: str) -> Model:
    torch.manual_seed(0)
    return Model(backend)


def main(rank: int, folder: str, backends: list[str]) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    gradients = {}
    for backend in backends:
        network = nn.parallel.DistributedDataParallel(model(backend))
        network(*batch(rank)).square().sum().backward()
        gradients[backend] = [p.grad for p in network.module.parameters()]
    torch.save(gradients, f"{folder}/gradients{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
