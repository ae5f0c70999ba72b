"""The text of `python -m qbench --help`."""

HELP = """\
qbench measures post-training quantization of language models: every combination of calibration
data, algorithm and number format becomes a row in a database.

  python -m qbench -m algo=awq,gptq bits=2,3,4     a sweep: all combinations, plus full precision
  python -m qbench algo=gptq bits=3                one point (and full precision)
  python -m qbench ... dry_run=true                show the plan, run nothing
  qbench ls | qbench show <run>                    read the database
  qbench compare <run> <run>                       which of two is better, and whether that can be said
  qbench why <run> <run> | qbench layers <run>     why they differ, down to the layer; maps of layers' errors
  qbench eval <run> eval=zeroshot                  measure finished runs again, with other evaluations
  qbench fill t7 --size demo                       run what a declared table still needs, and draw it
  qbench best | recommend | attribute | align      best practice, recipes for a budget, causes, published figures
  qbench report | export | merge                   one HTML page; tables for other programs; databases together
  qbench doctor                                    what this machine has, and how to install what it lacks

Keys are given as key=value; with -m a comma separates values to combine. Unknown keys are errors.

model=smollm2-135m|tiny      the model; or model.path=<folder or hub id>
algo=gptq                    the algorithm, or several in a row: algo=quarot+awq_clip+gptq, whose options go by
                             part: algo.gptq.damp=0.1. Options, with their defaults:
  none, rtn: none
  gptq: algo.damp=0.01 algo.act_order=false algo.static_groups=false algo.block_size=128
        algo.scale_source=compensated|stale|original
  gptaq: algo.alpha=0.25 algo.residual=running|upfront, and gptq's
  quip: algo.incoherence=true algo.rescale=true algo.rho=2.4 algo.damp=0.01 algo.act_order=false
        algo.greedy_passes=0
  awq:  algo.scale=true algo.clip=true algo.n_grid=20 algo.duo=false algo.grouped_heads=false
        algo.search_tokens=1024 algo.weight_act=false algo.clip_n_grid=20 algo.max_shrink=0.5
        algo.clip_range=symmetric|asymmetric
  hqq:  algo.iterations=20 algo.beta=10 algo.kappa=1.01 algo.p=0.7 algo.round_zero=auto
  adadim: algo.solver=rtn|gptq algo.damp=0.01
  mse_clip: algo.norm=2.4 algo.grid=100 algo.max_shrink=0.8;  percentile_clip: algo.percentile=99.9
  magr: algo.alpha=1e-3 algo.alpha_group=1e-4 algo.iterations=200 algo.beta=null, and gptq's
  smoothquant: algo.alpha=0.5 algo.all_folds=false algo.search=false algo.n_grid=20 algo.search_tokens=1024
  osplus: algo.shift=true algo.all_folds=false algo.n_grid=100 algo.smallest_threshold=1
        algo.search_tokens=512
  dgq:  algo.alpha=0.5 algo.percentile=99.5 algo.n_grid=20 algo.n_grid_channel=80 (scheme=w4a8)
  duquant: algo.smooth=true algo.alpha=0.5 algo.all_folds=false algo.block_size=128
        algo.max_rotation_step=256 algo.permutation_times=1 algo.sample_tokens=128
  quarot: algo.rotate_mode=hadamard|random algo.residual=true algo.values=true algo.online_down=true
        algo.online_o=heads|full|none algo.rotate_keys=true
  spinquant: algo.lr=1.5 algo.steps=100 algo.batch_size=1 algo.momentum=0 algo.quantize_weights=true
        algo.rotate_mode=hadamard|random algo.values=true algo.online_down=true algo.rotate_keys=true
  omniquant: algo.lwc=true algo.let=auto algo.epochs=20 algo.batch_size=1 algo.lwc_lr=0.01 algo.let_lr=0.005
        algo.weight_decay=0 algo.lwc_init=4 algo.let_init=auto|smooth|identity algo.alpha=0.5 algo.shift=true
        algo.grouped_heads=false algo.aug_loss=false algo.keep_best=true algo.autocast=false
  autoround: algo.iters=200 algo.lr=null algo.minmax_lr=null algo.enable_minmax_tuning=true
        algo.batch_size=8 algo.autocast=false
  tesseraq: algo.iterations=250 algo.thresholds="0.75 0.5 ..." algo.lr=5e-4 algo.optimize_scale=true
        algo.scale_lr=null algo.batch_size=4 algo.autocast=false, and awq's
  normtweaking: algo.lr=1e-5 algo.lr_scale=1e-3 algo.epochs=1 algo.distance=channel|mse algo.batch_size=1,
        and gptq's
scheme=default               formats of weights, inputs and cache by name; any key below overrides its part:
                             w4a16_g128 w4a16_g64 w3a16_g64 w2a16_g64 w8a8 w8a8_static w6a6 w4a4 w4a8
                             fp8 mxfp8 mxfp6 mxfp4 nvfp4 nf4 kv8 kv4 kv2
format=int                   of the weights: int; fp (8, 6, 4 bits: e4m3, e3m2, e2m1); any float such as
                             e3m4, e4m3ieee; nf2 nf3 nf4 nf4dq af4 fp4bnb ternary mxfp8 mxfp8e5m2 mxfp6
                             mxfp6e2m3 mxfp4 mxint8 nvfp4 fp8block int4in8; none: full precision
bits=4                       2 to 8, 1.58 (ternary), or 16 (full precision)
group_size=64                weights per scale; -1: per output channel, 0: per tensor; or tile=[128,128]
symmetric=false              integers: true: no zero point
zero_point=int|float         of asymmetric integers
reach=midpoint|narrow|full   where a symmetric integer grid puts max|w|
scale_dtype=float16          float16 bfloat16 float32 e8m0 e8m0ceil e4m3 int8 (two-level) dq8
partial_group=false          allow a shorter last group
range.method=minmax|mse|percentile|share|absmean   options: range.norm=2.4 range.grid=100
                             range.max_shrink=0.8; range.percentile=99.9; range.share
act_bits=null                bits of the linear layers' inputs, 2 to 8; null: full precision
act.format=int  act.granularity=token|group (dynamic), tensor|channel (static)  act.group_size=64
act.symmetric=true  act.mode=dynamic|static  act.calibration=minmax|moving|histogram  act.clip=1
kv_bits=null                 bits of cached keys and values, 2 to 8; null: full precision
kv.format=int  kv.layout=kivi|token (dynamic), tensor|head|channel (static)  kv.group_size=32
kv.residual=128  kv.symmetric=false  kv.mode=dynamic|static
overrides=[]                 other formats for some modules, the last that matches decides:
                             overrides=[{modules:down_proj,bits:8},{blocks:[0,-1],skip:true},
                             {modules:lm_head,format:int,bits:8}]
calib=c4-sample              calibration text: c4-sample, wikipedia-sample, code-sample,
                             technical-sample, multilingual-sample, tinystories-sample, pydoc;
                             or calib=text calib.path=<.txt, or .jsonl with "text">
calib.n=16 calib.length=512 calib.sampler=random|sequential calib.seed=${seed}
calib.shuffle=none|sentences|words|tokens    destroy the order inside every window (words: of each sentence)
eval=perplexity              what is measured; several at once: eval=perplexity+zeroshot eval.zeroshot.limit=100
  perplexity: eval.corpora=[wikipedia-sample] or eval.path=<.txt or .jsonl>, eval.length=512 (tokens per
        window), eval.n=20 (windows; null: all), eval.batch=null, eval.mode=prefill|decode
  decode: the same token by token through the (quantized) cache
  wikitext2, ptb, c4, c4_new: the literature's definitions, from eval.path; eval.length=2048
  rolling: lm-eval's word and byte perplexity; eval.length eval.n eval.detokenize=none|wikitext
  zeroshot: eval.tasks=[piqa,arc_easy,arc_challenge,boolq,hellaswag,winogrande] or any of lm-eval's,
        eval.limit=null eval.num_fewshot=null eval.data_dir=null (null: the hub)
  fidelity: KL, agreement and continuations against full precision; eval.length=512 eval.n=20
        eval.cache_gb=2 eval.greedy.n=16 eval.greedy.prompt=64 eval.greedy.tokens=64
  layers: kurtosis of weights and inputs, cosine of outputs, by type of layer; eval.length=512 eval.n=20
  needle: eval.lengths=[512,1024,2048] eval.depths=[0,0.25,0.5,0.75,1] eval.n=10
  token_kl: test tokens against calibration tokens, without the model; eval.length=512 eval.n=20 eval.alpha=0.1
        eval.definition=null|wikitext2|ptb|c4|c4_new (how eval.path is read)
  opencompass: eval.datasets=[piqa,...] eval.limit eval.data_dir; qbench doctor --install opencompass
seed=0  device=auto|cpu|cuda  dtype=float32|bfloat16|float16
source=memory|stream         stream: read the checkpoint block by block (models larger than memory)
export=hf export.path=<folder>    write the decoded weights as a Hugging Face checkpoint
store.url=sqlite:///results/results.db   any SQLAlchemy URL
results=results              folder of figures and resume points
resume_s=120                 seconds between resume points inside a run
dry_run=false

Exit code: 0 all done, 1 a point failed (its row holds the trace), 2 the request was refused.
"""
