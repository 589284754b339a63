"""Batches cut on the device: order, place, sharding, augmentation against explicit loops, bad
input."""

import itertools
import math
import time
from contextlib import suppress
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hessianflow.data import Augmentation, DeviceBatches
from hessianflow.data.streams import ExampleStream, Stream, stream_seed
from hessianflow.interfaces import HessianFlowError, ResizableBatches

STREAMS = get_args(Stream)
EVERYTHING = Augmentation(crop_padding=2, flip=True, cutout=3)


def image_set(count: int = 23, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Random pixels; the target of an example is its index, so that targets tell the order."""
    pixels = torch.randint(
        0, 256, (count, channels, 6, 5), generator=torch.Generator().manual_seed(0)
    )
    return pixels.to(torch.uint8), torch.arange(count)


def make(batch_size: int = 5, count: int = 23, **options: object) -> DeviceBatches:
    return DeviceBatches(
        *image_set(count), batch_size, **{"seed": 1, "augment": EVERYTHING, **options}
    )  # type: ignore[arg-type]


def epoch(batches: DeviceBatches) -> tuple[Tensor, Tensor]:
    inputs, targets = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(targets)


def place(start: int, stop: int) -> tuple[int, int]:
    return start, stop


def test_it_is_what_the_trainer_asks_for() -> None:
    batches: ResizableBatches = make()
    assert batches.num_examples == 23


def test_an_epoch_visits_every_example_once_and_keeps_the_ragged_tail() -> None:
    batches = make()
    sizes = [len(targets) for _, targets in batches]
    assert sizes == [5, 5, 5, 5, 3]
    orders = [epoch(batches)[1] for _ in range(3)]
    assert all(sorted(order.tolist()) == list(range(23)) for order in orders)
    assert not torch.equal(orders[0], orders[1])


@given(examples=st.integers(2, 200), batch_size=st.integers(2, 200))
def test_no_training_batch_is_less_than_half_of_what_was_asked_for(
    examples: int, batch_size: int
) -> None:
    batch_size = min(examples, batch_size)
    sizes = [
        stop - start
        for start, stop in ExampleStream(examples, batch_size, seed=0, shuffle=True)._handed_out(
            place
        )
    ]
    assert sum(sizes) == examples
    assert 2 * min(sizes) >= batch_size
    assert min(sizes) > 1
    assert max(sizes) <= max(batch_size, 3)
    assert all(size == batch_size for size in sizes[:-2])
    if batch_size > 2:
        assert len(sizes) == math.ceil(examples / batch_size)


def test_a_short_tail_is_shared_in_training_and_stays_in_evaluation() -> None:
    def sizes_of(shuffle: bool) -> list[int]:
        places = ExampleStream(4000, 398, seed=0, shuffle=shuffle)._handed_out(place)
        return [stop - start for start, stop in places]

    assert sizes_of(True) == [398] * 9 + [209, 209]
    assert sizes_of(False) == [398] * 10 + [20]


@given(sizes=st.lists(st.integers(1, 23), min_size=1, max_size=12), seed=st.integers(0, 5))
@settings(max_examples=25, deadline=None)
def test_neither_order_nor_augmentation_depends_on_the_batch_sizes(
    sizes: list[int], seed: int
) -> None:
    whole = epoch(make(23, seed=seed))
    batches, parts = make(sizes[0], seed=seed), []
    sequence = itertools.cycle(sizes)
    batches.set_batch_size(next(sequence))
    for batch in batches:
        parts.append(batch)
        batches.set_batch_size(next(sequence))
    inputs, targets = (torch.cat(part) for part in zip(*parts, strict=True))
    assert torch.equal(targets, whole[1])
    assert torch.equal(inputs, whole[0])


def test_a_new_size_holds_from_the_very_next_batch() -> None:
    batches, seen = make(4), []
    for _, targets in batches:
        seen.append(len(targets))
        batches.set_batch_size(2 if len(seen) == 1 else 9)
    assert seen == [4, 2, 9, 8]


def test_changing_the_size_takes_less_than_a_millisecond() -> None:
    batches = make()
    start = time.perf_counter()
    batches.set_batch_size(7)
    assert time.perf_counter() - start < 1e-3


@pytest.mark.parametrize("stop_after", [1, 3, 5, 6, 7])
def test_resuming_anywhere_equals_going_on(stop_after: int) -> None:
    """Batches of two epochs; the second stream starts from the state of the first, at another
    size."""

    def two_epochs(batches: DeviceBatches) -> list[tuple[Tensor, Tensor]]:
        return [*batches, *batches]

    first, resumed = make(), make(23)
    whole = two_epochs(make())
    stream = itertools.chain(first, first)
    head = list(itertools.islice(stream, stop_after))
    resumed.load_state_dict(first.state_dict())
    rest = list(resumed)
    while resumed.epoch < 2:
        rest += list(resumed)
    for (a, b), (c, d) in zip(whole, head + rest, strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)


def test_a_state_taken_after_the_last_batch_has_nothing_left_in_its_epoch() -> None:
    batches, resumed = make(), make()
    for _ in batches:
        state = batches.state_dict()
    assert state == {"seed": 1, "epoch": 0, "cursor": 23, "batch_size": 5, "num_examples": 23}
    resumed.load_state_dict(state)
    assert list(resumed) == []
    assert resumed.state_dict()["epoch"] == 1


def test_leaving_a_loop_early_goes_on_where_it_stopped() -> None:
    batches = make()
    first = next(iter(batches))[1]
    assert torch.equal(torch.cat([first, epoch(batches)[1]]), epoch(make())[1])


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_ranks_share_every_batch_without_overlap(world_size: int) -> None:
    whole = list(make(5))
    ranks = [make(5) for _ in range(world_size)]
    for rank, batches in enumerate(ranks):
        batches.set_shard(rank, world_size)
    for batch, parts in zip(whole, zip(*ranks, strict=True), strict=True):
        assert torch.equal(torch.cat([inputs for inputs, _ in parts]), batch[0])
        assert torch.equal(torch.cat([targets for _, targets in parts]), batch[1])
        sizes = [len(targets) for _, targets in parts]
        assert max(sizes) - min(sizes) <= 1
    assert len({str(batches.state_dict()) for batches in ranks}) == 1


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_augmentation_equals_a_loop_over_single_images(channels: int, channels_last: bool) -> None:
    """Oracle: pad, slice, mirror, normalise and blank each image by plain indexing."""
    images, targets = image_set(channels=channels)
    mean, std = [0.4, 0.5, 0.6][:channels], [0.2, 0.25, 0.3][:channels]
    options = {
        "mean": mean,
        "std": std,
        "seed": 1,
        "augment": EVERYTHING,
        "channels_last": channels_last,
    }
    inputs, order = epoch(DeviceBatches(images, targets, 5, dtype=torch.float64, **options))  # type: ignore[arg-type]
    draws = EVERYTHING.draw(23, 6, 5, seed=1, epoch=0)
    assert draws.offsets is not None
    assert draws.flips is not None
    assert draws.centres is not None
    for place, index in enumerate(order.tolist()):
        padded = torch.zeros(channels, 10, 9)
        padded[:, 2:8, 2:7] = images[index] / 255
        top, left = draws.offsets[place].tolist()
        picture = padded[:, top : top + 6, left : left + 5]
        picture = picture[:, :, ::1].flip(2) if draws.flips[place] else picture
        picture = (picture - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
        row, column = draws.centres[place].tolist()
        picture[:, max(row - 1, 0) : row + 2, max(column - 1, 0) : column + 2] = 0
        torch.testing.assert_close(inputs[place], picture.double(), rtol=1e-5, atol=1e-6)


def test_draws_cover_their_range_uniformly() -> None:
    """Counts of 9 x 9 windows, flips and centres within 5 standard errors of a binomial."""
    draws, n = Augmentation(4, flip=True, cutout=1).draw(100_000, 3, 2, seed=0, epoch=0), 100_000
    assert draws.offsets is not None
    assert draws.flips is not None
    assert draws.centres is not None
    windows = (draws.offsets[:, 0] * 9 + draws.offsets[:, 1]).bincount(minlength=81)
    cells = (draws.centres[:, 0] * 2 + draws.centres[:, 1]).bincount(minlength=6)
    for counts, p in ((windows, 1 / 81), (cells, 1 / 6), (draws.flips.sum()[None], 1 / 2)):
        assert ((counts - n * p).abs() < 5 * (n * p * (1 - p)) ** 0.5).all()


def test_each_augmentation_has_a_stream_of_its_own() -> None:
    alone, together = Augmentation(flip=True), EVERYTHING
    first, second = (a.draw(50, 6, 5, seed=3, epoch=2).flips for a in (alone, together))
    assert first is not None
    assert second is not None
    assert torch.equal(first, second)
    assert torch.equal(epoch(make(augment=None))[1], epoch(make())[1])


def test_every_stream_is_new_each_epoch_and_unlike_the_others() -> None:
    seeds = {stream_seed(s, name, e) for s in (0, 1) for name in STREAMS for e in (0, 1)}
    assert len(seeds) == 2 * 2 * len(STREAMS)
    epochs = [EVERYTHING.draw(50, 5, 5, seed=0, epoch=e) for e in (0, 1)]
    for name in ("offsets", "flips", "centres"):
        assert not torch.equal(*(getattr(draws, name) for draws in epochs))
    square = Augmentation(crop_padding=2, cutout=1).draw(50, 5, 5, seed=0, epoch=0)
    assert square.offsets is not None
    assert square.centres is not None
    # both are draws from 0..4
    assert not torch.equal(square.offsets.flatten()[:50], square.centres[:, 0])


@pytest.mark.parametrize(
    "augment", [None, Augmentation(crop_padding=1), Augmentation(flip=True), Augmentation(cutout=2)]
)
def test_memory_format_changes_no_value(augment: Augmentation | None) -> None:
    plain, last = (epoch(make(augment=augment, channels_last=flag))[0] for flag in (False, True))
    assert torch.equal(plain, last)
    batch = next(iter(make(augment=augment, channels_last=True)))[0]
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_floating_point_images_and_targets_pass_through() -> None:
    images, targets = torch.randn(7, 2, 4, 4), torch.randn(7, 3)
    batches = DeviceBatches(images, targets, 7, shuffle=False)
    inputs, outputs = next(iter(batches))
    assert torch.equal(inputs, images)
    assert torch.equal(outputs, targets)
    assert batches.num_classes == 0


@pytest.mark.parametrize("shape", [(), (8,), (3, 20), (2, 3, 4, 5)])
def test_inputs_that_are_no_images_are_handed_out_as_they_are(shape: tuple[int, ...]) -> None:
    inputs, targets = torch.randn(23, *shape), torch.arange(23)
    batches = DeviceBatches(inputs, targets, 5)
    found, order = epoch(batches)
    assert sorted(order.tolist()) == list(range(23))
    assert torch.equal(found, inputs[order])
    assert batches.input_shape == shape
    assert torch.equal(batches.sample(4)[0], inputs[batches.sample(4)[1]])
    assert torch.equal(batches.as_in_latest(found[:3]), found[:3])


def test_features_are_normalised_each_by_its_own_mean() -> None:
    inputs = torch.randn(23, 4) * 3 + 1
    mean, std = inputs.mean(0).tolist(), inputs.std(0).tolist()
    found, order = epoch(DeviceBatches(inputs, torch.arange(23), 5, mean=mean, std=std))
    torch.testing.assert_close(found, ((inputs - inputs.mean(0)) / inputs.std(0))[order])


def test_a_batch_that_fails_is_the_next_one() -> None:
    """Out of memory, say: nothing is skipped."""

    class Failing(DeviceBatches):
        calls = 0

        def _batch(self, *arguments: Any) -> tuple[Tensor, Tensor]:
            self.calls += 1
            if self.calls == 3:
                raise torch.OutOfMemoryError("no room")
            return super()._batch(*arguments)

    batches, seen = Failing(*image_set(), 5), []
    with suppress(torch.OutOfMemoryError):
        for _, targets in batches:
            seen.append(targets)
    assert (len(seen), batches.cursor) == (2, 10)
    for _, targets in batches:
        seen.append(targets)
    assert torch.equal(torch.cat(seen), epoch(DeviceBatches(*image_set(), 5))[1])


def test_dtype_rounds_once() -> None:
    half, full = (
        next(iter(make(augment=None, dtype=t)))[0] for t in (torch.bfloat16, torch.float32)
    )
    assert torch.equal(half, full.to(torch.bfloat16))


def test_value_range_is_what_black_and_white_become() -> None:
    images = torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
    images[1] = 255
    mean, std = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    batches = DeviceBatches(images, torch.arange(2), 2, mean=mean, std=std, shuffle=False)
    inputs, _ = next(iter(batches))
    for end, picture in zip(batches.value_range, inputs, strict=True):
        assert end.shape == (3,)
        torch.testing.assert_close(end[:, None, None].expand(3, 2, 2), picture)


def test_a_sample_is_fixed_plain_and_leaves_no_trace() -> None:
    batches = make()
    state, rng = batches.state_dict(), torch.get_rng_state()
    inputs, targets = batches.sample(8, seed=4)
    assert torch.equal(inputs, batches.examples(targets)[0])
    assert torch.equal(inputs, make(augment=None).examples(targets)[0])
    assert torch.equal(targets, make(3).sample(8, seed=4)[1])
    assert len(targets.unique()) == 8
    assert not torch.equal(targets, batches.sample(8, seed=5)[1])
    assert batches.state_dict() == state
    assert torch.equal(torch.get_rng_state(), rng)


def test_iterating_leaves_the_global_generator_alone() -> None:
    rng = torch.get_rng_state()
    epoch(make())
    assert torch.equal(torch.get_rng_state(), rng)


def test_facts_about_the_set() -> None:
    batches = DeviceBatches(*image_set(), 4, shuffle=False)
    assert (batches.input_shape, batches.num_classes, batches.num_examples) == ((3, 6, 5), 23, 23)
    assert DeviceBatches(*image_set(), 4, num_classes=40).num_classes == 40


def test_evaluation_starts_over_and_training_in_the_stored_order_goes_on() -> None:
    evaluated = make(5, shuffle=False, augment=None)
    next(iter(evaluated))
    assert torch.equal(epoch(evaluated)[1], torch.arange(23))
    trained, resumed = make(5, shuffle=False, augment=None), make(9, shuffle=False, augment=None)
    list(itertools.islice(trained, 2))
    resumed.load_state_dict(trained.state_dict())
    assert next(iter(resumed))[1].tolist() == [10, 11, 12, 13, 14]
    assert epoch(resumed)[1].tolist() == list(range(15, 23))
    assert torch.equal(epoch(resumed)[1], torch.arange(23))
    sharded = make(5, shuffle=False, augment=None)
    sharded.set_shard(0, 1)
    assert [next(iter(sharded))[1][0].item() for _ in range(3)] == [0, 5, 10]


def test_ranks_that_would_all_see_everything_are_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    batches = make()
    with pytest.warns(
        UserWarning,
        match=r"each of the 2 ranks .* all 23 examples, .* call set_shard\(rank, world_size\)",
    ):
        next(iter(batches))
    epoch(batches)  # a warning would be an error
    for quiet in (make(), make(shuffle=False)):
        if quiet._shuffle:
            quiet.set_shard(0, 1)
        epoch(quiet)


def test_evaluation_keeps_the_stored_order_and_takes_any_batch_size() -> None:
    batches = make(100, shuffle=False, augment=None)
    assert torch.equal(next(iter(batches))[1], torch.arange(23))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"num_examples": 24},
            "the saved data stream had 24 examples, this one has 23: cannot resume",
        ),
        ({"seed": 2}, "the saved data stream had 2 as seed, this one has 1: cannot resume"),
        (
            {"cursor": 24},
            "must lie within 23 examples, got epoch 0, cursor 24: the state is damaged",
        ),
        ({"epoch": -1}, "got epoch -1, cursor 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_foreign_states_are_refused(change: dict[str, int], message: str) -> None:
    batches = make()
    with pytest.raises(HessianFlowError, match=message):
        batches.load_state_dict({**batches.state_dict(), **change})
    with pytest.raises(
        HessianFlowError, match="this is no state of a data stream: it lacks seed, epoch"
    ):
        batches.load_state_dict({})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"batch_size": 24},
            "batch_size must not exceed the 23 examples of the data set, got 24: choose a smaller",
        ),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be a whole number, got 2.5"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"mean": [0.5]}, "mean must hold one value for each of the 3 channels, got 1"),
        ({"std": [0.5] * 2}, "std must hold one value for each of the 3 channels, got 2"),
        ({"std": [0.5, 0.0, 1.0]}, "std and value_scale must be positive"),
        ({"value_scale": -1.0}, "std and value_scale must be positive"),
    ],
)
def test_bad_arguments_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(HessianFlowError, match=message):
        make(**options)  # type: ignore[arg-type]


def test_bad_tensors_are_named() -> None:
    images, targets = image_set()
    with pytest.raises(
        HessianFlowError, match=r"shape \[N, C, H, W\] for augment, got \[23, 6, 5\]"
    ):
        DeviceBatches(images[:, 0], targets, 5, augment=EVERYTHING)
    with pytest.raises(
        HessianFlowError, match=r"shape \[N, C, H, W\] for channels_last, got \[23, 6, 5\]"
    ):
        DeviceBatches(images[:, 0], targets, 5, channels_last=True)
    with pytest.raises(HessianFlowError, match=r"images must have shape \[N, ...\], got \[\]"):
        DeviceBatches(torch.tensor(1.0), targets, 5)
    with pytest.raises(HessianFlowError, match="images must be one tensor, got a dict: use torch"):
        DeviceBatches({"x": images}, targets, 5)  # type: ignore[arg-type]
    with pytest.raises(HessianFlowError, match="targets must be one tensor, got an ndarray"):
        DeviceBatches(images, targets.numpy(), 5)
    with pytest.raises(
        HessianFlowError, match=r"images must be uint8 or floating point, got torch.int64"
    ):
        DeviceBatches(images.long(), targets, 5)
    with pytest.raises(HessianFlowError, match=r"one for each of the 23 images, got \[22\]"):
        DeviceBatches(images, targets[1:], 5)
    with pytest.raises(HessianFlowError, match="the data set is empty"):
        DeviceBatches(images[:0], targets[:0], 5)


def test_bad_ranks_counts_and_pixels_are_named() -> None:
    batches = make()
    with pytest.raises(HessianFlowError, match="got rank 2 of world_size 2"):
        batches.set_shard(2, 2)
    with pytest.raises(
        HessianFlowError, match="count must lie between 1 and the 23 examples, got 24"
    ):
        batches.sample(24)
    with pytest.raises(HessianFlowError, match="crop_padding must be at least 0 pixels, got -1"):
        Augmentation(crop_padding=-1)
    with pytest.raises(HessianFlowError, match="cutout must be at least 0 pixels, got -2"):
        Augmentation(cutout=-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu_equal_those_on_the_cpu() -> None:
    cpu, gpu = epoch(make()), epoch(make(device="cuda"))
    assert torch.equal(cpu[1], gpu[1].cpu())
    torch.testing.assert_close(cpu[0], gpu[0].cpu(), rtol=1e-6, atol=1e-6)
