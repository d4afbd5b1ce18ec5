"""Every code block of the README and of docs/ is run, in order, in a fresh Django project for each page.

A block says in its info string what it is: ``python`` is run as a program, ``python file=PATH at=top|end`` is
added to a file of the project, ``toml`` must be a right puff.toml (the project's with ``file=PATH``), ``bash`` is
run line by line, ``text`` is shown only.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import urllib.request
from configparser import ConfigParser
from dataclasses import dataclass
from pathlib import Path

import pytest

from puff_patch.project import load

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
# The README's blocks up to "Serve": the drop-in recipe.
RECIPE_ENDS = 6
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<body>.*?)^(?P=indent)```$", re.MULTILINE | re.DOTALL)


@dataclass
class Block:
    """A fenced code block."""

    language: str
    attributes: dict[str, str]
    body: str
    line: int


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page, in order."""
    text = page.read_text()
    found = []
    for match in BLOCK.finditer(text):
        language, *attributes = match["info"].split() or [""]
        found.append(
            Block(
                language,
                dict(attribute.split("=", 1) for attribute in attributes),
                textwrap.dedent(match["body"]),
                text.count("\n", 0, match.start()) + 1,
            )
        )
    return found


class Project:
    """A fresh Django project in which the blocks of one page are run."""

    def __init__(self, folder: Path, environment: dict[str, str]) -> None:
        self.folder = folder
        self.environment = {
            **environment,
            "PATH": f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}",
            "DJANGO_SETTINGS_MODULE": "mysite.settings",
        }
        self.shell(
            [sys.executable, "-m", "django", "startproject", "mysite", str(folder)], DJANGO_SETTINGS_MODULE=""
        )
        # Since 6.1 a new project prints its mails, which `check --deploy` takes for an error.
        settings = folder / "mysite" / "settings.py"
        settings.write_text(settings.read_text().replace("mail.backends.console.", "mail.backends.smtp."))
        self.write(
            "your_script.py", "import sys, puff_patch\nassert puff_patch.is_patched('sockets')\nprint(sys.argv)\n"
        )
        self.write("your_module.py", "import puff_patch\nassert puff_patch.is_patched('sockets')\n")

    def write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)

    def shell(self, command: list[str], **environment: str) -> None:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}{done.stderr}"

    def run(self, block: Block) -> None:
        if block.language == "python" and "file" in block.attributes:
            self.add(block)
        elif block.language == "python":
            self.shell([sys.executable, "-W", "error", "-c", block.body])
        elif block.language == "toml":
            self.check_toml(block)
        elif block.language == "bash":
            for line in block.body.splitlines():
                self.command(line)
        else:
            assert block.language == "text", f"line {block.line}: say what a block is: {block.language!r}"

    def add(self, block: Block) -> None:
        path = self.folder / block.attributes["file"]
        old = path.read_text() if path.exists() else ""
        if block.attributes.get("at") == "top":
            shebang, newline, rest = old.partition("\n") if old.startswith("#!") else ("", "", old)
            path.write_text(f"{shebang}{newline}{block.body}{rest}")
        elif block.attributes.get("at") == "end":
            path.write_text(f"{old}\n{block.body}")
        else:
            path.write_text(block.body)

    def command(self, line: str) -> None:
        words = shlex.split(line)
        if words[:1] == ["make"]:
            # They run in tests/test_make.py (demo) and are what is running now (test).
            subprocess.run(
                ["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True, timeout=30
            )
        elif words[:2] == ["pip", "install"]:
            self.check_requirements(words[2:])
        elif "runpuff" in words or words[:2] in (["python", "app.py"], ["puff", "serve"]):
            self.serve(words)
        else:
            self.shell(["sh", "-ec", line])

    def check_toml(self, block: Block) -> None:
        """It must be a right puff.toml; with ``file=`` it is the project's from now on."""
        path = self.folder / block.attributes.get("file", "shown.toml")
        path.write_text(block.body)
        load(path)

    def check_requirements(self, requirements: list[str]) -> None:
        setup = ConfigParser(interpolation=None)
        setup.read(ROOT / "setup.cfg")
        for requirement in requirements:
            match = re.fullmatch(r"([\w-]+)(?:\[([\w,]+)\])?", requirement)
            assert match is not None
            assert match[1] == setup["metadata"]["name"]
            assert set((match[2] or "").split(",")) - {""} <= set(setup["options.extras_require"])

    def serve(self, words: list[str]) -> None:
        """Start the server as the page says, but on a free port; fetch a page; stop it."""
        prefix = [word for word in words if re.match(r"^[A-Z_]+=", word)]
        environment = {**self.environment, **dict(word.split("=", 1) for word in prefix)}
        if prefix:  # the page shows what happens without servers of one's own
            environment = {key: value for key, value in environment.items() if not key.endswith("_URL")}
        words = [re.sub(r"^(127\.0\.0\.1:)?\d+$", r"\g<1>0", word) for word in words[len(prefix) :]]
        if words[0] == "puff":
            words = [*words, "--bind", "127.0.0.1:0"]
        process = subprocess.Popen(
            words,
            cwd=self.folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        try:
            output = []
            for line in process.stdout:
                output.append(line)
                if address := re.search(r"https?://[\w.:\[\]]+", line):
                    break
            else:
                pytest.fail("the server ended: " + "".join(output))
            with urllib.request.urlopen(address[0], timeout=30) as response:
                assert response.status == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(30) == 0
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            process.stdout.close()


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_every_code_block_of_the_page_works(page, tmp_path, services):
    environment = {
        **os.environ,
        **services.env(),
        "PUFF_REPORTING_POSTGRES_URL": services.postgres,
    }
    project = Project(tmp_path, environment)
    if page != README:  # the other pages speak of a project that has followed the README
        for block in blocks(README)[:RECIPE_ENDS]:
            if "file" in block.attributes:
                project.add(block)
    for block in blocks(page):
        try:
            project.run(block)
        except (AssertionError, subprocess.CalledProcessError) as error:
            raise AssertionError(f"{page.name}, line {block.line}: {error}") from error


@pytest.mark.parametrize("page", PAGES, ids=[page.name for page in PAGES])
def test_links_within_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"
