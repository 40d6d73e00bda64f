"""Checkpoints as fairseq saves them for a DinoSR."""

import argparse
import collections
import enum
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import Tensor

from helpers.weights import FAIRSEQ


class Choice(enum.Enum):
    LAYER = "layer"


def fairseq_checkpoint(weights: dict[str, Tensor], step: Any = 77) -> dict[str, Any]:
    """The checkpoint that fairseq saves for a model with these weights."""
    model: dict[str, Any] = collections.OrderedDict()
    teacher: dict[str, Any] = {}

    def move(theirs: str, ours: str, target: dict[str, Any] = model) -> None:
        for suffix in (".weight", ".bias"):
            if ours + suffix in weights:
                target[theirs + suffix] = weights[ours + suffix]

    model["mask_emb"] = weights["mask_embedding"]
    move("layer_norm", "feature_projection.layer_norm")
    move("post_extract_proj", "feature_projection.projection")
    for i in range(len(FAIRSEQ.extractor_conv_layer_config)):
        move(f"feature_extractor.conv_layers.{i}.0", f"feature_extractor.conv_layers.{i}.conv")
        move(f"feature_extractor.conv_layers.{i}.2.1", f"feature_extractor.conv_layers.{i}.layer_norm")
    for ours, theirs, target in (("student.", "encoder.", model), ("teacher.", "", teacher)):
        for i in range(FAIRSEQ.encoder_pos_conv_depth):
            move(f"{theirs}pos_conv.{i}.0", f"{ours}pos_conv_embed.convs.{i}", target)
        move(f"{theirs}layer_norm", f"{ours}layer_norm", target)
        for i in range(FAIRSEQ.encoder_num_layers):
            a, b = f"{theirs}layers.{i}.", f"{ours}layers.{i}."
            for suffix in (".weight", ".bias"):
                for letter, rows in zip("qkv", weights[f"{b}attention.qkv{suffix}"].chunk(3), strict=True):
                    target[f"{a}self_attn.{letter}_proj{suffix}"] = rows
            move(a + "self_attn.out_proj", b + "attention.proj", target)
            move(a + "self_attn_layer_norm", b + "layer_norm", target)
            move(a + "fc1", b + "feed_forward.intermediate_dense", target)
            move(a + "fc2", b + "feed_forward.output_dense", target)
            move(a + "final_layer_norm", b + "final_layer_norm", target)
    for k in range(FAIRSEQ.num_codebooks):
        move(f"heads.{k}", f"heads.{k}.0")
        model[f"_codebook{k}"] = weights[f"codebooks.{k}.codebook"]
        model[f"_codebook_cnts{k}"] = weights[f"codebooks.{k}.counts"]
    model["_ema"] = teacher
    model["heads.0.bias"] = torch.nn.Parameter(model["heads.0.bias"])
    return {
        "args": argparse.Namespace(arch="dinosr", dropout=0.1, path=Path("/checkpoints")),
        "cfg": OmegaConf.create({"model": {"layers": 12, "drop": 0.1, "ref": "${model.layers}"}, "list": [1, 2]}),
        "criterion": None,
        "optimizer_history": [{"criterion_name": "ModelCriterion", "num_updates": step}],
        "task_state": {"dictionary": {Choice.LAYER: {1, 2}, frozenset({3}): collections.defaultdict(list, a=[1])}},
        "extra_state": {
            "metrics": collections.OrderedDict(loss=np.float64(1.5), array=np.arange(5), type=np.dtype("f4")),
            "previous_training_time": np.int64(3),
            "train_iterator": {"epoch": 2, "counter": collections.Counter("abc"), "device": torch.device("cpu")},
        },
        "last_optimizer_state": {"state": {0: {"step": step, "exp_avg": torch.zeros(3)}}, "param_groups": [{}]},
        "model": model,
    }
