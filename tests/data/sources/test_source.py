import dataclasses

from consyn_jax.data.sources.source import READERS
from consyn_jax.prepare_config import CorpusOptions


def test_every_type_that_a_user_can_choose_has_a_reader() -> None:
    (field,) = (f for f in dataclasses.fields(CorpusOptions) if f.name == "dataset_type")
    assert set(field.metadata["choices"]) - {"auto"} <= READERS.keys()
