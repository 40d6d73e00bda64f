"""A process's rank, device and stop signals."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from helpers.ports import free_port
from helpers.tiny_run import write_config, write_recordings
from spidr.environment import Preempted, StopFlag, choose_device, environment, find_meeting_place, ranks, seed_step
from spidr.tools.errors import InputError

VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_ID",
    "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_CPUS_PER_TASK",
)  # fmt: skip
SLURM = {
    "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NODELIST": "node[03-04]",
}  # fmt: skip

TORCHRUN = {
    "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}  # fmt: skip


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Unset all launcher variables, and restore them after the test."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)
    return monkeypatch


def test_alone(variables: pytest.MonkeyPatch) -> None:
    assert ranks() == (0, 0, 1)


def test_torchrun_comes_before_slurm(variables: pytest.MonkeyPatch) -> None:
    for name, value in {**SLURM, **TORCHRUN, "RANK": "3"}.items():
        variables.setenv(name, value)
    assert ranks() == (3, 1, 4)


def test_slurm_job_step(variables: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(
        f'#!{sys.executable}\nimport sys\nassert sys.argv[1:] == ["show", "hostnames", "node[03-04]"]\n'
        'print("node03\\nnode04")\n'
    )
    scontrol.chmod(0o755)
    variables.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name, value in SLURM.items():
        variables.setenv(name, value)
    assert ranks() == (5, 1, 8)
    find_meeting_place()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("node03", str(20_000 + 123456 % 12_000))


@pytest.mark.parametrize("job_id", ["0", "11999", "12000", "15999", "18000", str(2**32)])
def test_meeting_port_is_none_of_an_outgoing_connection(variables: pytest.MonkeyPatch, job_id: str) -> None:
    """Linux takes those from 32,768 on."""
    for name, value in (SLURM | {"SLURM_JOB_ID": job_id, "MASTER_ADDR": "node03"}).items():
        variables.setenv(name, value)
    find_meeting_place()
    assert 20_000 <= int(os.environ["MASTER_PORT"]) < 32_768


def test_slurm_allocation_without_a_step_is_alone(variables: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        if name != "SLURM_STEP_ID":
            variables.setenv(name, value)
    assert ranks() == (0, 0, 1)


Given = dict[str, str | None]
WRONG: list[tuple[dict[str, str], Given, str]] = [
    (TORCHRUN, {"WORLD_SIZE": None}, "WORLD_SIZE is not set, but RANK, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MAS"),
    (TORCHRUN, {"RANK": None}, "RANK is not set, but WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_P"),
    (TORCHRUN, {"RANK": "x"}, "RANK is 'x', not a number"),
    (TORCHRUN, {"RANK": ""}, "RANK is empty"),
    (TORCHRUN, {"RANK": "-1"}, "RANK is '-1', not a number"),
    (TORCHRUN, {"RANK": "1.0"}, "RANK is '1.0', not a number"),
    (TORCHRUN, {"RANK": "9" * 5000}, "RANK is '9999"),
    (TORCHRUN, {"RANK": "4"}, "RANK is 4, but with WORLD_SIZE = 4 it must be 0 to 3"),
    (TORCHRUN, {"WORLD_SIZE": "0"}, "WORLD_SIZE is 0, but it must be 1 to 1000000"),
    (TORCHRUN, {"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', not a number"),
    (TORCHRUN, {"WORLD_SIZE": "9" * 15}, "WORLD_SIZE is 999999999999999, but it must be"),
    (TORCHRUN, {"LOCAL_RANK": "gpu0"}, "LOCAL_RANK is 'gpu0', not a number"),
    (TORCHRUN, {"LOCAL_RANK": "2"}, "LOCAL_RANK is 2, but with LOCAL_WORLD_SIZE = 2 it must be 0 to 1"),
    (TORCHRUN, {"LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": None}, "LOCAL_RANK is 4, but with WORLD_SIZE = 4 it must be"),
    (TORCHRUN, {"LOCAL_WORLD_SIZE": "5"}, "LOCAL_WORLD_SIZE is 5, but with WORLD_SIZE = 4 it must be 1 to 4"),
    (TORCHRUN, {"MASTER_ADDR": None}, "MASTER_ADDR is not set, but RANK, WORLD_SIZE"),
    (TORCHRUN, {"MASTER_ADDR": " "}, "MASTER_ADDR is empty"),
    (TORCHRUN, {"MASTER_PORT": None}, "MASTER_PORT is not set, but RANK, WORLD_SIZE"),
    (TORCHRUN, {"MASTER_PORT": "http"}, "MASTER_PORT is 'http', not a number"),
    (TORCHRUN, {"MASTER_PORT": "65536"}, "MASTER_PORT is 65536, but it must be 1 to 65535"),
    ({"LOCAL_RANK": "1"}, {}, "RANK is not set, but LOCAL_RANK is"),
    (SLURM, {"SLURM_PROCID": None}, "SLURM_PROCID is not set, but SLURM_STEP_ID, SLURM_NTASKS, SLURM_LOCALID, SLURM_"),
    (SLURM, {"SLURM_PROCID": "one"}, "SLURM_PROCID is 'one', not a number"),
    (SLURM, {"SLURM_PROCID": "8"}, "SLURM_PROCID is 8, but with SLURM_NTASKS = 8 it must be 0 to 7"),
    (SLURM, {"SLURM_NTASKS": None}, "SLURM_NTASKS is not set, but"),
    (SLURM, {"SLURM_NTASKS": "many"}, "SLURM_NTASKS is 'many', not a number"),
    (SLURM, {"SLURM_LOCALID": None}, "SLURM_LOCALID is not set, but"),
    (SLURM, {"SLURM_LOCALID": "9"}, "SLURM_LOCALID is 9, but with SLURM_NTASKS = 8 it must be 0 to 7"),
    (SLURM, {"SLURM_JOB_ID": None, "MASTER_ADDR": "h"}, "SLURM_JOB_ID is not set, but"),
    (SLURM, {"SLURM_JOB_ID": "job", "MASTER_ADDR": "h"}, "SLURM_JOB_ID is 'job', not a number"),
    (SLURM, {"SLURM_JOB_NODELIST": None}, "SLURM_JOB_NODELIST is not set, but"),
    (SLURM, {"SLURM_JOB_NODELIST": "node[", "PATH": "/nowhere"}, "SLURM_JOB_NODELIST = 'node[': scontrol does not tel"),
    (SLURM, {"SLURM_CPUS_PER_TASK": "all"}, "SLURM_CPUS_PER_TASK is 'all', not a number"),
    (SLURM, {"SLURM_NTASKS": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_CPUS_PER_TASK": "0"}, "_TASK is 0"),
]


@pytest.mark.parametrize(("launcher", "changes", "message"), WRONG)
def test_impossible_variables(
    variables: pytest.MonkeyPatch, launcher: dict[str, str], changes: Given, message: str
) -> None:
    variables.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in (launcher | changes).items():
        if value is not None:
            variables.setenv(name, value)
    with pytest.raises(InputError) as info:
        environment("cpu").__enter__()
    assert message in str(info.value)
    assert "\n" not in str(info.value)
    assert len(str(info.value)) < 500


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"RANK": "0"},
            "error: the environment variable WORLD_SIZE is not set, but RANK is: start the processes with ",
        ),
        (
            {"RANK": "3", "WORLD_SIZE": "2"},
            "error: the environment variable RANK is 3, but with WORLD_SIZE = 2 it must",
        ),
        (
            {"SLURM_STEP_ID": "0"},
            "error: the environment variable SLURM_NTASKS is not set, but SLURM_STEP_ID is: start",
        ),
    ],
)
@pytest.mark.parametrize("module", ["spidr", "spidr.train", "spidr.extract"])
def test_command_lines_with_wrong_variables(tmp_path: Path, module: str, given: dict[str, str], message: str) -> None:
    """The real programs end at once, with one line and status 2."""
    manifest = write_recordings(tmp_path / "data", count=2)
    arguments = ["features", str(manifest), str(tmp_path / "out"), "--model=x", "--layer=1"]
    if module != "spidr.extract":
        arguments = [str(write_config(tmp_path, manifest))]
    others = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    path = os.pathsep.join(map(os.path.abspath, sys.path))
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        env=others | given | {"PYTHONPATH": path}, cwd=tmp_path,
        capture_output=True, text=True, timeout=250, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert next(line for line in done.stderr.splitlines() if line).startswith(message)
    assert len(done.stderr.split("\n")) <= 3
    assert sorted(path.name for path in tmp_path.iterdir()) in (["data"], ["data", "run.json"])


@pytest.mark.parametrize(("name", "module"), [("cuda", torch.cuda), ("mps", torch.backends.mps)])
def test_missing_device(name: str, module: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_available", lambda: False)
    with pytest.raises(InputError, match=f'run.device is "{name}".*use "auto" or "cpu"'):
        choose_device(name)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert choose_device("auto", 2) == torch.device("cuda", 2)
    assert choose_device("cuda", 5) == torch.device("cuda", 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert choose_device("auto") == torch.device("mps")


def test_one_process_needs_no_group(variables: pytest.MonkeyPatch) -> None:
    with environment("cpu") as env:
        assert (env.rank, env.world_size, env.is_main) == (0, 1, True)
        assert not torch.distributed.is_initialized()
        x = torch.tensor([1.0, 2.0])
        env.all_reduce(x)
        env.broadcast(x)
        assert x.tolist() == [1.0, 2.0]
        assert env.gather_objects("a") == ["a"]
        assert env.broadcast_object("a") == "a"


def test_stop_flag_remembers_the_first_signal() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)]
    with StopFlag().listening() as stop:
        assert stop.signum == 0
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signum == signal.SIGUSR2
    assert before == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)]


def test_stop_flag_may_end_the_process_at_once() -> None:
    with StopFlag().listening() as stop:
        stop.immediate = True
        with pytest.raises(Preempted) as preempted:
            os.kill(os.getpid(), signal.SIGTERM)
        assert (preempted.value.signum, preempted.value.code) == (signal.SIGTERM, 75)
        os.kill(os.getpid(), signal.SIGTERM)  # once: ending is not to be interrupted


@pytest.mark.parametrize("before", [[], [signal.SIGTERM]])
def test_second_ctrl_c_ends_at_once(before: list[signal.Signals], capsys: pytest.CaptureFixture[str]) -> None:
    with StopFlag().listening() as stop:
        for number in (*before, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert stop.signum == (*before, signal.SIGINT)[0]
        assert "press Ctrl-C again to stop at once" in capsys.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_nohup_is_respected() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopFlag().listening() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.signum == 0
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("name", ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE"])
def test_mpirun_is_refused(variables: pytest.MonkeyPatch, name: str) -> None:
    variables.setenv(name, "1")
    assert ranks() == (0, 0, 1)
    variables.setenv(name, "2")
    with pytest.raises(InputError, match=rf"{name} = 2: mpirun started several processes; use torchrun or srun"):
        ranks()


def test_draws_of_a_step_depend_on_its_arguments_only() -> None:
    def draw(*key: int) -> list[float]:
        seed_step(*key)
        return torch.rand(4).tolist()

    assert draw(0, 5, 1) == draw(0, 5, 1)
    draws = [draw(seed, step, rank) for seed in (0, 1, 2**62) for step in (0, 1, 65_537) for rank in (0, 1)]
    assert len({tuple(d) for d in draws}) == len(draws)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, r"1 of 2 processes have met at 127\.0\.0\.1:\d+ within 0:00:01; nothing was heard of rank 1"),
        (1, r"rank 1: the place .*, 127\.0\.0\.1:\d+, does not answer: rank 0 has not started"),
    ],
)
def test_process_that_never_comes(variables: pytest.MonkeyPatch, rank: int, message: str) -> None:
    for name, value in {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
        variables.setenv(name, value)
    variables.setenv("MASTER_PORT", str(free_port()))
    variables.setattr("spidr.environment.MEETING_TIMEOUT", timedelta(seconds=1))
    with pytest.raises(SystemExit, match=f"^\nerror: {message}"):
        environment("cpu").__enter__()


def test_port_that_is_taken(variables: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
            variables.setenv(name, value)
        variables.setenv("MASTER_PORT", str(listener.getsockname()[1]))
        with pytest.raises(SystemExit, match=r"cannot be opened .*in use"):
            environment("cpu").__enter__()
