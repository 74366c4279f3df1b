"""Workers of a simulation that die or hang, which Flower 1.41 does not deal with.

Flower puts a worker (a Ray actor) that died back into its pool, where it is taken first and fails all later clients;
and a simulation never ends while a worker hangs. `replace_dead_actors` puts a new worker in the place of a dead one;
`end_busy_actors` ends those that are still at work when nobody waits for them, and `close_pool` lets nothing start any
more, so that Flower's own shutdown does not wait.
"""

from __future__ import annotations

import logging
from typing import Any
from weakref import WeakSet

import ray
from flwr.simulation.ray_transport.ray_actor import BasicActorPool
from ray.exceptions import OutOfMemoryError, RayActorError

from fedmitr_flwr.federation.exchange.broadcast import Broadcast

log = logging.getLogger("fedmitr.actors")

_DEAD = (RayActorError, OutOfMemoryError)
_flower_fetch = BasicActorPool.fetch_result_and_return_actor_to_pool
_flower_submit = BasicActorPool.submit
_pools: WeakSet[BasicActorPool] = WeakSet()
_closed = False


def replace_dead_actors() -> None:
    """Make Flower's pool take a new worker when one died; to be called in the process that simulates."""
    global _closed
    _closed = False
    BasicActorPool.fetch_result_and_return_actor_to_pool = _fetch  # type: ignore
    BasicActorPool.submit = _submit  # type: ignore


def end_busy_actors() -> None:
    """Kill the workers that are running a client at this moment; Flower sees these clients fail."""
    for pool in list(_pools):
        for future in list(pool._future_to_actor):
            _kill(pool, future)


def close_pool() -> None:
    """Kill the workers that are running a client, and all that Flower would give a client from now on."""
    global _closed
    _closed = True
    end_busy_actors()


def _submit(pool: BasicActorPool, actor_fn: Any, job: tuple[Any, ...]) -> Any:
    """Give a client to a worker, its message's arrays as a reference where others get the same."""
    _, message, *_ = job
    for arrays in message.content.array_records.values():
        if isinstance(arrays, Broadcast):
            arrays.share()  # here and not earlier: Ray may still be starting when a message is made
    return _flower_submit(pool, actor_fn, job)


def _fetch(pool: BasicActorPool, future: Any) -> Any:
    """Wait for a client; where its worker died, leave a new one for Flower to put into the pool, and fail as before."""
    _pools.add(pool)
    if _closed:
        _kill(pool, future)
    try:
        return _flower_fetch(pool, future)
    except _DEAD:
        if _closed:
            raise
        log.warning("\t├──! a simulation worker died; starting another")
        pool._future_to_actor[future] = pool.create_actor_fn()  # type: ignore[no-untyped-call]
        raise


def _kill(pool: BasicActorPool, future: Any) -> None:
    actor: Any = pool._future_to_actor.get(future)
    if actor is not None:
        ray.kill(actor)
