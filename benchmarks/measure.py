"""How the benchmarks measure: like with like in one process, interleaved, medians and spread, as Markdown tables."""

import argparse
import gc
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def conditions(dtype: str = "float32") -> str:
    """One line: the machine, the threads and the versions that every figure depends on."""
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else cpu_name()
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers"))
    threads = torch.get_num_threads()
    return (
        f"{name}, {threads} of {os.cpu_count()} cores' threads, {dtype}, {versions}, Python {platform.python_version()}"
    )


def cpu_name() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.processor()


def time_interleaved(
    calls: dict[str, Callable[[], object]],
    runs: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
    at_least_s: float = 0.0,
) -> dict[str, list[float]]:
    """Seconds of each call, `runs` times in turn, so that whatever disturbs the machine disturbs all alike.

    More rounds follow until `at_least_s` are over: short calls need more of them to tell a ratio. Every second round
    goes backwards: no call always has the one before it to thank for a warm cache. With `time.process_time` as the
    `clock`, the seconds are those of the CPU, which others' work lengthens less.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in [*calls.values()] * warm_up:
        call()
    gc.collect()
    gc.disable()
    run, began = 0, clock()
    while run < runs or clock() - began < at_least_s:
        order = list(calls.items())
        for name, call in reversed(order) if run % 2 else order:
            synchronize()
            start = clock()
            call()
            synchronize()
            seconds[name].append(clock() - start)
        run += 1
    gc.enable()
    return seconds


def add_clock_option(parser: argparse.ArgumentParser) -> None:
    """`--cpu_time`, which makes `clock` of the arguments that of this process; by default it is the one on the wall."""
    parser.add_argument(
        "--cpu_time",
        dest="clock",
        action="store_const",
        const=time.process_time,
        default=time.perf_counter,
        help="measure the time of this process on the processor, not that on the wall",
    )


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def ratio(seconds: dict[str, list[float]], name: str, against: str) -> str:
    """The median over the rounds of one call's time relative to another's, with the quartiles of these, if several."""
    ratios = [mine / its for mine, its in zip(seconds[name], seconds[against], strict=True)]
    if len(ratios) == 1:
        return f"{ratios[0]:.2f}"
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{middle:.2f} ({low:.2f}–{high:.2f})"


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A Markdown table, each row printed as soon as it is measured."""
    print("| " + " | ".join(header) + " |")
    print("| " + " | ".join("---:" for _ in header) + " |")
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
    print()
