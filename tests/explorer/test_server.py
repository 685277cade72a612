"""Who may see the explorer."""

from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.explorer.server import checked_token, is_loopback, read_token


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("10.0.0.3", False), ("a.b", False)],
)
def test_only_the_loopback_interface_is_open_without_a_token(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected
    assert (checked_token(None, host) is None) is expected


def test_made_tokens_are_long_and_differ_and_given_ones_are_kept() -> None:
    made = {checked_token(None, "0.0.0.0") for _ in range(5)}
    assert len(made) == 5 and all(len(token or "") >= 24 for token in made)
    assert checked_token("0123456789abcdef", "127.0.0.1") == "0123456789abcdef"
    with pytest.raises(InputError, match="16") as caught:
        checked_token("short-secret", "0.0.0.0")
    assert "short-secret" not in str(caught.value)


def test_a_token_file_is_read_without_its_line_break(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("0123456789abcdef\n")
    assert read_token(str(tmp_path / "token")) == "0123456789abcdef"
    with pytest.raises(InputError, match="nowhere"):
        read_token(str(tmp_path / "nowhere"))
