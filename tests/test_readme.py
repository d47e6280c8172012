"""What the three READMEs say can be typed, counted and looked at."""
import importlib
import re
import shlex
import shutil
import subprocess

import common
import pytest
from conftest import ROOT, SCRIPTS

READMES = ("README.md", "tests/README.md", "tests/results/README.md")
TEXT = (ROOT / "README.md").read_text()
ALL_TEXT = "\n".join((ROOT / name).read_text() for name in READMES)
LITERAL = {"LR": "0.1", "WD": "0.001", "DIR": "petals", "EMOJI": "petals", "FILE": "simclr.pt"}
CALL = r"(?:python|torchrun --nproc-per-node=\d+) ((?:%s)\.py[^`\n&;#]*)" % "|".join(SCRIPTS)
COMMANDS = sorted(set(re.findall(CALL, ALL_TEXT)))


def commands_of_block(title):
    """The indented lines below a heading."""
    section = TEXT.split(f"## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"^    (.*)$", section, re.M)


def test_there_are_commands():
    assert len(COMMANDS) > 20


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_flags_that_the_script_knows(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "load_checkpoint", lambda path: dict(config={}))
    script, *flags = shlex.split(command)
    for word, value in LITERAL.items():
        flags = [re.sub(rf"(?<!\w){word}(?!\w)", value, flag) for flag in flags]
    importlib.import_module(script.removesuffix(".py")).parser().parse_args(flags)


@pytest.mark.parametrize("name", READMES)
def test_every_figure_and_folder_that_is_shown_is_there(name):
    text = (ROOT / name).read_text()
    linked = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)  # from the README's folder
    for path in linked:
        assert ((ROOT / name).parent / path).exists(), path
    named = re.findall(r"`(tests/[\w./-]+)`", text)             # from the root
    named += re.findall(r"python (tests/[\w./-]+\.py)", text)
    for path in named:
        assert (ROOT / path).exists(), path


def test_every_bench_stands_in_the_readme_of_the_tests():
    text = (ROOT / "tests/README.md").read_text()
    for bench in (ROOT / "tests").glob("bench_*.py"):
        assert f"`python tests/{bench.name}" in text, bench.name


def test_the_landing_page_is_short_and_links_to_the_others():
    assert len(TEXT.splitlines()) <= 250
    for name in READMES[1:]:
        assert f"]({name})" in TEXT


@pytest.mark.parametrize("name", READMES)
def test_prose_and_code_fit_in_100_columns(name):
    """Rows of tables and indented lines, which are typed or printed as they are, may be longer."""
    for line in (ROOT / name).read_text().splitlines():
        assert len(line) <= 100 or line.startswith(("|", "    ")), line


ANSWERS = ROOT / "tests/answers.md"


def test_what_belongs_to_an_item_of_a_list_is_indented():
    """A table that is not would be shown as text, and an item in the middle of a line is none."""
    for path in (ROOT / "tests/README.md", ANSWERS):
        text, inside = path.read_text() if path.exists() else "", False
        assert not re.search(r"\S \d+\. \*\*", text), path
        for line in text.splitlines():
            begins = re.match(r"\d+\. ", line)
            inside = bool(begins) or (inside and not line.startswith("#"))
            assert begins or not inside or line == "" or line.startswith("   "), line


def test_every_exercise_has_an_answer():
    if not ANSWERS.exists():
        pytest.skip("left out of what students get")
    titles = r"^\d+\. \*\*[^*]+\*\*"
    asked = re.findall(titles, (ROOT / "tests/README.md").read_text(), re.M)
    assert len(asked) == 10
    assert re.findall(titles, ANSWERS.read_text(), re.M) == asked


def test_both_commands_make_and_enter_the_environment():
    setup = "python -m venv .venv && . .venv/bin/activate && pip install -r requirements.txt && "
    first, tests = commands_of_block("Start")
    assert first.startswith(setup + "python simclr.py && ")
    assert tests == setup + "python -m pytest -q tests"


@pytest.mark.skipif(
    not (ROOT / ".git").exists() or not shutil.which("git"), reason="copies what git lists")
def test_the_gate_runs_the_readme_s_own_test_command():
    gate = subprocess.run([ROOT / ".ci/run", "--dry-run"], capture_output=True, text=True)
    assert gate.returncode == 0, gate.stderr
    assert gate.stdout == commands_of_block("Start")[1] + "\n"


def test_the_table_of_data_names_every_data_set():
    rows = re.findall(r"^\| `(\w+)` \| ([\w./-]+) \| [^|]*https?://", TEXT, re.M)
    assert [name for name, _ in rows] == list(common.DATASETS)
    for name, folder in rows:
        assert folder in map(str, common.DATASETS[name]), name


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_table_of_methods_counts_lines_as_they_are(script):
    count = re.search(rf"^\| [^|]+ \| `{script}\.py` \|.*\| (\d+) \|$", TEXT, re.M)
    assert count and int(count[1]) == len((ROOT / f"{script}.py").read_text().splitlines())
