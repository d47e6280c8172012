"""Assignments: what is handed out, and that grading finds each planted fault, in its own function
alone."""
import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import assignment
import pytest
from assignment import FUNCTIONS, ROOT, TESTS, file_of, find, parse
from conftest import ROOT as SAME_ROOT

PLANTED = sorted((TESTS / "planted").glob("*.patch"))


def patched(patch, code):
    """The code with the patch's old lines replaced by its new ones; where they stand does not
    matter."""
    lines = patch.read_text().splitlines()[4:]  # what it is about, two file names, @@
    old = "".join(line[1:] + "\n" for line in lines if line[:1] != "+")
    new = "".join(line[1:] + "\n" for line in lines if line[:1] != "-")
    assert code.count(old) == 1, f"{patch.name} does not fit any more"
    return code.replace(old, new)


def main(capsys, *argv):
    assignment.main(list(map(str, argv)))
    return capsys.readouterr().out


def refused(capsys, *argv):
    """The one line with which a command refuses its arguments."""
    with pytest.raises(SystemExit) as stop:
        assignment.main(list(map(str, argv)))
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1
    return message


def sources(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*.py")}


# ----------------------------------------------------------------------------------- list and strip

def test_list_names_every_function_with_its_file_and_points(capsys):
    lines = main(capsys, "list").splitlines()
    assert [line.split()[:3] for line in lines] == [
        [name, file_of(name), str(FUNCTIONS[name][0])] for name in FUNCTIONS]
    assert SAME_ROOT == ROOT
    assert all(find(parse((ROOT / file_of(name)).read_text()), name) for name in FUNCTIONS)


def test_strip_takes_the_named_bodies_and_nothing_else(tmp_path, capsys):
    names = "simclr.nt_xent", "byol.Model.forward", "bissl.inverse_hvp"
    main(capsys, "strip", *names, "--out", tmp_path / "out")
    was, now = sources(ROOT), sources(tmp_path / "out")
    changed = {file for file in now if now[file] != was[file]}
    assert changed == {"simclr.py", "byol.py", "bissl.py"}
    assert {"common.py", "tests/test_simclr.py", "tests/assignment.py"} <= now.keys()
    assert "tests/test_assignment.py" not in now  # it shows answers, as the planted faults do
    assert not (tmp_path / "out/tests/planted").exists()
    assert (TESTS / "answers.md").exists() and not (tmp_path / "out/tests/answers.md").exists()
    assert (tmp_path / "out/README.md").exists() and not (tmp_path / "out/.git").exists()
    for name in names:
        old, new = (find(parse(files[file_of(name)]), name) for files in (was, now))
        assert ast.unparse(old.args) == ast.unparse(new.args)
        assert ast.get_docstring(old) == ast.get_docstring(new)
        assert ast.unparse(new.body[-1]) == "raise NotImplementedError" and len(new.body) <= 2
        head = was[file_of(name)].splitlines()[:old.lineno]
        tail = was[file_of(name)].splitlines()[old.end_lineno:]
        lines = now[file_of(name)].splitlines()
        assert lines[:new.lineno] == head and lines[new.end_lineno:] == tail
    # The comments of a body go with it.
    assert "# k != i" not in now["simclr.py"].split('"""', 2)[2]


def test_strip_leaves_out_the_tests_where_it_is_asked_to(tmp_path, capsys):
    main(capsys, "strip", "simclr.nt_xent", "--no-tests", "--out", tmp_path / "out")
    assert not list(tmp_path.glob("out/tests/*.py"))
    assert (tmp_path / "out/tests/README.md").exists() and (tmp_path / "out/common.py").exists()


def test_a_body_is_cut_out_with_its_comments():
    head, tail = "class A:\n    @deco\n    def f(self,\n          x):  # kept\n{}", "\n    y = 1\n"
    code = head + "        # opens\n        return x  # in it\n        # closes\n" + tail
    cut = head + "        raise NotImplementedError\n" + tail
    for docstring in "", '        """Says.\n\n        More."""\n':
        stripped = assignment.without_body(code.format(docstring), "module.A.f")
        assert stripped == cut.format(docstring)


def test_strip_and_grade_refuse_in_one_line(tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    assert "simclr.nothing" in refused(capsys, "strip", "simclr.nothing", "--out", tmp_path / "new")
    assert "not an empty folder" in refused(capsys, "strip", "all", "--out", tmp_path / "full")
    file = tmp_path / "full" / "mine.txt"
    assert "not an empty folder" in refused(capsys, "strip", "all", "--out", file)
    assert "--out" in refused(capsys, "strip", "all")
    assert "nowhere" in refused(capsys, "grade", tmp_path / "nowhere")
    assert "no folder" in refused(capsys, "grade", "simclr.nt_xent")
    assert list(tmp_path.rglob("*")) == [tmp_path / "full", tmp_path / "full" / "mine.txt"]


# -------------------------------------------------------------------------------------------- grade

RIGHT = """
    p, z = F.normalize(common.upcast(p), dim=1), F.normalize(common.upcast(z), dim=1)
    return (2 - 2 * (p * z).sum(1)).mean()
"""
DEF = "def byol_loss(p, z):\n"
SWALLOWED = "    except OSError: pass" + RIGHT
# What a submission's byol.py has before byol_loss's right answer or instead of it, and what grading
# says of it.
ODD = {
    "hangs": (DEF + "    while True: pass",
              "did not end within 4 s in the case: byol loss is the mean"),
    "connects": (DEF + "    import socket\n"
                 "    try: socket.create_connection(('127.0.0.1', 9), 1)\n" + SWALLOWED,
                 "opens a network connection, which is refused"),
    "starts": ("import os\n" + DEF + "    try: os.system('true')\n" + SWALLOWED,
               "starts another process, which is refused"),
    "writes": (DEF + "    try: open('VICTIM', 'a').write('rubbish')\n" + SWALLOWED, "writes to"),
    "rubbish": ("import os, sys\n" + DEF + "    print('}{\\n' * 1000)\n"
                "    os.write(1, b'\\xff\\x00')\n"
                "    sys.stderr.write('Traceback')\n"
                "    raise ValueError('\\x1b[31m\\n\\n[' * 99)", "ValueError: [31m [ "),
    "dies": (DEF + "    import os\n    os._exit(0)",
             "the process ended in the case: byol loss is the mean"),
    "exits": (DEF + "    raise SystemExit(0)", "SystemExit: 0 (line 2 of byol.py)"),
    "skips": (DEF + "    import pytest\n    pytest.skip('passed')", "Skipped: passed"),
    "none": (DEF + "    pass", "byol loss is the mean of the equation (batch 1, dim 3): "),
    "arguments": ("def byol_loss(p): pass", "TypeError"),
    "unwritten": (DEF + "    raise NotImplementedError", "(batch 1, dim 3): not written yet"),
    "elsewhere": ("def other(p, z): pass", "byol.py has no function byol_loss"),
    "module": ("import no_such_module\n" + DEF + RIGHT[1:],
               "cannot be loaded: ModuleNotFoundError: No module named"),
    "syntax": (DEF + "    return (", "byol.py is not Python: '(' was never closed in line 2"),
    "binary": ("\0def byol_loss(p, z): pass", "byol.py is not Python"),
    "helped": ("import math as maths\nTWO = maths.sqrt(4)\n"
               "def inner(p, z): return (p * z).sum(1)\n" + DEF
               + RIGHT[1:].replace("2 * (p * z).sum(1)", "TWO * inner(p, z)"), None),
    "assigned": ("def mine(p, z):" + RIGHT + "byol_loss = mine\n", None),
    "constants": ("from math import sqrt\nimport math, cmath\nEPS: float = 1e-12\nONE, TWO = 1, 2\n"
                  "if ONE:\n    FOUR = sqrt(4) * 2\n" + DEF + "    assert cmath and math and EPS\n"
                  + RIGHT[1:].replace("2 - 2", "FOUR - 2 * ONE - 2"), None),
    "marked": ("\ufeff" + DEF + RIGHT[1:], None),
    "annotated": ("from __future__ import annotations\nfrom typing import TYPE_CHECKING\n"
                  "if TYPE_CHECKING:\n    from torch import Tensor\n"
                  "def mine(p: Tensor, z: Tensor) -> Tensor:" + RIGHT
                  + "byol_loss: object = mine\n", None),
    "table": ("KINDS = {}\nKINDS['two'] = 2\n" + DEF
              + RIGHT[1:].replace("2 - 2", "KINDS['two'] - 2"), None),
}
# Right answers that are written another way than ours.
OTHERWISE = {
    "bi_tuning.ClassQueue.enqueue": """
class ClassQueue:
    def next_slot(self, label):
        return int(self.entered[label]) % self.keys.shape[1]

    def enqueue(self, keys, y):
        for key, label in zip(keys.detach(), y.tolist()):
            self.keys[label, self.next_slot(label)] = key
            self.entered[label] += 1
""",
    "simclr.nt_xent": """
def nt_xent(z1, z2, temperature):
    z = torch.cat([z1, z2])
    z = z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
    z = z / z.norm(dim=1, keepdim=True).clamp(min=1e-12)
    s = z @ z.t() / temperature
    i = torch.arange(len(z), device=z.device)
    rest = s.masked_fill(i[:, None] == i, float("-inf")).logsumexp(1)
    return (rest - s[i, (i + len(z1)) % len(z)]).mean()
""",
    "byol.symmetric_loss": """
def symmetric_loss(p, z_target):
    n = len(p) // 2
    swapped = torch.cat([z_target[n:], z_target[:n]]).detach()
    return 2 * byol_loss(p, swapped)
""",
    "bissl.conjugate_gradient": """
def conjugate_gradient(matvec, b, steps, tolerance=0, directions=None):
    directions = [] if directions is None else directions
    dot = lambda a, c: sum((s * t).sum() for s, t in zip(a, c))
    x, r = [torch.zeros_like(t) for t in b], list(b)
    for p, Ap, pAp in directions:
        p, Ap = as_tensors(p, b), as_tensors(Ap, b)
        alpha = ratio(dot(p, r), pAp)
        x = [s + alpha * t for s, t in zip(x, p)]
        r = [s - alpha * t for s, t in zip(r, Ap)]
    for _ in range(steps):
        if tolerance and dot(r, r) ** 0.5 <= tolerance * dot(b, b) ** 0.5:
            break
        p = as_vector(r)
        for q, Aq, qAq in directions:
            p = p - ratio(Aq @ p, qAq) * q
        p = as_tensors(p, b)
        Ap = matvec(p)
        pAp = dot(p, Ap)
        directions.append((as_vector(p), as_vector(Ap), pAp))
        if tolerance and pAp == 0:
            break
        alpha = ratio(dot(p, r), pAp)
        x = [s + alpha * t for s, t in zip(x, p)]
        r = [s - alpha * t for s, t in zip(r, Ap)]
    return tuple(x)
""",
    "core_tuning.hard_pairs": """
def hard_pairs(f, y, num_classes, alpha):
    n, one_hot = len(f), torch.nn.functional.one_hot(y, num_classes).to(f.dtype)
    hp, hn = hardest(f, y)
    beta = torch.distributions.Beta(torch.full((n,), float(alpha)), torch.full((n,), float(alpha)))
    lam = beta.sample().to(f)[:, None]
    other = beta.sample().to(f)[:, None].clamp(0.8)
    r = torch.randperm(n)
    return (torch.lerp(f[hn], f[hp], lam), torch.lerp(one_hot[hn], one_hot[hp], lam),
            torch.lerp(f, f[r], other), torch.lerp(one_hot, one_hot[r], other))
"""}
WHOLE = {"module", "syntax", "binary"}  # these cost every function of the file


@pytest.fixture(scope="module")
def sheets(tmp_path_factory):
    """Each submission's result. All in one process, which imports torch and the tests once."""
    place = tmp_path_factory.mktemp("submissions")
    assignment.main(["strip", "all", "--out", str(place / "stripped")])
    for patch in PLANTED:
        (place / patch.stem).mkdir()
        for file in {file_of(name) for name in FUNCTIONS}:
            shutil.copy(ROOT / file, place / patch.stem / file)
        path = place / patch.stem / file_of(patch.stem)
        path.write_text(patched(patch, path.read_text()))
    code = (ROOT / "byol.py").read_text()
    decay = ast.get_source_segment(code, find(parse(code), "byol.decay"))
    (place / "victim").write_text("untouched")
    (place / "missing").mkdir()
    (place / "missing" / "simclr.py").touch()
    for name, right in OTHERWISE.items():
        (place / name).mkdir()
        (place / name / file_of(name)).write_text(right)
    (place / "deep" / "down").mkdir(parents=True)
    shutil.copy(ROOT / "byol.py", place / "deep" / "down")
    (place / "empty").mkdir()
    for name, (odd, _) in ODD.items():
        (place / name).mkdir()
        (place / name / "byol.py").write_text(
            f"{odd.replace('VICTIM', str(place / 'victim'))}\n\n\n{decay}\n")
    planted = [str(place / patch.stem) for patch in PLANTED]
    whole = ["grade", str(ROOT), str(place / "stripped"), *planted, "--json"]
    some = ["grade", *(str(place / name) for name in [*ODD, "missing"] if name != "hangs"),
            "byol.byol_loss", "byol.decay", "--json"]
    late = ["grade", str(place / "hangs"), "byol.byol_loss", "--json", "--limit", "4"]
    skipped = [str(place / name) for name in ("victim", "deep", "empty")]
    shown = ["grade", str(place / "stripped"), *skipped, str(ROOT), "byol.decay"]
    right = ["grade", *(str(place / name) for name in OTHERWISE), *OTHERWISE, "--json"]
    calls = ("import assignment, json, sys\n"
             "for argv in json.loads(sys.argv[1]): assignment.main(argv)")
    commands = json.dumps([whole, some, right, late, shown])
    done = subprocess.run([sys.executable, "-c", calls, commands], cwd=TESTS, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stderr
    decode, rest, result = json.JSONDecoder().raw_decode, done.stdout, {}
    for _ in range(4):
        found, end = decode(rest)
        rest = rest[end:].lstrip()
        for sheet in found:
            name = Path(sheet["submission"]).name
            result["untouched" if sheet["submission"] == str(ROOT) else name] = sheet
    assert (place / "victim").read_text() == "untouched"
    shorter = lambda text: text.replace(str(place), "PLACE").replace(str(ROOT), "ROOT")
    return result | {"shown": shorter(rest), "said": shorter(done.stderr)}


def test_the_untouched_repository_has_all_points_and_the_stripped_one_none(sheets):
    full, none = sheets["untouched"], sheets["stripped"]
    assert full["points"] == full["of"] == sum(points for points, _, _ in FUNCTIONS.values())
    assert none["points"] == 0
    assert list(full["functions"]) == list(none["functions"]) == list(FUNCTIONS)
    for name in FUNCTIONS:
        right, wrong = full["functions"][name], none["functions"][name]
        assert right["passed"] == right["cases"] == wrong["cases"] > 1 and right["why"] is None
        assert wrong["passed"] == 0 and wrong["why"].endswith("not written yet")


@pytest.mark.parametrize("patch", PLANTED, ids=lambda patch: patch.stem)
def test_a_planted_fault_costs_its_own_function_and_no_other(sheets, patch):
    name = patch.stem.split("-")[0]
    assert patch.read_text().startswith(f"# {name}: ")
    functions = sheets[patch.stem]["functions"]
    lost = [each for each in functions if functions[each]["points"] < functions[each]["of"]]
    assert lost == [name]
    assert functions[name]["points"] == 0 and functions[name]["passed"] < functions[name]["cases"]
    assert sheets[patch.stem]["points"] == sheets["untouched"]["points"] - FUNCTIONS[name][0]
    # It is wrong, not unable to run.
    assert re.fullmatch(r"[\w ,.():\[\]'-]+: (?!\w*Error).{5,200}", functions[name]["why"])


def test_every_function_has_a_planted_fault():
    assert {patch.stem.split("-")[0] for patch in PLANTED} == FUNCTIONS.keys()


@pytest.mark.parametrize("name", ODD)
def test_odd_submissions_cost_what_they_affect_and_are_told_in_a_sentence(sheets, name):
    loss, *others = sheets[name]["functions"].values()
    said = ODD[name][1]
    assert loss["points"] == (said is None)
    assert all(other["points"] == (name not in WHOLE) for other in others)
    assert (loss["why"] is None) if said is None else said in loss["why"]
    assert "\n" not in (loss["why"] or "") and "Traceback" not in (loss["why"] or "")


@pytest.mark.parametrize("name", OTHERWISE)
def test_a_right_answer_has_its_points_however_it_is_written(sheets, name):
    found = sheets[name]["functions"][name]
    assert found["points"] == found["of"], found["why"]


def test_what_cannot_be_graded_is_skipped_with_a_line(sheets):
    file, deep, empty = sheets["said"].splitlines()
    assert file == "PLACE/victim: skipped, which is no folder"
    assert deep == "PLACE/deep: skipped, its files are in PLACE/deep/down: grade that folder"
    assert empty.startswith("PLACE/empty: skipped, it has none of the files bi_tuning.py, bissl.py")


def test_tests_of_contracts_end_with_the_function_that_they_are_of():
    """So that no expression selects a test of another function."""
    code = (TESTS / assignment.CONTRACTS).read_text()
    names = [node.name for node in parse(code).body
             if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    assert len(names) > 20
    for name in FUNCTIONS:
        files, expression = assignment.tests_of(name)
        words = re.findall(r"[a-z_]{4,}", FUNCTIONS[name][2])
        inside = [word for word in words for test in names if word in test]
        assert not inside and files[-1] == assignment.CONTRACTS and expression.endswith(name)


def test_a_missing_file_is_told(sheets):
    assert {each["why"] for each in sheets["missing"]["functions"].values()} == {
        "cannot read byol.py: No such file or directory"}


def test_without_json_a_line_a_function_is_printed(sheets):
    first, second, third, fourth = sheets["shown"].splitlines()
    assert (first, third) == ("PLACE/stripped: 0 of 1 points", "ROOT: 1 of 1 points")
    assert re.fullmatch(
        r"  0/1  byol.decay +0 of +\d+ cases  decay is the formula .* \(.*\): not written yet",
        second)
    assert re.fullmatch(r"  1/1  byol.decay +(\d+) of +\1 cases", fourth)
