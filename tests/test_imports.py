"""The arrows of the design: who may import whom, read from the source, not from what happens to
run."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hessianflow
from hessianflow import interfaces

PACKAGE = Path(hessianflow.__file__).parent
SHARED = {
    "interfaces",
    "batches",
    "structure",
    "losses",
    "measuring",
    "normalisation",
    "memory",
    "checks",
    "facts",
    "user_code",
    "sharding",
}
ALLOWED: dict[str, set[str]] = {
    **{
        room: SHARED | {room}
        for room in ("curvature", "control", "adversarial", "optim", "models", "data")
    },
    "runs": {"interfaces", "checks", "runs"},
    "training": SHARED | {"training", "runs"},
    "plots": SHARED | {"plots", "runs", "upgrade"},
    "distributed": SHARED | {"distributed", "curvature"},
    "integrations": SHARED
    | {"integrations", "curvature", "control", "data", "distributed", "optim", "runs"},
    "interfaces": {"interfaces"},
    "batches": {"interfaces", "structure"},
    "structure": set(),
    "losses": {"losses", "batches", "interfaces", "measuring", "structure"},
    "measuring": {"interfaces"},
    "monitoring": {"interfaces", "measuring", "curvature", "sharding"},
    "sharding": {"interfaces"},
    "normalisation": {"normalisation", "batches", "interfaces", "losses", "measuring"},
    "memory": set(),
    "checks": {"interfaces"},
    "facts": set(),
    "user_code": {"interfaces"},
    "rates": set(),
    "machine": {"interfaces", "bounds"},
    "bounds": {"interfaces", "checks"},
    "effects": {"interfaces", "bounds", "data"},
    "options": {"bounds"},
    "methods": {
        "interfaces",
        "facts",
        "options",
        "user_code",
        "control",
        "adversarial",
        "optim",
    },
    "upgrade": set(),
    "config": {"interfaces", "bounds", "effects", "methods"},
    "resolve": {
        "interfaces",
        "bounds",
        "config",
        "effects",
        "facts",
        "methods",
        "options",
        "rates",
        "data",
    },
    "__init__": {"interfaces", "memory"},
    "__main__": {"cli"},
}
ROOMS_OF_BUILD = {
    *(
        "curvature",
        "control",
        "adversarial",
        "optim",
        "models",
        "data",
        "training",
        "distributed",
        "runs",
    ),
    *(
        "config",
        "build",
        "choices",
        "machine",
        "measurements",
        "methods",
        "options",
        "parts",
        "resolve",
        "upgrade",
    ),
    *SHARED,
}
ALLOWED["build"] = ALLOWED["choices"] = ALLOWED["parts"] = ALLOWED["measurements"] = ROOMS_OF_BUILD
ALLOWED["elastic"] = ROOMS_OF_BUILD | {"elastic"}
ALLOWED["dual_batch"] = ROOMS_OF_BUILD | {"dual_batch"}
ALLOWED["planning"] = ROOMS_OF_BUILD | {"planning", "bounds"}
ALLOWED["cli"] = {"commands", "interfaces", "__version__"}
ALLOWED["commands"] = {
    *(
        "commands",
        "config",
        "build",
        "choices",
        "dual_batch",
        "elastic",
        "planning",
        "plots",
        "training",
        "control",
        "curvature",
    ),
    *(
        "adversarial",
        "data",
        "distributed",
        "methods",
        "resolve",
        "runs",
        "bounds",
        "effects",
        "parts",
        "upgrade",
        *SHARED,
    ),
}


def imported_rooms(source: str) -> set[str]:
    """Rooms of the package that a module imports, at the top or inside a function, type-checking
    blocks apart."""
    tree = ast.parse(source)
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    rooms = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports inside the package are absolute"
            names = (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == "hessianflow"
                else []
            )
            names += [node.module or ""]
        else:
            continue
        rooms |= {name.split(".")[1] for name in names if name.startswith("hessianflow.")}
    return rooms


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path: Path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    room = parts[0]
    wrong = imported_rooms(path.read_text()) - ALLOWED[room]
    assert not wrong, f"{path.relative_to(PACKAGE)} may not import {sorted(wrong)}"


def test_control_uses_no_tensors():
    for path in (PACKAGE / "control").glob("*.py"):
        tree = ast.parse(path.read_text())
        names = {
            a.name.split(".")[0]
            for n in ast.walk(tree)
            if isinstance(n, ast.Import)
            for a in n.names
        }
        names |= {
            (n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)
        }
        assert "torch" not in names, path.name


@pytest.mark.parametrize(
    "module", ["hessianflow.control", "hessianflow.checks", "hessianflow.interfaces"]
)
def test_control_and_what_it_rests_on_import_no_torch(module: str):
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_every_shared_name_is_where_it_is_said_to_be():
    """Every name of the list is found, and is one that a type checker sees."""
    for name in interfaces.__all__:
        assert getattr(interfaces, name) is not None
    tree = ast.parse(Path(interfaces.__file__).read_text())
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hessianflow")
        for alias in node.names
    }
    assert imported == set(interfaces.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'Nonsense'"):
        interfaces.Nonsense  # noqa: B018


def test_the_parser_sees_every_way_to_import():
    inside = "def f():\n    from hessianflow.optim.lars import LARS\n"
    source = "import hessianflow.models\nfrom hessianflow import data\n" + inside
    assert imported_rooms(source) == {"models", "data", "optim"}


def test_import_is_light():
    """Heavy libraries must not come in with the package; counted, not timed."""
    code = (
        "import sys, torch; before = set(sys.modules); import hessianflow; new = {m.split('.')[0]"
        " for m in set(sys.modules) - before}; print(sorted(new & {'sklearn', 'matplotlib',"
        " 'scipy', 'PIL', 'ray', 'pyhessian', 'jsonargparse', 'pandas'}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_exists():
    for name in hessianflow.__all__:
        assert getattr(hessianflow, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = hessianflow.nothing


def test_one_function_alone_expands_home_folders():
    """All others would have to refuse unknown users by themselves, and some had forgotten to."""
    found = [path.name for path in MODULES if "expanduser" in path.read_text()]
    assert found == ["checks.py"]
