"""The package that pip makes: `regularizers.py` and nothing else, which needs torch alone."""

import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser

from conftest import ROOT


def test_the_wheel_holds_one_file(tmp_path):
    """Built from a copy of the top level, where all else that is there could be packed; torch brings setuptools."""
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "results", "runs", "data", "build", "*.egg-info"))
    build = "from setuptools import build_meta; build_meta.build_wheel('wheels')"
    subprocess.run([sys.executable, "-c", build], cwd=source, check=True, capture_output=True)
    [wheel] = (source / "wheels").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        assert names == {"regularizers.py"}
        assert archive.read("regularizers.py") == (ROOT / "regularizers.py").read_bytes()
        [licence] = [name for name in archive.namelist() if name.endswith("/LICENSE")]
        assert archive.read(licence) == (ROOT / "LICENSE").read_bytes()
        [metadata] = [name for name in archive.namelist() if name.endswith("/METADATA")]
        told = Parser().parsestr(archive.read(metadata).decode())
    requirements = (ROOT / "requirements.txt").read_text().split()
    assert told.get_all("Requires-Dist") == [line for line in requirements if line.startswith("torch>")]
    assert told["License-Expression"] == "MIT" and told.get_payload().startswith("# Hyperspherically")
