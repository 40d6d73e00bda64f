"""The names that other packages and training scripts import, where the published packages have them."""

import inspect
from importlib import import_module

import pytest

# Parameters: "=" marks a default, "*" starts the keyword-only ones.
SIGNATURES = {
    "spidr.checkpoint.find_checkpoints": "folder",
    "spidr.checkpoint.Checkpointer": "folder interval keep_latest= * disable= start=",
    "spidr.data.build_dataloader": "data_cfg mask_cfg * conv_layer_config=",
    "spidr.data.read_manifest": "path",
    "spidr.data.utils.read_manifest": "path",
    "spidr.data.utils.num_samples": "source * verify=",
    "spidr.data.dataset.SpeechDataset": "manifest_path * normalize",
    "spidr.data.dataset.SpeechDatasetFromFiles": "manifest_path * normalize",
    "spidr.data.dataset.SpeechDatasetFromArchive": "manifest_path * normalize",
    "spidr.data.dataset.SpeechCollatorWithMasking": "mask_generator * max_sample_size conv_layer_config enable_padding "
    "rand_crop",
    "spidr.data.dataset.BucketizeBatchSampler": "* lengths num_buckets min_len max_len max_token_count batch_size seed "
    "bucket_method shuffle drop_last",
    "spidr.data.dataset.DistributedBatchSampler": "batch_sampler * seed shuffle drop_last",
    "spidr.data.dataset.conv_length": "shapes lengths",
    "spidr.data.masks.MaskGenerator.__call__": "self padding_mask * channels= generator=",
    "spidr.data.write_manifest.write_manifest": "dataset output file_extension=",
    "spidr.data.write_manifest.write_manifest_tar": "dataset output file_extension=",
    "spidr.environment.set_seed": "seed",
    "spidr.environment.setup_environment": "* kwargs",
    "spidr.environment.setup_pytorch": "* use_deterministic",
    "spidr.environment.setup_training": "seed * use_deterministic=",
    "spidr.models.build_model": "* cfg= model_type= checkpoint=",
    "spidr.models.utils.build_model": "* cfg= model_type= checkpoint=",
    "spidr.models.utils.model_from_raw_checkpoint": "model_class config_class ckpt",
    "spidr.models.utils.spidr_base": "pretrained= check_hash= progress=",
    "spidr.models.metrics.params_norm": "params norm_type= * error_if_nonfinite=",
    "spidr.models.metrics.perplexities": "ys",
    "spidr.models.components.ConvLayerBlock": "in_channels out_channels kernel_size stride layer_norm * bias",
    "spidr.models.components.ConvPositionalEmbedding": "embed_dim kernel_size groups depth",
    "spidr.models.components.FeatureExtractor": "conv_layers",
    "spidr.models.components.FeatureProjection": "in_features out_features",
    "spidr.models.components.FeedForward": "embed_dim interm_features interm_dropout",
    "spidr.models.components.LayerNorm": "normalized_shape eps= elementwise_affine= bias=",
    "spidr.models.components.SelfAttention": "embed_dim num_heads * qkv_bias dropout=",
    "spidr.models.components.Transformer": "layers pos_conv_embed dropout layer_drop * layer_norm_first",
    "spidr.models.components.Transformer.get_intermediate_outputs": "self x attention_mask= num_layers= * "
    "before_residual=",
    "spidr.models.components.TransformerLayer": "attention dropout feed_forward * layer_norm_first",
    "spidr.models.components.mask_from_index": "index size",
    "spidr.optimizer.build_optimizer": "model cfg",
    "spidr.optimizer.build_scheduler": "opt cfg",
    "spidr.slurm.launch_with_submitit": "job_name jobs dump slurm * copy_code=",
    "spidr.slurm.slurm_config_parse_args": "args",
    "spidr.slurm.default_train_job_config": "cluster_name",
    "spidr.slurm.validation_job_config": "",
    "spidr.tools.AverageMeters": "names device * dtype=",
    "spidr.tools.init_logger": "file= * with_colors=",
    "spidr.tools.profiler_context": "path skip_first= warmup= active=",
    "spidr.train.init_wandb": "cfg",
    "spidr.train.train": "cfg",
    "spidr.validate.validate": "model loader device",
    "spidr.validate.validate_existing_checkpoint": "cfg resume",
}


def found(name: str) -> object:
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            value: object = import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            value = getattr(value, part)
        return value
    raise AssertionError(name)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name: str) -> None:
    """The parameters that other packages use, in this order; any others are optional."""
    actual = inspect.signature(found(name)).parameters  # type: ignore[arg-type]
    positional, _, keyword = SIGNATURES[name].partition("*")
    if not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in actual.values()):
        named = [n for n, p in actual.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.POSITIONAL_ONLY)]
        assert named[: len(positional.split())] == [word.removesuffix("=") for word in positional.split()]
    expected = [word for word in f"{positional} {keyword}".split() if word != "kwargs"]
    for word in expected:
        parameter = actual[word.removesuffix("=")]
        assert (parameter.default is not parameter.empty) == word.endswith("=")
    further = {n: p for n, p in actual.items() if n not in {word.removesuffix("=") for word in expected}}
    for parameter in further.values():
        assert parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_POSITIONAL,
            parameter.VAR_KEYWORD,
        )


def test_an_unknown_name() -> None:
    for module in ("spidr.checkpoint", "spidr.tools", "spidr.data.dataset"):
        with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'nothing'"):
            import_module(module).nothing  # noqa: B018
