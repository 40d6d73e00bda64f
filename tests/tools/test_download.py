"""Downloads from a real web server on loopback, and every way they can break."""

import logging
import re
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest

from helpers.web import Server
from spidr.tools.download import Remote
from spidr.tools.errors import InputError

CONTENT = bytes(range(256)) * 400


def fetch(url: str, saved_as: str = "a.pt", *, check_hash: bool = False, progress: bool = False) -> bytes:
    def read(path: Path) -> bytes:
        content = path.read_bytes()
        if not content.startswith(CONTENT[:4]) or len(content) < len(CONTENT):
            raise InputError(f"{path}: no file of ours")
        return content

    return Remote(url, saved_as).fetch(read, check_hash=check_hash, progress=progress)


@pytest.mark.parametrize("announce", [True, False])
def test_downloaded_once(server: Server, cache: Path, announce: bool, capfd: pytest.CaptureFixture[str]) -> None:
    url, server.announce = server.put("a.pt", CONTENT), announce
    assert fetch(url) == fetch(url) == CONTENT
    assert server.requests == ["/models/a.pt"]
    assert [path.name for path in cache.iterdir()] == ["a.pt"]
    assert capfd.readouterr() == ("", "")


def test_progress_goes_to_stderr(server: Server, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    fetch(server.put("a.pt", CONTENT), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "100%" in err


@pytest.mark.parametrize("sent", [0, 1, 1000, 20_000, -1])
@pytest.mark.parametrize("ranges", [True, False])
def test_an_interrupted_download_is_resumed(server: Server, cache: Path, sent: int, ranges: bool) -> None:
    url, server.sent, server.ranges = server.put("a.pt", CONTENT), sent, ranges
    with pytest.raises(InputError, match=r"a\.pt: cannot download it to .*, where it may be put by hand: it stopped"):
        fetch(url)
    assert not (cache / "a.pt").exists()
    server.sent, begun = None, (cache / "a.pt.partial").stat().st_size
    assert fetch(url) == CONTENT
    assert server.requests[-1] == f"/models/a.pt bytes={begun}-"
    assert [path.name for path in cache.iterdir()] == ["a.pt"]


def test_a_file_that_changes_before_it_is_resumed(server: Server, cache: Path) -> None:
    url, server.sent = server.put("a.pt", CONTENT), 5000
    with pytest.raises(InputError, match="it stopped"):
        fetch(url)
    server.sent, changed = None, CONTENT[:4] + CONTENT[::-1]
    server.put("a.pt", changed)
    assert fetch(url) == changed


def test_leftovers_may_be_longer_than_the_file(server: Server, cache: Path) -> None:
    cache.mkdir(parents=True)
    (cache / "a.pt.partial").write_bytes(CONTENT + b"more")
    assert fetch(server.put("a.pt", CONTENT)) == CONTENT


def test_leftovers_may_be_of_another_file(server: Server, cache: Path) -> None:
    """A file that ``read`` refuses is downloaded again from the start."""
    cache.mkdir(parents=True)
    (cache / "a.pt.partial").write_bytes(b"else")
    assert fetch(server.put("a.pt", CONTENT)) == CONTENT


def test_killed_during_download(server: Server, cache: Path) -> None:
    url = server.put("a.pt", CONTENT)
    server.stall.clear()
    code = "import sys; from spidr.tools.download import Remote; Remote(sys.argv[1], 'a.pt').fetch(print)"
    child = subprocess.Popen([sys.executable, "-c", code, url])
    while not server.requests:
        assert child.poll() is None
        time.sleep(0.05)
    child.send_signal(signal.SIGKILL)
    child.wait()
    server.stall.set()
    assert not (cache / "a.pt").exists()
    assert fetch(url) == CONTENT


def test_several_at_once(server: Server, cache: Path) -> None:
    url = server.put("a.pt", CONTENT)
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(fetch, [url] * 4)) == {CONTENT}
    assert [path.name for path in cache.iterdir()] == ["a.pt"]
    assert server.requests == ["/models/a.pt"]


@pytest.mark.parametrize("content", [b"<html>Sign in to the network</html>", b""])
def test_wrong_content_is_not_kept(server: Server, cache: Path, content: bytes) -> None:
    with pytest.raises(InputError, match=r"where it may be put by hand: no file of ours"):
        fetch(server.put("a.pt", content))
    assert list(cache.iterdir()) == []


def test_a_bad_cached_file_is_downloaded_again(server: Server, cache: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache.mkdir(parents=True)
    (cache / "a.pt").write_bytes(CONTENT[:-1])
    with caplog.at_level(logging.WARNING):
        assert fetch(server.put("a.pt", CONTENT)) == CONTENT
    assert "fetching it again" in caplog.text
    assert (cache / "a.pt").read_bytes() == CONTENT


def test_a_bad_cached_file_survives_a_failed_download(server: Server, cache: Path) -> None:
    """Nothing is lost without a network: another version of the package may be able to read the file."""
    cache.mkdir(parents=True)
    (cache / "a.pt").write_bytes(b"unknown format")
    with pytest.raises(InputError, match="404"):
        fetch(server.url("a.pt"))
    assert (cache / "a.pt").read_bytes() == b"unknown format"


def test_no_server(cache: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/a.pt"
        with pytest.raises(
            InputError, match=r"cannot download it to .*, where it may be put by hand: .*refused"
        ) as info:
            fetch(url)
    assert info.value.__suppress_context__  # one line, not the whole chain of tracebacks


def test_unwritable_cache(server: Server, cache: Path) -> None:
    cache.parent.write_text("a file where the folder should be")
    with pytest.raises(InputError, match="cannot download it to"):
        fetch(server.put("a.pt", CONTENT))


def test_check_hash(server: Server, cache: Path) -> None:
    good, bad = f"a-{sha256(CONTENT).hexdigest()[:8]}.pt", "a-0123456789.pt"
    assert fetch(server.put(good, CONTENT), good, check_hash=True) == CONTENT
    with pytest.raises(InputError, match=r"SHA-256 is [0-9a-f]{64}, expected 0123456789"):
        fetch(server.put(bad, CONTENT), bad, check_hash=True)
    assert [path.name for path in cache.iterdir()] == [good]
    assert fetch(server.url(bad), bad) == CONTENT
    assert fetch(server.put("b.pt", CONTENT), "b.pt", check_hash=True) == CONTENT  # no hash in the name


def test_files_with_the_same_name_are_kept_apart(server: Server, cache: Path) -> None:
    """Many models are called final.pt; each comes with its config.json."""
    urls = [server.put(f"{name}/final.pt", CONTENT + name.encode()) for name in "ab"]
    server.put("b/config.json", b"{}")
    assert [fetch(url, "") for url in urls] == [CONTENT + b"a", CONTENT + b"b"]
    assert [Remote(url).path.with_name("config.json").exists() for url in urls] == [False, True]


def test_the_hugging_face_hub(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through huggingface_hub and its cache, or without it, by URL."""
    repository = "/someone/spidr-nl/resolve/main"
    server.files = {f"{repository}/final.pt": CONTENT, f"{repository}/config.json": b"{}"}
    code = """
import sys
from pathlib import Path
from spidr.tools.download import Remote
remote = Remote("hf:someone/spidr-nl/final.pt")
if sys.argv[1] == "without":
    sys.modules["huggingface_hub"] = None
for _ in range(2):
    assert len(remote.fetch(Path.read_bytes, progress=False)) == 102_400
assert remote.cached().with_name("config.json").read_text() == "{}"
print(remote.cached())
"""
    for folder, how in (("hf-home", "with"), ("torch-home", "without")):
        monkeypatch.setenv("HF_ENDPOINT", server.host)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
        monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch-home"))
        done = subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        assert done.stdout.startswith(f"{tmp_path}/{folder}/")
    for wrong in ("hf:someone/final.pt", "hf:a/b/../c", "hf:a/b/"):
        with pytest.raises(InputError, match=r"^" + re.escape(f"{wrong}: expected hf:OWNER/NAME/FILE")):
            Remote(wrong).fetch(Path.read_bytes)
