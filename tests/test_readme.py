"""What README says can be typed and counted."""
import importlib
import re
import shlex

import common
import pytest
from conftest import ROOT

TEXT = (ROOT / "README.md").read_text()
SCRIPTS = ("simclr", "byol", "coin", "bissl", "finetune", "core_tuning", "bi_tuning")
LITERAL = {"$s": "0", "LR": "0.1", "WD": "0.001", "DIR": "petals", "EMOJI": "petals", "FILE": "simclr.pt"}
COMMANDS = sorted(set(re.findall(r"(?:python|torchrun --nproc-per-node=\d+) ((?:%s)\.py[^`\n&;#]*)" % "|".join(SCRIPTS), TEXT)))


def test_there_are_commands():
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_flags_that_the_script_knows(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "load_checkpoint", lambda path: dict(config={}))
    script, *flags = shlex.split(command)
    for word, value in LITERAL.items():
        flags = [re.sub(rf"(?<!\w){re.escape(word)}(?!\w)" if word.isalpha() else re.escape(word), value, flag) for flag in flags]
    importlib.import_module(script.removesuffix(".py")).parser().parse_args(flags)


def test_every_figure_and_folder_that_is_shown_is_there():
    for path in [*re.findall(r"!\[[^]]*\]\(([^)]*)\)", TEXT), *re.findall(r"`(tests/[\w./-]+)`", TEXT)]:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_table_of_methods_counts_lines_as_they_are(script):
    count = re.search(rf"^\| [^|]+ \| `{script}\.py` \|.*\| (\d+) \|$", TEXT, re.M)
    assert count and int(count[1]) == len((ROOT / f"{script}.py").read_text().splitlines())
