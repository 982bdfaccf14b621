"""What a process takes from the system when it asks the C library for memory, and gives some of it back.

That is more than is in use at any time. Small blocks lie side by side in one heap; what becomes free in it
waits for a block that fits. (It could shrink at its end, but something small nearly always lies there.) Large
blocks are asked of the system one by one, and returned at once. The rules are those of glibc, the C library
of most Linux systems (its malloc.c).
"""

from bisect import bisect_left, insort

LARGEST = 32 * 2**20
"""No block from this size on lies in the heap (DEFAULT_MMAP_THRESHOLD_MAX)."""

SMALLEST = 128 * 2**10
"""All smaller ones do (DEFAULT_MMAP_THRESHOLD); the limit between grows with the blocks that are freed."""

Block = tuple[int, int]  # where it begins in the heap, below 0 outside of it; and its size


class Heap:
    """The heap of a process, and its blocks outside of that."""

    def __init__(self) -> None:
        self.end = 0  # bytes of the heap
        self.outside = 0  # bytes of the other blocks
        self.threshold = SMALLEST
        self.holes: list[Block] = []  # (begin, size) in the heap, in order, none beside another
        self.top = 0  # from here to the end of the heap, nothing lies

    @property
    def taken(self) -> int:
        """Bytes that the process has."""
        return self.end + self.outside

    def take(self, size: int) -> Block:
        """A block of so many bytes."""
        if size >= self.threshold:
            self.outside += size
            return -1, size
        fitting = [hole for hole in self.holes if hole[1] >= size]
        if not fitting:
            begin = self.top
            self.top += size
            self.end = max(self.end, self.top)
            return begin, size
        begin, whole = min(fitting, key=lambda hole: hole[1])
        self.holes.remove((begin, whole))
        if whole > size:
            insort(self.holes, (begin + size, whole - size))
        return begin, size

    def give(self, block: Block) -> None:
        """The block is not needed any more."""
        begin, size = block
        if begin < 0:
            self.outside -= size
            if size < LARGEST:
                self.threshold = max(self.threshold, size)
            return
        end, place = begin + size, bisect_left(self.holes, block)
        if place < len(self.holes) and self.holes[place][0] == end:
            end += self.holes.pop(place)[1]
        if place > 0 and sum(self.holes[place - 1]) == begin:
            begin = self.holes.pop(place - 1)[0]
        if end < self.top:
            insort(self.holes, (begin, end - begin))
            return
        self.top = begin


class Exact:
    """What is in use, and no more: to count on devices that torch itself manages."""

    def __init__(self) -> None:
        self.taken = 0

    def take(self, size: int) -> Block:
        self.taken += size
        return 0, size

    def give(self, block: Block) -> None:
        self.taken -= block[1]
