"""Tensors on a GPU: put from there, and given to there. What the pretended GPU of the other tests cannot show."""

from contextlib import contextmanager

import pytest
import torch

import synthbroker as sb
from tools import IN_PARTS, check_ledger, drain, fill

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.float8_e4m3fn, torch.bool, torch.int64]


@contextmanager
def without_waiting():
    """Fail where torch waits for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def bits(tensor):
    return tensor.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("size", [1, 1000], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64])
def test_every_bit_of_a_tensor_on_a_gpu_comes_back(server, ring_name, dataset, dtype, size):
    plain = torch.arange(60 * size).remainder(200).reshape(3, 4, 5 * size).to(dtype)
    views = {
        "plain": lambda x: x,
        "turned": lambda x: x.permute(2, 0, 1),
        "part": lambda x: x[1:, ::2],
        "number": lambda x: x[1, 2, 3],
        "nothing": lambda x: x[:0],
    }
    if dtype.is_complex:
        views |= {"conj": lambda x: x.conj(), "neg": lambda x: x.conj().imag}
    there = plain.cuda()
    with sb.Producer(server.url, ring=ring_name, capacity="50MB", producers=1) as out:
        out.put({name: view(there) for name, view in views.items()} | {"here": plain})
    (batch,) = dataset()
    for name, view in views.items():
        assert batch[name].dtype == view(plain).dtype
        assert batch[name][0].shape == view(plain).shape
        assert torch.equal(bits(batch[name][0]), bits(view(plain)))


@pytest.mark.parametrize("turned", [False, True])
def test_a_tensor_may_be_overwritten_in_place_as_soon_as_put_returns(server, ring_name, dataset, turned):
    image = torch.empty(2000, 1000, device="cuda")
    with sb.Producer(server.url, ring=ring_name, capacity="400MB", producers=1, codec="raw") as out:
        for i in range(20):
            image.fill_(i)
            out.put({"x": image.T if turned else image})
    seen = [batch["x"].unique().tolist() for batch in dataset()]
    assert seen == [[i] for i in range(20)]


def test_a_tensor_may_be_let_go_of_as_soon_as_put_returns(server, ring_name, dataset):
    stream = torch.cuda.Stream()
    with sb.Producer(server.url, ring=ring_name, capacity="400MB", producers=1, codec="raw") as out:
        for i in range(20):
            with torch.cuda.stream(stream):
                out.put({"x": torch.full((2_000_000,), i, device="cuda")}, copy=i % 2 == 0)
                torch.full((2_000_000,), -1, device="cuda")  # takes the memory, if it is free
    assert [batch["x"].unique().tolist() for batch in dataset()] == [[i] for i in range(20)]


@pytest.mark.parametrize("copy", [True, False])
@pytest.mark.parametrize("size", [10, 3_000_000], ids=["small", "large"])
def test_put_waits_for_no_gpu(server, ring_name, dataset, size, copy):
    busy = torch.randn(4000, 4000, device="cuda")
    image = torch.zeros(size, 2, device="cuda")
    made = torch.cuda.Event()
    with sb.Producer(server.url, ring=ring_name, capacity="400MB", producers=1) as out:
        for _ in range(4):  # the first ones make memory and streams, which may wait
            busy = (busy @ busy).tanh()
            out.put({"x": image})
        out.flush()
        torch.cuda.synchronize()
        with without_waiting():
            for _ in range(50):
                busy = (busy @ busy).tanh()
            image.fill_(1)
            made.record()
            out.put({"x": image}, copy=copy)
            came_back_early = not made.query()
        out.flush()
    assert came_back_early, "put returned after the GPU's work was done"
    assert [batch["x"].unique().tolist() for batch in dataset()] == [[0]] * 4 + [[1]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_batch_reaches_the_gpu_through_page_locked_memory(server, ring_name, dataset, num_workers):
    fill(server, ring_name, range(20), size=10_000)
    batches = list(dataset(batch_size=4).loader(num_workers=num_workers, pin_memory=True))
    assert sorted(drain(batches)) == list(range(20))
    for batch in batches:
        assert batch["x"].is_pinned()
        moved = batch.to("cuda", non_blocking=True)
        assert moved["x"].is_cuda
        assert moved.info == batch.info


@pytest.mark.parametrize("part", [slice(None), slice(1, None)], ids=["whole", "part"])
def test_a_page_locked_batch_may_be_let_go_of_while_it_is_copied(server, ring_name, dataset, part):
    fill(server, ring_name, range(60), size=1_000_000, capacity="400MB")
    busy = torch.randn(4000, 4000, device="cuda")
    seen = []
    for batch in dataset(batch_size=2, pin_memory=True):
        busy = (busy @ busy).tanh()  # the copy comes after it, and the loop does not wait
        there = batch["x"][part].to("cuda", non_blocking=True)
        seen.append((batch["n"][part].tolist(), there[:, 0], there.amin(1), there.amax(1)))
    for numbers, *found in seen:
        assert [one.tolist() for one in found] == [numbers] * 3


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("size", [4, IN_PARTS, 1_000_000])
def test_batches_come_on_the_gpu(server, ring_name, dataset, num_workers, size):
    fill(server, ring_name, range(40), size=size, capacity="400MB")
    busy = torch.randn(2000, 2000, device="cuda")
    seen = []
    # Spawned: a process that has used CUDA may fork, but torch warns of it.
    options = {"num_workers": num_workers} | ({"multiprocessing_context": "spawn"} if num_workers else {})
    for batch in dataset(batch_size=4, device="cuda").loader(**options):
        assert batch["x"].is_cuda
        busy = (busy @ busy).tanh()  # holds the loop's stream up, so that later batches come before this one is used
        seen.append((batch["n"].clone(), (batch["x"] == batch["n"][:, None]).all()))
    assert all(bool(whole) for _, whole in seen)
    assert sorted(n for numbers, _ in seen for n in numbers.tolist()) == list(range(40))
    check_ledger(server, ring_name, "g")


def test_a_batch_is_handed_out_without_waiting_for_the_gpu(server, ring_name, dataset):
    fill(server, ring_name, range(40), size=IN_PARTS)
    stream = iter(dataset(batch_size=4, device="cuda"))
    next(stream)
    with without_waiting():
        total = sum(batch["x"].sum() for batch in stream)
    assert total.item() == IN_PARTS * sum(range(4, 40))


def test_a_gpu_that_is_not_there_is_refused(dataset):
    with pytest.raises(ValueError, match="'cuda:99' is not there"):
        next(iter(dataset(device="cuda:99")))
