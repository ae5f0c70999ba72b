"""What an installation has: pyproject.toml names every folder of the tree that the program needs."""

import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_every_folder_with_code_or_configuration_is_a_package():
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    named = {folder: package for package, folder in setup["package-dir"].items()}
    expected = set()
    for top in ("qbench", "analysis", "hydra_plugins", *named):
        for path in (ROOT / top).rglob("*"):
            if path.suffix in (".py", ".yaml") and path.parent.name not in ("data", "assets"):
                folder = path.parent.relative_to(ROOT)
                base = next((each for each in named if folder.is_relative_to(each)), None)
                inside = folder.relative_to(base).parts if base else folder.parts
                expected.add(".".join([named[base], *inside] if base else inside))
    assert expected <= set(setup["packages"])
