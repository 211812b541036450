"""The distributed losses: what ranks compute with real DDP over Gloo, and what one process says they should."""

import datetime
import functools
import multiprocessing
import tempfile
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from simclr_fast.losses import NTXentLoss, info_nce, nt_xent
from tests.losses_common import F64, rows

D_IN, D, PROCESSES = 5, 4, 4
GROUPS = {2: [1, 3], 3: [0, 2, 3], 4: [0, 1, 2, 3]}  # in the first two, a rank is not its place in the group
COUNTS = {
    False: {world: [3] * world for world in GROUPS},
    True: {2: [4, 1], 3: [3, 0, 5], 4: [2, 0, 0, 6]},
}
LOSSES = {
    "nt_xent": (nt_xent, {}),
    "nt_xent simclr_tf": (nt_xent, {"scale": "simclr_tf"}),
    "nt_xent sum": (nt_xent, {"reduction": "sum"}),
    "nt_xent none": (nt_xent, {"reduction": "none"}),
    "info_nce": (info_nce, {}),
    "info_nce symmetric": (info_nce, {"symmetric": True}),
    "info_nce negatives": (info_nce, {"negatives": True}),
    "info_nce symmetric negatives": (info_nce, {"symmetric": True, "negatives": True}),
    "info_nce negatives alone": (info_nce, {"in_batch": False, "negatives": True}),
    "info_nce symmetric sum": (info_nce, {"symmetric": True, "reduction": "sum"}),
    "info_nce symmetric none": (info_nce, {"symmetric": True, "reduction": "none"}),
}
LEAF_WORLD, LEAF_LOSSES = 3, ("nt_xent", "nt_xent none", "info_nce symmetric negatives")  # kernels are interpreted
LEAVES = [  # backend, dtype, precision
    ("native", torch.bfloat16, "auto"),
    ("native", torch.float32, "auto"),
    ("triton", torch.float32, "fp32"),
    ("triton", torch.float16, "auto"),
]


class Model(nn.Module):
    """An encoder for each view, and a learnable temperature."""

    def __init__(self, unused=0):
        super().__init__()
        torch.manual_seed(0)
        self.encoders = nn.ModuleList(nn.Sequential(nn.Linear(D_IN, 8), nn.Tanh(), nn.Linear(8, D)) for _ in range(2))
        self.tau = nn.Parameter(torch.tensor(0.3))
        self.unused = nn.Parameter(torch.zeros(unused)) if unused else None
        self.double()

    def embed(self, views):
        return [encoder(view) for encoder, view in zip(self.encoders, views, strict=True)]

    def forward(self, views, name, rank, **options):
        return local(name, *self.embed(views), self.tau, rank, **options)


def batch(counts):
    return rows(2, sum(counts), D_IN, seed=1, dtype=F64)


def embeddings(counts):
    return rows(2, sum(counts), D, seed=2, dtype=F64)


def queue(rank):
    return rows(3 + rank, D, seed=10 + rank, dtype=F64)


def own(x, counts, rank):
    return x[..., sum(counts[:rank]) : sum(counts[: rank + 1]), :]


def reduce(name, losses):
    """A number of rows that were not reduced, each with a weight of its own."""
    return (losses * torch.linspace(-1, 2, len(losses)).to(losses)).sum() if name.endswith("none") else losses


def local(name, z1, z2, tau, rank, negatives=None, **options):
    """What a rank computes."""
    loss, given = LOSSES[name]
    if "negatives" in given:
        options["negatives"] = queue(rank) if negatives is None else negatives
    return reduce(name, loss(z1, z2, tau, **{**given, **options}))


def expected(name, z1, z2, tau, counts, negatives):
    """What ranks should compute, from whole matrices in one process: the loss of each, and the objective of all."""
    loss, options = LOSSES[name]
    z1, z2 = F.normalize(z1), F.normalize(z2)
    s = z1 @ z2.T / tau
    parts = []
    for rank, n in enumerate(counts):
        mine = torch.arange(sum(counts[:rank]), sum(counts[:rank]) + n)
        if loss is nt_xent:
            views = [torch.cat([c, (a @ a.T / tau).fill_diagonal_(-torch.inf)], 1) for c, a in ((s, z1), (s.T, z2))]
            part = torch.cat([F.cross_entropy(view[mine], mine, reduction="none") for view in views])
        else:
            among = s[mine] if options.get("in_batch", True) else s[mine, mine][:, None]
            if "negatives" in options:
                among = torch.cat([among, z1[mine] @ F.normalize(negatives[rank]).T / tau], 1)
            label = mine if options.get("in_batch", True) else mine * 0
            part = F.cross_entropy(among, label, reduction="none")
            if options.get("symmetric"):
                part = (part + F.cross_entropy(s.T[mine], mine, reduction="none")) / 2
        parts.append(part * (2 if "scale" in options else 1))
    whole = torch.cat(parts)
    if name.endswith("none"):
        losses = [reduce(name, part) for part in parts]
    elif name.endswith("sum"):
        losses = [part.sum() for part in parts]
    else:
        losses = [part.sum() * len(counts) / len(whole) for part in parts]
    total = torch.stack(losses).sum()
    return losses, total if name.endswith("sum") else total / len(counts)


def parameters(model):
    return [parameter.grad for parameter in [*model.encoders.parameters(), model.tau]]


def with_ddp(name, counts, rank, group, steps=1, unused=0, ddp=None, **options):
    """Loss and gradients of a rank's parameters, averaged by DDP."""
    model = DistributedDataParallel(Model(unused), process_group=group, **ddp or {})
    for _ in range(steps):
        model.zero_grad()
        loss = model(own(batch(counts), counts, rank), name, rank, group=group, **options)
        loss.backward()
    return loss.detach(), parameters(model.module)


def in_group(rank, group):
    """Everything that a rank of a group finds, by name."""
    world, found = dist.get_world_size(group), {}
    for name in LOSSES:
        for uneven, counts in COUNTS.items():
            found[name, uneven] = with_ddp(name, counts[world], rank, group, uneven=uneven)
    even = COUNTS[False][world]
    found["uneven, though even"] = with_ddp("nt_xent", even, rank, group, uneven=True)
    found["static_graph"] = with_ddp("nt_xent", even, rank, group, steps=3, ddp={"static_graph": True})
    found["unused"] = with_ddp("nt_xent", even, rank, group, 2, unused=2, ddp={"find_unused_parameters": True})

    views = own(batch(even), even, rank)
    for name in ("nt_xent", "nt_xent none", "info_nce symmetric"):
        model = Model()  # no DDP: a reducer that sums
        model(views, name, rank, group=group, grad_average=False).backward()
        for grad in parameters(model):
            dist.all_reduce(grad, group=group)
        found[name, "summed"] = parameters(model)

        with torch.set_grad_enabled(rank == 0 or "none" in name):  # the others do not keep rank 0 waiting
            loss = Model()(views, name, rank, group=group)
        if loss.requires_grad:
            loss.backward()

    for uneven, counts in COUNTS.items():
        z = own(embeddings(counts[world]), counts[world], rank)
        for loss, most in ((nt_xent, "all"), (info_nce, True)):
            if counts[world][rank]:
                found["stats", loss.__name__, uneven] = loss(*z, 0.3, group=group, uneven=uneven, return_stats=most)[1]
            else:
                loss(*z, 0.3, group=group, uneven=uneven, return_stats=most)

    z = own(embeddings(even), even, rank)
    for name in LEAF_LOSSES if world == LEAF_WORLD else ():
        for backend, dtype, precision in LEAVES:
            leaves = [x.to(dtype).requires_grad_() for x in (*z, queue(rank))] + [torch.tensor(0.3, requires_grad=True)]
            options = {"backend": backend, "precision": precision, "group": group, "grad_average": False}
            loss = local(name, *leaves[:2], leaves[3], rank, leaves[2], **options)
            loss.backward()
            found[name, backend, dtype] = [loss.detach(), *(leaf.grad for leaf in leaves)]
    return found


def refused(rank, group):
    """Bad arguments are errors of the rank that passes them, before it meets the others."""
    z1, z2 = own(embeddings(COUNTS[False][PROCESSES]), COUNTS[False][PROCESSES], rank)
    bad = [
        lambda: nt_xent(z1, z2, -1.0, group=group),
        lambda: nt_xent(z1, z2[1:], group=group),
        lambda: nt_xent(z1, z2, group=group, backend="reference"),
        lambda: info_nce(z1, z2, group=group, backend="reference"),
        lambda: info_nce(z1, z2, group=group, negatives=z1[:, 1:]),
    ]
    if rank == 1:
        for call in bad:
            with pytest.raises(ValueError, match="must"):
                call()
    return nt_xent(z1, z2, 0.3, group=group), info_nce(z1, z2, 0.3, group=group)


def of_module(rank):
    """NTXentLoss over all processes: without a bank, and with one that holds the keys of all after a step."""
    counts = COUNTS[False][PROCESSES]
    z1, z2 = own(embeddings(counts), counts, rank)
    with_bank = NTXentLoss(0.3, (sum(counts), D), gather_distributed=True)
    with_bank(z1.float().requires_grad_(), z2.float())
    return NTXentLoss(0.3, gather_distributed=True)(z1, z2), with_bank(z1.float(), z2.float())


def one_process(rank, folder):
    torch.set_num_threads(1)
    warnings.simplefilter("error", FutureWarning)  # of what torch is about to drop
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES, timeout=limit
    )
    groups = {world: dist.new_group(ranks) for world, ranks in GROUPS.items() if world < PROCESSES}
    alone = [dist.new_group([other]) for other in range(PROCESSES)][rank]
    found = {}
    for world, ranks in GROUPS.items():
        if rank in ranks:
            group = groups.get(world, dist.group.WORLD)
            found[world] = in_group(dist.get_rank(group), group)
    found["refused"] = refused(rank, dist.group.WORLD)
    found["module"] = of_module(rank)
    found["alone"] = with_ddp("nt_xent", [3], 0, alone), with_ddp("nt_xent", [3], 0, alone, uneven=True)
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@functools.cache
def found():
    """What every process found."""
    multiprocessing.set_forkserver_preload(["tests.losses_ranks"])  # imports once, not once a rank
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(one_process, (Path(folder),), PROCESSES, start_method="forkserver")
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


def of_group(world):
    """What the ranks of the group of this size found, in their order in it."""
    return [found()[rank][world] for rank in GROUPS[world]]
