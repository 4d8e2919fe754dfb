"""A set of strings in order, for prefix scans that touch only what they find."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

# Half of a full bucket moves on a split; a bucket is one memmove on insert. Measured flat between 500 and 4000.
BUCKET_KEYS_MAX = 2000


class SortedKeys:
    """Unique strings by code point. Insert, remove and seek cost a bisection and one bucket's memmove."""

    def __init__(self, keys: Iterable[str] = ()) -> None:
        ordered = sorted(set(keys))
        half = BUCKET_KEYS_MAX // 2
        self._buckets = [ordered[at : at + half] for at in range(0, len(ordered), half)]
        self._firsts = [bucket[0] for bucket in self._buckets]

    def _bucket_at(self, key: str) -> int:
        """The bucket that holds the key, or would: the last one whose first key is not above it."""
        at = bisect_left(self._firsts, key)
        if at < len(self._firsts) and self._firsts[at] == key:
            return at
        return max(at - 1, 0)

    def add(self, key: str) -> None:
        """Inserts the key; it must not be there."""
        if not self._buckets:
            self._buckets, self._firsts = [[key]], [key]
            return
        at = self._bucket_at(key)
        bucket = self._buckets[at]
        insort(bucket, key)
        self._firsts[at] = bucket[0]
        if len(bucket) > BUCKET_KEYS_MAX:
            half = len(bucket) // 2
            self._buckets.insert(at + 1, bucket[half:])
            self._firsts.insert(at + 1, bucket[half])
            del bucket[half:]

    def remove(self, key: str) -> None:
        """Removes the key; it must be there."""
        at = self._bucket_at(key)
        bucket = self._buckets[at]
        position = bisect_left(bucket, key)
        assert bucket[position] == key, f"{key!r} is not among the sorted keys"
        del bucket[position]
        if bucket:
            self._firsts[at] = bucket[0]
        else:
            del self._buckets[at], self._firsts[at]

    def with_prefix(self, prefix: str) -> Iterator[str]:
        """The keys that start with the prefix, ascending. The set must not change while iterating."""
        if not self._buckets:
            return
        at = self._bucket_at(prefix)
        position = bisect_left(self._buckets[at], prefix)
        for bucket in self._buckets[at:]:
            for key in bucket[position:] if position else bucket:
                if not key.startswith(prefix):
                    return
                yield key
            position = 0

    def __iter__(self) -> Iterator[str]:
        for bucket in self._buckets:
            yield from bucket

    def __len__(self) -> int:
        return sum(map(len, self._buckets))
