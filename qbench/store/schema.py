"""The tables. Their names and columns are a public contract: people query them with sqlite3.

This is what the newest migration must arrive at (a test compares the two). To change the schema: edit here,
add a file to `migrations/versions` and set REVISION to its revision. The view `results` (one row per metric
of every run that is done and not superseded) lives in the migrations alone.
"""

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

REVISION = "0005"  # of the newest migration

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

environment = Table(
    "environment",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("hash", String(64), nullable=False, unique=True),
    Column("git_commit", String(64)),
    Column("git_dirty", Boolean),
    Column("versions", JSON, nullable=False),
    Column("platform", Text, nullable=False),
    Column("cpu", Text, nullable=False),
    Column("threads", Integer, nullable=False),
    Column("gpu", Text),
    Column("driver", Text),
)

run = Table(
    "run",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("key", String(64), nullable=False),
    Column("status", String(16), nullable=False),
    Column("environment_id", ForeignKey("environment.id"), nullable=False),
    Column("owner", Text, nullable=False),
    Column("heartbeat", Double, nullable=False),
    Column("created", String(32), nullable=False),
    Column("finished", String(32)),
    Column("model", Text, nullable=False, index=True),
    Column("algo", Text, nullable=False),
    Column("weight_format", Text),
    Column("act_format", Text),
    Column("kv_format", Text),
    # A column of SQLite takes fractions (ternary weights: 1.58) whatever it was declared as.
    Column("bits", Integer().with_variant(Double(), "postgresql")),
    Column("group_size", Integer),
    Column("symmetric", Boolean),
    Column("act_bits", Integer),
    Column("kv_bits", Integer),
    Column("bits_per_weight", Double),
    Column("bits_per_weight_model", Double),
    Column("embedding_bytes", BigInteger),
    Column("head_bytes", BigInteger),
    Column("model_bytes", BigInteger),
    Column("sparsity", Double),
    Column("calib", Text),
    Column("calib_n", Integer),
    Column("calib_length", Integer),
    Column("calib_seed", BigInteger),
    Column("quantize_s", Double),
    Column("evaluate_s", Double),
    Column("load_s", Double),
    Column("total_s", Double),
    Column("phases", JSON(none_as_null=True)),
    Column("peak_host_bytes", BigInteger),
    Column("peak_device_bytes", BigInteger),
    Column("device", Text),
    Column("dtype", Text),
    Column("source", Text),
    Column("codes_sha256", String(64)),
    Column("error_type", Text),
    Column("error_message", Text),
    Column("error_trace", Text),
    Column("spec", JSON, nullable=False),
    Column("superseded_by", ForeignKey("run.id")),
    Column("family", String(64)),  # of runs that differ in their seeds alone
    CheckConstraint("status IN ('running', 'done', 'failed')", name="status"),
)
# The claim: at most one row per key that counts.
Index(
    "uq_run_key_live",
    run.c.key,
    unique=True,
    sqlite_where=text("superseded_by IS NULL"),
    postgresql_where=text("superseded_by IS NULL"),
)

metric = Table(
    "metric",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("run_id", ForeignKey("run.id", ondelete="CASCADE"), nullable=False),
    Column("evaluator", Text, nullable=False),
    Column("protocol", Text, nullable=False),
    Column("task", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("value", Double, nullable=False),
    Column("stderr", Double),
    Column("n", Integer, nullable=False),
    Column("unit", Text, nullable=False),
    Column("spec_key", String(64), nullable=False),
    Column("created", String(32), nullable=False),
    Column("higher_is_better", Boolean),  # NULL: neither, or not known
    Column("whole", Boolean),  # whether these are all items of the task; NULL: rows from before there was this
    Column("environment_id", Integer),  # where it was measured; NULL (rows from before there was this): as its run
    # value = value refuses a NaN where comparison follows IEEE 754; PostgreSQL sorts NaN above all numbers
    # instead.
    CheckConstraint("value = value AND value BETWEEN -1e308 AND 1e308", name="value_finite"),
    UniqueConstraint("run_id", "spec_key", "name"),
)

sample = Table(
    "sample",
    metadata,
    Column("metric_id", ForeignKey("metric.id", ondelete="CASCADE"), primary_key=True),
    Column("n", Integer, nullable=False),
    Column("values", LargeBinary, nullable=False),  # float64, little-endian, zlib
    Column("clusters", LargeBinary),  # int64, little-endian, zlib
)

layer_metric = Table(
    "layer_metric",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("run_id", ForeignKey("run.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("block", Integer, nullable=False),
    Column("module", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("value", Double, nullable=False),
)

artifact = Table(
    "artifact",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("run_id", ForeignKey("run.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("kind", Text, nullable=False),
    Column("path", Text, nullable=False),
    Column("sha256", String(64)),
    Column("bytes", BigInteger, nullable=False),
)

# A measurement that was wanted of a finished run and did not succeed. It counts until there is one that did.
failure = Table(
    "failure",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("run_id", ForeignKey("run.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("evaluator", Text, nullable=False),
    Column("protocol", Text, nullable=False),
    Column("task", Text, nullable=False),
    Column("spec_key", String(64), nullable=False),
    Column("error_type", Text, nullable=False),
    Column("message", Text, nullable=False),
    Column("trace", Text, nullable=False),
    Column("created", String(32), nullable=False),
)

# How far a metric differs between runs that differ in nothing but chance: one row per component of the variance.
noise = Table(
    "noise",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("family", String(64), nullable=False, index=True),  # of runs that differ in their seeds alone
    Column("spec_key", String(64), nullable=False),
    Column("name", Text, nullable=False),
    Column("component", Text, nullable=False),
    Column("sd", Double, nullable=False),
    Column("n", Integer, nullable=False),
    Column("unit", Text, nullable=False),
    Column("settings", JSON, nullable=False),
    Column("values", JSON, nullable=False),
    Column("environment_id", ForeignKey("environment.id"), nullable=False),
    Column("created", String(32), nullable=False),
)

# A published number with its settings, to hold runs against; what its source does not state is NULL.
anchor = Table(
    "anchor",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("source", Text, nullable=False, index=True),
    Column("url", Text, nullable=False),
    Column("model", Text, nullable=False),
    Column("task", Text, nullable=False),
    Column("protocol", Text, nullable=False),
    Column("metric", Text, nullable=False),
    Column("n", Integer),  # items; NULL: all that the text or task has
    Column("value", Double, nullable=False),
    Column("tolerance", Double, nullable=False),  # a share of the value
    Column("algo", Text, nullable=False),
    Column("weight_format", Text, nullable=False),  # or "full precision"
    Column("act_format", Text),
    Column("calib", Text),
    Column("calib_n", Integer),
    Column("calib_length", Integer),
    Column("stages", JSON(none_as_null=True)),
    Column("reading", Text),  # why no evaluation measures what the source did
)
