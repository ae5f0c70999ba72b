"""The Hydra side of the command line: where the configuration lies, what it accepts, and errors in one line."""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import hydra
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

import qbench
from hydra_plugins.qbench_launcher import SweepLauncher
from qbench.composition import composed, composed_evaluations, is_composition
from qbench.errors import SpecError
from qbench.help import HELP

#: Overrides of Hydra itself are passed on as they are.
HYDRA_KEYS = ("hydra", "hydra.", "hydra/")

#: How Hydra marks a file whose keys belong to the root.
GLOBAL_PACKAGE = "@package _global_"


def conf_dir() -> Path:
    """The folder of configuration files: $QBENCH_CONF, else the checkout's `conf/`, else the installed package's."""
    package = Path(qbench.__file__).resolve().parent
    candidates = [os.environ.get("QBENCH_CONF"), package.parent / "conf", package / "conf"]
    for candidate in candidates:
        if candidate and (Path(candidate) / "config.yaml").is_file():
            return Path(candidate).resolve()
    raise SpecError("QBENCH_CONF", os.environ.get("QBENCH_CONF"), "a folder with qbench's config.yaml")


def run_command(arguments: list[str]) -> int:
    """Compose and run what the arguments say; returns the exit code. Raises SpecError for anything unknown."""
    if any(argument in ("--help", "-h") for argument in arguments):
        print(HELP)
        return 0
    if not any(argument in ("--multirun", "-m") for argument in arguments):
        _refuse_sweep(arguments)
    _check_keys(arguments)
    logging.getLogger("hydra").setLevel(logging.WARNING)
    # Hydra looks for plugins in folders, where an editable installation has none.
    Plugins.instance().register(SweepLauncher)
    composed: list[DictConfig] = []

    @hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name="config")
    def single(config: DictConfig) -> None:
        composed.append(config)

    saved, sys.argv = sys.argv, ["qbench", *arguments]
    try:
        single()
    except (HydraException, OmegaConfBaseException) as error:
        raise _readable(error, arguments) from error
    except SystemExit as exit_:  # how the sweep launcher hands its exit code through Hydra
        return exit_.code if isinstance(exit_.code, int) else int(bool(exit_.code))
    finally:
        sys.argv = saved
    if not composed:
        return 0
    from qbench.sweep import run_sweep

    return run_sweep(composed)


#: What `qbench eval` can be told; everything else is the run's own.
_ABOUT_EVALUATION = ("eval", "model.path", "calib.path", "device", "resume_s", "results", "dry_run")


def compose_evaluation(arguments: list[str]) -> DictConfig:
    """The configuration for measuring finished runs, from `key=value` arguments. Raises SpecError for unknown keys and
    for those that a finished run has settled."""
    for text in arguments:
        key = text.partition("=")[0]
        if key not in _ABOUT_EVALUATION and not key.startswith("eval."):
            accepted = f"not a setting of evaluations; {', '.join(_ABOUT_EVALUATION)}; all else is as it was in the run"
            raise SpecError(key, text.partition("=")[2], accepted)
    return compose_one(arguments)


def compose_one(arguments: list[str]) -> DictConfig:
    """The configuration of one point. Raises SpecError for unknown keys and for sweeps."""
    _refuse_sweep(arguments)
    _check_keys(arguments)
    try:
        with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
            return hydra.compose("config", overrides=arguments)
    except (HydraException, OmegaConfBaseException) as error:
        raise _readable(error, arguments) from error


def _overrides(arguments: list[str]) -> list[str]:
    """The `key=value` arguments."""
    return [a for a in arguments if not a.startswith("-")]


def _check_keys(arguments: list[str]) -> None:
    """Refuse what Hydra would add or delete silently, unknown keys, and unknown choices of a group."""
    groups = {path.parent.name for path in conf_dir().glob("*/*.yaml")}
    chosen: dict[str, str] = {}
    overrides, typed = [], {}
    for text in _overrides(arguments):
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            raise SpecError("command line", text, f"not a key=value: {_first_line(error)}") from error
        if text.startswith(("+", "~")):
            raise SpecError("command line", text, "keys cannot be added or removed: give an existing key=value")
        if override.key_or_group.startswith(HYDRA_KEYS):
            continue
        overrides.append(override)
        typed[override.key_or_group] = text.partition("=")[2]
        if override.key_or_group in groups:
            values = [str(v) for v in override.sweep_iterator()] if override.is_sweep_override() else [override.value()]
            for value in values:
                options = sorted(path.stem for path in (conf_dir() / override.key_or_group).glob("*.yaml"))
                if is_composition(override.key_or_group, str(value)):
                    _register(override.key_or_group, str(value))
                elif str(value) not in options:
                    raise _unknown_choice(override.key_or_group, value, options)
            chosen.setdefault(override.key_or_group, str(values[0]))
    for override in overrides:
        key = override.key_or_group
        if key not in groups:
            choices = chosen | _other_choices(overrides, groups, key)
            known = _known_keys(choices)
            if key not in known:
                siblings = _siblings(key, known)
                group = key.partition(".")[0]
                if not siblings and group in groups:
                    name = choices.get(group, _defaults().get(group))
                    raise SpecError(key, typed[key], f"unknown key; {group}={name} has no options")
                close = difflib.get_close_matches(key, known, n=3, cutoff=0.75)
                accepted = ", ".join(siblings or [k for k in known if "." not in k])
                hint = f"did you mean {' or '.join(close)}? " if close else ""
                raise SpecError(key, typed[key], f"unknown key; {hint}accepted: {accepted}")


def _unknown_choice(group: str, value: object, options: list[str]) -> SpecError:
    if group == "algo" and isinstance(value, list):
        return SpecError(group, value, "one text such as awq+gptq; with -m several, algo=awq,gptq")
    if group == "algo":
        from qbench.stages.pipeline import stage_types

        if value in stage_types():
            return SpecError(group, value, f"is a single stage: put together, such as {value}+gptq")
    return SpecError(group, value, f"unknown; one of {', '.join(options)}")


def _siblings(key: str, known: list[str]) -> list[str]:
    """The keys nearest to an unknown one: beside it or, where there are none, beside what it would be in."""
    parent = key.rpartition(".")[0]
    while parent:
        beside = [k for k in known if k.startswith(f"{parent}.") and k.count(".") == parent.count(".") + 1]
        if beside:
            return beside
        parent = parent.rpartition(".")[0]
    return []


def _composed(group: str, name: str) -> dict:
    return composed(name, conf_dir() / group) if group == "algo" else composed_evaluations(name, conf_dir() / group)


def _register(group: str, name: str) -> None:
    """Let Hydra find a composed algorithm, or several evaluations, as if a file described it."""
    ConfigStore.instance().store(group=group, name=name, node=_composed(group, name))


def _other_choices(overrides: list, groups: set[str], key: str) -> dict[str, str]:
    """In a sweep over a group's choices, a key must exist in each of them: check against the first that lacks it."""
    group = key.partition(".")[0]
    for override in overrides:
        if override.key_or_group == group and group in groups and override.is_sweep_override():
            for value in override.sweep_iterator():
                if key not in _known_keys({group: str(value)}):
                    return {group: str(value)}
    return {}


def _defaults() -> Mapping[str, str]:
    """The choice of every group where the command line makes none."""
    return _root(conf_dir())[1]


def _known_keys(chosen: Mapping[str, str]) -> list[str]:
    """Every settable key of the configuration with these group choices."""
    keys, defaults = _root(conf_dir())
    keys = list(keys)
    for group, default in defaults.items():
        if not group.startswith("override"):
            keys += _keys_of(conf_dir() / group, chosen.get(group, default))
    # What a choice is called and consists of is fixed by its file.
    fixed = (".name", ".asset", ".evaluator")
    return [key for key in keys if not key.startswith("algo.pipeline") and not key.endswith(fixed)]


@cache  # a table checks the keys of a hundred points, and files stay as they are
def _root(folder: Path) -> tuple[tuple[str, ...], Mapping[str, str]]:
    """The keys outside of groups, and the default choice of every group."""
    root = OmegaConf.load(folder / "config.yaml")
    entries = root.pop("defaults")
    root.pop("hydra")
    defaults = {group: name for entry in entries if isinstance(entry, DictConfig) for group, name in entry.items()}
    return tuple(_flatten(root, "")), defaults


@cache
def _keys_of(folder: Path, name: str) -> tuple[str, ...]:
    """The settable keys that a choice of the group `folder.name` brings."""
    group, path = folder.name, folder / f"{name}.yaml"
    if is_composition(group, name):
        return tuple(_flatten(OmegaConf.create(_composed(group, name)), f"{group}."))
    if GLOBAL_PACKAGE in path.read_text():
        return ()  # it sets keys of the root, which are known already
    return tuple(_flatten(OmegaConf.load(path), f"{group}."))


def _flatten(node: DictConfig, prefix: str) -> list[str]:
    keys = []
    for name in node:
        keys.append(f"{prefix}{name}")
        if not OmegaConf.is_missing(node, name) and OmegaConf.is_dict(node._get_node(name)):
            keys += _flatten(node[name], f"{prefix}{name}.")
    return keys


def _refuse_sweep(arguments: list[str]) -> None:
    """`algo=awq,gptq` without -m is a sweep that forgot to say so."""
    for text in _overrides(arguments):
        if re.fullmatch(r"[\w./]+=[^\[\]{}()'\"]*,[^\[\]{}()'\"]*", text):
            key, _, value = text.partition("=")
            raise SpecError(key, value, "several values are a sweep: add -m (a list is written [a,b])")


def _readable(error: Exception, arguments: list[str]) -> SpecError:
    """One line for what Hydra says in several."""
    text = " ".join(str(error).split())
    return SpecError("command line", " ".join(_overrides(arguments)), text)


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
