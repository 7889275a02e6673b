"""Barriers in shared memory and the bulk copies that complete on them (PTX ISA 9.7.13.15).

A phase ends when all arrivals that were expected are here and no bytes are outstanding. A thread
that tries for a phase is held until it has ended, which try_wait may do. In late mode a bulk copy
arrives when no thread can go on without one, the newest first: nothing orders them but their
barriers.
"""

import numpy as np

from .memory import ANY


class Mbarrier:
    """One barrier; ``agent`` stands for the copies that arrive on it (memory.Clocks)."""

    def __init__(self, count, agent, made_by, stamp, n_agents):
        self.count = self.pending = count
        self.agent, self.made_by, self.stamp = agent, made_by, stamp
        self.phase = self.bytes = 0
        self.published = False  # to copies, which are of another proxy
        self.clock = np.zeros(n_agents, np.int64)
        self.waits = []  # mask, instruction to go on at, parity, what to write

    def step(self, machine):
        """End the phase if nothing is missing, and let go who waits for that."""
        if self.pending or self.bytes:
            return
        self.phase, self.pending = self.phase + 1, self.count
        still = []
        for mask, pc, parity, write in self.waits:
            if self.ended(parity):
                machine.clocks.acquire(np.unique(machine.warp_of[mask]), self.clock)
                write(True, mask)
                machine.resume(mask, pc)
            else:
                still.append((mask, pc, parity, write))
        self.waits = still

    def ended(self, parity):
        """Whether the phase of this parity that came last has ended."""
        return self.phase % 2 != parity


def _found(machine, offset, threads, instruction):
    barrier = machine.mbarriers.get(int(offset))
    if barrier is None:
        raise instruction.error("there is no mbarrier at the address")
    agents = np.unique(machine.warp_of[threads])
    own = agents == barrier.made_by
    if ((machine.clocks.seen[agents, barrier.made_by] < barrier.stamp) & ~own).any():
        machine.fault("an mbarrier is used without a barrier behind its start", instruction)
    return barrier


def _groups(machine, at, mask, instruction):
    """Offset and threads of every barrier that threads name."""
    threads = machine.active(mask)
    offsets = machine.shared.offsets(at()[threads], 8, instruction)
    for offset in np.unique(offsets):
        yield offset, threads[offsets == offset]


def _mbarrier(machine, instruction):
    names = [each for each in instruction.modifiers if each not in ("shared", "shared::cta", "cta")]
    names = [each for each in names if each not in ("release", "acquire")]
    if names == ["init", "b64"]:
        at = machine.addresses(instruction.operands[0], instruction)
        count = machine.reader(instruction.operands[1], "u32", instruction)

        def start(mask):
            for offset, threads in _groups(machine, at, mask, instruction):
                if len(threads) > 1 or int(offset) in machine.mbarriers:
                    raise instruction.error("an mbarrier is started twice")
                agent = machine.warps + len(machine.mbarriers)
                if agent >= len(machine.clocks.epoch):
                    raise instruction.error("there are more mbarriers than are followed")
                warp = machine.warp_of[threads[0]]
                number = int(np.broadcast_to(count(), machine.threads)[threads[0]])
                machine.mbarriers[int(offset)] = Mbarrier(
                    number, agent, warp, machine.clocks.epoch[warp], len(machine.clocks.epoch)
                )

        return start
    if names in (["arrive", "b64"], ["arrive", "expect_tx", "b64"], ["expect_tx", "b64"]):
        arrives, expects = "arrive" in names, "expect_tx" in names
        operands = instruction.operands[1:] if arrives else instruction.operands
        at = machine.addresses(operands[0], instruction)
        if len(operands) != 1 + expects:
            raise instruction.error("operands are not known")
        number = machine.reader(operands[1], "u32", instruction) if expects else None

        def arrive(mask):
            for offset, threads in _groups(machine, at, mask, instruction):
                barrier = _found(machine, offset, threads, instruction)
                if expects:
                    more = np.broadcast_to(number(), machine.threads)[threads]
                    barrier.bytes += int(more.astype(np.int64).sum())
                if not arrives:
                    continue
                if len(threads) > barrier.pending:
                    raise instruction.error("more threads arrive than the mbarrier expects")
                clock = machine.clocks.release(np.unique(machine.warp_of[threads]))
                barrier.clock = np.maximum(barrier.clock, clock)
                barrier.pending -= len(threads)
                barrier.step(machine)

        return arrive
    if names in (["try_wait", "parity", "b64"], ["test_wait", "parity", "b64"]):
        to, address, parity, *_ = instruction.operands
        write = machine.writer(to, "pred", instruction)
        at = machine.addresses(address, instruction)
        read = machine.reader(parity, "u32", instruction)

        def wait(going):
            now = np.zeros_like(going)
            for offset, threads in _groups(machine, at, going, instruction):
                barrier = _found(machine, offset, threads, instruction)
                parities = np.broadcast_to(read(), machine.threads)[threads] & 1
                for one in np.unique(parities):
                    mask = np.zeros_like(going)
                    mask[threads[parities == one]] = True
                    if barrier.ended(one):
                        machine.clocks.acquire(np.unique(machine.warp_of[mask]), barrier.clock)
                        write(True, mask)
                        now |= mask
                    else:
                        barrier.waits.append((mask, machine.pc + 1, int(one), write))
            return now

        return "block", wait
    raise instruction.error(f"the opcode mbarrier.{'.'.join(instruction.modifiers)} is not known")


def publish(machine, mask):
    """fence.mbarrier_init: copies see what these threads' warps have started (9.7.13.4)."""
    warps = np.unique(machine.warp_of[machine.active(mask)])
    for barrier in machine.mbarriers.values():
        barrier.published |= barrier.made_by in warps


def bulk_copy(machine, instruction):
    """cp.async.bulk from global to shared memory, completed on an mbarrier."""
    names = instruction.modifiers
    if (
        names[:2] != ("async", "bulk")
        or names[2] not in ("shared::cta", "shared::cluster")
        or (names[3:] != ("global", "mbarrier::complete_tx::bytes"))
    ):
        raise instruction.error(f"the opcode cp.{'.'.join(names)} is not known")
    to, source, size, barrier_at = instruction.operands
    targets, sources, barriers = (
        machine.addresses(each, instruction) for each in (to, source, barrier_at)
    )
    number = machine.reader(size, "u32", instruction)

    def one(thread):
        shared, count = machine.shared, int(np.broadcast_to(number(), machine.threads)[thread])
        if count % 16 or count == 0:
            raise instruction.error("a bulk copy is of a multiple of 16 bytes")
        who = np.array([thread])
        offsets = shared.offsets(targets()[who], count, instruction, align=16)
        (offset,) = shared.offsets(barriers()[who], 8, instruction)
        barrier = _found(machine, offset, who, instruction)
        if not barrier.published:
            machine.fault(
                "a copy completes on an mbarrier that no fence has published", instruction
            )
        begin = int(sources()[thread])
        if begin % 16:
            raise instruction.error("an address is not a multiple of 16")
        places = shared.places(offsets, count)
        shared.check_write(places, machine.warp_of[who], who, instruction)
        if shared.unfenced[places].any():
            machine.fault("a bulk copy to what was written without a proxy fence", instruction)
        shared.pending_writes[places] += 1

        def land():
            at = begin + np.arange(0, count, 16)
            shared.store(
                offsets, machine.store.read(at, 16, instruction).reshape(1, -1), instruction
            )
            shared.pending_writes[places] -= 1
            agent = np.array([barrier.agent])
            shared.note_write(places, agent, np.array([ANY]), unfenced=False)
            barrier.clock = np.maximum(barrier.clock, machine.clocks.release(agent))
            barrier.bytes -= count
            barrier.step(machine)

        if machine.late:
            machine.bulk.append(land)
        else:
            land()

    def run(mask):
        for thread in machine.active(mask):
            one(thread)

    return run


INSTRUCTIONS = {"mbarrier": _mbarrier}
