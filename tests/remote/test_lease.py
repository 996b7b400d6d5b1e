"""One writer for a place in a bucket, by a clock that tests turn."""

import threading

import pytest
from memory_bucket import MemoryBucket

from consyn_jax.errors import UserError
from consyn_jax.remote.bucket import BucketError
from consyn_jax.remote.lease import LEASE_S, MARGIN_S, RENEW_S, Lease


class Clock:
    """Seconds that pass where somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.on_sleep = lambda: None

    def time(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.on_sleep()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def bucket() -> MemoryBucket:
    return MemoryBucket()


def lease(bucket: MemoryBucket, clock: Clock, holder: str) -> Lease:
    return Lease(bucket, "run/lease.json", "s3://bucket/run", holder, clock.time, clock.sleep)


def test_a_free_place_is_taken_at_once_and_left_for_the_next(
    bucket: MemoryBucket, clock: Clock
) -> None:
    first = lease(bucket, clock, "one")
    first.acquire()
    assert first.is_valid
    first.release()
    assert not first.is_valid
    lease(bucket, clock, "two").acquire()
    assert clock.now_s == 0


def test_a_second_writer_is_refused_once_the_first_renews(
    bucket: MemoryBucket, clock: Clock
) -> None:
    first, said = lease(bucket, clock, "one"), []
    first.acquire()
    clock.on_sleep = first.renew
    with pytest.raises(UserError, match="in use by process") as refused:
        lease(bucket, clock, "two").acquire(said.append)
    assert "s3://bucket/run" in str(refused.value)
    assert clock.now_s < RENEW_S
    assert len(said) == 1
    assert first.is_valid


def test_a_lease_that_nobody_renews_is_taken_over_when_its_holder_has_stopped(
    bucket: MemoryBucket, clock: Clock
) -> None:
    first, second = lease(bucket, clock, "one"), lease(bucket, clock, "two")
    first.acquire()
    second.acquire()
    assert LEASE_S <= clock.now_s <= LEASE_S + RENEW_S
    assert not first.is_valid
    first.renew()
    assert first.lost
    assert second.is_valid


def test_the_holder_stops_before_another_may_begin(bucket: MemoryBucket, clock: Clock) -> None:
    first = lease(bucket, clock, "one")
    first.acquire()
    clock.now_s = LEASE_S - MARGIN_S - 0.01
    assert first.is_valid
    clock.now_s = LEASE_S - MARGIN_S
    assert not first.is_valid
    first.renew()  # nobody has taken it
    assert first.is_valid
    assert not first.lost


def test_of_two_that_wait_one_gets_it(bucket: MemoryBucket, clock: Clock) -> None:
    lease(bucket, clock, "gone").acquire()
    second, third = lease(bucket, clock, "two"), lease(bucket, clock, "three")
    other = threading.Event()

    def take_in_between() -> None:
        if clock.now_s >= LEASE_S and not other.is_set():
            other.set()
            assert third._take(bucket.objects["run/lease.json"][1])
        elif other.is_set():
            third.renew()

    clock.on_sleep = take_in_between
    with pytest.raises(UserError, match="in use"):
        second.acquire()
    assert third.is_valid
    assert not second.is_valid


def test_a_renewal_whose_answer_was_lost_is_no_loss(bucket: MemoryBucket, clock: Clock) -> None:
    own = lease(bucket, clock, "one")
    own.acquire()
    bucket.put("run/lease.json", own._content(), bucket.objects["run/lease.json"][1])
    own.renew()
    assert not own.lost
    own.renew()
    assert own.is_valid


def test_a_store_that_does_not_answer_takes_no_lease_away(
    bucket: MemoryBucket, clock: Clock
) -> None:
    own = lease(bucket, clock, "one")
    own.acquire()

    def fail(name: str, key: str) -> None:
        raise BucketError("cannot be reached (x)")

    bucket.before = fail
    clock.now_s = 2 * LEASE_S
    with pytest.raises(BucketError):
        own.renew()
    assert not own.is_valid
    bucket.before = lambda name, key: None
    own.renew()
    assert own.is_valid


def test_a_lease_that_somebody_deleted_is_lost(bucket: MemoryBucket, clock: Clock) -> None:
    own = lease(bucket, clock, "one")
    own.acquire()
    bucket.delete(["run/lease.json"])
    own.renew()
    assert own.lost


def test_a_released_lease_of_another_is_not_deleted(bucket: MemoryBucket, clock: Clock) -> None:
    first, second = lease(bucket, clock, "one"), lease(bucket, clock, "two")
    first.acquire()
    second.acquire()
    first.release()
    assert "run/lease.json" in bucket.objects
    assert second.is_valid


def test_a_store_that_ignores_conditions_is_refused(bucket: MemoryBucket, clock: Clock) -> None:
    bucket.keeps_to_conditions = False
    with pytest.raises(UserError, match="If-None-Match"):
        lease(bucket, clock, "one").acquire()


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"host": "a\\nb", "pid": []}'])
def test_any_content_names_some_holder(bucket: MemoryBucket, clock: Clock, content: bytes) -> None:
    bucket.objects["run/lease.json"] = content, "v0"

    def change() -> None:
        bucket.objects["run/lease.json"] = content, "v1"

    clock.on_sleep = change
    with pytest.raises(UserError, match="in use by process") as refused:
        lease(bucket, clock, "one").acquire()
    assert "\n" not in str(refused.value)
