"""Sampling from flags and the model's generation_config.json."""

import pytest

from consyn_jax.errors import UserError
from consyn_jax.inference.text_generation.generation_options import SamplingOptions
from consyn_jax.inference.text_generation.sampling_choice import choose_sampling, described
from consyn_jax.model.generation.draws import Sampling

QWEN = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "max_new_tokens": 9}


def test_the_models_file_decides_and_flags_win() -> None:
    found = choose_sampling(SamplingOptions(), QWEN)
    assert found.sampling == Sampling(0.6, 20, 0.95)
    assert found.max_tokens == 9
    assert "temperature 0.6" in found.notes[0]
    flags = SamplingOptions(temperature=1.0, top_k=0, max_tokens=3, seed=7)
    found = choose_sampling(flags, QWEN)
    assert found.sampling == Sampling(1.0, None, 0.95, seed=7)
    assert found.max_tokens == 3
    assert found.notes == ("From the model's generation_config.json: top_p 0.95.",)


def test_without_do_sample_the_likeliest_token_is_taken() -> None:
    found = choose_sampling(SamplingOptions(), {"temperature": 0.6, "repetition_penalty": 1.1})
    assert found.sampling == Sampling(0.0, repetition_penalty=1.1)
    assert found.max_tokens == 256
    assert described(found.sampling) == "the likeliest token, repetition_penalty 1.1"
    assert choose_sampling(SamplingOptions(min_p=0.1), {}).sampling == Sampling(1.0, min_p=0.1)


def test_what_has_no_effect_is_refused_or_said() -> None:
    with pytest.raises(UserError, match="--top_p has no effect at --temperature 0"):
        choose_sampling(SamplingOptions(temperature=0.0, top_p=0.5), QWEN)
    several = r"^--num_return_sequences 3 would repeat one text.* Add --temperature 1, or leave"
    for defaults in ({}, {"temperature": 0.6}):
        with pytest.raises(UserError, match=several):
            choose_sampling(SamplingOptions(num_return_sequences=3), defaults)
    assert (
        choose_sampling(SamplingOptions(num_return_sequences=3), QWEN).sampling.temperature == 0.6
    )
    with pytest.raises(UserError, match=r"^--top_p must be above 0 and at most 1, not 2"):
        choose_sampling(SamplingOptions(top_p=2.0), {})
    notes = choose_sampling(SamplingOptions(), {"num_beams": 4, "typical_p": 1.0}).notes
    assert notes == (
        "The model's generation_config.json sets num_beams, which is not supported and has no "
        "effect.",
    )
