"""Samples from a GPU: in the right order, and without waiting in the generator's thread. The GPU is a pretended one."""

import pytest
import torch

import synthbroker as sb
from gpus import Gpus
from synthbroker import lanes, schema, staging, tensors
from tools import drain, number


@pytest.fixture(params=["lazy", "eager"])
def gpus(request, monkeypatch):
    monkeypatch.setattr(lanes, "_lanes", {})
    monkeypatch.setattr(staging, "_pool", staging.Pool(staging.KEEP_BYTES, lanes.pinned))
    return Gpus(monkeypatch, request.param)


def as_bytes(tensor):
    return tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


SHAPES = {
    "plain": lambda x: x,
    "turned": lambda x: x.permute(2, 0, 1),
    "part": lambda x: x[1:, ::2],
    "number": lambda x: x[1, 2, 3],
    "nothing": lambda x: x[:0],
}


@pytest.mark.parametrize("size", [1, 100], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.bool, torch.int64])
def test_every_bit_comes_through(server, ring_name, dataset, gpus, dtype, size):
    plain = torch.arange(60 * size).remainder(200).reshape(3, 4, 5 * size).to(dtype)
    there = gpus.tensor(plain)
    with sb.Producer(server.url, ring=ring_name, capacity="10MB", producers=1) as out:
        out.put({name: view(there) for name, view in SHAPES.items()} | {"here": plain})
    (batch,) = dataset()
    for name, view in (SHAPES | {"here": SHAPES["plain"]}).items():
        assert batch[name].dtype == dtype
        assert batch[name][0].shape == view(plain).shape
        assert torch.equal(as_bytes(batch[name][0]), as_bytes(view(plain)))


@pytest.mark.parametrize("view", [torch.conj, lambda x: x.conj().imag, lambda x: x.conj().T], ids=["conj", "neg", "T"])
def test_conjugate_and_negative_views_come_through(gpus, view):
    plain = torch.complex(torch.arange(12.0).reshape(3, 4), torch.arange(12.0).reshape(3, 4) + 1)
    staged = staging.fetch(tensors.as_sample({"x": view(gpus.tensor(plain))}, None))
    staged.wait()
    assert torch.equal(tensors.to_torch(staged.arrays["x"]), view(plain).resolve_conj().resolve_neg())


@pytest.mark.parametrize("size", [4, 40_000], ids=["small", "large"])
def test_a_tensor_may_be_overwritten_as_soon_as_put_returns(server, ring_name, reader, gpus, size):
    x = gpus.tensor(torch.zeros(size))
    with sb.Producer(server.url, ring=ring_name, capacity="50MB", producers=1) as out:
        for i in range(20):
            x.fill_(i)
            out.put({"n": i, "x": x})
    assert drain(reader()) == list(range(20))


def test_only_threads_that_encode_wait_for_a_gpu(server, ring_name, gpus):
    with sb.Producer(server.url, ring=ring_name, capacity="50MB", schema="x:f32[*] y:f32[2,*]") as out:
        for size, copy in (4, True), (40_000, True), (40_000, False):
            out.put({"x": gpus.tensor(torch.zeros(size)), "y": gpus.tensor(torch.zeros(size, 2)).T}, copy=copy)
    assert gpus.waited_in
    assert all(name.startswith("synthbroker-encoder") for name in gpus.waited_in)


def test_a_batch_on_a_gpu_may_be_put(server, ring_name, reader, gpus):
    n = torch.arange(10)
    with sb.Producer(server.url, ring=ring_name, capacity="50MB", producers=1) as out:
        out.put_batch({"n": gpus.tensor(n), "x": gpus.tensor(n[:, None].expand(10, 4).float())})
        out.put_batch([number(i) for i in range(10, 13)])
    assert drain(reader()) == list(range(13))


def test_a_copy_comes_after_the_work_that_made_the_tensor_on_whatever_stream(gpus):
    stream = gpus.Stream("cuda:0")
    x = gpus.tensor(torch.zeros(100))
    with torch.cuda.stream(stream):
        x.fill_(7)
        staged = staging.fetch(tensors.as_sample({"x": x}, None))
    staged.wait()
    assert (staged.arrays["x"] == 7).all()


def test_tensors_of_two_gpus_go_each_on_its_own_stream(gpus):
    sample = {"a": gpus.tensor(torch.full((5,), 1), 0), "b": gpus.tensor(torch.full((5,), 2), 1)}
    staged = staging.fetch(tensors.as_sample(sample, None))
    staged.wait()
    assert staged.arrays["a"].tolist() == [1] * 5
    assert staged.arrays["b"].tolist() == [2] * 5
    assert {stream.device.index for _, stream in gpus.recorded} == {0, 1}


def test_the_allocator_knows_that_our_stream_uses_the_tensor(gpus):
    x = gpus.tensor(torch.zeros(10, 10))
    staging.fetch(tensors.as_sample({"x": x[2:].T}, None))
    out = lanes.lane(x.device, "out").stream
    assert (x.untyped_storage().data_ptr(), out) in gpus.recorded
    assert out is not gpus.current_stream(x.device)


@pytest.mark.parametrize("lent", [False, True])
def test_the_callers_stream_waits_for_the_copy_unless_the_tensor_is_lent(gpus, lent):
    x = gpus.tensor(torch.zeros(10))
    staged = staging.fetch(tensors.as_sample({"x": x}, None), lent=lent)
    done = [flight.done for flight in staged.flights]
    assert gpus.default[0].waited_for == ([] if lent else done)


def test_memory_of_a_dropped_sample_is_not_used_again_before_its_copy_is_done(gpus):
    def put(value):
        return staging.fetch(tensors.as_sample({"x": gpus.tensor(torch.full((100_000,), value))}, None))

    first = put(1)
    done, address = first.flights[0].done, first.arrays["x"].ctypes.data
    del first
    second = put(2)
    assert second.arrays["x"].ctypes.data != address
    gpus.finish(done)
    second.wait()
    assert (second.arrays["x"] == 2).all()
    put(3)  # sees that the first is done
    assert put(4).arrays["x"].ctypes.data == address


def test_memory_is_used_again(server, ring_name, gpus):
    with sb.Producer(server.url, ring=ring_name, capacity="50MB", producers=1, codec="raw") as out:
        for i in range(30):
            out.put({"x": gpus.tensor(torch.full((50_000,), i))})
            out.flush()
    assert len(gpus.pinned) <= 3


def test_a_sample_that_does_not_fit_is_not_copied(server, ring_name, gpus):
    with sb.Producer(server.url, ring=ring_name, capacity="50MB", schema="x:f32[5]") as out:
        with pytest.raises(sb.SchemaError, match=r"x:f32\[6\]"):
            out.put({"x": gpus.tensor(torch.zeros(6))})
    assert gpus.pinned == []
    assert gpus.waited_in == set()


def test_what_is_on_a_gpu_is_described_without_a_copy(gpus):
    sample = tensors.as_sample({"x": gpus.tensor(torch.zeros(2, 3, dtype=torch.bfloat16)).T, "n": 5}, None)
    assert str(schema.infer(sample)) == "x:bf16[3,2] n:i64[]"
    assert sample["x"].nbytes == 12
    assert tensors.as_sample(sample, None) == sample


def test_samples_without_a_gpu_pass_as_they_are():
    sample = tensors.as_sample({"x": torch.ones(3), "n": 5}, None)
    staged = staging.fetch(sample)
    staged.wait()
    assert all(staged.arrays[name] is sample[name] for name in sample)
    assert not staged.own
