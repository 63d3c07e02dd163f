"""Tokens and callers."""

import json
import stat
from pathlib import Path

import pytest

from proving_ground.auth import Caller, TokenFile, demo_tokens, write_demo


def test_demo_tokens_identify_their_holders(tmp_path: Path) -> None:
    write_demo(tmp_path / "tokens.json")
    tokens = demo_tokens(tmp_path / "tokens.json")
    known = TokenFile.load(tmp_path / "tokens.json")
    assert known.identify(tokens["dana"]) == Caller("dana", "acme", ("operator",), ("support-bot", "production"))
    assert known.identify(tokens["sam"]) == Caller("sam", "acme", ("viewer",), ())
    assert known.identify(tokens["lee"]) == Caller("lee", "globex", ("operator",), ())


@pytest.mark.parametrize("bearer", ["", "x", "pg-dana-", "\udcff"])
def test_other_tokens_identify_nobody(tmp_path: Path, bearer: str) -> None:
    write_demo(tmp_path / "tokens.json")
    assert TokenFile.load(tmp_path / "tokens.json").identify(bearer) is None


def test_the_file_is_its_owners_and_written_once(tmp_path: Path) -> None:
    write_demo(tmp_path / "tokens.json")
    assert stat.S_IMODE((tmp_path / "tokens.json").stat().st_mode) == 0o600
    with pytest.raises(FileExistsError):
        write_demo(tmp_path / "tokens.json")


def test_demo_tokens_are_random(tmp_path: Path) -> None:
    write_demo(tmp_path / "a")
    write_demo(tmp_path / "b")
    assert set(demo_tokens(tmp_path / "a").values()).isdisjoint(demo_tokens(tmp_path / "b").values())


@pytest.mark.parametrize("content", ["", "[]", '{"hidden-token": {"subject": "x"}}', '{"hidden-token": 3}'])
def test_a_wrong_file_is_refused_without_showing_a_token(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokens.json").write_text(content)
    with pytest.raises(ValueError, match="who holds each token") as caught:
        TokenFile.load(tmp_path / "tokens.json")
    assert "hidden-token" not in str(caught.value)


def test_tokens_are_not_kept(tmp_path: Path) -> None:
    write_demo(tmp_path / "tokens.json")
    tokens = demo_tokens(tmp_path / "tokens.json")
    known = TokenFile.load(tmp_path / "tokens.json")
    assert not any(token in repr(vars(known)) for token in tokens.values())
    assert set(json.loads((tmp_path / "tokens.json").read_text())) == set(tokens.values())
