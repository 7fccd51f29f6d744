"""The layer table of ARCHITECTURE.md, held over the syntax trees of all modules."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = {"flows", "tasks", "storage", "deployments"}
MAY_IMPORT = {
    "core": set(),
    "engines": {"core"},
    "storage": {"core", "storage.checkpoints", "storage.database"},
    "storage.checkpoints": {"core", "storage"},
    "storage.database": {"core", "storage"},
    "tasks.workers": {"core", "storage", "storage.checkpoints"},
    "tasks": {"core", "storage", "storage.checkpoints", "storage.database", "tasks.workers", "settings"},
    "report": {"core", "storage", "storage.checkpoints", "storage.database"},
    "testing": {"core", "storage", "storage.checkpoints", "storage.database"},
}
TOP = {
    *("report", "experiment", "result", "specfile", "settings", "locate", "standing"),
    *("transfer", "forking", "callables", "upkeep", "storages", "references"),
}
MAY_IMPORT |= {name: {"core", "storage", "storage.checkpoints", "storage.database"} | TOP for name in TOP}
MAY_IMPORT["holding"] = {"core", "locate", "storage", "storage.database", "tasks.workers"}
MAY_IMPORT |= {name: {*MAY_IMPORT[name], "holding"} for name in ("upkeep", "forking")}
MAY_IMPORT["settings"] = {"core"}
MAY_IMPORT["flows"] = {"core", "engines", "tasks", "tasks.workers", *MAY_IMPORT["report"], *TOP, "holding"}
MAY_IMPORT["deployments"] = {"core", "flows", "holding", *MAY_IMPORT["report"], *TOP}
MAY_IMPORT["api"] = {*MAY_IMPORT, "deployments"} - {"testing"}
MAY_IMPORT["holdfast"] = {*MAY_IMPORT, "api"} - {"testing"}
MAY_IMPORT["cli"] = {*MAY_IMPORT, "holdfast", "api"}
PREFECT = {"tasks", "flows", "deployments"}
PREFECT_LATE = {"api", "cli"}


def modules():
    found = {}
    for folder in (ROOT / "src" / "holdfast", *(ROOT / name for name in sorted(FOLDERS))):
        for path in sorted(folder.rglob("*.py")):
            base = ROOT / "src" if folder.parent.name == "src" else ROOT
            parts = path.relative_to(base).with_suffix("").parts
            parts = parts if parts[0] == "holdfast" else ("holdfast", *parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def layer(module):
    parts = module.split(".")[1:] or ["holdfast"]
    pair = ".".join(parts[:2])
    return pair if pair in MAY_IMPORT else parts[0]


def imports(tree, *, late=True):
    """Yield (module, line) of each import; without ``late`` ones, those that importing the module runs."""
    todo = [(node, False) for node in tree.body]
    while todo:
        node, inside = todo.pop()
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            inside = True
        if isinstance(node, ast.Import) and (late or not inside):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (late or not inside):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                below = f"{base}.{alias.name}"
                yield (below if below in MODULES else base), node.lineno
        todo += [(child, inside) for child in ast.iter_child_nodes(node)]


@pytest.mark.parametrize("name", MODULES)
def test_a_module_keeps_to_its_layer(name):
    here, problems = layer(name), []
    early = set(imports(TREES[name], late=False))
    for target, line in imports(TREES[name]):
        library = target.split(".")[0]
        if target.startswith(".") or library in FOLDERS:
            problems.append(f"line {line}: {target} is not absolute")
        elif library == "holdfast" and target != "holdfast" and layer(target) not in {here, *MAY_IMPORT.get(here, set())}:
            problems.append(f"line {line}: {here} imports {layer(target)}")
        elif library in ("sqlalchemy", "alembic") and here not in {"storage.database", "testing"}:
            problems.append(f"line {line}: SQLAlchemy outside storage.database")
        elif library == "prefect" and here not in PREFECT and not (here in PREFECT_LATE and (target, line) not in early):
            problems.append(f"line {line}: Prefect in {here}")
        elif library == "optuna" and name != "holdfast.engines.optuna_engine":
            problems.append(f"line {line}: Optuna outside its module")
    assert here in MAY_IMPORT, f"{here} has no line in the table"
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("name", MODULES)
def test_environment_variables_are_read_in_one_place(name):
    """A parent may hand its environment on to a child (``os.environ`` as a whole, in the workers' pool); a fork gets one."""
    allowed = {"holdfast.settings", "holdfast.tasks.workers.pool", "holdfast.tasks.workers.child", "holdfast.testing.warm"}
    found = [
        node.lineno
        for node in ast.walk(TREES[name])
        if isinstance(node, ast.Attribute)
        and node.attr in ("environ", "environb", "getenv")
        and ast.unparse(node.value) == "os"
    ]
    assert name in allowed or not found, f"os.environ in line {found}"


def test_no_import_cycles():
    graph = {name: {target for target, _ in imports(tree, late=False) if target in MODULES} for name, tree in TREES.items()}
    assert [*TopologicalSorter(graph).static_order()]


@pytest.mark.parametrize("name", MODULES)
def test_no_file_is_too_long(name):
    assert len(MODULES[name].read_text().splitlines()) <= 500


@pytest.mark.parametrize("module", ["holdfast.tasks.workers.child", "holdfast.storage.checkpoints.local"])
def test_what_runs_beside_user_code_is_light(module):
    code = f"import sys, {module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"prefect", "sqlalchemy", "pandas", "optuna", "fsspec"} & set(loaded)
