"""
Do the promises hold on a GPU? Runs the core tests with their tensors on CUDA, and tests/test_gpu.py.

    python -m benchmarks.gpu_check --output gpu-check.json      # make gpu-check
    python -m benchmarks.gpu_check --output gpu-check.json      # again: what has not passed yet

The file is written after each test, so that whatever ends a run loses nothing. This module is also the plugin of
pytest that writes it.
"""

import argparse
import importlib.util
import json
import os
import platform
import re
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers


ROOT = Path(__file__).parents[1]
LINES_OF_A_FAILURE = 30


def machine(device: str) -> dict:
    return {
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def read_results(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {"runs": [], "tests": {}}


def pytest_addoption(parser) -> None:
    parser.addoption("--results", type=Path, help="the JSON file")
    parser.addoption("--run-number", type=int, help="tests that have passed in earlier runs are left out")
    parser.addoption("--deadline", type=float, help="seconds of the epoch, after which no test starts")


def pytest_configure(config) -> None:
    # Not in the processes of pytest-xdist, whose reports come to the first.
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Recorder(config.getoption("results"), config.getoption("run_number")))


def pytest_collection_modifyitems(config, items) -> None:
    tests, run = read_results(config.getoption("results"))["tests"], config.getoption("run_number")

    def is_left(item) -> bool:
        result = tests.get(item.nodeid, {"outcome": None})
        has_passed = result["outcome"] == "passed" and result["run"] < run
        return not has_passed and (item.path.name == "test_gpu.py" or item.get_closest_marker("core") is not None)

    config.hook.pytest_deselected(items=[item for item in items if not is_left(item)])
    # First what may take a minute.
    items[:] = sorted(filter(is_left, items), key=lambda item: re.search("compiled|graphs|flex", item.name) is None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item) -> bool | None:
    return True if time.time() > item.config.getoption("deadline") else None


class Recorder:
    """Writes what became of each test."""

    def __init__(self, path: Path, run: int):
        self.path, self.run = path, run
        self.results = read_results(path)

    def write(self) -> None:
        # Whole or not at all.
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.results, indent=1) + "\n")
        temporary.replace(self.path)

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self.record(report.nodeid, "failed", 0.0, str(report.longrepr))

    def pytest_runtest_logreport(self, report) -> None:
        if report.when == "call" or not report.passed:
            outcome = "xfailed" if report.skipped and hasattr(report, "wasxfail") else report.outcome
            # What pytest-xdist says of those that have passed is which process ran them.
            message = "" if report.passed else report.longreprtext
            if isinstance(report.longrepr, tuple):
                message = report.longrepr[2]
            self.record(report.nodeid, outcome, report.duration, message)

    def record(self, test: str, outcome: str, seconds: float, message: str) -> None:
        result = {"outcome": outcome, "seconds": round(seconds, 2), "run": self.run}
        if message:
            result["message"] = "\n".join(message.splitlines()[-LINES_OF_A_FAILURE:])
        self.results["tests"][test] = result
        self.write()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="the JSON file, new or of an earlier run")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--workers", type=int, default=12, help="processes, which share the device")
    parser.add_argument("--limit-seconds", type=float, default=420, help="after which no test starts")
    parser.add_argument("-k", default="", help="as of pytest: which tests")
    options = parser.parse_args(arguments)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("This machine has no GPU that PyTorch can use. To see whether the tests run: --device cpu")

    start, output = time.time(), options.output.resolve()
    recorder = Recorder(output, 0)
    recorder.results["runs"].append(machine(options.device))
    recorder.write()
    tests = ROOT / "tests"
    core = [str(file) for file in sorted(tests.glob("test_*.py")) if re.search(r"mark\.core", file.read_text())]
    plugin = ["-c", str(ROOT / "pyproject.toml"), "-p", "benchmarks.gpu_check", f"--device={options.device}"]
    # With "=": pytest looks for its settings where paths among the arguments lead.
    plugin += [f"--results={output}", f"--run-number={len(recorder.results['runs'])}"]
    plugin += [f"--deadline={start + options.limit_seconds}"]
    # One test at a time to each process: some compile for a minute.
    command = ["-n", str(options.workers), "--maxschedchunk=1", "-k", options.k, "-q", "-rfE", "--tb=short"]
    command += ["--hypothesis-profile=core", str(tests / "test_gpu.py"), *core]
    if importlib.util.find_spec("pytest_timeout") is not None:
        command.append("--timeout=200")
    # As many processes compile already.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    code = pytest.main([*plugin, *command])

    results = read_results(output)
    outcomes = [result["outcome"] for result in results["tests"].values()]
    results["runs"][-1] |= {"seconds": round(time.time() - start, 1), "exit_code": int(code)}
    recorder.results = results
    recorder.write()
    print(", ".join(f"{outcomes.count(outcome)} {outcome}" for outcome in sorted({*outcomes})), "in", output)
    return int(code)


if __name__ == "__main__":
    sys.exit(main())
