"""Every file of configs/, as it is read by a person. What it does: test_language_configs.py, test_vision_configs.py."""

import re

import pytest

from tests.conftest import ROOT
from tests.integration.configs import CONFIGS, baselines, configs, given

PATHS = [*configs("language"), *configs("vision")]
PLAIN = re.compile(
    r"class_path: (LanguageModule|VisionModule|TextDataModule|InstructionDataModule|ImageDataModule|PhasedDataModule)$"
)


def test_no_config_is_left_out():
    assert sorted([*PATHS, *configs("strategy"), *configs("baseline"), *configs("continual")]) == sorted(
        CONFIGS.rglob("*.yaml")
    )


@pytest.mark.parametrize("path", configs("strategy"), ids=lambda path: path.stem)
def test_strategy_says_how_it_is_used(path):
    """What it does: test_scale_out.py."""
    command = re.search(r"\n#   tokenformer fit --config (\S+) --config (\S+)\n", path.read_text())
    assert (ROOT / command[1]) in PATHS
    assert command[2] == str(path.relative_to(ROOT))


def test_every_overlay_of_a_baseline_has_its_experiments():
    """What they do: test_language_configs.py, test_vision_configs.py."""
    pairs = baselines()
    assert {overlay for _, overlay in pairs} == set(configs("baseline"))
    assert {first for first, _ in pairs} <= set(PATHS)
    assert len(set(pairs)) == len(pairs)
    for pair in pairs:
        baseline = given(*pair)["model"]["init_args"]["config"].get("baseline")
        assert (baseline is None) == (pair[1].stem == "no-growth")
        assert "GrowParameterTokens" not in str(given(*pair))


@pytest.mark.parametrize(
    "path", [*PATHS, *configs("baseline"), *configs("continual")], ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_config_has_a_header_and_a_comment_on_every_key(path):
    text = path.read_text()
    header = re.match(r"(#.*\n)+", text)[0]
    assert re.search(rf"#   tokenformer fit (--config \S+ )?--config {path.relative_to(ROOT)}\n", header)
    for word in ("Hardware:", "Time:", "Expected:", "Source:"):
        assert f"\n# {word} " in header, word
    for line in text.splitlines():
        if re.match(r"\s+(- )?\w+: \S", line) and not PLAIN.search(line):
            assert "#" in line, line
