"""Every configuration key, once, with its unit and default. Each other file here overrides some of them.

Goal:     the vocabulary of all runs; by itself a small dense decoder on the embedded data.
Command:  python -m ultrathink_jax.main --config=configs/NAME.py --workdir=runs/NAME [--config.section.key=value ...]
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "recipe": "pretrain",
      "model": {
        "layers": "(AF)x4",  # one letter a layer: A attention, L sliding window, M Mamba-2, F feed-forward, E experts
        "vocab_size": 4096,  # tokens
        "embed_dim": 256,
        "tie_embeddings": False,  # True: the embedding table is also the output projection
        "dtype": "bfloat16",  # of activations: bfloat16 or float32; parameters are float32
        # none: keep every activation; full: keep the input of each period and recompute inside; named: keep what layers
        # add too; dots: keep what projections return too; offload: as named, in host memory
        "remat": "full",
        # True: weights sharded over fsdp are gathered while the period before them is computed, forward and backward,
        # and those of two periods are held at a time; False: each layer gathers its own
        "gather_ahead": False,
        "pipe_micro_batches": 0,  # parts of a batch that pipeline stages work on in turn; 0: as many as rows allow
        "unroll": 0,  # periods written out per scan iteration; 0: all of them on CPU, 1 elsewhere
        "norm_epsilon": 1e-6,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,  # of what each layer adds
        "logits_multiplier": 1.0,
        "logits_soft_cap": 0.0,  # cap * tanh(logits / cap); 0: no cap
        # A and L
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "qk_norm": "none",  # RMS norm of queries and keys; head: of each head, all: of all heads together
        "qkv_clip": 0.0,  # largest magnitude of queries, keys and values; 0: no limit
        "attention_bias": "none",  # qkv: of query, key and value projections; all: of the output's too
        "attention_scale": 0.0,  # of scores; 0: head_dim^-0.5
        "attention_soft_cap": 0.0,  # of scores; 0: no cap
        "attention_sinks": False,  # True: each head may attend to nothing, by a learned score
        "attention_backend": "auto",  # reference, blockwise, cudnn, pallas; auto: the fastest here, which is logged
        "position": "rope",  # none: attention knows order by its mask only
        "rope": {
          "theta": 10_000.0,
          "fraction": 1.0,  # of the dims of a head that are turned, the first ones
          "scaling": "none",  # linear, dynamic (NTK), yarn or llama3
          "factor": 1.0,  # context length / original_tokens
          "original_tokens": 4096,  # context length before scaling
          "low_frequency_factor": 1.0,  # llama3
          "high_frequency_factor": 4.0,  # llama3
          "beta_fast": 32.0,  # yarn: turns in original_tokens above which a dim keeps its frequency
          "beta_slow": 1.0,  # yarn: turns below which it is divided by factor
          "attention_factor": 0.0,  # yarn: of queries and keys; 0: 0.1 ln(factor) + 1
        },
        "window_tokens": 1024,  # L: keys a query sees, itself included
        # F
        "mlp_dim": 768,
        "mlp_activation": "swiglu",  # of F and E; swiglu and geglu have a gate, gelu and relu2 have none
        "mlp_bias": False,  # of F
        # E
        "num_experts": 8,
        "experts_per_token": 2,
        "expert_dim": 256,
        "shared_expert_dim": 0,  # width of an expert that every token passes; 0: none
        "capacity_factor": 0.0,  # rows an expert takes in training / its even share of a device's; 0: no limit
        "router": "softmax",  # softmax; sigmoid: every expert by itself; grouped: p(group) p(expert | group)
        "router_normalize": True,  # the gates of a token sum to 1
        "router_multiplier": 1.0,  # of the gates
        "router_bias": False,  # True: a bias on the choice, not on the gate, that optimizer.router_bias_rate moves
        "router_noise": 0.0,  # standard deviation of Gaussian noise on the router's logits at step 0 of training
        "router_noise_steps": 0,  # steps over which the noise falls linearly to 0; 0: it stays
        "expert_groups": "",  # of the grouped router, as knowledge=4,skill=2,meta=1,safety=1
        "expert_buffer_factor": 2.0,  # expert axis, no capacity: rows a device takes of another / even share
        "expert_chunks": 1,  # parts whose exchange of rows overlaps with the experts' work on the part before
        "experts_backend": "auto",  # reference, loop, sorted, capacity, pallas, tokamax; auto: the fastest here, logged
        # M
        "mamba_state_dim": 64,
        "mamba_conv_width": 4,  # tokens
        "mamba_expand": 2,  # inner width / embed_dim
        "mamba_num_heads": 0,  # 0: mamba_expand * embed_dim / mamba_head_dim
        "mamba_head_dim": 64,
        "mamba_num_groups": 1,  # heads share B and C within a group
        "mamba_norm_groups": 1,  # parts of the inner width that are normed apart
        "mamba_bias": False,  # of the input and output projections
        "mamba_conv_bias": True,
        "mamba_dt_min": 0.0,  # limits of the time step
        "mamba_dt_max": 0.0,  # 0: no limit
        "mamba_chunk_tokens": 128,
        "ssd_backend": "auto",  # reference, chunked, pallas; auto: the fastest here, logged
      },
      "data": {
        # stdlib, synthetic, text:PATH, jsonl:PATH, parquet:PATH, arrayrecord:PATH, tfds:DIR, hf:NAME, code:PATH, or the
        # name of a well-known corpus (c4, wikitext ...) that is prepared here
        "source": "stdlib",
        "mixture": (),  # instead of source, SOURCE=WEIGHT of several: ("stdlib=0.7", "text:notes=0.3")
        "stages": (),  # weights of the mixture from a step on, STEP:WEIGHT,WEIGHT: ("1000:0.5,0.5",)
        # bpe or unigram (SentencePiece, trained on training documents), bytes, numbers (of the synthetic source), or
        # the path of a .model file, a tokenizer.json or a folder with one; auto: bpe, or numbers where it must be
        "tokenizer": "auto",
        "special_tokens": (),  # of a tokenizer that is trained: texts that are one token each, ("<|im_end|>",)
        "validation_fraction": 0.05,  # share of the documents held out, chosen by a hash of their names
        "format": "auto",  # of an entry: text, prompt_completion, messages, preference, label; auto: by its fields
        "text_field": "text",  # of entries that are plain text
        # of messages: chatml, plain, none, or the path of a Jinja file; auto: the one beside the tokenizer, else plain
        "chat_template": "auto",
        "on_error": "strict",  # strict: a bad entry ends the run; skip: it is counted and written to rejects.jsonl
        "packing": "split",  # split: rows are cut from one long text; best_fit: documents that fit a row stay whole
        "shuffle": True,
        "length_stages": (),  # most tokens a document has in a row from a step on, STEP:TOKENS: ("0:128", "500:512")
        "workers": 0,  # processes that prepare data; 0: one for each core
      },
      "quality": {  # documents that are left out, with counted reasons; 0, False or () turns a rule off
        "min_chars": 0,
        "max_chars": 0,
        "min_alphanumeric": 0.0,  # share of the characters that are letters, digits or white space
        "max_punctuation": 0.0,  # share of the characters that are punctuation or symbols
        "max_repetition": 0.0,  # share of repeated lines, and of repeated runs of 10 words; 0.3 is mild
        "scripts": (),  # Unicode names: ("Latin", "Cyrillic")
        "min_script": 0.8,  # share of the letters that are of these scripts
        "languages": (),  # as ("en", "de"); needs the extra `languages`
        "min_language": 0.8,  # how sure it must be
        "max_line_chars": 0,
        "max_mean_line_chars": 0,
        "scrub_secrets": False,  # True: keys, tokens and passwords are replaced by markers
        "scrub_contacts": False,  # True: e-mail and IP addresses are
        "duplicate_similarity": 0.0,  # of documents this similar (Jaccard) one is kept; 1: exact duplicates only
        "decontaminate": (),  # evaluation files; documents that share a run of words with them are left out
        "decontamination_words": 13,
      },
      "code": {  # what data.source=code:PATH makes of a source tree
        "kinds": {  # share of the samples of each kind that is kept
          "file": 1.0,
          "chunk": 1.0,  # of files above max_tokens
          "item": 1.0,  # functions, types ..., with their bodies
          "complete": 1.0,  # prompt: documentation and signature; completion: body
          "doc": 1.0,  # prompt: an item; completion: its documentation
          "test": 1.0,  # prompt: a function; completion: its test
          "fim": 0.5,  # fill in the middle
          "repo": 1.0,  # files in the order of their dependencies
          "commit": 0.0,  # messages and changes, without authors
        },
        "max_per_file": 0,  # samples of one file; 0: no limit
        "max_tokens": 2048,  # of a sample
        "overlap_tokens": 128,  # that chunks of a file share
        "repo_tokens": 8192,  # of a sample of kind repo
        "min_tokens": 8,  # of a sample
        "test_fraction": 0.05,  # of the files, kept apart in test.jsonl
        "split_by": "file",  # module: whole crates and packages are in one split
        "tests": "split",  # from the code they stand in, to samples of their own; keep: in both; drop: in none
        "secrets": "scrub",  # drop: files with credentials are left out; keep
        "near_duplicates": "drop",  # keep
        "fim_spm_rate": 0.5,  # share in the order suffix, prefix, middle
        "fim_levels": {"char": 1.0, "line": 1.0, "item": 1.0},  # where middles are cut, relative to the sum
        "fim_learned": "all",  # middle: only the middle is
        "exclude": (),  # patterns of paths, as in .gitignore, beside what is generated, built or vendored
        "languages": (),  # ("Rust", "Python"); (): all
        "licences": (),  # SPDX identifiers, and "unknown"; (): all
        "max_commits": 1000,
      },
      "mesh": {  # devices along each axis; -1: all that are left
        "slices": 1,  # groups of devices with a slow network between them; the data axis crosses it
        "data": -1,  # of each slice
        "fsdp": 1,
        "expert": 1,
        "context": 1,
        "tensor": 1,
        "pipe": 1,
        "zero": 3,  # what the fsdp axis shards: 1 the optimizer's state, 2 gradients too, 3 parameters too
      },
      "optimizer": {
        "name": "adamw",  # adamw, lion, sophia, galore, adafactor, muon, sgd, schedule_free
        "learning_rate": 3e-4,  # peak
        # of parameters whose path matches, PATTERN=FACTOR; the first match counts: ("*router*=0.1", "embedding*=0.5")
        "rate_multipliers": (),
        # constant, linear, cosine, polynomial, exponential, cosine_restarts, or wsd (constant, then linear), each after
        # a linear warm-up
        "schedule": "cosine",
        "warmup_steps": 100,
        "warmup_ratio": 0.0,  # of the steps of the run, instead of warmup_steps; 0: warmup_steps
        "final_learning_rate_ratio": 0.1,  # learning rate at the last step / peak
        "decay_power": 0.5,  # polynomial: of the share of steps that are left
        "decay_ratio": 0.2,  # wsd: share of the steps, the last ones, in which the rate falls
        "restarts": 3,  # cosine_restarts: how often the rate starts at its peak
        "beta1": 0.9,  # sgd: momentum
        "beta2": 0.95,
        "epsilon": 1e-8,
        "weight_decay": 0.1,  # of weight matrices only
        "moment_dtype": "float32",  # bfloat16: of the first moments
        "clip_norm": 1.0,  # global gradient norm
        "average_decay": 0.0,  # of a moving average of the parameters, that evaluation and export read; 0: none
        "offload": False,  # True: the optimizer's state rests in host memory between updates
        "router_bias_rate": 0.001,  # what model.router_bias moves by in a step
        "sophia": {
          "rho": 0.04,
          "every_steps": 10,  # between estimates of the curvature
        },
        "galore": {
          "rank": 256,
          "every_steps": 200,  # between projections
          "scale": 0.25,
        },
        "guard": {  # a step whose loss or gradient is not finite is never applied
          "spike_sigmas": 0.0,  # nor one whose loss or gradient norm is this far above its mean; 0: all others are
          "window_steps": 128,  # that mean and deviation are of
          "max_skipped": 10,  # steps in a row, after which the run goes back to its last checkpoint and reads on behind
          "max_rollbacks": 1,  # after which it ends
        },
      },
      "lora": {  # adapters beside frozen weight matrices, whose base is checkpoint.init_from
        "rank": 0,  # 0: no adapters
        "expert_rank": 0,  # of experts' matrices; 0: rank / model.experts_per_token, for each expert sees less
        "alpha": 32.0,  # what adapters add counts alpha / rank
        "dropout": 0.0,  # share of the inputs of adapters, not of experts', that a training step leaves out
        # attention, mlp, experts, router, mamba, all (but the router), or patterns of names, as "layers.1.*.query"
        "targets": ("attention",),
        "rank_pattern": (),  # of names, PATTERN=RANK; the first match counts: ("layers.0.*=8",)
        "alpha_pattern": (),
        "scaling": "standard",  # rslora: alpha / sqrt(rank)
        "variant": "lora",  # dora: columns of the sum have magnitudes of their own, experts' have not
        "init": "kaiming",  # pissa: adapters begin as the strongest singular vectors, which are taken off the base
        "rate_ratio": 1.0,  # learning rate of B / that of A (LoRA+, which advises 16)
        # of frozen weights: float32; bfloat16; int8, int4 or nf4 for matrices, but routers, and bfloat16 for tables
        "base_dtype": "float32",
      },
      "loss": {
        "load_balance_weight": 0.01,
        # layers: of each layer and row, 1 where even; pooled: of all layers together, as transformers has it for
        # Mixtral, model.experts_per_token where even
        "load_balance_form": "layers",
        "router_z_weight": 0.001,
        "router_importance_weight": 0.0,
        "router_entropy_weight": 0.0,
        "z_weight": 0.0,  # of the squared log of the softmax's normaliser
        "scan_weight": 0.0,  # of the squared log-decay of Mamba-2 states per token
        "label_smoothing": 0.0,  # share of a target that all tokens have evenly
        "prompt_weight": 0.0,  # of recipe sft: what a token of a prompt counts beside one of a completion
      },
      "train": {
        "steps": 1000,  # optimizer steps
        "tokens": 0,  # instead of steps: at least as many tokens; 0: steps
        "epochs": 0.0,  # instead of steps: as often is the training data read; 0: steps
        "batch_size": 16,  # sequences per optimizer step over all devices
        "sequence_length": 512,  # tokens
        "accumulation_steps": 1,  # micro-batches per optimizer step; 0: the fewest that fit in memory
        "seed": 0,
        # what is trained in full, the rest is frozen; (): all, or with lora.rank adapters alone. last:N layers, head
        # (output projection and last norm), embedding, norms, router, experts, experts:K (every K-th), or patterns of
        # names, as "layers.3.attention.*"
        "trainable": (),
        "deterministic": False,  # True: the same bits again on GPU too, at some speed; elsewhere they always are
        "log_every_steps": 10,
        "hang_seconds": 0.0,  # without progress after which a run dumps its stacks and ends; 0: by the steps so far
      },
      "evaluate": {
        "every_steps": 200,  # 0: only after the last step
        "num_batches": 8,  # per evaluation during training; mode evaluate and the last evaluation read the whole split
        "averaged": True,  # of the averaged parameters, where there are any
        "best_metric": "evaluate/loss",  # what the best checkpoint is chosen by
        "best_is": "lowest",  # highest
        "patience": 0,  # evaluations without a better one after which training ends with the best; 0: never
        "min_delta": 0.0,  # what is better at least
        "documents": 500,  # that mode evaluate compares an adapted model with its base on; 0: all that are held out
        "samples": 8,  # prompts that both complete
        "general": "base",  # other documents, to see what is forgotten: those held out from the base's data, or a file
        "tasks": (),  # of lm-eval-harness, which mode evaluate runs; needs the extra lm_eval
        "tasks_folder": "",  # where YAML files of tasks of one's own lie
      },
      "checkpoint": {
        "every_steps": 200,
        "keep_last": 2,
        "keep_best": 0,  # checkpoints with the best evaluate.best_metric, saved as they are evaluated
        "keep_every_steps": 0,  # checkpoints of multiples of this step stay for good; 0: none
        # workdir or checkpoint whose parameters a new run begins with, where name and shape agree; of an adapted run
        # its base, all of it, which may be a Hugging Face directory
        "init_from": "",
        "stop_seconds": 12.0,  # from a signal to the end, saved or not
      },
      "log": {
        "sinks": (),  # mlflow, wandb: beside metrics.jsonl and TensorBoard; each needs the extra of its name
        "project": "ultrathink_jax",
        "run_name": "",  # "": the name of the workdir
      },
      "advice": {  # when a line on the console says what to look at; 0 turns a rule off
        "explosion_ratio": 10.0,  # gradient norm / its median of late
        "oscillation_ratio": 0.25,  # deviation of the loss around its trend / its mean
        "flat_steps": 500,  # in which the loss should fall
        "flat_ratio": 0.005,  # by this share at least
        "collapse_share": 0.5,  # of a layer's choices that one expert has
        "saturation_entropy": 0.3,  # of the load / ln(experts), below which routing is saturated
      },
      "generate": {
        "max_new_tokens": 128,
        "temperature": 0.8,  # 0: greedy
        "top_k": 0,  # 0: all
        "top_p": 0.95,
        "repetition_penalty": 1.0,
        "stop": (),  # strings that end a completion
        "seed": 0,
      },
    }
  )
