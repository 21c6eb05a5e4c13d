"""What the README and the pages of docs/ name exists: links, commands with their options, keys of configs, files.

Commands are parsed, with the project's own parsers, and not run: tests/integration runs each command and each config.
"""

import contextlib
import io
import re
import runpy
import shlex

import pytest
import yaml

from lit_modules.cli import COMMANDS, main
from lit_modules.commands import help
from tests.conftest import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES.remove(ROOT / "docs/log.md")  # what was tried then, with the commands of then
LANGUAGE, VISION = (ROOT / f"configs/{task}/quickstart.yaml" for task in ("language", "vision"))
FIRST_WORDS = ("tokenformer", "make", "pytest", "python")
# What stands in place of a config.
PLACEHOLDERS = {"FILE", "RUN/config.yaml"}
MODELS = {"MODEL", "models/vit"}  # that `predict` takes in place of one


def commands():
    """The words of each command of the pages, with its line and the page; what is behind a # explains it.

    But of from-elsewhere.md only ours; a test runs these.
    """
    found = {}
    for page in PAGES:
        text = page.read_text()
        blocks = [line for block in re.findall(r"```\n(.*?)```", text, re.S) for line in block.splitlines()]
        for line in blocks + re.findall(r"`([^`\n\\]+)`", re.sub(r"```.*?```", "", text, flags=re.S)):
            for command in line.split("; "):
                try:
                    words = shlex.split(command, comments=True)
                except ValueError:  # prose, with an apostrophe
                    continue
                theirs = page.name == "from-elsewhere.md" and words[:1] != ["tokenformer"]
                if words and words[0] in FIRST_WORDS and len(words) > 1 and not theirs:
                    found.setdefault(tuple(words), f"{page.relative_to(ROOT)}: {line}")
    return found


def options(words):
    return {word.split("=")[0] for word in words if word.startswith("--")}


def shown(arguments):
    """What a command line prints before it exits with 0."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = 0
        try:
            main(arguments)
        except SystemExit as ended:
            code = ended.code
    assert not code, printed.getvalue()
    return printed.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.M)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}, link


def test_pictures_are_what_the_script_draws():
    for name, draw in runpy.run_path(str(ROOT / "docs/draw.py"))["PICTURES"].items():
        assert (ROOT / "docs" / name).read_text() == draw(), f"python docs/draw.py: {name}"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs/README.md").read_text() + (ROOT / "docs/results.md").read_text()
    for page in PAGES[2:]:
        name = str(page.relative_to(ROOT / "docs"))
        assert name == "README.md" or f"]({name})" in index, name


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_commands_exist_with_their_options(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = commands()
    assert len(found) > 60
    makefile = (ROOT / "Makefile").read_text()
    pages = {name: shown([name, "--help"]) for name in COMMANDS}
    for words, where in found.items():
        program, first, *rest = words
        if program == "make":
            for target in (word for word in (first, *rest) if "=" not in word):
                assert re.search(rf"^{target}:", makefile, re.M), where
        elif program == "pytest":
            for path in (word for word in (first, *rest) if word.startswith("tests/")):
                assert (ROOT / path.split("::")[0]).exists(), where
        elif program == "python":
            assert first == "-m" or (ROOT / first).exists(), where
            if first == "-m" and rest[0].startswith("benchmarks"):
                assert (ROOT / rest[0].replace(".", "/")).with_suffix(".py").exists() or rest[0] == "benchmarks", where
            if first == "-m" and rest[0] == "studies":
                assert rest[1] in ("NAME", "page") or (ROOT / f"studies/{rest[1]}.yaml").exists(), where
        elif first in COMMANDS:
            missing = {option for option in options(rest) if not re.search(rf"{option}\b", pages[first])}
            if first in ("submit", "sweep"):  # take keys of the config too
                missing = {option for option in missing if "." not in option}
            assert not missing, where
        elif first in help.COMMANDS and "--help" not in rest:
            config = str(VISION if "vision.md" in where or "predict_source" in where else LANGUAGE)
            arguments = [config if word in PLACEHOLDERS else word for word in rest if word not in MODELS]  # no config
            if "--config" not in arguments:
                arguments = ["--config", config, *arguments]
            shown([first, *arguments, "--print_config"])
        else:
            assert first in ("COMMAND", "--help", *help.COMMANDS), where


def test_commands_that_need_more_say_so():
    """All others work on a laptop without a network."""
    for words, where in commands().items():
        configs = [ROOT / word for word in words if word.startswith("configs/")]
        sources = [re.search(r"^    source: (\S+)", config.read_text(), re.M) for config in configs]
        source = next((found[1] for found in sources if found), "")
        if words[1] in ("fit", "prepare") and not {"--data.source", "--print_config"} & options(words):
            assert not source.startswith(("hf:", "data/")) or "needs" in where, where
        if words[:2] == ("tokenformer", "submit"):
            assert "Slurm" in where or "slurm.md" in where, where


def test_python_runs():
    """But what reads a model of the reader's."""
    blocks = [block for page in PAGES for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.S)]
    runnable = [block for block in blocks if "models/" not in block]
    assert len(runnable) >= 4
    for block in runnable:
        exec(block, {})


def keys(config):
    """All keys of a config that may be given, without `init_args`."""
    flat = set()

    def walk(value, path):
        flat.add(".".join(path))
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(inner, path if key == "init_args" else [*path, key])

    walk(yaml.safe_load(shown(["fit", "--config", str(config), "--print_config"])), [])
    return flat


def test_keys_exist():
    known = keys(LANGUAGE) | keys(VISION) | {"trainer.strategy.tensor_parallel_size"}
    known |= {"trainer.strategy.save_distributed_checkpoint", "trainer.callbacks.decay", "trainer.logger.offline"}
    for page in PAGES:
        for key in re.findall(r"`((?:data|model|trainer|checkpoint|best|nonfinite)\.[a-z_.]+)", page.read_text()):
            assert key in ("model.safetensors", "model.onnx") or key.rstrip(".") in known, f"{page}: {key}"


def test_files_named_exist():
    pattern = r"(?:configs|benchmarks|docs|tests)/[\w./-]+\.(?:yaml|py|md|csv|svg|png)"
    for page in PAGES:
        for name in re.findall(pattern, page.read_text()):
            assert (ROOT / name).exists(), f"{page}: {name}"
