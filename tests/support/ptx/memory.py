"""Memory of the machine: global memory with its bounds, shared memory with its hazards.

Shared memory knows, for every piece of it, who wrote and who read it last, and what asynchronous
operations still read or write. Two accesses, one of them a write, must be ordered by a barrier
(PTX ISA 8.10, causality order; 9.7.13, barriers): who has seen whose accesses is kept as a vector
of clocks a warp, so an order that happened to come out right is no excuse. What is kept of the
past is the last write, and the last read of every warp.
"""

import numpy as np

from .parse import PtxError

# where shared memory starts: not at zero, so that a forgotten offset is found, and aligned for
# every swizzle
SHARED_BASE = 1024
# the reader or writer of a collective instruction: any thread of its warps
ANY = -2


class Global:
    """Tensors at their own addresses; every access must lie inside one of them."""

    def __init__(self):
        self.buffers = {}

    def add(self, tensor):
        """The storage of a CPU tensor or NumPy array may be accessed; its address."""
        if isinstance(tensor, np.ndarray):
            data = tensor.reshape(-1).view(np.uint8)
            self.buffers[data.ctypes.data] = data
            return data.ctypes.data
        import torch

        storage = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
        if storage.numel():
            self.buffers[storage.data_ptr()] = storage.numpy()
        return tensor.data_ptr()

    def pieces(self, addresses, size, instruction):
        """Of every buffer: positions among the addresses, and offsets in bytes."""
        if (addresses % size).any():
            raise instruction.error(f"an address is not a multiple of {size}")
        left = np.ones(len(addresses), bool)
        for start, data in self.buffers.items():
            here = left & (addresses >= start) & (addresses + size <= start + len(data))
            if here.any():
                left &= ~here
                yield np.flatnonzero(here), (addresses[here] - start), data
            if not left.any():
                return
        raise instruction.error(f"global memory outside of every argument at {addresses[left][0]}")

    def read(self, addresses, size, instruction):
        """Bytes ``[len(addresses), size]``."""
        out = np.empty((len(addresses), size), np.uint8)
        for at, offsets, data in self.pieces(addresses, size, instruction):
            out[at] = data[offsets[:, None] + np.arange(size)]
        return out

    def write(self, addresses, values, instruction):
        size = values.shape[1]
        for at, offsets, data in self.pieces(addresses, size, instruction):
            data[offsets[:, None] + np.arange(size)] = values[at]

    def change(self, what, addresses, values, instruction):
        """An atomic operation of each thread; what was there before it, in order of the threads."""
        size = values.dtype.itemsize
        before = np.empty_like(values)
        for at, offsets, data in self.pieces(addresses, size, instruction):
            for one, offset in zip(at, offsets, strict=True):
                place = data[offset : offset + size].view(values.dtype)
                before[one] = place[0]
                place[:] = what(place, values[one])
        return before


class Clocks:
    """Which accesses of which agent another has seen. An agent is a warp or an mbarrier."""

    def __init__(self, n):
        self.epoch = np.ones(n, np.int64)
        self.seen = np.zeros((n, n), np.int64)

    def release(self, agents):
        """What these agents have done and seen; what they do next is not part of it."""
        joined = self.seen[agents].max(0)
        joined[agents] = np.maximum(joined[agents], self.epoch[agents])
        self.seen[agents, agents] = self.epoch[agents]
        self.epoch[agents] += 1
        return joined

    def acquire(self, agents, clock):
        self.seen[agents] = np.maximum(self.seen[agents], clock)


class Shared:
    """Shared memory of one CTA in pieces of ``piece`` bytes, the narrowest access of the kernel."""

    def __init__(self, size, piece, clocks, fault):
        self.piece, self.clocks, self.fault = piece, clocks, fault
        size = -(-size // 16) * 16
        self.data = np.full(size, 0xA5, np.uint8)
        n, agents = size // piece, len(clocks.epoch)
        self.defined = np.zeros(n, bool)
        self.pending_writes, self.pending_reads = np.zeros(n, np.int16), np.zeros(n, np.int16)
        self.write_agent, self.write_thread = np.full(n, -1), np.full(n, -1)
        self.write_stamp = np.zeros(n, np.int64)
        self.read_stamp = np.zeros((agents, n), np.int64)
        self.read_thread = np.full((agents, n), -1)
        # written by ordinary instructions and not yet fenced for asynchronous readers
        self.unfenced = np.zeros(n, bool)

    def offsets(self, addresses, size, instruction, align=None):
        """Offsets in bytes of accesses of ``size`` bytes each."""
        offsets = addresses.astype(np.int64) - SHARED_BASE
        if (offsets % (align or size)).any():
            raise instruction.error(f"an address is not a multiple of {align or size}")
        if (offsets < 0).any() or (offsets + size > len(self.data)).any():
            raise instruction.error(f"shared memory of {len(self.data)} bytes is left")
        return offsets

    def places(self, offsets, size):
        """Pieces that accesses touch, ``[len(offsets), size / piece]``."""
        return offsets[:, None] // self.piece + np.arange(max(size // self.piece, 1))

    def load(self, offsets, size):
        return self.data[offsets[:, None] + np.arange(size)]

    def store(self, offsets, values, instruction):
        """Write bytes; two threads that write different bytes to one place are a fault."""
        at = offsets[:, None] + np.arange(values.shape[1])
        self.data[at] = values
        if (self.data[at] != values).any():
            self.fault("two threads write one place of shared memory at once", instruction)

    # -- hazards -------------------------------------------------------------------------------

    def check_read(self, places, agents, threads, instruction):
        flat, agent, thread = _flat(places, agents, threads)
        if self.pending_writes[flat].any():
            self.fault("read of shared memory that an asynchronous copy still writes", instruction)
        if not self.defined[flat].all():
            self.fault("read of shared memory that nothing has written", instruction)
        writer = self.write_agent[flat]
        other = (self.write_thread[flat] != thread) | (thread == ANY)
        late = self.write_stamp[flat] > self.clocks.seen[agent, writer]
        if ((writer >= 0) & other & late).any():
            self.fault("read of shared memory without a barrier behind the write", instruction)

    def note_read(self, places, agents, threads):
        flat, agent, thread = _flat(places, agents, threads)
        stamp = self.clocks.epoch[agent]
        again = (self.read_stamp[agent, flat] == stamp) & (self.read_thread[agent, flat] != thread)
        thread = np.where(again, ANY, thread)
        self.read_thread[agent, flat] = thread
        shared = self.read_thread[agent, flat] != thread
        self.read_thread[agent[shared], flat[shared]] = ANY
        self.read_stamp[agent, flat] = stamp

    def unchanged(self, offsets, values):
        """Pieces in which a write leaves what is there, in the order of :meth:`places`."""
        same = self.data[offsets[:, None] + np.arange(values.shape[1])] == values
        return same.reshape(-1, min(self.piece, values.shape[1])).all(1)

    def check_write(self, places, agents, threads, instruction, unchanged=False):
        """``unchanged``: pieces whose values stay; two writes of one value need no order."""
        flat, agent, thread = _flat(places, agents, threads)
        if self.pending_writes[flat].any():
            self.fault("write to shared memory that an asynchronous copy still writes", instruction)
        if self.pending_reads[flat].any():
            self.fault(
                "write to shared memory that an asynchronous product still reads", instruction
            )
        seen = self.clocks.seen[agent]
        writer = self.write_agent[flat]
        other = (self.write_thread[flat] != thread) | (thread == ANY)
        late = self.write_stamp[flat] > seen[np.arange(len(flat)), writer]
        if ((writer >= 0) & other & late & ~np.asarray(unchanged)).any():
            self.fault("write to shared memory without a barrier behind a write", instruction)
        read = self.read_stamp[:, flat]
        other = (self.read_thread[:, flat] != thread) | (thread == ANY)
        if ((read > seen.T) & other).any():
            self.fault("write to shared memory without a barrier behind a read", instruction)

    def note_write(self, places, agents, threads, unfenced):
        flat, agent, thread = _flat(places, agents, threads)
        self.write_agent[flat], self.write_thread[flat] = agent, thread
        self.write_stamp[flat] = self.clocks.epoch[agent]
        self.defined[flat] = True
        self.unfenced[flat] = unfenced

    def fence(self, agents):
        """fence.proxy.async by these warps: for all writes that they have seen or made."""
        at = np.flatnonzero(self.unfenced)
        writer = self.write_agent[at]
        known = (self.write_stamp[at] <= self.clocks.seen[agents][:, writer]).any(0)
        self.unfenced[at[known | np.isin(writer, agents)]] = False


def _flat(places, agents, threads):
    width = places.shape[1]
    return places.ravel(), np.repeat(agents, width), np.repeat(threads, width)


def as_words(values, dtype):
    """Bytes ``[n, size]`` as numbers ``[n, size / itemsize]``."""
    if values.shape[1] % np.dtype(dtype).itemsize:
        raise PtxError("bytes do not fill numbers")
    return np.ascontiguousarray(values).view(dtype)
