"""The harness itself: what it refuses, in which order it times, what rows say, what tables and plots are made of."""

import importlib
import json
import math
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import benchmarks.__main__ as command
from benchmarks import (
    bench_gumbel_noise,
    discover,
    machine,
    memory,
    peers,
    rows,
)
from benchmarks.ceilings import DTYPES, Ceilings
from benchmarks.harness import Benchmark, Case, Cost, Job, Provider, Report, Session, Settings, run
from benchmarks.timing import Clock, interleave, percentile, warm_up

CPU = torch.device("cpu")
BEYOND_TORCH = ("click", "einops", "ftfy", "matplotlib", "PIL", "pytest_benchmark", "safetensors", "tokenizers", "tqdm")
QUICK = Settings(budget_s=0.0, min_rounds=3)


def provider(name: str, value: float, calls: list[str]) -> Provider:
    def prepare(case: Case, inputs: object, device: torch.device) -> Job:
        return Job(result=lambda: value, pieces={"whole": lambda: calls.append(name)})

    return Provider(name, prepare)


def benchmark_of(*providers: Provider) -> Benchmark:
    return Benchmark(
        op="answer",
        mode="forward",
        cases=(Case("real", {"n": 3}), Case("toy", {"n": 1}, toy=True)),
        providers=providers,
        inputs=lambda case, device: None,
        expected=lambda case, inputs: 42.0,
        check=lambda case, got, expected: None if got == expected else f"must be {expected}, got {got}.",
        cost=lambda case: Cost(read_bytes=4096, write_bytes=4096, flops=10**6, items=2, unit="answers"),
        baseline="slow",
    )


def measured(bench: Benchmark, settings: Settings = QUICK) -> Report:
    session = replace(Session.begin(CPU), ceilings=Ceilings(CPU, toy=True))
    found = Report()
    for one in run(bench, settings, session):
        found.extend(one)
    return found


# ------------------------------------------------------------------------------------------------ verification


def test_wrong_result_is_refused_and_not_timed() -> None:
    calls: list[str] = []
    found = measured(benchmark_of(provider("slow", 42.0, calls), provider("wrong", 41.0, calls)))
    assert found.refused == {"answer real wrong": "must be 42.0, got 41.0."}
    assert [row["impl"] for row in found.rows] == ["slow"]
    assert "wrong" not in calls


def test_command_fails_when_a_provider_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = benchmark_of(provider("slow", 42.0, []), provider("wrong", 41.0, []))
    monkeypatch.setattr(command, "discover", lambda absent: {"answer": bench})
    assert command.main(["--smoke", "--out", str(tmp_path)]) == 1
    assert "REFUSED: answer toy wrong: must be 42.0, got 41.0." in capsys.readouterr().out


def test_missing_provider_is_absent_with_its_reason() -> None:
    away = replace(provider("away", 42.0, []), missing=lambda case, device: "needs a moon.")
    found = measured(benchmark_of(provider("slow", 42.0, []), away))
    assert found.absent == {"answer real away": "needs a moon."}
    assert not found.refused


@pytest.mark.parametrize("settings", [replace(QUICK, cases=("huge",)), replace(QUICK, providers=("huge",))])
def test_unknown_case_or_provider_is_an_error(settings: Settings) -> None:
    with pytest.raises(ValueError, match=r"must be one of .*, got 'huge'"):
        measured(benchmark_of(provider("slow", 42.0, [])), settings)


def test_gumbel_check_refuses_three_ulp_and_nan() -> None:
    case = bench_gumbel_noise.CASES[-1]
    expected = bench_gumbel_noise._expected(case, bench_gumbel_noise._inputs(case, CPU))
    right = expected.float()
    assert bench_gumbel_noise._check(case, right, expected) is None
    for wrong in (torch.full((), math.nan), right[2, 5] * (1 + 6 * torch.finfo(torch.float32).eps)):
        broken = right.clone()
        broken[2, 5] = wrong
        assert "ulp" in str(bench_gumbel_noise._check(case, broken, expected))


def test_gumbel_distribution_check_refuses_another_distribution() -> None:
    case = bench_gumbel_noise.CASES[0]
    torch.manual_seed(0)
    drawn = bench_gumbel_noise._by_uniform((1, 8192), CPU)
    assert bench_gumbel_noise._check_distribution(case, drawn, drawn) is None
    assert "Gumbel" in str(bench_gumbel_noise._check_distribution(case, drawn * 1.2, drawn))


# ------------------------------------------------------------------------------------------------ the original


def test_absent_original_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "PACKAGES", ("no-such-package",))
    reason = peers.missing()
    assert reason is not None and "no-such-package" in reason and "pip install" in reason
    with pytest.raises(RuntimeError, match="pip install"):
        peers.original.__wrapped__()


def test_stubs_are_gone_after_the_import() -> None:
    with peers._stubbed(("no_such_package", "no_such_package.part", "json")):
        from no_such_package.part import Anything

        assert isinstance(Anything, type)
        assert sys.modules["json"] is json
    assert "no_such_package" not in sys.modules
    assert "no_such_package.part" not in sys.modules


# ------------------------------------------------------------------------------------------------ timing


def test_rounds_interleave_and_rotate() -> None:
    calls: list[str] = []
    jobs = {name: {"whole": lambda name=name: calls.append(name)} for name in "abc"}
    samples = interleave(jobs, Clock(CPU, cold=False), budget_s=0.0, min_rounds=3, max_rounds=9)
    assert "".join(calls) == "abc" + "bca" + "cab"
    assert {name: len(rounds) for name, rounds in samples.items()} == {"a": 3, "b": 3, "c": 3}


def test_rounds_go_on_until_the_budget_or_the_limit() -> None:
    jobs = {"a": {"whole": lambda: None}}
    assert len(interleave(jobs, Clock(CPU, cold=False), budget_s=60.0, min_rounds=1, max_rounds=7)["a"]) == 7


def test_budget_is_the_benchmarks_unless_a_run_is_given_another() -> None:
    bench = replace(benchmark_of(provider("slow", 42.0, [])), budget_s=0.0)
    assert measured(bench, Settings(min_rounds=2)).rows[0]["rounds"] == 2
    assert measured(bench, Settings(min_rounds=2, max_rounds=9, budget_s=60.0)).rows[0]["rounds"] == 9


def test_cold_clock_flushes_before_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.timing.last_level_cache_bytes", lambda device: 4096)
    order: list[str] = []
    for cold in (True, False):
        clock = Clock(CPU, cold=cold)
        flush = clock.flush
        before = None if clock._flush_buffer is None else clock._flush_buffer.sum().item()
        monkeypatch.setattr(clock, "flush", lambda flush=flush: (order.append("flush"), flush()))
        assert clock.seconds(lambda: order.append("call")) >= 0
        assert (clock._flush_buffer is not None) == cold
        if clock._flush_buffer is not None:
            assert clock._flush_buffer.numel() * 4 >= 4096
            assert clock._flush_buffer.sum().item() != before
    assert order == ["flush", "call"] * 2


def test_warm_up_is_by_time() -> None:
    calls: list[int] = []
    assert warm_up(lambda: calls.append(1), 0.02) >= 0.02
    assert calls
    assert warm_up(lambda: calls.clear(), 0.0) < 0.02
    assert calls


def test_percentiles() -> None:
    assert [percentile([5.0, 1.0, 3.0, 2.0, 4.0, 6.0], share) for share in (0.2, 0.5, 0.8)] == [2.0, 3.5, 5.0]


def test_combined_pieces_are_combined_round_by_round() -> None:
    def prepare(case: Case, inputs: object, device: torch.device) -> Job:
        pieces = {"one": lambda: None, "two": lambda: None}
        return Job(lambda: 42.0, pieces, combine=lambda s: 1000 + s["one"] + s["two"], extrapolated="from two")

    row = measured(benchmark_of(Provider("slow", prepare))).rows[0]
    assert 1000 < row["values"]["median"]["value"] < 1001
    assert set(row["pieces"]) == {"one", "two"}
    assert (row["extrapolated"], row["rounds"]) == ("from two", 3)


def test_ceilings_are_positive_and_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ceilings = Ceilings(CPU, toy=True)
    first = [ceilings.stream_read(), ceilings.stream_write(), *map(ceilings.matrix_product, DTYPES.values())]
    assert all(0 < rate < math.inf for rate in first)
    monkeypatch.setattr(ceilings, "_seconds", lambda call: pytest.fail("measured twice"))
    assert first == [ceilings.stream_read(), ceilings.stream_write(), *map(ceilings.matrix_product, DTYPES.values())]


def test_peak_memory_sees_what_was_allocated_and_freed() -> None:
    n_bytes = 64 * 2**20
    peak = memory.peak_bytes(lambda: torch.ones(n_bytes // 4).sum(), CPU)
    if peak is None:
        pytest.skip("this system does not report peak memory (needs Linux, glibc and a writable clear_refs)")
    # the kernel counts pages in batches, one a core and kind
    assert n_bytes - 2**20 <= peak < 1.5 * n_bytes


# ------------------------------------------------------------------------------------------------ rows and reports


def test_row_has_every_key_and_its_numbers() -> None:
    row = measured(benchmark_of(provider("slow", 42.0, []))).rows[0]
    assert set(row) == set(rows.KEYS)
    units = {name: value["unit"] for name, value in row["values"].items()}
    assert units == {
        "median": "s", "p20": "s", "p80": "s", "bandwidth": "GB/s", "throughput": "TFLOP/s", "rate": "answers/s",
        "of_ceiling": "%", "peak": "B",
    }  # fmt: skip
    assert row["values"]["p20"]["value"] <= row["values"]["median"]["value"] <= row["values"]["p80"]["value"]
    assert set(row["ceilings"]) == {"stream_read", "stream_write", "matrix_product"}
    assert row["device"]["kind"] == "cpu" and row["device"]["cores"] >= 1
    assert row["versions"]["torch"] == torch.__version__
    assert row["time"].endswith("Z")


def test_share_of_the_ceiling_is_floor_over_time() -> None:
    row = measured(benchmark_of(provider("slow", 42.0, []))).rows[0]
    rate = {kind: ceiling["value"] for kind, ceiling in row["ceilings"].items()}
    moving = 4096e-9 / rate["stream_read"] + 4096e-9 / rate["stream_write"]
    floor = max(moving, 1e6 * 1e-12 / rate["matrix_product"])
    values = row["values"]
    assert values["of_ceiling"]["value"] == pytest.approx(100 * floor / values["median"]["value"], rel=1e-12)


def test_rows_name_no_host_and_no_path() -> None:
    text = json.dumps(measured(benchmark_of(provider("slow", 42.0, []))).rows[0])
    assert str(machine.ROOT) not in text
    assert str(Path.home()) not in text
    assert f'"{socket.gethostname()}' not in text


def test_rows_survive_a_file(tmp_path: Path) -> None:
    found = measured(benchmark_of(provider("slow", 42.0, []), provider("fast", 42.0, []))).rows
    rows.append(tmp_path / "new" / "answer.jsonl", found)
    assert rows.load(tmp_path / "new") == found == rows.load(tmp_path / "new" / "answer.jsonl")


def test_bad_rows_are_named(tmp_path: Path) -> None:
    row = measured(benchmark_of(provider("slow", 42.0, []))).rows[0]
    with pytest.raises(ValueError, match="commit"):
        rows.append(tmp_path / "a.jsonl", [{key: value for key, value in row.items() if key != "commit"}])
    for line, message in (('{"run": 1}', "a.jsonl:1 must have the keys"), ("half", "a.jsonl:1 must be a JSON line")):
        (tmp_path / "a.jsonl").write_text(line)
        with pytest.raises(ValueError, match=message):
            rows.load(tmp_path)


# ------------------------------------------------------------------------------------------------ the command


def test_smoke_verifies_everything_and_reports_no_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = command.main(["--smoke", "--out", str(tmp_path)])
    output = capsys.readouterr().out
    assert status == 0, output
    for op in discover():
        assert f"### {op} toy" in output
    assert output.count("verified, not timed") >= 5  # without extension and peers
    assert not any(unit in output for unit in (" ms", "GB/s", "TFLOP/s", "tokens/s"))
    assert list(tmp_path.iterdir()) == []


def test_command_appends_rows_and_draws_them_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "discover", lambda absent: {"answer": benchmark_of(provider("slow", 42.0, []))})
    monkeypatch.setattr(
        Session, "begin", lambda device, smoke: Session(device, "now", None, None, None, Ceilings(device, toy=True))
    )
    assert command.main(["--out", str(tmp_path), "--budget", "0", "--rounds", "2"]) == 0
    row = json.loads((tmp_path / "answer.jsonl").read_text())
    assert (row["impl"], row["rounds"], row["smoke"]) == ("slow", 2, False)
    first = capsys.readouterr().out
    assert command.main(["table", "--rows", str(tmp_path), "--only", "answer"]) == 0
    assert capsys.readouterr().out.strip() in first
    assert command.main(["table", "--rows", str(tmp_path), "--only", "question"]) == 0
    assert "No rows yet" in capsys.readouterr().out


def test_command_leaves_out_what_it_has_no_time_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "discover", lambda absent: {"answer": benchmark_of(provider("slow", 42.0, []))})
    assert command.main(["--out", str(tmp_path), "--within", "0"]) == 0
    assert "no time was left for 1 cases: answer real" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_no_gpu_is_said_in_words(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--smoke", "--device", "cuda"]) == 2
    assert "sees no GPU" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "chess"], "--only must be one of"),
        (["--case", "toy"], "give it with one --only"),
        (["--only", "sampler", "--case", "huge"], "case must be one of d512"),
        (["--device", "abacus"], "--device must name a device"),
        (["--device", "meta"], "--device must be cpu or cuda"),
        (["table", "--rows", "nowhere"], "--rows must be a .jsonl file or a folder"),
    ],
)
def test_command_says_what_is_wrong(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_package_that_is_missing_costs_only_the_benchmarks_that_need_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = importlib.import_module

    def without_letters(name: str, package: str | None = None) -> object:
        if name == "benchmarks.bench_sampler":
            raise ModuleNotFoundError("No module named 'letters.big'", name="letters.big")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without_letters)
    absent: dict[str, str] = {}
    assert set(discover(absent)) >= {"gumbel_noise", "sparse_attention"}
    assert absent == {"sampler": "needs letters, which is not installed."}
    assert command.main(["--smoke", "--only", "sampler", "--only", "gumbel_noise", "--impl", "reference"]) == 2
    assert command.main(["--smoke", "--only", "sampler", "--only", "gumbel_noise"]) == 0
    output = capsys.readouterr().out
    assert "absent: sampler: needs letters, which is not installed." in output
    assert "### gumbel_noise toy" in output


def test_measuring_needs_no_package_but_torch() -> None:
    """`make gpu` runs on a Python with torch, triton and pytest."""
    block = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name.partition('.')[0] in {BEYOND_TORCH}:\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import benchmarks.__main__, benchmarks\n"
        "print(*benchmarks.discover())\n"
    )
    done = subprocess.run([sys.executable, "-c", block], cwd=machine.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {"gumbel_noise", "sparse_attention"} <= set(done.stdout.split())
