"""`failure`: measurements of finished runs that did not succeed. `noise`: how far equal settings differ by chance.

`run.family`: names runs that differ in their seeds alone.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """From revision 0003: two new tables and a column, which rows from before leave empty."""
    op.add_column("run", sa.Column("family", sa.String(64)))
    op.create_table(
        "failure",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("evaluator", sa.Text(), nullable=False),
        sa.Column("protocol", sa.Text(), nullable=False),
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("spec_key", sa.String(64), nullable=False),
        sa.Column("error_type", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("trace", sa.Text(), nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_failure")),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_failure_run_id"), ondelete="CASCADE"),
    )
    op.create_index(op.f("ix_failure_run_id"), "failure", ["run_id"])
    op.create_table(
        "noise",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("family", sa.String(64), nullable=False),
        sa.Column("spec_key", sa.String(64), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("component", sa.Text(), nullable=False),
        sa.Column("sd", sa.Double(), nullable=False),
        sa.Column("n", sa.Integer(), nullable=False),
        sa.Column("unit", sa.Text(), nullable=False),
        sa.Column("settings", sa.JSON(), nullable=False),
        sa.Column("values", sa.JSON(), nullable=False),
        sa.Column("environment_id", sa.Integer(), nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_noise")),
        sa.ForeignKeyConstraint(["environment_id"], ["environment.id"], name=op.f("fk_noise_environment_id")),
    )
    op.create_index(op.f("ix_noise_family"), "noise", ["family"])
