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
        "remat": "full",  # none: keep every activation; full: keep the input of each period and recompute inside
        "unroll": 0,  # periods written out per scan iteration; 0: all of them on CPU, 1 elsewhere
        "norm_epsilon": 1e-6,
        # A and L
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 64,
        "qk_norm": "none",  # rms: RMS norm of every query and key head
        "rope_theta": 10_000.0,
        "window_tokens": 1024,  # L: keys a query sees, itself included
        # F
        "mlp_dim": 768,
        # E
        "num_experts": 8,
        "experts_per_token": 2,
        "expert_dim": 256,
        "capacity_factor": 0.0,  # rows an expert takes in training / its even share; 0: no limit, nothing is dropped
        # M
        "mamba_state_dim": 64,
        "mamba_conv_width": 4,  # tokens
        "mamba_expand": 2,  # inner width / embed_dim
        "mamba_head_dim": 64,
        "mamba_num_groups": 1,  # heads share B and C within a group
        "mamba_chunk_tokens": 128,
      },
      "data": {
        "source": "stdlib",  # stdlib, synthetic or text:PATH (a file, a folder or a glob)
        "tokenizer": "auto",  # auto, sentencepiece (trained on the training split), numbers, or a .model file
        "validation_fraction": 0.05,  # share of the files held out, chosen by a hash of their names
      },
      "mesh": {  # devices along each axis; -1: all that are left
        "data": -1,
        "fsdp": 1,
        "expert": 1,
        "context": 1,
        "tensor": 1,
        "pipe": 1,
      },
      "optimizer": {
        "name": "adamw",
        "learning_rate": 3e-4,  # peak
        "schedule": "cosine",  # cosine or constant, both after a linear warm-up
        "warmup_steps": 100,
        "final_learning_rate_ratio": 0.1,  # learning rate at the last step / peak
        "beta1": 0.9,
        "beta2": 0.95,
        "epsilon": 1e-8,
        "weight_decay": 0.1,  # of weight matrices only
        "clip_norm": 1.0,  # global gradient norm
      },
      "loss": {
        "load_balance_weight": 0.01,
        "router_z_weight": 0.001,
      },
      "train": {
        "steps": 1000,  # optimizer steps
        "batch_size": 16,  # sequences per optimizer step over all devices
        "sequence_length": 512,  # tokens
        "accumulation_steps": 1,  # micro-batches per optimizer step
        "seed": 0,
        "log_every_steps": 10,
      },
      "evaluate": {
        "every_steps": 200,  # 0: only after the last step
        "num_batches": 8,  # per evaluation during training; mode evaluate and the last evaluation read the whole split
      },
      "checkpoint": {
        "every_steps": 200,
        "keep_last": 2,
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
