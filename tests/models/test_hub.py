"""Published weights through a real HTTP server on loopback, and every way a file or a download can be broken."""

import argparse
import collections
import enum
import http.server
import json
import logging
import os
import pickle
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from spidr.config import Config, DataConfig, DinoSRConfig, RunConfig, SpidRConfig, to_dict
from spidr.models import hub
from spidr.models.dinosr import DinoSR
from spidr.models.spidr import SpidR
from spidr.tools.errors import InputError

SMALL: dict[str, Any] = {
    "extractor_conv_layer_config": [(8, 10, 5), (8, 3, 2)],
    "encoder_embed_dim": 16,
    "encoder_pos_conv_kernel": 6,
    "encoder_pos_conv_groups": 4,
    "encoder_pos_conv_depth": 2,
    "encoder_num_layers": 3,
    "encoder_num_heads": 2,
    "encoder_ff_interm_features": 24,
    "codebook_size": 5,
    "num_codebooks": 2,
}
SPIDR, DINOSR = SpidRConfig(**SMALL), DinoSRConfig(**SMALL)
FAIRSEQ = DinoSRConfig(**SMALL, encoder_qkv_bias=True)


def random_weights(model: DinoSR, seed: int = 0) -> dict[str, Tensor]:
    """Other weights than any new model has, in every entry of the state dict."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(value.shape, generator=generator) if value.is_floating_point() else torch.tensor([77])
        for name, value in model.state_dict().items()
    }


def same_weights(model: DinoSR, expected: dict[str, Tensor]) -> bool:
    state = model.state_dict()
    return list(state) == list(expected) and all(torch.equal(state[name], expected[name]) for name in state)


class Server(http.server.ThreadingHTTPServer):
    """Serves the bytes in ``files``; ``sent`` cuts a body short of its announced length."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.sent: int | None = None
        self.stall = threading.Event()
        self.stall.set()
        self.announce = True
        self.requests: list[str] = []

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/models/{name}"

    def put(self, name: str, content: Any, **options: Any) -> str:
        if not isinstance(content, bytes):
            path = Path(os.environ["TORCH_HOME"]) / "put.pt"
            torch.save(content, path, **options)
            content = path.read_bytes()
            path.unlink()
        self.files[f"/models/{name}"] = content
        return self.url(name)


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404, "Not Found")
            return
        self.send_response(200)
        if self.server.announce:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:1000])
        self.wfile.flush()
        self.server.stall.wait(30)
        self.wfile.write(content[1000 : self.server.sent])

    def do_CONNECT(self) -> None:
        self.server.requests.append(self.path)
        self.send_error(403, "This proxy connects nowhere")

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.stall.set()
        server.shutdown()


@pytest.fixture
def cache(server: Server, tmp_path: Path) -> Path:
    return tmp_path / "hub" / "checkpoints"


def spidr(url: str, *, check_hash: bool = False, progress: bool = False) -> SpidR:
    return hub._published(SpidR, SPIDR, url, hub.load_weights, True, check_hash, progress)


def dinosr(url: str) -> DinoSR:
    return hub._published(DinoSR, FAIRSEQ, url, hub.load_fairseq_weights, True, False, False)


# ------------------------------------------------------------------------------------------------------- downloading


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("announce", [True, False])
def test_download_once(
    server: Server, cache: Path, prefix: str, announce: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = random_weights(SpidR(SPIDR))
    content = {"model": {prefix + name: value for name, value in weights.items()}, "step": 12, "optimizer": {"a": [1]}}
    url = server.put("spidr_base.pt", content)
    server.announce = announce
    model = spidr(url)
    assert type(model) is SpidR
    assert not model.training
    assert same_weights(model, weights)
    assert same_weights(spidr(url), weights)
    assert server.requests == ["/models/spidr_base.pt"]
    assert [path.name for path in cache.iterdir()] == ["spidr_base.pt"]
    assert (cache / "spidr_base.pt").read_bytes() == server.files["/models/spidr_base.pt"]
    assert capfd.readouterr() == ("", "")


def test_progress_goes_to_stderr(server: Server, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    spidr(server.put("a.pt", {"model": random_weights(SpidR(SPIDR))}), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "100%" in err


@pytest.mark.parametrize("sent", [0, 1, 1000, 20_000, -1])
def test_interrupted_download_leaves_nothing(server: Server, cache: Path, sent: int) -> None:
    weights = random_weights(SpidR(SPIDR))
    url = server.put("a.pt", {"model": weights})
    server.sent = sent
    with pytest.raises(
        InputError, match=r"models/a\.pt: cannot download it to .*/a\.pt, where it may be put by hand: "
    ):
        spidr(url)
    assert list(cache.iterdir()) == []
    server.sent = None
    assert same_weights(spidr(url), weights)


def test_killed_during_download(server: Server, cache: Path) -> None:
    weights = random_weights(SpidR(SPIDR))
    url = server.put("a.pt", {"model": weights})
    server.stall.clear()
    code = (
        "import sys; from spidr.config import SpidRConfig; from spidr.models import hub\n"
        f"hub._published(hub.SpidR, SpidRConfig(**{SMALL!r}), sys.argv[1], hub.load_weights, True, False, False)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, url])
    while not server.requests:
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    server.stall.set()
    assert not (cache / "a.pt").exists()
    assert same_weights(spidr(url), weights)


def test_several_at_once(server: Server, cache: Path) -> None:
    weights = random_weights(SpidR(SPIDR))
    url = server.put("a.pt", {"model": weights})
    with ThreadPoolExecutor(4) as pool:
        assert all(same_weights(model, weights) for model in pool.map(spidr, [url] * 4))
    assert [path.name for path in cache.iterdir()] == ["a.pt"]


@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<html>Sign in to the network</html>", "no checkpoint"),
        (b"", "no checkpoint"),
        ({"weights": {}}, "expected a dictionary with the weights under 'model'"),
        ([1, 2], "expected a dictionary with the weights under 'model'"),
        ({"model": {}}, "not the weights of this SpidR: missing: mask_embedding"),
        ({"model": {"mask_embedding": 3}}, "found a int at mask_embedding"),
        ({"model": {"a": torch.eye(3).to_sparse()}}, "found another kind at a"),
    ],
)
def test_wrong_content(server: Server, cache: Path, content: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        spidr(server.put("a.pt", content))
    assert list(cache.iterdir()) == []


def test_mismatches_are_named(server: Server, cache: Path) -> None:
    weights = random_weights(SpidR(SPIDR))
    weights["extra"] = weights.pop("mask_embedding")
    weights["heads.1.0.bias"] = torch.zeros(6)
    with pytest.raises(InputError) as info:
        spidr(url := server.put("a.pt", {"model": weights}))
    assert str(info.value) == (
        f"{url}: cannot download it to {cache / 'a.pt'}, where it may be put by hand: "
        "not the weights of this SpidR: missing: mask_embedding; unknown: extra; "
        "of another shape: heads.1.0.bias (found (6,), expected (5,))"
    )


def test_a_model_is_changed_whole_or_not_at_all() -> None:
    model = SpidR(SPIDR)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = random_weights(model)
    weights["codebooks.1.counts"] = torch.zeros(6)
    with pytest.raises(InputError, match=r"^here: not the weights of this SpidR: of another shape: codebooks\.1"):
        hub.load_into(model, weights, "here")
    assert same_weights(model, before)
    many = {f"x{i}": torch.zeros(1) for i in range(9)}
    with pytest.raises(InputError, match="unknown: x0, x1, x2, x3, x4 and 4 more"):
        hub.load_into(model, before | many, "here")


def damage(content: bytes, how: str) -> bytes:
    middle = len(content) // 2
    return {
        "truncated": content[:middle],
        "empty": b"",
        "flipped": content[:middle] + bytes([content[middle] ^ 0x10]) + content[middle + 1 :],
        "foreign": b"PK\x03\x04" + bytes(1000),
    }[how]


@pytest.mark.parametrize("how", ["truncated", "empty", "flipped", "foreign"])
def test_bad_cached_file_is_fetched_again(
    server: Server, cache: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    weights = random_weights(SpidR(SPIDR))
    url = server.put("a.pt", {"model": weights})
    cache.mkdir(parents=True)
    (cache / "a.pt").write_bytes(damage(server.files["/models/a.pt"], how))
    with caplog.at_level(logging.WARNING):
        assert same_weights(spidr(url), weights)
    assert "fetching it again" in caplog.text
    assert len(server.requests) == 1
    assert (cache / "a.pt").read_bytes() == server.files["/models/a.pt"]


def test_bad_cached_file_survives_a_failed_download(server: Server, cache: Path) -> None:
    """Nothing is lost when the network is away: perhaps another version of the package can read the file."""
    cache.mkdir(parents=True)
    (cache / "a.pt").write_bytes(b"unknown format")
    with pytest.raises(InputError, match="404"):
        spidr(server.url("a.pt"))
    assert (cache / "a.pt").read_bytes() == b"unknown format"


def test_no_server(cache: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/a.pt"
        with pytest.raises(InputError, match=r"cannot download it to .*, where it may be put by hand: .*refused"):
            spidr(url)


def test_unwritable_cache(server: Server, cache: Path) -> None:
    cache.parent.write_text("a file where the folder should be")
    with pytest.raises(InputError, match="cannot download it to"):
        spidr(server.put("a.pt", {"model": {}}))


def test_check_hash(server: Server, cache: Path) -> None:
    weights = random_weights(SpidR(SPIDR))
    server.put("a.pt", {"model": weights})
    content = server.files["/models/a.pt"]
    good = server.put(f"a-{sha256(content).hexdigest()[:8]}.pt", content)
    bad = server.put("a-0123456789.pt", content)
    assert same_weights(spidr(good, check_hash=True), weights)
    with pytest.raises(InputError, match=r"SHA-256 is [0-9a-f]{64}, expected 0123456789"):
        spidr(bad, check_hash=True)
    assert len(list(cache.iterdir())) == 1
    assert same_weights(spidr(bad), weights)
    assert same_weights(spidr(server.url("a.pt"), check_hash=True), weights)  # no hash in the name


@pytest.mark.parametrize(
    ("function", "url"),
    [
        (hub.spidr_base, "https://dl.fbaipublicfiles.com/shared/devai/assets/models/spidr_base.pt"),
        (
            hub.dinosr_base_reproduced,
            "https://dl.fbaipublicfiles.com/shared/devai/assets/models/dinosr_base_reproduced.pt",
        ),
        (hub.dinosr_base_original, "https://data.csail.mit.edu/placesaudio/dinosr/dinosr.ckpt"),
    ],
)
def test_published_addresses(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch, function: Callable[..., DinoSR], url: str
) -> None:
    """Each function asks for its file: seen by a proxy, which refuses."""
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{server.server_port}")
    for name in ("no_proxy", "NO_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # keeps the proxies of its first use
    with pytest.raises(InputError) as info:
        function()
    by_hand = f"{url}: cannot download it to {cache / Path(url).name}, where it may be put by hand: "
    assert re.fullmatch(rf"{re.escape(by_hand)}<urlopen error [^\n]+>", str(info.value))
    assert server.requests == [url.split("/")[2] + ":443"]
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize(
    ("function", "cfg"),
    [
        (hub.spidr_base, SpidRConfig()),
        (hub.dinosr_base_reproduced, DinoSRConfig()),
        (hub.dinosr_base_original, DinoSRConfig(encoder_qkv_bias=True)),
    ],
)
def test_not_pretrained(function: Callable[..., DinoSR], cfg: DinoSRConfig) -> None:
    model = function(pretrained=False)
    assert type(model) is (SpidR if isinstance(cfg, SpidRConfig) else DinoSR)
    assert model.cfg == cfg
    assert not model.training


@pytest.mark.slow
@pytest.mark.parametrize("function", [hub.spidr_base, hub.dinosr_base_reproduced])
def test_base_models_from_the_cache(server: Server, cache: Path, function: Callable[..., DinoSR]) -> None:
    weights = random_weights(function(pretrained=False))
    cache.mkdir(parents=True)
    torch.save({"model": weights}, cache / f"{function.__name__}.pt")
    assert same_weights(function(), weights)
    assert server.requests == []


# -------------------------------------------------------------------------------------------------- hostile files


class Exploit:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.path}'",)


def test_pickles_run_nothing(tmp_path: Path) -> None:
    proof, path = tmp_path / "proof", tmp_path / "x.pt"
    for content in ({"model": Exploit(proof)}, Exploit(proof), {"model": {"_ema": {}, "a": Exploit(proof)}}):
        for modern in (True, False):
            torch.save(content, path, _use_new_zipfile_serialization=modern)
            with pytest.raises(InputError, match=r"x\.pt: no checkpoint, or one that holds more than weights"):
                hub.load_weights(path)
            with pytest.raises(InputError, match=r"x\.pt: damaged or no checkpoint"):
                hub.load_fairseq_weights(path)
    assert not proof.exists()
    torch.load(path, weights_only=False)  # the exploit works where it is let
    assert proof.exists()


@pytest.mark.parametrize("load", [hub.load_weights, hub.load_fairseq_weights])
def test_any_damage_is_one_clear_error(tmp_path: Path, load: Callable[[Path], Any]) -> None:
    path, rng = tmp_path / "x.pt", np.random.default_rng(0)
    torch.save(
        fairseq_checkpoint(random_weights(DinoSR(FAIRSEQ)))
        if load is not hub.load_weights
        else {"model": random_weights(DinoSR(FAIRSEQ)), "step": 3},
        path,
    )
    content = path.read_bytes()
    expected = load(path)
    refused = 0
    for position in rng.integers(0, len(content), 60):
        damaged = bytearray(content)
        damaged[position] ^= 1 << rng.integers(8)
        for bad in (bytes(damaged), content[:position]):
            path.write_bytes(bad)
            try:
                again = load(path)
            except InputError as error:
                refused += 1
                assert str(error).startswith(f"{path}: ")  # noqa: PT017
            else:  # the bit was padding, or in a date
                assert list(again) == list(expected)
                assert all(torch.equal(again[name], expected[name]) for name in expected)
    assert refused > 90


def test_missing_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for load in (hub.load_weights, hub.load_fairseq_weights):
        with pytest.raises(InputError, match=r"x\.pt: cannot read the file: No such file or directory"):
            load(tmp_path / "x.pt")
        with pytest.raises(InputError, match="cannot read the file: Is a directory"):
            load(tmp_path)
    for options in ({}, {"model_type": "spidr"}, {"cfg": SPIDR}):
        for name in ("x.pt", "x.safetensors"):
            with pytest.raises(InputError) as info:
                hub.build_model(checkpoint=tmp_path / name, **options)  # type: ignore[arg-type]
            assert str(info.value) == f"{tmp_path / name}: cannot read the file: No such file or directory"
    assert not caplog.records


def test_compressed_archive(tmp_path: Path) -> None:
    """torch.save never compresses, so such a file is made to expand."""
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", pickle.dumps({"model": bytes(10_000_000)}, protocol=2))
    for load in (hub.load_weights, hub.load_fairseq_weights):
        with pytest.raises(InputError, match="entries that are compressed"):
            load(tmp_path / "x.pt")


# -------------------------------------------------------------------------------------------------------- fairseq


class Choice(enum.Enum):
    LAYER = "layer"


def fairseq_checkpoint(weights: dict[str, Tensor], step: Any = 77) -> dict[str, Any]:
    """What fairseq saves for a model with these weights, from the table of names in both."""
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


@pytest.mark.parametrize("step", [77, torch.tensor(77), torch.tensor([77.0]), np.int64(77)])
def test_fairseq(server: Server, cache: Path, step: Any) -> None:
    weights = random_weights(DinoSR(FAIRSEQ))
    url = server.put("dinosr.ckpt", fairseq_checkpoint(weights, step))
    if isinstance(step, np.int64):  # a placeholder, like every numpy object
        weights["current_step"] = torch.tensor([0])
    for _ in range(2):
        model = dinosr(url)
        assert same_weights(model, weights)
        assert not model.training
    assert server.requests == ["/models/dinosr.ckpt"]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_fairseq_pickle_protocols(server: Server, cache: Path, protocol: int) -> None:
    weights = random_weights(DinoSR(FAIRSEQ))
    url = server.put("dinosr.ckpt", fairseq_checkpoint(weights), pickle_protocol=protocol)
    assert same_weights(dinosr(url), weights)


def test_fairseq_in_half_precision_and_shared_storage(server: Server, cache: Path) -> None:
    checkpoint = fairseq_checkpoint(random_weights(DinoSR(FAIRSEQ)))
    half = {name: value.half() for name, value in checkpoint["model"]["_ema"].items()}
    checkpoint["model"]["_ema"] = half
    checkpoint["model"]["mask_emb"] = torch.randn(3, 2 * 16)[1, ::2]  # a view with an offset and a stride
    model = dinosr(server.put("dinosr.ckpt", checkpoint))
    assert torch.equal(model.mask_embedding, checkpoint["model"]["mask_emb"])
    assert torch.equal(model.teacher.layer_norm.bias, half["layer_norm.bias"].float())
    assert model.teacher.layer_norm.bias.dtype == torch.float32


def test_fairseq_without_optimizer(tmp_path: Path) -> None:
    checkpoint = fairseq_checkpoint(random_weights(DinoSR(FAIRSEQ)))
    for state in ({}, {"state": {}}, {"state": {0: {}}}, None):
        torch.save(checkpoint | {"last_optimizer_state": state}, tmp_path / "x.ckpt")
        assert hub.load_fairseq_weights(tmp_path / "x.ckpt")["current_step"].tolist() == [0]


def test_fairseq_mismatches(tmp_path: Path) -> None:
    path = tmp_path / "x.ckpt"
    checkpoint = fairseq_checkpoint(random_weights(DinoSR(FAIRSEQ)))
    del checkpoint["model"]["encoder.layers.1.self_attn.k_proj.weight"]
    checkpoint["model"]["decoder.weight"] = torch.zeros(1)
    torch.save(checkpoint, path)
    with pytest.raises(InputError) as info:
        hub.load_into(DinoSR(FAIRSEQ), hub.load_fairseq_weights(path), path)
    assert "missing: student.layers.1.attention.qkv.weight;" in str(info.value)
    assert "decoder.weight" in str(info.value)
    for broken in (
        {"model": {}},
        {"model": {"_ema": 3}},
        [1],
        {"model": {"_ema": {}, "a": np.zeros(3)}},
        {"model": {"_ema": {}, "a": 3}},
    ):
        torch.save(broken, path)
        with pytest.raises(InputError, match=r"x\.ckpt: damaged or no checkpoint \(expected"):
            hub.load_fairseq_weights(path)


# ----------------------------------------------------------------------------------------------------- build_model


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


@pytest.mark.parametrize("kind", ["meta", "nested", "sparse"])
def test_tensors_that_are_no_weights(tmp_path: Path, kind: str) -> None:
    odd = {
        "meta": torch.empty(3, device="meta"),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "sparse": torch.eye(3).to_sparse(),
    }
    torch.save({"model": {"heads.0.0.bias": odd[kind]}}, tmp_path / "odd.pt")
    with pytest.raises(InputError, match=r"odd\.pt: damaged or no checkpoint \(expected only plain tensors"):
        hub.load_weights(tmp_path / "odd.pt")


def test_checkpoints_of_no_model(tmp_path: Path) -> None:
    """The file is named: of no known type, or larger than any memory by what lies beside it."""
    path, _ = save(tmp_path, hub.build_model(cfg=SPIDR), None)
    with pytest.raises(InputError, match=r"step_3\.pt: model_type is needed"):
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
        with pytest.raises(InputError, match=r"config\.json: model_type is needed"):
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


def test_build_with_a_wrong_configuration_file(tmp_path: Path) -> None:
    path, _ = save(tmp_path, SpidR(SPIDR), {"codebook_sise": 3})
    with pytest.raises(InputError, match=r"config\.json: codebook_sise: unknown key, did you mean codebook_size\?"):
        hub.build_model(model_type="spidr", checkpoint=path)
    with pytest.raises(InputError, match=r"nowhere\.pt: cannot read the file: No such file"):
        hub.build_model(cfg=SPIDR, checkpoint=tmp_path / "nowhere.pt")
