"""Several processes on one batch: each has its rows, all keep the same state.

Every rank computes on its own part of the batch. A mean over the whole batch is the mean of the
ranks' means, weighted by their rows; what depends on all rows at once (class statistics, batch
statistics of characteristics) is computed on gathered rows by every rank alike. So each step
leaves bit-identical parameters and statistics on all ranks.

`group` is a torch.distributed process group; None stands for a single process, for which each
function is the identity. All ranks of the group must make the same calls in the same order.
"""

import contextlib
import gc
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from iada.utils.checks import argument_error, is_sharded

if dist.is_available():
    # The functions in there have the group of all processes as a default argument. Imported after
    # init_process_group (building an optimizer does so), they keep that group alive for good, and
    # gloo's threads with it: a process that ends beside them is aborted now and then.
    import torch.distributed.nn.functional

Group: TypeAlias = "dist.ProcessGroup | None"  # a build of torch may be without
REFUSED = -1  # in place of a count of rows
OF_FIRST = "raised by rank 0, and for the others with it"
Result = TypeVar("Result")


class GroupReference:
    """A process group held so that destroy_process_group() is its end.

    A group that something still refers to keeps its threads, and what they let go of while the
    interpreter ends aborts the process. Call it for the group.
    """

    def __init__(self, group: Group) -> None:
        if not (group is None or isinstance(group, dist.ProcessGroup)):
            expected = "a torch.distributed.ProcessGroup with this process, or None"
            remedy = "pass torch.distributed.group.WORLD, or a new_group() on its members alone"
            raise argument_error("process_group", expected, f"a {type(group).__name__}", remedy)
        self._reference = None if group is None else weakref.ref(group)
        self._told = False

    def tell_of_others(self, name: str, stacklevel: int) -> None:
        """A warning, once, where there are several processes and no group was given.

        `torch.distributed.group.WORLD` is None until init_process_group().
        """
        if self._reference is not None or self._told or current_group() is None:
            return
        self._told = True
        warnings.warn(
            f"{name}: expected process_group=torch.distributed.group.WORLD, as torch.distributed "
            f"has {dist.get_world_size()} processes, got None: this one knows of its own rows "
            "alone. Build it after init_process_group(), before which group.WORLD is None",
            stacklevel=stacklevel + 1,
        )

    def __getstate__(self) -> dict[str, Any]:
        if self._reference is not None:
            raise TypeError(
                "process_group: expected None in what is pickled, got a group, which belongs to "
                "its process; save state_dict() instead"
            )
        return vars(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> "GroupReference":
        return self

    def __call__(self) -> Group:
        if self._reference is None:
            return None
        group = self._reference()
        if group is None or not dist.is_initialized():
            raise RuntimeError(
                "process_group: expected one that is alive, got one that was destroyed; after "
                "destroy_process_group() build what used it anew"
            )
        return group


def current_group() -> Group:
    """The group of all processes if torch.distributed is initialised with several, else None."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return None
    return dist.group.WORLD


@contextlib.contextmanager
def launched_group() -> Iterator[None]:
    """Inside, torch.distributed is initialised if torchrun started this process; then no more.

    Each process takes the CUDA device of its LOCAL_RANK. With CPU tensors on gloo beside NCCL, so
    that hosts can agree without waiting for a device.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group()
    try:
        yield
    finally:
        dist.destroy_process_group()
        # Frames of errors that a library caught may hold the group in a cycle, and what is still
        # there when the interpreter ends aborts the process now and then.
        gc.collect()


def rank_of(group: Group) -> int:
    """This process's place in the group, from 0."""
    return 0 if group is None else dist.get_rank(group)


def size_of(group: Group) -> int:
    """The number of processes."""
    return 1 if group is None else dist.get_world_size(group)


def check_unwrapped(backbone: nn.Module, head: nn.Module) -> None:
    """ValueError if a wrapper or FSDP, of all or of a part, sees to the gradients."""
    why = "gradients are averaged here, over the process group"
    replicated = (nn.parallel.DistributedDataParallel, nn.DataParallel)
    fsdp = sys.modules.get("torch.distributed.fsdp")  # unless imported, no module is one
    sharded = (fsdp.FullyShardedDataParallel,) if fsdp else ()
    for name, module in (("backbone", backbone), ("head", head)):
        for place, part in module.named_modules(prefix=name):
            for kind in (*replicated, *sharded):
                if isinstance(part, kind):
                    got = kind.__name__ + ("" if place == name else f" as {place}")
                    remedy = "put its .module in its place"
                    if kind in sharded:
                        remedy = "leave it out"
                    elif place == name:
                        remedy = f"pass {name}.module"
                    raise argument_error(name, "a plain module", got, f"{remedy}: {why}")
        if any(is_sharded(parameter) for parameter in module.parameters()):
            got, remedy = "one sharded into DTensors", f"leave out fully_shard: {why}"
            raise argument_error(name, "a plain module", got, remedy)


def check_parts(rows: dict[str, int], group: Group) -> None:
    """ValueError if a rank would be without a row of a batch.

    rows: of the smallest batch of each kind, by the name of the setting.
    """
    if group is None:
        return
    for name, least in rows.items():
        if least < size_of(group):
            expected = f"a row for each of {size_of(group)} processes in every batch"
            remedy = "start fewer processes, or raise it"
            raise argument_error(name, expected, f"{least} rows", remedy)


def own_part(count: int, group: Group) -> slice:
    """This rank's contiguous part of `count` rows; parts differ by one row at most."""
    small, larger = divmod(count, size_of(group))
    rank = rank_of(group)
    start = rank * small + min(rank, larger)
    return slice(start, start + small + (rank < larger))


def row_counts(count: int, group: Group) -> list[int]:
    """`count` of every rank, in the order of ranks.

    Waits for the other hosts; for the device only if the group has no backend for CPU tensors
    (torch.distributed.init_process_group() without a name has one).
    """
    return [count] if group is None else _host_values(count, group)


def agreed_row_counts(count: int, group: Group) -> list[int]:
    """`row_counts`, or ValueError if another rank is in `others_told` for an error of its own."""
    counts = row_counts(count, group)
    if min(counts) < 0:
        got = f"an error on rank {counts.index(REFUSED)}"
        remedy = "its own message says what is wrong; nothing was changed"
        raise argument_error("process_group", "arguments that fit on every rank", got, remedy)
    return counts


@contextlib.contextmanager
def others_told(group: Group) -> Iterator[None]:
    """A ValueError inside is raised by the others' `agreed_row_counts`, which would wait for ever.

    Inside, nothing is exchanged.
    """
    try:
        yield
    except ValueError:
        if group is not None:
            row_counts(REFUSED, group)
        raise


def any_rank(flag: bool, group: Group) -> bool:
    """Whether `flag` holds on some rank; it waits as `row_counts` does."""
    return flag if group is None else any(_host_values(int(flag), group))


@torch.no_grad()
def gather_rows(rows: Tensor, counts: Sequence[int], group: Group) -> Tensor:
    """The rows of all ranks, (sum of counts, ...), in the order of ranks, detached.

    Args:
        rows: (counts[own rank], ...), any dtype; the axes after the first are alike everywhere.
        counts: from `row_counts`.
    """
    if group is None:
        return rows.detach()
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


@torch.no_grad()
def average(tensors: Iterable[Tensor], counts: Sequence[int], group: Group) -> None:
    """Each tensor becomes, in place, its mean over the ranks, weighted by their row counts.

    With the gradients (or values) of means over each rank's own rows, the result belongs to the
    mean over the whole batch. One exchange for each dtype, summed in float32 at the least.
    """
    if group is None:
        return
    share = counts[rank_of(group)] / sum(counts)
    _exchange(tensors, lambda flat: dist.all_reduce(flat.mul_(share), group=group), torch.float32)


@torch.no_grad()
def add_up(tensors: Iterable[Tensor], group: Group) -> None:
    """Each tensor becomes, in place, its sum over the ranks."""
    if group is not None:
        _exchange(tensors, lambda flat: dist.all_reduce(flat, group=group))


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor], group: Group) -> None:
    """Each tensor becomes, in place, what rank 0 has."""
    if group is not None:
        source = dist.get_global_rank(group, 0)
        _exchange(tensors, lambda flat: dist.broadcast(flat, source, group=group))


def gather_objects(value: Any, group: Group) -> list[Any]:
    """A small picklable value of every rank, in the order of ranks, on every rank."""
    if group is None:
        return [value]
    values: list[Any] = [None] * size_of(group)
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast_object(value: Any, group: Group) -> Any:
    """Rank 0's picklable value, on every rank."""
    if group is None:
        return value
    box = [value]
    dist.broadcast_object_list(box, dist.get_global_rank(group, 0), group=group)
    return box[0]


def by_first(action: Callable[[], Result], group: Group) -> Result:
    """What `action` gives on rank 0, which alone calls it, on every rank; it must be picklable.

    A ValueError or OSError of it is raised by all, the others' with the note `OF_FIRST`: none waits
    for a rank that has ended.
    """
    if group is None:
        return action()
    result: Result | None = None
    failure: ValueError | OSError | None = None
    if rank_of(group) == 0:
        try:
            result = action()
        except (ValueError, OSError) as error:
            failure = error
    result, shared = broadcast_object((result, failure), group)
    try:
        if failure is not None:
            raise failure
        if shared is not None:
            shared.add_note(OF_FIRST)
            raise shared
        return result
    finally:
        del failure, shared  # an error, its frame here and its name here: a cycle holding the group


def told_by_first(error: BaseException) -> bool:
    """Whether rank 0 has the same error, and shows it."""
    return OF_FIRST in getattr(error, "__notes__", ())


def launched_rank() -> int:
    """This process's rank under torchrun, without and after its group as well; else 0."""
    launched = dist.is_available() and dist.is_torchelastic_launched()
    return int(os.environ["RANK"]) if launched else 0


def running_statistics(module: nn.Module) -> list[Tensor]:
    """Means and variances that BatchNorm layers keep of this rank's rows alone, to be averaged."""
    kinds = nn.modules.batchnorm._BatchNorm
    layers = [m for m in module.modules() if isinstance(m, kinds)]
    alone = [m for m in layers if not isinstance(m, nn.SyncBatchNorm)]  # which sees all rows
    buffers = [buffer for m in alone for buffer in (m.running_mean, m.running_var)]
    return [buffer for buffer in buffers if buffer is not None]


def _exchange(
    tensors: Iterable[Tensor],
    exchange: Callable[[Tensor], object],
    least: torch.dtype | None = None,
) -> None:
    """Has `exchange` change all tensors of a dtype at once, flat, in precision `least` or more."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for dtype, same in by_dtype.items():
        dtype = torch.promote_types(least or dtype, dtype)
        flat = torch.cat([tensor.detach().reshape(-1).to(dtype) for tensor in same])
        exchange(flat)
        parts = flat.split([tensor.numel() for tensor in same])
        for part, tensor in zip(parts, same, strict=True):
            tensor.detach().copy_(part.view_as(tensor))


def _host_values(value: int, group: dist.ProcessGroup) -> list[int]:
    on_host = "cpu" in dist.get_backend_config(group)
    device = torch.device("cpu" if on_host else torch.accelerator.current_accelerator() or "cpu")
    own = torch.tensor([value], device=device)
    values = [torch.empty_like(own) for _ in range(size_of(group))]
    dist.all_gather(values, own, group=group)
    return torch.cat(values).tolist()
