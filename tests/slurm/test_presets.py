"""Default settings for known clusters, as in the published package."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from spidr.slurm import default_train_job_config, slurm_config_parse_args


def test_known_clusters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("SPIDR_CLUSTERS_FILE", raising=False)
    names = ("time", "cpus_per_task", "mem_per_gpu", "constraint")
    published = {
        "JZ_V100": (1200, 10, None, None),
        "JZ_A100": (1200, 8, None, "a100"),
        "JZ_H100": (1200, 24, None, "h100"),
        "FAIR_AWS_A100": (4320, 12, "80g", None),
    }
    for cluster, values in published.items():
        assert default_train_job_config(cluster) == dict(zip(names, values, strict=True))
    assert default_train_job_config(None) == {}
    with pytest.raises(ValueError, match="no cluster 'x'"):
        default_train_job_config("x")


def test_settings_of_a_command_line() -> None:
    args = Namespace(account=None, nodes=2, gpus_per_node=4, time=60, qos=None, configs=["c.toml"], dump="jobs")
    slurm = slurm_config_parse_args(args)
    assert dict(slurm) == {"nodes": 2, "gpus_per_node": 4, "time": 60}
    assert (slurm["nodes"], slurm["account"]) == (2, None)
