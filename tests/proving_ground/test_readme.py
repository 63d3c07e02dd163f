"""The SDK example of the README, run as it stands."""

import re
from pathlib import Path
from typing import Any

import pytest
from backend import Backend

README = (Path(__file__).parents[2] / "README.md").read_text()


def test_the_readme_example_deploys_and_chats(shared: Backend, capsys: pytest.CaptureFixture[str]) -> None:
    match = re.search(r"<!-- sdk: .*?-->\n```python\n(.*?)```", README, re.S)
    assert match is not None
    names: dict[str, Any] = {"TOKEN": shared.token("dana")}
    exec(match[1].replace("http://127.0.0.1:8787", shared.url), names)
    assert capsys.readouterr().out.strip()
    names["chat"]._client.close()
    names["client"].session.close()
