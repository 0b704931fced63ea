"""What the tests learn of their children: what a call returned, that it failed, and that it was killed."""

import os
import signal
import time

import pytest
from children import Child, one_worker, together

pytestmark = one_worker


def double(number):
    return 2 * number


def fail():
    raise ValueError("on purpose")


def leave(status):
    os._exit(status)


def sleep():
    time.sleep(1000)


def test_calls_return_in_order_and_no_two_share_a_process():
    assert together((double, 3), (double, "a")) == [6, "aa"]
    first, second = together((os.getpid,), (os.getpid,))
    assert len({first, second, os.getpid()}) == 3


def test_a_failed_call_is_told():
    with pytest.raises(AssertionError, match="ended with 1"):
        together((double, 1), (fail,))
    assert Child(fail).status() == 1
    assert Child(leave, 9).status() == 9


def test_a_killed_child_is_told():
    child = Child(sleep)
    child.kill()
    assert child.status() == -signal.SIGKILL
