"""Networks from elsewhere: import paths, timm, torchvision (stand-ins: neither is needed to test the calls)."""

import sys
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

    timm, torchvision, tv_models = (ModuleType(name) for name in ("timm", "torchvision", "torchvision.models"))
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
    with pytest.raises(HessianFlowError, match="importing 'no_such_module' failed: ModuleNotFoundError"):
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
    with pytest.raises(HessianFlowError, match=r"importing 'timm' failed: ModuleNotFoundError.*; pip install timm$"):
        models.create("timm/resnet26")


def test_a_name_unknown_to_the_library_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, **options: Any) -> nn.Module:
        raise RuntimeError(f"Unknown model ({name})")

    timm = ModuleType("timm")
    timm.create_model = refuse  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)
    with pytest.raises(HessianFlowError, match=r"timm cannot build 'resnet0': RuntimeError: Unknown model \(resnet0\)"):
        models.create("timm/resnet0")


def test_a_function_that_needs_more_is_refused():
    with pytest.raises(HessianFlowError, match=r"cannot be called with num_classes.*required argument: 'a'"):
        models.create("os.path:join")
