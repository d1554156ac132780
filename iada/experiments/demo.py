"""`python -m iada demo`: the digits' recipes over several seeds, and a report."""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import signal
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from iada.experiments import recipe as recipes
from iada.experiments.command import check_at_least
from iada.experiments.experiment import Limits, make_split, read_parts
from iada.experiments.metrics import OURS, paired
from iada.experiments.report.tables import difference, overview_table
from iada.experiments.report.variants import Variant, by_experiment, variants_of
from iada.experiments.run import RunOptions, plan, run
from iada.utils.files import check_writable, write_text

Record = dict[str, Any]
ROWS = ("digits/long-tail", "digits/noise")
WITH_META_STEP = ("meta-weight-net", "meta-iada")  # the longest runs
EVALUATE_EVERY = 5  # epochs
RESULTS = "results.json"
# What results.json goes without: the recipe has the settings, records.json the rest.
DETAILS = ("settings", "model", "split", "class_counts", "curve", "spectrum", "surrogate")


class Job(NamedTuple):
    """One run: a recipe's name, a method's key, and a seed."""

    recipe: str
    method: str
    seed: int


def add_demo(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command to the parser's."""
    parser = commands.add_parser("demo", help="train on digits against baselines, write a report")
    parser.add_argument("--out", type=Path, default=Path("demo-report"), help="folder to write")
    parser.add_argument("--seeds", type=int, default=8, help="runs of each method (default 8)")
    parser.add_argument("--jobs", type=int, default=None, help="processes (default: all cores)")
    parser.set_defaults(run=demo)


def demo(options: argparse.Namespace) -> int:
    """Run the command; its exit code."""
    from tqdm.auto import tqdm

    from iada.experiments.report import write_page

    check_at_least(1, options, "seeds", "jobs")
    check_writable(options.out)  # before minutes of training, not after
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that workers are stopped too
    jobs = all_jobs(options.seeds)
    records = []
    with tqdm(total=len(jobs), unit="run") as bar:
        for record in run_all(jobs, options.jobs):
            records.append(record)
            shown = f"{record['title']}, {record['method_name']}, seed {record['seed']}"
            bar.set_postfix_str(f"{shown}: {100 * record['last']['top1']:.1f} %")
            bar.update()
    records.sort(key=lambda r: (r["experiment"], r["method"], r["seed"]))
    write_results(records, options.out / RESULTS)
    table, comparison = summary_table(records), paired_differences(records)
    command = f"python -m iada demo --seeds {options.seeds}"
    page = write_page(records, options.out, None, "IADA on digits", command, comparison)
    over = "one seed" if options.seeds == 1 else f"mean ± std over {options.seeds} seeds"
    print(f"\nTest accuracy (%), {over}\n\n{table}\n")
    print("\n\n".join([*comparison, f"Report: {page}"]))
    return 0


def all_jobs(seeds: int) -> list[Job]:
    """Every method of every row; the longest first, so that no process waits for a late one."""
    rows = [(name, entry.key) for name in ROWS for entry in recipes.load(name).methods]
    jobs = [Job(*row, seed) for row in rows for seed in range(seeds)]
    return sorted(jobs, key=lambda job: job.method not in WITH_META_STEP)


def run_all(jobs: Sequence[Job], processes: int | None = None) -> Iterator[Record]:
    """The records of the jobs as they come, each run on one thread; None: a process a core."""
    processes = processes or os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="iada-demo-") as folder:
        if processes == 1:
            threads = torch.get_num_threads()
            for job in jobs:
                yield run_one(job, Path(folder))
            torch.set_num_threads(threads)
            return
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
            futures = [pool.submit(run_one, job, Path(folder)) for job in jobs]
            try:
                for future in concurrent.futures.as_completed(futures):
                    yield future.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)


def run_one(job: Job, folder: Path) -> Record:
    """One run on the CPU and on one thread, so that its figures follow from the seed."""
    torch.set_num_threads(1)
    recipe = recipes.load(job.recipe)
    entry = next(entry for entry in recipe.methods if entry.key == job.method)
    split = make_split(recipe, read_parts(recipe, None, Limits()), job.seed)
    folder = folder.joinpath(*map(str, job))
    options = RunOptions(folder, torch.device("cpu"), evaluate_every=EVALUATE_EVERY)
    return run(plan(recipe, entry, job.seed, split, Limits(), options))


def write_results(records: Sequence[Record], path: Path) -> None:
    """The records without DETAILS, a line each."""
    kept = [{name: r[name] for name in r if name not in DETAILS} for r in records]
    lines = map(json.dumps, kept)
    write_text(path, "[\n" + ",\n".join(lines) + "\n]\n")


def summary_table(records: Sequence[Record]) -> str:
    """Methods by rows in Markdown: mean ± std of test accuracy, the best of each row in bold."""
    groups = by_experiment(records)
    titles = {name: group[0]["title"] for name, group in groups.items()}
    variants = {name: variants_of(group) for name, group in groups.items()}
    return overview_table(titles, variants, decimals=1).markdown()


def paired_differences(records: Sequence[Record]) -> list[str]:
    """A sentence a row: Meta-IADA less each other method, seed by seed, with 95 % intervals."""
    sentences = []
    for group in by_experiment(records).values():
        variants = variants_of(group)
        ours = next((variant for variant in variants if variant.method == OURS), None)
        others = [variant for variant in variants if variant.method != OURS]
        if ours is None or not others:
            continue
        gaps = [f"{_difference(ours, other)} against {other.label}" for other in others]
        title = group[0]["title"]
        sentences.append(f"{title[0].upper()}{title[1:]}: Meta-IADA {', '.join(gaps)}.")
    if sentences and len({record["seed"] for record in records}) > 1:
        sentences[-1] += " (Differences of the same seeds; mean ± margin is the interval of 95 %.)"
    return sentences


def _difference(ours: Variant, other: Variant) -> str:
    gap = paired(ours.records, other.records, "top1")
    return difference("top1", gap and gap._replace(p=None)) or "–"
