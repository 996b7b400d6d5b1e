"""Loss, rewards and gradients of 50 pairs against TRL's `DPOTrainer`, from the same rows."""

import json
import random
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from stories_model import stories_tokenizer
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from consyn_jax.data.sources.row_formats.preference_rows import shared
from consyn_jax.model import ConsynLMHeadModel
from consyn_jax.tokenization import load_tokenizer
from consyn_jax.training import ConsynTrainer
from consyn_jax.training.dataset import get_dataset
from consyn_jax.training.preference.reference import make_ready

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
PAIRS, LENGTH, BETA = 50, 64, 0.3
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def text_rows(stories: str) -> list[dict[str, str]]:
    """Beginnings of stories with their own words, and with the same in another order."""
    words, draw, rows = stories.split(), random.Random(1), []
    for i in range(PAIRS):
        part = words[40 * i : 40 * i + draw.randint(8, 24)]
        answer = part[4:]
        other = draw.sample(answer, len(answer))[: draw.randint(2, 20)]
        prompt = " ".join(part[:4]) + (" " if i % 7 == 0 else "")
        space = "" if i % 7 == 0 else " "
        rows.append(
            {
                "prompt": prompt,
                "chosen": space + " ".join(answer),
                "rejected": space + " ".join(other),
            }
        )
    return rows


def chat_rows(stories: str) -> list[dict[str, Any]]:
    """The same as messages."""
    rows: list[dict[str, Any]] = []
    for row in text_rows(stories):
        asked = [{"role": "user", "content": row["prompt"]}]
        answers = {
            name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")
        }
        rows.append({"prompt": asked, **answers})
    return rows


@pytest.fixture(scope="module")
def models(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small llama, and one near it, in transformers' layout."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        tie_word_embeddings=False,
    )
    model, places = LlamaForCausalLM(shape), {}
    tokenizer = stories_tokenizer(shared_data / "parity" / "stories260K" / "tok512.bin")
    for name in ("reference", "policy"):
        places[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(places[name])
        tokenizer.save(places[name])
        with torch.no_grad():
            for weight in model.parameters():
                weight += 0.02 * torch.randn_like(weight)
    return places


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_a_step_of_50_pairs(
    kind: str, models: dict[str, Path], shared_data: Path, tmp_path: Path
) -> None:
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    stories = (shared_data / "tinystories" / "tiny_stories.txt").read_text()
    rows = text_rows(stories) if kind == "text" else chat_rows(stories)
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    theirs = AutoTokenizer.from_pretrained(models["policy"], split_special_tokens=False)
    tokenizer = load_tokenizer(str(models["policy"]))
    if kind == "chat":
        theirs.chat_template = CHATML
        tokenizer = tokenizer.with_chat_template(CHATML)
    policy, reference = (
        LlamaForCausalLM.from_pretrained(models[name]) for name in ("policy", "reference")
    )
    trainer = DPOTrainer(
        policy,
        reference,
        DPOConfig(
            str(tmp_path / "trl"),
            beta=BETA,
            max_length=LENGTH + 1,
            per_device_train_batch_size=PAIRS,
            report_to=[],
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=theirs,
    )
    batch = trainer.data_collator([dict(row) for row in trainer.train_dataset])
    policy.train()
    loss = trainer.compute_loss(policy, dict(batch))
    loss.backward()
    expected = {name: values[0] for name, values in trainer._metrics["train"].items()}

    pairs = get_dataset(file, tokenizer, LENGTH, row_format="preference", validation_fraction=0)
    found = pairs.packed.rows(np.arange(len(pairs)))
    ids = batch["input_ids"].numpy()
    assert len(pairs) == len(ids) // 2
    masks = batch["completion_mask"].numpy()
    for i in range(len(pairs)):
        for half, theirs_at in ((0, i), (1, len(pairs) + i)):
            part = slice(half * LENGTH, (half + 1) * LENGTH)
            learned = found["labels"][i, part][found["loss_mask"][i, part]]
            np.testing.assert_array_equal(learned, ids[theirs_at][masks[theirs_at] == 1])

    made = ConsynTrainer(
        ConsynLMHeadModel.from_pretrained(str(models["policy"])),
        pairs,
        output_dir=tmp_path / "run",
        max_steps=1,
        batch_size=len(pairs),
        mesh="context=8" if jax.device_count() == 8 else "auto",
        objective="dpo",
        dpo_beta=BETA,
        mixed_precision="no",
    )
    program = made.build().program
    start = ConsynLMHeadModel.from_pretrained(str(models["reference"])).parameters
    make_ready(made.run_inputs(), made.run, tmp_path / "run", start, {})
    whole = pairs.packed.rows(np.arange(len(pairs)))
    with jax.set_mesh(program.mesh):
        (total, sums), gradients = jax.jit(jax.value_and_grad(program.objective, has_aux=True))(
            made.parameters(program.mesh), whole
        )
    means = {name: float(value) for name, value in sums.means(sums.terms).items()}
    assert float(total) / len(pairs) == pytest.approx(loss.item(), abs=1e-5)
    for name, value in means.items():
        if name != "loss":
            assert value == pytest.approx(expected[name], rel=1e-5, abs=1e-5), name
    assert abs(expected["rewards/margins"]) > 0.01
    theirs_f32 = gradients_of(policy)
    compared = in_their_layout(jax.tree.map(lambda g: np.asarray(g) / len(pairs), gradients))
    assert compared.keys() == theirs_f32.keys()
    # The largest distances of 21 tensors, text and chat, by the norm of each: 4.0e-6 and 3.3e-6
    # from TRL, 4.7e-6 and 2.6e-6 from TRL in float64, whose own float32 is 3.0e-6 and 2.6e-6 from
    # that. Single elements that are almost zero are further apart than 1e-5 of their own size.
    exact = exact_gradients(trainer, policy, reference, dict(batch))
    for name, gradient in compared.items():
        found, want = gradient[: len(theirs_f32[name])], theirs_f32[name]
        assert apart(found, want) < 1e-5, name
        assert apart(found, exact[name]) < 1e-5, name


def in_their_layout(gradients: Any) -> dict[str, np.ndarray]:
    """All of our gradients by the names, and in the shapes, of transformers' llama."""
    found = {
        "lm_head.weight": gradients["output"],
        "model.embed_tokens.weight": gradients["embedding"],
        "model.norm.weight": gradients["norm"],
    }
    for layer in range(2):
        own = {name: g[layer] for name, g in gradients["layers"].items()}
        before = f"model.layers.{layer}."
        for name in ("gate", "up", "down"):
            found[f"{before}mlp.{name}_proj.weight"] = own[name].T
        for name in ("q", "k", "v"):
            found[f"{before}self_attn.{name}_proj.weight"] = own[name].reshape(32, -1).T
        found[f"{before}self_attn.o_proj.weight"] = own["o"].reshape(-1, 32).T
        found[f"{before}input_layernorm.weight"] = own["attention_norm"]
        found[f"{before}post_attention_layernorm.weight"] = own["mlp_norm"]
    return found


def gradients_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: p.grad.numpy().copy() for name, p in model.named_parameters()}


def exact_gradients(
    trainer: Any, policy: LlamaForCausalLM, reference: LlamaForCausalLM, batch: dict[str, Any]
) -> dict[str, np.ndarray]:
    """TRL's loss of the same models in float64; transformers computes norms and angles in it too.

    Its llama casts to float32 for those, whatever the type of the model is.
    """
    for model in (policy.double(), reference.double()):
        model.model.rotary_emb.register_forward_hook(in_double)
        for module in model.modules():
            if isinstance(module, LlamaRMSNorm):
                module.register_forward_hook(norm_in_double)
    policy.zero_grad()
    trainer.compute_loss(policy, batch).backward()
    return gradients_of(policy)


def norm_in_double(module: Any, inputs: tuple[torch.Tensor], _: torch.Tensor) -> torch.Tensor:
    (x,) = inputs
    assert x.dtype == torch.float64
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
    return module.weight * (x * scale)


def in_double(module: Any, inputs: tuple[Any, ...], outputs: Any) -> Any:
    """Cosines and sines of the angles, [B, T, H] each."""
    positions, size = inputs[-1] if len(inputs) > 1 else None, outputs[0].shape
    places = torch.arange(size[1]) if positions is None else positions[0]
    pairs = 10_000.0 ** (-torch.arange(0, size[2], 2, dtype=torch.float64) / size[2])
    angles = torch.outer(places.double(), pairs).repeat(1, 2)[None].expand(size)
    return angles.cos(), angles.sin()


def apart(found: np.ndarray, wanted: np.ndarray) -> float:
    """Norm of the difference by the norm of what is wanted."""
    difference = found.astype(np.float64) - wanted
    return float(np.linalg.norm(difference) / np.linalg.norm(wanted.astype(np.float64)))


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [("a b c", "a b d"), ("a bc", "a bd"), ("x", "y z"), ("a", "a"), ("ab", "a")],
)
def test_the_prompt_that_both_answers_begin_with(chosen: str, rejected: str) -> None:
    from trl.data_utils import extract_prompt

    size = shared(chosen, rejected)
    assert chosen[:size] == extract_prompt({"chosen": chosen, "rejected": rejected})["prompt"]
