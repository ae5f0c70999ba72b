"""The schema's history: one file per change in `versions`, applied by Alembic from here, never from a shell.

A package so that it is installed with the rest. Importing it imports Alembic, which opening an up-to-date
database has no need of.
"""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection


def revisions() -> list[str]:
    """The revisions that this code knows, newest first."""
    return [script.revision for script in ScriptDirectory.from_config(_config()).walk_revisions()]


def upgrade(connection: Connection, revision: str) -> None:
    """Apply what is missing up to `revision`, in the transaction that `connection` is in."""
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    return config
