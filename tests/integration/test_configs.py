"""Every file of configs/, as it is read by a person. What it does: test_language_configs.py, test_vision_configs.py."""

import re

import pytest

from tests.conftest import ROOT
from tests.integration.configs import CONFIGS, configs

PATHS = [*configs("language"), *configs("vision")]
NAMES = [str(path.relative_to(CONFIGS).with_suffix("")) for path in PATHS]
PLAIN = re.compile(r"class_path: (LanguageModule|VisionModule|TextDataModule|ImageDataModule)$")


def test_no_config_is_left_out():
    assert sorted([*PATHS, *configs("strategy")]) == sorted(CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("path", configs("strategy"), ids=lambda path: path.stem)
def test_strategy_says_how_it_is_used(path):
    """What it does: test_scale_out.py."""
    command = re.search(r"\n#   tokenformer fit --config (\S+) --config (\S+)\n", path.read_text())
    assert (ROOT / command[1]) in PATHS
    assert command[2] == str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", PATHS, ids=NAMES)
def test_config_has_a_header_and_a_comment_on_every_key(path):
    text = path.read_text()
    header = text[: text.index("\nmodel:")]
    assert f"tokenformer fit --config {path.relative_to(ROOT)}\n" in header
    for word in ("Hardware:", "Time:", "Expected:", "Source:"):
        assert f"\n# {word} " in header, word
    for line in text.splitlines():
        if re.match(r"\s+(- )?\w+: \S", line) and not PLAIN.search(line):
            assert "#" in line, line
