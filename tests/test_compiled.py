"""The cache of compiled loops: every file with compiled code counts, and a change in any of them is noticed."""

import re
from pathlib import Path

from passes.shiftcode import compiled, kernels

FOLDER = Path(compiled.__file__).parent


def test_every_file_with_compiled_code_is_part_of_the_stamp() -> None:
    found = {p.name for p in FOLDER.glob("*.py") if re.search(r"^@compiled$", p.read_text(encoding="utf-8"), re.M)}
    assert found == set(compiled.SOURCES)


def test_what_is_kept_on_disk_is_dated_by_all_of_them() -> None:
    cache = kernels.walk._cache._cache_file  # type: ignore[attr-defined]
    assert cache._source_stamp == compiled._STAMP
    kept, cache._source_stamp = cache._source_stamp, "another text"
    try:
        assert cache._load_index() == {}, "code of another text is not taken"
    finally:
        cache._source_stamp = kept
