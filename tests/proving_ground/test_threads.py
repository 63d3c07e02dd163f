"""Threads for what blocks: who waits is let go of at once, and what comes later is not lost."""

import asyncio
import threading

import pytest

from proving_ground.threads import Threads


def test_what_comes_after_a_cancel_is_given_up_and_tenants_do_not_wait_for_each_other() -> None:
    async def run() -> None:
        threads, going_on, late = Threads(most=1), threading.Event(), asyncio.Queue[str]()

        def block() -> str:
            going_on.wait(20)
            return "late"

        blocked = asyncio.create_task(threads.run("acme", block, unwanted=late.put_nowait))
        await asyncio.sleep(0)
        blocked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await blocked
        assert await threads.run("globex", lambda: "other") == "other"
        next_one = asyncio.create_task(threads.run("acme", lambda: "next"))
        await asyncio.wait([next_one], timeout=0.05)
        assert not next_one.done()  # the one thread of this tenant is still busy
        going_on.set()
        assert await late.get() == "late"
        assert await next_one == "next"

    asyncio.run(asyncio.wait_for(run(), 20))
