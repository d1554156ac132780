"""Where threads of one program exchange data through memory, the binary has the barrier.

test_triton_memory.py shows that each `tl.debug_barrier` of the sources is needed; here the kernels
are compiled and their assembly is read: between a store and its barrier nothing is loaded, and the
barrier is there.
"""

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

import iada_kernels
from tests.helpers.forks import forked

pytestmark = pytest.mark.slow
PACKAGE = Path(iada_kernels.__file__).parent / "triton"

# Instructions of each kernel in order, (file, line, kind): "past" beside a load is how it reads.
LISTING = """
import json, re, sys
from bench.offline.combinations import Combination, recorded_launches
from bench.offline.compiler import compiled, compiling_for
from iada_kernels.contract import LossNeeds
architecture = sys.argv[1]
kinds = (
    ("store", r"st\\.global|global_store|buffer_store"),
    ("load", r"ld\\.global|global_load|buffer_load"),
    ("past", r"ld\\.global\\.cg"),
    ("wait", r"s_waitcnt vmcnt\\(0\\)"),
    ("barrier", r"bar\\.sync|barrier\\.sync|s_barrier"),
    ("atomic", r"atom\\.\\S*acq_rel|global_atomic_add"),
)
common = dict(
    rows=40, features="float32", weight="float32", covariance="float32",
    structure="full", streams=True, terms=("bias", "epsilon", "log_prior"),
    needs=LossNeeds(*[True] * 6), reduction="mean", matmul="highest", neighbours=0,
)
small = Combination(classes=10, width=64, other="update", **common)
large = Combination(classes=10, width=130, other="hypergradient", **common)
alone = dict(structure="none", streams=False, needs=LossNeeds(*[False] * 6), other="update")
wide, many = (Combination(classes=c, width=64, **common | alone) for c in (130, 3000))
# In these no threads exchange anything: a barrier in one of them would be missing below.
plain = {"tangent_kernel", "curvature_kernel", "grad_epsilon_kernel", "grad_features_kernel"}
plain |= {"head_backward_kernel", "class_sums_kernel", "single_launch_backward_kernel"}
found = {}
with compiling_for(architecture):
    recorded = {c: recorded_launches(c, architecture) for c in (small, large, wide, many)}
    for c, launch in ((c, launch) for c in recorded for _, launch in recorded[c]):
        name = launch.kernel.fn.__name__
        if name in plain:
            continue
        if c in (wide, many):  # the softmax of rows of several tiles
            if name != ("logits_kernel" if c is wide else "softmax_kernel"):
                continue
            name += f" of {c.classes} classes"
        assembly = compiled(launch).asm["ptx" if architecture.startswith("sm") else "amdgcn"]
        files, events, place = {}, [], None
        for line in assembly.splitlines():
            if match := re.match(r'\\s*\\.file\\s+(\\d+)\\s+(?:"([^"]*)"\\s+)?"([^"]*)"', line):
                files[match[1]] = match[3].rsplit("/")[-1]
            elif match := re.match(r"\\s*\\.loc\\s+(\\d+)\\s+(\\d+)", line):
                place = (match[1], int(match[2]))
            elif place is not None:
                code = line.split("//")[0].split(";")[0] if line.strip()[:1] != ";" else ""
                events += [(*place, kind) for kind, words in kinds if re.search(words, code)]
        listed = found.setdefault(name, [])
        listed += [(files[f], l, kind) for f, l, kind in events]
json.dump(found, sys.stdout)
"""


# What threads exchange, its file, its store, and the first load of it; None: whatever loads next.
EXCHANGES = [
    ("rows of a class", "rows.py", "tl.store(order +", "moments.py", "tl.load(order + at"),
    ("Σ", "class_loss.py", "tl.store(ptrs, s, mask=mask)", "class_loss.py", "tl.load(sigma +"),
    ("R", "class_loss.py", "tl.store(parts.sums +", "class_loss.py", "tl.load(class_sums"),
    ("P", "class_loss.py", "tl.store(ptrs, delta_sigma", "class_loss.py", "tl.load(weight_ptrs"),
    ("r", "class_loss.py", "tl.store(row_residual, r,", None, None),
    ("sign", "class_loss.py", "tl.store(ptrs, s, mask=row_mask", None, None),
    (
        *("D", "class_loss.py", "tl.store(row_residual, d,"),
        *("class_loss.py", "rows = tl.load(order + at, mask=row_mask"),
    ),
    ("G", "class_loss.py", "tl.store(class_sums, sums", "class_loss.py", "tl.load(parts.sums +"),
    ("losses", "single_launch.py", "tl.store(scratch.losses", None, None),
]
# The same where a program goes on with what others have left.
WIDE = "logits_kernel of 130 classes"
SUMS = [
    *(
        (f"losses, {kernel}", kernel, "head.py", "tl.store(losses +", "total += tl.load(losses +")
        for kernel in ("logits_kernel", WIDE, "softmax_kernel of 3000 classes")
    ),
    ("logits", WIDE, "device.py", "tl.store(ptrs, tile.to(", "return tl.load(ptrs, mask=mask"),
    (
        *("parts of R", "class_pass_kernel", "class_pass.py"),
        *("tl.store(partials.table +", "row += tl.load(ptrs"),
    ),
    (
        *("parts of ∂W", "class_pass_weight_kernel", "class_pass_backward.py"),
        *("tl.store(partials + split_id", "result += tl.load(ptrs"),
    ),
]


def lines_with(file: str, text: str) -> list[int]:
    lines = (PACKAGE / file).read_text().splitlines()
    return [number for number, line in enumerate(lines, 1) if text in line]


def explicit_barriers() -> set[tuple[str, int]]:
    files = [path.name for path in PACKAGE.glob("*.py")]
    return {(file, line) for file in files for line in lines_with(file, "tl.debug_barrier()")}


@pytest.fixture(scope="module", params=["sm_90", "gfx942"])
def listing(request):
    done = forked("-W", "ignore", "-c", LISTING, request.param)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    return {name: [tuple(event) for event in events] for name, events in found.items()}


def test_every_barrier_of_the_source_is_in_the_binary(listing):
    assert len(explicit_barriers()) >= 12
    events = [event for found in listing.values() for event in found]
    assert explicit_barriers() <= {(file, line) for file, line, kind in events if kind == "barrier"}


threads_exchange = pytest.mark.parametrize(
    ("kernel", "file", "store", "reader", "load"),
    [
        *(pytest.param("single_launch_kernel", *rest, id=name) for name, *rest in EXCHANGES),
        *(pytest.param(k, f, store, f, load, id=name) for name, k, f, store, load in SUMS),
    ],
)


@threads_exchange
def test_a_barrier_lies_between_a_store_and_the_load(listing, kernel, file, store, reader, load):
    between, _ = exchange(listing[kernel], file, store, reader, load)
    assert {(f, n) for f, n, kind in between if kind == "barrier"} & explicit_barriers()


@threads_exchange
@pytest.mark.parametrize("listing", ["gfx942"], indirect=True)
def test_each_wave_waits_for_its_stores_before_the_barrier(
    listing, kernel, file, store, reader, load
):
    """AMD's barrier does not, and the thread that counts publishes what has arrived."""
    between, _ = exchange(listing[kernel], file, store, reader, load)
    explicit = explicit_barriers()
    barrier = next(at for at, (f, n, _) in enumerate(between) if (f, n) in explicit)
    assert "wait" in [kind for _, _, kind in between[:barrier]]


def exchange(events, file, store, reader, load):
    """What lies between the last of the stores and the first load, and what follows."""
    lines = lines_with(file, store)
    stored = [at for at, (f, n, kind) in enumerate(events) if (f, kind) == (file, "store")]
    after = max(at for at in stored if events[at][1] in lines)
    following = events[after + 1 :]
    wanted = None if reader is None else places(reader, load)
    first = next(
        at
        for at, (*place, kind) in enumerate(following)
        if kind == "load" and (wanted is None or tuple(place) in wanted)
    )
    return following[:first], following[first:]


def places(reader, load):
    """The compiler may give a load the line that first uses it."""
    number = lines_with(reader, load)[0]
    return [(reader, n) for n in range(number, number + 4)]


programs_exchange = pytest.mark.parametrize(
    ("kernel", "file", "store", "load"),
    [pytest.param(*rest, id=name) for name, *rest in SUMS],
)


@programs_exchange
def test_a_program_counts_after_the_barrier_and_before_the_load(listing, kernel, file, store, load):
    between, _ = exchange(listing[kernel], file, store, file, load)
    kinds = [kind for _, _, kind in between]
    assert "atomic" in kinds[kinds.index("barrier") :]


@programs_exchange
@pytest.mark.parametrize("listing", ["sm_90"], indirect=True)
def test_what_others_stored_is_read_past_the_first_level_cache(listing, kernel, file, store, load):
    _, following = exchange(listing[kernel], file, store, file, load)
    (line,) = lines_with(file, load)
    read, past = (following.count((file, line, kind)) for kind in ("load", "past"))
    assert read == past > 0
