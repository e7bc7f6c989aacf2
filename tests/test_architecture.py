"""The promised layout: who imports whom, how long things are, that public things are explained."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pixcell_min"
CORE = sorted(PACKAGE.glob("*.py"))
SCRIPTS = [ROOT / "train.py", ROOT / "sample.py"]
ALL = sorted(PACKAGE.rglob("*.py")) + SCRIPTS
LEAVES = ("transformer", "embeddings", "vae", "uni", "lora", "adapter", "schedulers")
LEAF_PACKAGES = {"torch", "timm", "einops", "numpy", "PIL", "safetensors"}
RUNTIME = LEAF_PACKAGES | {"tqdm", "yaml", "huggingface_hub", "pixcell_min"}
TESTS_ONLY = {"diffusers", "peft", "accelerate", "transformers"}
MAX_FILE, MAX_FUNCTION = 330, 70  # lines
# Four samplers and their shared schedule stand in one file: they are one table and one formula.
# train.py alone wires things: parted, no half would be a story.
LONGER = {"schedulers.py": 430, "train.py": 380}


def imports(path):
    """{what is imported, dotted}: modules, and names taken from modules of ours."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            if node.module == "pixcell_min":
                found.remove(node.module)
                found |= {f"pixcell_min.{alias.name}" for alias in node.names}
    return found


def packages(path):
    return {name.split(".")[0] for name in imports(path)} - sys.stdlib_module_names


def ours(path):
    return {name for name in imports(path) if name.split(".")[0] == "pixcell_min"}


@pytest.mark.parametrize("name", LEAVES)
def test_a_leaf_imports_no_other_module_of_ours_but_the_file_readers(name):
    path = PACKAGE / f"{name}.py"
    parts = {"transformer": {"pixcell_min.embeddings"}}  # the network in two files
    assert ours(path) <= {"pixcell_min.checkpoint", "pixcell_min.loading"} | parts.get(name, set())
    assert packages(path) <= LEAF_PACKAGES | {"pixcell_min"}


def test_the_file_readers_and_the_precision_know_no_network():
    assert ours(PACKAGE / "loading.py") == {"pixcell_min.checkpoint"}
    assert packages(PACKAGE / "checkpoint.py") <= {"torch", "safetensors"}
    assert packages(PACKAGE / "precision.py") <= {"torch"}


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_only_runtime_packages_are_imported(path):
    assert not imports(path) & TESTS_ONLY and packages(path) <= RUNTIME
    assert "import_module(" not in path.read_text() and "__import__(" not in path.read_text()


def test_only_scripts_and_tools_import_the_config():
    assert [path.name for path in CORE if "pixcell_min.config" in ours(path)] == []


@pytest.mark.parametrize("name", ["pipeline", "training", "data", "features", "precomputed",
                                  "variational", "ema", "monitor"])
def test_models_and_schedules_are_arguments(name):
    models = {f"pixcell_min.{model}" for model in ("transformer", "vae", "uni", "adapter", "base")}
    assert not ours(PACKAGE / f"{name}.py") & models


def test_no_module_imports_itself_by_a_detour():
    known = {f"pixcell_min.{path.stem}": ours(path) for path in CORE if path.name != "__init__.py"}
    while ready := [name for name, its in known.items() if not its & known.keys()]:
        for name in ready:
            del known[name]
    assert not known  # what is left imports in a circle


def test_the_core_imports_no_tool_and_no_script():
    for path in CORE:
        assert not any(name.startswith("pixcell_min.tools") for name in ours(path)), path.name
        assert not imports(path) & {"train", "sample"}, path.name


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_no_line_is_longer_than_a_hundred_columns(path):
    lines = enumerate(path.read_text().splitlines(), 1)
    assert [number for number, line in lines if len(line) > 100] == []


@pytest.mark.parametrize("path", CORE + SCRIPTS, ids=lambda path: path.name)
def test_lengths(path):
    lines = path.read_text().splitlines()
    assert len(lines) < LONGER.get(path.name, MAX_FILE)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < MAX_FUNCTION, f"{path.name}: {node.name}"


def public(tree):
    """Public functions and classes of a module, and public methods of its public classes."""
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from (method for method in node.body if isinstance(method, ast.FunctionDef)
                            and not method.name.startswith("_") and method.name != "forward")


@pytest.mark.parametrize("path", CORE + SCRIPTS, ids=lambda path: path.name)
def test_public_things_say_what_they_are(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), path
    assert [node.name for node in public(tree) if not ast.get_docstring(node)] == []


def statements(node):
    """The nodes of a function's own body, not of functions within it."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.ClassDef, ast.Lambda)):
            yield child
            yield from statements(child)


def faults(node):
    """What is wrong with the form of a public thing's docstring."""
    text = ast.get_docstring(node)
    first = " ".join(text.partition("\n\n")[0].split())
    if not re.search(r"[.:;]$", first):
        yield "its first paragraph is no sentence"
    # A capital, or a formula: what comes out, or what goes in and comes out, with their shapes.
    if first[0].islower() and not re.search(r"[→=·+|]", first):
        yield "it begins with a small letter and is no formula"
    if isinstance(node, ast.FunctionDef):
        raises = any(isinstance(n, ast.Raise) and n.exc and "ValueError(" in ast.unparse(n.exc)
                     for n in statements(node))
        if raises and not re.search(r"\bRaises: \w", text):
            yield "it raises ValueError and does not say so"
        typed = [a.annotation for a in node.args.args + node.args.kwonlyargs] + [node.returns]
        if any("Tensor" in (its := ast.unparse(t)) and "dict" not in its for t in typed if t) and (
                not re.search(r"\(.*[,…].*\)|\bshape", text)):
            yield "it names no shape of its tensors"


@pytest.mark.parametrize("path", CORE + SCRIPTS, ids=lambda path: path.name)
def test_docstrings_have_their_form(path):
    """A sentence or a formula; the errors that are raised; tensors' shapes where they are typed."""
    assert [(node.name, fault) for node in public(ast.parse(path.read_text()))
            for fault in faults(node)] == []


@pytest.mark.parametrize("text, fault", [
    ("The sum of x", "no sentence"), ("the sum of x.", "small letter"),
    ("The sum. No errors.", "ValueError"), ("The sum. Raises: ValueError.", "no shape"),
    ("x (B, C) → its sum (B,). Raises: ValueError without any.", None)])
def test_a_docstring_out_of_form_is_seen(text, fault):
    node, = ast.parse(f'''def f(x: Tensor):
    """{text}"""
    if not len(x):
        raise ValueError("none")''').body
    found = [*faults(node)]
    assert any(fault in one for one in found) if fault else found == []


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.name)
def test_no_blanket_handler_and_no_loose_loading(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{path.name}: bare except"
            names = {n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)}
            assert not names & {"Exception", "BaseException"}, f"{path.name}:{node.lineno}"
        if isinstance(node, ast.Call):
            options = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            assert options.get("strict") is not False, f"{path.name}:{node.lineno}"
            assert ast.unparse(node.func) != "torch.load" or options.get("weights_only") is True


def test_the_scripts_start_without_the_encoders_library():
    """timm and torchvision take seconds and 200 MB; with cached features they are never needed."""
    code = "import sys, train, sample; sys.exit(bool({'timm', 'torchvision'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.__version__ < "2.14", reason="torch 2.11 imports it for any random start")
def test_a_base_is_loaded_without_torchs_compiler():
    """torch imports it, 1 s and 150 MB, for some random starts on the meta device."""
    code = ("import sys, pixcell_min; pixcell_min.load_pixcell_base().vae; "
            "sys.exit(bool({'torch._dynamo', 'sympy'} & sys.modules.keys()))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
