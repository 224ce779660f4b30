"""Checkpoints survive kills, full disks, damage and second runs; the tools show, compare and convert them."""

from __future__ import annotations

import json
import logging
import os
import pickle
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from engines.base import TrainState
from errors import UsageError, run_command
from graph.params_file import read_arrays, write_arrays
from training import checkpoint, checkpoint_tools
from training.checkpoint import (
    CheckpointError,
    DamagedCheckpointError,
    PrefixLock,
    check_params,
    find_latest,
    iter_checkpoints,
    load_best,
    load_checkpoint,
    load_params,
    prune,
    save_best,
    save_checkpoint,
)

ROOT = Path(__file__).resolve().parent.parent
SYMBOL = '{"nodes": []}'


def make_state(updates: int = 0, size: int = 3) -> TrainState:
    rng = np.random.default_rng(updates)
    return TrainState(
        {"arg:fc_weight": rng.random((2, size), np.float32), "aux:bn_moving_mean": rng.random(2, np.float32)},
        {"momentum:fc_weight": rng.random((2, size), np.float32)},
        updates,
    )


def save(prefix: Path, epoch: int, batch: int = 0, **options: object) -> Path:
    """A checkpoint of a run with ten updates an epoch."""
    manifest = options.pop("manifest", {"metrics": {"validation": {"top1": 0.5}}})
    state = make_state(10 * epoch + batch)
    return save_checkpoint(prefix, epoch, state, symbol_json=SYMBOL, manifest=manifest, batch=batch, **options)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def assert_same_state(a: TrainState, b: TrainState) -> None:
    assert a.updates == b.updates
    for ours, theirs in ((a.params, b.params), (a.optimizer, b.optimizer)):
        assert list(ours) == list(theirs)
        for name in ours:
            assert ours[name].tobytes() == theirs[name].tobytes()
            assert ours[name].shape == theirs[name].shape


@pytest.fixture
def prefix(tmp_path):
    return tmp_path / "net"


# ---------------------------------------------------------------------------- save and load


def test_round_trip(prefix):
    state = make_state(70)
    position = {"metrics": {"top1": np.float32(0.5), "best": 0.1 + 0.2}, "arguments": {"--lr": 0.1}, "seed": 3}
    path = save_checkpoint(prefix, 7, state, symbol_json=SYMBOL, manifest=position)
    assert names(prefix.parent) == ["net-0007.json", "net-0007.params", "net-0007.states", "net-symbol.json"]
    assert path == prefix.parent / "net-0007.json"
    found = load_checkpoint(prefix, 7)
    assert_same_state(found.state, state)
    assert (found.epoch, found.batch, found.path, found.symbol_json) == (7, 0, path, SYMBOL)
    assert found.manifest["metrics"] == {"top1": 0.5, "best": 0.30000000000000004}
    assert found.manifest["arguments"] == {"--lr": 0.1}
    assert found.manifest["files"]["params"]["bytes"] == (prefix.parent / "net-0007.params").stat().st_size


def test_without_momentum(prefix):
    save_checkpoint(prefix, 1, TrainState(make_state().params), symbol_json=SYMBOL, manifest={})
    assert load_checkpoint(prefix, 1).state.optimizer == {}


def test_within_an_epoch(prefix):
    save(prefix, 3)
    save(prefix, 3, batch=5)
    assert "net-0003b0000005.params" in names(prefix.parent)
    assert load_checkpoint(prefix, 3, batch=5).state.updates == 35
    assert load_checkpoint(prefix, 3).state.updates == 30
    latest, passed_over = find_latest(prefix)
    assert (latest.epoch, latest.batch, passed_over) == (3, 5, [])


def test_own_keys_cannot_be_overwritten(prefix):
    with pytest.raises(ValueError, match="sequence"):
        save(prefix, 1, manifest={"sequence": 5})


def test_mxnet_loads_the_params_and_reads_the_states(prefix):
    mx = pytest.importorskip("mxnet_compat", exc_type=ImportError).mx
    data = mx.sym.var("data")
    symbol = mx.sym.FullyConnected(data, num_hidden=2, no_bias=True, name="fc")
    state = make_state(10)
    save_checkpoint(prefix, 1, state, symbol_json=symbol.tojson(), manifest={})
    loaded, args, aux = mx.model.load_checkpoint(str(prefix), 1)
    assert loaded.tojson() == symbol.tojson()
    assert args["fc_weight"].asnumpy().tobytes() == state.params["arg:fc_weight"].tobytes()
    assert list(aux) == ["bn_moving_mean"]
    assert list(mx.nd.load(f"{prefix}-0001.states")) == ["momentum:fc_weight"]


def test_other_prefixes_are_left_alone(prefix):
    save(prefix, 1)
    save(prefix.with_name("net-big"), 2)
    save(prefix.with_name("net-0001"), 9)
    assert [entry.epoch for entry in iter_checkpoints(prefix)] == [1]
    assert find_latest(prefix)[0].epoch == 1
    prune(prefix, 0)
    assert find_latest(prefix.with_name("net-big"))[0].epoch == 2
    assert find_latest(prefix.with_name("net-0001"))[0].epoch == 9


def test_params_of_other_programs_load_alone(prefix):
    write_arrays(f"{prefix}-0050.params", make_state().params)
    Path(f"{prefix}-symbol.json").write_text(SYMBOL)
    found = load_checkpoint(prefix, 50)
    assert (found.epoch, found.manifest, found.symbol_json) == (50, None, SYMBOL)
    assert (found.state.updates, found.state.optimizer) == (0, {})
    latest, passed_over = find_latest(prefix)
    assert latest is None
    assert [(path.name, "no manifest" in reason) for path, reason in passed_over] == [("net-0050", True)]


def test_states_of_a_module_beside_its_params_are_read(prefix):
    mx = pytest.importorskip("mxnet_compat", exc_type=ImportError).mx
    data = mx.sym.FullyConnected(mx.sym.var("data"), num_hidden=2, name="fc")
    module = mx.mod.Module(mx.sym.SoftmaxOutput(data, name="softmax"))
    batches = mx.io.NDArrayIter(np.ones((2, 3), np.float32), np.zeros(2), batch_size=2)
    module.bind(batches.provide_data, batches.provide_label)
    module.init_params(mx.init.One())
    module.init_optimizer(kvstore=None, optimizer_params={"momentum": 0.9, "learning_rate": 1.0})
    module.forward_backward(next(batches))
    module.update()
    mx.nd.waitall()
    module.save_checkpoint(str(prefix), 4, save_optimizer_states=True)
    found = load_checkpoint(prefix, 4)
    assert found.manifest is None
    assert list(found.state.optimizer) == ["momentum:fc_weight", "momentum:fc_bias"]
    change = found.state.params["arg:fc_weight"] - 1
    assert np.allclose(found.state.optimizer["momentum:fc_weight"], change)


def test_evil_states_beside_params(prefix):
    write_arrays(f"{prefix}-0004.params", make_state().params)
    Path(f"{prefix}-0004.states").write_bytes(pickle.dumps({"fc_weight": os.getcwd}))
    with pytest.raises(DamagedCheckpointError, match="refused.*fresh momentum"):
        load_checkpoint(prefix, 4)
    assert list(load_params(prefix, 4)) == list(make_state().params)


def test_lost_or_damaged_manifest(prefix):
    path = save(prefix, 4)
    path.write_text("{")
    assert list(load_params(prefix, 4)) == list(make_state().params)
    path.unlink()
    found = load_checkpoint(prefix, 4)
    assert list(found.state.optimizer) == ["momentum:fc_weight"]
    assert found.manifest is None


# ---------------------------------------------------------------------------- damage


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGES = {"flip": flip, "cut": cut, "empty": lambda path: path.write_bytes(b""), "missing": Path.unlink}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("extension", ["params", "states"])
def test_damage_is_named_and_passed_over(prefix, damage, extension):
    save(prefix, 1)
    save(prefix, 2)
    DAMAGES[damage](Path(f"{prefix}-0002.{extension}"))
    with pytest.raises(DamagedCheckpointError, match=rf"net-0002\.{extension}"):
        load_checkpoint(prefix, 2)
    latest, ((stem, reason),) = find_latest(prefix)
    assert latest.epoch == 1
    assert stem.name == "net-0002"
    assert f"net-0002.{extension}" in reason
    assert "\n" not in reason


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"{}", b"[" * 100_000, b"\xff\xfe", b'{"format": 2}', b'{"format": 1, "epoch": "2"}']
    + [b'{"format": 1, "epoch": 2, "batch": 0, "updates": 5, "sequence": 3, "files": {"params": []}}'],
)
def test_damaged_manifest(prefix, content):
    save(prefix, 1)
    save(prefix, 2).write_bytes(content)
    with pytest.raises(DamagedCheckpointError, match=r"net-0002\.json"):
        load_checkpoint(prefix, 2)
    latest, passed_over = find_latest(prefix)
    assert latest.epoch == 1
    assert [path.name for path, _reason in passed_over] == ["net-0002"]


def test_nothing_there(prefix):
    assert find_latest(prefix) == (None, [])
    assert find_latest(prefix.parent / "no directory" / "net") == (None, [])
    with pytest.raises(DamagedCheckpointError, match=r"net-0003\.params: there is none"):
        load_checkpoint(prefix, 3)


@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_all_damaged(prefix, damage):
    save(prefix, 1)
    save(prefix, 2)
    damage(Path(f"{prefix}-symbol.json"))
    latest, passed_over = find_latest(prefix)
    assert latest is None
    assert [path.name for path, _reason in passed_over] == ["net-0002", "net-0001"]
    assert "net-symbol.json" in passed_over[0][1]


def test_newest_is_the_last_saved_even_after_going_back(prefix):
    for epoch in (1, 2, 3, 4):
        save(prefix, epoch)
    save(prefix, 2)  # restarted from epoch 1
    assert find_latest(prefix)[0].epoch == 2
    assert [path.name for path in prune(prefix, 2)] == ["net-0003", "net-0001"]


def test_check_params_lists_every_difference_at_once():
    params = {"arg:a": np.ones(2), "arg:b": np.ones((2, 3)), "arg:extra": np.ones(1)}
    with pytest.raises(UsageError) as caught:
        check_params({"arg:a": (2,), "arg:b": (3, 2), "arg:c": (1,), "aux:d": (1,)}, params, "x.params")
    for part in ("x.params", "arg:c is missing", "aux:d is missing", "arg:extra is not in the network"):
        assert part in str(caught.value)
    assert "arg:b is (2, 3) in the file and (3, 2) in the network" in str(caught.value)
    assert "arg:a" not in str(caught.value)
    check_params({"arg:a": (2,)}, {"arg:a": np.ones(2)}, "x.params")


# ---------------------------------------------------------------------------- best, keep


def test_best_outlives_its_original(prefix):
    save(prefix, 1)
    save_best(save(prefix, 2))
    save(prefix, 3)
    prune(prefix, 1)
    assert [path for path in names(prefix.parent) if path.endswith(".json")] == [
        "net-0003.json",
        "net-best.json",
        "net-symbol.json",
    ]
    best = load_best(prefix)
    assert best.epoch == 2
    assert_same_state(best.state, make_state(20))
    flip(Path(f"{prefix}-0003.params"))
    assert find_latest(prefix)[0].path.name == "net-best.json"


def test_best_is_a_copy(prefix):
    save_best(save(prefix, 1))
    flip(Path(f"{prefix}-0001.params"))
    assert load_best(prefix).epoch == 1


def test_best_stands_in_for_its_epoch(prefix):
    for epoch in (1, 2, 3):
        path = save(prefix, epoch)
        if epoch == 2:
            save_best(path)
    prune(prefix, 1)
    assert not Path(f"{prefix}-0002.params").exists()
    assert_same_state(load_checkpoint(prefix, 2).state, make_state(20))
    assert load_params(prefix, 2).keys() == make_state(20).params.keys()
    with pytest.raises(DamagedCheckpointError, match=r"there are epochs 2, 3$"):
        load_checkpoint(prefix, 1)


@pytest.mark.parametrize("found", [(2.0**9, 12), None])
def test_scale_of_gradients_is_kept(prefix, found):
    state = make_state(10)
    state.loss_scale = found
    path = save_checkpoint(prefix, 1, state, symbol_json=SYMBOL, manifest={})
    assert load_checkpoint(prefix, 1).state.loss_scale == found
    for strange in ([0.0, 1], [1e400, 1], [2.0], "much", [2.0, 1.5]):
        path.write_text(json.dumps({**json.loads(path.read_text()), "loss_scale": strange}))
        assert load_checkpoint(prefix, 1).state.loss_scale is None


@pytest.mark.parametrize("keep", [1, 2, 4, None])
def test_keep(prefix, keep):
    for epoch in range(1, 6):
        save(prefix, epoch)
    deleted = prune(prefix, keep)
    left = [entry.epoch for entry in iter_checkpoints(prefix)]
    assert left == list(range(1, 6))[-(keep or 5) :]
    assert len(deleted) == 5 - len(left)


def test_protected_checkpoint_is_not_deleted(prefix):
    paths = [save(prefix, epoch) for epoch in range(1, 6)]
    prune(prefix, 1, protect=[paths[0], prefix.parent / "net-0002", prefix.parent / "net-0003.params"])
    assert [entry.epoch for entry in iter_checkpoints(prefix)] == [1, 2, 3, 5]


def test_damaged_checkpoints_do_not_count_as_kept(prefix):
    for epoch in range(1, 6):
        save(prefix, epoch)
    cut(Path(f"{prefix}-0005.params"))
    cut(Path(f"{prefix}-0002.params"))
    prune(prefix, 2)
    assert [entry.epoch for entry in iter_checkpoints(prefix)] == [3, 4, 5]


def test_checkpoints_within_epochs_do_not_pile_up(prefix):
    for epoch in (1, 2):
        for batch in (3, 6, 9):
            save(prefix, epoch, batch=batch)
        save(prefix, epoch + 1)
        prune(prefix, None)
    found = [(entry.epoch, entry.batch) for entry in iter_checkpoints(prefix)]
    assert found == [(2, 0), (2, 6), (2, 9), (3, 0)]
    prune(prefix, 2)
    assert [(entry.epoch, entry.batch) for entry in iter_checkpoints(prefix)] == [(2, 9), (3, 0)]


def test_files_of_others_are_not_pruned(prefix):
    write_arrays(f"{prefix}-0001.params", make_state().params)
    for epoch in (2, 3):
        save(prefix, epoch)
    prune(prefix, 1)
    assert [entry.epoch for entry in iter_checkpoints(prefix)] == [1, 3]


# ---------------------------------------------------------------------------- failing disks


def test_file_too_large_leaves_everything_as_it_was(prefix, file_size_limit):
    save_best(save(prefix, 1))
    before = {path: path.read_bytes() for path in prefix.parent.iterdir()}
    big = make_state(20, size=5000)
    for epoch in (1, 2):
        expected = pytest.raises(CheckpointError, match=rf"net-000{epoch} was not saved: File too large")
        with file_size_limit(4096), expected:
            save_checkpoint(prefix, epoch, big, symbol_json=SYMBOL, manifest={})
    assert {path: path.read_bytes() for path in prefix.parent.iterdir()} == before
    assert find_latest(prefix)[0].epoch == 1


def test_full_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a tmpfs is not permitted here")
    try:
        prefix = disk / "net"
        save(prefix, 1)
        before = names(disk)
        for _ in range(3):
            with pytest.raises(CheckpointError, match="No space left on device"):
                save_checkpoint(prefix, 2, make_state(20, size=9000), symbol_json=SYMBOL, manifest={})
        assert names(disk) == before
        assert find_latest(prefix)[0].epoch == 1
        save(prefix, 2)
        assert find_latest(prefix)[0].epoch == 2
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_read_only_directory(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    save(disk / "net", 1)
    if os.geteuid() == 0:  # root may write where the mode forbids it
        command = f"mount --bind '{disk}' '{disk}' && mount -o remount,ro,bind '{disk}'"
        if subprocess.run(["sh", "-c", command], capture_output=True, check=False).returncode:
            pytest.skip("read-only mounts are not permitted here")
        undo = ["umount", str(disk)]
    else:
        disk.chmod(0o555)
        undo = ["chmod", "755", str(disk)]
    try:
        with pytest.raises(CheckpointError, match="net-0002 was not saved"):
            save(disk / "net", 2)
        with pytest.raises(UsageError, match="cannot write the lock file"), PrefixLock(disk / "net"):
            pass
        assert find_latest(disk / "net")[0].epoch == 1
    finally:
        subprocess.run(undo, check=True)


def test_vanished_directory_is_made_again(tmp_path, caplog):
    prefix = tmp_path / "model" / "net"
    with PrefixLock(prefix), caplog.at_level(logging.WARNING):
        save(prefix, 1)
        for path in (tmp_path / "model").iterdir():
            path.unlink()
        (tmp_path / "model").rmdir()
        save(prefix, 2)
    assert "has vanished" in caplog.text
    assert find_latest(prefix)[0].epoch == 2


def test_directory_replaced_by_a_file(tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(CheckpointError, match="not saved"):
        save(tmp_path / "model" / "net", 1)


def test_changed_graph_is_no_damage(prefix):
    """Resuming with another option (dropout, say) changes the graph that all checkpoints of the prefix share."""
    save(prefix, 1)
    other = '{"nodes": [], "attrs": {}}'
    save_checkpoint(prefix, 2, make_state(20), symbol_json=other, manifest={})
    assert load_checkpoint(prefix, 2).symbol_json == load_checkpoint(prefix, 1).symbol_json == other


# ---------------------------------------------------------------------------- kills

SAVER = """
import sys
from tests.test_checkpoint import save
from training.checkpoint import PrefixLock, prune, save_best
from pathlib import Path
prefix = Path(sys.argv[1])
with PrefixLock(prefix):
    print("locked", flush=True)
    for epoch in range(1, 100_000):
        best = save(prefix, epoch % 3 + 1)  # overwrites, which is where a kill can hurt
        save_best(best)
        prune(prefix, 2)
"""


def start_saver(prefix: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", SAVER, str(prefix)], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout.readline() == b"locked\n"
    return process


def test_kills_at_random_moments_never_cost_a_checkpoint(prefix):
    rng = np.random.default_rng(5)
    save_best(save(prefix, 1))
    for _ in range(12):
        process = start_saver(prefix)
        time.sleep(0.03 + rng.random() * 0.05)
        process.kill()
        process.wait()
        with PrefixLock(prefix):  # the killed run's lock is stale
            assert find_latest(prefix)[1] == []
            prune(prefix, 2)  # finishes a deletion that the kill cut short
            assert {entry.problem for entry in iter_checkpoints(prefix)} <= {None}
            assert not [name for name in names(prefix.parent) if name.endswith(".tmp")]
    assert load_best(prefix).state.updates > 0


@pytest.mark.parametrize("renames", [0, 1, 2, 3])
@pytest.mark.parametrize("again", [False, True])
def test_kill_between_the_renames(prefix, monkeypatch, renames, again):
    """Stop after each rename in turn, whether or not a checkpoint of that name was there."""
    save(prefix, 1)
    if again:
        save(prefix, 2, manifest={"run": "old"})
    done = 0
    real = os.replace

    def replace(source, target):
        nonlocal done
        if done == renames:
            raise KeyboardInterrupt
        done += 1
        real(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.atomic_file.os, "replace", replace)
        patch.setattr(checkpoint.atomic_file.AtomicFile, "discard", lambda self: None)
        save(prefix, 2, manifest={"run": "new"})
        raise KeyboardInterrupt  # all renames done
    with PrefixLock(prefix):
        latest, passed_over = find_latest(prefix)
    assert (latest.epoch, latest.manifest["run"], passed_over) == (2, "new", [])
    assert not [name for name in names(prefix.parent) if name.endswith((".tmp", ".lock"))]


def test_recovery_drops_what_was_not_complete(prefix):
    save(prefix, 1)
    before = names(prefix.parent)
    Path(f"{prefix.parent}/.net-0002.params.77.tmp").write_bytes(b"half")
    Path(f"{prefix.parent}/.net-0002.json.77.tmp").write_bytes(b'{"format"')
    other = Path(f"{prefix.parent}/.net-big-0002.params.77.tmp")
    other.write_bytes(b"another run's")
    with PrefixLock(prefix):
        assert names(prefix.parent) == sorted([*before, other.name, "net.lock"])


# ---------------------------------------------------------------------------- lock


def test_second_run_is_refused(prefix):
    process = start_saver(prefix)
    try:
        with pytest.raises(UsageError, match=rf"process {process.pid} on .* is writing the same files"):
            PrefixLock(prefix).__enter__()
    finally:
        process.kill()
        process.wait()
    with PrefixLock(prefix):
        pass
    assert not Path(f"{prefix}.lock").exists()


def test_second_lock_in_the_same_process_is_refused(prefix):
    with PrefixLock(prefix):
        with pytest.raises(UsageError, match=f"process {os.getpid()}"):
            PrefixLock(prefix).__enter__()
        with PrefixLock(prefix.with_name("other")):
            pass


@pytest.mark.parametrize(
    ("change", "refused"),
    [
        ({"pid": 2**22 + 1}, False),  # beyond the largest process id: dead
        ({"process_start": "another boot 1"}, False),  # the number was given to another process since
        ({"host": "elsewhere"}, True),
        ({}, True),
    ],
)
def test_stale_locks_are_recognised(prefix, change, refused):
    with PrefixLock(prefix):
        holder = json.loads(Path(f"{prefix}.lock").read_text())
    Path(f"{prefix}.lock").write_text(json.dumps({**holder, **change}))
    if refused:
        with pytest.raises(UsageError, match="locked"):
            PrefixLock(prefix).__enter__()
    else:
        with PrefixLock(prefix):
            assert json.loads(Path(f"{prefix}.lock").read_text()) == {
                **holder,
                "started": json.loads(Path(f"{prefix}.lock").read_text())["started"],
            }


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[" * 100_000, b'{"host": 1, "pid": "x"}'])
def test_lock_file_that_says_nothing_is_stale(prefix, content):
    Path(f"{prefix}.lock").write_bytes(content)
    with PrefixLock(prefix):
        pass


def test_read_arrays_is_what_mxnet_users_see(prefix):
    save(prefix, 1)
    assert list(read_arrays(f"{prefix}-0001.params")) == ["arg:fc_weight", "aux:bn_moving_mean"]


# ---------------------------------------------------------------------------- python -m training.checkpoint


def run_tool(capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the command."""
    status = run_command(lambda: checkpoint_tools.main([str(argument) for argument in arguments]))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_show(prefix, capsys):
    rates = {"train": {"top1": 0.25}, "validation": {"top1": 0.5}}
    save(prefix, 1, manifest={"metrics": rates})
    save_best(save(prefix, 2, manifest={"metrics": {"train": None}}))
    save(prefix, 2, batch=5, manifest={})
    status, out, _ = run_tool(capsys, "show", prefix)
    rows = [line.split() for line in out.splitlines()[1:]]
    assert status == 0
    assert rows[0] == ["net-0001", "1", "10", "25.00%", "50.00%", "0.0", "MB", "whole"]
    assert [row[0] for row in rows] == ["net-0001", "net-best", "net-0002", "net-0002b0000005"]
    assert {row[-1] for row in rows} == {"whole"}


def test_show_tells_what_is_wrong(prefix, capsys):
    save(prefix, 1)
    save(prefix, 2).write_text("{")
    flip(Path(f"{prefix}-0001.params"))
    write_arrays(f"{prefix}-0009.params", make_state().params)
    status, out, _ = run_tool(capsys, "show", prefix)
    assert status == 1
    assert "net-0001.params has changed since it was saved" in out
    assert "net-0002.json: not JSON" in out
    assert "no manifest: only its .params can be loaded" in out
    assert run_tool(capsys, "show", "--quick", prefix)[1].count("whole") == 1


def test_show_of_other_programs_checkpoints_is_fine_unless_damaged(prefix, capsys):
    write_arrays(f"{prefix}-0050.params", make_state().params)
    assert run_tool(capsys, "show", prefix)[0] == 0
    cut(Path(f"{prefix}-0050.params"))
    status, out, _ = run_tool(capsys, "show", prefix)
    assert status == 1
    assert "ends inside" in out


def test_show_as_json(prefix, capsys):
    save(prefix, 1)
    status, out, _ = run_tool(capsys, "show", "--json", prefix)
    (line,) = out.splitlines()
    record = json.loads(line)
    assert status == 0
    assert (record["epoch"], record["updates"], record["valid"]) == (1, 10, True)
    assert record["metrics"] == {"validation": {"top1": 0.5}}


def test_show_nothing(prefix, capsys):
    status, _, err = run_tool(capsys, "show", prefix)
    assert status == 2
    assert err.startswith("error: no checkpoints under")
    assert err.count("\n") == 1


def test_show_of_a_single_checkpoint_names_its_prefix(prefix, capsys):
    save(prefix, 1)
    for name in (f"{prefix}-0001.params", f"{prefix}-0001"):
        assert run_tool(capsys, "show", name)[2].endswith(f"a checkpoint itself; its prefix is {prefix}\n")


def test_diff(prefix, capsys):
    state = make_state(10)
    save_checkpoint(prefix, 1, state, symbol_json=SYMBOL, manifest={})
    save_checkpoint(prefix.with_name("same"), 1, state, symbol_json=SYMBOL, manifest={})
    status, out, _ = run_tool(capsys, "diff", f"{prefix}-0001", f"{prefix.with_name('same')}-0001.states")
    assert (status, out) == (0, "the same (3 arrays)\n")

    other = make_state(10)
    other.params["arg:fc_weight"][0, 1] += 1
    other.params["arg:new"] = np.ones(4, np.float32)
    other.params["aux:bn_moving_mean"] = np.ones((3, 1), np.float32)
    other.optimizer = {}
    other.updates = 11
    save_checkpoint(prefix.with_name("other"), 1, other, symbol_json=SYMBOL, manifest={})
    status, out, _ = run_tool(capsys, "diff", f"{prefix}-0001.json", f"{prefix.with_name('other')}-0001.params")
    lines = out.splitlines()
    assert status == 1
    assert "1 of 6 values differ, by 1 at most" in lines[0]
    assert lines[1] == "aux:bn_moving_mean: float32 (2,) in A, float32 (3, 1) in B"
    assert lines[2] == "arg:new: only in B, float32 (4,)"
    assert lines[3] == "momentum:fc_weight: only in A, float32 (2, 3)"
    assert lines[4] == "updates: 10 in A, 11 in B"
    assert lines[5] == "5 differences, 0 arrays are the same"
    status, out, _ = run_tool(
        capsys, "diff", "--params-only", f"{prefix}-0001.json", f"{prefix.with_name('other')}-0001.params"
    )
    assert (status, out.splitlines()[-1]) == (1, "3 differences, 0 arrays are the same")


def test_diff_sees_every_bit(prefix, capsys):
    for name, values in (("a", [0.0, 1.0]), ("b", [-0.0, 1.0]), ("c", [np.nan, 1.0])):
        write_arrays(prefix.with_name(name), {"arg:x": np.array(values, np.float32)})
        prefix.with_name(name).rename(prefix.with_name(f"{name}-0001.params"))
    a, b, c = (f"{prefix.with_name(name)}-0001" for name in "abc")
    assert "1 of 2 values differ, by 0 at most" in run_tool(capsys, "diff", a, b)[1]
    assert run_tool(capsys, "diff", c, c)[0] == 0
    assert "by nan at most" in run_tool(capsys, "diff", a, c)[1]


def test_diff_of_what_is_not_there(prefix, capsys):
    save(prefix, 1)
    status, _, err = run_tool(capsys, "diff", f"{prefix}-0001", f"{prefix}-0002")
    assert status == 2
    assert "no checkpoint" in err


def test_convert_renames_and_strips(prefix, capsys):
    save(prefix, 1)
    target = prefix.with_name("new-0000")
    status, out, _ = run_tool(
        capsys, "convert", f"{prefix}-0001", target, "--strip", "bn_*", "--rename", r"^(\w+)_weight$=head_\1_weight"
    )
    assert status == 0
    assert "1 parameters, 1 renamed, 1 left out" in out
    found = load_checkpoint(prefix.with_name("new"), 0)
    assert list(found.state.params) == ["arg:head_fc_weight"]
    assert found.state.optimizer == {}
    assert np.array_equal(found.state.params["arg:head_fc_weight"], make_state(10).params["arg:fc_weight"])


def test_convert_with_states(prefix, capsys):
    save(prefix, 1)
    target = prefix.with_name("new-0000")
    assert run_tool(capsys, "convert", f"{prefix}-0001", target, "--states", "--rename", "fc=head")[0] == 0
    found = load_checkpoint(prefix.with_name("new"), 0)
    assert list(found.state.optimizer) == ["momentum:head_weight"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--strip", "conv*"], "no parameter of .* matches conv"),
        (["--rename", "conv=x"], "no parameter of .* matches conv=x"),
        (["--rename", "fc"], "expected REGEX=NEW"),
        (["--rename", "(=x"], "--rename"),
        (["--rename", r"fc=\3"], "invalid group reference"),
    ],
)
def test_convert_refuses(prefix, capsys, options, message):
    save(prefix, 1)
    status, _, err = run_tool(capsys, "convert", f"{prefix}-0001", prefix.with_name("new-0000"), *options)
    assert status == 2
    assert re.search(message, err)
    assert err.count("\n") == 1
    assert not prefix.with_name("new-0000.params").exists()


def test_convert_refuses_two_of_one_name(prefix, capsys):
    write_arrays(f"{prefix}-0001.params", {"arg:a1": np.ones(1), "arg:a2": np.ones(1)})
    status, _, err = run_tool(capsys, "convert", f"{prefix}-0001", prefix.with_name("new-0000"), "--rename", r"\d=")
    assert status == 2
    assert "two parameters would both be called arg:a" in err


def test_convert_overwrites_only_when_told(prefix, capsys):
    save(prefix, 1)
    target = prefix.with_name("new-0000")
    assert run_tool(capsys, "convert", f"{prefix}-0001", target)[0] == 0
    status, _, err = run_tool(capsys, "convert", f"{prefix}-0001", target)
    assert status == 2
    assert "--force" in err
    assert run_tool(capsys, "convert", f"{prefix}-0001", target, "--force")[0] == 0
    save(prefix, 2)
    status, _, err = run_tool(capsys, "convert", f"{prefix}-0001", f"{prefix}-0002", "--force")
    assert status == 2
    assert "is a checkpoint of a run" in err


def test_command_line(prefix):
    """The module runs as a command, says what it can do, and needs no MXNet."""
    save(prefix, 1)
    code = (
        "import sys, runpy; sys.modules['mxnet'] = None; sys.argv[0] = 'checkpoint';"
        "runpy.run_module('training.checkpoint', run_name='__main__')"
    )
    for arguments, status, expected in (
        (["show", str(prefix)], 0, "net-0001"),
        (["--help"], 0, "convert"),
        (["diff", f"{prefix}-0001", f"{prefix}-0002"], 2, ""),
        ([], 2, ""),
    ):
        result = subprocess.run(
            [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=ROOT, check=False
        )
        assert result.returncode == status, result.stderr
        assert expected in result.stdout
        assert "Traceback" not in result.stderr
