"""What users hold, seen as numpy arrays. torch is looked at only where the user has imported it already."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from synthbroker import schema
from synthbroker.schema import Array
from synthbroker.staging import OnGpu

_SAME_SIZE_INTEGER = {1: "uint8", 2: "int16"}


def as_sample(value: object, names: Sequence[str] | None) -> dict[str, Array | OnGpu]:
    """See a sample as arrays by name.

    Args:
        value: A mapping of names to tensors, or a sequence of tensors if `names` are given.
        names: Names for the items of a sequence.

    Returns:
        Arrays of supported dtypes in native byte order, of any strides; views of the user's memory where possible.
        Tensors on a GPU stay there, for `staging.fetch`; nothing waits for them.

    Raises:
        TypeError: Not a sample, or a field that is not a tensor or a number.
        ValueError: No fields, a bad name, or another number of items than names.
    """
    if type(value) is not dict and not isinstance(value, Mapping):
        if names is None or not isinstance(value, Sequence) or isinstance(value, str | bytes):
            raise TypeError(
                f"a sample must be a dict of arrays or tensors, got {type(value).__name__}; for tuples say "
                "fields=(...) (`generate --fields A,B`)"
            )
        if len(value) != len(names):
            raise ValueError(f"a sample of {len(value)} items where fields={tuple(names)} names {len(names)}")
        value = dict(zip(names, value, strict=True))
    elif names is not None and set(names) != set(value):
        raise ValueError(
            f"a sample with the fields {', '.join(map(str, value))} where fields={tuple(names)} names others"
        )
    if not value:
        raise ValueError("a sample needs at least one field")
    return {schema.check_name(name): as_array(name, item) for name, item in value.items()}


def as_array(name: str, value: Any) -> Array | OnGpu:
    """See one field as an array; errors as for `as_sample`."""
    if type(value) is np.ndarray and value.dtype.isbuiltin == 1 and schema.supports(value.dtype):
        return value
    if isinstance(value, OnGpu):
        return value
    torch: Any = sys.modules.get("torch")
    if isinstance(value, getattr(torch, "Tensor", ())):  # another thread may be importing it just now
        return _from_torch(name, value, torch)
    if isinstance(value, np.ma.MaskedArray):
        raise TypeError(f"field {name!r} is a masked array: call .filled() on it, the mask would be lost")
    if not isinstance(value, np.ndarray | np.generic | bool | int | float | complex) and not hasattr(
        value, "__array__"
    ):
        raise TypeError(f"field {name!r} must be an array, a tensor or a number, got {type(value).__name__}")
    array: Array = np.asarray(value)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if not schema.supports(array.dtype):
        raise TypeError(f"field {name!r} has dtype {array.dtype}, which cannot be sent: {_SUPPORTED}")
    return array


def to_torch(array: Array) -> Any:
    """Give the torch tensor that shares an array's memory. Imports torch."""
    import torch

    name = schema.DTYPES[schema.dtype_name(array.dtype)]
    if array.dtype.isbuiltin == 1:
        return torch.from_numpy(array)
    same_size = _SAME_SIZE_INTEGER[array.dtype.itemsize]
    return torch.from_numpy(array.view(same_size)).view(getattr(torch, name))


def split(samples: Mapping[str, Any]) -> list[dict[str, Array | OnGpu]]:
    """Split arrays that share their first size into samples.

    Raises:
        ValueError: They do not. Errors of `as_sample` besides.
    """
    arrays = as_sample(samples, None)
    lengths = {name: array.shape[0] if array.shape else None for name, array in arrays.items()}
    if len(set(lengths.values())) != 1 or None in lengths.values():
        raise ValueError(f"put_batch takes arrays that share their first size, got {lengths}")
    (length,) = set(lengths.values())
    return [{name: _item(array, i) for name, array in arrays.items()} for i in range(length or 0)]


def _item(array: Array | OnGpu, i: int) -> Array | OnGpu:
    """Give one item; [i : i + 1] and reshape instead of [i], because a scalar would lose its dtype's array."""
    if isinstance(array, OnGpu):
        return OnGpu(array.tensor[i], array.dtype)
    return array[i : i + 1].reshape(array.shape[1:])


def _from_torch(name: str, tensor: Any, torch: Any) -> Array | OnGpu:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        raise TypeError(f"field {name!r} is a {tensor.layout} tensor on {tensor.device}: only dense ones can be sent")
    dtype = schema.dtype_named(str(tensor.dtype).removeprefix("torch."))
    if dtype is None:
        raise TypeError(f"field {name!r} has dtype {tensor.dtype}, which cannot be sent: {_SUPPORTED}")
    if tensor.device.type == "cuda":
        return OnGpu(tensor.detach(), dtype)
    # .cpu() waits for the work that other devices have been given so far.
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if dtype.isbuiltin == 1:
        array: Array = tensor.numpy()
        return array
    integer = getattr(torch, _SAME_SIZE_INTEGER[dtype.itemsize])
    return np.asarray(tensor.view(integer).numpy().view(dtype))


_SUPPORTED = "supported are " + ", ".join(schema.DTYPES.values())
