"""The text of `python -m qbench --help`."""

HELP = """\
qbench measures post-training quantization of language models: every combination of calibration
data, algorithm and number format becomes a row in a database.

  python -m qbench -m algo=awq,gptq bits=2,3,4     a sweep: all combinations, plus full precision
  python -m qbench algo=gptq bits=3                one point (and full precision)
  python -m qbench ... dry_run=true                show the plan, run nothing
  qbench ls | qbench show <run>                    read the database

Keys are given as key=value; with -m a comma separates values to combine. Unknown keys are errors.

model=smollm2-135m|tiny      the model; or model.path=<folder or hub id>
algo=none|rtn|gptq|awq       the algorithm; options, with their defaults:
  gptq: algo.damp=0.01 algo.act_order=false algo.static_groups=false algo.block_size=128
        algo.scale_source=compensated|stale|original
  awq:  algo.scale=true algo.clip=true algo.n_grid=20 algo.duo=false algo.grouped_heads=false
        algo.search_tokens=1024 algo.clip_n_grid=20 algo.max_shrink=0.5
        algo.clip_range=symmetric|asymmetric
bits=4                       2 to 8
group_size=64                weights per scale; -1: per output channel, 0: per tensor
symmetric=false              true: no zero point
scale_dtype=float16          storage of the scales: float16, bfloat16, float32
partial_group=false          allow a shorter last group
calib=c4-sample              calibration text: c4-sample, wikipedia-sample, code-sample,
                             technical-sample, multilingual-sample, tinystories-sample, pydoc;
                             or calib=text calib.path=<.txt, or .jsonl with "text">
calib.n=16 calib.length=512 calib.sampler=random|sequential calib.seed=${seed}
eval.corpora=[wikipedia-sample]   texts for perplexity; or eval.path=<.txt or .jsonl>
eval.length=512              tokens per window (protocol window-<length>)
eval.n=20                    number of windows; null: all
eval.batch=null              windows per forward; null: about 1024 tokens
seed=0  device=auto|cpu|cuda  dtype=float32|bfloat16|float16
source=memory|stream         stream: read the checkpoint block by block (models larger than memory)
export=hf export.path=<folder>    write the decoded weights as a Hugging Face checkpoint
store.url=sqlite:///results/results.db   any SQLAlchemy URL
results=results              folder of figures and resume points
resume_s=120                 seconds between resume points inside a run
dry_run=false

Exit code: 0 all done, 1 a point failed (its row holds the trace), 2 the request was refused.
"""
