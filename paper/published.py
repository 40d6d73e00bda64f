"""The paper's measured values (``results/*.csv``) and the names of its models."""

from __future__ import annotations

from pathlib import Path

import polars as pl

FOLDER = Path(__file__).resolve().parent / "results"

SCHEMA = {
    "experiment": pl.String,
    "model": pl.String,
    "representation": pl.String,
    "num_units": pl.Int64,
    "layer": pl.Int64,
    "dataset": pl.String,
    "speaker": pl.String,
    "lm_hours": pl.Int64,
    "metric": pl.String,
    "value": pl.Float64,
}
"""Columns of ``results.csv``, and of what ``reproduce.py`` writes."""

KEYS = [column for column in SCHEMA if column != "value"]

MODELS = {
    "spidr": "SpidR",
    "dinosr_original": "DinoSR (original)",
    "dinosr_reproduced": "DinoSR (reproduced)",
    "hubert": "HuBERT",
    "wavlm": "WavLM",
    "wav2vec2": "wav2vec 2.0",
    "text": "Text (topline)",
}
"""Names to print, in the order of legends and tables."""

BEST_LAYER = {
    "spidr": 6,
    "dinosr_original": 5,
    "dinosr_reproduced": 5,
    "hubert": 11,
    "wavlm": 11,
    "wav2vec2": 6,
}
"""The layer of each model from which the paper takes units."""

REPRESENTATIONS = {
    "continuous": "features",
    "probabilities": "codebook probabilities",
    "codebooks": "codebooks",
    "kmeans": "k-means",
    "text": "text",
}

METRICS = {
    "abx": "ABX (%)",
    "map": "MAP (%)",
    "pnmi": "PNMI",
    "phone_purity": "Phone purity",
    "cluster_purity": "Cluster purity",
    "codebook_perplexity": "Perplexity",
    "active_codewords": "Active units",
    "bitrate": "Bitrate (bit/s)",
    "swuggy_all": "sWUGGY",
    "swuggy_invocab": "sWUGGY in-vocab",
    "sblimp": "sBLIMP",
    "tsc": "tSC",
    "ssc": "sSC",
    "per": "PER (%)",
    "asr": "WER (%)",
}

ALIASES = {"dinosr": "dinosr_original", "wavlm_base": "wavlm"}
"""Other names of the same models in parts of the published values."""


def results(experiment: str, path: Path = FOLDER / "results.csv") -> pl.DataFrame:
    """The values of one experiment, one per row, in the columns of :data:`SCHEMA`, without missing values.

    Names are unified: models by :data:`ALIASES`; the representation "codebooks" without a number of units (the
    heads' predictions) becomes "probabilities", so that "codebooks" always means discrete units.
    """
    table = pl.read_csv(path, schema=SCHEMA).filter(experiment=experiment).drop_nulls("value")
    onehot = pl.col.model == "spidr_onehot"  # MAP of discrete units
    predicted = (pl.col.representation == "codebooks") & pl.col.num_units.is_null()
    representation = pl.when(onehot).then(pl.lit("codebooks")).when(predicted).then(pl.lit("probabilities"))
    return table.with_columns(
        representation=representation.otherwise(pl.col.representation),
        num_units=pl.when(onehot).then(256).otherwise(pl.col.num_units),
        model=pl.when(onehot).then(pl.lit("spidr")).otherwise(pl.col.model.replace(ALIASES)),
    )


def perplexities() -> pl.DataFrame:
    """Perplexities during training: ``model, dataset, step, layer, metric, value``."""
    return pl.read_csv(FOLDER / "perplexity.csv")


def pretraining_hours() -> pl.DataFrame:
    """Hours for 400,000 steps: ``gpu_type, gpus, compile, hours``."""
    return pl.read_csv(FOLDER / "pretraining_hours.csv")
