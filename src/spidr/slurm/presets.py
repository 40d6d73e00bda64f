"""Default SLURM settings for known clusters and validation jobs."""

import os
from pathlib import Path
from typing import Any

from spidr.config import SlurmConfig
from spidr.tools.errors import InputError
from spidr.tools.untrusted import read_table

KEYS = ("time", "cpus_per_task", "mem_per_gpu", "constraint", "partition", "qos")


def default_train_job_config(cluster_name: str | None) -> dict[str, Any]:
    """The SLURM settings of a cluster; none without a name.

    ``$SPIDR_CLUSTERS_FILE`` (default ``~/.config/spidr/clusters.toml``) overrides the package's ``clusters.toml``.
    Raises InputError if no file has a table of that name, or it has a wrong setting.
    """
    if not cluster_name:
        return {}
    given = os.environ.get("SPIDR_CLUSTERS_FILE")
    own = Path(given or "~/.config/spidr/clusters.toml").expanduser()
    tables = read_table(Path(__file__).with_name("clusters.toml"))
    for cluster, table in (read_table(own) if given or own.exists() else {}).items():
        if not isinstance(table, dict):
            raise InputError(f"{own}: {cluster}: found {table!r}, accepted: a table [{cluster}] of SLURM settings")
        tables[cluster] = tables.get(cluster, {}) | table
    if cluster_name not in tables:
        known = ", ".join(sorted(tables))
        raise InputError(f"SPIDR_CLUSTER: no cluster {cluster_name!r} in {own}; known: {known}")
    preset: dict[str, Any] = tables[cluster_name]
    if unknown := preset.keys() - set(KEYS):
        raise InputError(f"{own}: {cluster_name}.{min(unknown)}: unknown key, accepted: {', '.join(KEYS)}")
    try:
        SlurmConfig(nodes=1, gpus_per_node=1, **preset)
    except InputError as error:
        raise InputError(f"{own}: [{cluster_name}]: {error}") from None
    return dict.fromkeys(KEYS[:4]) | preset


def validation_job_config() -> SlurmConfig:
    """An hour of one GPU, with the account and the CPUs of this process's job. Raises InputError outside a job."""
    if "SLURM_JOB_ID" not in os.environ:
        raise InputError("not in a SLURM job: set run.slurm_validation to the resources of validation jobs")
    account, cpus = os.environ.get("SLURM_JOB_ACCOUNT"), os.environ.get("SLURM_CPUS_PER_TASK")
    return SlurmConfig(account, nodes=1, gpus_per_node=1, time=60, cpus_per_task=int(cpus) if cpus else None)
