"""examples/native, built with the running interpreter: what docs/native.md promises of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
from support.process import run

EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "native"


def compiler() -> str | None:
    return shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0]) or shutil.which("cc")


def has_headers() -> bool:
    return (Path(sysconfig.get_paths()["include"]) / "Python.h").exists()


@pytest.mark.skipif(compiler() is None, reason="there is no C compiler (on Debian: apt install gcc)")
@pytest.mark.skipif(not has_headers(), reason="there is no Python.h (on Debian: apt install python3-dev)")
def test_a_function_in_c_runs_beside_the_hub_and_beside_itself(tmp_path: Path) -> None:
    # As setuptools would, without pip's isolated environment: that one needs a package registry.
    library = tmp_path / f"similarity{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run(
        [
            *(str(compiler()), "-O2", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Werror", "-fPIC", "-shared"),
            *(f"-I{sysconfig.get_paths()['include']}", "-o", str(library), str(EXAMPLE / "similarity.c")),
        ],
        check=True,
        timeout=60,
    )
    done = run([str(EXAMPLE / "measure.py"), "8000"], env={"PYTHONPATH": str(tmp_path)}, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    # The call holds up nobody; called directly, it does: then there are ticks only before and after.
    assert found["ticks_blocking"] > max(30, 2 * found["ticks_direct"])
    # With the GIL, the second call would begin when the first has ended.
    assert found["overlap"] > 0.3
    assert found["python_x"] > 10
    bad = run(
        ["-c", "import similarity; similarity.distance(b'a', 'b')"], env={"PYTHONPATH": str(tmp_path)}, timeout=60
    )
    assert "TypeError" in bad.stderr


def test_the_example_can_be_installed() -> None:
    """Its pyproject names the sources that are there, in the way setuptools reads."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    settings = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())
    for extension in settings["tool"]["setuptools"]["ext-modules"]:
        assert all((EXAMPLE / source).exists() for source in extension["sources"])
