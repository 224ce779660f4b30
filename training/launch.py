"""Start and watch a distributed MXNet training: one scheduler, servers and workers, here or on several machines.

    python -m training.launch -n 2 -s 1 -- python train_se_resnext.py --kv-store dist_sync ...

MXNet's parameter server waits for ever when one of its processes dies. So the launcher watches all of them: when one
dies, or a worker gives no sign of life for --stall-timeout seconds, it says which and how, ends the others and either
starts the job again from its newest checkpoint (--max-restarts) or ends with a non-zero status.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from command_line import HelpFormatter, Parser
from errors import UsageError, run_command
from training.heartbeat import (
    HEARTBEAT_VARIABLE,
    LOCAL_PROCESSES_VARIABLE,
    LOOPBACK,
    RESTARTS_VARIABLES,
    STALL_SECONDS,
    START_SECONDS,
    STARTED_VARIABLE,
    WORKER_VARIABLE,
    Listener,
)
from training.launch_processes import (
    SIGNAL_EXIT_BASE,
    STOP_STATUSES,
    Member,
    StallClock,
    ended_at_once,
    processors,
    python_of,
)

ROOT = Path(__file__).resolve().parent.parent
POLL_SECONDS = 0.05
# Scheduler and servers end a moment before or after the workers; a longer moment means that something is wrong.
END_SECONDS = 5.0
USAGE_STATUS = UsageError.exit_status
# Variables of the launcher's environment that processes on other machines get as well.
PASSED_ON = ("DMLC_", "PS_", "MXNET_", "OMP_", "DNNL_", "NCCL_", "CUDA_")


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m training.launch",
        description=__doc__.split("\n")[0],
        formatter_class=HelpFormatter,
        allow_abbrev=False,
    )
    positive = _number(int, 1)
    parser.add_argument("-n", "--workers", type=positive, required=True, help="processes that train")
    parser.add_argument("-s", "--servers", type=positive, default=1, help="processes that sum gradients")
    places = parser.add_argument_group("machines")
    places.add_argument(
        "--hosts", type=Path, default=None, metavar="FILE",
        help="one host a line: workers and servers are dealt to them in turn, through ssh; the project lies in the "
        "same folder everywhere (default: all processes on this machine)",
    )  # fmt: skip
    places.add_argument(
        "--address", default=None, help="address of this machine for the others (default: found by the way to them)"
    )
    failures = parser.add_argument_group("failures")
    failures.add_argument(
        "--max-restarts", type=_number(int, 0), default=0, metavar="N",
        help="start again from the newest checkpoint when a process died, so many times",
    )  # fmt: skip
    failures.add_argument(
        "--stall-timeout", type=_number(float, 1), default=STALL_SECONDS, metavar="SECONDS",
        help=f"a worker that finishes no batch for so long counts as dead; one that starts has {START_SECONDS:g} s",
    )  # fmt: skip
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and the training command")
    return parser


def _number(kind: type, least: float):
    def parse(text: str):
        value = kind(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{text} is out of range: it must be at least {least}")
        return value

    parse.__name__ = "number"  # argparse names it when `kind` refuses the text
    return parse


def read_hosts(path: Path) -> list[str]:
    """Hosts of a file, one a line; what follows # is a comment. UsageError when there is none."""
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise UsageError(f"--hosts {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--hosts {path} is no text file; it holds one host a line") from error
    hosts = [line.split("#")[0].strip() for line in lines]
    hosts = [host for host in hosts if host]
    bad = [host for host in hosts if host.startswith("-") or len(host.split()) > 1]
    if bad:
        raise UsageError(f"--hosts {path}: {bad[0]!r} is no host; the file holds one a line")
    if not hosts:
        raise UsageError(f"--hosts {path} names no host")
    return hosts


def address_for(hosts: Sequence[str]) -> str:
    """This machine's address as the first of `hosts` sees it."""
    host = hosts[0].rpartition("@")[2]
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 22))
            return probe.getsockname()[0]
    except OSError as error:
        raise UsageError(f"cannot tell how {host} reaches this machine ({error}); give --address") from error


@dataclass(frozen=True)
class Plan:
    """What is started, where. hosts: empty for this machine alone; address: of this machine."""

    command: list[str]
    workers: int
    servers: int
    hosts: list[str]
    address: str

    def environment(self, attempt: int, started: float, heartbeat_port: int) -> dict[str, str]:
        """Variables that all processes of an attempt share."""
        shared = {
            "DMLC_PS_ROOT_URI": self.address,
            "DMLC_PS_ROOT_PORT": str(free_port()),
            "DMLC_NUM_WORKER": str(self.workers),
            "DMLC_NUM_SERVER": str(self.servers),
            HEARTBEAT_VARIABLE: f"{self.address}:{heartbeat_port}",
            RESTARTS_VARIABLES[0]: str(attempt),
            STARTED_VARIABLE: str(started),
        }
        if self.hosts:
            return {**{name: os.environ[name] for name in os.environ if name.startswith(PASSED_ON)}, **shared}
        shared["DMLC_NODE_HOST"] = LOOPBACK
        # Without it every process, servers too, would use all processors, and all of them would wait for each other.
        shared["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(max(1, processors() // self.workers))
        shared["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        return shared

    def start(self, environment: dict[str, str]) -> list[Member]:
        """Start the scheduler here, then servers and workers, dealt to the hosts in turn."""
        serve = [python_of(self.command), "-m", "engines.kv_server"]
        members: list[Member] = []

        def add(role: str, number: int, command: list[str], host: str | None, **more: str) -> None:
            members.append(Member(role, number, command, {**environment, "DMLC_ROLE": role, **more}, host))

        try:
            local = {**environment, "PYTHONPATH": str(ROOT)}
            members.append(Member("scheduler", 0, serve, {**local, "DMLC_ROLE": "scheduler"}))
            for number in range(self.servers):
                add("server", number, serve, self._host(number))
            hosts = [self._host(number) for number in range(self.workers)]
            for number, host in enumerate(hosts):
                more = {WORKER_VARIABLE: str(number), LOCAL_PROCESSES_VARIABLE: str(hosts.count(host))}
                add("worker", number, self.command, host, **more)
        except OSError as error:
            kill(members)
            raise UsageError(f"cannot start {error.filename or serve[0]}: {error.strerror}") from error
        return members

    def _host(self, number: int) -> str | None:
        return self.hosts[number % len(self.hosts)] if self.hosts else None


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def kill(members: Sequence[Member]) -> None:
    """End all processes at once; checkpoints are whole at any moment."""
    for member in members:
        member.kill()


class Failure(Exception):
    """A process died or stalled; status: what the launcher should end with."""

    def __init__(self, text: str, status: int = 1) -> None:
        super().__init__(text)
        self.status = status


class Supervisor:
    """Watches the processes of one attempt. signals: SIGTERM or SIGINT that the launcher got, filled by a handler."""

    def __init__(self, members: Sequence[Member], heartbeats: Listener, stall_timeout: float, signals: list[int]):
        self.members = members
        self.workers = [member for member in members if member.role == "worker"]
        self.heartbeats = heartbeats
        self.clock: StallClock[Member] = StallClock(stall_timeout)
        self.signals = signals
        self.stopping = False
        self.others_over: float | None = None  # since when workers run without a server or the scheduler

    def run(self) -> int:
        """Wait for the end; returns the exit status, raises Failure."""
        while True:
            heard = self._listen()
            if self.signals and not self.stopping:
                self.stopping = True
                for worker in self.workers:
                    worker.ask_to_stop()
            if ended_at_once(self.signals):
                raise Failure("a second signal came: ended at once", SIGNAL_EXIT_BASE + self.signals[0])
            statuses = {member: member.exit_status() for member in self.members}
            self._look_for_deaths(statuses)
            if all(statuses[worker] is not None for worker in self.workers):
                self._wait_for_others()
                status = max(statuses[worker] for worker in self.workers)
                # Workers are asked to stop by SIGTERM, whatever signal came.
                return SIGNAL_EXIT_BASE + self.signals[0] if self.signals and status in STOP_STATUSES else status
            self._look_for_stalls(statuses, heard)
            time.sleep(POLL_SECONDS)

    def _listen(self) -> set[Member]:
        """The workers that have given a sign of life."""
        heard = set()
        for number, rank in self.heartbeats.hear():
            if 0 <= number < len(self.workers):
                self.workers[number].rank = rank
                heard.add(self.workers[number])
        return heard

    def _look_for_deaths(self, statuses: dict[Member, int | None]) -> None:
        ended = [(member, status) for member, status in statuses.items() if status]
        if any(member.role == "worker" and status in STOP_STATUSES for member, status in ended):
            # It was asked to stop, and its fellows stop after the same batch; one of them is still saving.
            self.stopping = True
        # One that was killed comes before those that noticed it and gave up.
        for member, status in sorted(ended, key=lambda pair: pair[1] > 0):
            if member.role == "worker" and status in STOP_STATUSES:
                continue
            own = USAGE_STATUS if status == USAGE_STATUS else 1
            if self.signals and status == -signal.SIGTERM:
                raise Failure("stopped before the training began", SIGNAL_EXIT_BASE + self.signals[0])
            raise Failure(f"{member.name} {member.ending(status)}", own)
        gone = [m for m, status in statuses.items() if m.role != "worker" and status == 0]
        if gone:
            self.others_over = self.others_over or time.monotonic()
            if time.monotonic() - self.others_over > END_SECONDS:
                raise Failure(f"{gone[0].name} ended before the workers did")

    def _look_for_stalls(self, statuses: dict[Member, int | None], heard: set[Member]) -> None:
        alive = [member for member, status in statuses.items() if status is None]
        stopped = [member for member in alive if member.is_stopped()]
        # Servers and the scheduler say nothing, so they count as heard; standing still they are found all the same.
        heard = heard.union(member for member in alive if member.role != "worker")
        stall = self.clock.find(time.monotonic(), alive, heard, stopped)
        if stall is not None:
            member, how = stall
            raise Failure(f"{member.name} {how}")

    def _wait_for_others(self) -> None:
        deadline = time.monotonic() + END_SECONDS
        while time.monotonic() < deadline and any(member.exit_status() is None for member in self.members):
            time.sleep(POLL_SECONDS)


def run_job(plan: Plan, max_restarts: int, stall_timeout: float) -> int:
    """Run the job to its end, starting it again where that is allowed; returns the exit status."""
    signals: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _frame: signals.append(number))
    started = time.time()
    for attempt in range(max_restarts + 1):
        with Listener(LOOPBACK if not plan.hosts else "") as heartbeats:
            members = plan.start(plan.environment(attempt, started, heartbeats.port))
            say(f"started {', '.join(member.name for member in members)}")
            try:
                return Supervisor(members, heartbeats, stall_timeout, signals).run()
            except Failure as failure:
                say(f"error: {failure}; the other processes are ended")
                status = failure.status
            finally:
                kill(members)
        if status == USAGE_STATUS or signals or attempt == max_restarts:
            break
        say(f"restart {attempt + 1} of {max_restarts}: going on from the newest checkpoint")
    return status


def say(text: str) -> None:
    """A line on stderr, between those of the processes."""
    print(f"launch: {text}", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 128 + signal when it was stopped, or another status when a process failed."""
    parser = build_parser()
    args = parser.parse_args(argv)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        parser.error("what should the workers run? add: -- python train_se_resnext.py --kv-store dist_sync ...")
    hosts = read_hosts(args.hosts) if args.hosts else []
    address = args.address or (address_for(hosts) if hosts else LOOPBACK)
    return run_job(Plan(command, args.workers, args.servers, hosts, address), args.max_restarts, args.stall_timeout)


if __name__ == "__main__":
    sys.exit(run_command(main))
