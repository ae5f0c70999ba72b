"""`sample.clusters`: which items belong together (windows of one document), for clustered standard errors.

`metric.higher_is_better`: the direction of a metric, as its evaluator knows it.
"""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """From revision 0002. Plain additions: neither table is copied, and the view `results` stays as it is."""
    op.add_column("sample", sa.Column("clusters", sa.LargeBinary()))
    op.add_column("metric", sa.Column("higher_is_better", sa.Boolean()))
