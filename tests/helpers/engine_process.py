"""Run by test_engine_distributed: steps of MetaIADA with each batch split between processes.

torchrun --nproc-per-node 2 engine_process.py FILE
"""

import sys

import torch
import torch.distributed as dist
from torch import nn

import iada
from iada.utils.distributed import current_group, gather_rows, own_part, rank_of, size_of

MODES = {
    "jvp": {},
    "low memory": {"low_memory": True},
    "finite-difference": {"hypergradient": "finite-difference"},
    "head": {"scope": "head"},
    "interval": {"interval": 2},
    "diag": {"covariance": "diag"},
    "clipped": {"clip_norm": 0.1},
}
DTYPES = (torch.float32, torch.float64)
ROWS, META_ROWS = 13, 5  # shared unevenly
EXPERTS = "experts"


class Experts(nn.Module):
    """Seven rows go through one layer, the others through another, none through a third.

    All in one process; each process of two goes through its own one alone.
    """

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(6, 8, bias=False) for _ in range(3))

    def forward(self, inputs):
        parts = [layer(inputs[inputs[:, 0] == k]) for k, layer in enumerate(self.layers[:2])]
        return torch.cat([part for part in parts if len(part)])


def run_experts(group, steps=2):
    """What steps of plain CE leave of layers that not every process goes through, in a row."""
    torch.manual_seed(0)
    backbone, head = Experts().double(), nn.Linear(8, 3).double()
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)
    method = iada.Method(backbone, head, optimizer, process_group=group)
    own, labels = own_part(ROWS, group), torch.arange(ROWS) % 3
    for step in range(steps):
        inputs = torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(step)).double()
        inputs[:, 0] = (torch.arange(ROWS) >= 7).double()
        method.cross_entropy_step((inputs[own], labels[own]))
    return torch.cat([p.detach().reshape(-1) for p in parameters])


def run(mode, dtype, group):
    """All state that three iterations and one of plain CE leave, in a row."""
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 8))
    backbone, head = backbone.to(dtype), nn.Linear(8, 3).to(dtype)
    parameters = [*backbone.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    options = dict(MODES[mode])
    covariance = iada.ClassCovariance(3, 8, options.pop("covariance", "full")).to(dtype)
    memory = iada.TrainingMemory(3, num_samples=50).to(dtype)
    meta = iada.MetaIADA(
        backbone,
        head,
        optimizer,
        torch.tensor([40, 20, 10]),
        covariance=covariance,
        memory=memory,
        covariance_lr=1.0,
        process_group=group,
        **options,
    )
    generator = torch.Generator().manual_seed(1)
    own, meta_own = own_part(ROWS, group), own_part(META_ROWS, group)
    for step in range(4):
        inputs = torch.randn(ROWS, 6, generator=generator).to(dtype)
        meta_inputs = torch.randn(META_ROWS, 6, generator=generator).to(dtype)
        labels, meta_labels = torch.arange(ROWS) % 3, torch.arange(META_ROWS) % 3
        index = torch.arange(ROWS) + step
        batch = (inputs[own], labels[own], index[own])
        if step == 0:
            meta.cross_entropy_step(batch)
            memory.end_epoch()
        else:
            result = meta.step(batch, (meta_inputs[meta_own], meta_labels[meta_own]))
            assert result.epsilon.shape == (ROWS,)
    state = [*parameters, *meta.perturbation.state_dict().values(), covariance.covariance]
    state += [*memory.state_dict().values(), result.loss, result.meta_loss]
    return torch.cat([t.detach().double().reshape(-1) for t in state])


def main():
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    group = current_group()
    ends = {}
    for mode in MODES:
        for dtype in DTYPES:
            end = run(mode, dtype, group)
            everywhere = gather_rows(end[None], [1] * size_of(group), group)
            assert torch.equal(everywhere[0], everywhere[-1]), f"ranks differ: {mode}"
            ends[f"{mode} {dtype}"] = end
    end = run_experts(group)
    everywhere = gather_rows(end[None], [1] * size_of(group), group)
    assert torch.equal(everywhere[0], everywhere[-1]), f"ranks differ: {EXPERTS}"
    ends[EXPERTS] = end
    if rank_of(group) == 0:
        torch.save(ends, sys.argv[1])
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
