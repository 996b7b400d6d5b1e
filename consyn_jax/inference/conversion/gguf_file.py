"""Write a GGUF file with the `gguf` package, and read its weights back."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from consyn_jax import __version__
from consyn_jax.errors import UserError, counted
from consyn_jax.inference.conversion.gguf_architecture import (
    Architecture,
    architecture_of,
    model_keys,
    reordered,
    rope_tensors,
    tensor_names,
)
from consyn_jax.inference.conversion.gguf_tokenizer import add_tokenizer
from consyn_jax.model.parameters import Params
from consyn_jax.model.pretrained.tensors import Tensor, hf_tensors
from consyn_jax.model.pretrained.weights import parameters_of, to_host
from consyn_jax.model_config import ModelConfig
from consyn_jax.tokenization import BPETokenizer

if TYPE_CHECKING:
    from consyn_jax.inference.model_source import ModelSource

# Number types: the value of `--dtype`, and its name in gguf.
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}
BLOCK = 32  # elements of a row that share a scale in Q8_0


def require_gguf() -> None:
    """Check that the `gguf` package is installed.

    Raises:
        UserError: The package is missing.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError(
            "--to gguf needs the gguf package of llama.cpp. Install it with pip install "
            "'consyn_jax[gguf]'."
        ) from error


def type_of(tensor: Tensor, dtype: str) -> str:
    """Choose the type of a tensor in a file of `dtype`, as llama.cpp's own converter does.

    Norms and biases are always F32. For Q8_0, a tensor is F16 if its rows cannot be divided into
    blocks.
    """
    if len(tensor.shape) == 1:
        return "F32"
    if dtype == "q8_0" and tensor.shape[-1] % BLOCK:
        return "F16"
    return TYPES[dtype]


def gguf_bytes(config: ModelConfig, dtype: str) -> int:
    """Total size of the tensors in a GGUF file, in bytes."""
    per_element = {"F32": 4.0, "F16": 2.0, "BF16": 2.0, "Q8_0": 34 / BLOCK}
    return int(
        sum(
            np.prod(tensor.shape) * per_element[type_of(tensor, dtype)]
            for tensor in hf_tensors(config)
        )
    )


def write_gguf(
    file: Path,
    source: ModelSource,
    params: Params,
    dtype: str,
    context: int | None = None,
    about: dict[str, str] | None = None,
) -> tuple[str, ...]:
    """Write a model as one GGUF file.

    Tensors are converted one by one, so that only one is in host memory at a time.

    Args:
        params: The weights of `source`.
        dtype: A key of `TYPES`.
        context: Context length to declare, in tokens; by default the model's.
        about: Values of the metadata "name" and "license".

    Returns:
        Sentences on how the file or llama.cpp differs from the model.

    Raises:
        UserError: llama.cpp cannot run this model or its tokenizer, or a value is too large for
            float16.
    """
    import gguf

    config = source.config.saved_as("float32")
    longest = context or config.context
    own = architecture_of(config, longest)
    with closing(gguf.GGUFWriter(file, own.name)) as writer:
        _describe(writer, config, about or {}, dtype)
        model_keys(writer, config, longest)
        notes = _add_tokenizer(writer, source.tokenizer, config)
        _write_tensors(writer, config, own, params, dtype)
    types = [type_of(tensor, dtype) for tensor in hf_tensors(config)]
    if dtype == "q8_0" and "F16" in types:
        coarser = counted(types.count("F16"), "tensor")
        notes = (*notes, f"{coarser} whose row length is not a multiple of {BLOCK} are in F16")
    return notes


def _write_tensors(
    writer: Any, config: ModelConfig, own: Architecture, params: Params, dtype: str
) -> None:
    """Write the header and the tensors, one after the other."""
    extra, name_of = rope_tensors(config), tensor_names(config, own)
    for name, value in extra.items():
        writer.add_tensor_info(name, value.shape, value.dtype, value.nbytes)
    tensors = list(hf_tensors(config))
    for tensor in tensors:
        _declare(writer, name_of(tensor.name), tensor, type_of(tensor, dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for value in extra.values():
        writer.write_tensor_data(value)
    for tensor in tensors:
        value = reordered(config, own, tensor.name, to_host(params, tensor))
        writer.write_tensor_data(_quantised(tensor, value, type_of(tensor, dtype)))
    writer.flush()


def _describe(writer: Any, config: ModelConfig, about: dict[str, str], dtype: str) -> None:
    import gguf

    writer.add_type("model")
    writer.add_name(about.get("name", "model"))
    if about.get("license"):
        writer.add_license(about["license"])
    writer.add_string("general.converted_by", f"consyn_jax {__version__}")
    names = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}
    writer.add_file_type(gguf.LlamaFileType[names.get(dtype, "MOSTLY_Q8_0")])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokenizer(
    writer: Any, tokenizer: BPETokenizer | None, config: ModelConfig
) -> tuple[str, ...]:
    if tokenizer is not None:
        return add_tokenizer(writer, tokenizer, config)
    writer.add_tokenizer_model("none")
    return ("the model has no tokenizer, so llama.cpp reads and writes token ids only",)


def _declare(writer: Any, name: str, tensor: Tensor, kind: str) -> None:
    """Declare a tensor; its data is written later."""
    import gguf

    raw = gguf.GGMLQuantizationType[kind]
    if kind in ("F32", "F16"):
        stored: np.dtype[Any] = np.dtype("float32" if kind == "F32" else "float16")
        shape, size = tensor.shape, int(np.prod(tensor.shape)) * stored.itemsize
    else:
        stored, shape = np.dtype(np.uint8), gguf.quant_shape_to_byte_shape(tensor.shape, raw)
        size = int(np.prod(shape))
    writer.add_tensor_info(name, shape, stored, size, raw)


def _quantised(tensor: Tensor, value: np.ndarray, kind: str) -> np.ndarray:
    """Convert a float32 tensor to its type in the file.

    Raises:
        UserError: A value is too large for float16.
    """
    import gguf

    with np.errstate(over="ignore"):
        stored = gguf.quants.quantize(value, gguf.GGMLQuantizationType[kind])
    if kind == "F16" and np.isinf(stored).any():
        raise UserError(
            f"{tensor.name} has values too large for float16. Set --dtype to bfloat16 or float32."
        )
    return np.ascontiguousarray(stored)


def read_back(file: Path, config: ModelConfig, context: int | None = None) -> Params:
    """Read the weights of a GGUF file written by `write_gguf`, as float32 parameters.

    Raises:
        UserError: A tensor is missing or has another shape.
    """
    import gguf

    config = config.saved_as("float32")
    own = architecture_of(config, context or config.context)
    name_of = tensor_names(config, own)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    shapes = {tensor.name: tensor.shape for tensor in hf_tensors(config)}

    def read(name: str, *index: slice) -> np.ndarray:
        found = tensors.get(name_of(name))
        if found is None:
            raise UserError(f"{file} lacks {name_of(name)}. Write the file again.")
        value = gguf.quants.dequantize(found.data, found.tensor_type).astype(np.float32)
        if value.shape != shapes[name]:
            raise UserError(f"{file}: {name_of(name)} has the wrong shape. Write the file again.")
        return reordered(config, own, name, value, back=True)[index]

    return parameters_of(config, read)
