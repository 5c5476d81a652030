"""The pages for people, README.md and docs/*.md: their code blocks, commands and links."""

import argparse
import re
import runpy
import shlex
import sys
from typing import NamedTuple

from helpers import ROOT
from torch.distributed.run import get_args_parser

from sligru_recipes.training import experiment

PAGES = ["README.md", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md"))]
_FENCED = re.compile(r"^```(\S*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


class Block(NamedTuple):
    language: str  # "indented" of a block that has no fence, and so no language
    text: str


def blocks_of(text):
    """The code blocks in a page's text."""
    indented = re.findall(r"(?:\A|\n)\n*((?: {4}.*\n?)+)", f"\n\n{_FENCED.sub('', text)}")
    return [Block(*found) for found in _FENCED.findall(text)] + [
        Block("indented", block) for block in indented
    ]


def blocks(page, language):
    return [block.text for block in blocks_of(read(page)) if block.language == language]


# ---- links


def broken_links(page):
    """Those to files that do not exist, or to headings that they do not have."""
    broken = []
    prose = _FENCED.sub("", read(page))
    for link in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"https?:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    return broken


def anchors(path):
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


# ---- YAML: before and after a change, where a block is a diff


def versions_of_yaml(page):
    """The YAML of a page in order, as one file: what it was before its diffs, and is after."""
    before, after = [], []
    for language, text in blocks_of(read(page)):
        if language == "diff":
            before += [line[1:] for line in text.splitlines() if not line.startswith("+")]
            after += [line[1:] for line in text.splitlines() if not line.startswith("-")]
        elif language == "yaml":
            before += text.splitlines()
            after += text.splitlines()
    return "\n".join(before), "\n".join(after)


# ---- commands


class Accepted(BaseException):
    """Raised where a script has parsed its command line: it is not to run."""


def commands_of(block):
    """The words of each command, without the variables that it sets."""
    commands = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"[A-Z_]+=", words[0]):
            name = words.pop(0).partition("=")[0]
            assert is_variable(name), f"{line}: nothing reads {name}"
        if words:
            commands.append(words)
    return commands


def is_variable(name):
    """Whether the package or its build reads an environment variable."""
    sources = [ROOT / "setup.py", *ROOT.glob("sb_fast_sligru/**/*.py")]
    sources += ROOT.glob("cuda_ops/**/*.[hc]*")
    return any(name in path.read_text(encoding="utf-8") for path in sources)


def check_command(words, monkeypatch):
    """Raise AssertionError if the repository has no such command, or it no such option.

    Scripts parse their words as always and end there. The package's own modules, which only print,
    run.
    """
    program, *words = words
    assert program in _PROGRAMS, f"no test knows {program}"
    monkeypatch.chdir(ROOT)
    try:
        _PROGRAMS[program](words, monkeypatch)
    except SystemExit as error:  # as parsers end, with their reason on the standard error
        raise AssertionError(f"{program} {shlex.join(words)}: {error}") from error


def _make(words, monkeypatch):
    makefile = read("Makefile")
    for word in words:
        name, is_value, _ = word.partition("=")
        found = rf"\$\({name}\)" if is_value else rf"^{name}:"
        assert re.search(found, makefile, re.MULTILINE), f"the Makefile has no {name}"


def _python(words, monkeypatch):
    if words[0] == "-m":
        module = words[1]
        assert module.startswith("sb_fast_sligru."), f"no test knows python -m {module}"
        monkeypatch.setattr(sys, "argv", words[1:])
        monkeypatch.delitem(sys.modules, module, raising=False)  # else runpy warns
        runpy.run_module(module, run_name="__main__")
        return
    script, parse_args = words[0], argparse.ArgumentParser.parse_args

    def parse(*arguments, **options):
        parse_args(*arguments, **options)
        raise Accepted

    def resolve(*_):  # called when the keys of a recipe's command line have been checked
        raise Accepted

    assert (ROOT / script).is_file(), f"there is no {script}"
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(experiment, "resolve", resolve)
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.syspath_prepend((ROOT / script).parent)
    try:
        runpy.run_path(script, run_name="__main__")
    except Accepted:
        return
    raise AssertionError(f"{script} does not parse its words")


def _torchrun(words, monkeypatch):
    options = get_args_parser().parse_args(words)
    _python([options.training_script, *options.training_script_args], monkeypatch)


def _pip(words, monkeypatch):
    from pip._internal.commands import create_command  # environments of uv have no pip

    command, *words = words
    _, requirements = create_command(command).parser.parse_args(words)
    for requirement in requirements:
        extra = re.search(r"\[(\w+)\]", requirement)
        if extra:
            assert f"\n{extra[1]} = [" in read("pyproject.toml"), f"there is no extra {extra[1]}"
        if "==" in requirement:
            assert requirement in read("requirements.txt").split(), f"{requirement} is not tested"


def _uv(words, monkeypatch):
    assert words[:2] == ["pip", "install"], f"no test knows uv {words[0]}"
    _pip(words[1:], monkeypatch)


def _docker(words, monkeypatch):
    assert words[0] in ("build", "run") and (ROOT / "Dockerfile").is_file()


_PROGRAMS = {
    "docker": _docker,
    "make": _make,
    "pip": _pip,
    "python": _python,
    "torchrun": _torchrun,
    "uv": _uv,
}
