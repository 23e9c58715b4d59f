"""What every test shares: one seed, few threads, real models last, and where data for them may lie."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings

from ir.program import Program
from tests.hf_folder import some_text, write_folder

SEED = 20240601

# Derandomised, so that a run in CI says the same twice; HYPOTHESIS_PROFILE=explore looks for new examples.
settings.register_profile("fixed", deadline=None, derandomize=True, database=None)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "fixed"))

# Workers side by side take one core each, and so do the processes they start.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", min(2, os.cpu_count() or 1))))


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the switch that rewrites the texts under tests/golden."""
    parser.addoption("--update-golden", action="store_true", help="write tests/golden anew instead of comparing")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put slow tests after quick ones and real-model tests last, so that a plain mistake shows early.

    Tests on real models stay with one worker: each holds gigabytes, and the first one fetches.
    """
    for item in items:
        if item.get_closest_marker("real") is not None:
            item.add_marker(pytest.mark.xdist_group("real"))
    items.sort(
        key=lambda item: (item.get_closest_marker("real") is not None, item.get_closest_marker("slow") is not None)
    )


@pytest.fixture(autouse=True)
def _seeded() -> None:
    random.seed(SEED)
    # Libraries under test draw from the legacy generator.
    np.random.seed(SEED)
    torch.manual_seed(SEED)


@pytest.fixture(scope="session")
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache directory that all tests of a session share, so that a configuration is traced once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def own_cache(cache_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep a test, and the processes it starts, away from the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))


@pytest.fixture(scope="session")
def tiny_hf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny llama as a Hugging Face directory; not to be written into."""
    return write_folder(tmp_path_factory.mktemp("hf") / "tiny")


@pytest.fixture
def quick_builtin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the built-in text short: all of it takes longer to encode than a tiny model to compile."""
    monkeypatch.setattr("tools.text._builtin", some_text)


@pytest.fixture(scope="session")
def tiny_model(tiny_hf: Path, cache_home: Path) -> Program:
    """The same, opened; to be cloned before a change."""
    from frontend.open import open_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache_home))
        return open_model(str(tiny_hf)).program


@pytest.fixture(scope="session")
def untied_model(tmp_path_factory: pytest.TempPathFactory, cache_home: Path) -> Program:
    """A tiny llama whose head has a weight of its own."""
    from frontend.open import open_model

    folder = write_folder(tmp_path_factory.mktemp("hf") / "untied", tie_word_embeddings=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache_home))
        return open_model(str(folder)).program


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The directory of evaluation texts (`wikitext2/...`): $NOMUL_DATA, or `shared/data` in or beside the checkout."""
    root = Path(__file__).resolve().parent.parent
    named = os.environ.get("NOMUL_DATA")
    places = [Path(named)] if named else [root / "shared" / "data", root.parent / "shared" / "data"]
    for place in places:
        if place.is_dir():
            return place
    pytest.skip(f"no evaluation texts: set NOMUL_DATA (looked in {', '.join(map(str, places))})")
