"""Contenders of a benchmark, each in a process of its own, so that none meets the memory or the caches of another."""

import contextlib
import importlib.util
import multiprocessing
import os
import resource
import time
from collections.abc import Callable, Container
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
from data import PIPELINES
from engines import ENGINES
from peers import CONTENDERS, Case, Run
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

Precision = Literal["float32", "bf16", "int8"]
WARM_UP_SECONDS = 2
NEEDS = {
    "timm": ("timm",),
    "hugging_face": ("transformers",),
    "onnxruntime": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino", "nncf"),
}


class Worker:
    """A contender in a process of its own, which starts in the background."""

    def __init__(self, name: str, precision: Precision, case: Case, threads: int) -> None:
        self.name = name
        self._begun = False
        os.environ["OMP_NUM_THREADS"] = str(threads)
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, case, precision, threads), daemon=True)
        self._process.start()
        theirs.close()

    def run(self) -> float:
        """Seconds that the work takes once more."""
        return float(self._ask("run"))

    def begin(self) -> None:
        """Let the work be done once without waiting for it; `warm_up` waits."""
        self._connection.send("run")
        self._begun = True

    def warm_up(self) -> None:
        """Do the work for two seconds, at least once."""
        if self._begun:
            self._answer()
        seconds = self.run()
        while seconds < WARM_UP_SECONDS:
            seconds += self.run()

    def flops(self) -> float:
        """Floating-point operations of the work."""
        return float(self._ask("flops"))

    def peak(self) -> float:
        """MiB: resident memory of the process on a CPU, allocated memory on a GPU."""
        return float(self._ask("peak"))

    def kernels(self) -> dict[str, float]:
        """What one more run spent its time on: operators on a CPU, kernels on a GPU, with their shares, most first."""
        shares: dict[str, float] = self._ask("kernels")
        return shares

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            self._connection.send("stop")
        self._process.join()

    def _ask(self, order: str) -> Any:
        with contextlib.suppress(BrokenPipeError):  # it has failed already, and said why
            self._connection.send(order)
        return self._answer()

    def _answer(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            raise RuntimeError(
                f"{self.name}: its process ended with code {code}; -9 is often a lack of memory"
            ) from None
        if isinstance(answer, Exception):
            raise RuntimeError(f"{self.name}: {answer}")
        return answer


def lacking(contenders: Container[str]) -> dict[str, str]:
    """The contenders of which a library is not installed, with its name."""
    needed = {name: module for name, modules in NEEDS.items() for module in modules if name in contenders}
    return {name: module for name, module in needed.items() if importlib.util.find_spec(module) is None}


def _serve(connection: Connection, name: str, case: Case, precision: Precision, threads: int) -> None:
    try:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        contenders = {**CONTENDERS, **PIPELINES}
        if name == "matmul":
            work = _matmul(case.device, precision)
        else:
            work = ENGINES[name](case, precision) if name in ENGINES else contenders[name](case)

        def run() -> float:
            start = time.perf_counter()
            with torch.autocast(case.device, torch.bfloat16, enabled=precision == "bf16"):
                work()
            if case.device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start

        answers: dict[str, Callable[[], object]] = {
            "run": run,
            "flops": lambda: _flops(run),
            "peak": lambda: _peak(case.device),
            "kernels": lambda: _kernels(run, case.device),
        }
        while (order := connection.recv()) != "stop":
            connection.send(answers[order]())
    except Exception as error:  # the parent tells it
        connection.send(RuntimeError(f"{type(error).__name__}: {error}"))


def _matmul(device: str, precision: Precision) -> Run:
    """A large product of matrices in the dtype itself: the machine's limit."""
    matrix = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return lambda: matrix @ matrix


def _flops(run: Run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def _peak(device: str) -> float:
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def _kernels(run: Run, device: str) -> dict[str, float]:
    profiler: Any = profile()
    with profiler:
        run()
    clock = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    events = [event for event in profiler.key_averages() if event.device_type.name.lower() == device]
    times = {event.key: getattr(event, clock) for event in events}
    total = sum(times.values())
    return {name: taken / total for name, taken in sorted(times.items(), key=lambda item: -item[1])}
