"""What llama.cpp makes of our GGUF files: texts, first tokens, ids, special tokens, template.

llama.cpp multiplies Q8_0 weights with activations that it rounds to 8 bits, too. So its own
quantiser is the control: the same F32 file through `llama_model_quantize`. The tensors of both files
are compared byte by byte, and our Q8_0 weights also run here with float32 products.

Needs `pip install llama-cpp-python gguf`, which builds llama.cpp (a quarter of an hour on two
cores), and the shared data, at ../shared/data or where CONSYN_TEST_DATA says. CI compares logits
alone (`tests/inference/conversion/test_gguf.py`). Nothing here is timed.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import struct
import tempfile
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf
import jax
import jax.numpy as jnp
import llama_cpp
import numpy as np
from harness import facts, write
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors

from consyn_jax.inference.conversion.gguf_file import read_back, write_gguf
from consyn_jax.inference.model_source import ModelSource, find_source
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.model_config import ModelConfig
from consyn_jax.tokenization import BPETokenizer

SHARED = Path(os.environ.get("CONSYN_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
TOKENS, TEXTS, PROMPTS, PROMPT_LENGTH = 100, 20, 200, 24
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CORPORA = (
    "tinystories/tiny_stories.txt",
    "tinyshakespeare/input.txt",
    "wikitext-2",
    "gutenberg",
    "jsonl",
)
BY_HAND = (
    "Hello, world! It's 12345 o'clock;\n\n\tdef f(x):\n        return x**2  # ok\n",
    "Grüße aus Köln, señor — naïve café №5 ½ x² ≠ 🙂👩‍👩‍👧",
    "Привет, мир! Съешь же ещё этих мягких французских булок.",
    "我想在apple工作1314151天~ こんにちは世界、元気ですか",
    "    four spaces,\ttab,\r\nwindows line,   and trailing   ",
    "camelCaseWord HTTPServer XMLHttpRequest2 snake_case_99 3.14159 1,000,000",
    "i've I'VE you'll WE'RE don't 'tis rock'n'roll",
    "<|eos|> <s> </s> [INST] are text here",
)
MARKS = ("नमस्ते दुनिया", "مَرْحَبًا", "สวัสดีชาวโลก", "cafe\u0301 naï\u0308ve", "ÀÉÎ élÈve ÜBERgroß")


def sentencepiece_tokenizer() -> BPETokenizer:
    """The tokenizer of stories260K as a tokenizer.json in the form of Llama 2's.

    From the file of llama2.c: (score, length, piece) of each id.
    """
    data = (SHARED / "parity" / "stories260K" / "tok512.bin").read_bytes()
    pieces: list[tuple[str, float]] = []
    at = 4
    while at < len(data):
        score, length = struct.unpack_from("<fi", data, at)
        at += 8 + length
        pieces.append((data[at - length : at].decode().replace(" ", "▁"), score))
    special = ["<unk>", "<s>", "</s>"]
    ids = {name: i for i, name in enumerate([*special, *(piece for piece, _ in pieces[3:])])}
    by_score = sorted(dict(pieces[259:]).items(), key=lambda item: -item[1])
    merges = [
        (piece[:i], piece[i:])
        for piece, _ in by_score
        for i in range(1, len(piece))
        if piece[:i] in ids and piece[i:] in ids
    ]
    made = Tokenizer(models.BPE(vocab=ids, merges=merges, unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    made.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])
    return BPETokenizer(made.to_str())


def random_source(tokenizer: BPETokenizer, **more: Any) -> ModelSource:
    """A random model in the shape of haiku, whose logits have a spread as a trained one's."""
    sizes = {"hidden_dim": 128, "num_layers": 4, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32}
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        **sizes,
        mlp_dim=384,
        context=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **more,
    )
    params = ConsynLMHeadModel.from_config(config, seed=1).parameters
    params = jax.tree.map(lambda leaf: leaf * 3 if leaf.ndim > 2 else leaf, params)
    return ModelSource("random", "random", Path(), config, tokenizer, lambda mesh, dtype: params)


def opened(file: Path, **more: Any) -> llama_cpp.Llama:
    """llama.cpp without its 16-bit cache, so that only the weights are rounded."""
    return llama_cpp.Llama(
        str(file),
        n_ctx=256,
        verbose=False,
        n_threads=1,
        n_threads_batch=1,
        type_k=0,
        type_v=0,
        **more,
    )


def greedy(llama: llama_cpp.Llama, ids: list[int], count: int) -> list[int]:
    llama.reset()
    found: list[int] = []
    feed = ids
    for _ in range(count):
        llama.eval(feed)
        logits = np.ctypeslib.as_array(
            llama_cpp.llama_get_logits_ith(llama.ctx, -1), (llama.n_vocab(),)
        )
        feed = [int(np.argmax(logits))]
        found += feed
    return found


def texts(source: ModelSource, prompts: list[list[int]], folder: Path) -> dict[str, Any]:
    """Greedy continuations in F32, and first tokens in Q8_0."""
    params = source.parameters()
    model = ConsynLMHeadModel.from_parameters(source.config, params)
    file = folder / "f32.gguf"
    write_gguf(file, source, params, "float32")
    ours = np.asarray(model.generate(jnp.array(prompts[:TEXTS]), TOKENS, stop_at_eos=False))
    llama, same = opened(file), 0
    for prompt, text in zip(prompts, ours[:, PROMPT_LENGTH:].tolist(), strict=False):
        same += greedy(llama, prompt, TOKENS) == text
    llama.close()
    found = {"greedy_equal": f"{same} of {TEXTS}"}
    return found | q8_0(source, model, params, prompts, folder)


def q8_0(
    source: ModelSource, model: Any, params: Any, prompts: list[list[int]], folder: Path
) -> dict[str, Any]:
    """First tokens of Q8_0 files, ours and llama.cpp's own, against the float32 model."""
    write_gguf(folder / "q8.gguf", source, params, "q8_0")
    own_quantiser(folder / "f32.gguf", folder / "control.gguf")
    ours, control = (tensors(folder / name) for name in ("q8.gguf", "control.gguf"))
    equal = [name for name, value in ours.items() if np.array_equal(value, control[name])]
    exact = last_logits(model, prompts)
    rounded = ConsynLMHeadModel.from_parameters(
        source.config, read_back(folder / "q8.gguf", source.config)
    )
    runs = {
        "llama.cpp, F32": llama_logits(folder / "f32.gguf", prompts),
        "llama.cpp, our Q8_0": llama_logits(folder / "q8.gguf", prompts),
        "llama.cpp, its own Q8_0": llama_logits(folder / "control.gguf", prompts),
        "here, our Q8_0 weights in float32": last_logits(rounded, prompts),
    }
    best = np.sort(exact, -1)
    margin = best[:, -1] - best[:, -2]
    first = exact.argmax(-1)
    found: dict[str, Any] = {"tensors_equal_to_its_own": f"{len(equal)} of {len(ours)}"}
    for name, logits in runs.items():
        differ = np.flatnonzero(logits.argmax(-1) != first)
        found[name] = {
            "first_token": 1 - len(differ) / len(first),
            "largest_difference_of_a_logit": float(np.abs(logits - exact).max()),
            "lead_of_the_best_where_they_differ": np.round(margin[differ], 4).tolist(),
        }
    found["its own Q8_0 gives ours"] = float(
        np.mean(runs["llama.cpp, our Q8_0"] == runs["llama.cpp, its own Q8_0"])
    )
    found["lead_of_the_best_median"] = float(np.median(margin))
    for file in folder.glob("*.gguf"):
        file.unlink()
    return found


def own_quantiser(file: Path, target: Path) -> None:
    """llama.cpp's own Q8_0 of an F32 file."""
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.nthread = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, 1
    paths = (str(path).encode() for path in (file, target))
    assert llama_cpp.llama_model_quantize(*paths, ctypes.byref(options)) == 0


def tensors(file: Path) -> dict[str, np.ndarray]:
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(file).tensors}


def last_logits(model: Any, prompts: list[list[int]]) -> np.ndarray:
    return np.asarray(jax.jit(lambda ids: model(ids)[:, -1])(jnp.array(prompts)))


def llama_logits(file: Path, prompts: list[list[int]]) -> np.ndarray:
    llama, found = opened(file), []
    for prompt in prompts:
        llama.reset()
        llama.eval(prompt)
        logits = llama_cpp.llama_get_logits_ith(llama.ctx, -1)
        found.append(np.array(np.ctypeslib.as_array(logits, (llama.n_vocab(),))))
    llama.close()
    return np.array(found)


def corpus() -> list[str]:
    """Lines of the shared corpora, and some by hand."""
    lines = list(BY_HAND)
    for name in CORPORA:
        path = SHARED / name
        files = [path] if path.is_file() else sorted(path.rglob("*"))
        for file in [f for f in files if f.suffix in (".txt", ".md", ".jsonl", ".raw", "")][:3]:
            if file.is_file():
                text = file.read_bytes()[:40_000].decode("utf-8", "ignore")
                lines += [text[at : at + 400] for at in range(0, len(text), 400)]
    return lines


def ids(source: ModelSource, folder: Path) -> dict[str, Any]:
    """Texts whose ids in llama.cpp are ours, special tokens, and the chat template."""
    tokenizer = source.tokenizer
    assert tokenizer is not None
    file = folder / "vocabulary.gguf"
    notes = write_gguf(file, source, source.parameters(), "float32")
    llama = llama_cpp.Llama(str(file), vocab_only=True, verbose=False)

    def equal(lines: list[str]) -> int:
        return sum(
            llama.tokenize(line.encode(), add_bos=False, special=False) == tokenizer.encode(line)
            for line in lines
        )

    lines = corpus()
    special = [n for n in tokenizer.special_tokens.values() if n]
    result = {
        "texts": len(lines),
        "equal": equal(lines),
        "with marks": f"{equal(list(MARKS))} of {len(MARKS)}",
        "begins with BOS": llama.tokenize(b"a", add_bos=True)[0] == tokenizer.bos_token_id
        if tokenizer.first_id is not None
        else llama.tokenize(b"a", add_bos=True) == tokenizer.encode("a"),
        "bos, eos": (llama.token_bos(), llama.token_eos())
        if tokenizer.bos_token_id is not None
        else llama.token_eos(),
        "special tokens": all(
            llama.tokenize(n.encode(), add_bos=False, special=True)[-1]
            == tokenizer_id(tokenizer, n)
            for n in special
        ),
        "chat template": llama.metadata.get("tokenizer.chat_template") == tokenizer.chat_template,
        "notes": notes,
    }
    llama.close()
    file.unlink()
    return result


def tokenizer_id(tokenizer: BPETokenizer, name: str) -> int:
    number = Tokenizer.from_str(tokenizer.to_json()).token_to_id(name)
    assert number is not None
    return number


def main() -> None:
    """Compare, print and record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--model", help="a trained model, compared as well, on prompts of WikiText-2"
    )
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    found: dict[str, Any] = {}
    piece_tokenizer = sentencepiece_tokenizer()
    story = (SHARED / "tinystories" / "tiny_stories.txt").read_text()
    stream = piece_tokenizer.encode(story[:60_000])
    prompts = [stream[at : at + PROMPT_LENGTH] for at in rng.integers(0, len(stream) - 99, PROMPTS)]
    stories = find_source(SHARED / "parity" / "stories260K" / "hf")
    stories = replace(stories, tokenizer=piece_tokenizer)
    gpt2 = BPETokenizer.from_file(SHARED / "tokenizers" / "gpt2")
    with tempfile.TemporaryDirectory() as folder:
        found["stories260K"] = texts(stories, prompts, Path(folder))
        print(found, flush=True)
        if options.model:
            trained = find_source(options.model)
            own = trained.tokenizer
            assert own is not None
            ids_of = own.encode((SHARED / "wikitext-2" / "test.txt").read_text()[:200_000])
            starts = rng.integers(0, len(ids_of) - 99, PROMPTS)
            found["trained"] = texts(
                trained, [ids_of[at : at + PROMPT_LENGTH] for at in starts], Path(folder)
            )
            print(found["trained"], flush=True)
        byte_tokenizer = BPETokenizer.bytes()
        source = random_source(byte_tokenizer)
        drawn = rng.integers(0, 256, (PROMPTS, PROMPT_LENGTH)).tolist()
        found["random qwen3"] = texts(source, drawn, Path(folder))
        print(found["random qwen3"], flush=True)
        cases = {
            "SentencePiece (stories260K)": stories,
            "bundled (o200k)": random_source(BPETokenizer().with_chat_template(TEMPLATE)),
            "gpt2": random_source(gpt2),
        }
        for name, case in cases.items():
            found[f"ids: {name}"] = ids(case, Path(folder))
            print(name, found[f"ids: {name}"], flush=True)
    if options.output is not None:
        theirs = {name: version(name) for name in ("llama-cpp-python", "gguf")}
        write(options.output, {**facts(), "compared_with": theirs, "results": found})


if __name__ == "__main__":
    main()
