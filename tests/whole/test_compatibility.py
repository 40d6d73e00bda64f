"""The names, signatures and files of 0.1.2."""

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import spidr.checkpoint
import spidr.config
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
from helpers.small_models import tiny_config, tiny_model
from spidr.config import OptimizerConfig, SlurmConfig, read_config, to_dict

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


@pytest.mark.parametrize(
    "name",
    [
        *("Config", "DataConfig", "DinoSRConfig", "MaskingConfig", "OptimizerConfig", "ResumeConfig", "RunConfig"),
        *("SlurmConfig", "SpidRConfig", "DEFAULT_CONV_LAYER_CONFIG", "MaskingStrategy", "ModelType", "SAMPLE_RATE"),
    ],
)
def test_names_of_the_configuration(name: str) -> None:
    assert hasattr(spidr.config, name)


def test_values_of_the_configuration() -> None:
    assert spidr.config.SAMPLE_RATE == 16_000
    expected = [(512, 10, 5), *[(512, 3, 2)] * 4, *[(512, 2, 2)] * 2]
    assert list(spidr.config.DEFAULT_CONV_LAYER_CONFIG) == expected
    assert SlurmConfig("account", 1, 2).gpus_per_node == 2
    fields = list(inspect.signature(spidr.config.ResumeConfig).parameters)
    assert fields == ["step", "checkpoint", "results"]


def test_no_function_of_the_data_package_hides_a_module() -> None:
    assert inspect.ismodule(spidr.data.write_manifest)


@pytest.mark.parametrize("attribute", ["last", "step", "epoch", "metrics"])
def test_attributes_of_a_checkpointer(attribute: str, tmp_path: Path) -> None:
    assert hasattr(spidr.checkpoint.Checkpointer(tmp_path, 10), attribute)


def test_a_run_configuration_is_valid_input(tmp_path: Path) -> None:
    """null for unset values, lists for tuples, every field present, an integer for a float."""
    (tmp_path / "config.toml").write_text(
        '[run]\nworkdir = "w"\nwandb_project = "p"\nwandb_name = "n"\n[data]\nmanifest = "m.csv"\n[optimizer]\nlr = 1\n'
    )
    config = read_config(tmp_path / "config.toml")
    assert config.run.model_type == "dinosr"
    document = to_dict(config)
    assert document["run"]["init_ckpt"] is None
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert read_config(tmp_path / "config.json") == config


def test_optimizer_of_a_foreign_model() -> None:
    """No prefix matches; there is always a scaler, enabled for float16 only."""
    model = torch.nn.Linear(3, 2)
    optimizer, scaler, scheduler = spidr.optimizer.build_optimizer(model, OptimizerConfig())
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 2
    assert not scaler.is_enabled()
    assert scheduler.get_last_lr()[0] == pytest.approx(5e-6)


def test_optimizer_groups() -> None:
    model = tiny_model()
    optimizer, _, _ = spidr.optimizer.build_optimizer(model, OptimizerConfig())
    frozen = [*model.feature_extractor.parameters(), *model.feature_projection.parameters()]
    assert [id(p) for p in optimizer.param_groups[1]["params"]] == [id(p) for p in frozen]
    rest = [p for name, p in model.named_parameters() if not name.startswith(("feature_", "teacher"))]
    assert [id(p) for p in optimizer.param_groups[0]["params"]] == [id(p) for p in rest]


def test_a_published_training_checkpoint_loads(tmp_path: Path) -> None:
    """Weights under ``model``, with or without ``module.``; beside it the whole configuration or the model's."""
    cfg = tiny_config()
    model = tiny_model()
    weights = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"model": weights, "epoch": 3, "step": 12}, tmp_path / "step_12.pt")
    (tmp_path / "config.json").write_text(json.dumps({"num_codebooks": 3, **tiny_table(cfg)}))
    loaded = spidr.models.build_model(model_type="spidr", checkpoint=tmp_path / "step_12.pt")
    assert loaded.cfg == cfg
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value)


def tiny_table(cfg: Any) -> dict[str, Any]:
    import dataclasses

    return json.loads(json.dumps(dataclasses.asdict(cfg)))
