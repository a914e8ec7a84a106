"""Tensors on a GPU: put from there, and given to there through page-locked memory."""

import pytest
import torch

import synthbroker as sb
from tools import drain, fill

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e5m2, torch.bool, torch.complex64])
def test_a_tensor_on_a_gpu_comes_back(server, ring_name, dataset, dtype):
    plain = torch.arange(60).reshape(3, 4, 5).to(dtype)
    with sb.Producer(server.url, ring=ring_name, capacity="10MB", producers=1) as out:
        out.put({"plain": plain.cuda(), "turned": plain.cuda().permute(2, 0, 1), "number": plain.cuda()[1, 2, 3]})
    (batch,) = dataset()
    for name, want in ("plain", plain), ("turned", plain.permute(2, 0, 1)), ("number", plain[1, 2, 3]):
        assert batch[name].dtype == dtype
        assert torch.equal(batch[name][0].to(torch.complex64), want.to(torch.complex64))


def test_a_tensor_may_be_overwritten_in_place_as_soon_as_put_returns(server, ring_name, dataset):
    image = torch.empty(1_000_000, device="cuda")
    with sb.Producer(server.url, ring=ring_name, capacity="200MB", producers=1) as out:
        for i in range(20):
            image.fill_(i)
            out.put({"x": image})
    for i, batch in enumerate(dataset()):
        assert (batch["x"] == i).all()


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
