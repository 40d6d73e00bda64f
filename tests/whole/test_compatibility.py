"""The names, signatures and files of 0.1.2."""

import inspect
from pathlib import Path
from typing import Any

import pytest

import spidr.checkpoint
import spidr.data
import spidr.data.dataset
import spidr.data.masks
import spidr.data.write_manifest
import spidr.models
import spidr.models.dinosr
import spidr.models.metrics
import spidr.models.spidr
import spidr.optimizer
import spidr.slurm
import spidr.train
import spidr.validate
from spidr.config import read_config

# Parameters: "=" marks a default, "*" starts the keyword-only ones. More may follow.
SIGNATURES: list[tuple[Any, str]] = [
    (spidr.models.SpidR, "cfg="),
    (spidr.models.DinoSR, "cfg="),
    (spidr.models.build_model, "* cfg= model_type= checkpoint="),
    (spidr.models.spidr_base, "pretrained= check_hash= progress="),
    (spidr.models.dinosr_base_reproduced, "pretrained= check_hash= progress="),
    (spidr.models.dinosr_base_original, "pretrained= check_hash= progress="),
    (
        spidr.models.SpidR.get_intermediate_outputs,
        "self waveforms * attention_mask= lengths= num_layers= before_residual=",
    ),
    (spidr.models.SpidR.get_codebooks, "self waveform * attention_mask= lengths= num_layers= onehot="),
    (spidr.models.SpidR.forward, "self waveforms * mask= attention_mask= lengths="),
    (spidr.models.SpidR.update_ema, "self step"),
    (spidr.models.SpidR.freeze_extractor, "self"),
    (
        spidr.models.dinosr.Transformer.get_intermediate_outputs,
        "self x attention_mask= num_layers= * before_residual=",
    ),
    (spidr.models.metrics.perplexity, "y * tokenwise="),
    (
        spidr.models.metrics.units_quality,
        "data * num_units num_phones frame_step= alignment_step= eps=",
    ),
    (spidr.models.metrics.build_count_matrix, "data num_units num_phones repeat max_length_diff="),
    (
        spidr.models.metrics.proba_phone_code,
        "data * num_units num_phones only_active frame_step= alignment_step=",
    ),
    (spidr.models.metrics.bitrate, "* num_units sequences= frame_step="),
    (spidr.models.dinosr.ema_scheduler, "step start_decay final_decay final_step freeze_step"),
    (spidr.models.spidr.exp_ema_scheduler, "step start_decay timescale threshold"),
    (spidr.data.build_dataloader, "data_cfg mask_cfg * conv_layer_config="),
    (spidr.data.speech_dataset, "path * normalize"),
    (spidr.data.num_samples, "source * verify="),
    (spidr.data.read_manifest, "path"),
    (spidr.data.dataset.conv_length, "shapes lengths"),
    (spidr.data.masks.MaskGenerator.__call__, "self padding_mask * channels= generator="),
    (spidr.data.write_manifest.write_manifest, "dataset output file_extension="),
    (spidr.data.write_manifest.write_manifest_fairseq, "dataset output file_extension="),
    (spidr.data.write_manifest.write_manifest_tar, "dataset output file_extension="),
    (read_config, "path"),
    (spidr.optimizer.build_optimizer, "model cfg"),
    (spidr.train.train, "cfg"),
    (spidr.validate.validate, "model loader device"),
    (spidr.slurm.launch_with_submitit, "job_name jobs dump slurm * copy_code="),
    (spidr.checkpoint.Checkpointer, "folder interval keep_latest= * disable= start="),
    (spidr.checkpoint.Checkpointer.init_state, "self model optimizer scheduler scaler"),
    (spidr.checkpoint.Checkpointer.save, "self step epoch * force="),
    (spidr.checkpoint.Checkpointer.save_final, "self step epoch"),
    (spidr.checkpoint.Checkpointer.load, "self step"),
    (spidr.checkpoint.Checkpointer.load_existing_run, "self"),
    (spidr.checkpoint.Checkpointer.find_new_metrics, "self"),
]


@pytest.mark.parametrize(("function", "expected"), SIGNATURES, ids=lambda x: getattr(x, "__qualname__", None))
def test_signature(function: Any, expected: str) -> None:
    """As published; any other parameters must be optional."""
    positional, _, keyword = expected.partition("*")
    actual = inspect.signature(function).parameters
    for place, word in enumerate(positional.split()):
        name = word.removesuffix("=")
        parameter = list(actual.values())[place]
        if function is not spidr.slurm.launch_with_submitit:  # always called by position
            assert parameter.name == name
        assert parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
        assert (parameter.default is not parameter.empty) == word.endswith("=")
    for word in keyword.split():
        parameter = actual[word.removesuffix("=")]
        assert (parameter.default is not parameter.empty) == word.endswith("=")
    known = {word.removesuffix("=") for word in f"{positional} {keyword}".split()}
    if function is not spidr.slurm.launch_with_submitit:
        further = [parameter for name, parameter in actual.items() if name not in known]
        assert all(parameter.default is not parameter.empty for parameter in further)


def test_no_function_of_the_data_package_hides_a_module() -> None:
    assert inspect.ismodule(spidr.data.write_manifest)


@pytest.mark.parametrize("attribute", ["last", "step", "epoch", "metrics"])
def test_attributes_of_a_checkpointer(attribute: str, tmp_path: Path) -> None:
    assert hasattr(spidr.checkpoint.Checkpointer(tmp_path, 10), attribute)
