"""The harness: a benchmark declares, this verifies, times and writes rows.

A benchmark is data: cases (sizes), providers (implementations and peers), what the right result is, and what a case
costs in bytes and FLOPs. `run` does the rest in this order, for each case:

1. make the inputs, let the oracle compute what is expected;
2. every provider that can run here computes its result; one that is wrong is refused: it gets no time and the run ends
   with an error, whatever the others do;
3. peak memory of a first call, warm up by time, then all timed in interleaved rounds (ops cold, decoding warm);
4. ceilings of the machine at the case's working set; one row a provider.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from fnmatch import fnmatch
from typing import Any

import torch

from benchmarks import machine
from benchmarks.ceilings import Ceilings
from benchmarks.memory import peak_bytes
from benchmarks.rows import Row
from benchmarks.timing import Clock, interleave, median, percentile, warm_up

log = logging.getLogger("benchmarks")
WARM_UP_SHARE = 1 / 40  # of a case's budget, for each piece of a provider


@dataclass(frozen=True)
class Case:
    """One size of a benchmark; a toy case is for `--smoke` and tests and is never timed.

    Attributes:
        mode: what is done, where a benchmark does several things; None: the benchmark's own mode.
        device: the kind of device it is measured on; None: any.
    """

    name: str
    sizes: Mapping[str, Any]
    dtype: torch.dtype = torch.float32
    toy: bool = False
    mode: str | None = None
    device: str | None = None

    @property
    def label(self) -> str:
        """The name, with mode and dtype where a benchmark has cases of one name that differ in them."""
        return self.name if self.mode is None else f"{self.name} {self.mode} {dtype_name(self.dtype)}"


@dataclass(frozen=True)
class Cost:
    """What the work of a case needs at least, whoever does it.

    working_set: bytes gone through again and again (decoding); None: inputs come from memory (a cold op).
    items, unit: what a user counts, for a rate (32 images).
    steps: how many equal steps the work goes through one after the other, for the time of one; 0: nobody asks.
    result_bytes: what a call returns, for the peak in multiples of it and beyond it; 0: nobody asks.
    """

    read_bytes: int = 0
    write_bytes: int = 0
    flops: int = 0
    working_set: int | None = None
    items: int = 0
    unit: str = ""
    steps: int = 0
    result_bytes: int = 0


@dataclass(frozen=True)
class Job:
    """One provider, ready to run one case.

    Attributes:
        result: computes what is compared with the oracle.
        pieces: what is timed, by name; one piece is the whole job.
        combine: {piece: seconds of one round} -> seconds of the whole; default the sum.
        extrapolated: in words, what the whole was computed from when the pieces are only samples of it.
        measure_memory: whether the peak of all pieces stands for the whole job.
    """

    result: Callable[[], Any]
    pieces: Mapping[str, Callable[[], object]]
    combine: Callable[[Mapping[str, float]], float] = field(default=lambda pieces: sum(pieces.values()))
    extrapolated: str | None = None
    measure_memory: bool = True


def _always_runs(case: Case, device: torch.device) -> str | None:
    return None


@dataclass(frozen=True)
class Provider:
    """An implementation or a peer.

    Attributes:
        prepare: (case, inputs, device) -> Job.
        missing: (case, device) -> None, or in words why it cannot run here.
        check: replaces the benchmark's check where a provider owes something else than the oracle's numbers.
        packages: distributions whose versions its rows name.
        cost: replaces the benchmark's where a provider needs less (weights of fewer bits).
    """

    name: str
    prepare: Callable[[Case, Any, torch.device], Job]
    missing: Callable[[Case, torch.device], str | None] = _always_runs
    check: Callable[[Case, Any, Any], str | None] | None = None
    packages: tuple[str, ...] = ()
    cost: Callable[[Case], Cost] | None = None


@dataclass(frozen=True)
class Benchmark:
    """What `run` needs to know of an op or a job.

    Attributes:
        inputs: (case, device) -> inputs, the same for every provider.
        expected: (case, inputs) -> what the oracle says.
        check: (case, got, expected) -> None, or in words what is wrong.
        cost: case -> Cost.   cold: flush the caches before each call.   baseline: the provider ratios refer to.
        budget_s: seconds of timing a case, unless a run is given others.
    """

    op: str
    mode: str
    cases: tuple[Case, ...]
    providers: tuple[Provider, ...]
    inputs: Callable[[Case, torch.device], Any]
    expected: Callable[[Case, Any], Any]
    check: Callable[[Case, Any, Any], str | None]
    cost: Callable[[Case], Cost]
    baseline: str
    cold: bool = True
    budget_s: float = 20.0


@dataclass(frozen=True)
class Settings:
    """How long and what to measure; `smoke` takes the toy cases, verifies, runs everything once, reports no speed."""

    smoke: bool = False
    budget_s: float | None = None  # of timing a case; None: the benchmark's own
    min_rounds: int = 5
    max_rounds: int = 200
    cases: tuple[str, ...] = ()  # names, * for any letters; empty: all
    providers: tuple[str, ...] = ()
    ends: float | None = None  # of time.monotonic: no case begins after it


@dataclass(frozen=True)
class Session:
    """What all rows of one run share: when it began, where, at which commit, under what load."""

    device: torch.device
    run: str
    commit: str | None
    dirty: bool | None
    load: float | None
    ceilings: Ceilings

    @classmethod
    def begin(cls, device: torch.device, *, smoke: bool = False) -> Session:
        commit, dirty = machine.commit()
        return cls(device, utc_now(), commit, dirty, machine.load_average(), Ceilings(device, toy=smoke))


@dataclass
class Report:
    """What came out: rows, providers refused (label: why) and absent (likewise), cases for which no time was left."""

    rows: list[Row] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    unbegun: list[str] = field(default_factory=list)

    def extend(self, other: Report) -> None:
        self.rows += other.rows
        self.refused |= other.refused
        self.absent |= other.absent
        self.unbegun += other.unbegun


def run(benchmark: Benchmark, settings: Settings, session: Session) -> Iterator[Report]:
    """Verifies and measures every wanted case of `benchmark`; yields a report a case, to be stored as it comes.

    Raises: ValueError (a case or provider asked for that the benchmark does not declare).
    """
    _require_known("case", settings.cases, [case.name for case in benchmark.cases])
    _require_known("provider", settings.providers, [provider.name for provider in benchmark.providers])
    for case in benchmark.cases:
        if not _wanted(case, settings, session.device):
            continue
        if settings.ends is not None and time.monotonic() >= settings.ends:
            yield Report(unbegun=[f"{benchmark.op} {case.label}"])
            continue
        log.info("%s %s: verifying", benchmark.op, case.label)
        yield _run_case(benchmark, case, settings, session)


def _wanted(case: Case, settings: Settings, device: torch.device) -> bool:
    named = not settings.cases or any(fnmatch(case.name, pattern) for pattern in settings.cases)
    return named and case.toy == settings.smoke and case.device in (None, device.type)


def verified_jobs(
    benchmark: Benchmark, case: Case, device: torch.device, wanted: tuple[str, ...] = ()
) -> tuple[dict[str, Job], Report]:
    """The jobs whose results the oracle accepts; the report says who was refused or absent, and why."""
    report = Report()
    inputs = benchmark.inputs(case, device)
    expected = benchmark.expected(case, inputs)
    jobs = {}
    for provider in benchmark.providers:
        if wanted and provider.name not in wanted:
            continue
        label = f"{benchmark.op} {case.label} {provider.name}"
        reason = provider.missing(case, device)
        if reason is not None:
            report.absent[label] = reason
            continue
        job = provider.prepare(case, inputs, device)
        complaint = (provider.check or benchmark.check)(case, job.result(), expected)
        if complaint is not None:
            report.refused[label] = complaint
            continue
        jobs[provider.name] = job
    return jobs, report


def _run_case(benchmark: Benchmark, case: Case, settings: Settings, session: Session) -> Report:
    jobs, report = verified_jobs(benchmark, case, session.device, settings.providers)
    calls = {name: job.pieces for name, job in jobs.items()}
    budget_s = benchmark.budget_s if settings.budget_s is None else settings.budget_s
    budget_s = 0.0 if settings.smoke else budget_s
    peaks = {name: _first_calls(job, session.device, WARM_UP_SHARE * budget_s) for name, job in jobs.items()}
    samples = interleave(
        calls,
        Clock(session.device, cold=benchmark.cold),
        budget_s=budget_s,
        min_rounds=1 if settings.smoke else settings.min_rounds,
        max_rounds=1 if settings.smoke else settings.max_rounds,
        on_round=functools.partial(log.info, "%s %s: round %d", benchmark.op, case.label),
    )
    for provider in benchmark.providers:
        if provider.name not in jobs:
            continue
        row = _facts(benchmark, provider, case, settings, session)
        if not settings.smoke:
            cost, peak = (provider.cost or benchmark.cost)(case), peaks[provider.name]
            row |= _numbers(jobs[provider.name], samples[provider.name], cost, case, session.ceilings)
            row["values"]["peak"] = _value(peak, "B")
            if cost.result_bytes and peak is not None:
                row["values"]["peak_of_result"] = _value(peak / cost.result_bytes, "x")
                row["values"]["peak_beyond_result"] = _value(max(peak - cost.result_bytes, 0), "B")
        report.rows.append(row)
    return report


def _first_calls(job: Job, device: torch.device, warm_up_s: float) -> int | None:
    """Warms every piece up, by time; the largest peak of their first calls, bytes (None: unknown, or not the job's)."""
    known = []
    for call in job.pieces.values():
        began = time.perf_counter()
        peak = peak_bytes(call, device)
        if peak is not None:
            known.append(peak)
        warm_up(call, warm_up_s - (time.perf_counter() - began))
    return max(known) if known and job.measure_memory else None


def _facts(benchmark: Benchmark, provider: Provider, case: Case, settings: Settings, session: Session) -> Row:
    return {
        "run": session.run,
        "op": benchmark.op,
        "impl": provider.name,
        "mode": case.mode or benchmark.mode,
        "case": case.name,
        "sizes": dict(case.sizes),
        "dtype": dtype_name(case.dtype),
        "values": {},
        "pieces": {},
        "extrapolated": None,
        "rounds": 0,
        "cold": benchmark.cold,
        "baseline": benchmark.baseline,
        "ceilings": {},
        "smoke": settings.smoke,
        "device": machine.describe_device(session.device),
        "versions": machine.versions(*provider.packages),
        "commit": session.commit,
        "dirty": session.dirty,
        "load": session.load,
        "time": utc_now(),
    }


def _numbers(job: Job, rounds: list[dict[str, float]], cost: Cost, case: Case, ceilings: Ceilings) -> Row:
    """The measured part of a row: percentiles of the whole, rates, share of the ceiling."""
    totals = [job.combine(pieces) for pieces in rounds]
    seconds = median(totals)
    floor, limits = _floor(cost, case, ceilings)
    values = {
        "median": _value(seconds, "s"),
        "p20": _value(percentile(totals, 0.2), "s"),
        "p80": _value(percentile(totals, 0.8), "s"),
    }
    if cost.read_bytes + cost.write_bytes:
        values["bandwidth"] = _value((cost.read_bytes + cost.write_bytes) / seconds / 1e9, "GB/s")
    if cost.flops:
        values["throughput"] = _value(cost.flops / seconds / 1e12, "TFLOP/s")
    if cost.items:
        values["rate"] = _value(cost.items / seconds, f"{cost.unit}/s")
    if cost.steps:
        values["step"] = _value(seconds / cost.steps, "s")
    if floor:
        values["of_ceiling"] = _value(100 * floor / seconds, "%")
    return {
        "values": values,
        "pieces": {piece: median([one[piece] for one in rounds]) for piece in job.pieces},
        "extrapolated": job.extrapolated,
        "rounds": len(rounds),
        "ceilings": limits,
    }


def _floor(cost: Cost, case: Case, ceilings: Ceilings) -> tuple[float, dict[str, dict[str, Any]]]:
    """(seconds the measured ceilings allow for this cost, the ceilings used)."""
    limits: dict[str, dict[str, Any]] = {}
    memory_s = arithmetic_s = 0.0
    at = "memory" if cost.working_set is None else f"{cost.working_set / 1e6:.0f} MB"
    if cost.read_bytes:
        rate = ceilings.stream_read(cost.working_set)
        limits["stream_read"] = _value(rate / 1e9, "GB/s") | {"at": at}
        memory_s += cost.read_bytes / rate
    if cost.write_bytes:
        rate = ceilings.stream_write(cost.working_set)
        limits["stream_write"] = _value(rate / 1e9, "GB/s") | {"at": at}
        memory_s += cost.write_bytes / rate
    if cost.flops:
        rate = ceilings.matrix_product(case.dtype)
        limits["matrix_product"] = _value(rate / 1e12, "TFLOP/s") | {"at": dtype_name(case.dtype)}
        arithmetic_s = cost.flops / rate
    return max(memory_s, arithmetic_s), limits


def utc_now() -> str:
    """The time a row carries, UTC, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def dtype_name(dtype: torch.dtype) -> str:
    """As rows and tables spell it: float32."""
    return str(dtype).removeprefix("torch.")


def _value(value: float | None, unit: str) -> dict[str, Any]:
    return {"value": value, "unit": unit}


def _require_known(kind: str, wanted: tuple[str, ...], known: list[str]) -> None:
    for name in wanted:
        if not any(fnmatch(one, name) for one in known):
            raise ValueError(f"benchmarks: {kind} must be one of {', '.join(dict.fromkeys(known))}, got {name!r}.")
