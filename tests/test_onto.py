"""Batches in page-locked memory and on GPUs: in the right order, ahead of the loop. The GPU is a pretended one."""

import gc
import itertools
import multiprocessing

import pytest
import torch
from torch.utils.data import DataLoader

import synthbroker as sb
from gpus import Gpus, bare
from servers import eventually
from synthbroker import lanes, onto
from tools import check_ledger, counters, drain, fill, number, pending

SIZE = 40_000  # numbers in a sample: batches of them lie in blocks of the pool

pytestmark = [
    pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning"),
    pytest.mark.filterwarnings("ignore:This DataLoader will create . worker processes:UserWarning"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]


@pytest.fixture(params=["lazy", "eager"])
def gpus(request, monkeypatch):
    monkeypatch.setattr(lanes, "_lanes", {})
    return Gpus(monkeypatch, request.param)


@pytest.fixture(autouse=True)
def _no_process_is_left():
    yield
    gc.collect()
    eventually(lambda: multiprocessing.active_children() == [], "all workers have ended")


def numbers(gpus, batches):
    """Read the numbers of batches on a GPU as the training loop's stream sees them, each batch before the next."""
    found = []
    for batch in batches:
        n, x = gpus.seen(batch["n"]), gpus.seen(batch["x"])
        assert (x == n[:, None]).all(), "a sample is not what was put"
        found += n.tolist()
    return found


@pytest.mark.parametrize("device", ["cuda:1", "cuda", torch.device("cuda", 0)])
@pytest.mark.parametrize(("prefetch", "way"), [(0, "dataset"), (1, "loader"), (3, "dataset")])
def test_batches_come_on_the_gpu_whole_and_once(server, ring_name, dataset, gpus, device, prefetch, way):
    fill(server, ring_name, range(40), size=SIZE)
    data = dataset(batch_size=3, device=device, prefetch=prefetch)
    batches = []
    for batch in data if way == "dataset" else data.loader():
        assert type(batch) is sb.Batch
        assert batch["x"].device == torch.device(device if device != "cuda" else "cuda:0")
        assert [recipe["n"] for recipe in batch.info.recipes] == numbers(gpus, [batch])
        batches.append(batch)
    assert numbers(gpus, batches) == list(range(40))
    assert gpus.waited_in == set(), "a thread waited for the GPU"
    check_ledger(server, ring_name, "g")


@pytest.mark.parametrize("size", [4, SIZE], ids=["small", "large"])
def test_a_stream_of_the_loops_own_is_the_one_that_waits(server, ring_name, dataset, gpus, size):
    fill(server, ring_name, range(20), size=size)
    stream = gpus.Stream("cuda:0")
    with torch.cuda.stream(stream):
        for batch in dataset(batch_size=4, device="cuda:0"):
            assert numbers(gpus, [batch]) == [recipe["n"] for recipe in batch.info.recipes]
            for tensor in batch.values():
                assert (tensor.untyped_storage().data_ptr(), stream) in gpus.recorded
    assert gpus.default[0].waited_for == []
    assert len(stream.waited_for) == 5


def test_page_locked_memory_is_used_again_and_not_before_its_copy_is_done(server, ring_name, dataset, gpus):
    fill(server, ring_name, range(60), size=SIZE)
    held = list(dataset(batch_size=2, device="cuda:0"))  # nothing is read until all have come
    assert numbers(gpus, held) == list(range(60))
    gpus.pinned.clear()
    fill(server, ring_name + "2", range(60), size=SIZE)
    assert numbers(
        gpus, sb.RingDataset(server.url, ring=ring_name + "2", group="g", batch_size=2, device="cuda:0")
    ) == (list(range(60)))
    large = [block for block in gpus.pinned if block.nbytes > SIZE]
    assert len(large) <= 8


@pytest.mark.parametrize("options", [{}, {"transform": dict}, {"fields": ("x", "n")}])
@pytest.mark.parametrize("part", [slice(None), slice(1, None)], ids=["whole", "part"])
def test_a_page_locked_batch_may_be_let_go_of_while_it_is_copied(server, ring_name, dataset, gpus, part, options):
    fill(server, ring_name, range(40), size=SIZE)
    data = dataset(batch_size=2, pin_memory=True, **options)
    there = [(batch["x"][part].to("cuda:0", non_blocking=True), batch["n"][part].tolist()) for batch in data]
    for x, numbers in there:
        assert (gpus.seen(x) == torch.tensor(numbers)[:, None]).all(), numbers
    assert sum(len(numbers) for _, numbers in there) == (40 if part.start is None else 20)


def test_no_more_than_prefetch_batches_are_sent_ahead(gpus):
    delivery = onto.Delivery("cuda:0", ahead=2)
    sent = [delivery.ship({"x": torch.full((5,), float(i))}) for i in range(5)]
    assert [one.flight is not None for one in sent] == [True, True, False, False, False]
    delivery.receive(sent[0])
    assert [one.flight is not None for one in sent] == [True, True, True, False, False]
    for i in 4, 1, 2, 3:
        assert (gpus.seen(delivery.receive(sent[i])["x"]) == i).all()


def test_batches_that_nobody_asks_for_keep_no_place(gpus):
    delivery = onto.Delivery("cuda:0", ahead=1)
    left = [delivery.ship({"x": torch.zeros(5)}) for _ in range(3)]
    del left
    gc.collect()
    assert delivery.ship({"x": torch.ones(5)}).flight is not None


@pytest.mark.parametrize("options", [{"fields": ("x", "n")}, {"transform": dict}, {"collate": list}])
def test_whatever_shape_a_batch_has_its_tensors_are_on_the_gpu(server, ring_name, dataset, gpus, options):
    fill(server, ring_name, range(8), size=SIZE)
    for batch in dataset(batch_size=4, device="cuda:0", **options):
        rows = (
            batch if "collate" in options else [{"n": n, "x": x} for n, x in zip(batch["n"], batch["x"], strict=True)]
        )
        if "collate" not in options:
            assert type(batch) is (sb.TupleBatch if "fields" in options else sb.Batch)
            assert len(batch.info.ids) == 4
        for row in rows:
            assert (gpus.seen(row["x"]) == gpus.seen(row["n"])).all()


def test_shapes_that_vary_come_as_lists_on_the_gpu(server, ring_name, dataset, gpus):
    with sb.Producer(server.url, ring=ring_name, capacity="50MB", producers=1, schema="n:i64[] x:f32[*]") as out:
        for i in range(8):
            out.put(number(i, 20_000 * i))
    for batch in dataset(batch_size=4, device="cuda:0"):
        for n, x in zip(gpus.seen(batch["n"]), batch["x"], strict=True):
            assert x.shape == (20_000 * n,)
            assert (gpus.seen(x) == n).all()


def test_what_is_no_tensor_stays_as_it_is():
    value = [{"a": torch.zeros(2), "b": "text"}, (torch.zeros(3), 5), {1}]
    assert onto.each_tensor(len, value) == [{"a": 2, "b": "text"}, (3, 5), {1}]


# -- page-locked memory


@pytest.mark.parametrize("way", ["dataset", "loader"])
@pytest.mark.parametrize("options", [{}, {"transform": dict}, {"fields": ("x", "n")}])
def test_batches_come_in_page_locked_memory(server, ring_name, dataset, gpus, way, options):
    fill(server, ring_name, range(40), size=SIZE)
    data = dataset(batch_size=4, pin_memory=way == "dataset", **options)
    seen = []
    for batch in data if way == "dataset" else data.loader(pin_memory=True):
        assert batch["x"].is_pinned()
        assert batch["n"].is_pinned()
        assert len(batch.info.ids) == 4
        seen += batch["n"].tolist()
        assert (batch["x"] == batch["n"][:, None]).all()
    assert seen == list(range(40))
    if not options:
        assert len([block for block in gpus.pinned if block.nbytes > SIZE]) <= 6, "blocks are used again"


def test_a_loader_may_ask_for_it_while_the_dataset_is_being_read(server, ring_name, dataset, gpus):
    fill(server, ring_name, range(40), size=SIZE)
    data = dataset(batch_size=4)
    seen = drain(itertools.islice(data, 3))
    for batch in data.loader(pin_memory=True):
        assert batch["x"].is_pinned()
        seen += batch["n"].tolist()
    assert seen == list(range(40))


def test_what_was_made_before_is_page_locked_when_it_is_handed_out(gpus):
    delivery = onto.Delivery()
    made = delivery.ship({"x": torch.ones(3)})
    delivery.pin()
    batch = delivery.receive(made)
    assert not made["x"].is_pinned()
    assert batch["x"].is_pinned()
    assert batch["x"].tolist() == [1, 1, 1]


without_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")


@without_a_gpu
def test_without_a_gpu_page_locked_memory_is_told_and_left(server, ring_name, dataset, caplog):
    fill(server, ring_name, range(8))
    assert drain(dataset(batch_size=4, pin_memory=True)) == list(range(8))
    assert "torch sees no GPU" in caplog.text


def test_with_workers_page_locked_memory_is_dataloaders_affair(dataset):
    assert dataset(pin_memory=True).loader(num_workers=1).pin_memory
    assert dataset().loader(num_workers=1, pin_memory=True).pin_memory
    assert not dataset().loader(num_workers=1).pin_memory
    assert not dataset().loader(pin_memory=True).pin_memory


# -- through worker processes


@pytest.mark.parametrize("persistent", [False, True])
def test_batches_of_workers_are_copied_in_the_training_process(server, ring_name, dataset, gpus, persistent):
    fill(server, ring_name, range(60), size=SIZE)
    options = {"num_workers": 2, "multiprocessing_context": "fork", "persistent_workers": persistent}
    loader = dataset(batch_size=2, device="cuda:0").loader(**options)
    seen = numbers(gpus, itertools.islice(loader, 4))
    seen += numbers(gpus, loader)
    assert sorted(seen) == list(range(60))
    assert pending(server, ring_name, "g") == []
    assert counters(server, ring_name, "g")["doubled"] == 0
    check_ledger(server, ring_name, "g")


def test_parcels_are_shipped_where_dataloader_asks_for_page_locked_memory(gpus):
    delivery = onto.Delivery("cuda:0", ahead=2)
    onto.open_harbour("here", delivery)
    shipped, info = onto.Parcel({"x": torch.ones(3)}, "info", "here").pin_memory()
    assert shipped.flight is not None
    assert info == "info"
    assert (gpus.seen(delivery.receive(shipped)["x"]) == 1).all()


def test_a_process_that_reads_onto_a_gpu_may_fork_workers_which_leave_it_alone(server, ring_name, dataset, gpus):
    fill(server, ring_name, range(40), size=SIZE)
    here = dataset(batch_size=2, prefetch=2, device="cuda:0")
    seen = numbers(gpus, itertools.islice(here, 1))
    eventually(lambda: counters(server, ring_name, "g")["delivered"] >= 6, "two batches lie ready")
    seen += numbers(gpus, here.loader(num_workers=1, multiprocessing_context="fork"))
    seen += numbers(gpus, here)
    assert sorted(seen) == list(range(40))
    check_ledger(server, ring_name, "g")


def test_a_plain_loaders_workers_refuse_a_device(server, ring_name, dataset, gpus, torch_is_brief):
    fill(server, ring_name, range(4))
    loader = DataLoader(dataset(device="cuda:0"), batch_size=None, num_workers=1, multiprocessing_context="fork")
    with pytest.raises(ValueError, match=r"dataset\.loader\(num_workers=N\)"):
        next(iter(loader))


# -- devices that are not there


@without_a_gpu
@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("device", ["cuda", "cuda:0", "cuda:9"])
def test_without_a_gpu_a_device_is_refused_when_reading_begins(dataset, device, num_workers):
    data = dataset(device=device)
    why = "" if torch.version.cuda else ": it was built without"
    with pytest.raises(ValueError, match=f"device '{device}' is not there: torch .* sees 0 GPUs{why}"):
        next(iter(data.loader(num_workers=num_workers)))


def test_a_gpu_beyond_the_last_is_refused(dataset, gpus, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ValueError, match=r"'cuda:2' is not there: torch .* sees 2 GPUs; CUDA_VISIBLE_DEVICES names 2"):
        next(iter(dataset(device="cuda:2")))


@pytest.mark.parametrize(
    ("device", "error"), [("mps", ValueError), ("cuda:x", ValueError), ("", ValueError), (0, TypeError)]
)
def test_words_that_name_no_device_are_refused_at_once(dataset, device, error):
    with pytest.raises(error, match="device must be"):
        dataset(device=device)


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), None])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_cpu_is_where_batches_are_anyway(server, ring_name, dataset, device, num_workers):
    fill(server, ring_name, range(8), size=SIZE)
    assert sorted(drain(dataset(device=device).loader(num_workers=num_workers))) == list(range(8))


def test_the_pretended_gpu_shows_what_an_unmarked_use_would_see(gpus):
    copied = lanes.lane(torch.device("cuda", 0), "in")
    with copied.work():
        there = torch.ones(3).pin_memory().to("cuda:0", non_blocking=True)
    if gpus.schedule == "lazy":
        assert not (gpus.seen(there) == 1).any()
    assert bare(there).shape == (3,)


VIEWS = {
    "turned": lambda x: x.T,
    "some": lambda x: x[1:, ::2],
    "expanded": lambda x: x[None].expand(3, -1, -1),
    "bytes": lambda x: x.view(torch.uint8)[:, 1:5],
    "negative": lambda x: torch.view_as_complex(x.reshape(-1, 100, 2)).conj().imag,
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
def test_a_view_that_a_user_makes_of_page_locked_memory_keeps_its_values(server, ring_name, dataset, gpus, view):
    fill_plainly(server, ring_name)
    data = dataset(batch_size=1, pin_memory=True, collate=lambda samples: {"x": view(samples[0]["x"])})
    for i, batch in enumerate(data):
        assert batch["x"].is_pinned()
        assert torch.equal(batch["x"], view(PLAIN + i))


def test_a_view_of_page_locked_memory_may_be_let_go_of_while_it_is_copied(server, ring_name, dataset, gpus):
    fill_plainly(server, ring_name)
    data = dataset(batch_size=1, pin_memory=True, collate=lambda samples: {"x": samples[0]["x"][1:]})
    there = [batch["x"].to("cuda:0", non_blocking=True) for batch in data]
    for i, x in enumerate(there):
        assert torch.equal(gpus.seen(x), (PLAIN + i)[1:])


PLAIN = torch.arange(60_000, dtype=torch.float32).reshape(300, 200)


def fill_plainly(server, ring):
    with sb.Producer(server.url, ring=ring, capacity="50MB", producers=1, codec="raw") as out:
        for i in range(20):
            out.put({"x": PLAIN + i})


def test_a_tensor_of_a_users_own_class_keeps_it(server, ring_name, dataset, gpus):
    class Image(torch.Tensor):
        pass

    fill(server, ring_name, range(6), size=SIZE)
    data = dataset(
        batch_size=1,
        pin_memory=True,
        collate=lambda samples: {"x": samples[0]["x"].as_subclass(Image), "n": samples[0]["n"]},
    )
    for i, batch in enumerate(data):
        assert type(batch["x"]) is Image
        assert (batch["x"].as_subclass(torch.Tensor) == i).all()
