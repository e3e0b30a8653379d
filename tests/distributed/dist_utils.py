"""Test bodies that run in every process of a gloo group at once."""

import datetime
import faulthandler
import importlib
import inspect
import multiprocessing
import os
import traceback

import torch
import torch.distributed as dist

from testing import always_int8
from torch_switchback import convert

TIMEOUT = datetime.timedelta(seconds=int(os.environ.get("WORLD_TIMEOUT", "180")))
# Imported once, by the process that the workers are forked from.
PRELOAD = ["torch_switchback.distributed.tensor_parallel", "torch.distributed.fsdp", "torch.distributed.checkpoint"]


def in_processes(size):
    """Make a function a test whose body runs in so many processes, ranks of the default process group."""

    def decorate(body):
        def test(world, **arguments):
            world(size).run(body, arguments)

        own = inspect.Parameter("world", inspect.Parameter.KEYWORD_ONLY)
        arguments = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(body).parameters.values()
        ]
        test.__signature__ = inspect.Signature([own, *arguments])
        test.__name__, test.__doc__, test.body = body.__name__, body.__doc__, body
        return test

    return decorate


class World:
    """Processes that wait for bodies to run."""

    def __init__(self, size):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        # Here and not on rank 0, which would have to find a free port.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._connections, self._processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, self._store.port, theirs), daemon=True)
            process.start()
            self._connections.append(ours)
            self._processes.append(process)
        self.is_alive = True

    def run(self, body, arguments):
        """Run a body in every process. A rank that fails ends them all: the others may wait for it for good."""
        for connection in self._connections:
            connection.send((body.__module__, body.__name__, arguments))
        errors = {}
        for rank, connection in enumerate(self._connections):
            # Once one has failed, the others get a moment to say how, or are left waiting for it.
            if connection.poll(2 if errors else TIMEOUT.total_seconds()):
                error = connection.recv()
            else:
                error = "no answer"
            if error is not None:
                errors[rank] = error
        if errors:
            self.stop()
            raise AssertionError("\n".join(f"rank {rank}: {error}" for rank, error in errors.items()))

    def stop(self):
        self.is_alive = False
        for process in self._processes:
            process.kill()
            process.join()


def _serve(rank, size, port, connection):
    torch.set_num_threads(1)
    convert.with_min_tokens = always_int8  # as in tests/conftest.py
    store = dist.TCPStore("127.0.0.1", port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    while True:
        try:
            module, name, arguments = connection.recv()
        except EOFError:
            return
        torch.manual_seed(0)
        faulthandler.dump_traceback_later(0.8 * TIMEOUT.total_seconds())  # where it hangs
        try:
            function = getattr(importlib.import_module(module), name)
            getattr(function, "body", function)(**arguments)
            dist.barrier()
            faulthandler.cancel_dump_traceback_later()
        except BaseException:
            connection.send(traceback.format_exc())
            return
        connection.send(None)
