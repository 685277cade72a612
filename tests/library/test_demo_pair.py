"""The demo's pair in a folder: built once, and the same one that a run's organism is."""

from pathlib import Path

import pytest

import crossray


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo")


def test_it_is_built_once_and_is_a_pair(folder: Path) -> None:
    demo = crossray.demo_pair(folder, size="tiny")
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert crossray.demo_pair(folder, size="tiny") == demo
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == times
    assert (len(demo.texts), len(demo.dialogues)) == (300, 200)
    assert {message["role"] for message in demo.dialogues[0]} == {"user", "assistant"}
    pair = crossray.load_pair(demo.base, demo.chat, layer=1)
    assert pair.difference([*demo.texts[:20], *demo.dialogues[:20]]).is_distinguishable
    assert pair.origin.base.digest != pair.origin.chat.digest


def test_what_makes_no_sense_is_refused(tmp_path: Path) -> None:
    with pytest.raises(crossray.InputError, match="demo, tiny"):
        crossray.demo_pair(tmp_path, size="huge")
    (tmp_path / "tiny").touch()
    with pytest.raises(crossray.InputError, match="another"):
        crossray.demo_pair(tmp_path, size="tiny")
