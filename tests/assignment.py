"""Assignments: hand out a copy of this repository without some functions, and grade what comes
back.

    python tests/assignment.py list
    python tests/assignment.py strip simclr.nt_xent bissl.inverse_hvp --out handout
    python tests/assignment.py grade submissions/ada submissions/bob simclr.nt_xent
    python tests/assignment.py grade submissions/* --json

`strip all` takes every function out; `grade` without names grades every one.

What is graded. Only the named functions are taken from a submission (by name, from simclr.py and
its siblings), with helpers, methods, imports and constants that their file defines under names that
are new. Each is put into this repository's own module, with every other function and all tests from
here: a wrong conjugate_gradient costs inverse_hvp nothing, and tests that a student edited are
never read. The rest of a submitted file is not run, but it has to be Python. What is no folder, or
has none of the files, is skipped with a line.

Points. A function has all of its points or none, because its cases do not weigh the same: one that
always returns 0 passes some. How many cases passed, and the first that failed, stand beside the
points.

Safety. Each function's tests run in a process of their own, which is killed after --limit seconds
with all that it started. Connections, other processes and writing outside of a temporary folder are
refused there, by an audit hook of Python, and a refusal costs the points even if the function
swallows it. What it prints is thrown away. This is against accidents and curiosity, not against
malice: the process has your rights, so that a function can still read your files, fill the memory,
call C code that no hook sees, forge its own record, or look up the answer in this repository. Read
what has full points, and grade strangers' code in a container.
"""
import __future__
import argparse
import ast
import contextlib
import copy
import functools
import gc
import importlib
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent

# function: points, and the tests that say whether it is right, as `pytest FILES -k EXPRESSION`
FUNCTIONS = {
    "simclr.nt_xent": (3, "test_simclr.py", "nt_xent"),
    "byol.byol_loss": (1, "test_byol.py", "byol_loss"),
    "byol.symmetric_loss": (1, "test_byol.py", "each_view_predicts or match_the_other_view"),
    "byol.Model.forward": (2, "test_byol.py",
        "networks_are_composed or no_gradient_flows or of_its_own_forward"),
    "byol.decay": (1, "test_byol.py", "test_decay"),
    "coin.supcon": (3, "test_coin.py",
        "test_supcon_is or test_supcon_has or test_supcon_of or test_supcon_does or "
        "test_supcon_keeps or test_supcon_without_any"),
    "core_tuning.hardest": (2, "test_core_tuning.py",
        "hardest_pairs or one_image_a_class or batch_of_one_class"),
    "core_tuning.hard_pairs": (3, "test_core_tuning.py",
        "mixtures_keep or hard_positive_lies or second_image_of_its_class or "
        "without_another_class or semi_hard or shares_of_the_hard or extreme_alphas or "
        "flow_through"),
    "core_tuning.positive_pairs": (2, "test_core_tuning.py",
        "test_positives or beyond_the_sixtieth"),
    "core_tuning.focal_contrastive": (3, "test_core_tuning.py",
        "focal_contrastive or without_positives or certain_costs"),
    "bi_tuning.ClassQueue.enqueue": (4, "test_bi_tuning.py",
        "test_a_ring or oldest_key or random_start or narrower_type"),
    "bi_tuning.share_with_class": (3, "test_bi_tuning.py", "a_contrastive_loss"),
    "bi_tuning.contrastive_cross_entropy": (2, "test_bi_tuning.py", "a_contrastive_loss and cce"),
    "bi_tuning.categorical_contrastive": (2, "test_bi_tuning.py",
        "a_contrastive_loss and ccl or same_categorical"),
    "bissl.conjugate_gradient": (3, "test_bissl.py",
        "(test_conjugate_gradients or one_step_goes or no_step_gives or zero_right_hand or "
        "further_steps_stay or solves_in_a_row or empty_list_of_directions or tolerance_is_kept "
        "or each_step_reaches or same_right_hand or indefinite_matrix or stops_where) and not "
        "layerwise"),
    "bissl.inverse_hvp": (2, "test_bissl.py",
        "inverse_hvp or handed_in or loss_is_linear or implicit_gradient_is"),
    "finetune.metrics": (2, "test_finetune.py",
        "metrics_are or mean_class_accuracy or confusion_matrix or average_precision"),
    "common.update_average": (1, "test_optimisation.py test_byol.py",
        "update_average or update_target"),
}
CONTRACTS = "test_contracts.py"  # has tests of all of them, whose names end with the function's
# what pytest and torch.testing say of numbers that differ, and how a student is told
COMPARISONS = [
    (r"Expected (\S+) but got (\S+?)\.? ", "expected {0}, got {1}"),
    (r"Obtained: (\S+) Expected: (.+)$", "expected {1}, got {0}"),
    (r"Greatest absolute difference: (\S+) .*?up to (\S+) allowed",
     "differs by up to {0}, allowed are {1}"),
    (r"Jacobian mismatch", "the gradient is not the derivative of the result"),
    (r"No comparison pair was able to handle", "the result is not a tensor")]
NOT_HANDED_OUT = "tests/planted/", "tests/answers.md", "tests/test_assignment.py"  # show answers
NOT_OURS = {"data", "runs", "__pycache__", ".git", ".venv", ".pytest_cache"}
QUIET = ["-s", "-W", "ignore", "--rootdir", str(ROOT), "-pno:terminal", "-pno:cacheprovider",
         "-pno:faulthandler", "-pno:unraisableexception", "-pno:threadexception", "-pno:logging"]
CONNECTS = {"socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo",
            "socket.gethostbyname", "socket.bind"}
STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork",
          "os.forkpty"}
WRITES = {"open", "os.remove", "os.rename"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def file_of(name):
    return f"{name.split('.')[0]}.py"


def tests_of(name):
    """The test files of a function, and the expression that selects its tests in them."""
    _, files, expression = FUNCTIONS[name]
    return [*files.split(), CONTRACTS], f"({expression}) or {name}"


# -------------------------------------------------------------------------------------- source code

def parse(code):
    """The syntax tree; SyntaxError or ValueError for what is not Python."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return ast.parse(code)
        except (RecursionError, MemoryError) as error:
            raise ValueError("too deeply nested") from error


def names_in(node):
    """The names that a statement gives a value, or whose value it changes: of `x[0] = 1` x."""
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name}
    names = set()
    for part in ast.walk(node):
        if isinstance(part, ast.alias):
            names.add((part.asname or part.name).split(".")[0])
        elif isinstance(getattr(part, "ctx", None), ast.Store):
            while isinstance(part, (ast.Subscript, ast.Attribute)):
                part = part.value
            if isinstance(part, ast.Name):
                names.add(part.id)
    return names


def owner_of(tree, name):
    """The body that holds the function: the file's, or that of its class; empty without such a
    class."""
    for owner in name.split(".")[1:-1]:
        classes = [node for node in tree.body
                   if isinstance(node, ast.ClassDef) and node.name == owner]
        if not classes:
            return []
        tree = classes[-1]
    return tree.body


def find(tree, name):
    """The definition of module.function or module.Class.method, the last one if there are several,
    or None. An assignment is one, too: `byol_loss = my_loss`."""
    found, last = None, name.split(".")[-1]
    for node in owner_of(tree, name):
        kinds = (ast.FunctionDef, ast.Assign, ast.AnnAssign)
        if isinstance(node, kinds) and last in names_in(node):
            found = node
    return found


def new_names(nodes, known):
    """Of these statements, those that give values to names of which `known`, a module or a class,
    has none. Of an import its new names."""
    new = []
    for node in nodes:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            node = copy.copy(node)
            node.names = [alias for alias in node.names
                          if not hasattr(known, (alias.asname or alias.name).split(".")[0])]
        names = names_in(node)
        if names and not any(hasattr(known, each) for each in names):
            new.append(node)
    return new


def taken(tree, name):
    """What is taken from a submission: new names of its file, new names of the function's class,
    and the function."""
    module, owner = home_of(name)
    at_top, in_class = new_names(tree.body, module), []
    if owner is not module:
        in_class = new_names(owner_of(tree, name), owner)
    return at_top, [*in_class, find(tree, name)]


def home_of(name):
    """This repository's module that has the function, and its class, or the module once more."""
    module = importlib.import_module(name.split(".")[0])
    return module, functools.reduce(getattr, name.split(".")[1:-1], module)


# -------------------------------------------------------------------------------------------- strip

def without_body(code, name):
    """The code with the function's signature and docstring only, then `raise
    NotImplementedError`."""
    node, lines = find(parse(code), name), code.splitlines()
    first, end = node.body[0], node.end_lineno
    while end < len(lines) and re.match(r"\s+#", lines[end]):  # comments that close the body
        end += 1
    start = first.end_lineno if ast.get_docstring(node) is not None else first.lineno - 1
    if ast.get_docstring(node) is None:  # comments that open it
        while re.match(r"\s+#", lines[start - 1]):
            start -= 1
    lines[start:end] = [" " * first.col_offset + "raise NotImplementedError"]
    return "\n".join(lines) + "\n"


def files():
    """What git tracks, or without git what lies here; without data, runs and answers."""
    listed = None
    if (ROOT / ".git").exists():
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed and listed.returncode == 0:
        names = os.fsdecode(listed.stdout).split("\0")
    else:
        names = []
        for folder, folders, here in os.walk(ROOT):
            folders[:] = [each for each in folders if each not in NOT_OURS]
            names += [(Path(folder) / each).relative_to(ROOT).as_posix() for each in here]
        written = (".pt", ".jsonl", ".png")  # by runs, beside the scripts
        names = [name for name in names if "/" in name or not name.endswith(written)]
    names = [name for name in names if not name.startswith(NOT_HANDED_OUT)]
    return [name for name in names if (ROOT / name).is_file()]


def strip(names, out, no_tests=False):
    """Write a copy of the repository to `out`, without the bodies of the named functions.
    no_tests: and without the tests, whose slow loops show what a function does."""
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        fail(f"--out {out} is there already and not an empty folder")
    for file in files():
        if no_tests and re.fullmatch(r"tests/\w+\.py", file):
            continue
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, out / file)
    for name in names:
        path = out / file_of(name)
        path.write_text(without_body(path.read_text(encoding="utf-8"), name), encoding="utf-8")
    points = sum(FUNCTIONS[name][0] for name in names)
    print(f"{out}: {len(names)} functions to write, {points} points")


# -------------------------------------------------------------------------- in a process of its own

def words(text, most=200):
    """One line of printable characters."""
    text = " ".join("".join(c if c.isprintable() else " " for c in str(text)[:10_000]).split())
    return text if len(text) <= most else text[:most - 3] + "..."


def case_of(item):
    """A test's name and arguments as a sentence."""
    arguments = getattr(item, "callspec", None)
    sentence = item.originalname.removeprefix("test_").replace("_", " ")
    if not arguments:
        return sentence
    shown = [f"{key} {words(value, 60)}" for key, value in arguments.params.items()
             if not (isinstance(value, str) and value in FUNCTIONS)]  # which is said already
    return f"{sentence} ({', '.join(shown)})" if shown else sentence


def reason(error, path):
    """What went wrong, in a line, and where in the submission."""
    if isinstance(error, NotImplementedError):
        return "not written yet"
    try:
        text = words(str(error).split("\nassert ")[0], 10_000)  # pytest adds the values there
    except BaseException:
        text = ""
    frames = traceback.extract_tb(error.__traceback__)
    at = [frame.lineno for frame in frames if frame.filename == path]
    where = f" (line {at[-1]} of {Path(path).name})" if at else ""
    for pattern, sentence in COMPARISONS:
        found = re.search(pattern, text)
        if found:
            return words(sentence.format(*found.groups()))
    if not isinstance(error, AssertionError) or not text:
        return words(f"{type(error).__name__}: {text}") + where
    if text.startswith(("assert ", "assert(")):  # the line tells more than the values do
        return words(f"does not hold: {(frames[-1].line or text).removeprefix('assert ')}") + where
    return words(text) + where


class Recorder:
    """A pytest plugin that reports each case."""

    def __init__(self, report, path):
        self.report, self.path, self.failed = report, path, set()

    def pytest_collection_finish(self, session):
        self.report(cases=len(session.items))

    def pytest_runtest_setup(self, item):
        self.report(begins=case_of(item))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item, call):
        if call.excinfo is not None and item.nodeid not in self.failed:  # a skip is no pass either
            self.failed.add(item.nodeid)
            self.report(failed=case_of(item), reason=reason(call.excinfo.value, self.path))
        elif call.when == "teardown" and item.nodeid not in self.failed:
            self.report(passed=1)
        outcome = "failed" if call.excinfo is not None else "passed"
        # pytest's own function would format a traceback.
        return pytest.TestReport(item.nodeid, item.location, {}, outcome, None, call.when)


def guard(folder, report):
    """From here on this process opens no connection, starts no process, and writes in the folder
    alone."""
    folder = os.path.realpath(folder) + os.sep

    def hook(event, args):
        what, flags = None, 0
        if event in CONNECTS:
            what = "opens a network connection"
        elif event in STARTS:
            what = "starts another process"
        elif event in WRITES:
            flags = args[2] if event == "open" else os.O_WRONLY
            is_path = isinstance(args[0], (str, bytes))
            if is_path and isinstance(flags, int) and flags & WRITING:
                place = os.path.realpath(os.fsdecode(args[0]))
                if not place.startswith(folder) and place != os.devnull:
                    what = f"writes to {words(place, 60)}"
        if what:
            report(refused=what)
            raise PermissionError(f"refused: the submission {what}")
    sys.addaudithook(hook)


@functools.cache
def prepare():
    """Import the trusted modules and tests, once; the processes that are forked later have them."""
    os.environ.update(
        CUDA_VISIBLE_DEVICES="", PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", PYTEST_ADDOPTS="")
    sys.path[:0] = [str(ROOT), str(TESTS)]
    for name in FUNCTIONS:
        try:
            importlib.import_module(name.split(".")[0])
        except (Exception, SystemExit) as error:
            fail(f"this repository's own {file_of(name)} cannot be imported: "
                 f"{type(error).__name__}: {words(error)}")
    every = dict.fromkeys(file for name in FUNCTIONS for file in tests_of(name)[0])
    if pytest.main(["--collect-only", *QUIET, *(str(TESTS / file) for file in every)]):
        fail("the tests of this repository cannot be collected: see `python -m pytest tests`")
    sys.modules["torch"].manual_seed(0)  # imports half of torch: once is enough
    gc.freeze()                          # so that no process looks through all of that for garbage


def plant(name, tree, path):
    """Put the submission's function into the trusted module."""
    module, owner = home_of(name)
    at_top, in_owner = taken(tree, name)
    found, flags = {}, 0
    for node in at_top:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            flags = __future__.annotations.compiler_flag  # of the names there, the one with effect
    exec(compile(ast.Module(at_top, []), path, "exec", flags), vars(module))
    exec(compile(ast.Module(in_owner, []), path, "exec", flags), vars(module), found)
    for each, value in found.items():
        setattr(owner, each, value)


def examine(name, code, path, folder):
    """Run the tests of one function of a submission; what happens is written to folder/record, a
    JSON object per line."""
    if hasattr(os, "setsid"):
        os.setsid()
    os.chdir(folder)
    tempfile.tempdir, sys.dont_write_bytecode = folder, True
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in 0, 1, 2:
        os.dup2(nowhere, descriptor)
    with open(os.path.join(folder, "record"), "w", buffering=1) as record:
        report = lambda **line: record.write(json.dumps(line) + "\n")
        prepare()
        guard(folder, report)
        try:
            plant(name, parse(code), path)
        except BaseException as error:
            report(broken=reason(error, path))
            return
        files, expression = tests_of(name)
        tests = [str(TESTS / file) for file in files]
        pytest.main([*tests, "-k", expression, "--basetemp", os.path.join(folder, "tmp"), *QUIET],
                    plugins=[Recorder(report, path)])
        report(ended=True)


# -------------------------------------------------------------------------------------------- grade

def judge(name, code, path, limit):
    """examine() in a process with a time limit: {points, of, cases, passed, why}."""
    fork = sys.platform == "linux"
    process = multiprocessing.get_context("fork" if fork else "spawn").Process
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        child = process(target=examine, args=(name, code, path, folder))
        child.start()
        # A spawned one has to import torch and the tests first.
        child.join(limit if fork else limit + 60)
        late = child.is_alive()
        with contextlib.suppress(OSError, AttributeError):
            os.killpg(child.pid, signal.SIGKILL)  # and whatever it started
        child.kill()
        child.join()
        try:
            lines = (Path(folder) / "record").read_text(encoding="utf-8").splitlines()
        except OSError:
            lines = []
    happened = {}
    for line in lines:
        # A line can be cut off by the end of the process.
        with contextlib.suppress(ValueError, AttributeError):
            for key, value in json.loads(line).items():
                happened.setdefault(key, []).append(value)
    cases, passed = (happened.get("cases") or [0])[0], len(happened.get("passed", []))
    now = f" in the case: {happened['begins'][-1]}" if "begins" in happened else ""
    if "broken" in happened:
        why = f"cannot be loaded: {happened['broken'][0]}"
    elif "refused" in happened:
        why = f"{happened['refused'][0]}, which is refused"
    elif "failed" in happened:
        why = f"{happened['failed'][0]}: {happened['reason'][0]}"
    elif late:
        why = f"did not end within {limit:g} s{now}"
    elif "ended" not in happened or passed < cases:
        why = f"the process ended{now}"
    else:
        why = None if cases else "no test of this repository is about it"
    return dict(points=0 if why else FUNCTIONS[name][0], of=FUNCTIONS[name][0], cases=cases,
                passed=passed, why=why)


def grade(submission, names, limit, known):
    """{function: {points, of, cases, passed, why}}; `known` remembers what was found out about the
    same source before."""
    result = {}
    for name in names:
        path, why = submission / file_of(name), None
        try:
            code = path.read_text(encoding="utf-8-sig")
            tree = parse(code)
        except OSError as error:
            why = f"cannot read {path.name}: {error.strerror}"
        except SyntaxError as error:
            why = f"{path.name} is not Python: {words(error.msg)} in line {error.lineno}"
        except ValueError as error:  # of the encoding, too
            why = f"{path.name} is not Python: {words(error)}"
        if why is None and find(tree, name) is None:
            why = f"{path.name} has no function {name.split('.', 1)[1]}"
        if why is None:
            at_top, in_owner = taken(tree, name)
            key = name, *map(ast.dump, [*at_top, *in_owner])
            if key not in known:
                known[key] = judge(name, code, str(path), limit)
            result[name] = known[key]
        else:
            result[name] = dict(points=0, of=FUNCTIONS[name][0], cases=0, passed=0, why=why)
    return result


def why_skipped(submission):
    """A sentence if there is nothing here to grade, else None."""
    if not submission.is_dir():
        return "which is no folder"
    files = {file_of(name) for name in FUNCTIONS}
    if any((submission / file).exists() for file in files):
        return None
    deeper = sorted(path for file in files for path in submission.glob(f"*/**/{file}"))
    if deeper:
        return f"its files are in {deeper[0].parent}: grade that folder"
    return f"it has none of the files {', '.join(sorted(files))}"


def show(sheet):
    print(f"{sheet['submission']}: {sheet['points']} of {sheet['of']} points")
    for name, found in sheet["functions"].items():
        why = f"  {found['why']}" if found["why"] else ""
        print(f"  {found['points']}/{found['of']}  {name:<36} "
              f"{found['passed']:>3} of {found['cases']:>3} cases{why}", flush=True)


# --------------------------------------------------------------------------------------------- main

class Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(f"{message} (see python tests/assignment.py --help)")


def known_names(names):
    """The named functions in the table's order; `all` or nothing means every one."""
    for name in names:
        if name != "all" and name not in FUNCTIONS:
            fail(f"no function {name} can be set: see `python tests/assignment.py list`")
    return [name for name in FUNCTIONS if name in names or "all" in names or not names]


def main(argv=None):
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    commands.add_parser("list", help="the functions that can be set, with points and tests")
    stripped = commands.add_parser(
        "strip", help="write a copy of the repository without some functions")
    stripped.add_argument("names", nargs="+", help="functions, or `all`")
    stripped.add_argument(
        "--out", type=Path, required=True, help="a folder that is not there yet, or empty")
    stripped.add_argument("--no-tests", action="store_true",
                          help="leave out the tests, whose slow loops show answers")
    graded = commands.add_parser("grade", help="grade submissions")
    graded.add_argument("what", nargs="+", metavar="DIR or NAME",
                        help="folders with simclr.py and so on, and functions (without: all)")
    graded.add_argument("--json", action="store_true", help="print JSON")
    graded.add_argument("--limit", type=float, default=60,
                        help="seconds for the tests of one function (default: 60)")
    args = parser.parse_args(argv)

    if args.command == "list":
        for name, (points, _, _) in FUNCTIONS.items():
            files, expression = tests_of(name)
            where = " ".join(f"tests/{file}" for file in files)
            print(f"{name:<36} {file_of(name):<15} {points} points   "
                  f'python -m pytest -q {where} -k "{expression}"')
    elif args.command == "strip":
        strip(known_names(args.names), args.out, args.no_tests)
    else:
        submissions = [each for each in args.what if Path(each).exists()]
        for each in args.what:
            if each not in submissions and each != "all" and each not in FUNCTIONS:
                fail(f"{each} is neither a folder nor a function that can be set")
        names = known_names([each for each in args.what if each not in submissions])
        if not submissions:
            fail("no folder to grade")
        prepare()
        sheets, known = [], {}
        for submission in submissions:
            why = why_skipped(Path(submission))
            if why:
                print(f"{submission}: skipped, {why}", file=sys.stderr)
                continue
            result = grade(Path(submission), names, args.limit, known)
            sheets.append(dict(submission=submission,
                               points=sum(each["points"] for each in result.values()),
                               of=sum(each["of"] for each in result.values()), functions=result))
            if not args.json:
                show(sheets[-1])
        if args.json:
            print(json.dumps(sheets, indent=1))


if __name__ == "__main__":
    main()
