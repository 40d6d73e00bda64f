"""SLURM jobs: submitting them, and what runs in them.

sbatch gets every setting as a separate argument, and a script in which everything is quoted, so no shell ever
interprets a user's text. In each task, :mod:`spidr.slurm.job` runs one pickled call; if it is told to stop, the script
requeues the job. Job folders follow submitit's layout: ``submitit.SlurmJob(FOLDER / "%j", JOB_ID).result()`` works.
"""

from spidr.slurm.launch import launch_with_submitit, slurm_config_parse_args
from spidr.slurm.presets import default_train_job_config, validation_job_config

__all__ = ["default_train_job_config", "launch_with_submitit", "slurm_config_parse_args", "validation_job_config"]
