"""What leaves when: messages that may go at once, and those that promise something and so wait for the disk."""

from __future__ import annotations

from mesh.raft.installation import Installation
from mesh.raft.log import RaftLog
from mesh.raft.messages import AppendResponse, HardState, Message
from mesh.raft.ready import Write


class Outbox:
    """Of one server. One write is under way at a time; what comes meanwhile shares the next one."""

    def __init__(self, log: RaftLog, durable: HardState) -> None:
        self._log = log
        self._durable = durable
        self._messages: list[tuple[str, Message]] = []
        self._after_write: list[tuple[str, Message]] = []
        self._waiting: list[tuple[str, Message]] = []
        self._writing: Write | None = None

    @property
    def durable(self) -> HardState:
        """Term and vote as they are on disk."""
        return self._durable

    @property
    def writing(self) -> Write | None:
        """The write that was taken and has not ended."""
        return self._writing

    def send(self, peer_id: str, message: Message) -> None:
        """It leaves with the next Ready: it promises nothing that a crash could undo."""
        self._messages.append((peer_id, message))

    def send_after_write(self, peer_id: str, message: Message) -> None:
        """It leaves once all that has changed until now is durable."""
        self._after_write.append((peer_id, message))

    def send_when_durable(self, peer_id: str, message: Message, *, term: int, index: int) -> None:
        """It leaves once this term and the log up to the index are durable: at once when they are."""
        if self._log.stable >= index and self._durable.term == term:
            self.send(peer_id, message)
        else:
            self.send_after_write(peer_id, message)

    def accept(self, leader_id: str, term: int, index: int) -> None:
        """Tells the leader that the log is as its own up to the index, once that is durable."""
        response = AppendResponse(term, accepted=True, index=index)
        if self._after_write:
            # Appends that share a write share their answer: the later one says it all.
            peer_id, last = self._after_write[-1]
            is_earlier = (
                isinstance(last, AppendResponse) and last.accepted and last.term == term and last.index <= index
            )
            if is_earlier and peer_id == leader_id:
                self._after_write.pop()
        self.send_when_durable(leader_id, response, term=term, index=index)

    def take_messages(self) -> tuple[tuple[str, Message], ...]:
        """All that may leave now."""
        messages, self._messages = tuple(self._messages), []
        return messages

    def take_write(self, state: HardState, installation: Installation) -> Write | None:
        """Everything that is not durable yet, None when there is nothing or a write is under way."""
        if self._writing is not None:
            return None
        entries = self._log.begin_write()
        if state == self._durable and not entries and not installation.has_chunks:
            self._messages.extend(self._after_write)
            self._after_write = []
            return None
        self._writing = Write(state if state != self._durable else None, installation.begin_write(), entries)
        self._waiting, self._after_write = self._after_write, []
        return self._writing

    def end_write(self, write: Write) -> None:
        """That write is durable, and what waited for it leaves."""
        assert write is self._writing, "writes end in the order in which they were taken"
        self._writing = None
        if write.hard_state is not None:
            self._durable = write.hard_state
        self._log.end_write()
        self._messages.extend(self._waiting)
        self._waiting = []
