"""What is put comes back: every dtype, view and shape through a real server, as numpy and as torch, bit for bit."""

import secrets
import sys
import weakref
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import synthbroker as sb
from servers import RunningServer, eventually
from synthbroker.codec import CODECS
from synthbroker.schema import Array
from tools import same_bits

DTYPES = [
    "bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64",
    "float16", "float32", "float64", "complex64", "complex128", "bfloat16",
    "float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu",
]  # fmt: skip
SHAPES = [(), (1,), (0,), (0, 3), (3, 0, 2), (7,), (2, 3, 5), (1, 1, 1, 1, 2)]


def dtype_of(name: str) -> np.dtype[Any]:
    return np.dtype(getattr(ml_dtypes, name, name))


def noise(name: str, shape: tuple[int, ...], seed: int = 0) -> Array:
    """Make an array of random bits: NaNs with payloads, infinities, zeros with a sign, numbers without a name."""
    dtype = dtype_of(name)
    bits = np.random.default_rng(seed).integers(0, 2 if name == "bool" else 256, (*shape, dtype.itemsize), np.uint8)
    return bits.reshape(-1).view(dtype).reshape(shape).copy()


def as_tensor(array: Array) -> torch.Tensor:
    """Make the tensor of an array's bits, by another way than the package does."""
    target = getattr(torch, array.dtype.name)
    if not array.size:
        return torch.empty(array.shape, dtype=target)
    return torch.frombuffer(bytearray(array.tobytes()), dtype=target).reshape(array.shape)


def bits_of(tensor: torch.Tensor) -> tuple[str, tuple[int, ...], bytes]:
    """Give all that makes a tensor what it is; strides do not count."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    data = plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return str(tensor.dtype), tuple(tensor.shape), data


def put_all(server: RunningServer, ring: str, samples: list[Any], **options: Any) -> None:
    with sb.Producer(server.url, ring=ring, **{"capacity": "100MB", "producers": 1} | options) as out:
        for sample in samples:
            out.put(sample)


def read_arrays(server: RunningServer, ring: str, **options: Any) -> list[Any]:
    return list(sb.Consumer(server.url, ring=ring, group="arrays", **options))


def read_tensors(server: RunningServer, ring: str, **options: Any) -> list[Any]:
    return list(sb.RingDataset(server.url, ring=ring, group="tensors", **options).loader())


def check(
    server: RunningServer, ring: str, sample: Mapping[str, Any], expected: Mapping[str, Array], **options: Any
) -> None:
    """Send one sample and compare both readings of it with what must come."""
    put_all(server, ring, [sample], **options)
    (arrays,) = read_arrays(server, ring)
    (tensors,) = read_tensors(server, ring)
    assert set(arrays) == set(tensors) == set(expected)
    for name, want in expected.items():
        assert same_bits(arrays[name], want[None]), (name, arrays[name], want)
        assert bits_of(tensors[name]) == bits_of(as_tensor(want)[None]), (name, tensors[name], want)


# -- numpy

VIEWS: dict[str, Callable[[Array], Array]] = {
    "strided": lambda a: a[::2, 1:, ::3],
    "reversed": lambda a: a[::-1, ::-1, ::-1],
    "transposed": lambda a: a.T,
    "swapped": lambda a: a.swapaxes(0, 1),
    "fortran": np.asfortranarray,
    "broadcast": lambda a: np.broadcast_to(a[:1, :, :1], a.shape),
    "one": lambda a: a[1, 2, 3],
    "empty": lambda a: a[:0],
    "new_axis": lambda a: a[None, :, None, 0],
    "big_endian": lambda a: a.astype(a.dtype.newbyteorder(">")) if a.dtype.isbuiltin == 1 else a,
}


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_comes_back_in_every_shape(server, ring_name, dtype, codec):
    sample = {f"s{i}": noise(dtype, shape, i) for i, shape in enumerate([*SHAPES, (40, 50)])}
    check(server, ring_name, sample, sample, codec=codec)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_view_comes_back_as_the_values_it_shows(server, ring_name, dtype):
    base = noise(dtype, (4, 5, 6))
    sample = {name: view(base) for name, view in VIEWS.items()}
    sample["read_only"] = noise(dtype, (3, 3))
    sample["read_only"].flags.writeable = False
    expected = {name: np.array(view, dtype=dtype_of(dtype), order="C") for name, view in sample.items()}
    assert expected["big_endian"].dtype.isnative
    check(server, ring_name, sample, expected)


def test_big_endian_keeps_the_payload_of_a_nan(server, ring_name):
    native = np.array([0x7FC0BEEF, 0xFFC00001, 0x7F800001, 0x80000000], np.uint32)
    check(server, ring_name, {"x": native.astype(">u4").view(">f4")}, {"x": native.view(np.float32)})


def test_numbers_come_back_as_what_numpy_makes_of_them(server, ring_name):
    sample = {
        "int": 3, "big": 2**64 - 1, "float": -0.0, "nan": float("nan"), "complex": 1 - 2j, "bool": True,
        "f32": np.float32(1.5), "u8": np.uint8(255), "bf16": ml_dtypes.bfloat16(2.5), "long": np.longlong(-1),
    }  # fmt: skip
    check(server, ring_name, sample, {name: np.asarray(value) for name, value in sample.items()})


def test_two_hundred_fields_come_back(server, ring_name):
    sample = {f"field/{i}": noise(DTYPES[i % len(DTYPES)], SHAPES[i % len(SHAPES)], i) for i in range(200)}
    check(server, ring_name, sample, sample)


# -- torch


def torch_views(name: str) -> dict[str, torch.Tensor]:
    image = as_tensor(noise(name, (2, 3, 4, 5)))
    views = {
        "plain": image,
        "permuted": image.permute(3, 1, 0, 2),
        "expanded": image[:1, :, :, :1].expand(2, 3, 4, 5),
        "strided": image[:, ::2, 1:],
        "channels_last": image.to(memory_format=torch.channels_last),
        "number": image[0, 1, 2, 3],
        "empty": image[:0],
        "parameter": torch.nn.Parameter(image, requires_grad=False),
    }
    if image.is_floating_point() or image.is_complex():
        views["requires_grad"] = image.clone().requires_grad_()
    if name.startswith("complex"):
        finite = torch.arange(6).to(image.dtype).reshape(2, 3) * (1 + 2j)
        views["conj"] = finite.conj()
        views["neg"] = finite.conj().imag
        assert views["conj"].is_conj()
        assert views["neg"].is_neg()
    return views


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_torch_tensor_comes_back(server, ring_name, dtype):
    sample = torch_views(dtype)
    put_all(server, ring_name, [sample])
    (tensors,) = read_tensors(server, ring_name)
    assert {name: bits_of(tensor) for name, tensor in tensors.items()} == {
        name: bits_of(tensor[None]) for name, tensor in sample.items()
    }
    assert not any(tensor.requires_grad for tensor in tensors.values())
    (arrays,) = read_arrays(server, ring_name)
    assert arrays["plain"].dtype == dtype_of(dtype)
    assert arrays["plain"].tobytes() == bits_of(sample["plain"])[2]


def test_a_sample_may_be_put_while_another_thread_imports_torch(server, ring_name, monkeypatch):
    with sb.Producer(server.url, ring=ring_name, producers=1) as out:
        monkeypatch.setitem(sys.modules, "torch", ModuleType("torch"))  # so it is found halfway
        out.put({"n": 7})
        monkeypatch.undo()
    assert [int(batch["n"][0]) for batch in sb.Consumer(server.url, ring=ring_name, group="g")] == [7]


def test_arrays_and_tensors_may_stand_in_one_sample(server, ring_name):
    sample = {"a": np.arange(3), "t": torch.arange(4.0), "n": 5}
    check(server, ring_name, sample, {"a": np.arange(3), "t": np.arange(4, dtype=np.float32), "n": np.array(5)})


# -- any of it at random

SOME_SHAPES = st.lists(st.integers(0, 7), max_size=4).map(tuple)


@given(
    fields=st.lists(st.tuples(st.sampled_from(DTYPES), SOME_SHAPES, st.booleans()), min_size=1, max_size=5),
    codec=st.sampled_from(sorted(CODECS)),
    batch_size=st.integers(1, 4),
    samples=st.integers(1, 5),
)
@settings(max_examples=60, deadline=None)
def test_whatever_is_put_comes_back(server, fields, codec, batch_size, samples):
    ring = f"t-{secrets.token_hex(6)}"
    put = [
        {
            f"f{j}": np.asfortranarray(noise(dtype, shape, i)) if fortran else noise(dtype, shape, i)
            for j, (dtype, shape, fortran) in enumerate(fields)
        }
        for i in range(samples)
    ]
    put_all(server, ring, put, codec=codec)
    for batches in read_arrays(server, ring, batch_size=batch_size), read_tensors(server, ring, batch_size=batch_size):
        assert [len(batch.info.ids) for batch in batches] == [
            min(batch_size, samples - i) for i in range(0, samples, batch_size)
        ]
        for name in put[0]:
            got = [item for batch in batches for item in batch[name]]
            for array, want in zip(got, put, strict=True):
                if isinstance(array, torch.Tensor):
                    assert bits_of(array) == bits_of(as_tensor(want[name]))
                else:
                    assert same_bits(np.asarray(array), want[name].copy(order="C"))


# -- who owns the memory


@pytest.mark.parametrize("size", [10, 100_000])
def test_an_array_may_be_used_again_as_soon_as_put_returns(server, ring_name, size):
    array, tensor = np.empty(size, np.float32), torch.empty(size)
    with sb.Producer(server.url, ring=ring_name, capacity="100MB", producers=1, codec="raw") as out:
        for i in range(20):
            array.fill(i)
            tensor.fill_(i)
            out.put({"array": array, "tensor": tensor})
            array.fill(-1)
            tensor.fill_(-1)
    for i, batch in enumerate(read_arrays(server, ring_name)):
        assert (batch["array"] == i).all()
        assert (batch["tensor"] == i).all()


def test_lent_arrays_come_back_if_left_alone_until_flush(server, ring_name):
    arrays = np.arange(20 * 50_000, dtype=np.float32).reshape(20, -1)
    put = arrays.copy()
    with sb.Producer(server.url, ring=ring_name, capacity="100MB", producers=1) as out:
        for array in put:
            out.put({"x": array}, copy=False)
        assert out.flush()
        put.fill(-1)
    assert np.array_equal(np.concatenate([batch["x"] for batch in read_arrays(server, ring_name)]), arrays)


@pytest.mark.parametrize("copy", [True, False])
def test_a_lent_array_is_not_copied(own_server, ring_name, copy):
    server = own_server()
    with sb.Producer(server.url, ring=ring_name, capacity="4MB", producers=1) as out:
        out.put({"x": np.zeros(100_000)})
        out.flush()
        server.suspend()
        lent = np.ones(100_000)
        held = weakref.ref(lent)
        out.put({"x": lent}, copy=copy)
        del lent
        if copy:
            eventually(lambda: held() is None, "nobody needs it any more")
        else:
            assert held() is not None, "it is what will be sent"
        server.resume()
    assert [batch["x"][0, 0] for batch in read_arrays(server, ring_name)] == [0, 1]


def test_a_batch_belongs_to_the_reader(server, ring_name):
    put_all(server, ring_name, [{"x": np.full(3, float(i))} for i in range(6)])
    kept = []
    for batch in read_arrays(server, ring_name, batch_size=2):
        assert batch["x"].flags.writeable
        kept.append(batch["x"])
        batch["x"] += 10
    assert np.concatenate(kept)[:, 0].tolist() == [10, 11, 12, 13, 14, 15]


# -- what travels along


def test_recipe_and_metadata_come_back(server, ring_name):
    recipe = {"seed": 2**60, "name": "gen ü\n", "noise": 0.1, "steps": [1, None, {"deep": True}], "empty": {}}
    metadata = {"subject": "sub-01", "schön": "größe\0\t", "": ""}
    with sb.Producer(server.url, ring=ring_name, capacity="1MB", producers=1, info={"classes": ["a", "b"]}) as out:
        out.put({"x": 1}, recipe=recipe, metadata=metadata)
        out.put({"x": 2})
        assert out.info == {"classes": ["a", "b"]}
    for batches in read_arrays(server, ring_name, batch_size=2), read_tensors(server, ring_name, batch_size=2):
        info = batches[0].info
        assert info.recipes == (recipe, {})
        assert info.metadata == (metadata, {})
        assert info.ids == (1, 2)
        assert info.seqs == (1, 2)
        assert all(0 <= age_s < 60 for age_s in info.ages_s)
    assert sb.RingDataset(server.url, ring=ring_name, group="x").info == {"classes": ["a", "b"]}


# -- many in one call


def test_a_dict_with_a_leading_axis_is_taken_apart(server, ring_name):
    images, labels = noise("float32", (5, 2, 3)), torch.arange(5)
    with sb.Producer(server.url, ring=ring_name, capacity="1MB", producers=1) as out:
        out.put_batch(
            {"image": images, "label": labels},
            recipes=[{"seed": i} for i in range(5)],
            metadata=[None, {"a": "b"}] * 2 + [{}],
        )
        out.put_batch({"image": images[:0], "label": labels[:0]})
    (batch,) = read_arrays(server, ring_name, batch_size=5)
    assert same_bits(batch["image"], images)
    assert same_bits(batch["label"], labels.numpy())
    assert [recipe["seed"] for recipe in batch.info.recipes] == [0, 1, 2, 3, 4]
    assert batch.info.metadata == ({}, {"a": "b"}, {}, {"a": "b"}, {})


def test_a_list_of_samples_is_taken_in_order(server, ring_name):
    with sb.Producer(server.url, ring=ring_name, capacity="1MB", producers=1) as out:
        out.put_batch([{"x": i} for i in range(5)], recipes=[{"seed": i} for i in range(5)])
        out.put_batch([])
    (batch,) = read_arrays(server, ring_name, batch_size=5)
    assert batch["x"].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("samples", "texts", "message"),
    [
        ({"a": np.zeros((3, 1)), "b": np.zeros((2, 1))}, {}, "'a': 3, 'b': 2"),
        ({"a": np.zeros(3), "b": 1}, {}, "'b': None"),
        ({"a": np.zeros(3)}, {"recipes": [{}] * 2}, "2 recipes for 3 samples"),
        ([{"a": 1}], {"metadata": [{}] * 2}, "2 metadata for 1 samples"),
        ({}, {}, "at least one field"),
    ],
)
def test_a_batch_whose_lengths_differ_is_refused_whole(server, ring_name, samples, texts, message):
    with sb.Producer(server.url, ring=ring_name, capacity="1MB") as out:
        with pytest.raises(ValueError, match=message):
            out.put_batch(samples, **texts)
        assert out.flush()
        assert out.stats.samples == 0


def test_tuples_are_taken_and_given_with_names(server, ring_name):
    put_all(server, ring_name, [(np.full(2, i), i, -i) for i in range(4)], fields=("image", "label", "rest"))
    (arrays,) = read_arrays(server, ring_name, batch_size=4, fields=("label", "image"))
    label, image = arrays
    assert label.tolist() == [0, 1, 2, 3]
    assert image.tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]
    assert arrays["label"] is label
    (tensors,) = read_tensors(server, ring_name, batch_size=4)
    assert set(tensors) == {"image", "label", "rest"}


def test_names_for_tuples_hold_for_dicts_too(server, ring_name):
    with sb.Producer(server.url, ring=ring_name, capacity="1MB", fields=("image", "label")) as out:
        out.put({"label": 1, "image": np.zeros(2)})
        for wrong in {"image": np.zeros(2)}, {"image": np.zeros(2), "label": 1, "rest": 2}:
            with pytest.raises(ValueError, match=r"fields image.* where fields=\('image', 'label'\) names others"):
                out.put(wrong)
        out.put((np.ones(2), 2))
    assert out.stats.samples == 2
