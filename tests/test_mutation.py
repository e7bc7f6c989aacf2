"""The mutation check itself, and what tests/mutants.json says of the core."""

import ast
import json
import re
import signal
import subprocess
import sys
import textwrap
import time

import pytest
from conftest import ROOT
from mutation import (
    MARKDOWN, NO_EFFECT, REQUIRED, RESULTS, TESTS, clean_run, digests, fork, is_killed, markdown,
    mutants, parse, passing, stale, table,
)

TOY = textwrap.dedent('''\
    """Says 1 + 1."""
    import math

    LIMIT = 3


    def first(values: list[1], count=1) -> 2:
        """Not 1."""
        if not values or count > LIMIT:
            raise ValueError(f"none of {count + 1}")
        count -= 1
        return values[:count]
    ''')
CHANGES = [  # unit, lines of the statement, change
    ("LIMIT", None, "LIMIT: `LIMIT = 3` → `LIMIT = 4`"),
    ("first", None, "first: `(values: list[1], count=1) -> 2: pass if not valu` → "
                    "`(values: list[1], count=2) -> 2: pass if not valu`"),
    ("first", [9], "first: `if not values or count > LIMIT: raise ValueError(f'non` → "
                   "`if not (not values or count > LIMIT): raise ValueError(f'non`"),
    ("first", [9], "first: `if not values or count > LIMIT: raise Va` → "
                   "`if not values and count > LIMIT: raise Va`"),
    ("first", [9], "first: `if not values or count > LIMIT:` → `if values or count > LIMIT:`"),
    ("first", [9], "first: `if not values or count > LIMIT: raise ValueError` → "
                   "`if not values or count >= LIMIT: raise ValueError`"),
    ("first", [9], "first: `if not values or count > LIMIT: raise ValueError` → "
                   "`if not values or count <= LIMIT: raise ValueError`"),
    ("first", [10], "first: without `raise ValueError(f'none of {count + 1}')`"),
    ("first", [11], "first: without `count -= 1`"),
    ("first", [11], "first: `count -= 1` → `count += 1`"),
    ("first", [11], "first: `count -= 1` → `count -= 2`"),
    ("first", [12], "first: `return values[:count]` → `return None`"),
    ("first", [12], "first: `return values[:count]` → `return values[:]`")]


def test_a_toy_has_these_mutants_and_no_others():
    tree = parse(TOY)
    whole = ast.unparse(tree)
    found = [(unit, lines and [*lines], change) for unit, lines, change in mutants(tree)]
    assert sorted(found, key=str) == sorted(CHANGES, key=str)
    assert ast.unparse(tree) == whole  # each change is taken back


@pytest.mark.parametrize("before, after", [
    ("x = a @ b", ["x = a * b"]), ("x = -a", ["x = a"]), ("x = a in b", ["x = a not in b"]),
    ("x = a is None", ["x = a is not None"]), ("x = a == b", ["x = a != b"]),
    ("x = 0.0", ["x = 1.0"]), ("x = 0.5", ["x = 1.0"]), ("x = True", ["x = False"]),
    ("x = 'a'", ["x = 'XXa'"]), ("x = min(a, b)", ["x = max(a, b)"]),
    ("x = f(a, b=c)", ["x = f(a)"]), ("x.y = a", ["pass"]), ("x = x.y", ["pass"]),
    ("x = y = z", []), ("f(a)", ["pass"]), ("x[a] = b", ["pass"]), ("x: int = 1", ["x: int = 2"]),
    ("with a:\n    b", ["if True:\n    b"]),
    ("x = [a for a in b if c]", ["x = [a for a in b if not c]"]),
    ("x = a if b else c", ["x = a if not b else c"]), ("@a\nclass x:\n    y", ["class x:\n    y"]),
    ("assert a", [])])
def test_each_kind_of_change(before, after):
    tree, found = parse(before), []
    for _ in mutants(tree):
        compile(tree, "text", "exec")
        found.append(ast.unparse(tree))
    assert found == after


def test_a_text_is_the_same_to_the_record_but_for_words_and_layout():
    other = TOY.replace("Not 1", "Other words").replace("LIMIT = 3", "LIMIT  =  3  # why")
    assert digests(parse(other)) == digests(parse(TOY))
    other = digests(parse(TOY.replace("values[:count]", "list(values)[:count]")))
    assert other.keys() == {"LIMIT", "first"} and other["first"] != digests(parse(TOY))["first"]
    assert other["LIMIT"] == digests(parse(TOY))["LIMIT"]


def toy_project(folder, tests):
    (folder / "toy.py").write_text(TOY)
    (folder / "test_toy.py").write_text("import pytest, toy\n" + textwrap.dedent(tests))
    return folder / "toy.py"


def test_a_mutant_dies_by_a_failed_test_and_lives_where_none_fails(tmp_path):
    path = toy_project(tmp_path, """
        def test_first():
            assert toy.first([1, 2], 3) == [1, 2]
        def test_second():
            assert toy.first([4, 5], 2) == [4]
        """)
    clean = clean_run(path, ["test_toy.py"], tmp_path)
    assert [lines for _, lines in clean.values()] == [[9, 11, 12]] * 2
    tree, alive, tried = parse(TOY), [], []
    for mutant in mutants(tree):
        tests = passing(mutant, clean)
        tried.append(len(tests))
        if not is_killed(tree, path, "toy", tests, clean, tmp_path):
            alive.append(mutant)
    assert tried.count(2) == len(CHANGES) - 1 and tried.count(0) == 1  # the line of `raise`
    assert {mutant.change for mutant in alive} == {CHANGES[i][2] for i in (0, 1, 3, 7)}
    assert path.read_text() == TOY


def test_what_hangs_is_ended_and_counts_as_dead():
    assert fork(lambda: time.sleep(60), 1) == 128 + signal.SIGALRM
    assert fork(lambda: 5, 1) == 5


def test_a_module_whose_tests_fail_as_it_is_proves_nothing(tmp_path):
    path = toy_project(tmp_path, "def test_first():\n    assert toy.first([1], 2) == []\n")
    with pytest.raises(SystemExit, match="toy.py: its tests fail as it is.*test_first"):
        clean_run(path, ["test_toy.py"], tmp_path)


@pytest.fixture
def results():
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def test_nine_of_ten_mutants_of_each_core_module_die(results):
    assert results["modules"].keys() == TESTS.keys()
    for name, (killed, count) in table(results).items():
        lines = (ROOT / "pixcell_min" / f"{name}.py").read_text().count("\n")
        assert killed >= REQUIRED * count > 0.4 * lines, name  # none is tried too little


def test_the_report_is_that_of_the_results(results):
    assert MARKDOWN.read_text(encoding="utf-8") == markdown(results)
    survivors = sum(line.startswith("- ") for line in markdown(results).splitlines())
    assert survivors == sum(count - killed for killed, count in table(results).values())


def test_each_reason_is_given_to_a_survivor(results):
    report = markdown(results)
    for part, why in NO_EFFECT.items():
        assert re.search(f"{re.escape(part)}.* – {re.escape(why)}$", report, re.M), part


def test_what_makes_it_stale(results):
    before = stale(results)
    del results["modules"]["lora"]["LoRALinear"]
    results["modules"]["adapter"]["gone"] = {"digest": "0", "verdicts": "", "survivors": {}}
    assert {*stale(results)} == {*before, "lora.LoRALinear", "adapter.gone"}


@pytest.mark.slow
def test_the_results_are_of_this_text_and_a_sample_comes_out_as_they_say(results):
    assert stale(results) == [], "run python tests/mutation.py: it tries what has changed"
    done = subprocess.run([sys.executable, "tests/mutation.py", "--sample", "25"], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
