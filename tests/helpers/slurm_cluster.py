"""A real SLURM on this machine for the tests: slurmctld, munged and one slurmd per node, all below one folder.

Needs Debian's packages slurm-wlm and munge, but no systemd, cgroups, database or GPU, nor any system configuration.
Nodes are called 127.0.0.1, 127.0.0.2, …, so that their names resolve; their GPUs are device files that exist
everywhere. A job of partition "high" preempts those of "main", the default, after GRACE seconds.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from helpers.ports import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")
SEARCH_PATH = os.environ["PATH"] + os.pathsep + "/usr/sbin"
GPU_FILES = ("/dev/null", "/dev/zero")
GRACE = 20

SLURM_CONF = """\
ClusterName=spidr
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
AuthType=auth/munge
CredType=cred/munge
# The credential's life is also how long a requeued job waits, and 5 is the least.
AuthInfo=socket={root}/munge.socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
MailProg=/bin/true
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
GresTypes=gpu
# Job ids must not repeat: submitit finds results by them.
FirstJobId={first_job}
MinJobAge=86400
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
CompleteWait=0
KillWait=5
ReturnToService=2
SlurmdParameters=config_overrides
PropagateResourceLimits=NONE
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE DefaultTime=60 DefMemPerCPU=100 State=UP
PartitionName=main Default=YES PriorityTier=1 GraceTime={grace}
PartitionName=high PriorityTier=10 PreemptMode=OFF
"""


def missing_programs() -> list[str]:
    """Programs that a cluster needs and that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=SEARCH_PATH) is None]


class Cluster:
    """The cluster, from ``with`` to the end of its block, when its jobs end too."""

    def __init__(self, root: Path, *, nodes: int = 2, cpus: int = 8) -> None:
        self.root = root
        self.nodes = [f"127.0.0.{index + 1}" for index in range(nodes)]
        self.cpus = cpus
        self.conf = root / "slurm.conf"
        # Without variables of an enclosing SLURM job.
        self.env = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "SUBMITIT"))}
        self.env |= {"SLURM_CONF": str(self.conf), "PATH": SEARCH_PATH}
        self._stack = ExitStack()

    def __enter__(self) -> Cluster:
        self._configure()
        munged = ["munged", "--foreground", "--force", f"--key-file={self.root}/munge.key"]
        munged += [
            f"--{name}={self.root}/munge.{name.split('-')[0]}"
            for name in ("socket", "pid-file", "log-file", "seed-file")
        ]
        with self._stack:  # if one daemon fails to start, ends the others
            self._stack.callback(self._end_steps)
            self._start(munged)
            self._until("munge", (self.root / "munge.socket").exists)
            self.start_controller()
            for node in self.nodes:
                self._start(["slurmd", "-D", "-N", node])
            self._until(
                "idle nodes",
                lambda: self.run("sinfo", "-hN", "-o", "%T").stdout.split() == ["idle"] * len(self.nodes) * 2,
            )
            self._stack.callback(self._end_jobs)
            self._stack = self._stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _configure(self) -> None:
        (self.root / "state").mkdir(parents=True)
        key = self.root / "munge.key"
        key.touch(mode=0o600)
        key.write_bytes(os.urandom(128))
        ports = _free_ports(1 + len(self.nodes))
        host = socket.gethostname().split(".")[0]
        text = SLURM_CONF.format(
            root=self.root,
            host=host,
            user=pwd.getpwuid(os.geteuid()).pw_name,
            ports=ports,
            first_job=1 + int(time.time()) % 60_000_000,
            grace=GRACE,
        )
        for node, port in zip(self.nodes, ports[1:], strict=True):
            (self.root / node).mkdir()
            text += f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={self.cpus} "
            text += f"RealMemory=64000 Gres=gpu:{len(GPU_FILES)} State=UNKNOWN Features=a100\n"
        if _resolves_to_loopback(host):  # otherwise the daemons listen on every address, behind munge's key
            text += "CommunicationParameters=NoInAddrAny,NoCtldInAddrAny\n"
        self.conf.write_text(text)
        gpus = [f"NodeName={node} Name=gpu File={file}\n" for node in self.nodes for file in GPU_FILES]
        (self.root / "gres.conf").write_text("AutoDetect=off\n" + "".join(gpus))
        (self.root / "cgroup.conf").write_text("CgroupPlugin=autodetect\n")

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        with (self.root / "daemons.out").open("ab") as log:
            process = subprocess.Popen(
                command, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._stack.callback(_end, process)
        return process

    def start_controller(self) -> None:
        """Start slurmctld, for the first time or again."""
        self._controller = self._start(["slurmctld", "-D"])
        self._until("slurmctld", lambda: "UP" in self.run("scontrol", "ping").stdout)

    def stop_controller(self) -> None:
        """Stop slurmctld: nothing can be submitted, running jobs continue."""
        _end(self._controller)

    def write_conf_without_controller(self, folder: Path) -> Path:
        """Write a slurm.conf for clients that find no controller."""
        [used] = re.findall(r"^SlurmctldPort=(\d+)$", self.conf.read_text(), re.MULTILINE)
        text = self.conf.read_text().replace(
            f"SlurmctldPort={used}", f"SlurmctldPort={_free_ports(1)[0]}\nMessageTimeout=2"
        )
        conf = folder / "slurm.conf"
        conf.write_text(text)
        return conf

    def _until(self, what: str, ready: Callable[[], bool], seconds: float = 30) -> None:
        if not wait_for(ready, seconds):
            logs = "\n".join(f"--- {path}\n{path.read_text()[-2000:]}" for path in self.root.glob("*.[lo][ou][gt]"))
            raise RuntimeError(f"no {what} after {seconds} s\n{logs}")

    def _end_jobs(self) -> None:
        self.run("scancel", "--user", pwd.getpwuid(os.geteuid()).pw_name)
        self._until("end of all jobs", lambda: not self.run("squeue", "-h").stdout)

    def _end_steps(self) -> None:
        """Kill leftovers of slurmd, recognised by this cluster's configuration."""
        mine = f"SLURM_CONF={self.conf}".encode()
        for pid, name, environment in _processes():
            started = name.startswith("slurmstepd") or any(each.startswith(b"SLURM_JOB_ID=") for each in environment)
            if started and mine in environment and pid != os.getpid():
                _kill(pid, signal.SIGKILL)

    def signal_tasks(self, job_id: str, signum: signal.Signals) -> None:
        """Send a signal to a job's tasks, as slurmd does, but without needing a controller."""
        mine = {f"SLURM_CONF={self.conf}".encode(), f"SLURM_JOB_ID={job_id}".encode()}
        for pid, _, environment in _processes():
            if mine <= environment and any(each.startswith(b"SLURM_PROCID=") for each in environment):
                _kill(pid, signum)

    def run(self, *command: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command that talks to this cluster."""
        options = {"env": self.env, "capture_output": True, "text": True, "timeout": 60} | options
        return subprocess.run(command, **options)

    def job(self, job_id: str) -> dict[str, str]:
        """SLURM's record of a job or an array's task (``12_0``): JobState, Restarts, NodeList, ExitCode, …"""
        shown = self.run("scontrol", "--oneliner", "show", "job", job_id).stdout
        return dict(word.split("=", 1) for word in shown.split() if "=" in word)

    def wait(self, job_id: str, *states: str, seconds: float = 60) -> dict[str, str]:
        """Wait until a job is in one of ``states`` (default: until it has ended)."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        if not wait_for(lambda: self.job(job_id).get("JobState") in (states or ended), seconds):
            raise RuntimeError(f"job {job_id} is not {states or ended} after {seconds} s: {self.job(job_id)}")
        return self.job(job_id)


def _processes() -> Iterator[tuple[int, str, set[bytes]]]:
    """Id, name and environment of every process that this one may inspect."""
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended, or belongs to another user
            environment = (process / "environ").read_bytes()
            yield int(process.name), (process / "comm").read_text(), set(environment.split(b"\0"))


def _kill(pid: int, signum: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signum)


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether a condition became true in time."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def is_running(pid: int | str) -> bool:
    """Whether a process exists and is not a zombie, which not every container's first process collects."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text("utf-8")
    except OSError:
        return False


def logs(folder: Path) -> str:
    """All output of a job's tasks and of SLURM."""
    return "\n".join(path.read_text() for path in sorted(folder.rglob("*.err")) + sorted(folder.glob("*.log")))


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _resolves_to_loopback(host: str) -> bool:
    try:
        return socket.gethostbyname(host).startswith("127.")
    except OSError:
        return False


def _free_ports(count: int) -> list[int]:
    found: set[int] = set()
    while len(found) < count:
        found.add(free_port())
    return list(found)
