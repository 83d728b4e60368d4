"""Contenders of a benchmark, each in a process of its own, so that none meets the memory or the caches of another."""

import importlib.util
import multiprocessing
import os
import resource
import time
from multiprocessing.connection import Connection
from typing import Any, Literal

import torch
from benchmark_data import PIPELINES
from benchmark_peers import CONTENDERS, Case, Run
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

Precision = Literal["float32", "bf16"]
NEEDS = {"timm": "timm", "hugging_face": "transformers"}


class Worker:
    """A contender in a process of its own."""

    def __init__(self, name: str, case: Case, precision: Precision, threads: int) -> None:
        self.name, self.precision, self.threads = name, precision, threads
        os.environ["OMP_NUM_THREADS"] = str(threads)
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, case, precision, threads), daemon=True)
        self._process.start()
        theirs.close()
        self.flops = self._receive()
        self.seconds: list[float] = []

    def run(self) -> None:
        """Do the work once more, and keep how long it took."""
        self._connection.send("run")
        self.seconds.append(self._receive())

    def peak(self) -> float:
        """MiB: resident memory of the process on a CPU, allocated memory on a GPU."""
        self._connection.send("peak")
        return float(self._receive())

    def kernels(self) -> dict[str, float]:
        """What one more run spent its time on: operators on a CPU, kernels on a GPU, with their shares, most first."""
        self._connection.send("kernels")
        shares: dict[str, float] = self._receive()
        return shares

    def close(self) -> None:
        """End the process."""
        self._connection.send("stop")
        self._process.join()

    def _receive(self) -> Any:
        answer = self._connection.recv()
        if isinstance(answer, str):
            raise RuntimeError(f"{self.name}: {answer}")
        return answer


def is_installed(name: str) -> bool:
    """Whether the library of a contender is there; says so if it is not."""
    module = NEEDS.get(name)
    found = module is None or importlib.util.find_spec(module) is not None
    if not found:
        print(f"{name} is left out: {module} is not installed", flush=True)
    return found


def _serve(connection: Connection, name: str, case: Case, precision: Precision, threads: int) -> None:
    try:
        torch.set_num_threads(threads)
        torch.manual_seed(0)
        contenders = {**CONTENDERS, **PIPELINES}
        work = _matmul(case.device, precision) if name == "matmul" else contenders[name](case)

        def run() -> float:
            start = time.perf_counter()
            with torch.autocast(case.device, torch.bfloat16, enabled=precision == "bf16"):
                work()
            if case.device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - start

        with FlopCounterMode(display=False) as counter:
            run()
        run()
        connection.send(counter.get_total_flops())
        while (order := connection.recv()) != "stop":
            if order == "run":
                connection.send(run())
            else:
                connection.send(_peak(case.device) if order == "peak" else _kernels(run, case.device))
    except Exception as error:  # the parent tells it
        connection.send(f"{type(error).__name__}: {error}")


def _matmul(device: str, precision: Precision) -> Run:
    """A large product of matrices in the dtype itself: the machine's limit."""
    matrix = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    return lambda: matrix @ matrix


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
