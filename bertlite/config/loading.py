"""Read settings from YAML files, `--set` and task.json, write them as YAML, and explain each mistake in one line."""

import difflib
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from bertlite.config.fields import Section
from bertlite.config.finetune_settings import FinetuneConfig, SavedTask, SweepConfig
from bertlite.config.settings import PretrainConfig
from bertlite.core.errors import UserError, first_line
from bertlite.core.logging import logger

MAX_BYTES = 1 << 20  # of a configuration
MAX_NODES = 100_000  # values of a configuration, with those that aliases repeat


class _Loader(yaml.SafeLoader):
    """A YAML loader that reads `1e-4` as a number, and rejects duplicate keys and aliases that repeat too much."""

    def get_single_node(self) -> Any:
        node: Any = super().get_single_node()
        if _count_nodes(node, {}) > MAX_NODES:
            problem = f"its aliases make more than {MAX_NODES:,} values"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key in (key for key, _ in node.value if isinstance(key.value, str)):
            if key.value in seen and key.tag != "tag:yaml.org,2002:merge":
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _count_nodes(node: Any, counts: dict[int, float]) -> float:
    """Count a node and those in it, each time that an alias repeats them; infinite for a node that contains itself."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in counts:
        counts[id(node)] = math.inf
        children = chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
        counts[id(node)] = 1 + sum(_count_nodes(child, counts) for child in children)
    return counts[id(node)]


class _Dumper(yaml.SafeDumper):
    """A YAML dumper for _Loader: it quotes strings that look like `1e-4`."""


for _yaml_class in (_Loader, _Dumper):
    _yaml_class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)[eE][-+]?[0-9]+$"),
        list("-+.0123456789"),
    )

# What PyYAML raises for text that is not YAML, or with tags that do not fit their values.
_YAML_ERRORS = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, RecursionError)

Config = TypeVar("Config", bound=Section)
_CONFIG_OF: dict[str, type[Section]] = {
    "pretrain": PretrainConfig,
    "finetune": FinetuneConfig,
    "sweep": SweepConfig,
    **dict.fromkeys(("prepare", "plan", "batch", "bench"), PretrainConfig),
}


def load_config(config_type: type[Config], path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read the YAML file at `path`, apply overrides such as `train.max_steps=100`, and validate all settings.

    Raises UserError, naming the file or the override, the key, its value and the fix.
    """
    values = _read_yaml(path)
    unknown = values.keys() - config_type.model_fields.keys()
    for command, other_type in _CONFIG_OF.items():
        if unknown and values.keys() <= other_type.model_fields.keys():
            problem = f"this command does not read the section {min(unknown)}"
            raise UserError(f"{path}: {problem}; bertlite {command} reads this file")
    _rename_position_init(values, path)
    override_of: dict[str, str] = {}
    for override in overrides:
        name, value = _parse_override(override)
        _assign(values, name, value)
        override_of[name] = f"--set {override}"
    if path.name == "config.yaml":  # perhaps of a run
        _add_former_default(values)
    return _validate(config_type, values, path, override_of)


def _rename_position_init(values: dict[str, Any], path: Path) -> None:
    """Read model.position_init, the name of version 0.1, as model.initialization."""
    model = values.get("model")
    if isinstance(model, dict) and "position_init" in model and "initialization" not in model:
        model["initialization"] = model.pop("position_init")
        logger.info(f"{path}: model.position_init is read as model.initialization, its name since version 0.2")


def _add_former_default(values: dict[str, Any]) -> None:
    """Let the config.yaml of a run whose version had no strip_accents mean what it meant: as lowercase.

    Such a file has all other settings of the tokenizer.
    """
    tokenizer = values.get("tokenizer")
    if isinstance(tokenizer, dict) and {"lowercase", "extend", "train_characters", "path"} <= tokenizer.keys():
        tokenizer.setdefault("strip_accents", tokenizer["lowercase"])


def with_changes(config: Config, changes: dict[str, Any], source: str) -> Config:
    """Return a copy of `config` with other values, by dotted name. Raises UserError, naming `source`."""
    values = config.model_dump()
    for name, value in changes.items():
        _assign(values, name, value)
    return _validate(type(config), values, source, {})


def read_saved_task(folder: Path) -> SavedTask | None:
    """Read task.json of a model folder, None without one. Raises UserError, naming file and key, if it is not valid."""
    path = folder / "task.json"
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{path}: not valid JSON") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: should hold the settings of a task, but holds a {type(values).__name__}")
    return _validate(SavedTask, values, path, {})


def dump_config(config: Section) -> str:
    """Return all settings as YAML, which `load_config` reads into an equal object."""
    return str(yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False, allow_unicode=True))


def diff_configs(old: Section, new: Section) -> dict[str, tuple[Any, Any]]:
    """Return the settings that differ, of one type: dotted name → (old value, new value)."""
    before, after = dict(_flatten(old.model_dump())), dict(_flatten(new.model_dump()))
    names = dict.fromkeys([*after, *before])
    return {name: (before.get(name), after.get(name)) for name in names if before.get(name) != after.get(name)}


def load_run_config(path: Path) -> Section | None:
    """Load the configuration of a pretraining or a fine-tuning; None for a file that is neither."""
    for config_class in (PretrainConfig, FinetuneConfig):
        try:
            return load_config(config_class, path)
        except UserError:
            continue
    return None


def find_settings(command: str = "", *arguments: str) -> Iterator[str]:
    """Explain how to write what was given as an option but is a setting of the command's configuration.

    Example: `pretrain mini.yaml --max_steps 9` gives "--max_steps is a setting: write --set train.max_steps=9".
    """
    if command not in _CONFIG_OF:
        return
    names = list(_setting_names(_CONFIG_OF[command]))
    sections = {name.rpartition(".")[0] for name in names}
    for argument, following in zip(arguments, [*arguments[1:], "-"], strict=True):
        option, equals, value = argument.partition("=")
        ending = f".{option[2:].replace('-', '_')}"
        matches = [name for name in names if f".{name}".endswith(ending) and name not in sections]
        if option.startswith("--") and matches:
            value = value if equals else "VALUE" if following.startswith("-") else following
            yield f"{option} is a setting: write --set {matches[0]}={value}"


def choose(table: dict[str, Any], name: str, setting: str) -> Any:
    """Return `table[name]`. Raises UserError, naming the setting and the choices, for an unknown name."""
    if name not in table:
        raise UserError(f"{setting} is {name!r}, which is not one of {', '.join(table)}{_did_you_mean(name, table)}")
    return table[name]


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such configuration file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a UTF-8 text file") from None
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from None
    if len(content) > MAX_BYTES:
        raise UserError(f"{path}: larger than {MAX_BYTES:,} bytes, so not a configuration")
    try:
        values = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f" line {mark.line + 1}" if mark else ""
        advice = "; what follows # is a comment, unless it is quoted" if re.search(r"[:\[{,]\s+#|[\[{]#", text) else ""
        raise UserError(f"{path}:{line} is not valid YAML: {error.problem}{advice}") from None
    except _YAML_ERRORS as error:
        raise UserError(f"{path}: not valid YAML: {first_line(error)}") from None
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: should hold sections such as data: and train:, but holds a {type(values).__name__}")
    return values


def _parse_override(override: str) -> tuple[str, Any]:
    """Split `section.key=value` into the dotted name and the value, which is YAML, or a single sign."""
    name, equals, text = override.partition("=")
    name = name.strip()
    if not equals or not all(name.split(".")):
        raise UserError(f"--set {override}: write it as section.key=value, such as train.max_steps=100")
    is_sign = len(text) == 1 and not text.isalnum() and text != "~"  # such as a delimiter; YAML reads | as no text
    if is_sign or (text and text.isspace()):
        return name, text
    try:
        return name, yaml.load(text, _Loader)
    except _YAML_ERRORS:
        raise UserError(f"--set {override}: the value is not valid YAML") from None


def _assign(values: dict[str, Any], name: str, value: Any) -> None:
    """Set the value at a dotted name; create missing sections."""
    *sections, key = name.split(".")
    for section in sections:
        if not isinstance(values.get(section), dict):
            values[section] = {}
        values = values[section]
    values[key] = value


def _flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _validate(
    config_type: type[Config], values: dict[str, Any], source: Path | str, override_of: dict[str, str]
) -> Config:
    try:
        return config_type.model_validate(values)
    except ValidationError as error:
        lines = [_explain(config_type, item, source, override_of) for item in error.errors()[:5]]
        raise UserError("\n".join(lines)) from None


def _explain(config_type: type[Section], error: Any, source: Path | str, override_of: dict[str, str]) -> str:
    """Describe an error of pydantic in one line: the file or override, the key, the value and the fix."""
    name = _name_of(error["loc"])
    override = next((flag for key, flag in override_of.items() if _overlap(key, name)), None)
    value = shorten(error["input"])
    if error["type"] == "extra_forbidden":
        text = f"{name} is not a setting{_did_you_mean(name, _setting_names(config_type))}"
    elif error["type"] == "missing":
        text = f"{name} is missing"
    elif error["type"] == "value_error":  # raised by a validator of the settings; its message begins with a key
        text = ".".join(filter(None, [name, str(error["ctx"]["error"])]))
        mentioned = (flag for key, flag in override_of.items() if key.rsplit(".", 1)[-1] in text)
        override = override or next(mentioned, None)
    elif error["type"] == "model_type":
        text = f"{name} is {value}, but should be a section with keys of its own"
    else:
        reason = error["msg"][0].lower() + error["msg"][1:]
        text = f"{name} is {value}: {reason.replace('input should', 'it should')}"
    one_line = "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)
    return f"{override or source}: {one_line}"


def _name_of(location: tuple[str | int, ...]) -> str:
    """Return the dotted name of a setting from pydantic's location, without alternatives of types and list indices.

    ("masking", "rate", "<schedule>", "start") is masking.rate.start, and ("train", "seeds", 0) is train.seeds.
    """
    alternatives = ("bool", "literal['auto']", "int", "float")
    keys = [str(key) for key in location if not (key in alternatives or str(key).startswith("<"))]
    while len(keys) > 1 and keys[-1].isdigit():
        keys.pop()
    return ".".join(keys)


def _overlap(first: str, second: str) -> bool:
    """Return whether two dotted names are equal or one is within the other, as train.seed is within train."""
    return f"{first}.".startswith(f"{second}.") or f"{second}.".startswith(f"{first}.")


def shorten(value: Any) -> str:
    """Return a value of YAML for a message, in at most 60 characters."""
    try:
        text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    except ValueError:  # Python does not print integers of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= 60 else text[:57] + "..."


def _setting_names(section: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in section.model_fields.items():
        yield f"{prefix}{name}"
        for annotation in (field.annotation, *get_args(field.annotation)):
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                yield from _setting_names(annotation, f"{prefix}{name}.")


def _did_you_mean(name: str, choices: Iterable[str]) -> str:
    """Suggest the choice that is similar to `name`, or has a similar last part; "" if there is none."""
    choices = list(choices)
    by_last_part = {choice.rsplit(".", 1)[-1]: choice for choice in reversed(choices)}  # task.text before tasks.text
    similar = difflib.get_close_matches(name, choices, 1, 0.75)
    if not similar:
        last_parts = difflib.get_close_matches(name.rsplit(".", 1)[-1], list(by_last_part), 1)
        similar = [by_last_part[last_part] for last_part in last_parts]
    return f". Did you mean {similar[0]}?" if similar else ""
