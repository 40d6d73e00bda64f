"""Validation gives the right numbers, however it runs."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from helpers.processes import Ranks
from helpers.small_models import AT_50_HZ, tiny_model
from helpers.tiny_run import write_config, write_recordings
from spidr.config import Config, ResumeConfig, read_config
from spidr.data import build_validation_dataloader
from spidr.environment import Environment, Preempted, StopFlag
from spidr.models.metrics import units_quality
from spidr.tools.errors import InputError
from spidr.tools.metrics import read_metrics
from spidr.validate import validate, validate_existing_checkpoint, validate_set

CPU = Environment(0, 0, 1, torch.device("cpu"))
LAYERS = ("l2", "l3", "l4")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recordings(tmp_path_factory.mktemp("data") / "recordings", count=13)


@pytest.fixture
def cfg(tmp_path: Path, manifest: Path) -> Config:
    """Recordings with random phones, except one without."""
    alignments = tmp_path / "alignments.jsonl"
    rows = [line.split(",") for line in manifest.read_text("utf-8").splitlines()[2:]]
    with alignments.open("w") as file:
        for number, (name, _, length) in enumerate(rows):
            phones = ["abcd"[(i * 7 + number) // 9 % 4] for i in range(int(length) // 160)]
            file.write(json.dumps({"fileid": name, "phones": phones}) + "\n")
    path = write_config(tmp_path, manifest, model=AT_50_HZ)
    document = json.loads(path.read_text())
    document["validation"]["dev"]["alignments_path"] = str(alignments)
    path.write_text(json.dumps(document))
    return read_config(path)


def test_loss_is_the_mean_over_masked_frames(cfg: Config) -> None:
    """Against a loop over single recordings."""
    data, model = cfg.validation["dev"], tiny_model(**AT_50_HZ).eval()
    loader = build_validation_dataloader(data, cfg.masking, conv_layer_config=model.cfg.extractor_conv_layer_config)
    found = validate(model.train(), loader, "cpu")
    assert model.training
    total, frames, ppls = 0.0, 0, []
    model.eval()
    for batch in loader:
        loss, outputs = model(batch.waveforms, mask=batch.mask)
        total, frames = total + loss.double().sum().item(), frames + loss.numel()
        ppls.append((loss.numel(), outputs["target_ppl"].item(), outputs["pred_ppl"].item()))
    assert found.keys() == {"loss", "target_ppl", "pred_ppl"}
    assert found["loss"] == pytest.approx(total / frames, rel=1e-6)
    assert found["target_ppl"] == pytest.approx(math.fsum(n * ppl for n, ppl, _ in ppls) / frames, rel=1e-6)
    assert found["pred_ppl"] == pytest.approx(math.fsum(n * ppl for n, _, ppl in ppls) / frames, rel=1e-6)


def test_no_batch_is_an_error() -> None:
    with pytest.raises(InputError, match="no batch to validate on"):
        validate(tiny_model(**AT_50_HZ), [], "cpu")


def test_unit_quality_is_that_of_the_units(cfg: Config) -> None:
    data, model = cfg.validation["dev"], tiny_model(**AT_50_HZ)
    metrics = validate_set(model, data, cfg.masking, CPU)
    from spidr.data import speech_dataset

    dataset = speech_dataset(data.manifest, normalize=True)
    lines = [json.loads(line) for line in Path(str(data.alignments_path)).read_text("utf-8").splitlines()]
    phones = {line["fileid"]: line["phones"] for line in lines}
    model.eval()
    for k, layer in enumerate(LAYERS):
        units = {}
        for row, name in enumerate(dataset.manifest["fileid"]):
            if name in phones:
                with torch.no_grad():
                    probabilities = model.get_codebooks(dataset[row].unsqueeze(0))[1 + k]
                assert probabilities is not None
                units[name] = (phones[name], probabilities[0].argmax(-1).tolist())
        expected = units_quality(units, num_units=12, num_phones=4)
        assert metrics[f"pnmi_{layer}"] == pytest.approx(expected.pnmi, abs=1e-9)
        assert metrics[f"phone_purity_{layer}"] == pytest.approx(expected.phone_purity)
        assert metrics[f"cluster_purity_{layer}"] == pytest.approx(expected.cluster_purity)
        assert metrics[f"unit_ppl_{layer}"] == pytest.approx(expected.codebook_perplexity)
        assert metrics[f"active_codewords_{layer}"] == expected.active_codewords
        assert metrics[f"bitrate_{layer}"] == pytest.approx(expected.bitrate)


def test_alignments_of_other_recordings(cfg: Config) -> None:
    Path(str(cfg.validation["dev"].alignments_path)).write_text(
        '{"fileid": "other", "phones": ["a", "b"]}\n', encoding="utf-8"
    )
    with pytest.raises(InputError, match=r"alignments\.jsonl: aligns no recording of .*manifest\.csv"):
        validate_set(tiny_model(**AT_50_HZ), cfg.validation["dev"], cfg.masking, CPU)


def test_a_signal_interrupts(cfg: Config) -> None:
    stop = StopFlag()
    stop.set(12)
    with pytest.raises(Preempted) as preempted:
        validate_set(tiny_model(**AT_50_HZ), cfg.validation["dev"], cfg.masking, CPU, stop=stop)
    assert preempted.value.signum == 12


def test_same_numbers_in_training_in_a_job_and_on_two_processes(cfg: Config, tmp_path: Path) -> None:
    document = json.loads((tmp_path / "run.json").read_text())
    document["optimizer"]["max_steps"] = 2
    numbers = []
    for world_size in (1, 2):
        document["run"]["wandb_name"] = f"on_{world_size}"
        config = tmp_path / f"on_{world_size}.json"
        config.write_text(json.dumps(document))
        ranks = Ranks(config, world_size)
        assert ranks.wait() == [0] * world_size, ranks.log.read_text()
        lines = read_metrics(tmp_path / "p" / f"on_{world_size}" / "metrics.jsonl")
        numbers.append(next(line for line in lines if line["group"] == "dev"))
    run_dir = tmp_path / "p" / "on_1"
    job = ResumeConfig(0, str(run_dir / "step_0.pt"), str(tmp_path / "results.jsonl"))
    validate_existing_checkpoint(read_config(run_dir / "config.json"), job)
    numbers.append(json.loads((tmp_path / "results.jsonl").read_text()))
    assert numbers[0] == numbers[1] == numbers[2]
    assert numbers[0]["step"] == 0
