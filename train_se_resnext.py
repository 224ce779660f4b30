#!/usr/bin/env python3
"""Train a Squeeze-and-Excitation network from RecordIO files: options -> data -> network -> engine -> loop."""

from __future__ import annotations

import sys
from contextlib import ExitStack

from errors import run_command
from training.options import parse_args


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status (128 + signal when a signal ended the training)."""
    args = parse_args(argv)
    # numpy, OpenCV and the frameworks are imported once the flags are known to be right: --help answers at once.
    from engine_choice import choose_engine, join_group, make_engine, prepare_process, start_processes
    from networks import declare, print_networks
    from training.checkpoint import PrefixLock
    from training.data import open_data
    from training.loop import Trainer
    from training.progress import say
    from training.run_log import LogLock
    from training.session import check_agreement, make_saver, open_log
    from training.start import Start, choose_start

    if args.network == "list":
        return print_networks()
    status = start_processes(args, argv)
    if status is not None:
        return status
    with join_group(args) as group, ExitStack() as held:
        data = held.enter_context(group.attempt(lambda: open_data(args, group)))
        check_agreement(args, data, group)
        if args.test_io:
            from training.loader_speed import report_io

            return report_io(data.train, args.device_speed)
        prepare_process(args)
        reason = choose_engine(args)
        network = declare(args, data.classes)

        def choose() -> Start:
            held.enter_context(PrefixLock(args.model_prefix))
            held.enter_context(LogLock(args.log_dir))
            return choose_start(args, network, data.train.steps_per_epoch)

        # The first of several processes writes the files, so it alone looks into them and tells the others.
        start = group.decide(choose)
        if reason:
            start.messages.insert(0, reason)
        if start.finished(args.epochs):
            for text in start.messages if group.leads else ():
                say(text)
            return 0
        engine = make_engine(args, network, group)
        engine.set_state(start.state)
        saver = make_saver(args, network, data, start)
        log = open_log(args, network, data, start, group)
        trainer = Trainer(engine, start.schedule, data, log, saver, args, group)
        try:
            return group.final_status(trainer.run(start.position))
        finally:
            engine.close()


if __name__ == "__main__":
    sys.exit(run_command(main))
