"""Configurations: what is read, what is written, and one clear error for anything else."""

import dataclasses
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from spidr.config import (
    DEFAULT_CONV_LAYER_CONFIG,
    SAMPLE_RATE,
    Config,
    DataConfig,
    DinoSRConfig,
    MaskingConfig,
    MaskingStrategy,
    ModelType,
    OptimizerConfig,
    ResumeConfig,
    RunConfig,
    SlurmConfig,
    SpidRConfig,
    model_config,
    read_config,
    schedule_remark,
    to_dict,
)
from spidr.tools.errors import InputError

CONFIGS = Path(__file__).parents[1] / "configs"
MINIMAL: dict[str, Any] = {
    "run": {"workdir": "runs", "wandb_project": "speech", "wandb_name": "first", "model_type": "spidr"},
    "data": {"manifest": "train.csv"},
}


def document(**sections: dict[str, Any]) -> dict[str, Any]:
    """The smallest configuration with some keys added or replaced; None is written as null."""
    return {name: MINIMAL.get(name, {}) | sections.get(name, {}) for name in MINIMAL | sections}


@pytest.fixture
def write(tmp_path: Path):
    def write(content: dict[str, Any] | str | bytes, name: str = "config.json") -> Path:
        path = tmp_path / name
        if isinstance(content, dict):
            content = json.dumps(content)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return write


def problems(path: Path) -> list[str]:
    """The error's lines, `key: text`; every error must name the file."""
    with pytest.raises(InputError) as info:
        read_config(path)
    message = str(info.value)
    assert message.startswith(f"{path}: ")
    first, *rest = message.removeprefix(f"{path}: ").split("\n")
    assert first == f"{len(rest)} problems" if rest else first
    return [line.strip() for line in rest] or [first]


# ---------------------------------------------------------------------------------------------------------- reading


def test_smallest_toml(write) -> None:
    path = write('[run]\nworkdir = "w"\nwandb_project = "p"\nwandb_name = "n"\n[data]\nmanifest = "m.csv"\n', "c.toml")
    config = read_config(path)
    assert config.run == RunConfig("w", "p", "n")
    assert config.run.dir == Path("w/p/n")
    assert config.data == DataConfig("m.csv")
    assert type(config.model) is DinoSRConfig  # as published
    assert config.model == DinoSRConfig()
    assert (config.optimizer, config.masking, config.validation) == (OptimizerConfig(), MaskingConfig(), {})
    assert config.model_given is None


def test_published_defaults() -> None:
    """The names and defaults of existing configuration files: changing one changes people's training."""
    assert dataclasses.asdict(DataConfig("m")) == {
        "manifest": "m",
        "enable_padding": False,
        "rand_crop": True,
        "normalize": True,
        "num_buckets": 1000,
        "min_sample_size": 2000,
        "max_sample_size": 320000,
        "max_batch_length": 3800000,
        "drop_last": False,
        "num_workers": 10,
        "pin_memory": False,
        "prefetch_factor": 2,
        "persistent_workers": True,
        "random_seed": 0,
        "bucket_method": "uniform",
        "alignments_path": None,
        "global_batch_length": None,
        "on_error": "raise",
        "weights": None,
        "length_multiple": 1,
        "distinct_epochs": 0,
        "cache": False,
    }
    assert dataclasses.asdict(OptimizerConfig()) == {
        "lr": 5e-4,
        "betas": (0.9, 0.95),
        "weight_decay": 0.01,
        "eps": 1e-6,
        "max_norm": 10.0,
        "dtype": "bfloat16",
        "init_lr_scale": 0.01,
        "final_lr_scale": 0.01,
        "max_steps": 400000,
        "warmup_steps": 12000,
        "hold_steps": 188000,
        "decay_steps": 200000,
        "rsqrt_timescale": 10000,
        "rsqrt_shift": 0,
        "scheduler": "tristage",
        "exclude_from_optimizer": ["teacher"],
        "to_freeze": ["feature_extractor", "feature_projection"],
    }
    dinosr = {
        "extractor_mode": "layer_norm",
        "extractor_conv_bias": False,
        "extractor_conv_layer_config": [(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2,
        "encoder_embed_dim": 768,
        "encoder_projection_dropout": 0.0,
        "encoder_pos_conv_kernel": 95,
        "encoder_pos_conv_groups": 16,
        "encoder_pos_conv_depth": 5,
        "encoder_num_layers": 12,
        "encoder_num_heads": 12,
        "encoder_attention_dropout": 0.1,
        "encoder_ff_interm_features": 3072,
        "encoder_ff_interm_dropout": 0.0,
        "encoder_dropout": 0.1,
        "encoder_layer_norm_first": False,
        "encoder_layer_drop": 0.05,
        "encoder_qkv_bias": False,
        "codebook_size": 256,
        "codebook_decay": 0.9,
        "num_codebooks": 8,
        "ema_start_decay": 0.999,
        "ema_final_decay": 0.9999,
        "ema_final_step": 30000,
        "ema_exclude_layers": ["pos_conv_embed"],
        "freeze_step": 200000,
        "codebook_init": "random",
        "codebook_revive_after": 0,
        "reset": "none",
    }
    assert dataclasses.asdict(DinoSRConfig()) == dinosr
    assert dataclasses.asdict(SpidRConfig()) == dinosr | {
        "encoder_layer_drop": 0.0,
        "ema_timescale": 20000,
        "ema_threshold": 1e-7,
        "train_layers": None,
    }
    assert dataclasses.asdict(MaskingConfig()) == {
        "mask_prob": 0.8,
        "mask_selection": "static",
        "mask_other": 0.0,
        "mask_length": 10,
        "no_mask_overlap": False,
        "mask_min_space": 1,
        "mask_channel_prob": 0.0,
        "mask_channel_selection": "static",
        "mask_channel_other": 0.0,
        "mask_channel_length": 10,
        "no_mask_channel_overlap": False,
        "mask_channel_min_space": 1,
    }
    assert dataclasses.asdict(RunConfig("w", "p", "n")) == {
        "workdir": "w",
        "wandb_project": "p",
        "wandb_name": "n",
        "wandb_mode": "offline",
        "random_seed": 0,
        "use_deterministic": False,
        "log_interval": 200,
        "save_interval": 2500,
        "init_ckpt": None,
        "compile": True,
        "keep_latest": -1,
        "model_type": "dinosr",
        "slurm_validation": None,
        "device": "auto",
        "profile": False,
        "collapse_share": 0.1,
        "collapse_steps": 1000,
    }
    assert DinoSRConfig().extractor_conv_layer_config == DEFAULT_CONV_LAYER_CONFIG
    assert SAMPLE_RATE == 16_000
    assert get_args(ModelType) == ("spidr", "dinosr")
    assert get_args(MaskingStrategy) == ("static", "uniform", "normal", "poisson")
    assert ResumeConfig(step=1, checkpoint="c", results="r").step == 1
    assert " ".join(f.name for f in dataclasses.fields(SlurmConfig)) == (
        "account nodes gpus_per_node qos time cpus_per_task mem_per_gpu constraint partition"
    )
    assert OptimizerConfig(dtype="float32").mixed_precision is False
    assert OptimizerConfig(dtype="float16").mixed_precision is True


def test_defaults_are_not_shared() -> None:
    DinoSRConfig().extractor_conv_layer_config.append((1, 1, 1))
    assert DinoSRConfig().extractor_conv_layer_config == DEFAULT_CONV_LAYER_CONFIG


@pytest.mark.parametrize(("model_type", "expected"), [("spidr", SpidRConfig), ("dinosr", DinoSRConfig)])
def test_model_class_follows_model_type(write, model_type: str, expected: type) -> None:
    config = read_config(write(document(run={"model_type": model_type}, model={"encoder_num_layers": 9})))
    assert type(config.model) is expected
    assert config.model.encoder_num_layers == 9
    assert config.model_given == {"encoder_num_layers"}


def test_model_given(write) -> None:
    """Without a [model] table, the initial checkpoint's model is used, so an empty table is not a missing one."""
    config = read_config(write(document()))
    assert config.model_given is None
    assert dataclasses.replace(config, run=dataclasses.replace(config.run, wandb_name="b")).model_given is None
    assert read_config(write(MINIMAL | {"model": None})).model_given is None
    assert read_config(write(document(model={}))).model_given == frozenset()
    built = Config(RunConfig("w", "p", "n"), DataConfig("m"), DinoSRConfig())
    assert built.model_given is not None
    assert "encoder_num_layers" in built.model_given


def test_json_writes_null_lists_and_integers(write) -> None:
    config = read_config(
        write(
            MINIMAL
            | {
                "run": MINIMAL["run"] | {"init_ckpt": None, "slurm_validation": None},
                "optimizer": {"lr": 1, "betas": [0, 0.5], "to_freeze": []},
                "model": {"extractor_conv_layer_config": [[16, 10, 5], [16, 3, 2]]},
                "masking": None,
                "validation": None,
            }
        )
    )
    assert config.run.init_ckpt is None
    assert config.optimizer == OptimizerConfig(lr=1.0, betas=(0.0, 0.5), to_freeze=[])
    assert isinstance(config.optimizer.lr, float)
    assert isinstance(config.optimizer.betas, tuple)
    assert config.model.extractor_conv_layer_config == [(16, 10, 5), (16, 3, 2)]
    assert config.masking == MaskingConfig()


def test_nested_tables(write) -> None:
    path = write(
        """
        [run]
        workdir = "runs"
        wandb_project = "speech"
        wandb_name = "first"
        slurm_validation = { account = "abc", nodes = 1, gpus_per_node = 2, time = 60 }
        [data]
        manifest = "train.csv"
        [validation.dev-clean]
        manifest = "dev-clean.csv"
        [validation.dev-other]
        manifest = "dev-other.csv"
        enable_padding = true
        """,
        "c.toml",
    )
    config = read_config(str(path))
    assert config.run.slurm_validation == SlurmConfig("abc", 1, 2, time=60)
    assert config.validation == {
        "dev-clean": DataConfig("dev-clean.csv"),
        "dev-other": DataConfig("dev-other.csv", enable_padding=True),
    }


@pytest.mark.parametrize("name", ["example", "spidr-base", "dinosr-base"])
def test_shipped_configurations(name: str, caplog: pytest.LogCaptureFixture) -> None:
    config = read_config(CONFIGS / f"{name}.toml")
    assert not caplog.records
    if name == "example":
        assert config.model == SpidRConfig()
        return
    # The defaults are the paper's recipes; the files write them out and fix the global batch.
    assert config.model == (SpidRConfig() if name == "spidr-base" else DinoSRConfig())
    assert config.optimizer == OptimizerConfig()
    assert config.masking == MaskingConfig()
    assert config.data.global_batch_length == 60_800_000 == 16 * config.data.max_batch_length
    assert config.data == dataclasses.replace(
        DataConfig(config.data.manifest), global_batch_length=config.data.global_batch_length
    )


# ------------------------------------------------------------------------------------------------------- round trip


def strategy(model: type[DinoSRConfig]) -> st.SearchStrategy[Config]:
    probability = st.floats(0, 1) | st.sampled_from([0, 1])
    name = st.text(
        st.characters(exclude_characters="/\\\0", exclude_categories=["Cs"]), min_size=1, max_size=20
    ).filter(lambda s: s not in (".", "..", "train"))
    data = st.builds(
        DataConfig,
        manifest=name,
        min_sample_size=st.integers(0, 100),
        max_sample_size=st.integers(100, 1000),
        max_batch_length=st.integers(1000, 2**31 - 1),
        global_batch_length=st.none() | st.integers(1, 10**10),
        alignments_path=st.none() | name,
        bucket_method=st.sampled_from(["uniform", "percentile"]),
    )
    return st.builds(
        Config,
        run=st.builds(
            RunConfig,
            workdir=name,
            wandb_project=name,
            wandb_name=name,
            model_type=st.just("spidr" if model is SpidRConfig else "dinosr"),
            init_ckpt=st.none() | name,
            slurm_validation=st.none()
            | st.builds(SlurmConfig, name, st.just(1), st.integers(1, 8), qos=st.none() | name),
        ),
        data=data,
        model=st.builds(
            model,
            encoder_dropout=probability,
            ema_start_decay=probability,
            extractor_conv_layer_config=st.lists(st.tuples(*[st.integers(1, 9)] * 3), min_size=1, max_size=9),
            ema_exclude_layers=st.lists(name),
        ),
        optimizer=st.builds(OptimizerConfig, lr=st.floats(0, 1e300), betas=st.tuples(st.floats(0, 0.5), st.just(0.5))),
        validation=st.dictionaries(name, data, max_size=2),
    )


@pytest.mark.parametrize("model", [SpidRConfig, DinoSRConfig])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_is_written_is_read_back(tmp_path: Path, model: type[DinoSRConfig], data: st.DataObject) -> None:
    config = data.draw(strategy(model))
    as_dict = to_dict(config)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(as_dict, allow_nan=False))
    again = read_config(path)
    assert again == config
    assert type(again.model) is model
    assert to_dict(again) == as_dict == json.loads(path.read_text())
    assert "model_given" not in as_dict
    assert again.model_given == as_dict["model"].keys()
    assert json.loads(json.dumps(dataclasses.asdict(config))) == {**json.loads(json.dumps(dataclasses.asdict(again)))}


# ----------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("section", "values", "expected"),
    [
        ("run", {"wandb_nmae": "x"}, "run.wandb_nmae: unknown key, did you mean wandb_name?"),
        ("run", {"wandb_project": "../elsewhere"}, "run.wandb_project: found '../elsewhere', accepted: a string that"),
        ("run", {"wandb_name": ".."}, "run.wandb_name: found '..', accepted"),
        ("run", {"wandb_name": ""}, "run.wandb_name: found '', accepted"),
        ("run", {"wandb_name": "a\\b"}, "run.wandb_name: found"),
        ("run", {"wandb_name": "x" * 256}, "run.wandb_name: found"),
        ("run", {"workdir": "a\0b"}, "run.workdir: found"),
        ("run", {"workdir": "\ud800"}, "run.workdir: found"),
        ("run", {"compile": 1}, "run.compile: found 1, accepted: true or false"),
        ("run", {"random_seed": True}, "run.random_seed: found true, accepted: an integer of at least 0"),
        ("run", {"random_seed": 10**30}, "run.random_seed: found 1000"),
        ("run", {"random_seed": None}, "run.random_seed: found null, accepted: an integer"),
        ("run", {"log_interval": 0}, "run.log_interval: found 0, accepted: an integer of at least 1"),
        ("run", {"model_type": "spider"}, "run.model_type: found 'spider', accepted: 'spidr' or 'dinosr'"),
        ("run", {"model_type": ["spidr"]}, "run.model_type: found ['spidr'], accepted"),
        ("run", {"wandb_mode": "on"}, "run.wandb_mode: found 'on', accepted: 'online', 'offline' or 'disabled'"),
        ("run", {"slurm_validation": 3}, "run.slurm_validation: found 3, accepted: a table"),
        ("data", {"manifest": 3}, "data.manifest: found 3, accepted: a string that is not empty"),
        ("data", {"max_sample_size": 5e3}, "data.max_sample_size: found 5000.0, accepted: an integer of at least 1"),
        ("data", {"max_batch_length": 100_000}, "data.max_sample_size: must fit in max_batch_length (found max_sample"),
        ("data", {"min_sample_size": 400_000}, "data.min_sample_size: must not exceed max_sample_size (found min_samp"),
        ("data", {"min_sample_size": -1}, "data.min_sample_size: found -1, accepted: an integer of at least 0"),
        ("data", {"global_batch_length": 0}, "data.global_batch_length: found 0, accepted: an integer of at least 1"),
        (
            "data",
            {"global_batch_length": 10**12},
            "data.global_batch_length: found 1000000000000, accepted: an integer",
        ),
        ("optimizer", {"lr": "fast"}, "optimizer.lr: found 'fast', accepted: a finite number of at least 0"),
        ("optimizer", {"lr": float("nan")}, "optimizer.lr: found nan, accepted: a finite number"),
        ("optimizer", {"max_norm": float("inf")}, "optimizer.max_norm: found inf, accepted: a finite number above 0"),
        ("optimizer", {"lr": 10**400}, "optimizer.lr: found 1000"),
        ("optimizer", {"betas": [0.9]}, "optimizer.betas: found [0.9], accepted: a list of 2, each a finite number"),
        ("optimizer", {"betas": [0.9, 1.0]}, "optimizer.betas: found [0.9, 1.0], accepted: a list of 2"),
        ("optimizer", {"betas": 0.9}, "optimizer.betas: found 0.9, accepted: a list of 2"),
        ("optimizer", {"dtype": "fp16"}, "optimizer.dtype: found 'fp16', accepted: 'float32', 'float16' or 'bfloat16'"),
        (
            "optimizer",
            {"to_freeze": "teacher"},
            "optimizer.to_freeze: found 'teacher', accepted: a list, each a string",
        ),
        ("optimizer", {"decay_steps": 0}, "optimizer.decay_steps: must be at least 1 with the tristage scheduler"),
        (
            "model",
            {"encoder_num_heads": 7},
            "model.encoder_num_heads: must divide encoder_embed_dim (found encoder_num",
        ),
        ("model", {"encoder_pos_conv_groups": 7}, "model.encoder_pos_conv_groups: must divide encoder_embed_dim"),
        (
            "model",
            {"num_codebooks": 13},
            "model.num_codebooks: must not exceed encoder_num_layers (found num_codebooks",
        ),
        ("model", {"encoder_num_heads": 0}, "model.encoder_num_heads: found 0, accepted: an integer of at least 1"),
        (
            "model",
            {"encoder_dropout": 1.5},
            "model.encoder_dropout: found 1.5, accepted: a finite number between 0 and",
        ),
        ("model", {"extractor_conv_layer_config": []}, "model.extractor_conv_layer_config: found [], accepted: a list"),
        ("model", {"extractor_conv_layer_config": [[1, 2]]}, "model.extractor_conv_layer_config: found [[1, 2]], acc"),
        ("masking", {"mask_prob": 0}, "masking.mask_prob: found 0, accepted: a finite number in (0, 1]"),
        ("masking", {"mask_prob": 1.1}, "masking.mask_prob: found 1.1, accepted"),
        ("masking", {"mask_selection": "uniform", "mask_other": 21}, "masking.mask_selection: uniform draws lengths"),
        ("validation", {"dev": {}}, "validation.dev.manifest: missing, required: a string that is not empty"),
        ("validation", {"dev": "dev.csv"}, "validation.dev: found 'dev.csv', accepted: a table"),
        (
            "validation",
            {"a/..": {"manifest": "m"}},
            "validation.'a/..': found 'a/..', accepted: a string that can name",
        ),
        ("run", {"wandb_name": "/a"}, "run.wandb_name: found '/a', accepted: a string that can name a folder inside"),
        ("model", {"codebook_decay": 9}, "model.codebook_decay: found 9, accepted: a finite number between 0 and 1"),
        ("validation", {"train": {"manifest": "m"}}, "validation.train: found 'train', accepted"),
        ("optimiser", {}, "optimiser: unknown key, did you mean optimizer?"),
        ("nothing", {}, "nothing: unknown key, accepted: run, data, model, optimizer, masking, validation"),
        ("model_given", {}, "model_given: unknown key"),
    ],
)
def test_one_problem(write, section: str, values: dict[str, Any], expected: str) -> None:
    (found,) = problems(write(document(**{section: values})))
    assert found.startswith(expected)


SIZES = {
    "data": (
        "num_buckets", "min_sample_size", "max_sample_size", "max_batch_length", "num_workers", "prefetch_factor",
    ),
    "model": (
        "encoder_embed_dim", "encoder_pos_conv_kernel", "encoder_pos_conv_groups", "encoder_pos_conv_depth",
        "encoder_num_layers", "encoder_num_heads", "encoder_ff_interm_features", "codebook_size", "num_codebooks",
    ),
    "masking": (
        "mask_length", "mask_other", "mask_min_space", "mask_channel_length", "mask_channel_other",
        "mask_channel_min_space",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("section", "key"), [(section, key) for section, keys in SIZES.items() for key in keys])
@pytest.mark.parametrize("size", [2**31, 10**12])
def test_absurd_sizes(write, section: str, key: str, size: int) -> None:
    (found,) = problems(write(document(**{section: {key: size}})))
    assert re.match(rf"{section}\.{key}: found {size}, accepted: .* (at most|and) [\d,]+$", found)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_absurd_convolutions(write, at: int) -> None:
    shape = [16, 10, 5]
    shape[at] = 10**9
    (found,) = problems(write(document(model={"extractor_conv_layer_config": [shape]})))
    assert found.startswith("model.extractor_conv_layer_config: found [[")
    assert found.endswith("at most 65,536 with 1 to 100 layers")
    (found,) = problems(write(document(model={"extractor_conv_layer_config": [[16, 1, 1]] * 101})))
    assert found.startswith("model.extractor_conv_layer_config: found [[")


def test_setting_of_the_other_model(write) -> None:
    (found,) = problems(write(document(run={"model_type": "dinosr"}, model={"ema_timescale": 100})))
    assert found == "model.ema_timescale: unknown key for run.model_type 'dinosr': it is a setting of 'spidr'"


@pytest.mark.parametrize("section", ["run", "data", "model", "optimizer", "validation"])
@pytest.mark.parametrize("value", [3, "text", [1], True])
def test_section_must_be_a_table(write, section: str, value: object) -> None:
    (found,) = problems(write(MINIMAL | {section: value}))
    assert found.startswith(f"{section}: found ")
    assert found.endswith(", accepted: a table")


def test_missing_sections(write) -> None:
    assert problems(write("{}")) == ["run: missing, required: a table", "data: missing, required: a table"]


def test_all_problems_at_once(write) -> None:
    found = problems(
        write(
            document(
                run={"wandb_name": 3, "logg_interval": 3, "slurm_validation": {"acount": "a", "nodes": 0}},
                data={"min_sample_size": 10**6, "rand_crop": "yes"},
                model={"encoder_num_heads": 7, "codebook_size": "big", "num_codebooks": 100},
                optimizer={"lr": -1, "scheduler": "linear"},
                validation={"dev": {"manifst": "m"}},
            )
        )
    )
    assert {line.split(": ")[0] for line in found} == set(
        re.findall(
            r"\S+",
            """run.wandb_name run.logg_interval run.slurm_validation.acount
        run.slurm_validation.nodes run.slurm_validation.gpus_per_node data.min_sample_size data.rand_crop
        model.encoder_num_heads model.codebook_size model.num_codebooks optimizer.lr optimizer.scheduler
        validation.dev.manifst validation.dev.manifest""",
        )
    )
    assert len(found) == 14


def test_a_rule_waits_for_valid_fields(write) -> None:
    """A combination is not reported if one of its values already is."""
    assert len(problems(write(document(model={"encoder_embed_dim": "wide", "encoder_num_heads": 7})))) == 1


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("c.toml", "[run]\nworkdir = \n", "not valid TOML: Invalid value (at line 2, column 11)"),
        ("c.toml", "[run]\na = 1\na = 2\n", "not valid TOML: Cannot overwrite a value (at line 3, column 6)"),
        ("c.toml", "[run]\n[run]\n", "not valid TOML: Cannot declare"),
        ("c.toml", "\n[run]\nworkdir = '\xff'\n".encode("latin-1"), "not UTF-8 text (line 3: byte 0xff)"),
        ("c.toml", b"a = \x00", "not valid TOML"),
        ("c.toml", "a = " + "[" * 10_000 + "]" * 10_000, "not valid TOML: nested too deeply"),
        ("c.json", "[" * 100_000 + "]" * 100_000, "not valid JSON: nested too deeply"),
        ("c.json", '{"run": {"a": 1, "a": 2}}', "not valid JSON: duplicate key a"),
        ("c.json", '{"run": \n oops}', "not valid JSON: Expecting value: line 2 column 2"),
        ("c.json", '{"a": 1' + "0" * 5000 + "}", "not valid JSON: Exceeds the limit"),
        ("c.json", "[1]", "found [1], accepted: an object of sections"),
        ("c.json", "", "not valid JSON: Expecting value"),
        ("c.json", " " * (2**20 + 1), "larger than 1 MiB, so no configuration"),
    ],
)
def test_unparsable(write, name: str, content: str | bytes, expected: str) -> None:
    (found,) = problems(write(content, name))
    assert found.startswith(expected)


def test_a_number_too_long_for_python_to_print(write) -> None:
    found = problems(write("[optimizer]\nlr = 0x" + "f" * 5000, "c.toml"))
    assert any(line.startswith("optimizer.lr: found 0xffff") and len(line) < 200 for line in found)


def test_unreadable(tmp_path: Path) -> None:
    assert problems(tmp_path) == ["cannot be read (it is a folder, not a file)"]
    assert problems(tmp_path / "missing.toml") == ["cannot be read (No such file or directory)"]
    with pytest.raises(InputError, match="null"):
        read_config("a\0b")


def test_deep_values_are_shortened(write) -> None:
    """The parser nests dotted keys without recursion, so showing the value must not recurse either."""
    (found, *_) = problems(write("data.manifest" + ".a" * 5000 + " = 1", "c.toml"))
    assert len(found) < 500
    assert len(problems(write(document(data={"x" * 10_000: "y" * 10_000})))[0]) < 1000


def test_byte_order_mark(write) -> None:
    assert read_config(write(b"\xef\xbb\xbf" + json.dumps(MINIMAL).encode())).data.manifest == "train.csv"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_value_is_accepted_or_named(tmp_path: Path, data: st.DataObject) -> None:
    section, cls = data.draw(
        st.sampled_from(
            [
                ("run", RunConfig),
                ("data", DataConfig),
                ("model", SpidRConfig),
                ("optimizer", OptimizerConfig),
                ("masking", MaskingConfig),
            ]
        )
    )
    key = data.draw(st.sampled_from([f.name for f in dataclasses.fields(cls)]) | st.text(max_size=10))
    value = data.draw(json_values)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(document(**{section: {key: value}})))
    try:
        config = read_config(path)
    except InputError as error:
        assert str(error).startswith(f"{path}: ")  # noqa: PT017
    else:
        stored = getattr(getattr(config, section), key)
        assert json.loads(json.dumps(stored)) == value
        assert isinstance(stored, bool) == isinstance(value, bool)


# ------------------------------------------------------------------------------------------------- built in Python


def test_python_is_checked_too() -> None:
    with pytest.raises(InputError, match=r"^SpidRConfig: encoder_num_heads: must divide encoder_embed_dim"):
        SpidRConfig(encoder_num_heads=5)
    with pytest.raises(InputError, match=r"^OptimizerConfig: lr: found -1, accepted: a finite number of at least 0$"):
        OptimizerConfig(lr=-1)
    with pytest.raises(InputError, match=r"run\.model_type"):
        Config(RunConfig("w", "p", "n", model_type="spidr"), DataConfig("m"), DinoSRConfig())
    with pytest.raises(TypeError, match="manifest"):
        DataConfig()  # type: ignore[call-arg]
    with pytest.raises(dataclasses.FrozenInstanceError):
        DataConfig("m").manifest = "n"  # type: ignore[misc]


def test_help_is_deterministic() -> None:
    assert " at 0x" not in f"{inspect.signature(DataConfig)} {inspect.signature(SpidRConfig)}"


def test_python_takes_tuples_and_lists() -> None:
    layers = ((16, 10, 5), (16, 3, 2))
    assert DinoSRConfig(extractor_conv_layer_config=layers) == DinoSRConfig(  # type: ignore[arg-type]
        extractor_conv_layer_config=[[*layer] for layer in layers]  # type: ignore[misc]
    )
    assert OptimizerConfig(betas=[0, 0.5]).betas == (0.0, 0.5)  # type: ignore[arg-type]


def test_model_config() -> None:
    assert model_config("spidr", {"codebook_size": 12}) == SpidRConfig(codebook_size=12)
    assert type(model_config("dinosr", {})) is DinoSRConfig
    with pytest.raises(InputError, match=r"^model: model_type: found 'x', accepted: 'spidr' or 'dinosr'$"):
        model_config("x", {})
    with pytest.raises(InputError, match=r"^c\.json: codebok_size: unknown key, did you mean codebook_size\?$"):
        model_config("dinosr", {"codebok_size": 3}, source="c.json")


def test_a_system_that_does_not_report_its_memory() -> None:
    """Windows has no module ``resource``, but models must load there."""
    code = "import sys; sys.modules['resource'] = None; import spidr.tools.untrusted as u; u.check_memory(2**60, '')"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ({"max_steps": 100}, "max_steps = 100 ends during warm-up"),
        ({"max_steps": 200_000}, "the learning rate never decays"),
        ({"max_steps": 500_000}, r"stays at optimizer\.final_lr_scale = 0\.01 of its peak from step 400000 on"),
        ({"max_steps": 400_000}, None),
        ({"max_steps": 500_000, "scheduler": "cosine"}, None),
    ],
)
def test_odd_schedules_give_warnings(write, steps: dict[str, Any], expected: str | None) -> None:
    remark = schedule_remark(read_config(write(document(optimizer=steps))).optimizer)
    assert remark is None if expected is None else remark and re.search(expected, remark)


def test_names_of_runs_and_sets_may_have_several_parts(write) -> None:
    run = {"workdir": "runs", "wandb_project": "a/b", "wandb_name": "c/d"}
    config = read_config(write({**document(), "run": run, "validation": {"dev/clean": {"manifest": "m"}}}))
    assert config.run.dir == Path("runs/a/b/c/d")
    assert list(config.validation) == ["dev/clean"]


def test_paths_may_be_path_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCRATCH", "/scratch")
    assert RunConfig(Path("runs"), "p", "n").dir == Path("runs/p/n")  # type: ignore[arg-type]
    assert RunConfig("$SCRATCH/runs", "p", "n").dir == Path("/scratch/runs/p/n")
    assert DataConfig(Path("train.csv")).manifest == "train.csv"  # type: ignore[arg-type]


def test_overrides(write) -> None:
    path = write(document(optimizer={"lr": 1.0}))
    overrides = ["optimizer.lr=1e-3", "run.wandb_name = b", "model.codebook_size=7", "validation.dev.manifest=x.csv"]
    overrides += ["optimizer.betas=[0.5, 0.6]", "run.compile=false", "run.init_ckpt='1'"]
    config = read_config(path, overrides)
    assert (config.optimizer.lr, config.run.wandb_name, config.run.compile) == (1e-3, "b", False)
    assert config.optimizer.betas == (0.5, 0.6)
    assert config.run.init_ckpt == "1"
    assert config.validation["dev"].manifest == "x.csv"
    assert config.model_given == {"codebook_size"}
    for wrong, message in {
        "optimizer.lrr=1": "optimizer.lrr: unknown key, did you mean lr",
        "lr=1": "SECTION.KEY=VALUE",
        "optimizer.lr": "SECTION.KEY=VALUE",
        "optimizer.lr=fast": "optimizer.lr: found 'fast'",
        "optimizer.lr.x=1": "lr is not a section",
        "optimizer.lr=1\n[run]": "optimizer.lr: found",
    }.items():
        with pytest.raises(InputError, match=re.escape(message)):
            read_config(path, [wrong])


def test_settings_unknown_to_the_published_package_are_written_only_if_used(write) -> None:
    ours = {"run": {"device": "cpu"}, "data": {"on_error": "skip"}, "model": {"codebook_init": "data"}}
    plain, used = to_dict(read_config(write(document()))), to_dict(read_config(write(document(**ours))))
    for section, table in ours.items():
        assert not table.keys() & plain[section].keys()
        assert table.items() <= used[section].items()
