"""Names of settings in other trainers, and what consyn_jax calls them.

The names are flags, config keys and keywords of transformers (`TrainingArguments`, `run_clm.py`,
config.json), TRL, accelerate and torchrun, nanoGPT, LitGPT, torchtitan and Megatron-LM. Only names
that differ from ours are listed. This module imports only the standard library.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Any

from consyn_jax.config import DataOptions, ModelOptions
from consyn_jax.flags import Flag

# Advice contains markers such as [epochs *N]. `advise` writes a marker in the user's style: as a
# flag, a Python keyword or a line of a config file. *N becomes the user's value, or N if the value
# does not suit the flag.
_LEAVE_OUT = "leave it out"
_SAME_NAME = {
    "[epochs *N]": "num_train_epochs num_epochs max_epochs n_epochs epoch train.epochs",
    "[max_steps *N]": (
        "max_train_steps max_iters train_iters num_train_steps num_steps train.max_steps "
        "training.steps"
    ),
    "[total_tokens *N]": "max_train_tokens train.max_tokens",
    "[batch_size *N]": (
        "train_batch_size micro_batch_size train.micro_batch_size per_gpu_train_batch_size bs"
    ),
    "[gradient_accumulation_steps *N]": (
        "gradient_accumulation accumulate_grad_batches grad_accum grad_accumulation_steps"
    ),
    "[max_tokens *N]": (
        "block_size max_seq_length max_seq_len max_length seq_length seq_len sequence_length "
        "sequence_len cutoff_len model_max_length train.max_seq_length training.seq_len"
    ),
    "[lr *X]": "optimizer.lr optimizer.init_args.lr peak_lr max_lr",
    "[weight_decay *X]": "wd optimizer.weight_decay optimizer.init_args.weight_decay",
    "[beta1 *X]": "adam_beta1 optimizer.beta1",
    "[beta2 *X]": "adam_beta2 optimizer.beta2",
    "[objective dpo] [dpo_beta *X]": "beta pref_beta dpo.beta",
    "[eps *X]": "adam_epsilon adam_eps epsilon optimizer.eps",
    "[optimizer *]": "optim optimizer_name optimizer.name",
    "[scheduler *]": (
        "lr_scheduler_type lr_scheduler lr_decay_style lr_schedule lr_scheduler.decay_type"
    ),
    "[warmup_steps *N]": (
        "warmup_iters lr_warmup_iters num_warmup_steps lr_warmup_steps train.lr_warmup_steps "
        "lr_scheduler.warmup_steps"
    ),
    "[warmup_ratio *X]": "lr_warmup_fraction warmup_fraction",
    "[min_lr_ratio *X]": "min_lr_rate lr_scheduler.min_lr_factor",
    "[decay_ratio *X]": "lr_scheduler.decay_ratio",
    "[max_grad_norm *X]": "grad_clip clip_grad gradient_clip_val training.max_norm train.max_norm",
    "[label_smoothing *X]": "label_smoothing_factor",
    "[dropout *X]": "attn_dropout resid_pdrop hidden_dropout attention_dropout",
    "[seed *N]": "data_seed random_seed debug.seed",
    "[mixed_precision *]": (
        "dtype torch_dtype precision compute_dtype training.mixed_precision_param"
    ),
    "[gradient_checkpointing *]": (
        "gradient_checkpointing_kwargs activation_checkpointing activation_checkpoint.mode "
        "recompute_granularity"
    ),
    "[auto_batch]": "auto_find_batch_size",
    "[optimizer_memory host]": "cpu_offload offload_optimizer optimizer_cpu_offload",
    "[data *PATH]": (
        "dataset dataset_name dataset_path dataset_dir train_file train_files train_data data_path "
        "data_dir training.dataset training.dataset_path data.json_path data.train_data_path"
    ),
    "[validation *PATH]": (
        "validation_file eval_file eval_data validation_data data.val_data_path"
    ),
    "[validation_fraction *X]": ("val_split val_size data.val_split_fraction"),
    "[text_key *KEY]": "dataset_text_field text_column text_column_name text_field",
    "[tokenizer *PATH]": (
        "tokenizer_name tokenizer_name_or_path tokenizer_path tokenizer_dir tokenizer_model "
        "model.tokenizer_path model.hf_assets_path"
    ),
    "[num_workers *N]": "dataloader_num_workers preprocessing_num_workers num_proc",
    "[model *NAME]": "model_type config_name model_flavor model.flavor",
    "[checkpoint *DIR]": (
        "pretrained pretrained_model_name_or_path initial_checkpoint_dir checkpoint_dir base_model "
        "load checkpoint.initial_load_path"
    ),
    "[hidden_dim *N]": "hidden_size n_embd d_model dim embed_dim",
    "[num_layers *N]": "num_hidden_layers n_layer n_layers",
    "[num_heads *N]": "num_attention_heads n_head n_heads",
    "[num_kv_heads *N]": "num_key_value_heads n_kv_heads num_query_groups n_query_groups",
    "[mlp_dim *N]": "intermediate_size ffn_hidden_size ffn_dim d_ff",
    "[context *N]": "max_position_embeddings n_positions n_ctx context_length",
    "[tie_embeddings true]": "tie_word_embeddings",
    "[tie_embeddings false]": "untie_embeddings_and_output_weights",
    "[output *DIR]": "out_dir save_dir checkpoint.folder job.dump_folder dump_folder",
    "[overwrite]": "overwrite_output_dir",
    "[save_steps *N]": "save_interval save_every checkpoint_interval checkpoint.interval",
    "[keep_last *N]": "save_total_limit checkpoints_total_limit checkpoint.keep_latest_k",
    "[eval_steps *N]": "eval_interval eval_every val_check_interval eval.interval validation.freq",
    "[logging_steps *N]": "log_interval log_every logging_interval metrics.log_freq",
    "[logging_backend *]": "report_to log_with logger logger_name",
    "[logging_backend wandb]": "wandb_log use_wandb wandb metrics.enable_wandb",
    "[logging_backend tensorboard]": "use_tensorboard metrics.enable_tensorboard",
    "[wandb_project *NAME]": "project project_name wandb.project",
    "[wandb_run_name *NAME]": "run_name wandb_name wandb_exp_name exp_name",
    "[profile_steps 10:12]": "profile enable_profiling profiling.enable_profiling",
    "[quiet]": "disable_tqdm no_progress_bar",
    "[config *FILE]": "config_file job.config_file",
    "[early_stopping_min_delta *X]": "early_stopping_threshold",
    "[mixed_precision bf16]": "bf16 bf16_full_eval use_bf16",
    "[mixed_precision fp16]": "fp16 fp16_full_eval use_fp16 amp use_amp",
    "[mixed_precision fp8]": "fp8 use_fp8",
    "[mesh fsdp=*N]": "fsdp_size parallelism.data_parallel_shard_degree",
    "[mesh tensor=*N]": (
        "tp_size tensor_parallel_size tensor_model_parallel_size parallelism.tensor_parallel_degree"
    ),
    "[mesh context=*N]": ("cp_size context_parallel_size parallelism.context_parallel_degree"),
    "[mesh data=*N]": "dp_size data_parallel_size parallelism.data_parallel_replicate_degree",
    "[num_processes *N]": "nnodes num_nodes num_machines world_size",
    "[process_id *N]": "node_rank machine_rank",
}
_LEAVE_OUT = "Leave it out"
_EXPLAINED = {
    "[batch_size *N] counts the sequences of all devices together. With several devices, multiply "
    "your number by the number of devices": (
        "per_device_train_batch_size training.local_batch_size device_batch_size"
    ),
    "a step has [batch_size N] times [gradient_accumulation_steps N] sequences. Give both": (
        "global_batch_size train.global_batch_size training.global_batch_size total_batch_size"
    ),
    f"evaluations also use [batch_size N], which does not change their results. {_LEAVE_OUT}": (
        "per_device_eval_batch_size eval_batch_size per_gpu_eval_batch_size eval_accumulation_steps"
    ),
    f"an evaluation reads all of the validation data. {_LEAVE_OUT}, or hold out less with "
    "[validation_fraction 0.001]": "eval_iters eval.max_iters eval_batches limit_val_batches",
    "the same command with the same [output DIR] continues the run from the newest checkpoint. "
    f"{_LEAVE_OUT}, or continue from an older checkpoint with [resume STEP]": (
        "resume_from_checkpoint resume_from auto_resume checkpoint.load_step resume_training"
    ),
    "[checkpoint *DIR] starts from that model's weights, and [model DIR/config.json] from its "
    "architecture alone": "model_name_or_path model_name model_id model_path init_from model.name",
    "[eval_steps N] sets the steps between evaluations, and [validation_fraction 0] turns them "
    "off": "eval_strategy evaluation_strategy do_eval",
    "[save_steps N] sets the steps between checkpoints": (
        "save_strategy always_save_checkpoint checkpoint.enable"
    ),
    "[logging_steps N] sets the steps between lines of metrics": "logging_strategy",
    "[min_lr_ratio 0.1] sets the final rate as a share of the peak rate [lr X]": (
        "min_lr train.min_lr lr_end"
    ),
    f"the learning rate decays until the end of the run, which [max_steps N] sets. {_LEAVE_OUT}": (
        "lr_decay_iters lr_decay_steps num_training_steps"
    ),
    "[scheduler constant] turns the decay off": "decay_lr",
    "[min_lr_ratio X], [num_cycles X] and [power X] shape the schedule": "lr_scheduler_kwargs",
    "[beta1 X], [beta2 X] and [eps X] are the optimizer's settings": "optim_args betas",
    f"the tokenizer sets the vocabulary size. {_LEAVE_OUT}, or train a tokenizer of another "
    "size with [tokenizer train:8000]": "vocab_size padded_vocab_size",
    "all devices that JAX finds are used, and [mesh data=2] sets how they share the work. "
    f"{_LEAVE_OUT}, or choose devices with CUDA_VISIBLE_DEVICES=0 or JAX_PLATFORMS=cpu before the "
    "command": (
        "device devices gpus gpu num_gpus n_gpu ngpu nproc_per_node use_cpu no_cuda cuda "
        "accelerator local_rank device_map gpu_ids"
    ),
    "[distributed] joins the processes of several hosts, which meet at [coordinator_address "
    "HOST:PORT]": (
        "main_process_ip main_process_port master_addr master_port backend ddp_backend "
        "rdzv_endpoint strategy"
    ),
    f"weights are sharded over all devices anyway. {_LEAVE_OUT}, or set the split with "
    "[mesh fsdp=2]": "fsdp fsdp_config deepspeed zero_stage",
    "layers are not split into stages. Split the weights with [mesh fsdp=2] or [mesh tensor=2]": (
        "pp_size pipeline_model_parallel_size parallelism.pipeline_parallel_degree"
    ),
    "the best choice for the device is made automatically, and the first lines of a run's "
    f"output name it. {_LEAVE_OUT}": (
        "attn_implementation use_flash_attention flash_attn use_flash_attn flash_attention tf32 "
        "torch_compile compile compile.enable training.compile use_liger_kernel jit"
    ),
    "[lora_rank 16] trains an adapter, with [lora_alpha X] and [lora_targets q_proj]": (
        "use_peft use_lora lora lora_r lora_target_modules peft_config finetuning_type"
    ),
    "[lora_rank 16] with [lora_base_dtype nf4] trains an adapter over weights in 4 bits, and with "
    "[lora_base_dtype int8] in 8": (
        "qlora load_in_4bit load_in_8bit quantization quantize quantization_bit bits"
    ),
    f"every run trains, evaluates, and writes its model to final/ in [output DIR]. {_LEAVE_OUT}": (
        "do_train do_predict eval_only save_safetensors save_only_model push_to_hub "
        "prediction_loss_only"
    ),
    "the configuration of a data set on the hub is part of its name: [data NAME:CONFIG]": (
        "dataset_config_name dataset_config subset"
    ),
    "all data is read. To shorten a run, use [max_steps N]": (
        "max_train_samples max_eval_samples max_samples"
    ),
    "[temperature 0.8] samples tokens, and [temperature 0] always takes the likeliest": (
        "do_sample num_beams num_beam_groups"
    ),
    "TensorBoard's files are in logs/ in [output DIR]. " + _LEAVE_OUT: "logging_dir log_dir tb_dir",
    "[validation_fraction 0.05] holds out 5 % of the documents": "validation_split_percentage",
}
# Keywords of transformers' and TRL's Trainer that have no counterpart on the command line.
_KEYWORDS = {
    "train_dataset": "pass the data set as train_dataloader=",
    "eval_dataset": "pass the data set as eval_dataloader=",
    **dict.fromkeys(
        ("args", "config"), "each setting is a keyword, such as [lr 5e-5] or [batch_size 8]"
    ),
    **dict.fromkeys(
        ("eval_strategy", "evaluation_strategy", "do_eval"),
        "[eval_steps 100] sets the steps between evaluations of eval_dataloader=",
    ),
    "data_collator": (
        "rows of unequal length are padded and masked without a collator. To build batches in "
        "another way, pass a torch DataLoader with collate_fn= as train_dataloader="
    ),
    "processing_class": "pass a BPETokenizer as tokenizer=",
    "optimizers": "[optimizer adamw], [lr X] and [scheduler cosine] choose them by name",
    "compute_metrics": (
        f"evaluations give loss, perplexity, accuracy and bits per byte. {_LEAVE_OUT}"
    ),
    "resume_from_checkpoint": (
        "train() with the same [output_dir DIR] continues the run from the newest checkpoint. "
        f"{_LEAVE_OUT}, or continue from an older checkpoint with [resume STEP]"
    ),
}
# Flags that are not keywords of `ConsynTrainer`, and how to get their effect in Python.
ELSEWHERE: Mapping[str, str] = {
    **dict.fromkeys(
        (f.name for f in dataclasses.fields(DataOptions) if f.name != "max_tokens"),
        "pass it to get_dataset, and pass the dataset that get_dataset returns as "
        "train_dataloader=",
    ),
    **dict.fromkeys(
        (f.name for f in dataclasses.fields(ModelOptions)),
        "the model that you pass determines it; set it in ConsynLMHeadModel.from_config or "
        "from_pretrained",
    ),
    "data": "pass the data as train_dataloader=, for example get_dataset(PATH)",
    "validation": "pass validation data as eval_dataloader=, for example get_dataset(PATH)",
    "validation_fraction": "pass get_dataset(PATH, split='validation') as eval_dataloader=",
    "data_weights": "pass a MixedDataset as train_dataloader=",
    "streaming": "use the command consyn-train, which can train while it tokenises the data",
    **dict.fromkeys(("topology", "fit"), "use consyn-train --dry_run with this flag"),
    "replay": "use the command consyn-train with this flag",
    **dict.fromkeys(
        (
            *("distributed", "coordinator_address", "num_processes", "process_id"),
            "rendezvous_seconds",
        ),
        "call jax.distributed.initialize, or use the command consyn-train",
    ),
}
_VALUES: Mapping[str, Mapping[str, str]] = {
    "optimizer": {
        **dict.fromkeys(
            ("adam", "adamw_torch", "adamw_hf", "adamw_torch_fused", "adamw_bnb_8bit"), "adamw"
        ),
        **dict.fromkeys(("adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"), "adamw"),
        "lion_32bit": "lion",
    },
    "scheduler": {
        "cosine_with_min_lr": "cosine",
        "warmup_stable_decay": "wsd",
        "reduce_lr_on_plateau": "plateau",
    },
    "logging_backend": {"all": "both"},
    "mixed_precision": {
        **dict.fromkeys(("bfloat16", "bf16-true", "bf16-mixed", "torch.bfloat16"), "bf16"),
        **dict.fromkeys(("float16", "half", "16-true", "16-mixed", "torch.float16"), "fp16"),
        **dict.fromkeys(("float32", "fp32", "32", "32-true", "torch.float32"), "no"),
    },
    "gradient_checkpointing": {"selective": "attention", "true": "full", "false": "none"},
}
FOREIGN = {
    name: advice
    for table in (_SAME_NAME, _EXPLAINED)
    for advice, names in table.items()
    for name in names.split()
}
_MARKER = re.compile(r"\[(\w+)(?: ([^\]]*))?\]")
_PLACEHOLDERS = ("DIR", "STEP", "NAME", "PATH", "KEY", "FILE")
_OFF = ("false", "0", "no", "none", "off")


def named_flags(advice: str) -> Iterator[str]:
    """Yield the name of each flag in `advice`, where flags are written [NAME] or [NAME VALUE]."""
    return (match[1] for match in _MARKER.finditer(advice))


def advise(name: str, value: Any, known: Mapping[str, Flag], style: str) -> str | None:
    """Advise on a setting's name from another trainer.

    Args:
        name: the unknown name, without leading dashes.
        value: the user's value; None if there was none.
        known: the flags of this command.
        style: "flag", "keyword" or "file": how the advice writes flags.

    Returns:
        The end of a sentence about the unknown name; None if no known trainer uses the name.

    >>> from consyn_jax.config import RunConfig
    >>> from consyn_jax.flags import flags
    >>> advise("num_train_epochs", "3", flags(RunConfig), "flag")
    '; write --epochs 3.'
    """
    table = FOREIGN | (_KEYWORDS if style == "keyword" else {})
    if name not in table:  # the name may be misspelt
        close = get_close_matches(name, [*table, *known], n=1, cutoff=0.85)
        name = close[0] if close and close[0] in table else name
    advice = table.get(name)
    if style == "keyword" and (moved := _elsewhere(name, advice)):
        return f": {moved}."
    if advice is None or not {"config", "output_dir", *known} >= set(named_flags(advice)):
        return None
    is_literal = advice.startswith("[") and advice.endswith("]") and "*" not in advice
    if is_literal and value is not None and str(value).lower() in _OFF:
        return f". {_LEAVE_OUT}."
    written = _MARKER.sub(lambda match: _written(match, value, known, style), advice)
    is_renaming = advice.startswith("[") and advice.find("]") == len(advice) - 1
    return f"; write {written}." if is_renaming else f": {written}."


def _elsewhere(name: str, advice: str | None) -> str | None:
    """Explain how to get the effect of a flag that `ConsynTrainer` lacks; None for other flags."""
    flags = [name] if advice is None else list(named_flags(advice))
    return next((ELSEWHERE[flag] for flag in flags if flag in ELSEWHERE), None)


def _written(match: re.Match[str], value: Any, known: Mapping[str, Flag], style: str) -> str:
    """Write a flag in the given style, for example --epochs 3.

    Args:
        match: the flag in a text of advice, written [NAME] or [NAME VALUE]. An asterisk in
            VALUE stands for the user's value.
        value: the user's value.
    """
    name, text = match[1], match[2] or ""
    flag = known.get(name)
    if "*" in text:
        before, _, placeholder = text.partition("*")
        text = before + _own_value(flag, value, placeholder)
    if style == "flag":
        return f"--{name} {text}".rstrip()
    if style == "file":
        return f"{name}: {text or 'true'}"
    text = {"true": "True", "false": "False"}.get(text, text) or "True"
    is_text = (
        flag is not None
        and flag.type is str
        and text not in ("DIR", "STEP", "NAME", "PATH", "KEY", "FILE")
    )
    return f"{name}={text!r}" if is_text else f"{name}={text}"


def _own_value(flag: Flag | None, value: Any, placeholder: str) -> str:
    """The user's value in the form of our flag, or a placeholder if it does not fit the flag."""
    given = " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    if flag is not None and flag.choices:
        given = _VALUES.get(flag.name, {}).get(given.lower(), given.lower())
        return given if given in flag.choices else "|".join(flag.choices)
    if value is None or not given or len(given) > 200:
        return placeholder
    if flag is not None and flag.type in (int, float) and not _is_number(given, flag.type):
        return placeholder
    return given


def _is_number(text: str, kind: type) -> bool:
    try:
        number = float(text.replace("_", ""))
    except ValueError:
        return False
    return number > 0 and (kind is float or number == int(number))
