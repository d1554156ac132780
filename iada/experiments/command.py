"""`python -m iada paper`: the papers' experiments, their figures beside the published ones."""

import argparse
import shlex
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import torch

from iada.experiments import recipe as recipes
from iada.experiments.datasets import BUNDLED
from iada.experiments.experiment import Limits, Parts, best_device, limited, make_split, read_parts
from iada.experiments.listing import comparison, derived_records, listing, published_figures
from iada.experiments.on_demand import NOTHING, OnDemand, check_demand, with_demand
from iada.experiments.progress import Series
from iada.experiments.recipe import Recipe
from iada.experiments.records import RECORD, read_records
from iada.experiments.run import REQUEST, RunOptions, plan, run
from iada.training.checkpoint import CHECKPOINT
from iada.utils.checks import argument_error, check_choice
from iada.utils.distributed import by_first, current_group, launched_group, rank_of
from iada.utils.files import check_writable

# This repository's own runs, in a checkout.
RESULTS = tuple(Path("bench/results") / name for name in ("paper.json", "frozen.json"))


def add_paper(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser(
        "paper",
        help="run the papers' experiments",
        description=__doc__,
        epilog=f"The recipes: {recipes.recipe_folder()}. With several processes, which train each "
        "run together: torchrun --nproc-per-node 2 -m iada paper ...",
    )
    parser.add_argument("--list", action="store_true", help="every row, and what has been run")
    parser.add_argument("--table", help="2 to 7, uniform-noise, afr-1, …: see --list")
    parser.add_argument("--row", help="a row of the table, as in cifar10-100 (default: all)")
    parser.add_argument("--data", type=Path, help="your copy of the data set")
    parser.add_argument("--methods", nargs="+", metavar="M", help="some of the row's (default all)")
    seeds = parser.add_mutually_exclusive_group()
    seeds.add_argument(
        "--seeds", type=int, default=1, metavar="N", help="seeds 0 to N-1 (default 1)"
    )
    seeds.add_argument("--seed", type=int, metavar="K", help="seed K alone")
    parser.add_argument("--out", type=Path, default=Path("runs/paper"), help="folder for the runs")
    parser.add_argument("--dry-run", action="store_true", help="what would run, and for how long")
    parser.add_argument("--set", nargs="+", default=[], metavar="SECTION.KEY=VALUE", dest="changes")
    add_machine(parser)
    parser.add_argument("--tensorboard", action="store_true", help="log for TensorBoard too")
    smaller = parser.add_argument_group("a smaller experiment than the published one")
    smaller.add_argument("--epochs", type=int, default=0, help="the schedule in so many epochs")
    smaller.add_argument("--train-limit", type=int, default=0, help="training images a class")
    smaller.add_argument("--test-limit", type=int, default=0, help="test images a class")
    parser.add_argument(
        "--evaluate-every", type=int, default=1, metavar="N", help="test every N epochs (default 1)"
    )
    demand = parser.add_argument_group("measured of each finished run on demand")
    demand.add_argument(
        "--corruptions",
        nargs="?",
        const=True,
        default=False,
        type=Path,
        metavar="CIFAR-10-C",
        help="accuracy on corrupted test images: made here, or those of the published folder",
    )
    demand.add_argument(
        "--moved-features", action="store_true", help="Fig. 5: images of what ε does to features"
    )
    demand.add_argument(
        "--balance", action="store_true", help="accuracy with τ log π taken from the logits"
    )
    parser.set_defaults(run=paper)


def paper(options: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    with launched_group():
        return _paper(options)


def _paper(options: argparse.Namespace) -> int:
    if options.list:
        known = read_records([options.out, *RESULTS])
        say(listing([recipes.load(name) for name in recipes.names()], known))
        return 0
    if options.table is None:
        raise argument_error("--table", "a table of the papers", "none", "pass one, or --list")
    unbundled = [recipe for recipe in _chosen(options) if recipe.data["reader"] not in BUNDLED]
    if options.data is None and unbundled:
        needs = "; ".join(dict.fromkeys(recipe.needs for recipe in unbundled))
        raise argument_error("--data", f"a path ({needs})", "none", "pass where the data set lies")
    check_at_least(1, options, "seeds", "evaluate_every")
    check_at_least(0, options, "epochs", "train_limit", "test_limit", "workers", "seed")
    limits = Limits(options.epochs, options.train_limit, options.test_limit, tuple(options.changes))
    run_options = RunOptions(
        options.out,
        device_named(options.device),
        options.workers,
        progress=True,
        tensorboard=options.tensorboard,
        evaluate_every=options.evaluate_every,
    )
    chosen = _chosen(options)
    _check_one_data_set(chosen)
    if current_group() is not None:
        check_processes(chosen, run_options.device)
    if options.dry_run:
        for recipe in chosen:
            _dry_run(recipe, options, limits, run_options)
        return 0
    by_first(lambda: check_out(options.out), current_group())  # before hours of training, not after
    seeds = _seeds(options)
    shorter = [limited(recipe, limits) for recipe in chosen]
    runs = [(r, entry, seed) for r in shorter for seed in seeds for entry in r.methods]
    series = Series(runs)
    failed: list[FloatingPointError] = []
    for recipe in chosen:
        try:
            _run(recipe, options, limits, run_options, series)
        except FloatingPointError as error:
            failed.append(error)
    if failed:
        raise failed[0]
    return 0


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Add the options of what to run on."""
    parser.add_argument("--device", help="a torch device (default: the accelerator, or cpu)")
    parser.add_argument("--workers", type=int, default=0, help="processes that load image files")


def device_named(name: str | None) -> torch.device:
    """The device that `--device` names; the accelerator, or the CPU, without."""
    if name is None:
        return best_device()
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        got = f"{name!r} ({str(error).splitlines()[0]})"
        remedy = "leave it out, or pass cpu"
        raise argument_error("--device", "a torch device", got, remedy) from error


def check_at_least(least: int, options: argparse.Namespace, *names: str) -> None:
    """ValueError for one of these options that is given and smaller."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < least:
            expected = f"at least {least}" if least else "0 or more"
            raise argument_error(f"--{name.replace('_', '-')}", expected, value, "raise it")


def check_out(folder: Path) -> None:
    """A folder that runs can be written below; ValueError for the folder of one."""
    if any((folder / name).exists() for name in (REQUEST, RECORD, CHECKPOINT)):
        remedy = "pass the --out that the run was made with, or another"
        raise argument_error("--out", "a folder for runs", f"{folder}, which is a run's", remedy)
    check_writable(folder)


def _check_one_data_set(chosen: Sequence[Recipe]) -> None:
    """All rows read the one path alike; found now, not after the first row's hours."""
    kinds = {(recipe.data["reader"], recipe.data.get("protocol") == "alt") for recipe in chosen}
    if len(kinds) > 1:
        rows = ", ".join(recipe.row for recipe in chosen)
        expected = "rows of one data set, as --data is one path"
        raise argument_error("--row", expected, f"all of {rows}", "pass one of these")


def check_processes(chosen: Sequence[Recipe], device: torch.device) -> None:
    """All that the options name can be trained by several processes."""
    alone = [
        c.key
        for r in chosen
        for c in r.methods
        if c.trainer.method and c.trainer.method.single_process
    ]
    if alone:
        several = [c.key for c in chosen[0].methods if c.key not in alone]
        expected = "those that several processes can train together"
        got = f"{', '.join(dict.fromkeys(alone))}, which one process trains"
        remedy = f"pass --methods {' '.join(several)} here, and these without torchrun"
        raise argument_error("--methods", expected, got, remedy)
    if device.index is not None:
        remedy = f"pass {device.type}: each process takes the device of its LOCAL_RANK"
        raise argument_error("--device", "a kind of device for several processes", device, remedy)


def say(text: str) -> None:
    """Print it, once for all processes."""
    if rank_of(current_group()) == 0:
        print(text, flush=True)


def _chosen(options: argparse.Namespace) -> list[Recipe]:
    """The recipes that the options name, with their methods and changes."""
    table = recipes.table_name(options.table)
    rows = [name for name in recipes.names() if name.startswith(f"{table}/")]
    if options.row is not None:
        check_choice("--row", options.row, [name.split("/")[1] for name in rows], "see --list")
        rows = [f"{table}/{options.row}"]
    changes = recipes.changes_of(options.changes)
    return [with_methods(recipes.load(name, changes), options.methods) for name in rows]


def with_methods(
    recipe: Recipe, methods: Sequence[str] | None, option: str = "--methods"
) -> Recipe:
    """The recipe with these of its methods, in this order; None for all."""
    if methods is None:
        return recipe
    by_key = {entry.key: entry for entry in recipe.methods}
    for key in methods:
        check_choice(option, key, by_key)
    return replace(recipe, methods=tuple(by_key[key] for key in dict.fromkeys(methods)))


def _run(
    recipe: Recipe,
    options: argparse.Namespace,
    limits: Limits,
    run_options: RunOptions,
    series: Series,
) -> None:
    say(f"{recipe.name}: {recipe.title} ({recipe.source})")
    for deviation in limits.words(recipe.methods[0].trainer.epochs):
        say(f"  other than published: {deviation}")
    parts = read_parts(recipe, options.data, limits)
    demand = OnDemand(options.corruptions, options.moved_features, options.balance)
    check_demand(demand, recipe, parts)
    command, run_options = _command(recipe, options), replace(run_options, root=options.out)
    folder, seeds = options.out / recipe.name, _seeds(options)
    run_here = replace(run_options, folder=folder)
    run_methods(recipe, parts, seeds, limits, run_here, series, command, demand)


def run_methods(
    recipe: Recipe,
    parts: Parts,
    seeds: Sequence[int],
    limits: Limits,
    run_options: RunOptions,
    series: Series,
    command: str,
    demand: OnDemand = NOTHING,
) -> None:
    """Every method of the recipe with every seed, in METHOD/seedN of the options' folder.

    Prints the figures, and writes the report there. A run that diverges does not keep the others;
    once they are done FloatingPointError names it. command: what it says that makes the runs.
    demand: what is measured of each beside.
    """
    from iada.experiments.report import write_page

    folder = run_options.folder
    records = []
    failed: dict[str, FloatingPointError] = {}
    for seed in seeds:
        split = make_split(recipe, parts, seed)
        for entry in recipe.methods:
            name = f"{entry.title}, seed {seed}"
            outlook = series.outlook()
            begun = series.begin()
            say(f"\n{begun}: {name}")
            own, shown_as = folder / entry.key / f"seed{seed}", f"{begun}{outlook}: {name}"
            run_here = replace(run_options, folder=own, progress=shown_as)
            made = not (own / RECORD).exists()
            planned = plan(recipe, entry, seed, split, limits, run_here)
            try:
                record = run(planned)
            except FloatingPointError as error:  # it would again; the others need not wait
                say(f"  diverged: {error}")
                failed[name] = error
                continue
            say(f"  {series.end(record, recipe, made and 'same_as' not in record)}")
            record, lines = with_demand(planned, record, demand)
            for line in lines:
                say(f"  {line}")
            records.append(record)
    if not records:
        raise next(iter(failed.values()))
    say(f"\n{comparison(recipe, records)}")
    published = published_figures([recipe])
    shown = [*records, *derived_records(recipe, records)]
    page = by_first(
        lambda: write_page(
            shown, folder, published, recipe.source, command, reference=recipe.reference
        ),
        current_group(),
    )
    say(f"\nReport: {page}")
    if failed:
        name, first = next(iter(failed.items()))
        others = f" ({len(failed)} runs diverged: {', '.join(failed)})" if len(failed) > 1 else ""
        raise FloatingPointError(f"{name}: {first}{others}") from first


def _seeds(options: argparse.Namespace) -> Sequence[int]:
    return range(options.seeds) if options.seed is None else [options.seed]


def _command(recipe: Recipe, options: argparse.Namespace) -> str:
    """The command that makes these runs, for another person's machine."""
    words = [f"python -m iada paper --table {options.table} --row {recipe.row}"]
    words += ["--data PATH"] * (recipe.data["reader"] not in BUNDLED)
    for name in ("seeds", "epochs", "train_limit", "test_limit", "evaluate_every"):
        value = getattr(options, name)
        if value > (name in ("seeds", "evaluate_every")):  # 1 or 0 is what they are by default
            words.append(f"--{name.replace('_', '-')} {value}")
    if options.seed is not None:
        words.append(f"--seed {options.seed}")
    if options.methods:
        words.append(f"--methods {' '.join(options.methods)}")
    if options.corruptions:
        words.append("--corruptions" if options.corruptions is True else "--corruptions CIFAR-10-C")
    if options.moved_features:
        words.append("--moved-features")
    if options.balance:
        words.append("--balance")
    if options.changes:
        words.append(f"--set {shlex.join(options.changes)}")
    return " ".join(words)


def _dry_run(
    recipe: Recipe, options: argparse.Namespace, limits: Limits, run_options: RunOptions
) -> None:
    from iada.experiments.timing import estimate

    parts = read_parts(recipe, options.data, limits)
    seeds = _seeds(options)
    split = make_split(recipe, parts, seeds[0])
    meta = 0 if split.meta is None else len(split.meta)
    say(f"{recipe.name}: {recipe.title} ({recipe.source}), on {run_options.device}")
    say(f"  {len(split.train)} training, {meta} meta and {len(split.test)} test samples")
    total = 0.0
    for entry in recipe.methods:
        times = estimate(plan(recipe, entry, seeds[0], split, limits, run_options))
        total += len(seeds) * times.total
        say(
            f"  {entry.title}: {times.plain_steps} steps of {1e3 * times.plain_step:.0f} ms, "
            f"{times.method_steps} of {1e3 * times.method_step:.0f} ms, {times.tests} tests of "
            f"{times.test:.1f} s: about {_duration(times.total)} a seed"
        )
    say(f"  {len(seeds)} seeds: about {_duration(total)}")


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
