"""Replace simulation workers that die, and end those that hang.

Flower 1.41 and 1.42 do neither. A worker is a Ray actor. A dead one goes back into Flower's pool, is used first from
then on, and fails all later clients. A simulation does not end while a worker hangs. `replace_dead_actors` puts a new
worker in the place of each dead one. `end_busy_actors` kills the workers that are running a client. `close_pool` does
the same and lets no further client start, so that Flower's shutdown does not wait.
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
    """Make Flower's pool replace each worker that dies. Call this in the process of the simulation."""
    global _closed
    _closed = False
    BasicActorPool.fetch_result_and_return_actor_to_pool = _fetch  # type: ignore
    BasicActorPool.submit = _submit  # type: ignore


def end_busy_actors() -> None:
    """Kill the workers that are running a client. Flower reports these clients as failed."""
    for pool in list(_pools):
        for future in list(pool._future_to_actor):
            _kill(pool, future)


def close_pool() -> None:
    """Kill the workers that are running a client, and every worker to which Flower gives a client from now on."""
    global _closed
    _closed = True
    end_busy_actors()


def _submit(pool: BasicActorPool, actor_fn: Any, job: tuple[Any, ...]) -> Any:
    """Start a client on a worker. Arrays that several messages share are passed as a reference."""
    _, message, *_ = job
    for arrays in message.content.array_records.values():
        if isinstance(arrays, Broadcast):
            arrays.share()  # not when the message is made, because Ray may not have started then
    return _flower_submit(pool, actor_fn, job)


def _fetch(pool: BasicActorPool, future: Any) -> Any:
    """Return a client's result; if its worker died, register a new worker for the pool and raise the error."""
    _pools.add(pool)
    if _closed:
        _kill(pool, future)
    try:
        return _flower_fetch(pool, future)
    except _DEAD:
        if _closed:
            raise
        log.warning("\t├──! a simulation worker died; starting a new one")
        pool._future_to_actor[future] = pool.create_actor_fn()  # type: ignore[no-untyped-call]
        raise


def _kill(pool: BasicActorPool, future: Any) -> None:
    actor: Any = pool._future_to_actor.get(future)
    if actor is not None:
        ray.kill(actor)
