"""`bench allreduce`: the time of a sum over all ranks, by size, against the wire.

The wire is a ring in which every rank sends to the next and receives from the one before, all at
the same time: over plain TCP sockets for gloo, by NCCL's own send and receive for NCCL. An
all-reduce of S bytes over W ranks must bring 2 S (W - 1) / W bytes through each rank's link in each
direction; that many bytes per second is its bus bandwidth.
"""

import os
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from resnet_dist.bench import results
from resnet_dist.bench.turns import figures_of, many, repeated, spread, take_turns
from resnet_dist.distributed import World
from resnet_dist.errors import UserError

SIZES = tuple(4**power for power in range(5, 14))  # bytes: 1 KiB to 64 MiB
WIRE_BYTES = 64 * 2**20
TURN_SECONDS = 0.2
PIECE_BYTES = 2**20


def bench_allreduce(world: World, runs: int, output: Path | None) -> None:
    """Prints a table by backend and size. A collective.

    Raises:
        UserError: there is only one rank.
    """
    if world.size == 1:
        raise UserError(
            "bench allreduce: needs several ranks; start it with "
            "`torchrun --standalone --nproc_per_node=2 -m resnet_dist bench allreduce`"
        )
    backends = {"gloo": torch.device("cpu")}
    if world.group is not None:
        backends["nccl"] = world.device
    figures: dict[str, Any] = {"ranks": world.size}
    for name, device in backends.items():
        group = None if name == "gloo" else world.group
        figures[name] = _measure(world, device, group, runs)
    if world.is_main:
        print(describe_figures(figures, world, runs))
        results.write(output, "allreduce", figures)


def _measure(
    world: World, device: torch.device, group: dist.ProcessGroup | None, runs: int
) -> dict[str, Any]:
    def reduce(nbytes: int) -> Callable[[], float]:
        values = torch.zeros(nbytes // 4, device=device)
        return _timed(lambda: dist.all_reduce(values, group=group), world)

    contestants = {f"{nbytes}": reduce(nbytes) for nbytes in SIZES}
    ring = _Ring(world) if group is None else None
    if ring is None:
        contestants["wire"] = _timed(_nccl_ring(world, device, group), world)
    else:
        contestants["wire"] = _timed(ring.pass_on, world)
    turns = take_turns(contestants, runs, world)
    if ring is not None:
        ring.close()
    wire = WIRE_BYTES / spread(turns.pop("wire")).median
    rows = []
    for nbytes in SIZES:
        of_this = turns[f"{nbytes}"]
        bus = 2 * nbytes * (world.size - 1) / world.size / spread(of_this).median
        rows.append(
            {
                "bytes": nbytes,
                "microseconds": figures_of(of_this, digits=2),
                "bus_gb_per_sec": round(bus / 1000, 4),
                "of_the_wire": round(bus / wire, 4),
            }
        )
    return {"wire_gb_per_sec": round(wire / 1000, 4), "sizes": rows}


def _timed(once: Callable[[], Any], world: World) -> Callable[[], float]:
    """Returns a function that measures the microseconds of `once`."""
    seconds = repeated(many(once), world, TURN_SECONDS)
    return lambda: 1e6 * seconds()


def _nccl_ring(
    world: World, device: torch.device, group: dist.ProcessGroup | None
) -> Callable[[], None]:
    sent, received = (torch.zeros(WIRE_BYTES // 4, device=device) for _ in range(2))
    after, before = (world.rank + 1) % world.size, (world.rank - 1) % world.size

    def once() -> None:
        operations = [
            dist.P2POp(dist.isend, sent, after, group),
            dist.P2POp(dist.irecv, received, before, group),
        ]
        for request in dist.batch_isend_irecv(operations):
            request.wait()

    return once


class _Ring:
    """Plain TCP sockets: one to the next rank, one from the rank before."""

    def __init__(self, world: World) -> None:
        """A collective."""
        with socket.create_server(("", 0), family=socket.AF_INET) as server:
            address = (os.uname().nodename, server.getsockname()[1])
            addresses = world.gather(address)
            after = addresses[(world.rank + 1) % world.size]
            host = "127.0.0.1" if after[0] == address[0] else after[0]
            self._to = socket.create_connection((host, after[1]), timeout=60)
            self._from, _ = server.accept()
        for one in (self._to, self._from):
            one.settimeout(60)
            one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._piece = bytes(PIECE_BYTES)
        self._buffer = bytearray(PIECE_BYTES)

    def pass_on(self) -> None:
        """Sends WIRE_BYTES to the next rank while receiving as many."""
        sending = threading.Thread(target=self._send)
        sending.start()
        left = WIRE_BYTES
        while left:
            count = self._from.recv_into(self._buffer, min(left, PIECE_BYTES))
            if not count:
                raise UserError("bench allreduce: another rank has closed its connection")
            left -= count
        sending.join()

    def _send(self) -> None:
        for _ in range(WIRE_BYTES // PIECE_BYTES):
            self._to.sendall(self._piece)

    def close(self) -> None:
        self._to.close()
        self._from.close()


def describe_figures(figures: dict[str, Any], world: World, runs: int) -> str:
    blocks = [f"\n{world.size} ranks, medians of {runs} runs"]
    for backend in ("gloo", "nccl"):
        if backend not in figures:
            blocks.append(f"\nskipped: {backend}, which needs a GPU for each rank")
            continue
        mine = figures[backend]
        table = [[backend, "us", "quartiles", "bus GB/s", "of the wire"]]
        for row in mine["sizes"]:
            us = row["microseconds"]
            quartiles = f"{us['low']:,.0f}..{us['high']:,.0f}"
            speed = [f"{row['bus_gb_per_sec']:.3f}", f"{row['of_the_wire']:.1%}"]
            table.append([f"{row['bytes']:,} bytes", f"{us['median']:,.0f}", quartiles, *speed])
        wire = f"wire: {mine['wire_gb_per_sec']:.2f} GB/s in each direction"
        blocks.append(f"\n{results.columns(table)}\n{wire}")
    return "\n".join(blocks)
