"""Run several processes as one: how they connect, what they exchange, and how they end.

process_place.py says where a process reads its id, the number of processes and the address of process 0.
JAX_LOCAL_DEVICE_IDS limits the devices of a process (otherwise it uses all that it sees; the usual setup is one process
per host). UDM_GRPO_SECRET, a text that is the same in all processes of a run, keeps strangers and other runs from
connecting (handshake.py); scripts/launch_slurm.sbatch generates one for each job.

Two ports of process 0 are used: the coordinator's for jax, and the next one (for 65535 the one before) for the
connections that detect the end of a process. All processes need the same output_dir, and each needs the start model's
folder and the prompt files; each starts or contacts its own scorers.
"""

import contextlib
import os
import socket
import sys
import threading
import traceback
from collections.abc import Iterator

import jax

from rewards_bridge.errors import USER_ERROR_STATUS
from udm_grpo.config import ConfigError, DistributedConfig
from udm_grpo.multihost.handshake import SECRET_VARIABLE, Member
from udm_grpo.multihost.peers import Peers, PeersError, meet
from udm_grpo.multihost.process_place import Place, find_place

BACKSTOP = 2
"""jax's own heartbeat, which ends processes without a clear message, times out after this many times ours."""
SHUTDOWN_S = 300
"""Seconds that the processes, all finished by then, may take to leave jax's coordinator; then it aborts them."""
GRACE_S = 3.0
"""Seconds to wait for news of another process's death, from which an error of this one often comes."""


@contextlib.contextmanager
def joined(config: DistributedConfig, expected: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Join the processes of a run inside the block; with one process, do nothing.

    With several, an exception inside ends this process (an `expected` one with a line on stderr and the status of a
    user's error, others with a traceback and status 1) and all other processes, with a line that names this one. The
    death of a process also ends the others, at once, or after distributed.silence_s if its machine is gone.

    Raises ConfigError and PeersError if the processes cannot connect. Must be entered before jax uses a device.
    """
    place = find_place(config, os.environ)
    if place is None:
        yield
        return
    me = Member(place.process_id, socket.gethostname(), os.getpid())
    print(
        f"host {me.host}, pid {me.pid}: {place.waiting(config.initialization_timeout_s)}", file=sys.stderr, flush=True
    )
    try:
        peers = meet(
            me,
            place.processes,
            place.watch(),
            config.initialization_timeout_s,
            config.silence_s,
            _end_with_the_others,
            os.environ.get(SECRET_VARIABLE, ""),
        )
    except PeersError as error:
        raise ConfigError(f"{error} ({place.counted()}). {place.way_out()}") from None
    try:
        _initialize(place, config)
        yield
        peers.wait_for_all()  # process 0 may write files for longer than the barrier in `shutdown` waits
        jax.distributed.shutdown()
        peers.close()
    except BaseException as error:
        _end(me, peers, error, expected)


def _initialize(place: Place, config: DistributedConfig) -> None:
    # A notice of preemption is agreed on by `any_process`; jax's own service would take SIGTERM from us.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.process_id,
        cluster_detection_method="deactivate",
        initialization_timeout=int(config.initialization_timeout_s),
        heartbeat_timeout_seconds=max(int(BACKSTOP * config.silence_s), 10),
        shutdown_timeout_seconds=SHUTDOWN_S,
    )


def _end_with_the_others(reason: str) -> None:
    print(f"error: this run has ended, because {reason}", file=sys.stderr, flush=True)
    os._exit(1)  # the main thread may wait for the lost process forever


def _end(me: Member, peers: Peers, error: BaseException, expected: tuple[type[Exception], ...]) -> None:
    """Report the error here, then to the others, and exit; in this order, since the second may end this process."""
    of_the_user = isinstance(error, expected)
    if not of_the_user:
        threading.Event().wait(GRACE_S)
        traceback.print_exception(error)
    else:
        print(f"error: {me}: {error}", file=sys.stderr, flush=True)
    peers.fail(f"{type(error).__name__}: {str(error)[:2000]}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(USER_ERROR_STATUS if of_the_user else 1)  # a normal exit would wait for the others
