"""Losses of six kinds of runs are those that were stored."""

import json

from conftest import ROOT

from tools.fingerprint import fingerprint

STORED = ROOT / "results" / "fingerprint.json"


def test_losses_are_the_stored_ones(shell):
    """On any processor to a tolerance, on that which the file names to the bit."""
    code, lines, _ = shell(fingerprint, "--check", STORED)
    assert code == 0 and lines[-1].startswith("0 of 6 runs differ"), lines


def test_a_changed_loss_is_named(shell, tmp_path):
    """With its run, its step, the stored number and the new one, on another processor, too."""
    stored = json.loads(STORED.read_text())
    losses = stored["runs"]["uniform"]["losses"].split()
    losses[2] = f"{float(losses[2]) * 1.01}"
    changed = {**stored["runs"]["uniform"], "losses": " ".join(losses)}
    file = tmp_path / "changed.json"
    file.write_text(json.dumps({**stored, "processor": "another", "runs": {"uniform": changed}}))
    code, lines, _ = shell(fingerprint, "--check", file)
    assert code == 1 and lines[0].startswith("uniform, step 3: loss 3.6") and lines[0].endswith(f"stored {losses[2]}")
    assert "allowed 0.001 on another processor" in lines[-1]


def test_a_file_without_losses_is_refused(shell, tmp_path):
    file = tmp_path / "empty.json"
    file.write_text("{}")
    code, _, err = shell(fingerprint, "--check", file)
    assert code == 2 and err.count("\n") == 1 and "no file of losses such as results/fingerprint.json" in err
    assert shell(fingerprint, "--check", file, "--store", file)[0] == 2 and file.read_text() == "{}"
