"""Training that is killed at random moments: what is left resumes, and what was pushed loads without this package."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import TOKEN, USER, local_hub
from safetensors.torch import load
from test_publishing import CODE_FILES, load_elsewhere


SCRIPT = Path(__file__).parent / "killed_training.py"


@pytest.mark.parametrize(
    ("trainer", "strategy", "kills"),
    [
        ("InfiniTrainer", "checkpoint", 3),
        pytest.param("InfiniTrainer", "checkpoint", 50, marks=pytest.mark.slow),
        pytest.param("Trainer", "every_save", 50, marks=pytest.mark.slow),
    ],
)
def test_what_a_kill_leaves_resumes_and_what_was_pushed_loads(tmp_path, monkeypatch, trainer, strategy, kills):
    with local_hub() as hub:
        environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        environment |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        command = [sys.executable, SCRIPT, trainer, tmp_path, str(kills), str(kills), strategy]
        done = subprocess.run(command, env=os.environ | environment, text=True, capture_output=True, check=False)
        assert done.returncode == 0, done.stderr[-4000:]
        commits = {sha: files for sha, files in hub.repositories[f"{USER}/run"].commits.items() if files}
        for files in commits.values():
            assert {*CODE_FILES, "config.json", "model.safetensors"} <= set(files)
            assert load(files["model.safetensors"])
            if any(name.startswith("last-checkpoint/") for name in files):
                assert json.loads(files["last-checkpoint/trainer_state.json"])
                assert load(files["last-checkpoint/memory-of-streams-0/infini_cache.safetensors"])
        assert commits
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        revisions = [{"revision": sha} for sha in list(commits)[:: max(1, len(commits) // 4)]]
        assert len(load_elsewhere(tmp_path / "reader", f"{USER}/run", options=revisions)) == len(revisions)
