"""`run.bits` may be a fraction (ternary weights: 1.58). SQLite's columns can hold one anyway."""

import sqlalchemy as sa
from alembic import op

from qbench.store.migrations.versions.v0001_foundation import RESULTS

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """From revision 0001."""
    if op.get_bind().dialect.name != "postgresql":
        return
    op.execute("DROP VIEW results")
    op.alter_column("run", "bits", type_=sa.Double(), existing_type=sa.Integer())
    op.execute(RESULTS)
