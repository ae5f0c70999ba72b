"""Runs with their metrics, samples, layer metrics, artifacts and environments, and the view `results`."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# One row per metric of every run that counts, columns in the order a person wants to see them.
RESULTS = """
CREATE VIEW results AS
SELECT run.id AS run_id, run.model, run.algo, run.bits, run.group_size, run.symmetric,
       metric.task, metric.name AS metric, metric.value, metric.stderr, metric.n, metric.unit,
       metric.protocol, metric.evaluator,
       run.bits_per_weight, run.bits_per_weight_model, run.model_bytes, run.sparsity,
       run.weight_format, run.act_format, run.kv_format, run.act_bits, run.kv_bits,
       run.calib, run.calib_n, run.calib_length, run.calib_seed,
       run.quantize_s, run.evaluate_s, run.load_s, run.total_s,
       run.peak_host_bytes, run.peak_device_bytes,
       run.device, run.dtype, run.source, run.created, run.finished, run.environment_id,
       run.key, metric.spec_key
FROM run JOIN metric ON metric.run_id = run.id
WHERE run.status = 'done' AND run.superseded_by IS NULL
"""


def upgrade() -> None:
    """From an empty database."""
    op.create_table(
        "environment",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("git_commit", sa.String(64)),
        sa.Column("git_dirty", sa.Boolean()),
        sa.Column("versions", sa.JSON(), nullable=False),
        sa.Column("platform", sa.Text(), nullable=False),
        sa.Column("cpu", sa.Text(), nullable=False),
        sa.Column("threads", sa.Integer(), nullable=False),
        sa.Column("gpu", sa.Text()),
        sa.Column("driver", sa.Text()),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_environment")),
        sa.UniqueConstraint("hash", name=op.f("uq_environment_hash")),
    )
    _create_run()
    op.create_table(
        "metric",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("evaluator", sa.Text(), nullable=False),
        sa.Column("protocol", sa.Text(), nullable=False),
        sa.Column("task", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.Column("stderr", sa.Double()),
        sa.Column("n", sa.Integer(), nullable=False),
        sa.Column("unit", sa.Text(), nullable=False),
        sa.Column("spec_key", sa.String(64), nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_metric")),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_metric_run_id"), ondelete="CASCADE"),
        sa.CheckConstraint("value = value AND value BETWEEN -1e308 AND 1e308", name=op.f("ck_metric_value_finite")),
        sa.UniqueConstraint("run_id", "spec_key", "name", name=op.f("uq_metric_run_id_spec_key_name")),
    )
    op.create_table(
        "sample",
        sa.Column("metric_id", sa.Integer(), nullable=False),
        sa.Column("n", sa.Integer(), nullable=False),
        sa.Column("values", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("metric_id", name=op.f("pk_sample")),
        sa.ForeignKeyConstraint(["metric_id"], ["metric.id"], name=op.f("fk_sample_metric_id"), ondelete="CASCADE"),
    )
    op.create_table(
        "layer_metric",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("block", sa.Integer(), nullable=False),
        sa.Column("module", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_layer_metric")),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_layer_metric_run_id"), ondelete="CASCADE"),
    )
    op.create_index(op.f("ix_layer_metric_run_id"), "layer_metric", ["run_id"])
    op.create_table(
        "artifact",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.Integer(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("sha256", sa.String(64)),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_artifact")),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_artifact_run_id"), ondelete="CASCADE"),
    )
    op.create_index(op.f("ix_artifact_run_id"), "artifact", ["run_id"])
    op.execute(RESULTS)


def _create_run() -> None:
    op.create_table(
        "run",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("status", sa.String(16), nullable=False),
        sa.Column("environment_id", sa.Integer(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("heartbeat", sa.Double(), nullable=False),
        sa.Column("created", sa.String(32), nullable=False),
        sa.Column("finished", sa.String(32)),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("algo", sa.Text(), nullable=False),
        sa.Column("weight_format", sa.Text()),
        sa.Column("act_format", sa.Text()),
        sa.Column("kv_format", sa.Text()),
        sa.Column("bits", sa.Integer()),
        sa.Column("group_size", sa.Integer()),
        sa.Column("symmetric", sa.Boolean()),
        sa.Column("act_bits", sa.Integer()),
        sa.Column("kv_bits", sa.Integer()),
        sa.Column("bits_per_weight", sa.Double()),
        sa.Column("bits_per_weight_model", sa.Double()),
        sa.Column("embedding_bytes", sa.BigInteger()),
        sa.Column("head_bytes", sa.BigInteger()),
        sa.Column("model_bytes", sa.BigInteger()),
        sa.Column("sparsity", sa.Double()),
        sa.Column("calib", sa.Text()),
        sa.Column("calib_n", sa.Integer()),
        sa.Column("calib_length", sa.Integer()),
        sa.Column("calib_seed", sa.BigInteger()),
        sa.Column("quantize_s", sa.Double()),
        sa.Column("evaluate_s", sa.Double()),
        sa.Column("load_s", sa.Double()),
        sa.Column("total_s", sa.Double()),
        sa.Column("phases", sa.JSON(none_as_null=True)),
        sa.Column("peak_host_bytes", sa.BigInteger()),
        sa.Column("peak_device_bytes", sa.BigInteger()),
        sa.Column("device", sa.Text()),
        sa.Column("dtype", sa.Text()),
        sa.Column("source", sa.Text()),
        sa.Column("codes_sha256", sa.String(64)),
        sa.Column("error_type", sa.Text()),
        sa.Column("error_message", sa.Text()),
        sa.Column("error_trace", sa.Text()),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("superseded_by", sa.Integer()),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_run")),
        sa.ForeignKeyConstraint(["environment_id"], ["environment.id"], name=op.f("fk_run_environment_id")),
        sa.ForeignKeyConstraint(["superseded_by"], ["run.id"], name=op.f("fk_run_superseded_by")),
        sa.CheckConstraint("status IN ('running', 'done', 'failed')", name=op.f("ck_run_status")),
    )
    op.create_index(op.f("ix_run_model"), "run", ["model"])
    op.create_index(
        "uq_run_key_live",
        "run",
        ["key"],
        unique=True,
        sqlite_where=sa.text("superseded_by IS NULL"),
        postgresql_where=sa.text("superseded_by IS NULL"),
    )
