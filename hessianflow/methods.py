"""The methods by name, of every kind.

A new method is one file, and one line of the table of its package: CONTROLLERS in
hessianflow/control/__init__.py, ADVERSARIES, OPTIMIZERS and SCHEDULES likewise.

The options of a method are the parameters of its constructor that the run does not supply, with
its docstring as their help. A class may have any of these members to adapt the run to itself:

    prefers: ClassVar[Mapping[str, str]]        default settings of a run with this method:
                                                "schedule", "norm_mode", "adversary"
    follows_rule: bool                          whether the rate follows the batch by a rule, which
                                                another rule may replace (of a controller)
    reads_hessian: bool                         whether it decides by the Hessian's eigenvalue of
                                                the largest magnitude, whatever the optimizer (of a
                                                controller)
    defaults(run, options) -> Mapping           class method: defaults that depend on the run
    refuses(run, options) -> str                class method: the reason why it cannot train this
                                                run, or ""
    groups_of(model) -> list                    static method: the parameter groups that it gets of
                                                a model, in place of a list of all that is trained
                                                (of an optimizer)

Here `run` is a :class:`~hessianflow.facts.RunFacts`, and `options` are those that the user gave.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hessianflow.adversarial import ADVERSARIES, ATTACKS, RUNNERS
from hessianflow.control import CONTROLLERS
from hessianflow.facts import RunFacts
from hessianflow.interfaces import HessianFlowError
from hessianflow.optim import OPTIMIZERS, SCHEDULES
from hessianflow.options import Option, options_of, parameters_of, required_of
from hessianflow.user_code import attribute


@dataclass(frozen=True)
class Kind:
    """A kind of method, such as the controllers.

    Attributes:
        name: Name of the kind, which is also the option that chooses one of them.
        methods: Class of each method by name.
        supplied: Parameters of constructors that the run supplies; the others are options.
        defaults: Defaults, by method, that replace those of classes from other packages.
    """

    name: str
    methods: Mapping[str, type]
    supplied: frozenset[str] = frozenset()
    defaults: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


_SIZES = frozenset({"batch_size", "max_batch_size"})
_ATTACKED = frozenset({"value_range", "seed", "loss_fn"})
KINDS: Mapping[str, Kind] = {
    kind.name: kind
    for kind in (
        Kind("controller", CONTROLLERS, _SIZES | {"lr_rule", "max_lr_factor"}),
        Kind("adversary", ADVERSARIES, _ATTACKED | {"batches"}, {"conadv": {"attack": "fgsm"}}),
        # The share is that of the adversary whose twins the attack makes.
        Kind("attack", ATTACKS, _ATTACKED | {"share"}),
        Kind("runner", RUNNERS),
        Kind(
            "optimizer",
            OPTIMIZERS,
            frozenset({"params", "lr", "model", "norms"}),
            {
                "sgd": {"momentum": 0.9},
                "adamw": {"weight_decay": 0.0},
                "sam": {"base": "sgd"},
                "extrapolation": {"base": "sgd"},
            },
        ),
        Kind("schedule", SCHEDULES, frozenset({"epochs", "optimizer", "last_epoch"})),
    )
}
"""Every kind of method, by the name of its option."""


@dataclass(frozen=True)
class Choice:
    """A method and its options.

    Attributes:
        name: Name of the method, or the import path `package.module:Class` of the user's own.
        options: Options by name; those that are missing are open until the run is resolved.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the choice as plain values, the form that config.json and settings.yaml hold."""
        return {"name": self.name, **{name: plain(value) for name, value in self.options.items()}}

    def with_options(self, **options: Any) -> "Choice":
        """Return the same method with these options added, or in place of its own."""
        return Choice(self.name, {**self.options, **options})


def plain(value: Any) -> Any:
    """Return a setting, or an option of a method, in the form that JSON has."""
    if isinstance(value, Choice):
        return value.to_dict()
    if isinstance(value, tuple):
        return [plain(part) for part in value]
    return value


def choice(kind: Kind, given: Any, where: str) -> Choice:
    """Return a method and its options as a Choice whose options have the right types.

    It is given as "NAME", as {"name": "NAME", "option": value, ...}, or as a Choice. Here and
    below, `where` is the setting that chooses the method, for errors.

    Raises:
        HessianFlowError: The method is unknown, it does not have an option, or a value has the
            wrong type.
    """
    if isinstance(given, str):
        given = Choice(given)
    elif isinstance(given, Mapping):
        options = {key.replace("-", "_"): value for key, value in given.items() if key != "name"}
        if not isinstance(given.get("name"), str):
            first = next(iter(kind.methods))
            raise HessianFlowError(f"--{where} needs a name, as in {{name: {first}}}")
        given = Choice(given["name"], options)
    if not isinstance(given, Choice):
        raise HessianFlowError(
            f"--{where} must be one of {', '.join(kind.methods)}, or package.module:Class, got"
            f" {given!r}"
        )
    known = method_options(kind, given.name, where)
    checked = {}
    for name, value in given.options.items():
        if name not in known:
            raise HessianFlowError(unknown_option(kind, given.name, name, where))
        option = known[name]
        spelled = f"{where}.{name.replace('_', '-')}"
        if option.kind and value is not None:
            checked[name] = choice(KINDS[option.kind], value, spelled)
        else:
            checked[name] = option.checked(value, f"--{spelled}")
    return Choice(given.name, checked)


def find(kind: Kind, name: str, where: str) -> Any:
    """Return the class of a method by its name in the table, or at an import path.

    Raises:
        HessianFlowError: The name is unknown (the error proposes the nearest one), or there is no
            class at the import path.
    """
    if name in kind.methods:
        return kind.methods[name]
    if ":" not in name:
        near = difflib.get_close_matches(name.lower(), kind.methods, n=1)
        hint = "".join(f" (did you mean {other}?)" for other in near)
        raise HessianFlowError(
            f"--{where}: unknown {kind.name} {name!r}{hint}; there are {', '.join(kind.methods)},"
            " and package.module:Class for your own"
        )
    return attribute(name, f"--{where} {name}")


def method_options(kind: Kind, name: str, where: str | None = None) -> dict[str, Option]:
    """Return the options of a method by name, in the order of its constructor."""
    return options_of(find(kind, name, where or kind.name), kind.supplied)


def unknown_option(kind: Kind, name: str, option: str, where: str) -> str:
    """Return an error text for an option that a method does not have, with the way out.

    It names the methods that have such an option, or else the nearest option of this method.
    """
    spelled = f"--{where}.{option.replace('_', '-')}"
    holders = [other for other in kind.methods if option in method_options(kind, other)]
    if holders:
        return (
            f"{spelled} is an option of {' and '.join(holders)}, not of {name}: leave it out, or"
            f" use --{where} {holders[0]}"
        )
    known = list(method_options(kind, name, where))
    near = difflib.get_close_matches(option, known, n=1)
    hint = "".join(f" (did you mean --{where}.{other.replace('_', '-')}?)" for other in near)
    listed = ", ".join(other.replace("_", "-") for other in known)
    return f"unknown option {spelled}{hint}; {name} has {listed or 'no options'}"


def complete(
    kind: Kind, chosen: Choice, run: RunFacts, usual: Mapping[str, Mapping[str, Any]], where: str
) -> Choice:
    """Return a method with a value for each of its options.

    A value of the user comes first, then the default that the method derives from the run, then
    that of the data set (`usual`, by method), then that of the class.

    Raises:
        HessianFlowError: An option without a default is missing, or the method refuses the run.
    """
    method = find(kind, chosen.name, where)
    known = method_options(kind, chosen.name, where)
    _check_supply(kind, chosen.name, where, known)
    values = {name: option.default for name, option in known.items() if not option.is_required}
    values |= kind.defaults.get(chosen.name, {})
    values |= usual.get(chosen.name, {})
    values |= _said(method, "defaults", run, chosen.options) or {}
    values |= chosen.options
    for name, option in known.items():
        spelled = f"{where}.{name.replace('_', '-')}"
        if name not in values:
            raise HessianFlowError(f"--{where} {chosen.name} needs --{spelled}: {option.help}")
        if option.kind and values[name] is not None:
            inner = KINDS[option.kind]
            values[name] = complete(
                inner, choice(inner, values[name], spelled), run, usual, spelled
            )
        elif not option.kind:
            values[name] = option.checked(values[name], f"--{spelled}")
    if reason := _said(method, "refuses", run, values):
        raise HessianFlowError(f"--{where} {chosen.name}: {reason}")
    return Choice(chosen.name, {name: values[name] for name in known})


def _check_supply(kind: Kind, name: str, where: str, known: Mapping[str, Option]) -> None:
    """Refuse a constructor with a parameter that neither the run nor an option can fill."""
    given = known.keys() | kind.supplied
    lacking = [needed for needed in required_of(find(kind, name, where)) if needed not in given]
    if lacking:
        raise HessianFlowError(
            f"--{where} {name} needs {' and '.join(lacking)}, which no option can hold: write a"
            f" function that makes it from what it names of {', '.join(sorted(kind.supplied))}, and"
            f" give --{where} module:function"
        )


def _said(method: Any, question: str, run: RunFacts, options: Mapping[str, Any]) -> Any:
    """Return the answer of a method to a question about a run; None if it has none.

    Methods of other packages know nothing of these questions.
    """
    answer = getattr(method, question, None)
    if answer is None:
        return None
    return answer(run, options)


def prefers(kind: Kind, chosen: Choice) -> Mapping[str, str]:
    """Return the default settings of a run with this method."""
    preferred: Mapping[str, str] = getattr(find(kind, chosen.name, kind.name), "prefers", {})
    return preferred


def make(kind: Kind, chosen: Choice, where: str | None = None, **supplied: Any) -> Any:
    """Return a new object of a method that has a value for each of its options.

    The run supplies arguments, of which those that the constructor does not take are left out.

    Raises:
        HessianFlowError: The constructor refuses an option.
    """
    where = where or kind.name
    method = find(kind, chosen.name, where)
    known = method_options(kind, chosen.name, where)
    taken = parameters_of(method)
    arguments = {name: value for name, value in supplied.items() if name in taken}
    for name, value in chosen.options.items():
        if isinstance(value, Choice):
            inner = KINDS[known[name].kind]
            value = make(inner, value, f"{where}.{name.replace('_', '-')}", **supplied)
        arguments[name] = value
    try:
        return method(**arguments)
    except HessianFlowError as error:
        raise HessianFlowError(f"--{where} {chosen.name}: {error}") from None
    except Exception as error:  # constructors of other packages may raise anything
        if method.__module__.startswith("hessianflow."):  # a defect of ours needs its traceback
            raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise HessianFlowError(f"--{where} {chosen.name}: {reason}") from error
