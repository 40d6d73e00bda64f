"""Jobs on SLURM: what is submitted, and what runs in them.

sbatch gets every setting as an argument of its own and a script in which everything is quoted, so nothing that a user
writes is ever read by a shell. In each task, :mod:`spidr.slurm.job` runs one pickled call; when it is told to stop, the
script queues the job again. Job folders are submitit's: ``submitit.SlurmJob(FOLDER / "%j", JOB_ID).result()`` works.
"""

from spidr.slurm.launch import launch_with_submitit, slurm_config_parse_args
from spidr.slurm.presets import default_train_job_config, validation_job_config

__all__ = [
    "default_train_job_config",
    "launch_with_submitit",
    "slurm_config_parse_args",
    "validation_job_config",
]
