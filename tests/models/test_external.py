"""Networks from elsewhere: import paths, timm, torchvision (stand-ins: neither is needed to test
the calls)."""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import nn

from hessianflow import models
from hessianflow.interfaces import HessianFlowError


@pytest.fixture
def user_module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = ModuleType("a_users_module")
    monkeypatch.setitem(sys.modules, "a_users_module", module)
    return module


def test_a_function_gets_the_arguments_it_names(user_module: ModuleType) -> None:
    user_module.build = lambda num_classes, in_channels=3: nn.Linear(in_channels, num_classes)  # type: ignore[attr-defined]
    model = models.create("a_users_module:build", 4, in_channels=2)
    assert isinstance(model, nn.Linear)
    assert (model.in_features, model.out_features) == (2, 4)


def test_a_function_without_arguments_is_simply_called(user_module: ModuleType) -> None:
    user_module.build = lambda: nn.Linear(5, 6)  # type: ignore[attr-defined]
    assert isinstance(models.create("a_users_module:build"), nn.Linear)


def test_timm_and_torchvision_are_asked_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, dict[str, Any]]] = []

    def factory(name: str, **options: Any) -> nn.Module:
        asked.append((name, options))
        return nn.Identity()

    timm, torchvision, tv_models = (
        ModuleType(name) for name in ("timm", "torchvision", "torchvision.models")
    )
    timm.create_model = tv_models.get_model = factory  # type: ignore[attr-defined]
    for module in (timm, torchvision, tv_models):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    models.create("timm/resnet26", 7, in_channels=1)
    models.create("torchvision/resnet18", 8)
    assert asked == [
        ("resnet26", {"num_classes": 7, "in_chans": 1}),
        ("resnet18", {"weights": None, "num_classes": 8}),
    ]


def test_what_cannot_be_imported_is_named(user_module: ModuleType) -> None:
    with pytest.raises(
        HessianFlowError, match="importing 'no_such_module' failed: ModuleNotFoundError"
    ):
        models.create("no_such_module:build")
    with pytest.raises(HessianFlowError, match="'a_users_module' has no function 'build'"):
        models.create("a_users_module:build")
    with pytest.raises(HessianFlowError, match="has no function ''; write it as package"):
        models.create("a_users_module:")
    user_module.build = lambda: 3  # type: ignore[attr-defined]
    with pytest.raises(HessianFlowError, match=r"must return a torch.nn.Module, got int"):
        models.create("a_users_module:build")


def test_a_broken_package_is_reported_with_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)  # makes the import raise
    with pytest.raises(
        HessianFlowError, match=r"importing 'timm' failed: ModuleNotFoundError.*; pip install timm$"
    ):
        models.create("timm/resnet26")


def test_a_name_unknown_to_the_library_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, **options: Any) -> nn.Module:
        raise RuntimeError(f"Unknown model ({name})")

    timm = ModuleType("timm")
    timm.create_model = refuse  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)
    with pytest.raises(
        HessianFlowError,
        match=r"timm cannot build 'resnet0': RuntimeError: Unknown model \(resnet0\)",
    ):
        models.create("timm/resnet0")


def test_a_function_that_needs_more_is_refused():
    with pytest.raises(
        HessianFlowError, match=r"cannot be called with num_classes.*required argument: 'a'"
    ):
        models.create("os.path:join")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "builtins:input",
            (
                "must name a function or a class of torch.nn.Module, found a"
                " builtin_function_or_method"
            ),
        ),
        ("builtins:dict", "must name a function or a class of torch.nn.Module, found a type"),
        (
            "builtins:KeyboardInterrupt",
            "must name a function or a class of torch.nn.Module, found a type",
        ),
        ("os:abort", "found a builtin_function_or_method"),
        ("math:log", "found a builtin_function_or_method"),
        ("torch:Tensor", "must name a function or a class of torch.nn.Module"),
        ("http.server:test", "'http.server' is of Python's own library, which makes no models"),
        ("antigravity:__file__", "has no function '__file__'"),
        ("nets.py:net", "name the module, not its file: nets:net"),
        ("./folder/nets.py:net", "name the module, not its file: nets:net"),
        ("torch.nn:Linear", r"cannot be called with num_classes.*'in_features'"),
    ],
)
def test_only_functions_and_classes_of_modules_are_called(
    name: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("webbrowser.open", lambda *_: True)  # which antigravity would do
    with pytest.raises(HessianFlowError, match=words):
        models.create(name)


def test_a_class_of_modules_is_made_with_what_it_names(user_module: ModuleType) -> None:
    class Net(nn.Linear):
        def __init__(self, num_classes: int, in_channels: int = 3) -> None:
            super().__init__(in_channels, num_classes)

    user_module.Net = Net  # type: ignore[attr-defined]
    model = models.create("a_users_module:Net", 4, in_channels=2)
    assert isinstance(model, Net)
    assert model.out_features == 4
    user_module.partly = partial(Net, in_channels=5)  # type: ignore[attr-defined]
    assert models.create("a_users_module:partly", 4, in_channels=2).in_features == 2


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working directory, which Python's path does not have."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))]
    )
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("own_"):
            del sys.modules[name]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            "import nothing_here\n",
            (
                r"importing 'own_net' failed: ModuleNotFoundError: .*nothing_here.* \(own_net.py"
                r" line 1\)"
            ),
        ),
        ("x = (\n", r"importing 'own_net' failed: SyntaxError: '\(' was never closed"),
        (
            "import sys\nsys.exit('bye')\n",
            r"importing 'own_net' failed: SystemExit: bye \(own_net.py line 2\)",
        ),
        (
            "def net():\n    return {}['x']\n",
            r"calling it failed: KeyError: 'x' \(own_net.py line 2\)",
        ),
        (
            "def net():\n    raise SystemExit\n",
            r"calling it failed: SystemExit: no message \(own_net.py line 2\)",
        ),
        ("def net(): return [1]\n", r"must return a torch.nn.Module, got list"),
    ],
)
def test_what_fails_in_the_users_code_is_told_with_its_place(
    source: str, words: str, own_folder: Path
) -> None:
    (own_folder / "own_net.py").write_text(source)
    with pytest.raises(HessianFlowError, match=words) as failed:
        models.create("own_net:net")
    assert "\n" not in str(failed.value)


def test_the_working_directory_is_looked_in_first_and_stays_last(own_folder: Path) -> None:
    """As with `python -m`; but what is there hides nothing from the rest of the program."""
    (own_folder / "own_net.py").write_text(
        "from torch import nn\n\n\ndef net():\n    return nn.Linear(2, 3)\n"
    )
    assert isinstance(models.create("own_net:net"), nn.Linear)
    assert sys.path[-1] == str(own_folder)
    assert sys.path[0] != str(own_folder)
    with pytest.raises(
        HessianFlowError,
        match=r"neither .* nor Python's path has it: go to its folder, or add that to",
    ):
        models.create("own_other:net")
