"""`anchor`: published numbers, to hold runs against.

`metric.environment_id`: a measurement may be added to a run later, on another machine or by other code. `metric.whole`:
whether all items were measured.
"""

import sqlalchemy as sa
from alembic import op

from qbench.store.migrations.versions.v0001_foundation import RESULTS

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """From revision 0004: a new table, and columns that rows from before leave empty."""
    op.add_column("metric", sa.Column("whole", sa.Boolean()))
    op.add_column("metric", sa.Column("environment_id", sa.Integer()))
    op.execute("DROP VIEW results")
    place = "coalesce(metric.environment_id, run.environment_id) AS environment_id"
    op.execute(RESULTS.replace("run.environment_id", place))
    op.create_table(
        "anchor",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("protocol", sa.Text(), nullable=False),
        sa.Column("metric", sa.Text(), nullable=False),
        sa.Column("n", sa.Integer()),
        sa.Column("value", sa.Double(), nullable=False),
        sa.Column("tolerance", sa.Double(), nullable=False),
        sa.Column("algo", sa.Text(), nullable=False),
        sa.Column("weight_format", sa.Text(), nullable=False),
        sa.Column("act_format", sa.Text()),
        sa.Column("calib", sa.Text()),
        sa.Column("calib_n", sa.Integer()),
        sa.Column("calib_length", sa.Integer()),
        sa.Column("stages", sa.JSON(none_as_null=True)),
        sa.Column("reading", sa.Text()),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_anchor")),
    )
    op.create_index(op.f("ix_anchor_source"), "anchor", ["source"])
