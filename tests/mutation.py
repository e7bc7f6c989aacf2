"""Mutation check: break the core in one place at a time, and see whether a test notices.

    python tests/mutation.py                        all that has changed since tests/mutants.json
    python tests/mutation.py lora --survivors       again what no test noticed, for better tests
    python tests/mutation.py --sample 20 --seed 1   some of each module, beside the file; no writing

A mutant is a module with one change: another operator or constant, a condition turned round, a
statement, argument, decorator, context or slice end left out, a result None. Docstrings,
annotations and what a `raise` says stay. It runs in a fork of this process, which has loaded torch
and the references and nothing of ours, against those of its module's tests that pass the changed
statement, quickest first, up to BUDGET; a failed test, an error at import or a time-out kills it.
Processes that a test starts see the unchanged file.
"""

import argparse
import ast
import copy
import gc
import hashlib
import importlib
import itertools
import json
import os
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from importlib.machinery import SourceFileLoader
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS, MARKDOWN = ROOT / "tests" / "mutants.json", ROOT / "tests" / "mutants.md"
TESTS = {  # of each module; test_train.py's whole runs are training's, and the slowest
    "lora": "lora parity_lora formats parity_formats",
    "adapter": "adapter",
    "schedulers": "schedulers parity_schedulers variational",
    "batches": "batches",
    "training": "training train variational ema precision",
    "transformer": "transformer parity_transformer original pixcell_1024 precision"}
BUDGET = 4.0  # CPU seconds of the tests that one mutant is tried with, as traced
TIMES, SPARE = 5, 20  # a mutant may take that many times as long as its tests did, and seconds more
REQUIRED = 0.9  # share of killed mutants in each module
SWAPS = {ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div], ast.Div: [ast.Mult],
         ast.FloorDiv: [ast.Mult], ast.Mod: [ast.Mult], ast.Pow: [ast.Mult],
         ast.MatMult: [ast.Mult], ast.BitOr: [ast.BitAnd], ast.BitAnd: [ast.BitOr],
         ast.BitXor: [ast.BitAnd], ast.And: [ast.Or], ast.Or: [ast.And],
         ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is],
         ast.In: [ast.NotIn], ast.NotIn: [ast.In], ast.Lt: [ast.LtE, ast.GtE],
         ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.LtE], ast.GtE: [ast.Gt, ast.Lt]}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}

NO_EFFECT = {  # part of a change: why no test can show it (it counts as a survivor all the same)
    "caption_num_tokens > 2": "the least square number above 1 is 4",
    "table.chunk(7": "six rows in seven parts are six parts",
    "[:, None]).chunk(3": "two rows in three parts are two parts",
    "transpose(-1, 2)": "2 is -2 of four dimensions",
    "append=levels[": "what is appended is met by a fraction of 0 alone",
    "alpha=alpha[:],": "a column's entry beyond the last row is not read",
    "sigma=sigma[:],": "a column's entry beyond the last row is not read",
    "'XXdevice'": "only a generator on a GPU has another device",
    "generator=generator).to(like": "only a generator on a GPU has another device",
    "SMALLEST_SQUARE = 2e-24": "any number far below an embedding's square will do",
    "in tensors else (2, 1)": "a file without that key is refused for it",
    "in tensors else (1, 2)": "a file without that key is refused for it",
    "` → `def merge(self)": "`.data` keeps no graph: it saves memory",
    "._apply(at_least_float32)": "the base is converted before, and again is no change",
    "_least_float32, recurse=True)": "the base is converted before, and again is no change",
    "optimizer.zero_grad()": "it is torch's default"}


class Mutant(NamedTuple):
    """One change, made in the tree while the generator that gave it stands there."""

    unit: str  # the function, class or name at the module's top level
    lines: range | None  # of the changed statement; None: it runs at import
    change: str  # `before` → `after`, with the function it is in


# ---------------------------------------------------------------- what is changed


def parse(source) -> ast.Module:
    """The syntax tree, a `pass` in the place of each docstring."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        for i, child in enumerate(getattr(node, "body", None) if isinstance(
                node, (ast.Module, ast.ClassDef, ast.FunctionDef)) else ()):
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                node.body[i] = ast.copy_location(ast.Pass(), child)
    return tree


def tree_of(name) -> ast.Module:
    """The tree of a module of the core."""
    return parse((ROOT / "pixcell_min" / f"{name}.py").read_text(encoding="utf-8"))


def but(node, **fields):
    """A copy of a node with other fields."""
    other = copy.copy(node)
    for name, value in fields.items():
        setattr(other, name, value)
    return other


def alternatives(node):
    """What is tried in a node's place."""
    if isinstance(node, ast.Compare):
        for i, operator in enumerate(node.ops):
            for other in SWAPS[type(operator)]:
                yield but(node, ops=[*node.ops[:i], other(), *node.ops[i + 1:]])
    elif isinstance(node, (ast.BinOp, ast.BoolOp, ast.AugAssign)):
        yield from (but(node, op=other()) for other in SWAPS[type(node.op)])
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Constant) and not isinstance(node.value, (type(None), type(...))):
        old = node.value
        yield but(node, value=not old if isinstance(old, bool) else old + 1 if isinstance(old, int)
                  else "XX" + old if isinstance(old, str) else 2 * old or 1.0)
    elif isinstance(node, ast.Call):
        if isinstance(node.func, ast.Name) and node.func.id in NAMES:
            yield but(node, func=but(node.func, id=NAMES[node.func.id]))
        yield from (but(node, keywords=[k for k in node.keywords if k is not keyword])
                    for keyword in node.keywords if keyword.arg)
    elif isinstance(node, ast.Slice):
        yield from (but(node, **{end: None}) for end in ("lower", "upper") if getattr(node, end))
    elif isinstance(node, ast.comprehension):
        yield from (but(node, ifs=[*node.ifs[:i], negated(test), *node.ifs[i + 1:]])
                    for i, test in enumerate(node.ifs) if turns(test))
    elif isinstance(node, ast.Return) and node.value:
        yield but(node, value=ast.Constant(None))
    elif isinstance(node, ast.With) and not any(item.optional_vars for item in node.items):
        yield ast.copy_location(ast.If(ast.Constant(True), node.body, []), node)
    if isinstance(node, (ast.If, ast.While, ast.IfExp)) and turns(node.test):
        yield but(node, test=negated(node.test))
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        yield from (but(node, decorator_list=[d for d in node.decorator_list if d is not one])
                    for one in node.decorator_list)
    if is_left_out(node):
        yield ast.copy_location(ast.Pass(), node)


def turns(test):
    """Whether a condition's negation is another mutant than its own parts give."""
    return not isinstance(test, ast.UnaryOp) and not (
        isinstance(test, ast.Compare) and len(test.ops) == 1)


def negated(test):
    return ast.copy_location(ast.UnaryOp(ast.Not(), test), test)


def is_left_out(node):
    """Statements whose absence is no NameError: calls, raises, and what changes something."""
    if isinstance(node, ast.Assign):
        read = {n.id for n in ast.walk(node.value) if isinstance(n, ast.Name)}
        return all(not isinstance(target, ast.Name) or target.id in read for target in node.targets)
    return isinstance(node, (ast.AugAssign, ast.Raise)) or (
        isinstance(node, ast.Expr) and isinstance(node.value, (ast.Call, ast.Tuple)))


def units(tree):
    """(place in the tree's body, name) of each function, class and assignment at the top level."""
    for i, top in enumerate(tree.body):
        named = top.targets[0] if isinstance(top, ast.Assign) else top
        if not isinstance(top, (ast.Import, ast.ImportFrom, ast.Pass)):
            yield (tree.body, i), getattr(named, "name", getattr(named, "id", "(module)"))


def mutants(tree):
    """Every Mutant of a tree, which is changed while one is given and whole again after."""
    for place, unit in units(tree):
        yield from _mutants(place, place, unit, (), None)


def _mutants(place, statement, unit, path, lines):
    """Those of the node at `place`, a container and its key; lines None: outside any function."""
    holder, key = place
    node = holder[key]
    if isinstance(node, ast.stmt):
        statement = place
        if lines is not None:
            body = getattr(node, "body", None)
            end = max(body[0].lineno, node.lineno + 1) if body else node.end_lineno + 1
            lines = range(node.lineno, end)
    whole = unparsed(statement)
    for other in alternatives(node):
        holder[key] = ast.fix_missing_locations(other)
        change = difference(whole, unparsed(statement))
        yield Mutant(unit, lines, f"{'.'.join(path) or unit}: {change}")
        holder[key] = node
    if isinstance(node, ast.Raise):
        return
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        path = (*path, node.name)
    for field, value in ast.iter_fields(node):
        inner = isinstance(node, ast.FunctionDef) and field == "body"
        places = [(value, i) for i in range(len(value))] if isinstance(value, list) else [
            (vars(node), field)]
        for its in places if field not in ("annotation", "returns") else ():
            if isinstance(its[0][its[1]], ast.AST):
                yield from _mutants(its, statement, unit, path, range(0) if inner else lines)


def unparsed(place):
    return " ".join(ast.unparse(place[0][place[1]]).split())


def difference(before, after, around=24):
    """`before` → `after`, cut to what differs and a little beside it."""
    if after == "pass":
        return f"without `{before[:72]}`"
    start = len(os.path.commonprefix([before, after]))
    end = min(len(os.path.commonprefix([before[::-1], after[::-1]])),
              min(len(before), len(after)) - start)
    return " → ".join(f"`{text[max(start - around, 0):len(text) - max(end - around, 0)]}`"
                      for text in (before, after))


def digests(tree) -> dict[str, str]:
    """{unit: hash of its text without docstrings, comments and layout}."""
    texts = {}
    for place, unit in units(tree):
        texts[unit] = texts.get(unit, "") + unparsed(place)
    return {unit: hashlib.sha256(text.encode()).hexdigest()[:16] for unit, text in texts.items()}


# ---------------------------------------------------------------- what is run


class Chosen:
    """Runs the tests of these names alone, in this order."""

    def __init__(self, names):
        self.rank = {name: i for i, name in enumerate(names)}

    def pytest_collection_modifyitems(self, items):
        items[:] = sorted((item for item in items if item.nodeid in self.rank),
                          key=lambda item: self.rank[item.nodeid])


class Traced:
    """Notes each test's seconds and the lines of `file` that it passes, and which ones failed."""

    def __init__(self, file):
        self.file, self.tests, self.failed = str(file), {}, []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item):
        lines, start = set(), time.process_time()

        def inside(frame, event, _):
            lines.add(frame.f_lineno)
            return inside

        sys.settrace(lambda frame, *_: inside if frame.f_code.co_filename == self.file else None)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            self.tests[item.nodeid] = time.process_time() - start, sorted(lines)

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid)


def fork(work, limit) -> int:
    """The exit code of work() in a child without output; 128 + signal if it was killed."""
    if child := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return code if code >= 0 else 128 - code
    code = 3
    try:
        signal.alarm(limit)  # its default action ends the child, wherever it hangs
        gc.freeze()  # what is loaded stays; without this each collection walks through all of it
        sys.stdout = sys.stderr = open(os.devnull, "w")
        for stream in (1, 2):
            os.dup2(sys.stdout.fileno(), stream)
        code = int(work())
    finally:
        os._exit(code)


def run_tests(files, plugin, root=ROOT) -> int:
    """pytest's exit code; temporary files lie in a folder of their own, which is deleted."""
    os.chdir(root)
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # none is needed, and some are slow
    folder = tempfile.mkdtemp()
    try:
        return pytest.main(["-x", "-p", "no:cacheprovider", "-m", "not slow", "-W", "ignore",
                            "--tb=no", "--assert=plain",
                            "--basetemp", folder, *files], plugins=[plugin])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def clean_run(path, files, root=ROOT) -> dict[str, tuple[float, list[int]]]:
    """{test: (seconds, lines of the module at `path` that it passes)}.

    Loads what the tests loaded, but for our own modules. Raises: SystemExit if a test fails.
    """
    with tempfile.NamedTemporaryFile("w+") as note:
        def work():
            plugin = Traced(path)
            code = run_tests(files, plugin, root)
            used = [name for name, its in list(sys.modules.items())
                    if "site-packages" in (getattr(its, "__file__", None) or "")]
            Path(note.name).write_text(json.dumps([plugin.failed, plugin.tests, used]))
            return code

        code = fork(work, 3600)
        failed, found, used = json.loads(note.read() or "[[], {}, []]")
    if code:
        raise SystemExit(f"{path.name}: its tests fail as it is, {code}: {', '.join(failed)}")
    for name in used:  # loaded once, here, for all forks
        importlib.import_module(name)
    return found


def passing(mutant, clean) -> list[str]:
    """The tests that pass the changed statement, quickest first, BUDGET seconds of them at most.

    Of a statement that runs at import all do.
    """
    names = [name for name, (_, lines) in clean.items()
             if mutant.lines is None or not set(mutant.lines).isdisjoint(lines)]
    names.sort(key=lambda name: clean[name][0])
    sums = itertools.accumulate(clean[name][0] for name in names)
    return [name for name, total in zip(names, sums) if total <= BUDGET]


def is_killed(tree, path, module, tests, clean, root=ROOT) -> bool:
    """Whether one of the tests fails, cannot be collected or hangs with `tree` as `module`."""
    def work():
        original = SourceFileLoader.get_code
        SourceFileLoader.get_code = lambda self, name: (
            compile(tree, str(path), "exec") if name == module else original(self, name))
        return run_tests(files, Chosen(tests), root)

    limit = SPARE + TIMES * sum(clean[name][0] for name in tests)
    by_file = list(dict.fromkeys(name.partition("::")[0] for name in clean))
    for files in (by_file[:1], by_file[1:]):  # most die in the module's own file, soon collected
        if any(name.startswith(tuple(files)) for name in tests) and (
                fork(work, int(limit)) not in (0, 5)):  # 5: none of them is there
            return True
    return False


# ---------------------------------------------------------------- the record


def check(name, record, survivors=False, sample=None):
    """Run a module's mutants that `record` does not know; → {unit: its verdicts}, as it grows.

    A verdict is k (killed) or s; `survivors` tries those with s again. sample: numbers of the
    mutants to try, whatever is known.
    """
    path, tree = ROOT / "pixcell_min" / f"{name}.py", tree_of(name)
    hashes, at, clean = digests(tree), {}, None
    known = {unit: its for unit, its in record.items() if its["digest"] == hashes.get(unit)}
    record.clear()  # filled anew in the order of the text
    for unit, digest in hashes.items():
        record[unit] = known.get(unit, {"digest": digest, "verdicts": "", "survivors": {}})
    for number, mutant in enumerate(mutants(tree)):
        its = record[mutant.unit]
        i = at[mutant.unit] = at.get(mutant.unit, -1) + 1
        verdicts = its["verdicts"]
        again = number in sample if sample is not None else (
            i >= len(verdicts) or survivors and verdicts[i] == "s")
        if not again:
            continue
        clean = clean or clean_run(path, [f"tests/test_{file}.py" for file in TESTS[name].split()])
        tests, start = passing(mutant, clean), time.perf_counter()
        killed = is_killed(tree, path, f"pixcell_min.{name}", tests, clean)
        print(f"{name} {number} {'killed' if killed else 'SURVIVES'}, {len(tests)} tests, "
              f"{time.perf_counter() - start:.1f} s, {mutant.change}", flush=True)
        its["verdicts"] = verdicts[:i] + "sk"[killed] + verdicts[i + 1:]
        its["survivors"].pop(str(i), None)
        if not killed:
            its["survivors"][str(i)] = mutant.change
        yield number, killed, verdicts[i:i + 1]


def table(results) -> dict[str, tuple[int, int]]:
    """{module: (killed, all)} of the record."""
    return {name: (verdicts.count("k"), len(verdicts)) for name, units in results["modules"].items()
            for verdicts in ["".join(unit["verdicts"] for unit in units.values())]}


def markdown(results) -> str:
    """The report."""
    rows = [f"| `{name}.py` | {killed} | {count} | {100 * killed / count:.1f} |"
            for name, (killed, count) in table(results).items()]
    lists = []
    for name, record in results["modules"].items():
        lists.append(f"\n## {name}.py\n")
        for unit in record.values():
            alive = unit["survivors"]
            changes = [alive[number] for number in sorted(alive, key=int)]
            lists += [" – ".join([f"- {change}", *(why for part, why in NO_EFFECT.items()
                                                   if part in change)]) for change in changes]
    return "\n".join([
        "# Mutants of the core", "",
        "Written by `python tests/mutation.py`, which says what a mutant is and how it is tried. "
        f"{results['date']}, {results['versions']}.", "",
        "| module | killed | mutants | % |", "|---|---|---|---|", *rows, "",
        "Survivors, in the order of the text: the function, and what was changed. Where no test "
        "could tell, the reason follows; it counts as a survivor all the same.", *lists, ""])


def stale(results) -> list[str]:
    """The units of the record that are not those of today's text: another text, gone or new."""
    found = []
    for name in TESTS:
        tree = tree_of(name)
        known = {unit: its["digest"] for unit, its in results["modules"].get(name, {}).items()}
        found += [f"{name}.{unit}" for unit, _ in sorted(known.items() ^ digests(tree).items())]
    return sorted(set(found))


def write(results) -> None:
    results |= {"date": time.strftime("%Y-%m-%d"),
                "versions": ", ".join([f"Python {platform.python_version()}", *(
                    f"{name} {version(name)}" for name in ("torch", "diffusers", "peft"))])}
    for path, text in ((RESULTS, json.dumps(results, indent=1, ensure_ascii=False) + "\n"),
                       (MARKDOWN, markdown(results))):
        draft = path.with_suffix(".draft")
        draft.write_text(text, encoding="utf-8")
        draft.replace(path)


def main(argv=None) -> int:
    """Run what is asked for; → 1 if a sampled mutant lives that the file calls dead, else 0."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("modules", nargs="*", choices=[*TESTS, []], help="default: all")
    parser.add_argument("--survivors", action="store_true", help="try the survivors again, too")
    parser.add_argument("--sample", type=int, metavar="N", help="try N mutants of each module")
    parser.add_argument("--seed", type=int, default=0, help="of --sample (default: 0)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)  # a fork has none of its parent's threads
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"modules": {}}
    lost = 0
    for name in args.modules or TESTS:
        record = results["modules"].setdefault(name, {})
        if args.sample:
            count = sum(1 for _ in mutants(tree_of(name)))
            sample = random.Random(args.seed).sample(range(count), min(args.sample, count))
            tried = list(check(name, copy.deepcopy(record), sample=set(sample)))
            lost += sum(before == "k" and not killed for _, killed, before in tried)
            print(f"{name}: {sum(killed for _, killed, _ in tried)} of {len(tried)} killed")
            continue
        for _ in check(name, record, args.survivors):
            write(results)
        write(results)
    if not args.sample:
        print(MARKDOWN.read_text())
    return min(lost, 1)


if __name__ == "__main__":
    sys.exit(main())
