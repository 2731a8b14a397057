"""Jobs: what is computed in any order, by as many processes as there are cores; nothing in it is timed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


class Job(NamedTuple):
    """`call(*arguments)`, in a process that other jobs share: what they load is cached there."""

    call: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


def run(jobs: Mapping[str, Job], console: Console) -> dict[str, Any]:
    """The results of all jobs by name; whichever raises ends the run."""
    workers = os.cpu_count() or 1
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    found: dict[str, Any] = {}
    with (
        Progress(*columns, console=console) as progress,
        ProcessPoolExecutor(workers, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        shown = progress.add_task("computing", total=len(jobs))
        futures = {pool.submit(job.call, *job.arguments): name for name, job in jobs.items()}
        try:
            for future in as_completed(futures):
                found[futures[future]] = future.result()
                progress.update(shown, advance=1, description=futures[future])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return found
