"""Small tokenizers and models as people publish them: the files of Qwen3, Llama 3 and Llama 2."""

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    processors,
    trainers,
)
from tokenizers import pre_tokenizers as pre

TEXT = [
    "The quick brown fox doesn't jump over 12345 lazy dogs. <s> and </s> are plain words here.",
    "Größe, naïve café, 日本語 and emoji 👩‍👩‍👧; e\u0301 is decomposed.",
    "def f(x):\n    return x + 1  # two  spaces\n\n\ttabs\r\n",
    "You are a helpful assistant. What is 2 + 2? It is 4. Hello world, hello there.",
]
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA_WORDS = QWEN_WORDS.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
# As in Qwen2.5's tokenizer_config.json, without its default system prompt and tools.
QWEN_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + "
    "message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# As in Llama 3's.
LLAMA_TEMPLATE = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
CHAT = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "What is 2 + 2?"},
]


def _byte_level(words: str, special: list[str], normalizer: Any, size: int = 420) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre.Sequence(
        [
            pre.Split(Regex(words), "isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        TEXT * 3,
        trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=pre.ByteLevel.alphabet(), show_progress=False
        ),
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    return tokenizer


def _write(directory: Path, tokenizer: Tokenizer | None, files: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content, indent=2)
        (directory / name).write_text(text, encoding="utf-8")
    return directory


def _added(tokenizer: Tokenizer) -> dict[str, Any]:
    flags = ("content", "lstrip", "normalized", "rstrip", "single_word", "special")
    decoder = tokenizer.get_added_tokens_decoder()
    return {str(i): {name: getattr(token, name) for name in flags} for i, token in decoder.items()}


def qwen(directory: Path, template_in_file: bool = False) -> Path:
    """Qwen3's tokenizer: no BOS, `<|im_end|>` ends, and `<s>` is an ordinary word."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    content = json.loads(_byte_level(QWEN_WORDS, [], normalizers.NFC()).to_str())
    vocabulary = content["model"]["vocab"]
    for left, right in (("<", "s"), ("<s", ">"), ("<", "/"), ("</", "s"), ("</s", ">")):
        if left + right not in vocabulary:
            vocabulary[left + right] = len(vocabulary)
        if [left, right] not in content["model"]["merges"]:
            content["model"]["merges"].insert(0, [left, right])
    content["model"]["merges"].sort(key=lambda pair: len("".join(pair)))
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.add_tokens([AddedToken("<think>", normalized=False), AddedToken("</think>")])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": _added(tokenizer),
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 131072,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    files: dict[str, Any] = {"tokenizer_config.json": config}
    if template_in_file:
        files["chat_template.jinja"] = QWEN_TEMPLATE
    else:
        config["chat_template"] = QWEN_TEMPLATE
    ends = [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]
    files["generation_config.json"] = {
        "bos_token_id": ends[1],
        "do_sample": True,
        "eos_token_id": ends,
        "pad_token_id": ends[1],
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "transformers_version": "4.51.0",
    }
    return _write(directory, tokenizer, files)


def llama3(directory: Path) -> Path:
    """Llama 3's chat tokenizer: BOS by the post-processor, `<|eot_id|>` ends, no PAD."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>"]
    special += ["<|eom_id|>", "<|eot_id|>"]
    tokenizer = _byte_level(LLAMA_WORDS, special, None)
    bos = tokenizer.token_to_id("<|begin_of_text|>")
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A",
                pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
                special_tokens=[("<|begin_of_text|>", bos)],
            ),
        ]
    )
    config = {
        "added_tokens_decoder": _added(tokenizer),
        "bos_token": "<|begin_of_text|>",
        "chat_template": LLAMA_TEMPLATE,
        "clean_up_tokenization_spaces": True,
        "eos_token": "<|eot_id|>",
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 131072,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    ends = [tokenizer.token_to_id(t) for t in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    generation = {
        "bos_token_id": bos,
        "do_sample": True,
        "eos_token_id": ends,
        "temperature": 0.6,
        "top_p": 0.9,
    }
    token_map = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    files = {"tokenizer_config.json": config, "special_tokens_map.json": token_map}
    return _write(directory, tokenizer, {**files, "generation_config.json": generation})


def sentencepiece_json(directory: Path, scheme: str) -> Path:
    """Llama 2's tokenizer as a tokenizer.json, in the older form ("prepend") or the newer ("first")
    that puts a space in front of a text; "unigram" is T5's kind."""
    if scheme == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        trainer: Any = trainers.UnigramTrainer(
            vocab_size=200, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>"
        )
        tokenizer.pre_tokenizer = pre.Metaspace(prepend_scheme="always")
    else:
        bytes_ = [f"<0x{value:02X}>" for value in range(256)]
        tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
        trainer = trainers.BpeTrainer(
            vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
        )
        tokenizer.pre_tokenizer = pre.Metaspace(prepend_scheme="always")
    tokenizer.train_from_iterator(TEXT * 3, trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < 3]
    if scheme == "prepend":
        prepend = [{"type": "Prepend", "prepend": "▁"}]
        replace = [{"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
        content["normalizer"] = {"type": "Sequence", "normalizers": prepend + replace}
        content["pre_tokenizer"] = None
    elif scheme == "first":
        content["pre_tokenizer"]["prepend_scheme"] = "first"
        content["pre_tokenizer"]["split"] = False
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)]
    )
    config = {
        "bos_token": {"__type": "AddedToken", "content": "<s>", "special": True},
        "eos_token": {"__type": "AddedToken", "content": "</s>", "special": True},
        "model_max_length": 4096,
        "pad_token": None,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
    }
    return _write(directory, tokenizer, {"tokenizer_config.json": config})


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def chat_model(directory: Path, kind: str, vocab_size: int = 512) -> Path:
    """A random model of transformers, as "Qwen3" or "Llama", with its tokenizer's files."""
    import torch
    import transformers

    torch.manual_seed(0)
    (qwen if kind == "Qwen3" else llama3)(directory)
    generation = json.loads((directory / "generation_config.json").read_text())
    ends = generation["eos_token_id"]
    config = getattr(transformers, f"{kind}Config")(
        **SIZES,
        vocab_size=vocab_size,
        head_dim=8,
        bos_token_id=generation["bos_token_id"],
        eos_token_id=ends[0] if kind == "Qwen3" else ends,
    )
    kept = (directory / "generation_config.json").read_text()
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(directory)
    (directory / "generation_config.json").write_text(kept)
    return directory
