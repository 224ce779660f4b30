"""An ordered parallel map over worker processes: bounded memory, no process left behind.

Each worker has one pipe of its own. When the parent ends in whatever way, the pipe ends too and the worker
leaves; when a worker dies, the parent notices the end of its pipe. The pools of the standard library promise
neither.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import traceback
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar

from errors import ProjectError

Task = TypeVar("Task")
Result = TypeVar("Result")

# A worker always has a next task waiting; finished results that wait for their turn are bounded by the
# window.
_TASKS_A_WORKER = 2
_WINDOW_A_WORKER = 4
# Loaded once, before the workers part, instead of by every one of them.
_PRELOADED = ["numpy", "cv2", "simplejpeg"]


def default_workers() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def chunked(items: Iterable[Task], size: int) -> Iterator[list[Task]]:
    """Consecutive lists of `size` items; the last may be shorter."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk


def ordered_map(function: Callable[[Task], Result], tasks: Iterable[Task], workers: int) -> Iterator[Result]:
    """Results of `function` for every task, in the order of the tasks; both must pickle.

    One worker means this process. A ProjectError in a worker is raised here; any other exception, and a
    worker that is killed, becomes a ProjectError that names it.
    """
    if workers <= 1:
        yield from map(function, tasks)
        return
    context = _context()
    team = [_Worker(context, function) for _ in range(workers)]
    try:
        yield from _distribute(team, iter(tasks))
    finally:
        for worker in team:
            worker.stop()


def start_early(workers: int) -> None:
    """Begin to load what workers need, beside what the caller does before it has tasks for them."""
    if workers > 1 and _context().get_start_method() == "forkserver":
        from multiprocessing import forkserver

        forkserver.ensure_running()


def _context() -> multiprocessing.context.BaseContext:
    """How processes are started: not by fork, which a caller's threads (OpenCV, MXNet) do not survive."""
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    context.set_forkserver_preload(_PRELOADED)
    return context


class _Worker:
    """One process, its end of the pipe and the numbers of the tasks it has not answered."""

    def __init__(self, context: multiprocessing.context.BaseContext, function: Callable) -> None:
        self.pipe, far_end = context.Pipe()
        self.process = context.Process(target=_serve, args=(far_end, function), daemon=True)
        self.process.start()
        far_end.close()
        self.open_tasks = 0

    def receive(self) -> tuple:
        try:
            return self.pipe.recv()
        except (EOFError, OSError):
            self.process.join(1)
            raise ProjectError(
                f"a worker process ended unexpectedly (exit status {self.process.exitcode}); "
                "if the system killed it for lack of memory, use fewer workers"
            ) from None

    def stop(self) -> None:
        self.pipe.close()
        # A worker notices the closed pipe only when it has finished its task, whose result nobody wants any
        # more.
        if self.open_tasks:
            self.process.terminate()
        self.process.join()


def _distribute(team: list[_Worker], tasks: Iterator) -> Iterator:
    results: dict[int, object] = {}
    sent = done = 0
    more = True
    while more or done < sent:
        for worker in team:
            while more and worker.open_tasks < _TASKS_A_WORKER and sent < done + _WINDOW_A_WORKER * len(team):
                try:
                    task = next(tasks)
                except StopIteration:
                    more = False
                    break
                with contextlib.suppress(OSError):
                    # A worker that has died is reported when its answer is asked for.
                    worker.pipe.send((sent, task))
                worker.open_tasks += 1
                sent += 1
        busy = {worker.pipe: worker for worker in team if worker.open_tasks}
        for pipe in multiprocessing.connection.wait(list(busy)) if busy else ():
            number, error, result = busy[pipe].receive()
            busy[pipe].open_tasks -= 1
            if error is not None:
                raise error
            results[number] = result
        while done in results:
            yield results.pop(done)
            done += 1


def _serve(pipe: multiprocessing.connection.Connection, function: Callable) -> None:
    """A worker's life: answer tasks until the pipe ends."""
    # Ctrl-C reaches the whole group of processes; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _be_quiet()
    with contextlib.suppress(EOFError, OSError):
        while True:
            number, task = pipe.recv()
            try:
                answer = (number, None, function(task))
            except ProjectError as error:
                answer = (number, error, None)
            except Exception:
                last = traceback.format_exc().strip().splitlines()[-1]
                answer = (number, ProjectError(f"a worker process failed: {last}"), None)
            pipe.send(answer)


def _be_quiet() -> None:
    """One thread a worker, and no messages of image libraries.

    What is wrong with an image is told once, by us.
    """
    import cv2

    cv2.setNumThreads(1)
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
