"""Export an encoder as one ONNX file."""

import contextlib
import copy
import io
import itertools
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import spidr
from spidr.models import DinoSR, standardise
from spidr.models.weights import type_of
from spidr.tools.errors import InputError
from spidr.tools.files import atomic_write, expand
from spidr.tools.frames import conv_length
from spidr.tools.lazy import needs_extra


def export_onnx(model: DinoSR, output: str | Path, *, layers: Sequence[int] | None = None) -> None:
    """Write an ONNX graph from waveforms to features and units.

    Inputs: ``waveforms (B, S)`` float32, 16 kHz, padded at the end, and ``lengths (B,)`` int64, the samples that count
    in each row, at least as many as one frame takes. Outputs: ``frames (B,)`` int64, the frames of each row, and for
    each layer N ``features_N (B, T, D)`` float32 and, if it has a codebook, ``units_N (B, T)`` int64, -1 in the
    padding: what ``model.encode`` and ``model.units`` give; each utterance is standardised. B and S are free. A row
    with samples that are not finite, or a length beyond S, gives NaN and units of -1. The file's metadata has
    ``model_type``, ``model`` (the configuration), ``layers`` and ``spidr_version``.

    Args:
        model: The model; it is not changed.
        output: The file.
        layers: Counted from 1. None: the model's best for units.

    Raises:
        InputError: If there is no such layer, the weights are too many for one ONNX file, the file cannot be written,
            or onnx and onnxscript are not installed.
    """
    with needs_extra("export"):
        import onnxscript  # noqa: F401 (torch.onnx needs it)
    total = len(model.student.layers)
    layers = [model.best_layer] if layers is None else sorted(set(layers))
    for layer in layers:
        if not 1 <= layer <= total:
            raise InputError(f"layer must be between 1 and {total}, not {layer}")
    encoder = _Encoder(model, layers).eval()
    size = sum(parameter.numel() * 4 for parameter in encoder.parameters())
    if size >= 2**31:
        raise InputError(f"{size / 2**30:.1f} GiB of weights do not fit in one ONNX file, which holds 2 GiB")
    metadata = {
        "model_type": type_of(model.cfg),
        "model": json.dumps(asdict(model.cfg)),
        "layers": json.dumps(layers),
        "spidr_version": spidr.__version__,
    }
    content = _graph(encoder, metadata)
    with atomic_write(expand(output)) as file:
        file.write(content)


def _graph(encoder: "_Encoder", metadata: dict[str, str]) -> bytes:
    batch, samples = torch.export.Dim("batch"), torch.export.Dim("samples", min=encoder.min_samples)
    # Unlike any dimension of the model, or the exporter could take these for constants.
    example = torch.randn(3, 4 * encoder.min_samples + 17, generator=torch.Generator())
    lengths = torch.tensor([example.shape[1], example.shape[1] - 5, 2 * encoder.min_samples])
    with torch.no_grad(), _quiet():
        program: Any = torch.onnx.export(
            encoder,
            (example, lengths),
            dynamo=True,
            opset_version=18,
            verbose=False,
            input_names=["waveforms", "lengths"],
            output_names=encoder.output_names,
            dynamic_shapes=({0: batch, 1: samples}, {0: batch}),
        )
    proto = program.model_proto
    proto.producer_name, proto.producer_version = "spidr", spidr.__version__
    for key, value in metadata.items():
        entry = proto.metadata_props.add()
        entry.key, entry.value = key, value
    return proto.SerializeToString()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter, including its warnings about shapes that the graph accepts."""
    with contextlib.ExitStack() as restore, warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in map(logging.getLogger, ("torch.onnx", "torch.fx.experimental.symbolic_shapes")):
            restore.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.ERROR)
        yield


class _Encoder(nn.Module):
    """``encode`` and ``units`` of several layers in one forward pass, without checks of values."""

    def __init__(self, model: DinoSR, layers: Sequence[int]) -> None:
        super().__init__()
        model = copy.deepcopy(model).float().cpu().requires_grad_(False).drop_teacher()
        self.model, self.layers = model, list(layers)
        self.with_units = [layer for layer in layers if layer in model.codebook_layers]
        self.output_names = ["frames", *(f"features_{n}" for n in layers), *(f"units_{n}" for n in self.with_units)]
        # For two frames: torch.export takes a dimension of 1 for a constant. The graph accepts a single frame.
        self.min_samples = next(n for n in itertools.count(1) if conv_length(model.feature_extractor.shapes, n) == 2)

    def forward(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, ...]:
        """Compute the outputs that :func:`export_onnx` describes from (B, S) and (B,)."""
        model = self.model
        frames = conv_length(model.feature_extractor.shapes, lengths)
        # A length beyond the samples would count missing ones, so make the row NaN.
        enough = torch.where(lengths > waveforms.shape[1], torch.nan, 1.0).unsqueeze(1)
        extracted = model.feature_extractor(standardise(waveforms * enough, lengths), lengths)
        exists = torch.arange(extracted.shape[1]) < frames.unsqueeze(1)
        mask, features = exists[:, None, None], model.feature_projection(extracted)
        # As in the models' _hidden, but in one pass for features and units.
        per_layer, num_layers = model.heads_read_layers, len(model.student.layers)
        last = self.layers[-1] if per_layer or not self.with_units else num_layers
        final, outputs = model.student._run(features, mask, range(last))
        units = []
        if self.with_units:
            first, top = num_layers - model.num_codebooks, self.with_units[-1]
            log_probs = model._log_probs(
                outputs[first:top] if per_layer else [model.student.finish(final)], top - first
            )
            # NaN probabilities, from samples that are not finite, give no unit.
            of_layers = [log_probs[n - 1 - first] for n in self.with_units]
            units = [torch.where(exists & (p.sum(-1) <= 0), p.argmax(-1), -1) for p in of_layers]
        return (frames, *(outputs[layer - 1] for layer in self.layers), *units)
