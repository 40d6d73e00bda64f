"""Who a process is, what it computes on, how it hears that it must stop."""

from __future__ import annotations

import os
import signal
import socket
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from processes import free_port
from spidr.config import InputError, RunConfig
from spidr.environment import StopFlag, _ranks, choose_device, environment, seed_step

VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_ID", "SLURM_PROCID", "SLURM_LOCALID",
    "SLURM_NTASKS", "SLURM_JOB_ID", "SLURM_JOB_NODELIST",
)  # fmt: skip
SLURM = {
    "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "123456",
    "SLURM_JOB_NODELIST": "node[03-04]",
}  # fmt: skip


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No variable of any launcher is set, and none that is set in a test stays."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    return monkeypatch


def test_alone(variables: pytest.MonkeyPatch) -> None:
    assert _ranks() == (0, 0, 1)


def test_torchrun_comes_before_slurm(variables: pytest.MonkeyPatch) -> None:
    for name, value in {**SLURM, "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4"}.items():
        variables.setenv(name, value)
    assert _ranks() == (3, 1, 4)


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
    assert _ranks() == (5, 1, 8)
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("node03", str(20_000 + 123456 % 20_000))


def test_slurm_allocation_without_a_step_is_alone(variables: pytest.MonkeyPatch) -> None:
    for name, value in SLURM.items():
        if name != "SLURM_STEP_ID":
            variables.setenv(name, value)
    assert _ranks() == (0, 0, 1)


@pytest.mark.parametrize(("name", "module"), [("cuda", torch.cuda), ("mps", torch.backends.mps)])
def test_device_that_is_not_there(name: str, module: object, monkeypatch: pytest.MonkeyPatch) -> None:
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
    with environment(RunConfig("runs", "project", "name", device="cpu")) as env:
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
        environment(RunConfig("runs", "project", "name", device="cpu")).__enter__()


def test_place_that_is_taken(variables: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}.items():
            variables.setenv(name, value)
        variables.setenv("MASTER_PORT", str(listener.getsockname()[1]))
        with pytest.raises(SystemExit, match=r"cannot be opened .*in use"):
            environment(RunConfig("runs", "project", "name", device="cpu")).__enter__()
