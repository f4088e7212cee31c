"""The machine's own disk counts what is written by all threads."""

from __future__ import annotations

import threading

from edge_runtime.files import OsFiles


class Interrupted(OsFiles):
    """A disk where another thread writes whenever one is about to count."""

    other = None

    @property
    def written(self):
        count = self._written
        if self.other is not None:
            other, self.other = self.other, None
            other.start()
            other.join(0.1)
        return count

    @written.setter
    def written(self, count):
        self._written = count


def test_what_two_threads_write_at_once_is_counted_whole(tmp_path):
    disk = Interrupted()
    fd = disk.create(tmp_path / "a")
    other = disk.other = threading.Thread(target=disk.write, args=(fd, b"12345", 100))
    disk.write(fd, b"abc", 0)
    other.join()
    disk.close(fd)
    assert disk.written == 8
