"""Configuration files: YAML and `--set` to settings and back, and each mistake in them as a line with its fix."""

import difflib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from bertlite.config.finetune_settings import FinetuneConfig, SweepConfig
from bertlite.config.settings import PretrainConfig, Section
from bertlite.core.errors import UserError


class _Loader(yaml.SafeLoader):
    """YAML as people write it: `1e-4` is a number, and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key.value, str)):
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Writes what _Loader reads: a text that looks like `1e-4` gets quotes."""


for _kind in (_Loader, _Dumper):
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )

# What PyYAML raises for text that is no YAML, or whose tags do not fit their values.
_BAD_YAML = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError)

Config = TypeVar("Config", bound=Section)
# What reads which configuration.
_COMMANDS: dict[str, type[Section]] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "sweep": SweepConfig}


def load_config(kind: type[Config], path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read the YAML file at `path`, apply `section.key=value` overrides, and check everything.

    Raises UserError, naming the file or the override, the key, its value and the fix.
    """
    values = _read_yaml(path)
    for command, other in _COMMANDS.items():
        strange = values.keys() - kind.model_fields.keys()
        if strange and values.keys() <= other.model_fields.keys():
            raise UserError(f"{path}: its section {min(strange)} is none of this command; bertlite {command} reads it")
    changed: dict[str, str] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not all(name.strip().split(".")):
            raise UserError(f"--set {override}: write it as section.key=value, such as train.max_steps=100")
        try:
            _assign(values, name.strip().split("."), yaml.load(text, _Loader))
        except _BAD_YAML:
            raise UserError(f"--set {override}: the value is not valid YAML") from None
        changed[name.strip()] = f"--set {override}"
    return _validated(kind, values, path, changed)


def with_changes(config: Config, changes: dict[str, Any], source: str) -> Config:
    """The same configuration with other values at some dotted names. Raises UserError, naming `source`, as loading."""
    values = config.model_dump()
    for name, value in changes.items():
        _assign(values, name.split("."), value)
    return _validated(type(config), values, source, {})


def _validated(kind: type[Config], values: dict[str, Any], source: Path | str, changed: dict[str, str]) -> Config:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        lines = [_explain(kind, item, source, changed) for item in error.errors()[:5]]
        raise UserError("\n".join(lines)) from None


def dump_config(config: Section) -> str:
    """The resolved configuration as YAML; `load_config` reads it back to an equal object."""
    return str(yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def diff_configs(old: Section, new: Section) -> dict[str, tuple[Any, Any]]:
    """The settings in which two configurations of one kind differ: dotted name → (old value, new value)."""
    before, after = dict(_flatten(old.model_dump())), dict(_flatten(new.model_dump()))
    names = dict.fromkeys([*after, *before])
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}


def choose(table: dict[str, Any], name: str, setting: str) -> Any:
    """`table[name]`, or a UserError that names the setting and the choices."""
    if name not in table:
        raise UserError(f"{setting} is {name!r}, which is not one of {', '.join(table)}{_did_you_mean(name, table)}")
    return table[name]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a UTF-8 text file") from None
    except ValueError as error:  # a name that no file can have
        raise UserError(f"{path}: cannot be read: {error}") from None
    try:
        values = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f" line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}:{where} is not valid YAML: {error.problem}") from None
    except _BAD_YAML as error:
        raise UserError(f"{path}: not valid YAML: {(str(error) or type(error).__name__).splitlines()[0]}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: should hold sections such as data: and train:, but holds a {type(values).__name__}")
    return values


def _assign(values: dict[str, Any], names: list[str], value: Any) -> None:
    for name in names[:-1]:
        inner = values.get(name)
        if not isinstance(inner, dict):
            inner = values[name] = {}
        values = inner
    values[names[-1]] = value


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _setting_names(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in kind.model_fields.items():
        yield f"{prefix}{name}"
        inner = [field.annotation, *get_args(field.annotation)]
        for part in inner:
            if isinstance(part, type) and issubclass(part, BaseModel):
                yield from _setting_names(part, f"{prefix}{name}.")


def _did_you_mean(name: str, choices: Any) -> str:
    """A hint at the choice that `name` was probably meant for, or nothing."""
    by_last = {choice.rsplit(".", 1)[-1]: choice for choice in choices}
    close = difflib.get_close_matches(name, list(choices), 1, 0.75)
    if not close:
        close = [by_last[part] for part in difflib.get_close_matches(name.rsplit(".", 1)[-1], list(by_last), 1)]
    return f". Did you mean {close[0]}?" if close else ""


# Names that pydantic gives to the branches of a choice between types, no keys of the YAML; ours begin with a <.
_BRANCHES = ("bool", "literal['auto']", "int", "float")


def _shown(value: Any) -> str:
    try:
        text = repr(value)
    except ValueError:  # Python prints no integers of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


def _explain(kind: type[BaseModel], item: Any, path: Path | str, changed: dict[str, str]) -> str:
    """One pydantic error as a line: where it was written, the key, the value and the fix."""
    keys = [str(part) for part in item["loc"] if not (part in _BRANCHES or str(part).startswith("<"))]
    while len(keys) > 1 and keys[-1].isdigit():
        keys.pop()
    name = ".".join(keys)
    source = next(
        (
            given
            for key, given in changed.items()
            if f"{name}.".startswith(f"{key}.") or f"{key}.".startswith(f"{name}.")
        ),
        None,
    )
    value = _shown(item["input"])
    if item["type"] == "extra_forbidden":
        text = f"{name} is not a setting{_did_you_mean(name, list(_setting_names(kind)))}"
    elif item["type"] == "missing":
        text = f"{name} is missing"
    elif item["type"] == "value_error":  # one of the settings' own validators, which name their keys
        text = ".".join([*keys, str(item["ctx"]["error"])])
        source = source or next((given for key, given in changed.items() if key.rsplit(".", 1)[-1] in text), None)
    elif item["type"] == "model_type":
        text = f"{name} is {value}, but should be a section with keys of its own"
    else:
        reason = item["msg"][0].lower() + item["msg"][1:]
        text = f"{name} is {value}: {reason.replace('input should', 'it should')}"
    return f"{source or path}: {text}"
