"""Published models, models elsewhere, and files with and without a configuration."""

import inspect
import json
import re
import urllib.request
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import spidr.models
from helpers.fairseq import fairseq_checkpoint
from helpers.web import Server
from helpers.weights import DINOSR, FAIRSEQ, SMALL, SPIDR, damage, random_weights, same_weights
from spidr.config import Config, DataConfig, DinoSRConfig, RunConfig, SpidRConfig, to_dict
from spidr.export import export_safetensors, export_transformers
from spidr.models import DinoSR, SpidR, hub
from spidr.models.__main__ import main
from spidr.models.published import PUBLISHED, Published
from spidr.tools.errors import InputError


def publish(monkeypatch: pytest.MonkeyPatch, url: str, **options: Any) -> None:
    options = {"model_type": "spidr", "settings": SMALL} | options
    entry = Published(name="small", about="", file=url, licence="", citation="", best_layer=2, **options)
    monkeypatch.setitem(PUBLISHED, "small", entry)


# -------------------------------------------------------------------------------------------------- published models


def test_by_name(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_weights(SpidR(SPIDR))
    publish(monkeypatch, server.put("final.pt", {"model": weights}), saved_as="small.pt")
    model = hub.build_model("small")
    assert (type(model), model.training, model.best_layer) == (SpidR, True, 2)
    assert same_weights(model, weights)
    assert same_weights(hub.build_model(checkpoint="small", cfg=SPIDR, model_type="spidr"), weights)
    assert hub.recorded_config("small") == SPIDR
    encoder = hub.load_encoder("small")
    assert not encoder.training
    assert not any(name.startswith("teacher.") for name in encoder.state_dict())
    with pytest.raises(InputError, match="small: the model is of type 'spidr', asked for was 'dinosr'"):
        hub.build_model("small", model_type="dinosr")
    assert server.requests == ["/models/final.pt"]
    assert [path.name for path in cache.iterdir()] == ["small.pt"]


def test_fairseqs_model_by_name(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_weights(DinoSR(FAIRSEQ))
    settings = {**SMALL, "encoder_qkv_bias": True}
    url = server.put("dinosr.ckpt", fairseq_checkpoint(weights))
    publish(monkeypatch, url, model_type="dinosr", settings=settings, fairseq=True)
    assert same_weights(hub.build_model("small"), weights)
    assert [path.name for path in cache.iterdir()] == ["dinosr.ckpt"]


def test_weights_of_another_model_are_not_kept(server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = random_weights(SpidR(SPIDR))
    weights["heads.1.0.bias"] = torch.zeros(6)
    publish(monkeypatch, server.put("a.pt", weights))
    with pytest.raises(InputError) as info:
        hub.build_model("small")
    assert str(info.value) == (
        f"{server.url('a.pt')}: cannot download it to {cache / 'a.pt'}, where it may be put by hand: "
        "not the weights of this SpidR: of another shape: heads.1.0.bias (found (6,), expected (5,))"
    )
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped", "foreign"])
def test_a_damaged_cached_file_is_fetched_again(
    server: Server, cache: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = random_weights(SpidR(SPIDR))
    publish(monkeypatch, server.put("a.pt", {"model": weights}))
    cache.mkdir(parents=True)
    (cache / "a.pt").write_bytes(damage(server.files["/models/a.pt"], how))
    assert same_weights(hub.build_model("small"), weights)
    assert server.requests == ["/models/a.pt"]


@pytest.mark.parametrize(
    ("function", "url"),
    [
        (spidr.models.spidr_base, "https://dl.fbaipublicfiles.com/shared/devai/assets/models/spidr_base.pt"),
        (
            spidr.models.dinosr_base_reproduced,
            "https://dl.fbaipublicfiles.com/shared/devai/assets/models/dinosr_base_reproduced.pt",
        ),
        (spidr.models.dinosr_base_original, "https://data.csail.mit.edu/placesaudio/dinosr/dinosr.ckpt"),
    ],
)
def test_published_addresses(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, function: Callable[..., DinoSR], url: str
) -> None:
    """Each function requests its file, as seen by a proxy that refuses."""
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{server.server_port}")
    for name in ("no_proxy", "NO_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # caches the proxies of its first use
    with pytest.raises(InputError) as info:
        function()
    by_hand = f"{url}: cannot download it to {cache / Path(url).name}, where it may be put by hand: "
    assert re.fullmatch(rf"{re.escape(by_hand)}<urlopen error [^\n]+>", str(info.value))
    assert server.requests == [url.split("/")[2] + ":443"]
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("function", "cfg"),
    [
        (spidr.models.spidr_base, SpidRConfig()),
        (spidr.models.dinosr_base_reproduced, DinoSRConfig()),
        (spidr.models.dinosr_base_original, DinoSRConfig(encoder_qkv_bias=True)),
    ],
)
def test_not_pretrained(function: Callable[..., DinoSR], cfg: DinoSRConfig) -> None:
    model = function(pretrained=False)
    assert type(model) is (SpidR if isinstance(cfg, SpidRConfig) else DinoSR)
    assert model.cfg == cfg
    assert not model.training


@pytest.mark.slow
@pytest.mark.parametrize("function", [spidr.models.spidr_base, spidr.models.dinosr_base_reproduced])
def test_base_models_from_the_cache(server: Server, cache: Path, function: Callable[..., DinoSR]) -> None:
    weights = random_weights(function(pretrained=False))
    cache.mkdir(parents=True)
    torch.save({"model": weights}, cache / f"{function.__name__}.pt")
    assert same_weights(function(), weights)
    assert server.requests == []


# -------------------------------------------------------------------------------------------------- models elsewhere


def test_a_model_on_a_web_server(server: Server, cache: Path) -> None:
    """A run's weights come with its configuration; afterwards no server is needed."""
    weights = random_weights(SpidR(SPIDR))
    url = server.put("run/final.pt", {"model": weights})
    server.put("run/config.json", json.dumps({"run": {"model_type": "spidr"}, "model": asdict(SPIDR)}).encode())
    assert same_weights(hub.build_model(url), weights)
    requests = len(server.requests)
    assert same_weights(hub.build_model(url), weights)
    assert len(server.requests) == requests
    with pytest.raises(InputError, match="404"):
        hub.load_encoder(server.url("nowhere/final.pt"))


# ---------------------------------------------------------------------------------------------------- build_model


def save(folder: Path, model: DinoSR, config: Any = None) -> tuple[Path, dict[str, Tensor]]:
    weights = random_weights(model)
    torch.save({"model": weights, "step": 3}, folder / "step_3.pt")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder / "step_3.pt", weights


def test_build_new() -> None:
    assert type(hub.build_model(cfg=SPIDR)) is SpidR
    assert type(hub.build_model(cfg=DINOSR, model_type="dinosr")) is DinoSR
    assert hub.build_model(cfg=SPIDR).cfg == SPIDR
    assert hub.build_model(cfg=SPIDR).training
    with pytest.raises(InputError, match="model_type is needed: 'spidr' or 'dinosr'"):
        hub.build_model()
    with pytest.raises(InputError, match="found 'spider', accepted: 'spidr' or 'dinosr'"):
        hub.build_model(model_type="spider")
    for cfg, model_type in ((SPIDR, "dinosr"), (DINOSR, "spidr"), (DINOSR, "x")):
        with pytest.raises(InputError, match="but the configuration is of a"):
            hub.build_model(cfg=cfg, model_type=model_type)


def test_checkpoints_without_a_usable_model(tmp_path: Path) -> None:
    """The error names the file, whose type is unknown or whose configuration is too large for memory."""
    path, _ = save(tmp_path, hub.build_model(cfg=SPIDR), None)
    with pytest.raises(InputError, match=r"step_3\.pt: .*model_type is needed: .* \(--model-type on the command line"):
        hub.build_model(checkpoint=path)
    table = asdict(SPIDR) | {"encoder_embed_dim": 2**16, "encoder_num_layers": 1000}
    save(tmp_path, hub.build_model(cfg=SPIDR), {"model_type": "spidr", "model": table})
    with pytest.raises(InputError, match=r"step_3\.pt: a model of encoder_embed_dim = 65536, .*: would take"):
        hub.build_model(checkpoint=path)


@pytest.mark.parametrize("model_type", ["spidr", "dinosr"])
@pytest.mark.parametrize("form", ["run", "table", "named"])
def test_build_from_checkpoint(tmp_path: Path, model_type: str, form: str, caplog: pytest.LogCaptureFixture) -> None:
    cfg = SPIDR if model_type == "spidr" else DINOSR
    run = RunConfig("w", "p", "n", model_type=model_type)  # type: ignore[arg-type]
    document = {
        "run": to_dict(Config(run, DataConfig("m"), cfg)),
        "table": asdict(cfg),
        "named": {"model_type": model_type, "model": asdict(cfg)},
    }[form]
    path, weights = save(tmp_path, hub.build_model(cfg=cfg), document)
    model = hub.build_model(model_type=model_type, checkpoint=str(path))
    assert same_weights(model, weights)
    assert model.cfg == cfg
    assert not caplog.records
    other = "dinosr" if model_type == "spidr" else "spidr"
    if form != "table":
        assert type(hub.build_model(checkpoint=path)) is type(model)
        with pytest.raises(InputError, match=rf"config\.json: the model is of type '{model_type}', asked for was"):
            hub.build_model(model_type=other, checkpoint=path)
    else:
        with pytest.raises(InputError, match=r"config\.json: .*model_type is needed"):
            hub.build_model(checkpoint=path)


def test_build_with_a_given_configuration(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, weights = save(tmp_path, SpidR(SPIDR))
    assert same_weights(hub.build_model(cfg=SPIDR, checkpoint=path), weights)
    assert not caplog.records
    with pytest.raises(
        InputError, match=r"step_3\.pt: not the weights of this DinoSR: of another shape: mask_embedding"
    ):
        hub.build_model(cfg=DinoSRConfig(**SMALL | {"encoder_embed_dim": 32}), checkpoint=path)
    with pytest.raises(InputError, match=r"step_3\.pt: not the weights of this SpidR"):
        hub.build_model(model_type="spidr", checkpoint=path)
    assert f"{path}: no config.json beside it, so the default model of its type is built" in caplog.text


def test_the_recorded_configuration_wins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, weights = save(tmp_path, SpidR(SPIDR), {"model_type": "spidr", "model": asdict(SPIDR)})
    model = hub.build_model(cfg=SpidRConfig(), checkpoint=path)
    assert same_weights(model, weights)
    assert caplog.messages == [f"{path}: built as its config.json says, which is not the configuration given"]


def test_build_with_a_wrong_configuration_file(tmp_path: Path) -> None:
    path, _ = save(tmp_path, SpidR(SPIDR), {"codebook_sise": 3})
    with pytest.raises(InputError, match=r"config\.json: codebook_sise: unknown key, did you mean codebook_size\?"):
        hub.build_model(model_type="spidr", checkpoint=path)


def test_nothing_there(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for options in ({}, {"model_type": "spidr"}, {"cfg": SPIDR}):
        for name in ("x.pt", "x.safetensors"):
            with pytest.raises(InputError) as info:
                hub.build_model(checkpoint=tmp_path / name, **options)  # type: ignore[arg-type]
            assert str(info.value) == f"{tmp_path / name}: cannot be read (No such file or directory)"
    with pytest.raises(InputError, match="spidr_bass: neither a file nor a published model; did you mean spidr_base"):
        hub.build_model("spidr_bass")
    assert not caplog.records


def test_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Our files and folders, and those of ``save_pretrained``: encoders without a teacher."""
    model = SpidR(SPIDR)
    model.load_state_dict(random_weights(model))
    expected = {name: value for name, value in model.state_dict().items() if not name.startswith("teacher.")}
    export_safetensors(model, tmp_path / "x.safetensors")
    export_transformers(model, tmp_path / "folder")
    saved = tmp_path / "saved"
    saved.mkdir()
    save_file(
        {f"model.{name}": value for name, value in expected.items()}, saved / "model.safetensors", {"format": "pt"}
    )
    (saved / "config.json").write_text((tmp_path / "folder" / "config.json").read_text())
    monkeypatch.setenv("HERE", str(tmp_path))
    for source in (tmp_path / "x.safetensors", "$HERE/folder", saved, str(saved / "model.safetensors")):
        found = hub.build_model(source)
        assert found.cfg == SPIDR
        assert same_weights(found, expected)


def test_loading_has_no_side_effects(tmp_path: Path) -> None:
    """It draws nothing from the caller's generator, and ignores the caller's defaults."""
    path, weights = save(tmp_path, SpidR(SPIDR), {"model_type": "spidr", "model": asdict(SPIDR)})
    state = torch.get_rng_state()
    for dtype, device in ((torch.float64, "cpu"), (torch.float16, "meta")):
        torch.set_default_dtype(dtype)
        torch.set_default_device(device)
        try:
            model = hub.load_encoder(path)
            assert torch.get_default_dtype() == dtype
            assert torch.empty(0).device == torch.device(device)
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
        assert same_weights(model, {name: value for name, value in weights.items() if not name.startswith("teacher.")})
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_not_saved_is_as_in_a_new_model(tmp_path: Path) -> None:
    """Buffers, whether a parameter is trained, and modes."""
    path, _ = save(tmp_path, SpidR(SPIDR), {"model_type": "spidr", "model": asdict(SPIDR)})
    loaded, new = hub.build_model(path), SpidR(SPIDR)
    saved = new.state_dict().keys()
    others = {name: buffer for name, buffer in new.named_buffers() if name not in saved}
    assert others
    for name, buffer in loaded.named_buffers():
        assert buffer.dtype == new.get_buffer(name).dtype
        assert name in saved or torch.equal(buffer, others[name])
    assert [(n, p.requires_grad) for n, p in loaded.named_parameters()] == [
        (n, p.requires_grad) for n, p in new.named_parameters()
    ]
    assert [m.training for m in loaded.modules()] == [m.training for m in new.modules()]


# ------------------------------------------------------------------------------------------------------- names


def test_one_table(capsys: pytest.CaptureFixture[str]) -> None:
    """Functions, their help, torch.hub's entry points and the command's list come from one table."""
    assert main([]) == 0
    listed = capsys.readouterr().out
    for name, published in PUBLISHED.items():
        function = getattr(spidr.models, name)
        assert function.__name__ == name
        parameters = inspect.signature(function).parameters.values()
        assert [(p.name, p.default) for p in parameters] == [
            ("pretrained", True), ("check_hash", False), ("progress", True)
        ]  # fmt: skip
        for fact in (published.about, published.licence, published.citation, str(published.best_layer)):
            assert fact in function.__doc__
            assert fact in listed
        assert name in spidr.models.__all__
        assert hub.recorded_config(name) == published.cfg
