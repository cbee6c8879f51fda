"""docs/clients.md shows what works: its Python runs, its commands too."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SHOWN = "http://127.0.0.1:8000"
PAGE = (ROOT / "docs" / "clients.md").read_text()

pytestmark = pytest.mark.filterwarnings("ignore:.*using the `ReadOnly` qualifier:UserWarning")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.split()[1])
def test_python(code: str, address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert SHOWN in code
    exec(compile(code.replace(SHOWN, address), "docs/clients.md", "exec"), {"__name__": "shown"})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("command", blocks("sh"), ids=lambda command: command.split()[2])
def test_lm_eval(command: str, address: str, tmp_path: Path) -> None:
    program, *words = shlex.split(command.replace("\\\n", "").replace(SHOWN, address))
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-m", program, *words, "--limit", "8", "--output_path", str(tmp_path / "out.json")],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | offline,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    [written] = tmp_path.glob("out*.json")
    [scores] = json.loads(written.read_text())["results"].values()
    assert scores["acc,none"] > 0.5
